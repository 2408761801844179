//! Operations under way: their contexts, and the batches that they belong to.
//!
//! A provider may use the context of an operation as memory of its own until the
//! operation has completed (FI_CONTEXT2), so contexts lie apart from what we note
//! about them. The context that comes back with a completion says which it was.

use std::cell::UnsafeCell;
use std::ffi::c_void;

use crate::rdma::RailIdx;

/// What an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// None.
    Free,
    /// A write.
    Write,
    /// A write whose immediate is sent when it has completed.
    Announced,
    /// A message, from the send buffer with this number.
    Send(u32),
    /// A receive, into the receive buffer of the slot's own number.
    Receive,
    /// Of an endpoint that was closed: whether it still completes is unknown.
    Orphan,
}

/// What is noted about an operation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slot {
    pub(super) what: Use,
    /// Number of its endpoint.
    pub(super) endpoint: u16,
    /// Number of its batch; of a receive without meaning.
    pub(super) batch: u32,
}

/// Operations that end together.
#[derive(Debug, Clone, Copy)]
pub(super) struct BatchState {
    pub(super) rail: RailIdx,
    /// Number of its rail's endpoint.
    pub(super) endpoint: u16,
    pub(super) token: u32,
    /// Operations that have not completed; 0 for a number that is free.
    pub(super) remaining: u32,
    /// What an [`Use::Announced`] write announces.
    pub(super) imm: u32,
}

/// All slots of a NIC. The first serve writes and messages in any order; each
/// endpoint has a run of the others for its receives.
pub(super) struct Slots {
    contexts: Box<[Context]>,
    slots: Box<[Slot]>,
    free: Vec<u32>,
    batches: Box<[BatchState]>,
    free_batches: Vec<u32>,
}

/// As long as `struct fi_context2`.
#[repr(C, align(64))]
struct Context(UnsafeCell<[u64; 8]>);

// SAFETY: never read or written here; only the addresses are used.
unsafe impl Send for Context {}

impl Slots {
    /// For that many operations at once, and as many receives.
    pub(super) fn new(num_operations: u32, num_receives: u32) -> Self {
        let free = Slot { what: Use::Free, endpoint: 0, batch: 0 };
        let no_batch = BatchState { rail: 0, endpoint: 0, token: 0, remaining: 0, imm: 0 };
        let num = (num_operations + num_receives) as usize;
        Self {
            contexts: (0..num).map(|_| Context(UnsafeCell::new([0; 8]))).collect(),
            slots: vec![free; num].into(),
            free: (0..num_operations).rev().collect(),
            batches: vec![no_batch; num_operations as usize].into(),
            free_batches: (0..num_operations).rev().collect(),
        }
    }

    /// Operations that could be posted now.
    #[inline]
    pub(super) fn num_free(&self) -> usize {
        self.free.len()
    }

    /// A slot for an operation of a batch; `None` when all are taken.
    #[inline]
    pub(super) fn take(&mut self, what: Use, endpoint: u16, batch: u32) -> Option<u32> {
        let idx = self.free.pop()?;
        self.slots[idx as usize] = Slot { what, endpoint, batch };
        Some(idx)
    }

    /// Notes a receive in a slot of its endpoint's.
    pub(super) fn set_receive(&mut self, idx: u32, endpoint: u16) {
        self.slots[idx as usize] = Slot { what: Use::Receive, endpoint, batch: 0 };
    }

    /// The operation is over; not for receives, whose slots are never shared.
    #[inline]
    pub(super) fn put_back(&mut self, idx: u32) {
        self.slots[idx as usize].what = Use::Free;
        self.free.push(idx);
    }

    /// Begins a batch. There is always a number: each batch has a slot at least.
    #[inline]
    pub(super) fn begin(&mut self, (rail, endpoint): (RailIdx, u16), token: u32, imm: u32) -> Option<u32> {
        let idx = self.free_batches.pop()?;
        self.batches[idx as usize] = BatchState { rail, endpoint, token, remaining: 0, imm };
        Some(idx)
    }

    /// A batch of which nothing was posted is forgotten.
    pub(super) fn forget(&mut self, batch: u32) {
        self.batches[batch as usize].remaining = 0;
        self.free_batches.push(batch);
    }

    #[inline]
    pub(super) fn batch(&mut self, idx: u32) -> &mut BatchState {
        &mut self.batches[idx as usize]
    }

    /// An operation of the batch has completed; the batch, if it was the last.
    #[inline]
    pub(super) fn completed(&mut self, batch: u32) -> Option<BatchState> {
        let state = &mut self.batches[batch as usize];
        state.remaining = state.remaining.saturating_sub(1);
        let ended = (state.remaining == 0).then_some(*state);
        if ended.is_some() {
            self.free_batches.push(batch);
        }
        ended
    }

    #[inline]
    pub(super) fn slot(&self, idx: u32) -> Slot {
        self.slots[idx as usize]
    }

    /// What the library is given for a slot.
    #[inline]
    pub(super) fn context(&self, idx: u32) -> *mut c_void {
        self.contexts[idx as usize].0.get().cast()
    }

    /// Never frees the contexts: an endpoint that is not closed may still use them.
    pub(super) fn keep_contexts(&mut self) {
        std::mem::forget(std::mem::take(&mut self.contexts));
    }

    /// The slot of a context that came back; `None` for one that is not ours.
    #[inline]
    pub(super) fn of(&self, context: *mut c_void) -> Option<u32> {
        let offset = (context as usize).checked_sub(self.contexts.as_ptr() as usize)?;
        let idx = offset / size_of::<Context>();
        (idx < self.contexts.len()).then_some(idx as u32)
    }

    /// The endpoint was closed: its batches end now, which `ended` is told, and its
    /// slots rest until no completion can name them any more. Returns those to
    /// [`Slots::put_back`] then, with what they were.
    pub(super) fn orphan(&mut self, endpoint: u16, mut ended: impl FnMut(u32, BatchState)) -> Vec<(u32, Use)> {
        let mut orphans = Vec::new();
        for (idx, slot) in self.slots.iter_mut().enumerate() {
            if slot.endpoint != endpoint || matches!(slot.what, Use::Free | Use::Orphan) {
                continue;
            }
            let what = std::mem::replace(&mut slot.what, Use::Orphan);
            if what != Use::Receive {
                orphans.push((idx as u32, what));
            }
        }
        for idx in 0..self.batches.len() {
            let state = self.batches[idx];
            if state.endpoint == endpoint && state.remaining > 0 {
                ended(idx as u32, state);
                self.forget(idx as u32);
            }
        }
        orphans
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_names_its_slot_and_no_other_pointer_does() {
        let slots = Slots::new(4, 4);
        for idx in 0..8 {
            assert_eq!(slots.of(slots.context(idx)), Some(idx));
        }
        assert_eq!(slots.of(std::ptr::null_mut()), None);
        assert_eq!(slots.of(slots.context(7).wrapping_byte_add(64)), None);
    }

    #[test]
    fn a_batch_ends_with_its_last_operation() {
        let mut slots = Slots::new(4, 0);
        let batch = slots.begin((3, 0), 9, 0).unwrap();
        slots.batch(batch).remaining = 2;
        assert!(slots.completed(batch).is_none());
        let ended = slots.completed(batch).unwrap();
        assert_eq!((ended.rail, ended.token), (3, 9));
    }

    #[test]
    fn closing_an_endpoint_ends_its_batches_once_and_keeps_its_slots() {
        let mut slots = Slots::new(4, 2);
        let (mine, other) = (slots.begin((0, 0), 1, 0).unwrap(), slots.begin((1, 1), 2, 0).unwrap());
        for (endpoint, batch) in [(0, mine), (0, mine), (1, other)] {
            slots.take(Use::Write, endpoint, batch).unwrap();
            slots.batch(batch).remaining += 1;
        }
        slots.set_receive(4, 0);
        let mut ended = Vec::new();
        let orphans = slots.orphan(0, |_, state| ended.push(state.token));
        assert_eq!(ended, [1]);
        assert_eq!(orphans.len(), 2);
        assert_eq!(slots.num_free(), 1);
        assert_eq!(slots.slot(4).what, Use::Orphan);
        assert!(slots.orphan(0, |_, _| panic!("ended twice")).is_empty());
        orphans.into_iter().for_each(|(idx, _)| slots.put_back(idx));
        assert_eq!(slots.num_free(), 3);
        assert_eq!(slots.completed(other).unwrap().token, 2);
    }
}
