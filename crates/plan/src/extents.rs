//! The byte ranges of one operation, in a form that is cheap to walk.

use std::sync::Arc;

use crate::PageList;

/// One range to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the source region.
    pub src: u64,
    /// Offset in the destination region.
    pub dst: u64,
    /// Length in bytes.
    pub nbytes: u64,
}

/// The ranges of one operation to one region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extents {
    /// One range.
    One(Extent),
    /// Pages `first..end` of two lists that are alike.
    Pages {
        /// The lists. Behind a pointer, for operations are handed from one to the next
        /// a dozen times, and most have a single range.
        lists: Arc<PageLists>,
        /// First page.
        first: usize,
        /// One past the last page.
        end: usize,
    },
}

/// Pages at the source, and where they go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageLists {
    /// At the source.
    pub src: PageList,
    /// At the destination.
    pub dst: PageList,
}

impl Extents {
    /// All pages of two lists that passed [`PageList::check_alike`]; of others,
    /// [`Extents::nth`] may panic.
    pub fn pages(src: PageList, dst: PageList) -> Self {
        Arc::new(PageLists { src, dst }).into()
    }

    /// Number of ranges.
    #[inline]
    pub const fn num_extents(&self) -> usize {
        match self {
            Self::One(_) => 1,
            Self::Pages { first, end, .. } => end.saturating_sub(*first),
        }
    }

    /// Bytes of all ranges; saturates, for one page may be listed any number of
    /// times.
    #[inline]
    pub fn nbytes(&self) -> u64 {
        match self {
            Self::One(extent) => extent.nbytes,
            Self::Pages { lists, .. } => lists.src.page_bytes().saturating_mul(self.num_extents() as u64),
        }
    }

    /// Range `idx`, below [`Extents::num_extents`].
    ///
    /// # Panics
    /// Past the end of either page list.
    #[inline]
    pub fn nth(&self, idx: usize) -> Extent {
        match self {
            Self::One(extent) => *extent,
            Self::Pages { lists, first, .. } => {
                let PageLists { src, dst } = &**lists;
                Extent { src: src.offset_of(first + idx), dst: dst.offset_of(first + idx), nbytes: src.page_bytes() }
            }
        }
    }

    /// The part that a shard of this operation carries: a byte range of one
    /// extent, or a range of pages.
    pub fn slice(&self, start: u64, len: u64) -> Self {
        match self {
            Self::One(extent) => Self::One(Extent { src: extent.src + start, dst: extent.dst + start, nbytes: len }),
            Self::Pages { lists, first, .. } => {
                let first = first + start as usize;
                Self::Pages { lists: Arc::clone(lists), first, end: first + len as usize }
            }
        }
    }
}

impl From<Arc<PageLists>> for Extents {
    /// As [`Extents::pages`].
    fn from(lists: Arc<PageLists>) -> Self {
        let end = lists.src.num_pages();
        Self::Pages { lists, first: 0, end }
    }
}
