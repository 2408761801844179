//! What our own code costs for a work request: the public call, the path to the NIC, its completion and the end of the
//! transfer, over a libibverbs without hardware that copies each request into a 64-byte descriptor. Never a NIC's rate.
//!
//! `cargo run --release -p anyfabric-engine --example bench_posting [-- ROUNDS]`; one JSON line a row.

// A benchmark may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "../../transports/tests/null_nic/mod.rs"]
mod null_nic;

use std::time::Instant;

use anyfabric_engine::transports::verbs::VerbsSettings;
use anyfabric_engine::{Address, Config, Engine, PageList, Region, Remote, ScatterTarget, WriteOptions};
use null_nic::{knob, library, Knob};

const PAGE: u64 = 1024;
const PAGES: u32 = 4096;

fn main() {
    let rounds: usize = std::env::args().nth(1).map_or(200, |rounds| rounds.parse().unwrap());
    let here = engine();
    let region = here.allocate(u64::from(PAGES) * PAGE).unwrap();
    let peers: Vec<Peer> = (0..63).map(|_| Peer::new(&here)).collect();

    let imm = |idx: usize| WriteOptions::counted(1 + idx as u32 % 100);
    let random = shuffled(PAGES);
    for num_pages in [PAGES, 64, 4] {
        let list = || PageList::new(random[..num_pages as usize].into(), PAGE, PAGE, 0);
        let calls = (PAGES / num_pages) as usize;
        row(&format!("write_pages of {num_pages}"), rounds, calls, |idx| {
            let dst = (&peers[0].remote, list());
            here.write_pages((&region, list()), dst, imm(idx)).unwrap().wait(None).unwrap();
        });
    }
    let src = region.slice(0..PAGE).unwrap();
    let dst = peers[0].remote.slice(0..PAGE).unwrap();
    row("write, one at a time", rounds, 256, |idx| {
        here.write(&src, &dst, imm(idx)).unwrap().wait(None).unwrap();
    });
    row("write, 64 under way", rounds, 8, |idx| {
        let transfers: Vec<_> = (0..64).map(|_| here.write(&src, &dst, imm(idx)).unwrap()).collect();
        transfers.iter().for_each(|transfer| transfer.wait(None).unwrap());
    });
    let targets: Vec<_> = peers.iter().map(Peer::target).collect();
    row("scatter to 63 peers", rounds, 16, |idx| {
        here.scatter(&region, &targets, None, imm(idx)).unwrap().wait(None).unwrap();
    });
    let addresses: Vec<Address> = peers.iter().map(|peer| peer.engine.address().clone()).collect();
    row("barrier of 63 peers", rounds, 16, |idx| {
        here.barrier(&addresses, 1 + idx as u32 % 100, None).unwrap().wait(None).unwrap();
    });
}

/// Runs `calls` calls in each of `rounds` rounds, and prints the best and the median round for each request.
fn row(what: &str, rounds: usize, calls: usize, call: impl Fn(usize)) {
    let mut took = Vec::with_capacity(rounds);
    let (mut requests, mut posts) = (0, 0);
    for round in 0..rounds + rounds / 10 {
        let before = (knob(Knob::NumRequests, None), knob(Knob::NumPosts, None));
        let began = Instant::now();
        (0..calls).for_each(&call);
        let ns = began.elapsed().as_nanos() as f64;
        requests = knob(Knob::NumRequests, None) - before.0;
        posts = knob(Knob::NumPosts, None) - before.1;
        if round >= rounds / 10 {
            took.push(ns / requests as f64);
        }
    }
    took.sort_by(f64::total_cmp);
    let (best, p50, p99) = (took[0], took[took.len() / 2], took[took.len() * 99 / 100]);
    println!(
        "{{\"row\": \"{what}\", \"requests\": {requests}, \"posts\": {posts}, \"best_ns\": {best:.1}, \
         \"p50_ns\": {p50:.1}, \"p99_ns\": {p99:.1}, \"rounds\": {rounds}}}"
    );
}

fn engine() -> Engine {
    Engine::new(Config {
        transports: vec!["verbs".into()],
        nics: vec!["null0".into()],
        verbs: VerbsSettings { library: Some(library().to_owned()), ..VerbsSettings::default() },
        ..Config::default()
    })
    .unwrap()
}

struct Peer {
    engine: Engine,
    remote: Remote,
    // Dropped after everything that was written into it.
    _region: Region,
}

impl Peer {
    fn new(here: &Engine) -> Self {
        let engine = engine();
        let region = engine.allocate(u64::from(PAGES) * PAGE).unwrap();
        let remote = here.import(&region.descriptor().unwrap().encode()).unwrap();
        here.connect(engine.address(), None).unwrap();
        assert_eq!(here.path(engine.address()).transport, "verbs");
        Self { engine, remote, _region: region }
    }

    fn target(&self) -> ScatterTarget {
        ScatterTarget { remote: self.remote.clone(), src_offset: 0, dst_offset: 0, nbytes: PAGE }
    }
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
