//! One engine's way to another over TCP.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use anyfabric_plan::{shard_bytes, shard_pages, Extents};
use anyfabric_wire::{Frame, Refusal};

use super::joins::Joins;
use super::lane::Lane;
use super::limbo::Limbo;
use super::receive::invalid;
use super::send::{acknowledged, Content, Part, Shared};
use crate::controls::Controls;
use crate::mutant::Mutant;
use crate::sys::Ready;
use crate::{
    lock, read, write, Binding, BindingTable, Clock, ControlPath, Failure, Link, Op, Payload, PeerIdx, PeerStats,
    Region, RegionTable, Sink,
};

/// One engine's way to another over TCP. Every peer has one, for its lane 0 is
/// the control connection; whether it also carries the data is the engine's
/// choice.
pub struct TcpLink {
    pub(super) peer: PeerIdx,
    pub(super) regions: Arc<RegionTable>,
    pub(super) max_message_bytes: u32,
    pub(super) clock: Clock,
    num_streams: usize,
    pub(super) lanes: RwLock<Vec<Option<Arc<Lane>>>>,
    turn: AtomicUsize,
    pub(super) controls: Mutex<Controls>,
    joins: Mutex<Joins>,
    bindings: Mutex<BindingTable>,
    /// Lane 0 is there.
    pub(super) stands: AtomicBool,
    pub(super) closed: AtomicBool,
    pub(super) limbo: Limbo,
    /// Large operations that wait for a stream.
    pub(super) held: Mutex<Vec<Op>>,
    /// Streams are being made, or stand.
    pub(super) awaits_streams: AtomicBool,
    /// Some lane may have something to send.
    pub(super) busy: AtomicBool,
    /// The peer has left more control messages unread than are kept.
    pub(super) is_overrun: AtomicBool,
    /// Every stream has stood at once.
    was_whole: AtomicBool,
    /// When something small last went either way.
    pub(super) small_ns: AtomicU64,
    pub(super) stats: Arc<PeerStats>,
}

impl TcpLink {
    /// Most streams beside the control connection.
    pub const MAX_STREAMS: usize = 4;

    /// Without lanes yet.
    pub fn new(
        peer: PeerIdx,
        regions: Arc<RegionTable>,
        max_message_bytes: u32,
        num_streams: usize,
        clock: Clock,
    ) -> Self {
        let num_streams = num_streams.clamp(1, Self::MAX_STREAMS);
        Self {
            peer,
            regions,
            max_message_bytes,
            clock,
            num_streams,
            lanes: RwLock::new(vec![None; Self::MAX_STREAMS + 1]),
            turn: AtomicUsize::new(0),
            controls: Mutex::default(),
            joins: Mutex::default(),
            bindings: Mutex::default(),
            stands: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            limbo: Limbo::default(),
            held: Mutex::default(),
            awaits_streams: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            is_overrun: AtomicBool::new(false),
            was_whole: AtomicBool::new(false),
            small_ns: AtomicU64::new(0),
            stats: Arc::new(PeerStats::new(num_streams + 1)),
        }
    }

    /// Adds a lane, or replaces one that broke; its predecessor's operations
    /// have failed, and quiesce. With `confirmed`, lane 0 resumes after that control message.
    pub fn set_lane(&self, lane: Arc<Lane>, confirmed: u64) {
        let idx = usize::from(lane.idx).min(Self::MAX_STREAMS);
        let mut controls = None;
        if idx == 0 {
            self.confirm(confirmed);
            let controls = controls.insert(lock(&self.controls));
            let mut submitted = lock(&lane.submitted);
            for (sequence, bytes) in controls.unconfirmed() {
                // There is room: no more are kept.
                submitted.push_control(sequence, bytes);
            }
            drop(submitted);
            self.set_pending(&lane);
        }
        let before = {
            let mut lanes = write(&self.lanes);
            let before = lanes[idx].replace(lane);
            // ORDERING: under the lock.
            self.stands.store(lanes[0].is_some(), Ordering::Relaxed);
            before
        };
        // Until now: a message that comes after those is queued where they are.
        drop(controls);
        if let Some(before) = before {
            let why = Failure::ConnectionBroken("replaced by a new connection".into());
            self.limbo.keep(idx as u8, before.stop(&why), &why);
        }
        self.limbo.release(idx);
        if self.missing_lanes().is_empty() {
            // ORDERING: for people.
            self.was_whole.store(true, Ordering::Relaxed);
        }
        if idx > 0 {
            self.expect_streams();
            self.release_held();
        }
        // ORDERING: with `close`, which says so before it takes the lanes: one of us stops this one.
        if self.closed.load(Ordering::SeqCst) {
            self.take_out(idx as u8, "the link was closed");
        }
    }

    /// Streams that are missing.
    pub fn missing_lanes(&self) -> Vec<u8> {
        let lanes = read(&self.lanes);
        (1..=self.num_streams).filter(|&idx| lanes[idx].is_none()).map(|idx| idx as u8).collect()
    }

    pub(super) fn lane(&self, idx: usize) -> Option<Arc<Lane>> {
        read(&self.lanes).get(idx)?.clone()
    }

    /// Which lanes carry a large operation: those that stand, of equal speed.
    fn speeds(&self) -> Vec<u32> {
        let lanes = read(&self.lanes);
        lanes[1..].iter().map(|lane| u32::from(lane.is_some())).collect()
    }

    /// Sends what the lane has, in this thread, as far as one batch goes.
    pub(super) fn push(&self, lane: &Arc<Lane>) -> bool {
        self.set_pending(lane);
        if let Err(error) = lane.flush(self.turn_bytes(), self.stats.nic(lane.idx.into())) {
            log::debug!("peer {}: lane {}: {error}", self.peer, lane.idx);
            // Reading notices the same and reports it; wake the reader.
            lane.set_blocked(true);
        }
        if lane.can_flush() {
            // Whoever polls looked away while the socket was full, and the poller was just told that it is not.
            // ORDERING: see `set_pending`.
            self.busy.store(true, Ordering::SeqCst);
        }
        // ORDERING: a hint.
        lane.pending.load(Ordering::Acquire)
    }

    fn submit(&self, lane: &Arc<Lane>, part: Part, small: bool) -> bool {
        let part = Arc::new(part);
        {
            let mut submitted = lock(&lane.submitted);
            // ORDERING: `stop` sets it before it drains under the same lock.
            if lane.broken.load(Ordering::Acquire) {
                drop(submitted);
                part.end(Err(Failure::ConnectionBroken("the stream just broke".into())));
                return false;
            }
            if small {
                submitted.small.push_back(part);
            } else {
                submitted.bulk.push_back(part);
            }
        }
        if small {
            self.note_small();
            self.push(lane)
        } else {
            self.set_pending(lane);
            true
        }
    }

    pub(super) fn post_write(&self, op: Op) -> bool {
        let Payload::Write { source, binding, extents } = &op.payload else { return false };
        let (source, region, key, extents) = (Arc::clone(source), binding.region, binding.key, extents.clone());
        let speeds = self.speeds();
        // ORDERING: only that turns differ matters.
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let shards = match &extents {
            Extents::One(extent) => shard_bytes(extent.nbytes, &speeds, SHARD_BYTES, turn),
            Extents::Pages { lists, .. } => {
                shard_pages(extents.num_extents(), lists.src.page_bytes(), &speeds, SHARD_BYTES, turn)
            }
        };
        let whole = matches!(extents, Extents::One(_));
        let (id, imm, verify) = (op.id, op.imm, op.verify);
        let num_parts = shards.len().max(1);
        let shared = Arc::new(Shared::new(op, num_parts as u32, &self.stats));
        let part = |extents: Extents, imm, num_parts, lane| Part {
            shared: Arc::clone(&shared),
            lane,
            op: id,
            content: Content::Write { source: Arc::clone(&source), region, key, extents },
            imm,
            num_parts,
            verify,
            submitted_ns: self.clock.now_ns(),
        };
        if shards.is_empty() {
            // No stream stands but the control connection, and none is waited for.
            return match self.lane(0) {
                Some(lane) => self.submit(&lane, part(extents, imm, 1, 0), false),
                None => {
                    part(extents, imm, 1, 0).end(Err(Failure::ConnectionBroken("no stream stands".into())));
                    false
                }
            };
        }
        let mut drive = false;
        for shard in &shards {
            let slice = extents.slice(shard.start, shard.len);
            // A write is joined at the receiver and counts once; every page counts for itself.
            let (imm, joined) =
                if whole { (imm, num_parts as u16) } else { (imm.map(|(imm, _)| (imm, shard.len as u32)), 1) };
            let lane = shard.nic_idx + 1;
            let part = part(slice, imm, joined, lane);
            match self.lane(lane) {
                Some(lane) => drive |= self.submit(&lane, part, false),
                None => part.end(Err(Failure::ConnectionBroken("the stream just broke".into()))),
            }
        }
        drive
    }

    fn post_small(&self, mut op: Op) -> bool {
        let content = match &mut op.payload {
            Payload::Write { source, binding, extents } => Content::Write {
                source: Arc::clone(source),
                region: binding.region,
                key: binding.key,
                extents: extents.clone(),
            },
            Payload::Signal => Content::Signal,
            Payload::Message(bytes) => Content::Message(std::mem::take(bytes)),
        };
        let part = Part {
            op: op.id,
            lane: 0,
            imm: op.imm,
            verify: op.verify,
            content,
            num_parts: 1,
            submitted_ns: self.clock.now_ns(),
            shared: Arc::new(Shared::new(op, 1, &self.stats)),
        };
        match self.lane(0) {
            Some(lane) => self.submit(&lane, part, true),
            None => {
                part.end(Err(Failure::ConnectionBroken("the control connection is being restored".into())));
                false
            }
        }
    }

    pub(super) fn on_acks(&self, lane: &Lane, records: &[u8]) -> io::Result<()> {
        if lane.idx == 0 {
            self.note_small();
        }
        let now_ns = self.clock.now_ns();
        for record in records.as_chunks::<{ Frame::ACK_BYTES }>().0 {
            let (op, result) = Frame::decode_ack(record).map_err(invalid)?;
            if let Some(cursor) = acknowledged(lane, op) {
                let nic = self.stats.nic(usize::from(lane.idx));
                nic.sent(cursor.nbytes());
                let part = cursor.part;
                nic.latency.record(now_ns.saturating_sub(part.submitted_ns));
                // Last: whoever waited for it finds it in the statistics.
                part.end(result.map_err(Failure::Refused));
            }
        }
        Ok(())
    }

    /// The last frame of a part has been placed: counts, when it is the last
    /// part too.
    pub(super) fn on_write_end(
        &self,
        frame: &Frame,
        result: Result<(), Refusal>,
        sink: &dyn Sink,
    ) -> Result<(), Refusal> {
        if frame.num_parts > 1 {
            let is_whole = lock(&self.joins).part_ended(frame.op, frame.num_parts, result)?;
            if !is_whole {
                return Ok(());
            }
        }
        let times = if Mutant::DoublePart.is_on() { 2 } else { 1 };
        result.and_then(|()| match frame.imm {
            Some((imm, count)) => sink.arrived(self.peer, imm.imm, u64::from(imm.quarters) * u64::from(count) * times),
            None => Ok(()),
        })
    }

    /// # Errors
    /// The peer reads none of them: the lane is to be read no further.
    pub(super) fn acknowledge(
        &self,
        lane: &Lane,
        op: u64,
        result: Result<(), Refusal>,
        sink: &dyn Sink,
    ) -> io::Result<()> {
        if !lock(&lane.submitted).push_ack(Frame::encode_ack(op, result)) {
            let why = "it does not read: more acknowledgements wait for it than are kept";
            sink.overrun(self.peer, why);
            return Err(invalid(why));
        }
        // Sent with the next thing that goes out, or when the driver polls next: a reply carries it along.
        self.set_pending(lane);
        Ok(())
    }
}

impl Link for TcpLink {
    fn transport(&self) -> &'static str {
        "tcp"
    }

    fn has_streams(&self) -> bool {
        true
    }

    fn manner(&self) -> String {
        let standing = self.num_streams - self.missing_lanes().len();
        match standing {
            0 => "the control connection only".into(),
            1 => "1 stream".into(),
            standing => format!("{standing} streams"),
        }
    }

    fn is_degraded(&self) -> bool {
        // Streams that were never there are still being made; nothing is broken.
        // ORDERING: for people.
        self.was_whole.load(Ordering::Relaxed) && !self.missing_lanes().is_empty()
    }

    fn bind(&self, region: u64, key: u64, nbytes: u64) -> Arc<Binding> {
        lock(&self.bindings).find_or_ready(region, key, nbytes)
    }

    fn post(&self, op: Op) -> bool {
        // ORDERING: a late look posts to a lane that is about to stop, which ends the operation.
        if self.closed.load(Ordering::Acquire) {
            op.end(Err(Failure::PeerLost("it was given up".into())));
            return false;
        }
        match &op.payload {
            Payload::Write { extents, .. } if extents.nbytes() > SMALL_BYTES => {
                self.hold(op).is_some_and(|op| self.post_write(op))
            }
            _ => self.post_small(op),
        }
    }

    #[inline]
    fn poll(&self, sink: &dyn Sink) -> bool {
        // ORDERING: set after what is pending; see `push`.
        self.busy.load(Ordering::Acquire) && self.flush_lanes(sink)
    }

    fn ready(&self, channel: u8, ready: Ready, sink: &dyn Sink) {
        if let Some(lane) = self.lane(channel.into()) {
            let mut stands = true;
            if ready.readable {
                stands = self.read_lane(&lane, sink);
            }
            if stands && ready.writable {
                self.flush_lane(&lane, sink);
            }
            if channel > 0 && self.is_shared() {
                self.pump_small(sink);
            }
        }
    }

    fn reap(&self) {
        self.reap_held();
        let lanes = read(&self.lanes).clone();
        for lane in lanes.into_iter().flatten() {
            let mut ended = Vec::new();
            // What a full socket keeps out of the batch waits where it was submitted.
            lock(&lane.submitted).reap(&mut ended);
            lock(&lane.send).reap(&mut ended);
            for (part, why) in ended {
                part.end(Err(why));
            }
        }
    }

    fn release(&self, region: u64, key: u64, refusal: Refusal) -> bool {
        lock(&self.bindings).refuse(region, key, refusal);
        self.reap_held();
        lock(&self.bindings).settle(region, key)
    }

    fn withhold(&self, region: &Region) -> bool {
        let lanes = read(&self.lanes).clone();
        for lane in lanes.into_iter().flatten() {
            lock(&lane.receive).withhold(self.peer, region);
        }
        true
    }

    fn close(&self, why: &Failure) {
        // ORDERING: see `post` and `set_lane`.
        self.closed.store(true, Ordering::SeqCst);
        let none = vec![None; Self::MAX_STREAMS + 1];
        let lanes = {
            let mut lanes = write(&self.lanes);
            // ORDERING: under the lock.
            self.stands.store(false, Ordering::Relaxed);
            std::mem::replace(&mut *lanes, none)
        };
        for lane in lanes.into_iter().flatten() {
            self.limbo.keep(lane.idx, lane.stop(why), why);
        }
        self.limbo.release_all();
        self.fail_held(why);
        drop(lock(&self.bindings).close());
    }

    fn is_quiet(&self) -> bool {
        // Stopped lanes place nothing.
        true
    }

    fn stats(&self) -> &PeerStats {
        &self.stats
    }
}

impl std::fmt::Debug for TcpLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpLink").field("peer", &self.peer).field("manner", &self.manner()).finish_non_exhaustive()
    }
}

pub(super) fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the peer closed the stream".into(),
        _ => error.to_string(),
    }
}

/// Writes up to this length go over the control connection, past the large ones.
const SMALL_BYTES: u64 = 16 << 10;
/// A stream's share of a write is at least this long.
const SHARD_BYTES: u64 = 256 << 10;
