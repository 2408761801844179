//! Schedules of faults drawn from seeds, over a libibverbs without hardware that moves the bytes: NICs of different numbers
//! and speeds fail and return in any order, under operations of every kind. The knobs are the process's, so this is one
//! test.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "../../transports/tests/null_nic/mod.rs"]
mod null_nic;
#[path = "../../transports/tests/common/seeds.rs"]
mod seeds;

use std::time::Duration;

use anyfabric_engine::transports::loopback::Random;
use anyfabric_engine::transports::verbs::VerbsSettings;
use anyfabric_engine::{
    Code, Config, Counter, Engine, PageList, Region, Remote, Result, ScatterTarget, Transfer, WriteOptions,
};
use null_nic::{eventually, knob, library, Knob};

/// Each operation has a place of its own at the target.
const SLOT: u64 = 768 << 10;
const NUM_SLOTS: u64 = 24;
const ROUNDS: u32 = 6;
const SHAPES: [(u64, u64); 9] = [(5, 3), (7, 1), (2, 8), (1, 1), (3, 4), (8, 8), (4, 4), (2, 6), (1, 8)];
const LENGTHS: [u64; 9] = [0, 1, 64, 5000, 70_000, 200_000, 500_000, 700_001, SLOT];
const STATUSES: [i64; 5] = [4, 10, 12, 13, 21];
const LONG: Duration = Duration::from_secs(20);
const DEADLINE: Duration = Duration::from_secs(8);

#[test]
fn what_counts_is_whole_whatever_fails() {
    knob(Knob::Delivers, Some(2));
    seeds::for_seeds(3, |seed, _| Schedule::new(seed).run());
}

struct Schedule {
    random: Random,
    here: Engine,
    there: Engine,
    source: Region,
    target: Region,
    remote: Remote,
}

/// An operation, and where its bytes go: so many ranges of that length, at the target one behind the other.
struct Sent {
    transfer: Transfer,
    counter: Counter,
    slot: u64,
    ranges: u64,
    nbytes: u64,
    /// Whether each range has a place of its own at the source too.
    is_pages: bool,
}

impl Schedule {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        knob(Knob::Narrow, Some(random.below(256) as i64));
        let (num_here, num_there) = *random.pick(&SHAPES);
        // On the same NICs, or each on its own.
        let apart = num_here * u64::from(num_here + num_there <= 8 && random.one_in(2));
        let (here, there) = (engine(0..num_here), engine(apart..apart + num_there));
        let (source, target) = (here.allocate(2 * SLOT).unwrap(), there.allocate(NUM_SLOTS * SLOT).unwrap());
        let pattern: Vec<u8> =
            (0..2 * SLOT).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 | 1).collect();
        // SAFETY: as long as the region, and nobody uses it yet.
        unsafe { source.as_ptr().copy_from_nonoverlapping(pattern.as_ptr(), pattern.len()) };
        let remote = here.import(&target.descriptor().unwrap().encode()).unwrap();
        here.connect(there.address(), Some(LONG)).unwrap();
        Self { random, here, there, source, target, remote }
    }

    fn run(&mut self) {
        for round in 0..ROUNDS {
            // SAFETY: the whole region, and nothing is under way.
            unsafe { self.target.as_ptr().write_bytes(0, (NUM_SLOTS * SLOT) as usize) };
            let mut messages = Vec::new();
            let sent: Vec<Sent> = (0..NUM_SLOTS)
                .filter_map(|slot| {
                    self.meddle();
                    if self.below(2) == 0 {
                        let text = vec![slot as u8; 1 + self.below(8168) as usize];
                        let transfer = self.here.send(self.there.address(), text.clone(), Some(DEADLINE)).unwrap();
                        messages.push((transfer, text));
                    }
                    self.send(1000 * round + slot as u32, slot).ok()
                })
                .collect();
            std::thread::sleep(Duration::from_millis(self.below(200)));
            calm();
            for transfer in sent.iter().map(|sent| &sent.transfer).chain(messages.iter().map(|(transfer, _)| transfer))
            {
                let _ = transfer.wait(Some(LONG));
                transfer.wait_quiesced(Some(LONG)).unwrap();
            }
            eventually("all rails stand", || self.here.path(self.there.address()).state == "ready");
            // Behind what has arrived over each.
            for _ in 0..8 {
                self.here.barrier(&[self.there.address().clone()], 999, None).unwrap().wait(Some(LONG)).unwrap();
            }
            sent.iter().for_each(|sent| self.check(sent));
            self.check_messages(&messages);
        }
    }

    fn below(&mut self, end: u64) -> u64 {
        self.random.below(end)
    }

    /// Something fails, or comes back.
    fn meddle(&mut self) {
        let some = (self.below(512) & self.below(512)) as i64;
        match self.below(16) {
            0 => drop(knob(Knob::PortsDown, Some(some))),
            1 => drop(knob(Knob::PortsDown, Some(0))),
            2 => {
                knob(Knob::Status, Some(STATUSES[self.below(5) as usize]));
                knob(Knob::FailsAfter, Some(self.below(60) as i64));
            }
            3 => drop(knob(Knob::Refuses, Some(1 + self.below(80) as i64))),
            4 => drop(knob(Knob::Refuses, Some(0))),
            5 | 6 => drop(knob(Knob::Holds, Some(1))),
            7 | 8 => drop(knob(Knob::Holds, Some(0))),
            9 => drop(knob(Knob::FlushesNothing, Some(some & 1))),
            10 => drop(knob(Knob::NoQueuePairs, Some(some & 1))),
            11 => std::thread::sleep(Duration::from_micros(self.below(3000))),
            12 => drop(knob(Knob::BreaksQueues, Some(some))),
            13 if some & 1 == 1 => std::thread::sleep(Duration::from_millis(self.below(300))),
            _ => {}
        }
    }

    fn send(&mut self, imm: u32, slot: u64) -> Result<Sent> {
        let counter = self.there.counter(Some(imm), &[]).unwrap();
        let (base, kind) = (slot * SLOT, self.below(8));
        let options = WriteOptions { imm: Some(imm), timeout: Some(DEADLINE), ..WriteOptions::default() };
        let (mut ranges, mut nbytes) = (1, 0);
        let transfer = match kind {
            0..=3 => {
                nbytes = LENGTHS[self.below(9) as usize];
                let (src, dst) = (self.source.slice(slot..slot + nbytes)?, self.remote.slice(base..base + nbytes)?);
                self.here.write(&src, &dst, options)
            }
            4 | 5 => {
                let (page_bytes, most) = [(8, 100), (512, 1000), (4096, 180), (65536, 11)][self.below(4) as usize];
                (ranges, nbytes) = (1 + self.below(most), page_bytes);
                let pages = |offset| PageList::new((0..ranges as u32).collect(), page_bytes, page_bytes, offset);
                self.here.write_pages((&self.source, pages(slot)), (&self.remote, pages(base)), options)
            }
            6 => {
                ranges = 1 + self.below(30);
                nbytes = self.below(SLOT / ranges);
                let target = |idx| {
                    let (remote, dst_offset) = (self.remote.clone(), base + idx * nbytes);
                    ScatterTarget { remote, src_offset: slot, dst_offset, nbytes }
                };
                let targets: Vec<_> = (0..ranges).map(target).collect();
                self.here.scatter(&self.source, &targets, None, options)
            }
            _ => self.here.barrier(&[self.there.address().clone()], imm, Some(DEADLINE)),
        }?;
        Ok(Sent { transfer, counter, slot, ranges, nbytes, is_pages: matches!(kind, 4 | 5) })
    }

    /// Never more than there is, never all with a byte missing; and all of what is done.
    fn check(&self, sent: &Sent) {
        let Sent { transfer, counter, slot, ranges, nbytes, is_pages } = sent;
        let is_done = transfer.error().is_none();
        if is_done {
            // Or it is told that something may be missing.
            let has_failed = || {
                let error = counter.wait(u64::MAX, Some(Duration::ZERO)).unwrap_err();
                error.code == Code::TransferFailed
            };
            eventually("what is done is counted", || counter.value() >= *ranges || has_failed());
        }
        let counted = counter.value();
        assert!(counted <= *ranges, "{counted} of {ranges}");
        if counted == *ranges {
            for range in 0..*ranges {
                let from = slot + if *is_pages { range * nbytes } else { 0 };
                let there = bytes(&self.target, slot * SLOT + range * nbytes, *nbytes);
                assert!(there == bytes(&self.source, from, *nbytes), "range {range} of {ranges}, done: {is_done}");
            }
        }
    }
}

impl Schedule {
    /// Each that is done has come, and none twice.
    fn check_messages(&self, messages: &[(Transfer, Vec<u8>)]) {
        let mut came: Vec<_> =
            std::iter::from_fn(|| self.there.receive(Some(Duration::ZERO)).ok()).map(|message| message.data).collect();
        for (transfer, text) in messages {
            let at = came.iter().position(|message| message == text);
            assert!(at.is_some() || transfer.error().is_some(), "{} bytes are done and did not come", text.len());
            at.into_iter().for_each(|at| drop(came.swap_remove(at)));
        }
        assert!(came.is_empty(), "{} came twice, or as something else", came.len());
    }
}

fn engine(nics: std::ops::Range<u64>) -> Engine {
    let config = Config {
        transports: vec!["verbs".into()],
        nics: nics.map(|nic| format!("null{nic}")).collect(),
        verbs: VerbsSettings { library: Some(library().to_owned()), ..VerbsSettings::default() },
        ..Config::default()
    };
    Engine::new(config).unwrap()
}

/// Nothing fails any more.
fn calm() {
    for at_ease in
        [Knob::PortsDown, Knob::Refuses, Knob::Holds, Knob::FlushesNothing, Knob::NoQueuePairs, Knob::BreaksQueues]
    {
        knob(at_ease, Some(0));
    }
    knob(Knob::FailsAfter, Some(-1));
}

fn bytes(region: &Region, at: u64, nbytes: u64) -> &[u8] {
    // SAFETY: inside the region, and nothing is under way.
    unsafe { std::slice::from_raw_parts(region.as_ptr().add(at as usize), nbytes as usize) }
}
