//! Control messages over lane 0.

use std::io;
use std::sync::atomic::Ordering;

use super::link::TcpLink;
use super::receive::invalid;
use crate::{lock, write, ControlPath, Failure, Sink};

impl TcpLink {
    pub(super) fn on_control(&self, sequence: u64, bytes: &[u8], sink: &dyn Sink) -> io::Result<()> {
        if lock(&self.controls).receive(sequence).map_err(invalid)? {
            sink.control(self.peer, bytes);
        }
        Ok(())
    }

    /// Ends a stream; what it carried has failed.
    pub fn take_out(&self, channel: u8, why: &str) {
        let lane = {
            let mut lanes = write(&self.lanes);
            let lane = lanes.get_mut(usize::from(channel)).and_then(Option::take);
            // ORDERING: under the lock.
            self.stands.store(lanes[0].is_some(), Ordering::Relaxed);
            lane
        };
        if let Some(lane) = lane {
            let why = Failure::ConnectionBroken(why.to_owned());
            self.limbo.keep(channel, lane.stop(&why), &why);
        }
        // ORDERING: with `close`, which says so before it lets go of everything.
        if self.closed.load(Ordering::SeqCst) {
            self.limbo.release_all();
        }
    }
}

impl ControlPath for TcpLink {
    #[inline]
    fn has_control(&self) -> bool {
        // ORDERING: a hint; who sees it late finds the lane gone, or asks again.
        self.stands.load(Ordering::Relaxed)
    }

    fn has_news(&self) -> bool {
        self.lane(0).is_some_and(|lane| lane.has_news())
    }

    fn send_control(&self, bytes: Vec<u8>) {
        let sequence = {
            let mut controls = lock(&self.controls);
            let sequence = controls.send(&bytes);
            // Under the lock, so that the order on the lane is that of the numbers.
            let queue = |sequence| self.lane(0).is_none_or(|lane| lock(&lane.submitted).push_control(sequence, bytes));
            sequence.filter(|sequence| queue(*sequence))
        };
        let Some(sequence) = sequence else {
            // What it was to be told it can never be told: whoever polls next gives it up.
            // ORDERING: before `busy`; partner: `flush_lanes`.
            self.is_overrun.store(true, Ordering::SeqCst);
            self.busy.store(true, Ordering::SeqCst);
            return;
        };
        log::trace!("peer {}: control message {sequence}", self.peer);
        if let Some(lane) = self.lane(0) {
            self.push(&lane);
        }
    }

    fn confirm(&self, sequence: u64) {
        lock(&self.controls).confirm(sequence);
    }

    fn received(&self) -> u64 {
        lock(&self.controls).received()
    }

    fn disconnect(&self, channel: u8, why: &str) -> bool {
        // Another one may have come in its place before its end was acted upon.
        let has_broken = self.lane(channel.into()).is_some_and(|lane| lane.is_reported());
        if has_broken {
            self.take_out(channel, why);
        }
        has_broken
    }
}
