//! What is checked of every operation before anything is posted.

use anyfabric_plan::{Extents, PageList};
use anyfabric_wire::Imm;

use crate::region::Slice;
use crate::remote::RemoteSlice;
use crate::{Error, Result};

pub(crate) fn check_pages(src: &Slice, src_pages: PageList, dst: &RemoteSlice, dst_pages: PageList) -> Result<Extents> {
    let invalid =
        |what: &str, error: anyfabric_plan::PageError| Error::invalid(format!("{what}: {error}")).during("write_pages");
    src_pages.check_alike(&dst_pages).map_err(|error| invalid("page lists", error))?;
    src_pages.check(src.nbytes).map_err(|error| invalid("source pages", error))?;
    dst_pages.check(dst.nbytes).map_err(|error| invalid("destination pages", error))?;
    Ok(Extents::pages(src_pages, dst_pages))
}

pub(crate) fn check_imm(imm: Option<u32>, operation: &'static str) -> Result<Option<Imm>> {
    match imm {
        None => Ok(None),
        Some(value) => Imm::new(value).map(Some).ok_or_else(|| {
            Error::invalid(format!("imm {value} does not fit 30 bits (at most {})", Imm::COUNT - 1)).during(operation)
        }),
    }
}
