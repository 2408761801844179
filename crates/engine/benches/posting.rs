//! What our own code costs for a work request: the public call, the path to the NIC, its completion and the end of the
//! transfer, over libraries without hardware that copy each request into a 64-byte descriptor. Never a NIC's rate.
//!
//! `cargo bench -p anyfabric-engine --bench posting [-- [--rounds N] [LIBRARY/ROW...]]`; one JSON line a row:
//!
//! - `post_ns`: from the call until it returns, for each request. A call posts all that the NIC takes.
//! - `whole_ns`: from the call until the transfer was waited for, for each request.
//! - `first_post_ns`: from the call until the library is handed the first request.
//! - `library_ns`: what a request takes in the library alone, called from C, for as many peers in turn as the row has; of
//!   libfabric with its completion.
//!
//! With `--count` nothing is timed: all calls are made in `counted`, whose cost callgrind writes down
//! (`--zero-before=posting::counted --dump-after=posting::counted`), and the line says how many requests these were.

// What the tests share is more than is used here; a panic is the report.
#![allow(dead_code, unused_imports, unused_macros, clippy::unwrap_used)]

#[path = "../tests/fabrics/mod.rs"]
mod fabrics;
#[path = "../../transports/tests/libfabric/fake.rs"]
mod fake;
#[path = "../../transports/tests/null_nic/mod.rs"]
mod null_nic;
#[path = "../../transports/tests/libfabric/support.rs"]
mod support;

use std::time::Instant;

use anyfabric_engine::{Address, Engine, PageList, Region, Remote, ScatterTarget, Transfer, WriteOptions};
use fabrics::{Fabric, Libfabric, Verbs};

fn main() {
    let (mut rounds, mut counts, mut wanted) = (200, false, Vec::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--rounds" => rounds = arguments.next().unwrap().parse().unwrap(),
            "--count" => counts = true,
            // From cargo.
            "--bench" => {}
            _ => wanted.push(argument),
        }
    }
    run(&Verbs::new(), (rounds, counts), &wanted);
    if let Some(libfabric) = Libfabric::new() {
        run(&libfabric, (rounds, counts), &wanted);
    }
}

fn run(fabric: &impl Fabric, (rounds, counts): (usize, bool), wanted: &[String]) {
    let is_wanted = |row: &str| wanted.is_empty() || wanted.iter().any(|it| *it == format!("{}/{row}", fabric.name()));
    if !ROWS.iter().any(|row| is_wanted(row)) {
        return;
    }
    let here = fabric.engine();
    let region = here.allocate(u64::from(PAGES) * PAGE).unwrap();
    let peers: Vec<Peer> = (0..PEERS).map(|_| Peer::new(fabric, &here)).collect();
    let bench = Bench { fabric, rounds, counts, read_ns: clock_ns() };

    let row = "write";
    if is_wanted(row) {
        let (src, dst) = (region.slice(0..PAGE).unwrap(), peers[0].remote.slice(0..PAGE).unwrap());
        bench.row((row, 1), 256, |idx| here.write(&src, &dst, imm(idx)).unwrap());
    }
    let random = shuffled(PAGES);
    for num_pages in [4, 64, PAGES] {
        let row = format!("write_pages_{num_pages}");
        if is_wanted(&row) {
            // Made once: what a caller does to describe its pages is the caller's.
            let list = PageList::new(random[..num_pages as usize].into(), PAGE, PAGE, 0);
            bench.row((&row, 1), (PAGES / num_pages).min(256) as usize, |idx| {
                let dst = (&peers[0].remote, list.clone());
                here.write_pages((&region, list.clone()), dst, imm(idx)).unwrap()
            });
        }
    }
    let row = "scatter_63";
    if is_wanted(row) {
        let targets: Vec<_> = peers.iter().map(Peer::target).collect();
        bench.row((row, PEERS), 16, |idx| here.scatter(&region, &targets, None, imm(idx)).unwrap());
    }
    let row = "barrier_63";
    if is_wanted(row) {
        let addresses: Vec<Address> = peers.iter().map(|peer| peer.engine.address().clone()).collect();
        bench.row((row, PEERS), 16, |idx| here.barrier(&addresses, imm(idx).imm.unwrap(), None).unwrap());
    }
}

struct Bench<'f, F> {
    fabric: &'f F,
    rounds: usize,
    counts: bool,
    /// What reading the clock adds to what is measured with it.
    read_ns: f64,
}

impl<F: Fabric> Bench<'_, F> {
    /// Runs `num_calls` calls, each to so many peers, in each of the rounds, one after
    /// the other, and prints the medians over the rounds.
    fn row(&self, (row, num_peers): (&str, usize), num_calls: usize, call: impl Fn(usize) -> Transfer) {
        if self.counts {
            return self.count(row, num_calls, &call);
        }
        let warm_up = self.rounds / 10 + 1;
        let (mut post, mut whole, mut first) = (Vec::new(), Vec::new(), Vec::new());
        let (mut num_requests, in_all) = (0, self.fabric.num_requests());
        for round in 0..self.rounds + warm_up {
            let before = self.fabric.num_requests();
            let (mut posting_ns, began) = (0.0, Instant::now());
            for idx in 0..num_calls {
                let called = Instant::now();
                let transfer = call(idx);
                posting_ns += called.elapsed().as_nanos() as f64 - self.read_ns;
                transfer.wait(None).unwrap();
            }
            let whole_ns = began.elapsed().as_nanos() as f64 - 2.0 * self.read_ns * num_calls as f64;
            num_requests = self.fabric.num_requests() - before;
            if round >= warm_up {
                post.push(posting_ns / num_requests as f64);
                whole.push(whole_ns / num_requests as f64);
            }
            // Apart, for the library reads the clock too.
            let calls: Vec<f64> = (0..num_calls).map(|idx| self.first_post_ns(|| call(idx))).collect();
            if round >= warm_up {
                first.push(median(calls));
            }
        }
        println!(
            "{{\"library\": \"{}\", \"row\": \"{row}\", \"requests_a_call\": {}, \"post_ns\": {:.1}, \"whole_ns\": {:.1}, \
             \"first_post_ns\": {:.1}, \"library_ns\": {:.1}, \"requests\": {}, \"calls\": {num_calls}, \"rounds\": {}}}",
            self.fabric.name(),
            num_requests as usize / num_calls,
            median(post),
            median(whole),
            median(first),
            self.fabric.library_ns(num_peers),
            self.fabric.num_requests() - in_all,
            self.rounds
        );
    }

    fn count(&self, row: &str, num_calls: usize, call: &dyn Fn(usize) -> Transfer) {
        calls(COUNT_WARM_UP * num_calls, call);
        let before = self.fabric.num_requests();
        counted(self.rounds * num_calls, call);
        let num_requests = self.fabric.num_requests() - before;
        println!("{{\"library\": \"{}\", \"row\": \"{row}\", \"requests\": {num_requests}}}", self.fabric.name());
    }

    fn first_post_ns(&self, call: impl FnOnce() -> Transfer) -> f64 {
        self.fabric.forget_post();
        let began_ns = monotonic_ns();
        let transfer = call();
        let posted_ns = self.fabric.posted_ns();
        transfer.wait(None).unwrap();
        posted_ns as f64 - began_ns as f64 - self.read_ns
    }
}

/// While this runs instructions are counted, of all threads.
#[inline(never)]
fn counted(num_calls: usize, call: &dyn Fn(usize) -> Transfer) {
    calls(num_calls, call);
}

fn calls(num_calls: usize, call: &dyn Fn(usize) -> Transfer) {
    (0..num_calls).for_each(|idx| call(idx).wait(None).unwrap());
}

struct Peer {
    engine: Engine,
    remote: Remote,
    // Dropped after everything that was written into it.
    _region: Region,
}

impl Peer {
    fn new(fabric: &impl Fabric, here: &Engine) -> Self {
        let engine = fabric.engine();
        let region = engine.allocate(u64::from(PAGES) * PAGE).unwrap();
        let remote = here.import(&region.descriptor().unwrap().encode()).unwrap();
        here.connect(engine.address(), None).unwrap();
        assert_eq!(here.path(engine.address()).transport, fabric.name());
        Self { engine, remote, _region: region }
    }

    fn target(&self) -> ScatterTarget {
        ScatterTarget { remote: self.remote.clone(), src_offset: 0, dst_offset: 0, nbytes: PAGE }
    }
}

fn imm(idx: usize) -> WriteOptions {
    WriteOptions::counted(1 + idx as u32 % 100)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is ours; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// What one reading of the clock costs.
fn clock_ns() -> f64 {
    let reads = || {
        let began = Instant::now();
        (0..1000).for_each(|_| _ = std::hint::black_box(Instant::now()));
        began.elapsed().as_nanos() as f64 / 1000.0
    };
    median((0..101).map(|_| reads()).collect())
}

fn shuffled(num: u32) -> Vec<u32> {
    let mut indices: Vec<u32> = (0..num).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for at in (1..indices.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        indices.swap(at, (state >> 33) as usize % (at + 1));
    }
    indices
}

/// Rounds before anything is counted.
const COUNT_WARM_UP: usize = 4;
const PAGE: u64 = 1024;
const PAGES: u32 = 4096;
const PEERS: usize = 63;
const ROWS: [&str; 6] = ["write", "write_pages_4", "write_pages_64", "write_pages_4096", "scatter_63", "barrier_63"];
