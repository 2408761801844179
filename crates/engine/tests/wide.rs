//! Engines of up to eight NICs on either side, over a libibverbs without hardware that moves the bytes, for the keys of
//! the right NICs only. Its knobs are the process's, so this is one test that goes through its chapters.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "conformance/alias.rs"]
mod alias;
mod filled;
#[path = "../../transports/tests/null_nic/mod.rs"]
mod null_nic;

use std::time::Duration;

use alias::{Alias, PERIOD};
use anyfabric_engine::transports::verbs::VerbsSettings;
use anyfabric_engine::{
    Code, Config, Counter, Engine, PageList, Region, Remote, ScatterTarget, Transfer, WriteOptions,
};
use filled::fill;
use null_nic::{carried, eventually, knob, library, Knob};

const NBYTES: u64 = 4 << 20;
const LONG: Duration = Duration::from_secs(20);
const IMM: u32 = 7;

#[test]
fn engines_of_eight_nics() {
    knob(Knob::Delivers, Some(2));
    for (here, there) in [(8, 1), (1, 8), (8, 3), (3, 8), (8, 4), (4, 8), (8, 8), (5, 7), (2, 6)] {
        everything_counts_once_and_every_nic_is_used(here, there);
    }
    more_than_four_gib();
    operations_take_turns();
    unequal_nics_carry_what_they_can();
    one_of_eight_goes_down_and_comes_back();
    links_of_eight_go_down_under_load();
    half_of_an_operation_fails_and_the_other_rail_goes_on();
}

struct Pair {
    here: Engine,
    there: Engine,
    source: Region,
    target: Region,
    remote: Remote,
    counter: Counter,
}

impl Pair {
    /// The first NICs of the machine, at both ends.
    fn new(here: usize, there: usize) -> Self {
        let (here, there) = (engine(here), engine(there));
        let (source, target) = (here.allocate(NBYTES).unwrap(), there.allocate(NBYTES).unwrap());
        fill(&source);
        let remote = here.import(&target.descriptor().unwrap().encode()).unwrap();
        here.connect(there.address(), Some(LONG)).unwrap();
        let counter = there.counter(Some(IMM), &[]).unwrap();
        Self { here, there, source, target, remote, counter }
    }

    fn start(&self, (from, to, nbytes): (u64, u64, u64), imm: Option<u32>) -> Transfer {
        let (src, dst) = (self.source.slice(from..from + nbytes), self.remote.slice(to..to + nbytes));
        let options = WriteOptions { imm, timeout: Some(LONG), ..WriteOptions::default() };
        self.here.write(&src.unwrap(), &dst.unwrap(), options).unwrap()
    }

    fn write(&self, nbytes: u64) {
        self.start((0, 0, nbytes), None).wait(None).unwrap();
    }

    /// What has been written into the target since the last time.
    fn wrote(&self, from: u64, to: u64, nbytes: u64) {
        // SAFETY: inside the regions, and nothing is under way.
        let at = |region: &Region, at: u64| unsafe {
            std::slice::from_raw_parts_mut(region.as_ptr().add(at as usize), nbytes as usize)
        };
        let there = at(&self.target, to);
        assert!(*there == *at(&self.source, from), "{nbytes} bytes from {from} to {to}");
        there.fill(0);
    }

    fn state(&self) -> String {
        self.here.path(self.there.address()).state
    }

    /// Parts that each rail has carried.
    fn parts(&self) -> Vec<u64> {
        let stats = self.here.stats();
        let rails = &stats.peers[&self.there.address().to_string()].nics;
        (0..8).map_while(|rail| Some(rails.get(&format!("rail{rail}"))?.parts)).collect()
    }
}

fn engine(num_nics: usize) -> Engine {
    let config = Config {
        transports: vec!["verbs".into()],
        nics: (0..num_nics).map(|nic| format!("null{nic}")).collect(),
        verbs: VerbsSettings { library: Some(library().to_owned()), ..VerbsSettings::default() },
        ..Config::default()
    };
    Engine::new(config).unwrap()
}

/// Bytes that each device has sent and received meanwhile.
fn used(meanwhile: impl FnOnce()) -> [[i64; 8]; 2] {
    let before = carried();
    meanwhile();
    let mut now = carried();
    for (now, before) in now.as_flattened_mut().iter_mut().zip(before.as_flattened()) {
        *now -= before;
    }
    now
}

fn everything_counts_once_and_every_nic_is_used(num_here: usize, num_there: usize) {
    let pair = Pair::new(num_here, num_there);
    let path = pair.here.path(pair.there.address());
    let num_rails = num_here.max(num_there);
    assert!(path.nics[0].starts_with(&format!("{num_rails} of {num_rails} rails over ")), "{path:?}");
    assert_eq!(path.state, "ready");
    let mut counted = 0;
    let mut count = |more: u64, what: &str| {
        counted += more;
        pair.counter.wait(counted, Some(LONG)).unwrap();
        assert_eq!(pair.counter.value(), counted, "{what}, {num_here} NICs to {num_there}");
    };
    let [sent, received] = used(|| {
        let mut at = 1;
        for nbytes in [0, 1, 64, 4097, 100_000, 300_001, 600_000, NBYTES - 40, 1 << 20, 3_000_001] {
            let (from, to) = (at % (NBYTES - nbytes), (7 * at) % (NBYTES - nbytes));
            at += 1_234_567;
            pair.start((from, to, nbytes), Some(IMM)).wait(None).unwrap();
            count(1, "a write");
            pair.wrote(from, to, nbytes);
        }
        // Several of one imm at a time: one of them may be split.
        let several: Vec<_> = (0..4).map(|idx| pair.start((idx, idx << 20, 1 << 20), Some(IMM))).collect();
        several.iter().for_each(|transfer| transfer.wait(None).unwrap());
        count(4, "four writes");
        (0..4).for_each(|idx| pair.wrote(idx, idx << 20, 1 << 20));
        for (page_bytes, num_pages) in [(64, 700), (4096, 1000), (1 << 20, 3)] {
            let (forwards, backwards) = ((0..num_pages).collect(), (0..num_pages).rev().collect());
            let list = |indices| PageList::new(indices, page_bytes, page_bytes, 0);
            let (src, dst) = ((&pair.source, list(forwards)), (&pair.remote, list(backwards)));
            pair.here.write_pages(src, dst, WriteOptions::counted(IMM)).unwrap().wait(Some(LONG)).unwrap();
            count(num_pages.into(), "pages");
            let place = |page: u32| u64::from(page) * page_bytes;
            (0..num_pages).for_each(|page| pair.wrote(place(page), place(num_pages - 1 - page), page_bytes));
        }
        let target =
            |dst_offset, nbytes| ScatterTarget { remote: pair.remote.clone(), src_offset: 5, dst_offset, nbytes };
        let targets: Vec<_> = (0..20).map(|idx| target(idx * 100, 100)).chain([target(1 << 20, 2_000_000)]).collect();
        pair.here.scatter(&pair.source, &targets, None, WriteOptions::counted(IMM)).unwrap().wait(Some(LONG)).unwrap();
        count(21, "targets");
        targets.iter().for_each(|target| pair.wrote(5, target.dst_offset, target.nbytes));
        for _ in 0..8 {
            pair.here.barrier(&[pair.there.address().clone()], IMM, None).unwrap().wait(Some(LONG)).unwrap();
            count(1, "a barrier");
        }
    });
    let is_used = |bytes: &[i64], num_nics: usize| (0..8).all(|nic| (bytes[nic] > 0) == (nic < num_nics));
    assert!(
        is_used(&sent, num_here) && is_used(&received, num_there),
        "{num_here} to {num_there}: {sent:?} {received:?}"
    );
    assert!(pair.parts().len() == num_rails && pair.parts().iter().all(|parts| *parts > 0), "{:?}", pair.parts());
}

/// In one write, and from and to either side of where an offset of 32 bits would end.
fn more_than_four_gib() {
    const BYTES: u64 = (4 << 30) + (4 << 20) + 1;
    const HIGH: u64 = (4 << 30) + 12_345;
    let (here, there) = (engine(3), engine(2));
    let region = |engine: &Engine| {
        let owner = Alias::new(BYTES);
        // SAFETY: the mapping is the region's owner.
        unsafe { engine.register(owner.as_ptr(), BYTES, true, Box::new(owner)) }.unwrap()
    };
    let (source, target) = (region(&here), region(&there));
    // SAFETY: inside the regions, and nothing is under way.
    let bytes = |region: &Region, at: u64, nbytes: u64| unsafe {
        std::slice::from_raw_parts_mut(region.as_ptr().add(at as usize), nbytes as usize)
    };
    let all = bytes(&source, 0, PERIOD);
    all.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at.wrapping_mul(0x9e37_79b1) >> 16) as u8);
    let remote = here.import(&target.descriptor().unwrap().encode()).unwrap();
    let counter = there.counter(Some(IMM), &[]).unwrap();
    let write = |from: u64, to: u64, nbytes: u64| {
        let (src, dst) = (source.slice(from..from + nbytes).unwrap(), remote.slice(to..to + nbytes).unwrap());
        let options = WriteOptions { timeout: Some(3 * LONG), ..WriteOptions::counted(IMM) };
        here.write(&src, &dst, options).unwrap().wait(None).unwrap();
    };
    for carried in used(|| write(0, 0, BYTES)) {
        assert_eq!(carried.iter().sum::<i64>(), BYTES as i64);
    }
    assert!(bytes(&target, 0, PERIOD) == bytes(&source, 0, PERIOD));
    for (count, (from, to)) in [(HIGH, 0), (0, HIGH), (HIGH, HIGH + 77)].into_iter().enumerate() {
        bytes(&target, 0, PERIOD).fill(0);
        write(from, to, 1 << 20);
        assert!(bytes(&target, to, 1 << 20) == bytes(&source, from, 1 << 20), "from {from} to {to}");
        counter.wait(count as u64 + 2, Some(LONG)).unwrap();
        assert_eq!(counter.value(), count as u64 + 2);
    }
}

/// Four of eight rails serve a large write, and the other four the next; small ones go round.
fn operations_take_turns() {
    let pair = Pair::new(8, 8);
    let [sent, received] = used(|| (0..10).for_each(|_| pair.write(NBYTES)));
    assert_eq!((sent, received), ([5 << 20; 8], [5 << 20; 8]));
    let before = pair.parts();
    let [sent, _] = used(|| pair.write(NBYTES));
    assert_eq!(sent.iter().filter(|bytes| **bytes == 1 << 20).count(), 4, "{sent:?}");
    assert_eq!(pair.parts().iter().sum::<u64>() - before.iter().sum::<u64>(), 4);
    // Waited for one by one, or many under way.
    assert_eq!(used(|| (0..80).for_each(|_| pair.write(64)))[0], [640; 8]);
    let many = || {
        let transfers: Vec<_> = (0..80).map(|_| pair.start((0, 0, 64), None)).collect();
        transfers.iter().for_each(|transfer| transfer.wait(None).unwrap());
    };
    assert_eq!(used(many)[0], [640; 8]);
    // Fewer NICs at the peer: each of ours all the same, and each of theirs the same.
    let pair = Pair::new(8, 4);
    let [sent, received] = used(|| (0..10).for_each(|_| pair.write(NBYTES)));
    assert_eq!((sent, &received[..4]), ([5 << 20; 8], &[10 << 20; 4][..]));
}

/// Three of eight have a quarter of the speed, at both ends; or all of the peer's have.
fn unequal_nics_carry_what_they_can() {
    const WRITES: i64 = 46;
    knob(Knob::Narrow, Some(0b1001_0010));
    let pair = Pair::new(8, 8);
    let [sent, received] = used(|| (0..WRITES).for_each(|_| pair.write(NBYTES)));
    assert_eq!(sent, received);
    for (nic, bytes) in sent.into_iter().enumerate() {
        // 5 * 4 + 3 * 1 parts.
        let share = if 0b1001_0010 >> nic & 1 == 1 { 1.0 } else { 4.0 } / 23.0;
        let writes = bytes as f64 / NBYTES as f64;
        assert!(
            (writes - share * WRITES as f64).abs() < 1.5,
            "NIC {nic} carried {writes} of {WRITES} writes: {sent:?}"
        );
    }
    // Against one of ours, which limits them all, the slow ones serve less often.
    let pair = Pair::new(1, 8);
    let [sent, received] = used(|| (0..WRITES).for_each(|_| pair.write(NBYTES)));
    assert_eq!(sent[0], WRITES * NBYTES as i64);
    assert!(received.iter().all(|bytes| *bytes > 0) && received[0] > received[1], "{received:?}");
    knob(Knob::Narrow, Some(0));
}

/// What is on it fails, and nothing else; the other seven go on, and it is used again when it is back.
fn one_of_eight_goes_down_and_comes_back() {
    const DOWN: usize = 3;
    let pair = Pair::new(8, 8);
    pair.write(NBYTES);
    knob(Knob::Holds, Some(1));
    let transfers: Vec<_> = (0..80).map(|_| pair.start((0, 0, 64), None)).collect();
    knob(Knob::PortsDown, Some(1 << DOWN));
    eventually("the path is degraded", || pair.state() == "degraded");
    knob(Knob::Holds, Some(0));
    let failed: Vec<_> = transfers.iter().filter_map(|transfer| transfer.wait(None).err()).collect();
    assert_eq!(failed.len(), 10, "those of one rail in eight: {failed:?}");
    assert!(failed.iter().all(|error| error.code == Code::ConnectionBroken), "{failed:?}");
    assert!(transfers.iter().all(|transfer| transfer.wait_quiesced(Some(LONG)).is_ok()));
    let path = pair.here.path(pair.there.address());
    assert!(path.nics[0].starts_with("7 of 8 rails"), "{path:?}");

    let [sent, _] = used(|| (0..70).for_each(|_| pair.write(64)));
    let expected: Vec<i64> = (0..8).map(|nic| if nic == DOWN { 0 } else { 640 }).collect();
    assert_eq!(sent[..], expected, "the others have equal parts");
    let [sent, _] = used(|| (0..14).for_each(|_| pair.start((0, 0, NBYTES), Some(IMM)).wait(None).unwrap()));
    assert!((0..8).all(|nic| if nic == DOWN { sent[nic] == 0 } else { sent[nic] >= 6 << 20 }), "{sent:?}");
    pair.counter.wait(14, Some(LONG)).unwrap();
    pair.wrote(0, 0, NBYTES);

    knob(Knob::PortsDown, Some(0));
    eventually("the path is ready", || pair.state() == "ready");
    let [sent, _] = used(|| (0..10).for_each(|_| pair.write(NBYTES)));
    assert!(sent.iter().all(|bytes| (4 << 20..=6 << 20).contains(bytes)), "{sent:?}");
    assert_eq!(pair.counter.value(), 14);
}

/// Whatever was reported done is there and counted, and nothing else is.
fn links_of_eight_go_down_under_load() {
    let pair = Pair::new(8, 3);
    let mut num_failed = 0;
    for round in 0..6 {
        // An imm of its own: one that has lost a part is not split any more.
        let counter = pair.there.counter(Some(100 + round), &[]).unwrap();
        knob(Knob::Holds, Some(i64::from(round % 2)));
        let transfers: Vec<_> = (0..24)
            .map(|idx| {
                if idx == 12 {
                    knob(Knob::PortsDown, Some(1 << (round % 8) | 1 << (round * 3 % 8)));
                }
                pair.start((0, 0, if idx % 3 == 0 { NBYTES } else { 64 }), Some(100 + round))
            })
            .collect();
        eventually("the path is degraded", || pair.state() == "degraded");
        knob(Knob::Holds, Some(0));
        knob(Knob::PortsDown, Some(0));
        let num_done = transfers.iter().filter(|transfer| transfer.wait(Some(LONG)).is_ok()).count();
        assert!(transfers.iter().all(|transfer| transfer.wait_quiesced(Some(LONG)).is_ok()));
        num_failed += transfers.len() - num_done;
        eventually("what is done is counted", || counter.value() >= num_done as u64);
        assert!(counter.value() <= transfers.len() as u64);
        eventually("the path is ready", || pair.state() == "ready");
        pair.write(NBYTES);
        pair.wrote(0, 0, NBYTES);
    }
    assert!(num_failed > 0, "nothing was on those that went down");
}

/// The part on the good rail waits for room when the other one fails, and all that was posted of it ends in the same poll.
fn half_of_an_operation_fails_and_the_other_rail_goes_on() {
    const ROOM: i64 = 128;
    const UNANSWERED: i64 = 12;
    let pair = Pair::new(2, 2);
    pair.write(NBYTES);
    let posted = knob(Knob::NumRequests, None);
    knob(Knob::Holds, Some(1));
    let list = || PageList::new((0..4000).collect(), 512, 512, 0);
    let options = WriteOptions { timeout: Some(LONG), ..WriteOptions::default() };
    let pages = pair.here.write_pages((&pair.source, list()), (&pair.remote, list()), options).unwrap();
    eventually("both rails are full", || knob(Knob::NumRequests, None) - posted == 2 * ROOM);
    // The first NIC is polled first.
    knob(Knob::Status, Some(UNANSWERED));
    knob(Knob::FailsAfter, Some(0));
    knob(Knob::Holds, Some(0));
    assert_eq!(pages.wait(None).unwrap_err().code, Code::ConnectionBroken);
    pages.wait_quiesced(Some(LONG)).unwrap();
    (0..8).for_each(|_| pair.write(NBYTES));
    eventually("the path is ready", || pair.state() == "ready");
    (0..8).for_each(|_| pair.write(NBYTES));
}
