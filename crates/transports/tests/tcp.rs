//! The link over streams, without another engine at their ends.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "common/seeds.rs"]
mod seeds;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyfabric_plan::{Extent, Extents};
use anyfabric_transports::loopback::Random;
use anyfabric_transports::sys::{Fd, Poller, Ready};
use anyfabric_transports::tcp::{Lane, TcpLink};
use anyfabric_transports::{
    lock, Backing, Clock, ControlPath, Doorbell, Failure, Link, Loss, Op, Payload, PeerIdx, Region, RegionTable, Sink,
    Terms, Ticket, TicketOffice, TicketState,
};
use anyfabric_wire::{Frame, FrameKind, Imm, Refusal, WireImm, FLAG_LAST};

/// Nobody cares for what is reported.
struct Nobody;

impl Sink for Nobody {}

/// A link without streams, and where they come from.
struct Bench {
    link: TcpLink,
    poller: Arc<Poller>,
    listener: TcpListener,
}

impl Bench {
    fn new() -> Self {
        let link = TcpLink::new(1, Arc::default(), 1 << 16, 2, Clock::Real);
        let poller = Arc::new(Poller::new().unwrap());
        Self { link, poller, listener: TcpListener::bind("127.0.0.1:0").unwrap() }
    }

    /// A stream, and its other end.
    fn lane(&self, idx: u8) -> (Arc<Lane>, TcpStream) {
        let ours = TcpStream::connect(self.listener.local_addr().unwrap()).unwrap();
        let (theirs, _) = self.listener.accept().unwrap();
        theirs.set_read_timeout(Some(MOMENT)).unwrap();
        (self.watched(ours, idx, u64::from(idx)), theirs)
    }

    fn watched(&self, stream: TcpStream, idx: u8, token: u64) -> Arc<Lane> {
        let socket = Fd::new(OwnedFd::from(stream));
        Arc::new(Lane::new(socket, idx, token, Arc::clone(&self.poller), PATIENCE).unwrap())
    }

    /// Sends what there is to send.
    fn flush(&self) {
        while self.link.poll(&Nobody) {}
    }
}

/// The next frame, if one comes, and what follows its header.
fn next_frame(stream: &mut TcpStream) -> Option<(Frame, Vec<u8>)> {
    let mut header = [0; Frame::HEADER];
    stream.read_exact(&mut header).ok()?;
    let frame = Frame::decode(&header).unwrap();
    let mut rest = vec![0; usize::from(frame.num_pages) * 8 + frame.nbytes as usize];
    stream.read_exact(&mut rest).ok()?;
    Some((frame, rest))
}

/// What becomes of so many operations.
fn next_results(stream: &mut TcpStream, num: usize) -> Vec<(u64, Result<(), Refusal>)> {
    let mut results = Vec::new();
    while results.len() < num {
        let (frame, records) = next_frame(stream).expect("an acknowledgement");
        assert_eq!(frame.kind, FrameKind::Ack);
        let records = records.as_chunks::<{ Frame::ACK_BYTES }>().0;
        results.extend(records.iter().map(|record| Frame::decode_ack(record).unwrap()));
    }
    results
}

/// What any thread sends while the control connection is replaced goes over the old one or the new one, and what the peer
/// has not confirmed comes over the new one without a gap.
#[test]
fn no_control_message_is_lost_between_two_connections() {
    let bench = Bench::new();
    let (first, mut theirs) = bench.lane(0);
    bench.link.set_lane(first, 0);
    let mut received = 0;
    for round in 1..=NUM_ROUNDS {
        let (next, their_next) = bench.lane(0);
        std::thread::scope(|scope| {
            scope.spawn(|| (0..NUM_MESSAGES).for_each(|_| bench.link.send_control(vec![7])));
            // One of them has come, the others are on their way.
            received = next_frame(&mut theirs).unwrap().0.op;
            bench.link.set_lane(next, received);
        });
        theirs = their_next;
        bench.flush();
        while received < round * NUM_MESSAGES {
            let (frame, _) = next_frame(&mut theirs).unwrap_or_else(|| panic!("nothing after message {received}"));
            assert_eq!((frame.kind, frame.op), (FrameKind::Control, received + 1), "in round {round}");
            received = frame.op;
        }
    }
}

/// Every stream notices that lane 0 has ended, and the engine calls again for every time that it hears so.
#[test]
fn the_end_of_a_stream_is_told_once() {
    let bench = Bench::new();
    let mut theirs = Vec::new();
    for idx in 0..3 {
        let (lane, their_end) = bench.lane(idx);
        bench.link.set_lane(lane, 0);
        theirs.push(their_end);
    }
    // Something small is on its way, so that lane 0 is looked at after every other one.
    bench.link.post(signal(1));
    drop(theirs);
    let heard = Heard::default();
    for channel in [1, 0, 2] {
        bench.link.ready(channel, Ready { token: 0, readable: true, writable: true, is_over: false }, &heard);
    }
    let mut broken = lock(&heard.broken).clone();
    broken.sort_unstable();
    assert_eq!(broken, [0, 1, 2]);
    assert!(bench.link.disconnect(0, "it broke") && !bench.link.has_control());
    // The peer calls again, and what was heard of the stream before is not said of this one.
    let (lane, _theirs) = bench.lane(0);
    bench.link.set_lane(lane, 0);
    assert!(!bench.link.disconnect(0, "it broke") && bench.link.has_control());
}

/// Nothing of it was sent, so it has quiesced once it is given up, however long the peer reads nothing.
#[test]
fn what_waits_for_a_full_stream_is_given_up_at_once() {
    let bench = Bench::new();
    let (lane, _theirs) = bench.lane(1);
    bench.link.set_lane(lane, 0);
    let write = |id, nbytes| {
        let op = write(&bench.link, id, nbytes);
        let ticket = Arc::clone(&op.ticket);
        bench.link.post(op);
        bench.flush();
        ticket
    };
    // More than the system takes on both sides.
    let first = write(1, 64 << 20);
    let tickets = [write(2, 1 << 20), write(3, 1 << 20)];
    for ticket in &tickets {
        ticket.cancel();
    }
    bench.link.reap();
    assert!(tickets.iter().all(|ticket| ticket.has_quiesced()));
    assert!(!first.has_ended());
    // The statistics have that it waits for room.
    let retries = bench.link.stats().nics().iter().map(|nic| nic.retries.load(Ordering::Relaxed));
    assert_eq!(retries.collect::<Vec<_>>(), [0, 1, 0]);
}

/// One stream is far ahead of the other: what both have of a write is counted, or its writer hears that it is not.
#[test]
fn no_count_is_lost_between_streams_of_different_speed() {
    let bench = Bench::new();
    let counted = Counted::default();
    let mut streams = [1, 2].map(|idx| {
        let (lane, theirs) = bench.lane(idx);
        bench.link.set_lane(lane, 0);
        (idx, theirs)
    });
    let half = |op: u64| {
        let imm = Some((WireImm { imm: Imm::new(op as u32).unwrap(), quarters: 4 }, 1));
        Frame { flags: FLAG_LAST, num_parts: 2, imm, ..Frame::new(FrameKind::Write, op, 0) }.encode()
    };
    let mut refused = HashMap::new();
    for (idx, theirs) in &mut streams {
        for first in (0..FAR_AHEAD).step_by(1000) {
            let frames: Vec<_> = (first..first + 1000).flat_map(half).collect();
            theirs.write_all(&frames).unwrap();
            let results = std::thread::scope(|scope| {
                let reader = scope.spawn(|| next_results(theirs, 1000));
                while !reader.is_finished() {
                    let ready = Ready { token: 0, readable: true, writable: true, is_over: false };
                    bench.link.ready(*idx, ready, &counted);
                    bench.flush();
                }
                reader.join().unwrap()
            });
            refused.extend(results.into_iter().filter_map(|(op, result)| Some((op as u32, result.err()?))));
        }
    }
    let quarters = lock(&counted.quarters);
    let is_told = |op: &u32| (quarters.get(op) == Some(&4)) != refused.contains_key(op);
    let lost: Vec<_> = (0..FAR_AHEAD as u32).filter(|op| !is_told(op)).collect();
    assert!(lost.is_empty(), "{} are neither counted nor refused, or both: {:?}", lost.len(), lost.first());
    assert!(refused.values().all(|refusal| *refusal == Refusal::Full));
}

/// The peer's system takes no more of what is sent over one stream, for nobody reads there: the stream breaks, and what was
/// under way is not held for as long as the peer likes.
#[test]
fn a_stream_that_is_never_read_breaks() {
    let bench = Bench::new();
    let streams = [0, 1].map(|idx| {
        let (lane, theirs) = bench.lane(idx);
        bench.link.set_lane(lane, 0);
        theirs
    });
    // More than the system takes on both sides.
    let op = write(&bench.link, 1, 64 << 20);
    let ticket = Arc::clone(&op.ticket);
    bench.link.post(op);
    let (heard, began, mut ready) = (Heard::default(), Instant::now(), Vec::new());
    while lock(&heard.broken).is_empty() {
        assert!(began.elapsed() < 10 * PATIENCE, "it stands");
        bench.link.poll(&heard);
        bench.poller.wait(PATIENCE / 100, &mut ready).unwrap();
        ready.iter().for_each(|event| bench.link.ready(event.token as u8, *event, &heard));
    }
    assert!(bench.link.disconnect(1, "it broke") && bench.link.has_control());
    assert!(matches!(ticket.state(), TicketState::Failed(Failure::ConnectionBroken(_))));
    drop(streams);
}

/// Given up halfway, it has carried what was sent until then.
#[test]
fn statistics_have_what_was_sent_of_what_was_given_up() {
    let bench = Bench::new();
    let (lane, theirs) = bench.lane(1);
    bench.link.set_lane(lane, 0);
    let there = TcpLink::new(1, Arc::default(), 1 << 16, 2, Clock::Real);
    there.set_lane(bench.watched(theirs, 1, 9), 0);
    let op = write(&bench.link, 1, 64 << 20);
    let ticket = Arc::clone(&op.ticket);
    bench.link.post(op);
    bench.flush();
    ticket.cancel();
    let began = Instant::now();
    while !ticket.has_quiesced() && began.elapsed() < MOMENT {
        for link in [&there, &bench.link] {
            link.ready(1, Ready { token: 0, readable: true, writable: true, is_over: false }, &Nobody);
        }
    }
    let nbytes = bench.link.stats().nic(1).bytes.load(Ordering::Relaxed);
    assert!((1..64 << 20).contains(&nbytes), "{nbytes} bytes of which most were never sent");
}

/// A peer has new regions all the time, and does not say which of the old ones are gone.
#[test]
fn regions_that_nobody_holds_leave_nothing() {
    let link = Bench::new().link;
    let held: Vec<_> = (0..10).map(|region| link.bind(region, 1, 8)).collect();
    let others: Vec<_> = (10..20_000).map(|region| Arc::downgrade(&link.bind(region, 1, 8))).collect();
    let num_left = others.iter().filter(|binding| binding.strong_count() > 0).count();
    assert!(num_left < 3000, "{num_left} of {} are left", others.len());
    assert!(held.iter().all(|binding| Arc::ptr_eq(binding, &link.bind(binding.region, 1, 8))));
    // They are known to whoever takes them back.
    assert!(link.release(3, 1, Refusal::Revoked));
    assert_eq!(held[3].refusal(), Some(Refusal::Revoked));
}

/// An empty region may lie nowhere, as that of an empty buffer does; a checksum over its bytes is one over none.
#[test]
fn nothing_has_a_checksum() {
    let bench = Bench::new();
    let empty = || {
        let backing = Backing::Foreign { address: std::ptr::null_mut(), owner: Box::new(()) };
        Arc::new(Region::new(1, 1, 0, true, backing))
    };
    let regions = Arc::new(RegionTable::default());
    regions.insert(empty());
    let (lane, theirs) = bench.lane(0);
    bench.link.set_lane(lane, 0);
    let there = TcpLink::new(1, regions, 1 << 16, 2, Clock::Real);
    there.set_lane(bench.watched(theirs, 0, 8), 0);
    let binding = bench.link.bind(1, 1, 0);
    binding.enter().unwrap();
    let extents = Extents::One(Extent { src: 0, dst: 0, nbytes: 0 });
    let op = Op { payload: Payload::Write { source: empty(), binding, extents }, verify: true, ..signal(1) };
    let ticket = Arc::clone(&op.ticket);
    bench.link.post(op);
    let began = Instant::now();
    while !ticket.has_ended() && began.elapsed() < MOMENT {
        for link in [&there, &bench.link] {
            link.ready(0, Ready { token: 0, readable: true, writable: true, is_over: false }, &Nobody);
        }
    }
    assert_eq!(ticket.state(), TicketState::Done);
}

/// A write of zeros.
fn write(link: &TcpLink, id: u64, nbytes: u64) -> Op {
    let mut bytes = vec![0_u8; nbytes as usize];
    let backing = Backing::Foreign { address: bytes.as_mut_ptr(), owner: Box::new(bytes) };
    let source = Arc::new(Region::new(1, 1, nbytes, true, backing));
    let binding = link.bind(1, 1, nbytes);
    binding.enter().unwrap();
    let payload = Payload::Write { source, binding, extents: Extents::One(Extent { src: 0, dst: 0, nbytes }) };
    Op { payload, ..signal(id) }
}

/// An immediate alone.
fn signal(id: u64) -> Op {
    let office = Arc::new(TicketOffice::new(Arc::new(Doorbell::private().unwrap()), Clock::Real));
    let ticket = Arc::new(Ticket::new(office, Terms { num_parts: 1, ..Terms::default() }));
    Op { id, peer: 1, payload: Payload::Signal, imm: None, verify: false, ticket, loss: Loss::default() }
}

/// Which streams broke.
#[derive(Default)]
struct Heard {
    broken: Mutex<Vec<u8>>,
}

impl Sink for Heard {
    fn broken(&self, _: PeerIdx, channel: u8, _: &str) {
        lock(&self.broken).push(channel);
    }
}

/// Streams break and come back at any moment, on one side first, under writes of every length, some of which are cancelled:
/// all quiesce, what is done was counted once, and what was counted is whole.
#[test]
fn what_counts_is_whole_whatever_breaks() {
    seeds::for_seeds(2, |seed, _| Schedule::new(seed).run());
}

/// Two links, the second of which has a region with a place for each write.
struct Schedule {
    random: Random,
    bench: Bench,
    here: TcpLink,
    there: TcpLink,
    source: Arc<Region>,
    target: Arc<Region>,
    counted: Counted,
    office: Arc<TicketOffice>,
    sent: Vec<(Arc<Ticket>, u64)>,
}

/// How often each immediate came, in quarters.
#[derive(Default)]
struct Counted {
    quarters: Mutex<HashMap<u32, u64>>,
}

impl Sink for Counted {
    fn arrived(&self, _: PeerIdx, imm: Imm, quarters: u64) -> Result<(), Refusal> {
        *lock(&self.quarters).entry(imm.value()).or_default() += quarters;
        Ok(())
    }
}

impl Schedule {
    fn new(seed: u64) -> Self {
        let region = |fill: fn(u64) -> u8| {
            let mut bytes: Vec<u8> = (0..NUM_WRITES * SLOT).map(fill).collect();
            let backing = Backing::Foreign { address: bytes.as_mut_ptr(), owner: Box::new(bytes) };
            Arc::new(Region::new(1, 1, NUM_WRITES * SLOT, true, backing))
        };
        let (source, target) = (region(|at| (at % 251) as u8 + 1), region(|_| 0));
        let regions = Arc::new(RegionTable::default());
        regions.insert(Arc::clone(&target));
        let link = |regions| TcpLink::new(1, regions, 1 << 16, 3, Clock::Real);
        let office = Arc::new(TicketOffice::new(Arc::new(Doorbell::private().unwrap()), Clock::Real));
        let (here, there) = (link(Arc::default()), link(regions));
        let (random, counted) = (Random::new(seed), Counted::default());
        Self { random, bench: Bench::new(), here, there, source, target, counted, office, sent: Vec::new() }
    }

    fn run(mut self) {
        (0..4).for_each(|idx| self.connect(idx));
        while (self.sent.len() as u64) < NUM_WRITES {
            let idx = self.random.below(4) as u8;
            match self.random.below(40) {
                0 => {
                    // As who calls: it leaves the stream, calls for another, and who is called leaves his before he answers.
                    self.here.take_out(idx, "seen here first");
                    if self.random.one_in(2) {
                        self.turns(4);
                    }
                    self.there.take_out(idx, "it is called anew");
                    self.connect(idx);
                }
                1 => {
                    self.there.take_out(idx, "seen there first");
                    self.turns(8);
                    self.here.take_out(idx, "its end was seen");
                    self.connect(idx);
                }
                2..5 if !self.sent.is_empty() => {
                    // One of the last, for those are half sent.
                    let back = self.random.below(self.sent.len().min(3) as u64) as usize;
                    self.sent[self.sent.len() - 1 - back].0.cancel();
                    self.here.reap();
                }
                5..10 => self.write(),
                _ => self.turns(1),
            }
        }
        let is_over = |this: &Self| this.sent.iter().all(|(ticket, _)| ticket.has_quiesced());
        for _ in 0..MOST_TURNS {
            if is_over(&self) {
                break;
            }
            self.turns(1);
        }
        assert!(is_over(&self), "something has not quiesced");
        let quarters = lock(&self.counted.quarters);
        for (at, (ticket, nbytes)) in (0..).zip(&self.sent) {
            let count = quarters.get(&(at as u32)).copied().unwrap_or(0);
            let is_done = ticket.state() == TicketState::Done;
            assert!(count == 4 || count == 0 && !is_done, "write {at} of {nbytes}: {count} quarters, {ticket:?}");
            let [source, target] = [&self.source, &self.target].map(|region| {
                // SAFETY: inside the region, and nothing is under way.
                unsafe { std::slice::from_raw_parts(region.as_ptr().add((at * SLOT) as usize), *nbytes as usize) }
            });
            assert!(count == 0 || source == target, "write {at} of {nbytes} bytes was counted and is not whole");
        }
    }

    fn connect(&self, idx: u8) {
        let (ours, theirs) = self.bench.lane(idx);
        self.there.set_lane(self.bench.watched(theirs, idx, 8 + u64::from(idx)), self.here.received());
        self.here.set_lane(ours, self.there.received());
    }

    /// So many times one of the two does something.
    fn turns(&mut self, num: u64) {
        for _ in 0..num {
            let link = if self.random.one_in(2) { &self.here } else { &self.there };
            let channel = self.random.below(4) as u8;
            match self.random.below(3) {
                0 => _ = link.poll(&self.counted),
                1 => link.ready(
                    channel,
                    Ready { token: 0, readable: true, writable: true, is_over: false },
                    &self.counted,
                ),
                _ => link.reap(),
            }
        }
    }

    fn write(&mut self) {
        let at = self.sent.len() as u64;
        let nbytes = LENGTHS[self.random.below(LENGTHS.len() as u64) as usize];
        let terms = Terms { num_parts: 1, deadline_ns: u64::MAX, nbytes, ..Terms::default() };
        let ticket = Arc::new(Ticket::new(Arc::clone(&self.office), terms));
        let binding = self.here.bind(1, 1, self.target.nbytes());
        binding.enter().unwrap();
        let extents = Extents::One(Extent { src: at * SLOT, dst: at * SLOT, nbytes });
        let payload = Payload::Write { source: Arc::clone(&self.source), binding, extents };
        let (imm, verify) = (Some((Imm::new(at as u32).unwrap(), 1)), self.random.one_in(4));
        self.here.post(Op {
            id: at + 1,
            peer: 1,
            payload,
            imm,
            verify,
            ticket: Arc::clone(&ticket),
            loss: Loss::default(),
        });
        self.sent.push((ticket, nbytes));
    }
}

const NUM_WRITES: u64 = 60;
const SLOT: u64 = 1 << 20;
const LENGTHS: [u64; 6] = [0, 5000, 100_000, 700_001, SLOT, SLOT];
const MOST_TURNS: u64 = 1_000_000;
/// More than are kept.
const FAR_AHEAD: u64 = 70_000;
const NUM_ROUNDS: u64 = 1000;
const NUM_MESSAGES: u64 = 20;
/// How long what was sent may go unconfirmed.
const PATIENCE: Duration = Duration::from_secs(1);
const MOMENT: Duration = Duration::from_secs(5);
