//! Links of several NICs go down, some or all, in the midst of operations of every kind, and come back one by one.
//!
//! `ANYFABRIC_TEST_LINKS` names them with commas between, as `ip link set ... down` knows them, and without it nothing
//! is done; `ANYFABRIC_TEST_ROUNDS` says how often (4). Which links, when and for how long, and what is under way, the
//! run's seed decides.

use std::collections::HashMap;
use std::time::Duration;

use anyfabric_engine::{Code, PageList, Result, ScatterTarget, Transfer, WriteOptions};
use anyfabric_transports::loopback::Random;

use crate::ask::{Answer, Ask};
use crate::fabric::{on_fabrics, random, Fabric};
use crate::harness::{eventually, fill, Pair, LONG};
use crate::links::{number, set_link};

on_fabrics! { [storm] [verbs_2 VERBS_2, verbs_4_2 VERBS_4_2, verbs_1_3 VERBS_1_3] }

/// What was reported done is there and was counted, once; what failed did so for its rail, and is counted whole or
/// fails its counter; and while one link of them stands, operations go well.
fn storm(fabric: &Fabric) {
    let Ok(links) = std::env::var("ANYFABRIC_TEST_LINKS") else {
        println!("skipped: ANYFABRIC_TEST_LINKS names no links");
        return;
    };
    let mut links: Vec<&str> = links.split(',').collect();
    let num_rounds = u64::from(number("ANYFABRIC_TEST_ROUNDS", 4));
    let mut storm = Storm::new(fabric, num_rounds * SLOTS_PER_ROUND);
    for round in 0..num_rounds {
        storm.random.shuffle(&mut links);
        // All of them the first time, then as it comes.
        let num_down = if round == 0 { links.len() } else { 1 + storm.random.below(links.len() as u64) as usize };
        storm.submit_some();
        for link in &links[..num_down] {
            set_link(link, "down");
            storm.submit_some();
        }
        // From hardly at all to long enough to exhaust every retry.
        std::thread::sleep(Duration::from_millis(storm.random.below(2500)));
        for link in &links[..num_down - 1] {
            set_link(link, "up");
            storm.submit_some();
            storm.goes_well();
            storm.is("degraded");
        }
        set_link(links[num_down - 1], "up");
        storm.submit_some();
        storm.goes_well();
        storm.is("ready");
        storm.end_round();
    }
    storm.check();
}

const SLOTS_PER_ROUND: u64 = 32;
const SLOT: u64 = 256 << 10;
const PAGES: u32 = 200;
const PAGE_BYTES: u64 = 1000;
const TARGET_BYTES: u64 = 100_000;
/// Immediates below are for others.
const FIRST_IMM: u64 = 100;

struct Storm {
    pair: Pair,
    random: Random,
    num_slots: u64,
    ops: Vec<Op>,
    under_way: Vec<(usize, Transfer)>,
}

/// An operation; its place in the list decides its imm, and the slot of both regions that is its own.
struct Op {
    kind: Kind,
    is_done: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Write { nbytes: u64 },
    Pages,
    Scatter,
    Barrier,
    Message,
}

impl Kind {
    fn any(random: &mut Random) -> Self {
        match random.below(6) {
            0 => Self::Write { nbytes: random.below(4096) },
            1 => Self::Write { nbytes: SLOT },
            2 => Self::Pages,
            3 => Self::Scatter,
            4 => Self::Barrier,
            _ => Self::Message,
        }
    }

    const fn count(self) -> u64 {
        match self {
            Self::Write { .. } | Self::Barrier => 1,
            Self::Pages => PAGES as u64,
            Self::Scatter => 2,
            Self::Message => 0,
        }
    }
}

impl Storm {
    fn new(fabric: &Fabric, num_slots: u64) -> Self {
        let pair = Pair::connected(fabric, num_slots * SLOT);
        fill(&pair.region, 6);
        Self { pair, random: random(), num_slots, ops: Vec::new(), under_way: Vec::new() }
    }

    /// Up to four operations, while there are slots.
    fn submit_some(&mut self) {
        for _ in 0..=self.random.below(4) {
            if self.ops.len() as u64 == self.num_slots {
                return;
            }
            let kind = Kind::any(&mut self.random);
            let idx = self.ops.len();
            self.ops.push(Op { kind, is_done: false });
            let transfer = self.submit(idx as u64, kind).unwrap_or_else(|error| panic!("{kind:?}: {error}"));
            self.under_way.push((idx, transfer));
        }
    }

    fn submit(&self, idx: u64, kind: Kind) -> Result<Transfer> {
        let Pair { engine, region, peer, remote, .. } = &self.pair;
        let (at, imm) = (idx * SLOT, (FIRST_IMM + idx) as u32);
        let options = WriteOptions { timeout: Some(LONG), ..WriteOptions::counted(imm) };
        match kind {
            Kind::Write { nbytes } => {
                let range = at..at + nbytes;
                engine.write(&region.slice(range.clone())?, &remote.slice(range)?, options)
            }
            Kind::Pages => {
                let list = || PageList::new((0..PAGES).collect(), PAGE_BYTES, PAGE_BYTES, at);
                engine.write_pages((region, list()), (remote, list()), options)
            }
            Kind::Scatter => {
                let target = |offset| {
                    let remote = remote.clone();
                    ScatterTarget { remote, src_offset: offset, dst_offset: offset, nbytes: TARGET_BYTES }
                };
                engine.scatter(region, &[target(at), target(at + SLOT / 2)], None, options)
            }
            Kind::Barrier => engine.barrier(std::slice::from_ref(&peer.address), imm, Some(LONG)),
            Kind::Message => engine.send(&peer.address, message(idx), Some(LONG)),
        }
    }

    /// With one link, what comes now goes well: at once, or when its rail stands again.
    fn goes_well(&self) {
        let write = || {
            let (src, dst) = (self.pair.region.slice(0..0)?, self.pair.remote.slice(0..0)?);
            self.pair.engine.write(&src, &dst, WriteOptions::counted(1))?.wait(Some(LONG))
        };
        eventually("later operations go well", || write().is_ok());
    }

    fn is(&self, state: &str) {
        eventually(state, || self.pair.engine.path(&self.pair.peer.address).state == state);
    }

    /// Everything ends, for a reason that there is.
    fn end_round(&mut self) {
        for (idx, transfer) in self.under_way.drain(..) {
            let op = &mut self.ops[idx];
            match transfer.wait(Some(LONG)) {
                Ok(()) => op.is_done = true,
                Err(error) => assert_eq!(error.code, Code::ConnectionBroken, "{:?}: {error}", op.kind),
            }
            transfer.wait_quiesced(Some(LONG)).unwrap();
        }
    }

    fn check(&mut self) {
        let num_done = self.ops.iter().filter(|op| op.is_done).count();
        println!("{num_done} of {} operations went well", self.ops.len());
        for idx in 0..self.ops.len() {
            let Op { kind, is_done } = self.ops[idx];
            if kind != Kind::Message {
                self.check_counted(idx as u64, kind, is_done);
            }
        }
        self.check_messages();
    }

    fn check_counted(&mut self, idx: u64, kind: Kind, is_done: bool) {
        let what = format!("operation {idx}, {kind:?}, done: {is_done}");
        let counter = self.pair.peer.open((FIRST_IMM + idx) as u32, &[]);
        match self.pair.peer.wait_count(counter, kind.count()) {
            Ok(()) => {
                assert_eq!(self.mismatch(idx * SLOT, kind), None, "{what}");
                assert_eq!(self.pair.peer.value(counter), kind.count(), "{what}");
            }
            Err(fault) => {
                assert!(!is_done, "{what}: {}", fault.message);
                assert_eq!(fault.code, Code::TransferFailed.as_str(), "{what}: {}", fault.message);
                assert!(self.pair.peer.value(counter) <= kind.count(), "{what}");
            }
        }
    }

    fn mismatch(&mut self, at: u64, kind: Kind) -> Option<u64> {
        let Pair { peer, there, .. } = &mut self.pair;
        let mut wrong = |at, nbytes| peer.mismatch(there, (at, nbytes), 6, at);
        match kind {
            Kind::Write { nbytes } => wrong(at, nbytes),
            Kind::Pages => wrong(at, u64::from(PAGES) * PAGE_BYTES),
            Kind::Scatter => wrong(at, TARGET_BYTES).or_else(|| wrong(at + SLOT / 2, TARGET_BYTES)),
            Kind::Barrier | Kind::Message => None,
        }
    }

    /// Each that was sent came once, and what failed at most once.
    fn check_messages(&mut self) {
        let mut times: HashMap<Vec<u8>, u32> = HashMap::new();
        let until_none = Duration::from_millis(100);
        while let Answer::Bytes(bytes) = self.pair.peer.ask(Ask::Receive { engine: 0, timeout: until_none }) {
            *times.entry(bytes).or_default() += 1;
        }
        for (idx, op) in self.ops.iter().enumerate().filter(|(_, op)| op.kind == Kind::Message) {
            let came = times.remove(&message(idx as u64)).unwrap_or(0);
            assert!(came == 1 || came == 0 && !op.is_done, "message {idx}, done: {}, came {came} times", op.is_done);
        }
        assert!(times.is_empty(), "nobody sent {times:?}");
    }
}

/// Up to what no buffer of a NIC holds.
fn message(idx: u64) -> Vec<u8> {
    let mut random = Random::new(idx);
    let nbytes = 8 + random.below(12_000) as usize;
    random.bytes(nbytes)
}
