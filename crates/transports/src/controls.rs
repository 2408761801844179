//! Control messages: reliable and in order for the life of a session.
//!
//! They survive their connection. Each has a number; the peer confirms what has
//! arrived without a gap, and after a reconnect the rest is sent again.

use std::collections::VecDeque;

/// Both directions of one session.
#[derive(Debug, Default)]
pub(crate) struct Controls {
    last_sent: u64,
    unconfirmed: VecDeque<(u64, Vec<u8>)>,
    received: u64,
}

impl Controls {
    /// Numbers a message, and keeps it until it is confirmed.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> u64 {
        self.last_sent += 1;
        self.unconfirmed.push_back((self.last_sent, bytes.to_vec()));
        self.last_sent
    }

    /// The peer has every message up to `sequence`.
    pub(crate) fn confirm(&mut self, sequence: u64) {
        while self.unconfirmed.front().is_some_and(|(sent, _)| *sent <= sequence) {
            self.unconfirmed.pop_front();
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
