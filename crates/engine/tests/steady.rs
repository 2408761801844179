//! What an operation asks of the process once things are running: no memory, and no lock.
//!
//! Whole operations through the public calls, over libraries without hardware: submitted, posted, completed, counted at
//! the peer, waited for. Every allocation and every lock of the process is counted, whichever thread it is of.

// What the benchmarks share is more than is used here; locks are counted in debug builds; a panic is the report.
#![cfg(debug_assertions)]
#![allow(dead_code, unused_imports, unused_macros, clippy::unwrap_used)]

mod fabrics;
#[path = "../../transports/tests/libfabric/fake.rs"]
mod fake;
#[path = "../../transports/tests/null_nic/mod.rs"]
mod null_nic;
#[path = "../../transports/tests/libfabric/support.rs"]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyfabric_engine::transports::num_locks;
use anyfabric_engine::{
    Address, Config, Counter, Engine, PageList, Region, Remote, ScatterTarget, Transfer, WriteOptions,
};
use fabrics::{Fabric, Libfabric, Verbs};
use null_nic::{knob, Knob};

/// One test, for what it counts is the process's.
#[test]
fn operations_neither_allocate_nor_lock() {
    // `cargo bench` calls the library alone, too.
    assert!(Verbs::new().library_ns(3) > 0.0);
    knob(Knob::Delivers, Some(1));
    steady(&Verbs::new());
    steady(&Verbs::with(8));
    if let Some(libfabric) = Libfabric::delivering() {
        steady(&libfabric);
    }
}

fn steady(fabric: &impl Fabric) {
    let here = engine(fabric);
    let region = here.allocate(1 << 20).unwrap();
    let peers: Vec<Peer> = (0..PEERS).map(|_| Peer::new(fabric, &here)).collect();
    // Each peer is sent one heartbeat when it is new.
    std::thread::sleep(Duration::from_millis(500));
    let first = &peers[0];
    let is_counted = |transfer: Transfer, peers: &[Peer], count: u64| {
        transfer.wait(LONG).unwrap();
        peers.iter().for_each(|peer| peer.expect(count));
    };
    let counted = || WriteOptions::counted(IMM);

    let (src, dst) = (region.slice(0..64).unwrap(), first.remote.slice(0..64).unwrap());
    let once = || is_counted(here.write(&src, &dst, counted()).unwrap(), &peers[..1], 1);
    check(fabric, "a write", 1, once);
    check(fabric, "a write without a count", 1, || {
        here.write(&src, &dst, WriteOptions::default()).unwrap().wait(LONG).unwrap()
    });

    let mut under_way = Vec::with_capacity(32);
    check(fabric, "32 writes under way", 32, || {
        under_way.extend((0..32).map(|_| here.write(&src, &dst, counted()).unwrap()));
        under_way.drain(..).for_each(|transfer| transfer.wait(LONG).unwrap());
        first.expect(32);
    });

    let (src, dst) = (region.slice(0..1 << 20).unwrap(), first.remote.slice(0..1 << 20).unwrap());
    check(fabric, "a large write", 4, || {
        is_counted(here.write(&src, &dst, counted()).unwrap(), &peers[..1], 1);
    });

    let list = |num_pages: u32| PageList::new((0..num_pages).rev().collect(), 128, 256, 0);
    for num_pages in [4, 200] {
        let pages = list(num_pages);
        check(fabric, &format!("{num_pages} pages"), u64::from(num_pages) / 4, || {
            let dst = (&first.remote, pages.clone());
            is_counted(
                here.write_pages((&region, pages.clone()), dst, counted()).unwrap(),
                &peers[..1],
                num_pages.into(),
            );
        });
    }

    let targets: Vec<_> = peers.iter().map(Peer::target).collect();
    check(fabric, "a scatter", PEERS as u64, || {
        is_counted(here.scatter(&region, &targets, None, counted()).unwrap(), &peers, 1);
    });

    let addresses: Vec<Address> = peers.iter().map(|peer| peer.engine.address().clone()).collect();
    check(fabric, "a barrier", PEERS as u64, || {
        is_counted(here.barrier(&addresses, IMM, None).unwrap(), &peers, 1);
    });
}

/// Runs an operation until whatever grows with the first ones has grown, then counts. Timers go on meanwhile, with
/// locks of their own, and a thread that is late may want one more of what is used again and again. So what counts is
/// the quietest of many short batches, for what every operation takes is in each; and in all there is little.
/// On a machine so busy that timers go off in every batch, shorter ones are taken. There a worker may also have taken
/// over from the thread that waits, which then sleeps in every operation, and sleeping takes locks: after a pause the
/// worker sleeps as well, and it is tried anew.
fn check(fabric: &impl Fabric, what: &str, num_operations: u64, mut operation: impl FnMut()) {
    (0..WARM_UP).for_each(|_| operation());
    let mut batch = (BATCH / num_operations).max(SHORTEST_BATCH);
    let counts = || [ALLOCATIONS.load(Ordering::SeqCst), num_locks().0, num_locks().1];
    let mut quietest = |batch: u64| {
        let mut fewest = [u64::MAX; 3];
        for _ in 0..BATCHES {
            let before = counts();
            (0..batch).for_each(|_| operation());
            let after = counts();
            (0..3).for_each(|idx| fewest[idx] = fewest[idx].min(after[idx] - before[idx]));
        }
        fewest
    };
    let (began, began_at, mut num_done) = (counts(), Instant::now(), 0);
    let [allocated, taken, tried] = loop {
        let fewest = quietest(batch);
        num_done += BATCHES * batch;
        if fewest[..2] == [0, 0] || batch == SHORTEST_BATCH && began_at.elapsed() > PATIENCE {
            break fewest;
        }
        if batch == SHORTEST_BATCH {
            std::thread::sleep(PAUSE);
        }
        batch = (batch / 2).max(SHORTEST_BATCH);
    };
    let (in_all, tried) = (counts()[0] - began[0], tried as f64 / batch as f64);
    println!("{}: {what}: {allocated} allocations ({in_all} in all), {taken} locks, {tried} attempts", fabric.name());
    assert_eq!(allocated, 0, "{}: {what} allocates", fabric.name());
    assert_eq!(taken, 0, "{}: {what} takes locks", fabric.name());
    assert!(tried <= (TRIES * num_operations) as f64, "{}: {what} tries for {tried} locks", fabric.name());
    assert!(in_all <= num_done * num_operations / 10, "{}: {what} allocates {in_all} times", fabric.name());
}

fn engine(fabric: &impl Fabric) -> Engine {
    // Heartbeats are messages, which allocate, and no part of an operation.
    Engine::new(Config { heartbeat: Duration::from_secs(3600), ..fabric.config() }).unwrap()
}

struct Peer {
    engine: Engine,
    remote: Remote,
    counter: Counter,
    seen: AtomicU64,
    // Dropped after everything that was written into it.
    _region: Region,
}

impl Peer {
    fn new(fabric: &impl Fabric, here: &Engine) -> Self {
        let engine = engine(fabric);
        let region = engine.allocate(1 << 20).unwrap();
        let remote = here.import(&region.descriptor().unwrap().encode()).unwrap();
        here.connect(engine.address(), LONG).unwrap();
        assert_eq!(here.path(engine.address()).transport, fabric.name());
        let counter = engine.counter(Some(IMM), &[]).unwrap();
        Self { engine, remote, counter, seen: AtomicU64::new(0), _region: region }
    }

    /// So many more arrivals are counted.
    fn expect(&self, count: u64) {
        let seen = self.seen.fetch_add(count, Ordering::Relaxed) + count;
        self.counter.wait(seen, LONG).unwrap();
        assert_eq!(self.counter.value(), seen);
    }

    fn target(&self) -> ScatterTarget {
        ScatterTarget { remote: self.remote.clone(), src_offset: 0, dst_offset: 0, nbytes: 64 }
    }
}

struct Counting;

// SAFETY: everything is the system allocator's; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
const IMM: u32 = 7;
const PEERS: usize = 5;
const WARM_UP: u64 = 200;
const BATCHES: u64 = 100;
const BATCH: u64 = 50;
const SHORTEST_BATCH: u64 = 2;
/// How long a quiet batch is waited for, and how long the machine is left alone in between.
const PATIENCE: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(100);
/// Attempts for an operation and its arrival: to have the NICs when it is submitted, the driver when somebody waits, and
/// the NICs in each turn of that.
const TRIES: u64 = 16;
const LONG: Option<Duration> = Some(Duration::from_secs(60));
