//! Lists of pages, as `anyfabric.pages.Pages.native` describes them.

use std::sync::Arc;

use anyfabric_engine::PageList;

use crate::arguments::Number;

/// `(indices_address, num_pages, page_bytes, stride, offset)`.
pub(crate) type NativePages = (Number, Number, Number, Number, Number);

/// Copies the indices.
///
/// # Safety
/// `num_pages` aligned `u32` lie at the address, and nobody changes them
/// meanwhile.
pub(crate) unsafe fn page_list(pages: NativePages) -> PageList {
    let (Number(address), Number(num_pages), Number(page_bytes), Number(stride), Number(offset)) = pages;
    let indices: Arc<[u32]> = if num_pages == 0 {
        Arc::default()
    } else {
        // SAFETY: as promised by the caller.
        unsafe { std::slice::from_raw_parts(address as *const u32, num_pages as usize) }.into()
    };
    PageList::new(indices, page_bytes, stride, offset)
}

/// Bytes of all pages; what does not fit is refused by the engine.
pub(crate) fn nbytes_of(pages: &NativePages) -> u64 {
    pages.1 .0.saturating_mul(pages.2 .0)
}
