//! Control messages: reliable and in order for the life of a session.
//!
//! They survive their connection. Each has a number; the peer confirms what has
//! arrived without a gap, and after a reconnect the rest is sent again. A peer that
//! confirms too little has overrun the session, and is given up.

use std::collections::VecDeque;

/// Both directions of one session.
#[derive(Debug, Default)]
pub(crate) struct Controls {
    last_sent: u64,
    unconfirmed: VecDeque<(u64, Vec<u8>)>,
    unconfirmed_bytes: usize,
    received: u64,
}

impl Controls {
    /// Numbers a message, and keeps it until it is confirmed; `None` when there is no
    /// room, and what is not said can never be said later.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Option<u64> {
        if self.unconfirmed_bytes >= MAX_CONTROL_BYTES {
            return None;
        }
        self.last_sent += 1;
        self.unconfirmed_bytes += kept_bytes(bytes);
        self.unconfirmed.push_back((self.last_sent, bytes.to_vec()));
        Some(self.last_sent)
    }

    /// The peer has every message up to `sequence`.
    pub(crate) fn confirm(&mut self, sequence: u64) {
        while self.unconfirmed.front().is_some_and(|(sent, _)| *sent <= sequence) {
            if let Some((_, bytes)) = self.unconfirmed.pop_front() {
                self.unconfirmed_bytes -= kept_bytes(&bytes);
            }
        }
    }

    /// What is sent again over a new connection, with its numbers.
    pub(crate) fn unconfirmed(&self) -> impl Iterator<Item = (u64, Vec<u8>)> + '_ {
        self.unconfirmed.iter().cloned()
    }

    /// Notes a message; false when it has come before, and was sent again after a
    /// reconnect.
    ///
    /// # Errors
    /// One is missing before it: the peer, or the stream, has lost its place.
    pub(crate) fn receive(&mut self, sequence: u64) -> Result<bool, String> {
        if sequence <= self.received {
            return Ok(false);
        }
        if sequence - self.received > 1 {
            return Err(format!("control message {sequence} after {}", self.received));
        }
        self.received = sequence;
        Ok(true)
    }

    /// The last that arrived without a gap.
    pub(crate) const fn received(&self) -> u64 {
        self.received
    }
}

/// What a message that waits costs, about.
pub(crate) const fn kept_bytes(bytes: &[u8]) -> usize {
    bytes.len() + KEPT
}

/// Why a peer is given up that leaves more than [`MAX_CONTROL_BYTES`] unread or unconfirmed.
pub(crate) const OVERRUN: &str =
    "it does not read: more control messages wait for it than are kept, and it has not confirmed them";

/// Most that is kept of control messages that a peer has not confirmed, or not let us send: hundreds of thousands. One
/// that keeps to the protocol confirms after some hundred (`engine::heartbeat`).
pub(crate) const MAX_CONTROL_BYTES: usize = 16 << 20;
/// Of each message beside its bytes.
const KEPT: usize = 64;
