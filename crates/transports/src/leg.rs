//! Operations with several peers, without an [`Op`] for each: their legs.
//!
//! A leg is borrowed from whoever submits: posting it copies a few words, and nothing that several threads count, for
//! an atomic addition waits until the NIC has the request before it. A leg that cannot be posted at once becomes an
//! [`Op`] and goes the way of any other.

use std::cell::Cell;
use std::sync::Arc;

use anyfabric_plan::{Extent, Extents};
use anyfabric_wire::{Imm, Refusal};

use crate::mutant::Mutant;
use crate::{Binding, Failure, Loss, Op, Payload, PeerIdx, Region, Ticket};

/// What the legs of one operation have in common.
#[derive(Debug)]
pub struct Spread<'t> {
    /// Ended leg by leg. It keeps the source until the last of them has ended.
    pub ticket: &'t Arc<Ticket>,
    /// Where the bytes of all are.
    pub source: Option<&'t Arc<Region>>,
    /// What each receiver counts, once.
    pub imm: Option<Imm>,
    /// For legs that become operations: the first of the numbers that are left for them, one for each leg.
    pub ids: Cell<u64>,
}

/// One peer's part of an operation with several: a write, or the immediate alone.
#[derive(Debug, Clone, Copy)]
pub struct Leg<'t> {
    /// Whom it goes to.
    pub peer: PeerIdx,
    /// The number of the link in its group.
    pub link: u32,
    /// The destination, which has not been entered, and which range, inside both regions.
    pub write: Option<(&'t Arc<Binding>, Extent)>,
}

/// What is kept of an operation that is one work request while a NIC carries it: all that its end takes.
#[derive(Debug)]
pub(crate) struct Stub {
    id: u64,
    peer: PeerIdx,
    imm: Option<Imm>,
    ticket: Arc<Ticket>,
    binding: Option<Arc<Binding>>,
    _source: Option<Arc<Region>>,
    loss: Loss,
    failure: Option<Box<Failure>>,
}

impl Leg<'_> {
    /// The same as an operation of its own; `None` if it has ended, for its
    /// destination was taken back just now.
    pub fn into_op(&self, spread: &Spread<'_>) -> Option<Op> {
        let Self { peer, write, .. } = *self;
        let id = spread.ids.get();
        spread.ids.set(id + 1);
        let payload = match (write, spread.source) {
            (Some((binding, extent)), Some(source)) => {
                if binding.enter().is_err() {
                    self.refuse(spread, binding.refusal());
                    return None;
                }
                let (source, binding) = (Arc::clone(source), Arc::clone(binding));
                Payload::Write { source, binding, extents: Extents::One(extent) }
            }
            _ => Payload::Signal,
        };
        let (imm, ticket) = (spread.imm.map(|imm| (imm, 1)), Arc::clone(spread.ticket));
        Some(Op { id, peer, payload, imm, verify: false, ticket, loss: Loss::default() })
    }

    fn refuse(&self, spread: &Spread<'_>, refusal: Option<Refusal>) {
        let failure = match refusal {
            // A link that closes refuses everything.
            None | Some(Refusal::Closing) => Failure::PeerLost("it was given up".into()),
            Some(refusal) => Failure::Refused(refusal),
        };
        spread.ticket.fail_by(self.peer, failure.clone());
        spread.imm.into_iter().for_each(|imm| spread.ticket.note_loss(self.peer, imm));
        spread.ticket.part_ended_at(self.peer, Err(failure));
    }
}

impl From<Op> for Stub {
    #[inline]
    fn from(op: Op) -> Self {
        let Op { id, peer, payload, imm, ticket, loss, .. } = op;
        let (binding, source) = match payload {
            Payload::Write { source, binding, .. } => (Some(binding), Some(source)),
            Payload::Signal | Payload::Message(_) => (None, None),
        };
        Self { id, peer, imm: imm.map(|(imm, _)| imm), ticket, binding, _source: source, loss, failure: None }
    }
}

impl Stub {
    /// When it was submitted.
    #[inline]
    pub(crate) fn submitted_ns(&self) -> u64 {
        self.ticket.submitted_ns()
    }

    /// Why its owner refuses what is written, if that is so.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        self.binding.as_ref()?.refusal()
    }

    /// Why it was given up, if it was.
    pub(crate) fn given_up(&self) -> Option<Failure> {
        self.ticket.given_up()
    }

    /// As [`Op::note_loss`].
    pub(crate) fn note_loss(&self) {
        self.imm.into_iter().for_each(|imm| self.loss.note(&self.ticket, self.peer, imm));
    }

    /// Fails the operation now; this part is under way until [`Stub::end`].
    pub(crate) fn fail(&mut self, failure: Failure) {
        if self.failure.is_none() {
            self.ticket.fail_by(self.peer, failure.clone());
            self.failure = Some(Box::new(failure));
        }
    }

    /// Whether it was failed.
    #[inline]
    pub(crate) fn has_failed(&self) -> bool {
        self.failure.is_some()
    }

    /// Ends it. When it failed and was counted the receiver is told.
    #[inline]
    pub(crate) fn end(mut self, result: Result<(), Failure>) {
        let result = self.failure.take().map_or(result, |failure| Err(*failure));
        if let Err(failure) = &result {
            self.ticket.fail_by(self.peer, failure.clone());
            self.note_loss();
        }
        if let Some(binding) = &self.binding {
            binding.leave();
        }
        if Mutant::LoseCompletion.is_on() && self.id % 7 == 3 {
            return;
        }
        self.ticket.part_ended_at(self.peer, result);
    }
}
