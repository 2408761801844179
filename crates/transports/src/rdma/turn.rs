//! What NICs report, and what becomes of it.

use anyfabric_wire::{Imm, WireImm};

use super::book::Book;
use super::messages::ANSWER_TOKEN;
use super::nic::{Completions, Fault, RailIdx};
use super::visible::Visible;
use crate::mutant::Mutant;
use crate::{PeerIdx, Sink};

/// Where one NIC reports to, for one poll.
pub(super) struct Turn<'a> {
    pub(super) book: &'a mut Book,
    pub(super) nic: usize,
    pub(super) sink: &'a dyn Sink,
    pub(super) now_ns: u64,
    /// Whose engine was heard last.
    pub(super) heard: Option<PeerIdx>,
    pub(super) visible: &'a Visible,
    /// Arrivals that wait for a flush.
    pub(super) held: &'a mut Vec<Arrival>,
}

/// An immediate of a peer's.
pub(super) struct Arrival {
    pub(super) peer: PeerIdx,
    pub(super) imm: Imm,
    pub(super) quarters: u64,
}

impl Turn<'_> {
    #[inline]
    fn owner(&self, rail: RailIdx) -> Option<(u32, usize)> {
        *self.book.owners[self.nic].get(rail as usize)?
    }
}

impl Completions for Turn<'_> {
    #[inline]
    fn completed(&mut self, rail: RailIdx, token: u32, result: Result<(), Fault>) {
        if token == ANSWER_TOKEN {
            return self.owner(rail).into_iter().for_each(|owner| self.book.answer_ended(owner));
        }
        // What the peer's NIC acknowledges proves nothing of its engine.
        self.book.batch_ended(token, result, self.now_ns);
    }

    #[inline]
    fn arrived(&mut self, rail: RailIdx, imm: u32) {
        let Some((path, _)) = self.owner(rail) else { return };
        let Some(path) = self.book.paths.get(path) else { return };
        let imm = WireImm::decode(imm);
        let times = if Mutant::DoublePart.is_on() { 2 } else { 1 };
        let quarters = u64::from(imm.quarters) * times;
        if self.visible.is_needed() {
            self.held.push(Arrival { peer: path.peer, imm: imm.imm, quarters });
        } else {
            // A full table is told to the sender by the engine itself.
            let _ = self.sink.arrived(path.peer, imm.imm, quarters);
        }
        if self.heard != Some(path.peer) {
            self.heard = Some(path.peer);
            self.sink.heard(path.peer);
        }
    }

    fn message(&mut self, rail: RailIdx, message: &[u8]) {
        let Some(owner) = self.owner(rail) else { return };
        let Some(peer) = self.book.paths.get(owner.0).map(|path| path.peer) else { return };
        self.book.came(owner, message, self.sink, self.now_ns);
        self.sink.heard(peer);
    }

    fn broken(&mut self, rail: RailIdx, why: Fault) {
        let Some((path, rail_no)) = self.owner(rail) else { return };
        // One that was closed meanwhile has nothing left to end.
        if let Some(standing) = self.book.rail(path, rail_no).filter(|standing| standing.idx == Some(rail)) {
            standing.set_broken(self.now_ns);
            self.book.faulty.push((path, rail_no));
            self.book.rail_stopped(path, rail_no, &why.to_string(), self.now_ns);
        }
        if let (Fault::Missed(_), Some(path)) = (why, self.book.paths.get(path)) {
            self.sink.missed(path.peer, &why.to_string());
        }
    }
}
