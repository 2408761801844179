//! How one NIC's part of an operation is cut into batches of writes.
//!
//! Segments bound how long a small write can be stuck behind a large one, and
//! no write is longer than its NIC takes. Of one write only the last segment
//! carries the immediate; of pages each.

use anyfabric_plan::{Extent, Extents};

use super::nic::Marks;

/// What of a part has not been posted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cursor {
    /// Next byte of one range, or next page.
    at: u64,
    /// One past the last.
    end: u64,
    /// Within a page that is longer than a segment.
    within: u64,
    /// A range without bytes is posted once all the same.
    is_over: bool,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// The writes in the buffer, marked so.
    Batch(Marks),
    /// A write whose immediate must wait for what was posted before it.
    Wait,
    /// Nothing.
    Over,
}

/// What a NIC takes, and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Writes in a batch.
    pub(super) max_writes: usize,
    /// Bytes in a batch, and in a write.
    pub(super) segment_bytes: u64,
    /// Whether an immediate follows what was posted before it by itself.
    pub(super) is_ordered: bool,
}

impl Cursor {
    /// A byte range of one extent, or a range of pages.
    pub(super) const fn new(start: u64, len: u64) -> Self {
        Self { at: start, end: start + len, within: 0, is_over: false }
    }

    pub(super) const fn is_over(&self) -> bool {
        self.is_over
    }

    /// Nothing more of it is posted.
    pub(super) const fn stop(&mut self) {
        self.is_over = true;
    }

    /// Fills `writes` with the next batch. `is_clear`: nothing posted before is
    /// under way.
    #[inline]
    pub(super) fn next(
        &mut self,
        extents: &Extents,
        imm: Option<u32>,
        limits: Limits,
        is_clear: bool,
        writes: &mut Vec<Extent>,
    ) -> Next {
        writes.clear();
        if self.is_over || limits.max_writes == 0 {
            return Next::Over;
        }
        match extents {
            Extents::Pages { lists, first, .. } if lists.src.page_bytes() <= limits.segment_bytes => {
                let most = (limits.segment_bytes / lists.src.page_bytes().max(1)).clamp(1, limits.max_writes as u64);
                let until = self.end.min(self.at + most);
                let (src, dst) = (&lists.src, &lists.dst);
                writes.extend((self.at as usize + first..until as usize + first).map(|page| Extent {
                    src: src.offset_of(page),
                    dst: dst.offset_of(page),
                    nbytes: src.page_bytes(),
                }));
                self.at = until;
                self.is_over = self.at >= self.end;
                Next::Batch(imm.map_or(Marks::None, Marks::Each))
            }
            Extents::Pages { .. } => {
                let page = extents.nth(self.at as usize);
                let next = self.segment(page, self.within, page.nbytes, imm, limits, is_clear, writes);
                if let Next::Batch(_) = next {
                    self.within += writes[0].nbytes;
                    if self.within >= page.nbytes {
                        (self.at, self.within) = (self.at + 1, 0);
                        self.is_over = self.at >= self.end;
                    }
                }
                next
            }
            Extents::One(extent) => {
                let next = self.segment(*extent, self.at, self.end, imm, limits, is_clear, writes);
                if let Next::Batch(_) = next {
                    self.at += writes[0].nbytes;
                    self.is_over = self.at >= self.end;
                }
                next
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "one range and what it is cut by")]
    #[inline]
    fn segment(
        &self,
        whole: Extent,
        at: u64,
        end: u64,
        imm: Option<u32>,
        limits: Limits,
        is_clear: bool,
        writes: &mut Vec<Extent>,
    ) -> Next {
        let nbytes = (end - at).min(limits.segment_bytes);
        let is_last = at + nbytes >= end;
        if is_last && imm.is_some() && !limits.is_ordered && !is_clear {
            return Next::Wait;
        }
        writes.push(Extent { src: whole.src + at, dst: whole.dst + at, nbytes });
        Next::Batch(imm.filter(|_| is_last).map_or(Marks::None, Marks::Last))
    }

    /// Of the last batch of pages only the first `taken` were posted.
    pub(super) fn take_back(&mut self, given: usize, taken: usize) {
        self.at -= (given - taken) as u64;
        self.is_over = false;
    }
}

#[cfg(test)]
mod tests {
    use anyfabric_plan::PageList;
    use proptest::prelude::*;

    use super::*;

    fn all(mut cursor: Cursor, extents: &Extents, imm: Option<u32>, limits: Limits) -> (Vec<Extent>, u32) {
        let (mut all, mut writes, mut counted, mut is_clear) = (Vec::new(), Vec::new(), 0, true);
        loop {
            match cursor.next(extents, imm, limits, is_clear, &mut writes) {
                Next::Over => return (all, counted),
                Next::Wait => {
                    assert!(!limits.is_ordered && !is_clear);
                    is_clear = true;
                    continue;
                }
                Next::Batch(marks) => {
                    assert!(!writes.is_empty() && writes.len() <= limits.max_writes);
                    match marks {
                        Marks::None => {}
                        Marks::Each(_) => counted += writes.len() as u32,
                        Marks::Last(_) => {
                            assert!(limits.is_ordered || is_clear, "an immediate overtakes its bytes");
                            counted += 1;
                        }
                    }
                }
            }
            is_clear = false;
            all.extend(&writes);
        }
    }

    proptest! {
        #[test]
        fn every_byte_once_and_one_count_a_write(
            nbytes in 0_u64..10_000, segment_bytes in 1_u64..4000, max_writes in 1_usize..40, is_ordered: bool,
        ) {
            let extents = Extents::One(Extent { src: 5, dst: 70, nbytes });
            let limits = Limits { max_writes, segment_bytes, is_ordered };
            let (writes, counted) = all(Cursor::new(0, nbytes), &extents, Some(1), limits);
            prop_assert_eq!(counted, 1);
            let mut at = 0;
            for write in &writes {
                prop_assert_eq!((write.src, write.dst), (5 + at, 70 + at));
                prop_assert!(write.nbytes <= segment_bytes);
                at += write.nbytes;
            }
            prop_assert_eq!(at, nbytes);
        }

        #[test]
        fn every_page_once_and_one_count_each(
            num_pages in 1_usize..100, page_bytes in 0_u64..300, segment_bytes in 1_u64..400, max_writes in 1_usize..40,
            is_ordered: bool,
        ) {
            let list = |offset| PageList::new((0..num_pages as u32).rev().collect(), page_bytes, 512, offset);
            let extents = Extents::pages(list(3), list(9));
            let limits = Limits { max_writes, segment_bytes, is_ordered };
            let (writes, counted) = all(Cursor::new(0, num_pages as u64), &extents, Some(1), limits);
            prop_assert_eq!(counted, num_pages as u32);
            let mut expected = (0..num_pages).map(|idx| extents.nth(idx));
            let mut page = Extent { src: 0, dst: 0, nbytes: 0 };
            let mut within = 0;
            for write in &writes {
                if within == page.nbytes {
                    page = expected.next().unwrap();
                    within = 0;
                }
                prop_assert_eq!((write.src, write.dst), (page.src + within, page.dst + within));
                within += write.nbytes;
            }
            prop_assert_eq!(within, page.nbytes);
            prop_assert!(expected.next().is_none());
        }
    }

    #[test]
    fn what_was_not_taken_comes_again() {
        let list = || PageList::new((0..10).collect(), 8, 8, 0);
        let (extents, mut writes) = (Extents::pages(list(), list()), Vec::new());
        let limits = Limits { max_writes: 10, segment_bytes: 1000, is_ordered: true };
        let mut cursor = Cursor::new(0, 10);
        assert_eq!(cursor.next(&extents, None, limits, true, &mut writes), Next::Batch(Marks::None));
        assert!(cursor.is_over());
        cursor.take_back(10, 4);
        cursor.next(&extents, None, limits, true, &mut writes);
        assert_eq!(writes.iter().map(|write| write.src).collect::<Vec<_>>(), [32, 40, 48, 56, 64, 72]);
    }
}
