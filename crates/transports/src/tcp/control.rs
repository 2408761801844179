//! Control messages: reliable and in order for the life of a session.
//!
//! They survive their connection. Each has a number; the peer confirms what has
//! arrived without a gap, and after a reconnect the rest is sent again.

use std::collections::VecDeque;
use std::io;
use std::sync::PoisonError;

use super::link::{lock, TcpLink};
use super::receive::invalid;
use crate::{ControlPath, Failure, Sink};

/// Control messages survive the connection: those that the peer has not
/// confirmed are sent again after a reconnect.
#[derive(Debug, Default)]
pub(super) struct Controls {
    pub(super) last_sent: u64,
    pub(super) unconfirmed: VecDeque<(u64, Vec<u8>)>,
    pub(super) received: u64,
}

impl TcpLink {
    pub(super) fn on_control(&self, sequence: u64, bytes: &[u8], sink: &dyn Sink) -> io::Result<()> {
        {
            let mut controls = lock(&self.controls);
            if sequence <= controls.received {
                // Sent again after a reconnect.
                return Ok(());
            }
            if sequence != controls.received + 1 {
                return Err(invalid(format!("control message {sequence} after {}", controls.received)));
            }
            controls.received = sequence;
        }
        sink.control(self.peer, sequence, bytes);
        Ok(())
    }
}

impl ControlPath for TcpLink {
    fn has_control(&self) -> bool {
        self.lane(0).is_some()
    }

    fn send_control(&self, bytes: Vec<u8>) {
        let sequence = {
            let mut controls = lock(&self.controls);
            controls.last_sent += 1;
            let sequence = controls.last_sent;
            controls.unconfirmed.push_back((sequence, bytes.clone()));
            if let Some(lane) = self.lane(0) {
                // Under the lock, so that the order on the lane is that of the numbers.
                lock(&lane.submitted).controls.push_back((sequence, bytes));
            }
            sequence
        };
        log::trace!("peer {}: control message {sequence}", self.peer);
        if let Some(lane) = self.lane(0) {
            self.push(&lane);
        }
    }

    fn confirm(&self, sequence: u64) {
        let mut controls = lock(&self.controls);
        while controls.unconfirmed.front().is_some_and(|(sent, _)| *sent <= sequence) {
            controls.unconfirmed.pop_front();
        }
    }

    fn received(&self) -> u64 {
        lock(&self.controls).received
    }

    fn disconnect(&self, channel: u8, why: &str) {
        let lane = {
            let mut lanes = self.lanes.write().unwrap_or_else(PoisonError::into_inner);
            lanes.get_mut(usize::from(channel)).and_then(Option::take)
        };
        if let Some(lane) = lane {
            lane.stop(&Failure::ConnectionBroken(why.to_owned()));
        }
    }
}
