//! What has come for immediates that nobody has opened a counter for.
//!
//! So many are kept for each peer; then it is told to stop, and what it sends
//! until it has heard that is dropped. A count that lacks an arrival would be
//! wrong, so it is noted which immediates those were, and whoever opens a
//! counter for one of them is told. Who goes on beyond a second bound is given up.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use anyfabric_transports::PeerIdx;
use anyfabric_wire::{Imm, Refusal};

use crate::fractions::ImmHasher;
use crate::{Code, Error};

/// Who keeps how many, and what could not be kept.
#[derive(Default)]
pub(crate) struct Early {
    of_peer: HashMap<PeerIdx, Share>,
    dropped: HashMap<u32, PeerIdx, BuildHasherDefault<ImmHasher>>,
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
        if share.kept < MAX_EARLY {
            share.kept += 1;
            return Ok(self.take_dropped(imm));
        }
        if !self.dropped.contains_key(&imm.value()) && share.dropped < MAX_DROPPED {
            share.dropped += 1;
            self.dropped.insert(imm.value(), peer);
        }
        Err(Refusal::Full)
    }

    /// One that was kept of that peer's was given to its counter.
    pub(crate) fn given(&mut self, peer: PeerIdx) {
        self.of_peer.entry(peer).and_modify(|share| share.kept = share.kept.saturating_sub(1));
    }

    /// What a counter that opens now lacks.
    pub(crate) fn take_dropped(&mut self, imm: Imm) -> Option<Missing> {
        let peer = self.dropped.remove(&imm.value())?;
        self.of_peer.entry(peer).and_modify(|share| share.dropped = share.dropped.saturating_sub(1));
        Some(Missing::Dropped(peer))
    }

    /// Whether a peer is below half of its bound.
    pub(crate) fn has_room(&self, peer: PeerIdx) -> bool {
        self.of_peer.get(&peer).is_none_or(|share| share.kept < MAX_EARLY / 2)
    }

    /// Whether a peer has gone on although it was told to stop: what it sends now
    /// is not even noted.
    pub(crate) fn is_flooded_by(&self, peer: PeerIdx) -> bool {
        self.of_peer.get(&peer).is_some_and(|share| share.dropped >= MAX_DROPPED)
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
}

impl Missing {
    pub(crate) const fn peer(self) -> PeerIdx {
        match self {
            Self::Failed(peer) | Self::Dropped(peer) | Self::Invisible(peer) => peer,
        }
    }

    /// What the counter's waiters are told; `peer` is the peer's address.
    pub(crate) fn error(self, imm: Imm, peer: &str) -> Error {
        let imm = imm.value();
        let message = match self {
            Self::Failed(_) => format!("a transfer counted by imm {imm} failed at its writer {peer}"),
            Self::Dropped(_) => format!(
                "an arrival of imm {imm} from {peer} was dropped: {MAX_EARLY} immediates of that peer were waiting for \
                 a counter; open the counters sooner, or use fewer immediates"
            ),
            Self::Invisible(_) => format!(
                "an arrival of imm {imm} from {peer} is not counted: the GPU's driver cannot make its bytes visible (the \
                 log says why)"
            ),
        };
        let code = if matches!(self, Self::Invisible(_)) { Code::DeviceLost } else { Code::TransferFailed };
        let mut error = Error::new(code, message).during("counter");
        error.context.peer = Some(peer.to_owned());
        error
    }
}

/// Distinct immediates of one peer that are kept without a counter.
pub(crate) const MAX_EARLY: u32 = 4096;
/// Distinct immediates of one peer that are noted as incomplete: far more than a
/// peer sends until it hears that no more are kept.
pub(crate) const MAX_DROPPED: u32 = 1 << 17;
