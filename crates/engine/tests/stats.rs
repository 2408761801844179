//! What statistics say of a user's operations: the same on every transport, however many NICs carry them.
//!
//! Engines of one process, over every transport that needs no hardware. Nothing is waited for but the operations
//! themselves: whoever knows that one has ended finds it in the statistics.

// What benchmarks and tests share is more than is used here; a panic is the report.
#![allow(dead_code, unused_imports, unused_macros, clippy::unwrap_used)]

mod fabrics;
#[path = "../../transports/tests/libfabric/fake.rs"]
mod fake;
#[path = "../../transports/tests/null_nic/mod.rs"]
mod null_nic;
#[path = "../../transports/tests/libfabric/support.rs"]
mod support;

use std::time::{Duration, Instant};

use anyfabric_engine::transports::loopback::{Fabric as SimulatedFabric, Simulation};
use anyfabric_engine::{
    Code, Config, Engine, Operation, PageList, PeerUse, Region, Remote, ScatterTarget, Transfer, WriteOptions,
};
use fabrics::{Fabric, Libfabric, Verbs};
use null_nic::{knob, Knob};

#[test]
fn over_shared_memory() {
    let shm = || Engine::new(Config { transports: vec!["shm".into()], ..Config::default() }).unwrap();
    check(&Case::new("shm", &shm));
    check(&Case { is_foreign: true, ..Case::new("shm, foreign memory", &shm) });
    let config = || Config { transports: vec!["shm".into()], isolate: true, ..Config::default() };
    let isolated = || Engine::new(config()).unwrap();
    check(&Case { is_foreign: true, ..Case::new("shm, isolated", &isolated) });
}

#[test]
fn over_streams() {
    for tcp_streams in [1, 2, 4] {
        let config = || Config { transports: vec!["tcp".into()], tcp_streams, ..Config::default() };
        let tcp = || Engine::new(config()).unwrap();
        check(&Case { num_nics: tcp_streams, ..Case::new(&format!("tcp, {tcp_streams} streams"), &tcp) });
    }
}

#[test]
fn in_a_simulation() {
    for (seed, num_nics) in [(1, 1), (2, 3), (3, 4)] {
        let simulation = Simulation::new(seed, SimulatedFabric::default());
        let speeds = vec![100; num_nics];
        let simulated = || Engine::simulated(&simulation, Config::default(), &speeds).unwrap();
        check(&Case { num_nics, ..Case::new(&format!("loopback, {num_nics} NICs"), &simulated) });
    }
}

/// One test, for the null NIC's knobs are the process's.
#[test]
fn over_libraries_without_hardware() {
    let verbs = Verbs::new();
    knob(Knob::Delivers, Some(1));
    let names = ["null0", "null1", "null2", "null3"];
    for num_nics in [1, 2, 4] {
        let nics = || names[..num_nics].iter().map(|name| (*name).to_owned()).collect();
        let engine = || Engine::new(Config { nics: nics(), ..verbs.config() }).unwrap();
        // It carries no messages.
        let case = Case { num_nics, sends: false, ..Case::new(&format!("verbs, {num_nics} NICs"), &engine) };
        check(&case);
    }
    if let Some(libfabric) = Libfabric::delivering() {
        check(&Case::new("libfabric", &|| libfabric.engine()));
    }
}

struct Case<'a> {
    name: String,
    engine: &'a dyn Fn() -> Engine,
    is_foreign: bool,
    sends: bool,
    num_nics: usize,
}

impl<'a> Case<'a> {
    fn new(name: &str, engine: &'a dyn Fn() -> Engine) -> Self {
        Self { name: name.to_owned(), engine, is_foreign: false, sends: true, num_nics: 1 }
    }

    fn region(&self, engine: &Engine, nbytes: u64) -> Region {
        if !self.is_foreign {
            return engine.allocate(nbytes).unwrap();
        }
        let mut owner = vec![0_u8; nbytes as usize].into_boxed_slice();
        let address = owner.as_mut_ptr();
        // SAFETY: the box is the region's owner and is not touched but through the region.
        unsafe { engine.register(address, nbytes, true, Box::new(owner)) }.unwrap()
    }
}

/// An engine, and two peers with a region each.
struct World {
    here: Engine,
    peers: [Engine; 2],
    source: Region,
    regions: [Region; 2],
    remotes: [Remote; 2],
}

impl World {
    fn new(case: &Case<'_>) -> Self {
        let (here, peers) = ((case.engine)(), [(); 2].map(|()| (case.engine)()));
        let source = case.region(&here, LARGE);
        let regions = [0, 1].map(|idx| case.region(&peers[idx], LARGE));
        let remotes = [0, 1].map(|idx| Remote::from(regions[idx].descriptor().unwrap()));
        let world = Self { here, peers, source, regions, remotes };
        for (idx, peer) in world.peers.iter().enumerate() {
            world.here.connect(peer.address(), LONG).unwrap();
            assert_eq!(world.seen(idx), (0, 0, 0), "{}: to connect is no operation", case.name);
        }
        world
    }

    fn stats(&self, peer: usize) -> PeerUse {
        self.here.stats().peers.remove(&self.peers[peer].address().to_string()).unwrap()
    }

    /// Operations, errors and bytes.
    fn seen(&self, peer: usize) -> (u64, u64, u64) {
        let PeerUse { operations, errors, bytes, .. } = self.stats(peer);
        (operations, errors, bytes)
    }

    fn write(&self, nbytes: u64, options: WriteOptions) -> Transfer {
        let (src, dst) = (self.source.slice(0..nbytes).unwrap(), self.remotes[0].slice(0..nbytes).unwrap());
        self.here.write(&src, &dst, options).unwrap()
    }

    fn scatter(&self, targets: &[(&Remote, u64)]) -> Transfer {
        let target = |(remote, nbytes): &(&Remote, u64)| ScatterTarget {
            remote: (*remote).clone(),
            src_offset: 0,
            dst_offset: 0,
            nbytes: *nbytes,
        };
        let targets: Vec<_> = targets.iter().map(target).collect();
        self.here.scatter(&self.source, &targets, None, WriteOptions::counted(1)).unwrap()
    }
}

fn check(case: &Case<'_>) {
    let world = World::new(case);
    every_operation_counts_once(case, &world);
    refusals_are_errors(case, &world);
    what_was_cancelled_is_what_failed(case, &world);
    // Nothing of it came late.
    let PeerUse { operations, errors, latency_us, .. } = world.stats(0);
    assert!(latency_us.count > 0 && latency_us.count <= operations - errors, "{}: {latency_us:?}", case.name);
}

fn every_operation_counts_once(case: &Case<'_>, world: &World) {
    let World { here, remotes: [first, second], .. } = world;
    let pages = || PageList::new((0..1000).rev().collect(), 4096, 4096, 0);
    let addresses = [0, 1, 0].map(|idx: usize| world.peers[idx].address().clone());
    let watcher = here.watch().unwrap();
    let fire = || {
        let (src, dst) = (world.source.slice(0..64).unwrap(), first.slice(0..64).unwrap());
        let transfer = watcher.at(1, Operation::Write { src, dst }, Some(1)).unwrap();
        watcher.set(1).unwrap();
        transfer
    };
    let send = || here.send(world.peers[0].address(), vec![1; 100], None).unwrap();
    // What, how it is done, and the bytes for either peer.
    type Step<'s> = (&'s str, &'s dyn Fn() -> Transfer, [Option<u64>; 2]);
    let steps: [Step<'_>; 9] = [
        ("a large write", &|| world.write(LARGE, WriteOptions::counted(1)), [Some(LARGE), None]),
        ("a small write", &|| world.write(64, WriteOptions::default()), [Some(64), None]),
        ("nothing, counted", &|| world.write(0, WriteOptions::counted(1)), [Some(0), None]),
        (
            "a write with a checksum",
            &|| world.write(64, WriteOptions { verify: true, ..WriteOptions::counted(1) }),
            [Some(64), None],
        ),
        (
            "pages",
            &|| here.write_pages((&world.source, pages()), (first, pages()), WriteOptions::counted(1)).unwrap(),
            [Some(1000 * 4096), None],
        ),
        (
            "a scatter",
            &|| world.scatter(&[(first, 100), (second, 8), (first, 1000), (second, 0), (first, 10)]),
            [Some(1110), Some(8)],
        ),
        ("a scatter without targets", &|| world.scatter(&[]), [None, None]),
        ("a barrier", &|| here.barrier(&addresses, 1, None).unwrap(), [Some(0), Some(0)]),
        ("what a watcher fires", &fire, [Some(64), None]),
    ];
    let messages: [Step<'_>; 1] = [("a message", &send, [Some(100), None])];
    for (what, operate, bytes) in steps.iter().chain(messages.iter().filter(|_| case.sends)) {
        // The first finds streams and keys on their way.
        for round in 0..3 {
            let before = [0, 1].map(|idx| world.seen(idx));
            operate().wait(LONG).unwrap();
            for idx in [0, 1] {
                let ((operations, errors, sum), after) = (before[idx], world.seen(idx));
                let expected = (operations + u64::from(bytes[idx].is_some()), errors, sum + bytes[idx].unwrap_or(0));
                assert_eq!(after, expected, "{}: {what}, round {round}, peer {idx}", case.name);
            }
        }
    }
    parts_are_the_nics(case, world);
}

/// Once every NIC is there a large write is one operation, and a part on each.
fn parts_are_the_nics(case: &Case<'_>, world: &World) {
    let parts = || -> u64 { world.stats(0).nics.values().map(|nic| nic.parts).sum() };
    let until = Instant::now() + LONG.unwrap();
    loop {
        let (before, (operations, ..)) = (parts(), world.seen(0));
        world.write(LARGE, WriteOptions::counted(1)).wait(LONG).unwrap();
        assert_eq!(world.seen(0).0, operations + 1, "{}", case.name);
        if parts() - before == case.num_nics as u64 {
            return;
        }
        assert!(Instant::now() < until, "{}: {} parts", case.name, parts() - before);
    }
}

fn refusals_are_errors(case: &Case<'_>, world: &World) {
    let region = case.region(&world.peers[0], 4096);
    let gone = Remote::from(region.descriptor().unwrap());
    let write = |nbytes: u64| {
        let (src, dst) = (world.source.slice(0..nbytes).unwrap(), gone.slice(0..nbytes).unwrap());
        world.here.write(&src, &dst, WriteOptions::counted(1)).unwrap()
    };
    write(64).wait(LONG).unwrap();
    region.close(LONG.unwrap());
    let (operations, errors, bytes) = world.seen(0);
    for round in 1..=3 {
        assert_eq!(write(64).wait(LONG).unwrap_err().code, Code::Refused, "{}", case.name);
        assert_eq!(world.seen(0), (operations + round, errors + round, bytes), "{}", case.name);
    }
    // Of a scatter that failed nobody got all that he was to get.
    let elsewhere = world.seen(1);
    let scatter = world.scatter(&[(&gone, 64), (&world.remotes[1], 64), (&world.remotes[0], 64)]);
    assert_eq!(scatter.wait(LONG).unwrap_err().code, Code::Refused, "{}", case.name);
    scatter.wait_quiesced(LONG).unwrap();
    assert_eq!(world.seen(0), (operations + 4, errors + 4, bytes), "{}", case.name);
    assert_eq!(world.seen(1), (elsewhere.0 + 1, elsewhere.1 + 1, elsewhere.2), "{}", case.name);
}

/// Whichever way it ends when it is cancelled on its way, the statistics say the same as the transfer.
fn what_was_cancelled_is_what_failed(case: &Case<'_>, world: &World) {
    for (round, nbytes) in [64, LARGE].into_iter().cycle().take(40).enumerate() {
        let (operations, errors, bytes) = world.seen(0);
        let transfer = world.write(nbytes, WriteOptions::counted(1));
        (0..round % 4).for_each(|_| drop(transfer.wait(Some(Duration::from_micros(20)))));
        transfer.cancel();
        let expected = match transfer.wait(LONG) {
            Err(error) => {
                assert_eq!(error.code, Code::Cancelled, "{}", case.name);
                (operations + 1, errors + 1, bytes)
            }
            Ok(()) => (operations + 1, errors, bytes + nbytes),
        };
        assert_eq!(world.seen(0), expected, "{}: round {round}", case.name);
        transfer.wait_quiesced(LONG).unwrap();
        assert_eq!(world.seen(0), expected, "{}: round {round}", case.name);
    }
}

const LARGE: u64 = 8 << 20;
const LONG: Option<Duration> = Some(Duration::from_secs(60));
