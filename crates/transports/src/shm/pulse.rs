//! Heartbeats in memory: each side counts in the ring that the other maps.

use super::link::ShmLink;
use crate::lock;

/// What a peer's memory tells of its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pulse {
    /// Nothing: it says so by messages, if it lives.
    None,
    /// No beat since the last look.
    Still,
    /// It lives.
    Beats,
}

impl ShmLink {
    /// Shows the peer that this engine lives, and looks whether the peer has
    /// shown the same since the last call: memory on both sides, so that no
    /// process wakes another for it.
    pub fn beat(&self) -> Pulse {
        lock(&self.outgoing).producer.beat();
        let mut incoming = lock(&self.incoming);
        let beats = incoming.consumer.beats();
        match std::mem::replace(&mut incoming.beats, beats) {
            _ if beats == 0 => Pulse::None,
            before if before == beats => Pulse::Still,
            _ => Pulse::Beats,
        }
    }
}
