//! Processes of one host write into each other's memory, and are stopped, go on and are killed meanwhile, by schedules
//! drawn from seeds. What was reported done is there and was counted; what was counted is there; whatever is between two
//! that live is done, and everything ends.

use std::collections::HashMap;
use std::time::Duration;

use anyfabric_engine::{Code, Counter, Engine, PageList, Region, Remote, ScatterTarget, Transfer, WriteOptions};
use anyfabric_transports::loopback::Random;

use crate::ask::{Answer, Ask, Fault, How};
use crate::fabric::{on_fabrics, Fabric};
use crate::harness::{bytes, eventually, fill, Peer, PeerRegion, LONG};
use crate::pattern::mismatch;
use crate::seeds;

on_fabrics! { [tumult] [shm SHM, shm_foreign SHM_FOREIGN, shm_isolated SHM_ISOLATED] }

fn tumult(fabric: &Fabric) {
    seeds::for_seeds(2, |seed, _| Tumult::new(fabric, seed).run());
}

const NUM_PEERS: usize = 3;
const NUM_STEPS: u64 = 90;
/// Each operation has a place of its own at its target, with room behind it that nobody writes to.
const SLOT: u64 = 320 << 10;
const GUARD: u64 = 64;
/// One for each operation, and the first for who hammers.
const NUM_SLOTS: u64 = NUM_STEPS + 1;
/// From nothing to what a worker copies; each fits a slot.
const LENGTHS: [u64; 9] = [0, 1, 8, 100, 4097, 70_000, 262_144, 262_145, SLOT - GUARD];
/// More than a ring holds.
const BURST: u64 = 1500;
/// Long enough that nobody is in the midst of it by chance only.
const LARGE: u64 = 8 << 20;
/// More than is copied under a lock.
const HAMMERED_BYTES: u64 = 100_000;
/// What hammers and operations are counted by.
const HAMMERED: u32 = 10;
const FIRST_IMM: u32 = 100;
const MESSAGE: u32 = u32::MAX;

/// The test's own process is number 0.
struct Tumult {
    random: Random,
    fabric: Fabric,
    engine: Engine,
    source: Region,
    target: Region,
    peers: Vec<Other>,
    /// Of every process.
    targets: Vec<Remote>,
    descriptors: Vec<Vec<u8>>,
    sent: Vec<Sent>,
    counters: HashMap<u32, Counter>,
    /// The last of the peers hammers it, until it is taken back.
    hammered: Option<Region>,
    /// Taken back, and its memory used for something else.
    taken_back: Vec<Region>,
    bursts: Vec<(usize, u32, Vec<Transfer>)>,
}

struct Other {
    process: Peer,
    source: PeerRegion,
    target: PeerRegion,
    is_stopped: bool,
    is_dead: bool,
}

/// An operation: so many ranges of that length, at the target one behind the other.
struct Sent {
    from: usize,
    to: usize,
    /// Another target of the same operation, if it has one.
    beside: usize,
    slot: u64,
    imm: u32,
    ranges: u64,
    nbytes: u64,
    handle: Handle,
    /// It may end at its deadline.
    may_fail: bool,
}

#[derive(Clone)]
enum Handle {
    Here(Transfer),
    There(usize),
    /// Refused when it was submitted.
    Nowhere(String),
}

impl Tumult {
    fn new(fabric: &Fabric, seed: u64) -> Self {
        let mut settings = fabric.here();
        // Nobody waits for room, and nobody is stopped long enough to be lost.
        (settings.queue_depth, settings.heartbeats_lost) = (1 << 20, 60);
        let engine = Engine::new(settings.config()).unwrap();
        let (source, target) = (fabric.region(&engine, LARGE), fabric.region(&engine, NUM_SLOTS * SLOT));
        fill(&source, 1);
        let start = |idx| {
            let mut process = Peer::start(&settings);
            let (source, target) =
                (process.region(LARGE, fabric.memory), process.region(NUM_SLOTS * SLOT, fabric.memory));
            process.fill(&source, (0, LARGE), idx as u64 + 1);
            Other { process, source, target, is_stopped: false, is_dead: false }
        };
        let mut peers: Vec<_> = (1..=NUM_PEERS).map(start).collect();
        let mut descriptors = vec![target.descriptor().unwrap().encode()];
        descriptors.extend(peers.iter().map(|peer| peer.target.descriptor.clone()));
        let targets: Vec<_> = descriptors.iter().map(|descriptor| Remote::decode(descriptor).unwrap()).collect();
        for (idx, peer) in peers.iter_mut().enumerate() {
            for remote in targets.iter().take(idx + 1) {
                let address = remote.address().to_string();
                assert_eq!(peer.process.ask(Ask::Connect { engine: 0, address }), Answer::Done);
            }
        }
        let (sent, bursts, taken_back, counters) = (Vec::new(), Vec::new(), Vec::new(), HashMap::new());
        let random = Random::new(seed);
        let hammered = Some(fabric.region(&engine, HAMMERED_BYTES));
        let fabric = *fabric;
        Self {
            hammered,
            random,
            fabric,
            engine,
            source,
            target,
            peers,
            targets,
            descriptors,
            sent,
            counters,
            taken_back,
            bursts,
        }
    }

    fn run(mut self) {
        for from in 1..=NUM_PEERS {
            self.hammer(from);
        }
        let (dies_at, dies) = (self.random.below(2 * NUM_STEPS), self.random.below(NUM_PEERS as u64) as usize);
        for step in 0..NUM_STEPS {
            if step == dies_at {
                // Whatever it is doing, and perhaps stopped.
                self.peers[dies].process.kill();
                self.peers[dies].is_dead = true;
            }
            if step == NUM_STEPS / 2 {
                self.go_on(NUM_PEERS - 1);
                let region = self.hammered.take().unwrap();
                self.take_back_now(region, LONG);
            }
            let any = self.random.below(NUM_PEERS as u64) as usize;
            match self.random.below(12) {
                0 | 1 => self.stop(any),
                2 | 3 => self.go_on(any),
                4 => std::thread::sleep(Duration::from_micros(self.random.below(20_000))),
                5 => self.take_back(any + 1, u32::try_from(step).unwrap()),
                6 => self.burst(any + 1, step),
                _ => self.send(step),
            }
        }
        (0..NUM_PEERS).for_each(|idx| self.go_on(idx));
        let hammered = self.end_hammers();
        let outcomes: Vec<_> = (0..self.sent.len()).map(|idx| self.outcome(idx)).collect();
        for (idx, is_done) in outcomes.iter().enumerate() {
            self.check(idx, *is_done);
        }
        self.check_bursts();
        self.check_messages(&outcomes);
        for (to, done, most) in hammered {
            let counted = self.count(to, HAMMERED, done);
            assert!((done..=most).contains(&counted), "{counted} counted, {done} to {most} written");
        }
        for region in &self.taken_back {
            assert!(bytes(region).iter().all(|byte| *byte == 0xee), "memory was written to after it was taken back");
        }
    }

    fn lives(&self, idx: usize) -> bool {
        idx == 0 || !self.peers[idx - 1].is_dead
    }

    /// Whether it can be told something.
    fn runs(&self, idx: usize) -> bool {
        self.lives(idx) && (idx == 0 || !self.peers[idx - 1].is_stopped)
    }

    fn stop(&mut self, idx: usize) {
        let peer = &mut self.peers[idx];
        if !peer.is_dead && !peer.is_stopped {
            peer.process.stop();
            peer.is_stopped = true;
        }
    }

    fn go_on(&mut self, idx: usize) {
        let peer = &mut self.peers[idx];
        if !peer.is_dead && peer.is_stopped {
            peer.process.go_on();
            peer.is_stopped = false;
        }
    }

    /// Threads that write to the next process again and again; of the last one into memory that is taken back.
    fn hammer(&mut self, from: usize) {
        let to = match &self.hammered {
            Some(region) if from == NUM_PEERS => region.descriptor().unwrap().encode(),
            _ => self.descriptors[from + 1].clone(),
        };
        let (nbytes, num_threads) = if from == NUM_PEERS { (HAMMERED_BYTES, 2) } else { (3000, 1) };
        let Other { process, source, .. } = &mut self.peers[from - 1];
        let ask = Ask::Hammer { region: source.idx, nbytes, to, to_at: 0, imm: Some(HAMMERED), num_threads };
        assert_eq!(process.ask(ask), Answer::Done);
    }

    /// To whom, what was done of it, and what at most was counted.
    fn end_hammers(&mut self) -> Vec<(usize, u64, u64)> {
        let mut ended = Vec::new();
        for from in 1..=NUM_PEERS {
            let to = (from + 1) % (NUM_PEERS + 1);
            if self.lives(from) {
                let done = self.peers[from - 1].process.count(Ask::HammerEnd);
                if self.lives(to) {
                    ended.push((to, done, done));
                }
            } else if self.lives(to) {
                ended.push((to, 0, u64::MAX));
            }
        }
        ended
    }

    /// Another operation, unless who was drawn cannot be told.
    fn send(&mut self, step: u64) {
        let (from, to) = (self.any(), self.any());
        if from == to || !self.runs(from) {
            return;
        }
        let (slot, kind) = (step + 1, self.random.below(8));
        let imm = FIRST_IMM + step as u32;
        let timeout = if self.random.below(4) == 0 { Duration::from_millis(20) } else { LONG };
        let may_fail = timeout < LONG;
        let (mut ranges, mut nbytes) = (1, LENGTHS[self.random.below(9) as usize]);
        if matches!(kind, 5 | 6) {
            nbytes = [8, 512, 4096][self.random.below(3) as usize];
            ranges = 1 + self.random.below(((SLOT - GUARD) / nbytes).min(700));
        }
        if to == 0 && kind < 7 {
            self.counters.insert(imm, self.engine.counter(Some(imm), &[]).unwrap());
        }
        let how = How { imm: Some(imm), timeout: Some(timeout), verify: self.random.below(8) == 0 };
        let handle = match (from, kind) {
            (_, 7) => {
                let handle = self.message(from, to, step, timeout);
                return self.sent.push(Sent {
                    from,
                    to,
                    beside: to,
                    slot,
                    imm: MESSAGE,
                    ranges: 0,
                    nbytes: step,
                    handle,
                    may_fail,
                });
            }
            (0, 4) => {
                // To two at a time, of which it is known together what became of them.
                let other = 1 + to % NUM_PEERS;
                let target = |to: usize| {
                    let remote = self.targets[to].clone();
                    ScatterTarget { remote, src_offset: 0, dst_offset: slot * SLOT, nbytes }
                };
                let options = WriteOptions { imm: how.imm, timeout: how.timeout, ..WriteOptions::default() };
                let targets = [target(to), target(other)];
                let handle = Handle::here(self.engine.scatter(&self.source, &targets, None, options));
                let again = handle.clone();
                let sent = Sent { from, to, beside: other, slot, imm, ranges, nbytes, handle, may_fail };
                self.sent.push(Sent { to: other, beside: to, handle: again, ..sent });
                return self.sent.push(sent);
            }
            (0, 5 | 6) => {
                let options = WriteOptions { imm: how.imm, timeout: how.timeout, verify: how.verify };
                let pages = |offset| PageList::new((0..ranges as u32).collect(), nbytes, nbytes, offset);
                let (src, dst) = ((&self.source, pages(0)), (&self.targets[to], pages(slot * SLOT)));
                Handle::here(self.engine.write_pages(src, dst, options))
            }
            (0, _) => {
                let options = WriteOptions { imm: how.imm, timeout: how.timeout, verify: how.verify };
                let at = slot * SLOT;
                let (src, dst) = (self.source.slice(0..nbytes), self.targets[to].slice(at..at + nbytes));
                Handle::here(self.engine.write(&src.unwrap(), &dst.unwrap(), options))
            }
            (_, 5 | 6) => {
                let (pages, first) = ((0..ranges as u32).collect(), slot * SLOT / nbytes);
                let to_pages = (0..ranges).map(|page| (first + page) as u32).collect();
                let (region, to) = (self.peers[from - 1].source.idx, self.descriptors[to].clone());
                self.tell(from, Ask::WritePages { region, pages, to, to_pages, page_bytes: nbytes, how })
            }
            _ => {
                let (region, to) = (self.peers[from - 1].source.idx, self.descriptors[to].clone());
                self.tell(from, Ask::Write { region, at: 0, nbytes, to, to_at: slot * SLOT, how })
            }
        };
        self.sent.push(Sent { from, to, beside: to, slot, imm, ranges, nbytes, handle, may_fail });
    }

    fn message(&mut self, from: usize, to: usize, step: u64, timeout: Duration) -> Handle {
        let (address, text) = (self.targets[to].address().clone(), message(step));
        if from == 0 {
            Handle::here(self.engine.send(&address, text, Some(timeout)))
        } else {
            self.tell(from, Ask::Send { engine: 0, to: address.to_string(), bytes: text })
        }
    }

    /// More counts than a ring holds, to who may not read it.
    fn burst(&mut self, to: usize, step: u64) {
        let (slot, imm) = (step + 1, FIRST_IMM + step as u32);
        let (src, dst) =
            (self.source.slice(0..8).unwrap(), self.targets[to].slice(slot * SLOT..slot * SLOT + 8).unwrap());
        let options = WriteOptions { imm: Some(imm), timeout: Some(LONG), ..WriteOptions::default() };
        let writes = (0..BURST).map_while(|_| self.engine.write(&src, &dst, options).ok()).collect();
        self.bursts.push((to, imm, writes));
    }

    /// Memory that a peer is writing to is taken back, and used for something else.
    fn take_back(&mut self, from: usize, step: u32) {
        if !self.runs(from) {
            return;
        }
        let region = self.fabric.region(&self.engine, LARGE);
        let (to, idx) = (region.descriptor().unwrap().encode(), self.peers[from - 1].source.idx);
        for num in 0..3 {
            let how = How { imm: Some(1000 + 4 * step + num), timeout: Some(LONG), verify: false };
            self.tell(from, Ask::Write { region: idx, at: 0, nbytes: LARGE, to: to.clone(), to_at: 0, how });
        }
        std::thread::sleep(Duration::from_micros(self.random.below(3000)));
        if self.random.below(2) == 0 {
            self.stop(from - 1);
        }
        self.take_back_now(region, Duration::from_millis(100));
    }

    fn take_back_now(&mut self, region: Region, timeout: Duration) {
        let result = region.revoke(None, timeout);
        assert!(result.is_ok() || timeout < LONG, "{result:?}");
        if result.is_ok() {
            bytes(&region).fill(0xee);
            self.taken_back.push(region);
        }
    }

    fn any(&mut self) -> usize {
        self.random.below(NUM_PEERS as u64 + 1) as usize
    }

    fn tell(&mut self, from: usize, ask: Ask) -> Handle {
        match self.peers[from - 1].process.ask(ask) {
            Answer::Id(id) => Handle::There(id),
            Answer::Failed(Fault { message, .. }) => Handle::Nowhere(message),
            other => panic!("unexpected answer {other:?}"),
        }
    }

    /// Whether it was done; all of it is between processes that live.
    fn outcome(&mut self, idx: usize) -> bool {
        let Sent { from, to, beside, may_fail, .. } = self.sent[idx];
        let is_lost = [from, to, beside].iter().any(|idx| !self.lives(*idx));
        let check = |code: &str, why: &str| {
            let is_late = may_fail && code == Code::TransferTimeout.as_str();
            assert!(is_lost || is_late, "from {from} to {to}: {code}: {why}");
        };
        match &self.sent[idx].handle {
            Handle::Here(transfer) => {
                let result = transfer.wait(Some(LONG));
                transfer.wait_quiesced(Some(LONG)).unwrap();
                result.map_err(|error| check(error.code.as_str(), &error.message)).is_ok()
            }
            Handle::There(transfer) if self.lives(from) => {
                let transfer = *transfer;
                let result = self.peers[from - 1].process.wait(transfer);
                if let Err(fault) = &result {
                    check(&fault.code, &fault.message);
                }
                let process = &mut self.peers[from - 1].process;
                eventually("nothing of it moves", || {
                    matches!(process.ask(Ask::State { transfer }), Answer::State { quiesced: true, .. })
                });
                result.is_ok()
            }
            Handle::There(_) => false,
            Handle::Nowhere(why) => {
                check("refused", why);
                false
            }
        }
    }

    fn check(&mut self, idx: usize, is_done: bool) {
        let Sent { from, to, slot, imm, ranges, nbytes, .. } = self.sent[idx];
        if imm == MESSAGE || !self.lives(to) {
            return;
        }
        let counted = self.count(to, imm, if is_done { ranges } else { 0 });
        let what = format!("slot {slot} from {from} to {to}: {counted} of {ranges} of {nbytes} bytes, done: {is_done}");
        assert!(counted <= ranges && (counted == ranges || !is_done), "{what}");
        let total = ranges * nbytes;
        if counted == ranges {
            assert_eq!(self.mismatch(idx, total), None, "{what}");
        }
        assert!(self.read(to, slot * SLOT + total, GUARD).iter().all(|byte| *byte == 0), "beyond its end: {what}");
    }

    fn mismatch(&mut self, idx: usize, total: u64) -> Option<u64> {
        let Sent { from, to, slot, .. } = self.sent[idx];
        let (seed, at) = (from as u64 + 1, slot * SLOT);
        if to == 0 {
            return mismatch(&bytes(&self.target)[at as usize..(at + total) as usize], seed, 0);
        }
        let Other { process, target, .. } = &mut self.peers[to - 1];
        process.mismatch(target, (at, total), seed, 0)
    }

    fn read(&mut self, at: usize, from: u64, nbytes: u64) -> Vec<u8> {
        if at == 0 {
            return bytes(&self.target)[from as usize..(from + nbytes) as usize].to_vec();
        }
        let Other { process, target, .. } = &mut self.peers[at - 1];
        process.read(target, from, nbytes)
    }

    /// What was counted there, once it is as much as that.
    fn count(&mut self, at: usize, imm: u32, least: u64) -> u64 {
        if at == 0 {
            let counters = &mut self.counters;
            let open = || self.engine.counter(Some(imm), &[]).unwrap();
            let counter = counters.entry(imm).or_insert_with(open);
            counter.wait(least, Some(LONG)).unwrap();
            return counter.value();
        }
        let process = &mut self.peers[at - 1].process;
        let counter = process.open(imm, &[]);
        let mut counted = process.value(counter);
        eventually("what is done is counted", || {
            counted = process.value(counter);
            counted >= least
        });
        counted
    }

    fn check_bursts(&mut self) {
        for (to, imm, writes) in std::mem::take(&mut self.bursts) {
            let done = writes.iter().filter(|write| write.wait(Some(LONG)).is_ok()).count() as u64;
            assert!(done == BURST || !self.lives(to), "{done} of {BURST} to {to}");
            if self.lives(to) {
                assert_eq!(self.count(to, imm, BURST), BURST);
            }
        }
    }

    /// Each that was sent came once, and what failed at most once.
    fn check_messages(&mut self, outcomes: &[bool]) {
        let until_none = Duration::from_millis(50);
        let mut came: HashMap<(usize, Vec<u8>), u32> = HashMap::new();
        while let Ok(received) = self.engine.receive(Some(until_none)) {
            *came.entry((0, received.data)).or_default() += 1;
        }
        for (idx, peer) in self.peers.iter_mut().enumerate().filter(|(_, peer)| !peer.is_dead) {
            let (to, process) = (idx + 1, &mut peer.process);
            while let Answer::Bytes(data) = process.ask(Ask::Receive { engine: 0, timeout: until_none }) {
                *came.entry((to, data)).or_default() += 1;
            }
        }
        for (sent, is_done) in self.sent.iter().zip(outcomes).filter(|(sent, _)| sent.imm == MESSAGE) {
            let times = came.remove(&(sent.to, message(sent.nbytes))).unwrap_or(0);
            let is_right = times == 1 || times == 0 && !(*is_done && self.lives(sent.to));
            assert!(is_right, "a message from {} to {}, done: {is_done}, came {times} times", sent.from, sent.to);
        }
        assert!(came.is_empty(), "nobody sent {} messages", came.len());
    }
}

impl Handle {
    fn here(result: anyfabric_engine::Result<Transfer>) -> Self {
        result.map_or_else(|error| Self::Nowhere(error.message), Self::Here)
    }
}

fn message(step: u64) -> Vec<u8> {
    let mut random = Random::new(step);
    let nbytes = 8 + random.below(2000) as usize;
    random.bytes(nbytes)
}
