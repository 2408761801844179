//! Pages: equal pieces of a region, picked by index.

use std::sync::Arc;

use thiserror::Error;

/// Equal pieces of a region: piece `i` begins at `offset + indices[i] * stride`.
///
/// One compact description serves a paged KV cache (indexed), a column of
/// heads (strided) and both at once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageList {
    indices: Arc<[u32]>,
    max_index: u32,
    page_bytes: u64,
    stride: u64,
    offset: u64,
}

/// Why a page list does not fit.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PageError {
    /// A page ends past the end of its region.
    #[error("page index {index} ends at byte {end}, but the region has {nbytes} bytes")]
    OutOfBounds {
        /// The index given.
        index: u32,
        /// Where its page would end; `u64::MAX` when that overflows.
        end: u64,
        /// Length of the region.
        nbytes: u64,
    },
    /// Source and destination disagree.
    #[error("source has {src} {what}, destination has {dst}")]
    Differ {
        /// What is compared.
        what: &'static str,
        /// At the source.
        src: u64,
        /// At the destination.
        dst: u64,
    },
}

impl PageList {
    /// A list over `indices`; see [`PageList::check`] for its bounds.
    pub fn new(indices: Arc<[u32]>, page_bytes: u64, stride: u64, offset: u64) -> Self {
        let max_index = indices.iter().copied().max().unwrap_or(0);
        Self { indices, max_index, page_bytes, stride, offset }
    }

    /// Number of pages.
    #[inline]
    pub fn num_pages(&self) -> usize {
        self.indices.len()
    }

    /// Bytes of one page.
    #[inline]
    pub const fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Bytes of all pages; saturates, for one page may be listed any number of
    /// times.
    pub fn nbytes(&self) -> u64 {
        self.page_bytes.saturating_mul(self.indices.len() as u64)
    }

    /// Where page `page_idx` begins. Wraps instead of overflowing: lists that
    /// passed [`PageList::check`] do neither.
    ///
    /// # Panics
    /// Past the end of the list.
    #[inline]
    pub fn offset_of(&self, page_idx: usize) -> u64 {
        u64::from(self.indices[page_idx]).wrapping_mul(self.stride).wrapping_add(self.offset)
    }

    /// Whether every page lies inside a region of `nbytes` bytes. The largest
    /// index decides, so this costs the same for one page and a million.
    ///
    /// # Errors
    /// [`PageError::OutOfBounds`].
    pub fn check(&self, nbytes: u64) -> Result<(), PageError> {
        if self.indices.is_empty() {
            return Ok(());
        }
        let end = u64::from(self.max_index)
            .checked_mul(self.stride)
            .and_then(|at| at.checked_add(self.offset))
            .and_then(|at| at.checked_add(self.page_bytes));
        match end {
            Some(end) if end <= nbytes => Ok(()),
            end => Err(PageError::OutOfBounds { index: self.max_index, end: end.unwrap_or(u64::MAX), nbytes }),
        }
    }

    /// Whether both sides have the same number of pages of the same size.
    ///
    /// # Errors
    /// [`PageError::Differ`].
    pub fn check_alike(&self, dst: &Self) -> Result<(), PageError> {
        let differ = |what, src, dst| Err(PageError::Differ { what, src, dst });
        if self.indices.len() != dst.indices.len() {
            return differ("pages", self.indices.len() as u64, dst.indices.len() as u64);
        }
        if self.page_bytes != dst.page_bytes {
            return differ("bytes a page", self.page_bytes, dst.page_bytes);
        }
        Ok(())
    }
}
