//! Walking the ranges of an operation, a bounded number of bytes at a time.

use anyfabric_plan::Extents;

/// Some bytes of one extent.
#[derive(Clone, Copy)]
pub(super) struct Range {
    pub(super) src: u64,
    pub(super) dst: u64,
    pub(super) nbytes: u64,
}

/// Walks an operation's extents, at most `left` bytes at a time.
pub(super) struct Chunk<'a> {
    pub(super) extents: &'a Extents,
    pub(super) extent_idx: &'a mut usize,
    pub(super) done: &'a mut u64,
    pub(super) left: u64,
}

impl Chunk<'_> {
    #[inline]
    pub(super) fn next_at_most(&mut self, max_bytes: u64) -> Option<Range> {
        if *self.extent_idx >= self.extents.num_extents() || self.left == 0 {
            return None;
        }
        let extent = self.extents.nth(*self.extent_idx);
        let nbytes = (extent.nbytes - *self.done).min(self.left).min(max_bytes);
        let range = Range { src: extent.src + *self.done, dst: extent.dst + *self.done, nbytes };
        self.left -= nbytes;
        *self.done += nbytes;
        if *self.done == extent.nbytes {
            *self.extent_idx += 1;
            *self.done = 0;
        }
        Some(range)
    }
}

impl Iterator for Chunk<'_> {
    type Item = Range;

    #[inline]
    fn next(&mut self) -> Option<Range> {
        self.next_at_most(u64::MAX)
    }
}

/// Ranges, each with the one that comes two later.
pub(super) struct Ahead<I> {
    ranges: I,
    window: [Option<Range>; 2],
}

impl<I: Iterator<Item = Range>> Ahead<I> {
    pub(super) fn new(mut ranges: I) -> Self {
        let window = [ranges.next(), ranges.next()];
        Self { ranges, window }
    }

    #[inline]
    pub(super) fn next(&mut self) -> Option<(Range, Option<Range>)> {
        let now = self.window[0]?;
        let soon = if self.window[1].is_some() { self.ranges.next() } else { None };
        self.window = [self.window[1], soon];
        Some((now, soon))
    }
}
