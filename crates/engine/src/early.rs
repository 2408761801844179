//! What has come for immediates that nobody has opened a counter for.
//!
//! So many are kept for each peer, and so many for all of them; then it is told to
//! stop, and what it sends until it has heard that is dropped. A count that lacks
//! an arrival would be wrong, so it is noted which immediates those were, and
//! whoever opens a counter for one of them is told. Who goes on beyond a second
//! bound is given up.
//!
//! What a peer left behind that has been forgotten since is kept as long as there
//! is room. When there is none it is dropped, and noted, before anything of a peer
//! that may still be waited for.

use std::collections::HashMap;

use anyfabric_transports::PeerIdx;
use anyfabric_wire::{Imm, Refusal};
use rustc_hash::FxHashMap;

use crate::{Code, Error};

/// Who keeps how many, and what could not be kept.
#[derive(Default)]
pub(crate) struct Early {
    /// Of peers that are known.
    of_peer: HashMap<PeerIdx, Share>,
    num_kept: usize,
    dropped: FxHashMap<u32, PeerIdx>,
    /// Some of what is kept, or noted, was a forgotten peer's.
    has_leavings: bool,
}

/// Of one peer: distinct immediates.
#[derive(Default)]
struct Share {
    kept: u32,
    dropped: u32,
}

impl Early {
    /// Room for one more immediate of that peer's; returns why its count will
    /// lack something, if so.
    ///
    /// # Errors
    /// [`Refusal::Full`]: dropped.
    pub(crate) fn keep(&mut self, peer: PeerIdx, imm: Imm) -> Result<Option<Missing>, Refusal> {
        let share = self.of_peer.entry(peer).or_default();
        if share.kept < MAX_EARLY && self.num_kept < MAX_EARLY_OF_ALL {
            share.kept += 1;
            self.num_kept += 1;
            return Ok(self.take_dropped(imm));
        }
        let has_room = share.dropped < MAX_DROPPED && self.dropped.len() < MAX_DROPPED_OF_ALL;
        if !self.dropped.contains_key(&imm.value()) && has_room {
            share.dropped += 1;
            self.dropped.insert(imm.value(), peer);
        }
        Err(Refusal::Full)
    }

    /// One that was kept of that peer's was given to its counter.
    pub(crate) fn given(&mut self, peer: PeerIdx) {
        self.num_kept = self.num_kept.saturating_sub(1);
        self.of_peer.entry(peer).and_modify(|share| share.kept = share.kept.saturating_sub(1));
    }

    /// Nothing more can come from that peer, and nobody knows it any more.
    pub(crate) fn forget(&mut self, peer: PeerIdx) {
        self.has_leavings |= self.of_peer.remove(&peer).is_some_and(|share| share.kept > 0 || share.dropped > 0);
    }

    /// Whether room can be made by dropping what forgotten peers left behind; false
    /// once it was.
    pub(crate) fn takes_leavings(&mut self) -> bool {
        let is_full = self.num_kept >= MAX_EARLY_OF_ALL || self.dropped.len() >= MAX_DROPPED_OF_ALL;
        is_full && std::mem::take(&mut self.has_leavings)
    }

    /// What forgotten peers left behind is kept no more, but noted, in the place of
    /// what was noted of such peers before.
    pub(crate) fn drop_leavings(&mut self, kept: &[u32]) {
        let Self { of_peer, dropped, .. } = self;
        dropped.retain(|_, peer| of_peer.contains_key(peer));
        self.num_kept = self.num_kept.saturating_sub(kept.len());
        let room = MAX_DROPPED_OF_ALL.saturating_sub(dropped.len());
        dropped.extend(kept.iter().take(room).map(|imm| (*imm, NOBODY)));
        self.has_leavings = !kept.is_empty();
    }

    /// Whether a peer has kept something here, and is not forgotten.
    pub(crate) fn knows(&self, peer: PeerIdx) -> bool {
        self.of_peer.contains_key(&peer)
    }

    /// What a counter that opens now lacks.
    pub(crate) fn take_dropped(&mut self, imm: Imm) -> Option<Missing> {
        let peer = self.dropped.remove(&imm.value())?;
        self.of_peer.entry(peer).and_modify(|share| share.dropped = share.dropped.saturating_sub(1));
        Some(Missing::Dropped(peer))
    }

    /// Whether a peer is below half of its bound, and all are below theirs.
    pub(crate) fn has_room(&self, peer: PeerIdx) -> bool {
        let has_room = self.of_peer.get(&peer).is_none_or(|share| share.kept < MAX_EARLY / 2);
        has_room && self.num_kept < MAX_EARLY_OF_ALL / 4 * 3
    }

    /// Whether a peer has gone on although it was told to stop: what it sends now
    /// is not even noted.
    pub(crate) fn is_flooded_by(&self, peer: PeerIdx) -> bool {
        let is_noted = self.dropped.len() < MAX_DROPPED_OF_ALL;
        !is_noted || self.of_peer.get(&peer).is_some_and(|share| share.dropped >= MAX_DROPPED)
    }
}

/// Why a count will never be whole.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Missing {
    /// A transfer failed at its writer.
    Failed(PeerIdx),
    /// It came, and there was no room for it.
    Dropped(PeerIdx),
    /// It came, and the GPU's driver could not make its bytes visible.
    Invisible(PeerIdx),
    /// It may have come unseen: a NIC's queue of completions overran.
    Missed(PeerIdx),
}

impl Missing {
    pub(crate) const fn peer(self) -> PeerIdx {
        match self {
            Self::Failed(peer) | Self::Dropped(peer) | Self::Invisible(peer) | Self::Missed(peer) => peer,
        }
    }

    /// What the counter's waiters are told; `address` is the peer's, empty when
    /// it is forgotten.
    pub(crate) fn error(self, imm: Imm, address: &str) -> Error {
        let (imm, peer) = (imm.value(), if address.is_empty() { "a peer lost long ago" } else { address });
        let message = match self {
            Self::Failed(_) => format!("a transfer counted by imm {imm} failed at its writer {peer}"),
            Self::Dropped(_) => format!(
                "an arrival of imm {imm} from {peer} was dropped: as many immediates as are kept, {MAX_EARLY} of a peer \
                 and {MAX_EARLY_OF_ALL} of all, were waiting for a counter; open the counters sooner, or use fewer \
                 immediates"
            ),
            Self::Invisible(_) => format!(
                "an arrival of imm {imm} from {peer} is not counted: the GPU's driver cannot make its bytes visible (the \
                 log says why)"
            ),
            Self::Missed(_) => format!(
                "arrivals of imm {imm} from {peer} may be missing: the NIC's queue of completions overran (the log says more); \
                 write again what it counts"
            ),
        };
        let code = if matches!(self, Self::Invisible(_)) { Code::DeviceLost } else { Code::TransferFailed };
        let mut error = Error::new(code, message).during("counter");
        error.context.peer = (!address.is_empty()).then(|| address.to_owned());
        error
    }
}

/// Distinct immediates of one peer that are kept without a counter.
pub(crate) const MAX_EARLY: u32 = 4096;
/// The same of all peers: as many as the bounds of 64 peers.
pub(crate) const MAX_EARLY_OF_ALL: usize = 64 * MAX_EARLY as usize;
/// Distinct immediates of one peer that are noted as incomplete: far more than a
/// peer sends until it hears that no more are kept.
pub(crate) const MAX_DROPPED: u32 = 1 << 17;
/// The same of all peers.
const MAX_DROPPED_OF_ALL: usize = 8 * MAX_DROPPED as usize;
/// Of a note: whoever it was is forgotten.
const NOBODY: PeerIdx = PeerIdx::MAX;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use anyfabric_transports::Doorbell;

    use super::*;
    use crate::counter::{AtHand, Counters};

    fn counters() -> Counters {
        Counters::new(Arc::new(Doorbell::private().unwrap()))
    }

    fn imm(value: u32) -> Imm {
        Imm::new(value).unwrap()
    }

    /// Every peer sends as much as is kept of one, none of it waited for. Returns
    /// how much was kept.
    fn fill(counters: &Counters, peers: std::ops::Range<PeerIdx>) -> usize {
        let imms = |peer| peer * MAX_EARLY..(peer + 1) * MAX_EARLY;
        peers
            .map(|peer| {
                imms(peer).filter(|value| counters.add(&AtHand::default(), peer, imm(*value), 4).is_ok()).count()
            })
            .sum()
    }

    fn open(counters: &Counters, value: u32) -> Result<u64, Error> {
        let state = counters.open(Some(imm(value)), Vec::new(), name_of).unwrap();
        state.outcome(1).map(|()| state.value())
    }

    fn name_of(peer: PeerIdx) -> String {
        if peer == NOBODY {
            String::new()
        } else {
            format!("peer {peer}")
        }
    }

    const PEERS: PeerIdx = (MAX_EARLY_OF_ALL / MAX_EARLY as usize) as PeerIdx;

    #[test]
    fn all_peers_together_are_bounded() {
        let counters = counters();
        assert_eq!(fill(&counters, 0..PEERS + 2), MAX_EARLY_OF_ALL);
        assert!(!counters.early(|early| early.has_room(PEERS + 9)));
        assert_eq!(counters.add(&AtHand::default(), PEERS + 9, imm(1 << 28), 4), Err(Refusal::Full));
        // What was kept is whole, and what was not is told.
        assert_eq!(open(&counters, 0).unwrap(), 1);
        for value in [PEERS * MAX_EARLY, 1 << 28] {
            let error = open(&counters, value).unwrap_err();
            assert_eq!(error.code, Code::TransferFailed, "{error}");
            assert!(error.message.contains(&format!("{MAX_EARLY_OF_ALL} of all")), "{error}");
        }
        // One was taken, so there is room for one.
        assert_eq!(counters.add(&AtHand::default(), PEERS + 9, imm(1 << 28 | 1), 4), Ok(()));
        assert_eq!(counters.add(&AtHand::default(), PEERS + 9, imm(1 << 28 | 2), 4), Err(Refusal::Full));
    }

    #[test]
    fn what_forgotten_peers_left_behind_makes_room_and_is_told() {
        let counters = counters();
        assert_eq!(fill(&counters, 0..PEERS), MAX_EARLY_OF_ALL);
        counters.early(|early| early.forget(0));
        // As long as there is room it stays; here there is none.
        assert_eq!(fill(&counters, PEERS..PEERS + 1), MAX_EARLY as usize);
        assert_eq!(open(&counters, MAX_EARLY).unwrap(), 1, "of a peer that is known");
        let error = open(&counters, 7).unwrap_err();
        assert_eq!((error.code, &error.context.peer), (Code::TransferFailed, &None), "{error}");
        assert!(error.message.contains("imm 7 from a peer lost long ago"), "{error}");
    }

    /// An engine that serves for weeks.
    #[test]
    fn peers_that_come_and_go_leave_no_more_than_fits() {
        let counters = counters();
        for peer in 0..3 * PEERS {
            assert_eq!(fill(&counters, peer..peer + 1), MAX_EARLY as usize, "peer {peer}");
            counters.early(|early| {
                early.forget(peer);
                assert!(early.num_kept <= MAX_EARLY_OF_ALL && early.dropped.len() <= MAX_DROPPED_OF_ALL);
                assert!(early.of_peer.is_empty());
            });
        }
    }
}
