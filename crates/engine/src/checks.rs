//! What is checked of every operation before anything is posted.

use anyfabric_plan::PageList;
use anyfabric_wire::{Address, Imm};

use crate::region::Slice;
use crate::remote::RemoteSlice;
use crate::{Error, PeerGroup, Region, Result, ScatterTarget};

pub(crate) fn check_pages(src: &Slice, src_pages: &PageList, dst: &RemoteSlice, dst_pages: &PageList) -> Result<()> {
    let invalid =
        |what: &str, error: anyfabric_plan::PageError| Error::invalid(format!("{what}: {error}")).during("write_pages");
    src_pages.check_alike(dst_pages).map_err(|error| invalid("page lists", error))?;
    src_pages.check(src.nbytes).map_err(|error| invalid("source pages", error))?;
    dst_pages.check(dst.nbytes).map_err(|error| invalid("destination pages", error))?;
    Ok(())
}

#[inline]
pub(crate) fn check_target(src: &Region, target: (usize, &ScatterTarget), group: Option<&PeerGroup>) -> Result<()> {
    let ScatterTarget { remote, src_offset, dst_offset, nbytes } = target.1;
    let fits = |offset: &u64, limit: u64| offset.checked_add(*nbytes).is_some_and(|end| end <= limit);
    if fits(src_offset, src.nbytes()) && fits(dst_offset, remote.nbytes()) && group.is_none() {
        return Ok(());
    }
    check_target_slowly(src, target, group)
}

fn check_target_slowly(src: &Region, (idx, target): (usize, &ScatterTarget), group: Option<&PeerGroup>) -> Result<()> {
    let ScatterTarget { remote, src_offset, dst_offset, nbytes } = target;
    let fits = |offset: &u64, limit: u64| offset.checked_add(*nbytes).is_some_and(|end| end <= limit);
    if !fits(src_offset, src.nbytes()) || !fits(dst_offset, remote.nbytes()) {
        let message = format!(
            "target {idx}: {nbytes} bytes from {src_offset} of {} to {dst_offset} of {} do not fit",
            src.nbytes(),
            remote.nbytes()
        );
        return Err(Error::invalid(message).during("scatter"));
    }
    let address = remote.address();
    let is_member = |group: &PeerGroup| {
        // Most list the targets in the order of the group.
        let is_it = |member: &Address| member.engine == address.engine;
        group.addresses.get(idx).is_some_and(is_it) || group.addresses.iter().any(is_it)
    };
    if group.is_some_and(|group| !is_member(group)) {
        let message = format!("target {idx} is at {address}, which is not in the group");
        return Err(Error::invalid(message).during("scatter"));
    }
    Ok(())
}

pub(crate) fn check_imm(imm: Option<u32>, operation: &'static str) -> Result<Option<Imm>> {
    match imm {
        None => Ok(None),
        Some(value) => Imm::new(value).map(Some).ok_or_else(|| {
            Error::invalid(format!("imm {value} does not fit 30 bits (at most {})", Imm::COUNT - 1)).during(operation)
        }),
    }
}
