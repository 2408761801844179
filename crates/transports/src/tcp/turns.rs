//! Turns: how much a lane moves before the others are served.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use super::lane::Lane;
use super::link::{describe, TcpLink};
use crate::controls::OVERRUN;
use crate::{read, Sink};

impl TcpLink {
    #[cold]
    pub(super) fn flush_lanes(&self, sink: &dyn Sink) -> bool {
        // ORDERING: cleared before looking: who comes later sets it again. Full sockets are the poller's business.
        self.busy.store(false, Ordering::SeqCst);
        // ORDERING: see `send_control`.
        if self.is_overrun.load(Ordering::SeqCst) {
            sink.overrun(self.peer, OVERRUN);
        }
        let lanes: [Option<Arc<Lane>>; Self::MAX_STREAMS + 1] = {
            let lanes = read(&self.lanes);
            std::array::from_fn(|idx| lanes[idx].as_ref().filter(|lane| lane.can_flush()).cloned())
        };
        let mut moved = false;
        for lane in lanes.into_iter().flatten() {
            moved |= self.flush_lane(&lane, sink);
            if lane.idx > 0 && self.is_shared() {
                self.pump_small(sink);
            }
        }
        moved
    }

    /// Something small came or went: large operations leave it room for a while.
    pub(super) fn note_small(&self) {
        // ORDERING: a hint.
        self.small_ns.store(self.clock.now_ns(), Ordering::Relaxed);
    }

    /// Whether small operations share the link with large ones.
    pub(super) fn is_shared(&self) -> bool {
        // ORDERING: a hint.
        self.clock.now_ns().saturating_sub(self.small_ns.load(Ordering::Relaxed)) < SHARED_NS
    }

    /// What a lane may move before the others get their turn.
    pub(super) fn turn_bytes(&self) -> usize {
        if self.is_shared() {
            SHARED_TURN_BYTES
        } else {
            TURN_BYTES
        }
    }

    /// Something of this lane waits to be sent by whoever polls next.
    pub(super) fn set_pending(&self, lane: &Lane) {
        // ORDERING: after the submission, which a lock orders; partner: `flush_lanes`.
        lane.pending.store(true, Ordering::SeqCst);
        self.busy.store(true, Ordering::SeqCst);
    }

    /// False when the stream is broken.
    pub(super) fn read_lane(&self, lane: &Lane, sink: &dyn Sink) -> bool {
        match lane.pump(self, sink) {
            Ok(0) => true,
            Ok(_) => {
                sink.heard(self.peer);
                true
            }
            Err(error) => {
                self.report(lane, &error, sink);
                false
            }
        }
    }

    /// True when something moved.
    pub(super) fn flush_lane(&self, lane: &Lane, sink: &dyn Sink) -> bool {
        let moved = lane.flush(self.turn_bytes(), self.stats.nic(lane.idx.into())).unwrap_or_else(|error| {
            self.report(lane, &error, sink);
            false
        });
        if lane.can_flush() {
            // ORDERING: see `set_pending`.
            self.busy.store(true, Ordering::SeqCst);
        }
        moved
    }

    /// Once: whoever hears it makes another one.
    fn report(&self, lane: &Lane, error: &io::Error, sink: &dyn Sink) {
        if lane.report() {
            sink.broken(self.peer, lane.idx, &describe(error));
        }
    }

    /// Small operations are not stuck behind large ones: after every turn of
    /// another lane, lane 0 gets one.
    pub(super) fn pump_small(&self, sink: &dyn Sink) {
        if let Some(first) = self.lane(0) {
            if self.read_lane(&first, sink) && first.can_flush() {
                self.flush_lane(&first, sink);
            }
        }
    }
}

/// What one lane sends or reads before the others get their turn: the more the
/// kernel is given at once, the less it wakes and acknowledges.
///
/// MEASURED: benchmarks/records, 32 MiB over tcp before and after; docs/decisions/0010.
const TURN_BYTES: usize = 512 << 10;
/// The same while small operations are on their way.
///
/// MEASURED: benchmarks/limits.py, 8 bytes behind 1 GiB.
const SHARED_TURN_BYTES: usize = 32 << 10;
/// For how long small operations are expected to go on.
const SHARED_NS: u64 = 4_000_000;
