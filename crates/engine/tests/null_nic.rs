//! Engines over a libibverbs without hardware: what becomes of transfers when NICs fail in ways that Soft-RoCE does not.
//! The null NIC's knobs are the process's, so this is one test that goes through its chapters.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "../../transports/tests/null_nic/mod.rs"]
mod null_nic;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyfabric_engine::transports::verbs::VerbsSettings;
use anyfabric_engine::{
    Code, Config, Engine, PageList, Polling, Region, Remote, Result, ScatterTarget, Transfer, WriteOptions,
};
use null_nic::{announce, eventually, knob, library, remove, Knob};

const LONG: Duration = Duration::from_secs(20);
const REFUSED: i64 = 10;
const UNANSWERED: i64 = 12;

struct Pair {
    here: Engine,
    there: Engine,
    region: Region,
    remote: Remote,
    theirs: Region,
}

impl Pair {
    fn new(nics: (&[&str], &[&str]), nbytes: u64) -> Self {
        Self::between(engine(nics.0), engine(nics.1), nbytes)
    }

    fn between(here: Engine, there: Engine, nbytes: u64) -> Self {
        let (region, theirs) = (here.allocate(nbytes).unwrap(), there.allocate(nbytes).unwrap());
        let remote = here.import(&theirs.descriptor().unwrap().encode()).unwrap();
        here.connect(there.address(), Some(LONG)).unwrap();
        assert_eq!(here.path(there.address()).transport, "verbs");
        Self { here, there, region, remote, theirs }
    }

    fn start(&self, nbytes: u64) -> Transfer {
        let (src, dst) = (self.region.slice(0..nbytes).unwrap(), self.remote.slice(0..nbytes).unwrap());
        let options = WriteOptions { timeout: Some(LONG), ..WriteOptions::counted(1) };
        self.here.write(&src, &dst, options).unwrap()
    }

    fn write(&self, nbytes: u64) -> Result<()> {
        self.start(nbytes).wait(None)
    }

    fn state(&self) -> String {
        self.here.path(self.there.address()).state
    }
}

fn config(nics: &[&str]) -> Config {
    Config {
        transports: vec!["verbs".into()],
        nics: nics.iter().map(|nic| (*nic).to_owned()).collect(),
        verbs: VerbsSettings { library: Some(library().to_owned()), ..VerbsSettings::default() },
        ..Config::default()
    }
}

fn engine(nics: &[&str]) -> Engine {
    Engine::new(config(nics)).unwrap()
}

#[test]
fn engines_over_the_null_nic() {
    wrong_settings_are_named();
    any_number_of_nics_on_either_side();
    a_fault_ends_what_it_must_and_the_rail_comes_back();
    a_port_goes_down_and_up();
    a_port_is_down_at_one_end();
    no_rail_stands_at_first();
    a_device_that_flushes_nothing();
    a_queue_that_breaks_fails_counts_that_may_lack_something();
    a_device_that_announces_its_end();
    memory_that_cannot_be_registered();
    a_large_region_is_pinned_aside();
    memory_is_registered_once_a_device();
    memory_that_a_nic_does_not_forget_is_not_given_back();
    a_rail_that_no_nic_stops();
    a_peer_with_other_transports_only();
    a_scatter_from_memory_that_no_nic_knows();
    an_idle_nic_begins_early();
    an_end_while_somebody_waits_busily();
}

fn wrong_settings_are_named() {
    let fails = |config: Config, code: Code, words: &str| {
        let error = Engine::new(config).err().unwrap();
        assert!(error.code == code && error.to_string().contains(words), "{:?}: {error}", error.code);
    };
    fails(config(&["null9"]), Code::InvalidArgument, "there is no NIC null9; this host has null0");
    let nine = ["null0", "null1", "null2", "null3", "null4", "null5", "null6", "null7", "null8"];
    let words = "9 NICs are given, expected 1 to 8: every peer costs a connection for each; for more open an engine";
    fails(config(&nine), Code::InvalidArgument, words);
    let few = Config { nics_per_device: Some(9), ..config(&nine[..2]) };
    fails(few, Code::InvalidArgument, "9 NICs are given, expected 1 to 8");
    let verbs = VerbsSettings { rnr_retry: 7, ..VerbsSettings::default() };
    fails(Config { verbs, ..Config::default() }, Code::InvalidArgument, "rnr_retry of verbs is 7, expected 0 to 6");
    let verbs = VerbsSettings { library: Some("/nowhere.so".into()), ..VerbsSettings::default() };
    fails(Config { verbs, nics: Vec::new(), ..config(&[]) }, Code::Unsupported, "install libibverbs1");
}

fn any_number_of_nics_on_either_side() {
    let names = ["null0", "null1", "null2", "null3", "null4", "null5", "null6", "null7"];
    for here in [1, 2, 3, 4, 8] {
        for there in [1, 2, 3, 4, 8] {
            let pair = Pair::new((&names[..here], &names[..there]), 8 << 20);
            let path = pair.here.path(pair.there.address());
            let rails = here.max(there);
            assert!(path.nics[0].starts_with(&format!("{rails} of {rails} rails")), "{here} and {there}: {path:?}");
            assert_eq!(path.state, "ready");
            pair.write(8 << 20).unwrap();
            (0..8).for_each(|_| pair.write(64).unwrap());
            let stats = pair.here.stats();
            let used = &stats.peers[&pair.there.address().to_string()];
            assert_eq!((used.operations, used.nics.len()), (9, rails));
            assert!(used.nics.values().all(|rail| rail.bytes > 0), "{here} and {there}: a rail was not used");
        }
    }
}

/// A NIC that carries nothing is handed a few pages before the rest is prepared; one that is busy gets long chains.
fn an_idle_nic_begins_early() {
    let pair = Pair::new((&["null0"], &["null0"]), 4096);
    let pages = |num: u32| PageList::new((0..num).collect(), 8, 8, 0);
    let posted = |num| {
        let before = (knob(Knob::NumPosts, None), knob(Knob::NumRequests, None));
        let options = WriteOptions { timeout: Some(LONG), ..WriteOptions::counted(1) };
        let transfer = pair.here.write_pages((&pair.region, pages(num)), (&pair.remote, pages(num)), options).unwrap();
        // Whoever has the NICs in hand at this moment posts it.
        eventually("all is posted", || knob(Knob::NumRequests, None) - before.1 == i64::from(num));
        (transfer, knob(Knob::NumPosts, None) - before.0)
    };
    pair.write(64).unwrap();
    knob(Knob::Holds, Some(1));
    // Four, 32 and the other 28; the next ones all at once.
    let (first, num_posts) = posted(64);
    assert_eq!(num_posts, 3);
    let (second, num_posts) = posted(32);
    assert_eq!(num_posts, 1);
    knob(Knob::Holds, Some(0));
    first.wait(None).unwrap();
    second.wait(None).unwrap();
}

/// A NIC reports a fault: the transfers of that rail fail, and only those; it is made again, and all goes well.
fn a_fault_ends_what_it_must_and_the_rail_comes_back() {
    let pair = Pair::new((&["null0", "null1"], &["null0", "null1"]), 4 << 20);
    for (round, (status, code)) in
        [(UNANSWERED, Code::ConnectionBroken), (REFUSED, Code::ConnectionBroken)].into_iter().enumerate()
    {
        knob(Knob::Holds, Some(1));
        let transfers: Vec<_> = (0..20).map(|_| pair.start(64)).collect();
        knob(Knob::Status, Some(status));
        knob(Knob::FailsAfter, Some(3 + round as i64));
        knob(Knob::Holds, Some(0));
        let failed: Vec<_> = transfers.iter().filter_map(|transfer| transfer.wait(None).err()).collect();
        assert!(failed.iter().any(|error| error.code == code), "{failed:?}");
        assert!((1..=10).contains(&failed.len()), "half of them went over the other rail: {}", failed.len());
        assert!(transfers.iter().all(|transfer| transfer.wait_quiesced(Some(LONG)).is_ok()));
        pair.write(64).unwrap();
        eventually("the rail is made again", || pair.state() == "ready");
        pair.write(4 << 20).unwrap();
    }
}

fn a_port_goes_down_and_up() {
    let pair = Pair::new((&["null0"], &["null1"]), 4096);
    pair.write(64).unwrap();
    // What is under way is told why, and so is what comes later.
    knob(Knob::Holds, Some(1));
    let target = |at| ScatterTarget { remote: pair.remote.clone(), src_offset: at, dst_offset: at, nbytes: 64 };
    let scattered = pair.here.scatter(&pair.region, &[target(0), target(64)], None, WriteOptions::counted(1));
    let under_way = [pair.start(64), pair.start(4096), scattered.unwrap()];
    knob(Knob::PortsDown, Some(1 << 0));
    eventually("they end", || under_way.iter().all(|transfer| transfer.error().is_some()));
    for error in under_way.map(|transfer| transfer.error().unwrap()) {
        assert!(error.to_string().contains("the port of null0 went down"), "{error}");
    }
    knob(Knob::Holds, Some(0));
    eventually("the path is degraded", || pair.state() == "degraded");
    let error = pair.write(64).unwrap_err();
    assert_eq!(error.code, Code::ConnectionBroken, "{error}");
    assert!(error.to_string().contains("null0"), "{error}");
    knob(Knob::PortsDown, Some(0));
    eventually("the path is ready", || pair.state() == "ready");
    pair.write(64).unwrap();
}

/// Of either side: no rail to it is made until it is up, and nothing fails meanwhile.
fn a_port_is_down_at_one_end() {
    let pair = Pair::new((&["null0", "null1"], &["null2", "null3"]), 4096);
    for down in [0, 2] {
        knob(Knob::PortsDown, Some(1 << down));
        eventually("the path is degraded", || pair.state() == "degraded");
        let until = Instant::now() + Duration::from_secs(1);
        while Instant::now() < until {
            assert_eq!(pair.state(), "degraded", "a rail stands, and the port of null{down} is down");
            pair.write(64).unwrap();
        }
        knob(Knob::PortsDown, Some(0));
        eventually("the path is ready", || pair.state() == "ready");
    }
}

/// Engines meet while no rail can be made: that is told, and found out when one can.
fn no_rail_stands_at_first() {
    let (here, there) = (engine(&["null0"]), engine(&["null0"]));
    knob(Knob::NoQueuePairs, Some(1));
    let error = here.connect(there.address(), Some(LONG)).unwrap_err();
    assert_eq!(error.code, Code::Unsupported, "{error}");
    assert!(error.to_string().contains("no rail could be made"), "{error}");
    // Whoever waits is told before the path is done with.
    eventually("that is its state", || here.path(there.address()).state == "degraded");
    // Asked again before it can be made, and after.
    assert_eq!(here.connect(there.address(), Some(LONG)).unwrap_err().code, Code::Unsupported);
    knob(Knob::NoQueuePairs, Some(0));
    eventually("the path is there", || here.path(there.address()).state == "ready");
    Pair::between(here, there, 4096).write(64).unwrap();
}

/// The NIC says that one request failed, and nothing of the others, ever.
fn a_device_that_flushes_nothing() {
    let pair = Pair::new((&["null0"], &["null0"]), 4096);
    knob(Knob::Holds, Some(1));
    let transfers: Vec<_> = (0..20).map(|_| pair.start(64)).collect();
    knob(Knob::Status, Some(UNANSWERED));
    knob(Knob::FailsAfter, Some(3));
    knob(Knob::FlushesNothing, Some(1));
    knob(Knob::Holds, Some(0));
    assert!(transfers.iter().all(|transfer| transfer.wait_quiesced(Some(LONG / 2)).is_ok()));
    assert!(transfers.iter().any(|transfer| transfer.wait(None).is_err()));
    knob(Knob::FlushesNothing, Some(0));
    eventually("the rail is made again", || pair.state() == "ready");
    pair.write(64).unwrap();
}

/// At the writer what is under way over that NIC fails, and at its peer counters; the others go on, and so does the NIC,
/// with another queue.
fn a_queue_that_breaks_fails_counts_that_may_lack_something() {
    let pair = Pair::new((&["null0", "null1"], &["null2", "null3"]), 4096);
    let counter = pair.there.counter(Some(1), &[]).unwrap();
    pair.write(64).unwrap();
    knob(Knob::Holds, Some(1));
    let transfers: Vec<_> = (0..20).map(|_| pair.start(64)).collect();
    knob(Knob::BreaksQueues, Some(1 << 0 | 1 << 2));
    let error = counter.wait(1, Some(LONG)).unwrap_err();
    assert_eq!(error.code, Code::TransferFailed, "{error}");
    eventually("one fails", || transfers.iter().any(|transfer| transfer.error().is_some()));
    knob(Knob::Holds, Some(0));
    let failed: Vec<_> = transfers.iter().filter_map(|transfer| transfer.wait(None).err()).collect();
    assert!(failed.len() <= 10 && failed.iter().all(|error| error.code == Code::ConnectionBroken), "{failed:?}");
    assert!(transfers.iter().all(|transfer| transfer.wait_quiesced(Some(LONG)).is_ok()));
    eventually("the rail is made again", || pair.state() == "ready");
    (0..8).for_each(|_| pair.write(64).unwrap());
}

/// Nothing completes and nothing fails, and its port is said to be up. Its other NIC goes on, and that its descriptors are
/// ready for ever keeps no core busy.
fn a_device_that_announces_its_end() {
    let pair = Pair::new((&["null4", "null5"], &["null6"]), 4096);
    pair.write(64).unwrap();
    knob(Knob::Holds, Some(1));
    let transfers: Vec<_> = (0..20).map(|_| pair.start(64)).collect();
    let began = Instant::now();
    announce(4, 0, 8);
    eventually("one fails", || transfers.iter().any(|transfer| transfer.error().is_some()));
    assert!(began.elapsed() < LONG / 4, "{:?}", began.elapsed());
    knob(Knob::Holds, Some(0));
    let failed: Vec<_> = transfers.iter().filter_map(|transfer| transfer.wait(None).err()).collect();
    assert!(failed.len() <= 10 && failed.iter().all(|error| error.code == Code::ConnectionBroken), "{failed:?}");
    assert!(transfers.iter().all(|transfer| transfer.wait_quiesced(Some(LONG)).is_ok()));
    assert_eq!(pair.state(), "degraded");
    (0..8).for_each(|_| pair.write(64).unwrap());
    remove(4);
    std::thread::sleep(Duration::from_millis(100));
    let before = knob(Knob::NumHeard, None);
    std::thread::sleep(Duration::from_millis(500));
    let looks = knob(Knob::NumHeard, None) - before;
    assert!(looks < 100, "three NICs, ten times a second: {looks}");
    pair.write(64).unwrap();
}

fn memory_that_cannot_be_registered() {
    let pair = Pair::new((&["null0"], &["null0"]), 4096);
    knob(Knob::NoMemory, Some(1));
    // The owner cannot: its peer is told.
    let error = pair.write(64).unwrap_err();
    assert_eq!(error.code, Code::Refused, "{error}");
    assert!(error.to_string().contains("cannot register the region with its NICs"), "{error}");
    // Its log says why, and about whom.
    let log = pair.there.take_log();
    let told = |(level, line): &(u8, String)| *level == 40 && line.contains("null0") && line.contains("for it: ");
    assert!(log.iter().any(|line| told(line) && line.1.contains(&pair.here.address().to_string())), "{log:?}");
    knob(Knob::NoMemory, Some(0));

    // The writer cannot.
    let pair = Pair::new((&["null0"], &["null0"]), 4096);
    pair.write(64).unwrap();
    knob(Knob::NoMemory, Some(1));
    let other = pair.here.allocate(64).unwrap();
    let (src, dst) = (other.slice(0..64).unwrap(), pair.remote.slice(0..64).unwrap());
    let write = || pair.here.write(&src, &dst, WriteOptions::default()).unwrap().wait(Some(LONG));
    let error = write().unwrap_err();
    assert_eq!(error.code, Code::ResourceExhausted, "{error}");
    assert!(error.to_string().contains("null0"), "{error}");
    knob(Knob::NoMemory, Some(0));
    // It is tried again.
    write().unwrap();
}

/// Longer than what a driver pins by itself, at both ends; in one thread, however much waits for it.
fn a_large_region_is_pinned_aside() {
    let pair = Pair::new((&["null0", "null1"], &["null0"]), 80 << 20);
    let transfers: Vec<_> = (0..4).map(|_| pair.start(80 << 20)).collect();
    transfers.iter().for_each(|transfer| transfer.wait(None).unwrap());

    let other = pair.here.allocate(80 << 20).unwrap();
    let (src, dst) = (other.slice(0..64).unwrap(), pair.remote.slice(0..64).unwrap());
    knob(Knob::PinningMs, Some(100));
    let transfers: Vec<_> = (0..200).map(|_| pair.here.write(&src, &dst, WriteOptions::default()).unwrap()).collect();
    let num_pinning = || {
        let names = std::fs::read_dir("/proc/self/task").unwrap().filter_map(|task| {
            // It may be over by now.
            std::fs::read_to_string(task.unwrap().path().join("comm")).ok()
        });
        names.filter(|name| name.trim() == "anyfabric-pin").count()
    };
    // Where the peer has said something that nobody has read, the writes wait for whoever reads it.
    eventually("one thread pins", || match num_pinning() {
        0 => false,
        seen => {
            assert_eq!(seen, 1);
            true
        }
    });
    transfers.iter().for_each(|transfer| transfer.wait(Some(LONG)).unwrap());
    knob(Knob::PinningMs, Some(0));
}

/// Two ports of one device share what it made of a region; several devices are asked at the same time.
fn memory_is_registered_once_a_device() {
    let registrations = |nics: &[&str], nbytes: u64, at_once: i64| {
        let pair = Pair::new((nics, &["null0"]), nbytes);
        let before = knob(Knob::NumMemories, None);
        knob(Knob::MostPinning, Some(0));
        knob(Knob::PinsAtOnce, Some(at_once));
        (0..8).for_each(|_| pair.write(nbytes).unwrap());
        let stats = pair.here.stats();
        let used = &stats.peers[&pair.there.address().to_string()].nics;
        assert!(used.len() == nics.len() && used.values().all(|rail| rail.bytes > 0), "{used:?}");
        knob(Knob::PinsAtOnce, Some(0));
        // One is the peer's.
        knob(Knob::NumMemories, None) - before - 1
    };
    assert_eq!(registrations(&["null8:1", "null8:2"], 1 << 20, 0), 1);
    let four = ["null0", "null8:2", "null1", "null8:1"];
    assert_eq!(registrations(&four, 1 << 20, 0), 3);
    assert_eq!(registrations(&four, 80 << 20, 3), 3);
    assert_eq!(knob(Knob::MostPinning, None), 3);
}

/// Whatever ends it; but a device that was taken away has nothing left to write with.
fn memory_that_a_nic_does_not_forget_is_not_given_back() {
    for (error, stays) in [(0, false), (libc::EBUSY, true), (libc::EIO, false)] {
        for engine_first in [false, true] {
            let pair = Pair::new((&["null0"], &["null0", "null1"]), 64);
            let owner = Arc::new([0_u64; 8]);
            let address = owner.as_ptr().cast::<u8>().cast_mut();
            // SAFETY: the owner keeps it, and nobody else looks at it.
            let region = unsafe { pair.there.register(address, 64, true, Box::new(Arc::clone(&owner))) }.unwrap();
            let remote = pair.here.import(&region.descriptor().unwrap().encode()).unwrap();
            let written = pair.here.write(&(&pair.region).into(), &(&remote).into(), WriteOptions::default());
            written.unwrap().wait(Some(LONG)).unwrap();
            knob(Knob::KeepsMemory, Some(error.into()));
            if engine_first {
                pair.there.close(LONG);
            } else {
                region.close(LONG);
            }
            drop((region, pair));
            assert_eq!(Arc::strong_count(&owner), if stays { 2 } else { 1 }, "error {error}, engine {engine_first}");
            knob(Knob::KeepsMemory, Some(0));
        }
    }
}

/// What it carries fails and does not quiesce; the memory of both ends stays until their engines do.
fn a_rail_that_no_nic_stops() {
    for (error, is_stuck) in [(0, false), (libc::EIO, false), (libc::EBUSY, true)] {
        let pair = Pair::new((&["null0"], &["null0"]), 1 << 20);
        let counter = pair.there.counter(Some(1), &[]).unwrap();
        let owner = Arc::new(vec![0_u64; 1 << 17]);
        let address = owner.as_ptr().cast::<u8>().cast_mut();
        // SAFETY: the owner keeps it, and nobody else looks at it.
        let source = unsafe { pair.here.register(address, 1 << 20, false, Box::new(Arc::clone(&owner))) }.unwrap();
        let options = || WriteOptions { timeout: Some(LONG), ..WriteOptions::counted(1) };
        let start = |nbytes| {
            let (src, dst) = (source.slice(0..nbytes).unwrap(), pair.remote.slice(0..nbytes).unwrap());
            pair.here.write(&src, &dst, options()).unwrap()
        };
        start(64).wait(None).unwrap();
        knob(Knob::Holds, Some(1));
        let target = |at| ScatterTarget { remote: pair.remote.clone(), src_offset: at, dst_offset: at, nbytes: 64 };
        let scattered = pair.here.scatter(&source, &[target(0), target(64)], None, options());
        let transfers = [start(64), start(1 << 20), scattered.unwrap()];
        knob(Knob::IsGone, Some(1));
        knob(Knob::KeepsQueuePairs, Some(error.into()));
        // The writer does not answer, for it has something under way.
        let revoked = pair.theirs.revoke(None, Duration::from_millis(200));
        assert_eq!(revoked.map_err(|error| error.code), if is_stuck { Err(Code::WaitTimeout) } else { Ok(()) });
        for transfer in &transfers {
            let failed = transfer.wait(Some(LONG)).unwrap_err();
            assert!(matches!(failed.code, Code::ConnectionBroken | Code::Refused), "{failed}");
            let patience = if is_stuck { Duration::from_millis(50) } else { LONG };
            assert_eq!(transfer.wait_quiesced(Some(patience)).is_err(), is_stuck, "error {error}");
        }
        assert_eq!(counter.wait(1, Some(LONG)).unwrap_err().code, Code::TransferFailed);
        for it in [Knob::IsGone, Knob::KeepsQueuePairs, Knob::Holds] {
            knob(it, Some(0));
        }
        eventually("the rail is made again", || pair.state() == "ready");
        let (here, there) = (pair.here.allocate(64).unwrap(), pair.there.allocate(64).unwrap());
        let remote = pair.here.import(&there.descriptor().unwrap().encode()).unwrap();
        pair.here.write(&(&here).into(), &(&remote).into(), options()).unwrap().wait(None).unwrap();
        drop(transfers);
        source.close(Duration::from_millis(50));
        drop(source);
        assert_eq!(Arc::strong_count(&owner) > 1, is_stuck, "error {error}");
        // That the peer is gone says nothing of what its NIC was told.
        pair.here.close(LONG);
        let revoked = pair.theirs.revoke(None, Duration::from_millis(50));
        assert_eq!(revoked.is_err(), is_stuck, "error {error}");
        drop((here, there, remote, pair));
        eventually("the memory goes with its engines", || Arc::strong_count(&owner) == 1);
    }
}

fn a_peer_with_other_transports_only() {
    let here = engine(&["null0"]);
    let there = Engine::new(Config { transports: vec!["tcp".into()], ..Config::default() }).unwrap();
    let error = here.connect(there.address(), Some(LONG)).unwrap_err();
    assert_eq!(error.code, Code::Unsupported, "{error}");
    let text = error.to_string();
    assert!(text.contains(r#"here ["verbs"]"#) && text.contains(r#"there ["tcp"]"#), "{text}");
}

/// What it waits for is registered without the NICs in hand: more targets than can be left for later all end.
fn a_scatter_from_memory_that_no_nic_knows() {
    let pair = Pair::new((&["null0", "null1"], &["null0"]), 1 << 16);
    pair.write(64).unwrap();
    let fresh = pair.here.allocate(1 << 16).unwrap();
    let target = |at| ScatterTarget { remote: pair.remote.clone(), src_offset: at, dst_offset: at, nbytes: 64 };
    let targets: Vec<_> = (0..1000).map(|idx| target(idx * 64)).collect();
    let before = knob(Knob::NumRequests, None);
    pair.here.scatter(&fresh, &targets, None, WriteOptions::counted(1)).unwrap().wait(Some(LONG)).unwrap();
    assert_eq!(knob(Knob::NumRequests, None) - before, 1000);
}

/// Who waits without an end and never blocks has the driver all the time.
fn an_end_while_somebody_waits_busily() {
    let busy = Engine::new(Config { polling: Polling::Busy, ..config(&["null0"]) }).unwrap();
    let pair = Pair::between(busy, engine(&["null0"]), 64);
    let never = pair.here.counter(Some(2), &[]).unwrap();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| never.wait(1, None));
        // Somebody drives it.
        let went: Result<Vec<()>> = (0..100).map(|_| pair.write(64)).collect();
        pair.here.close(Duration::from_millis(1));
        assert_eq!(waits.join().unwrap().unwrap_err().code, Code::Closed);
        went.unwrap();
    });
}
