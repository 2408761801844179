//! What is checked of every operation before anything is posted.

use std::sync::Arc;

use anyfabric_plan::{Extent, PageList};
use anyfabric_transports::Region as Memory;
use anyfabric_wire::{Address, Imm};

use crate::inner::Inner;
use crate::region::Slice;
use crate::remote::RemoteSlice;
use crate::{Code, Error, PeerGroup, Region, Result, ScatterTarget};

impl Inner {
    /// Whether this engine may read the source of an operation.
    #[inline]
    pub(crate) fn check_source(
        self: &Arc<Self>,
        (inner, memory): (&Arc<Self>, &Memory),
        operation: &'static str,
    ) -> Result<()> {
        self.check_open_to(operation)?;
        if !Arc::ptr_eq(inner, self) {
            let message = format!("region {} belongs to another engine; register the memory here", memory.id);
            return Err(Error::invalid(message).during(operation));
        }
        check_memory(memory, operation)
    }
}

/// Whether a region of this engine may be used.
#[inline]
pub(crate) fn check_memory(memory: &Memory, operation: &'static str) -> Result<()> {
    if memory.is_closed() {
        let mut error = Error::new(Code::Closed, format!("region {} is closed", memory.id)).during(operation);
        error.context.region = Some(memory.id);
        return Err(error);
    }
    Ok(())
}

/// The range of a write, if both sides are as long.
#[inline]
pub(crate) fn check_alike(src: &Slice, dst: &RemoteSlice) -> Result<Extent> {
    if src.nbytes != dst.nbytes {
        let message = format!("the source has {} bytes, the destination {}", src.nbytes, dst.nbytes);
        return Err(Error::invalid(message).during("write"));
    }
    Ok(Extent { src: src.offset, dst: dst.offset, nbytes: src.nbytes })
}

/// Whether two lists of pages fit each other, and each the bytes that there are.
pub(crate) fn check_pages(
    (src_nbytes, src_pages): (u64, &PageList),
    (dst_nbytes, dst_pages): (u64, &PageList),
) -> Result<()> {
    let invalid =
        |what: &str, error: anyfabric_plan::PageError| Error::invalid(format!("{what}: {error}")).during("write_pages");
    src_pages.check_alike(dst_pages).map_err(|error| invalid("page lists", error))?;
    src_pages.check(src_nbytes).map_err(|error| invalid("source pages", error))?;
    dst_pages.check(dst_nbytes).map_err(|error| invalid("destination pages", error))?;
    Ok(())
}

#[inline]
pub(crate) fn check_target(
    src: &Region,
    (idx, target): (usize, &ScatterTarget),
    group: Option<&PeerGroup>,
) -> Result<()> {
    if !fits(src.nbytes(), target) {
        return Err(does_not_fit(src, idx, target));
    }
    if let Some(group) = group {
        check_member(group, idx, target.remote.address())?;
    }
    Ok(())
}

/// Whether a target lies in the source, which has so many bytes, and in the destination.
#[inline]
pub(crate) fn fits(limit: u64, target: &ScatterTarget) -> bool {
    let ScatterTarget { remote, src_offset, dst_offset, nbytes } = target;
    let fits = |offset: u64, limit: u64| offset.checked_add(*nbytes).is_some_and(|end| end <= limit);
    fits(*src_offset, limit) && fits(*dst_offset, remote.nbytes())
}

#[cold]
fn does_not_fit(src: &Region, idx: usize, target: &ScatterTarget) -> Error {
    let ScatterTarget { remote, src_offset, dst_offset, nbytes } = target;
    let message = format!(
        "target {idx}: {nbytes} bytes from {src_offset} of {} to {dst_offset} of {} do not fit",
        src.nbytes(),
        remote.nbytes()
    );
    Error::invalid(message).during("scatter")
}

fn check_member(group: &PeerGroup, idx: usize, address: &Address) -> Result<()> {
    if group.has_at(idx, address) || group.addresses.iter().any(|member| member.engine == address.engine) {
        return Ok(());
    }
    Err(Error::invalid(format!("target {idx} is at {address}, which is not in the group")).during("scatter"))
}

pub(crate) fn check_imm(imm: Option<u32>, operation: &'static str) -> Result<Option<Imm>> {
    match imm {
        None => Ok(None),
        Some(value) => Imm::new(value).map(Some).ok_or_else(|| {
            Error::invalid(format!("imm {value} does not fit 30 bits (at most {})", Imm::COUNT - 1)).during(operation)
        }),
    }
}
