//! One engine, and peers that it reaches by different transports.

// What benchmarks and tests share is more than is used here; a panic is the report.
#![allow(dead_code, unused_imports, unused_macros, clippy::unwrap_used)]

mod fabrics;
#[path = "../../transports/tests/libfabric/fake.rs"]
mod fake;
mod filled;
#[path = "../../transports/tests/null_nic/mod.rs"]
mod null_nic;
#[path = "../../transports/tests/libfabric/support.rs"]
mod support;

use std::time::Duration;

use anyfabric_engine::{Address, Config, Counter, Engine, Region, Remote, ScatterTarget, WriteOptions};
use fabrics::{Fabric, Libfabric, Verbs};
use filled::fill;
use null_nic::{eventually, knob, Knob};

/// Each peer offers one transport, and the engine all of them.
// One test, for the null NIC's knobs are the process's.
#[test]
fn peers_on_different_transports() {
    let verbs = Verbs::new();
    knob(Knob::Delivers, Some(2));
    let transports = vec!["shm".into(), "verbs".into(), "tcp".into()];
    // No NIC is named: either library has its own.
    let mut all = Config { transports, nics: Vec::new(), ..verbs.config() };
    let plain = |name: &str| Config { transports: vec![name.into()], ..Config::default() };
    let mut of_peers = vec![verbs.config(), plain("tcp"), plain("shm")];
    let libfabric = Libfabric::delivering();
    if let Some(libfabric) = &libfabric {
        all.transports.push("libfabric".into());
        all.libfabric = libfabric.config().libfabric;
        of_peers.push(libfabric.config());
    }
    let here = Engine::new(all).unwrap();
    let source = here.allocate(NBYTES).unwrap();
    let bytes = fill(&source);
    let peers: Vec<Peer> = of_peers.into_iter().map(|config| Peer::new(&here, config)).collect();

    // All of them under way at the same time, of every length.
    let mut counted = 0;
    for nbytes in [0, 1, 64, 4097, 300_001, NBYTES] {
        let writes = peers.iter().map(|peer| {
            let (src, dst) = (source.slice(0..nbytes).unwrap(), peer.remote.slice(0..nbytes).unwrap());
            here.write(&src, &dst, options()).unwrap()
        });
        let writes: Vec<_> = writes.collect();
        writes.iter().for_each(|write| write.wait(None).unwrap());
        counted += 1;
        peers.iter().for_each(|peer| peer.has(counted, &bytes[..nbytes as usize]));
    }

    // Two targets of each peer, and one transfer for all of them.
    let (first, second) = (0..1000, 1000..300_000);
    let target = |peer: &Peer, at: &std::ops::Range<u64>| ScatterTarget {
        remote: peer.remote.clone(),
        src_offset: at.start,
        dst_offset: at.start,
        nbytes: at.end - at.start,
    };
    let targets: Vec<_> = peers.iter().flat_map(|peer| [target(peer, &first), target(peer, &second)]).collect();
    here.scatter(&source, &targets, None, options()).unwrap().wait(None).unwrap();
    counted += 2;
    peers.iter().for_each(|peer| peer.has(counted, &bytes[..second.end as usize]));

    let addresses: Vec<Address> = peers.iter().map(|peer| peer.engine.address().clone()).collect();
    here.barrier(&addresses, IMM, Some(LONG)).unwrap().wait(None).unwrap();
    counted += 1;
    peers.iter().for_each(|peer| peer.has(counted, &[]));

    let stats = here.stats();
    for peer in &peers {
        let used = &stats.peers[&peer.engine.address().to_string()];
        // Six writes, a scatter and a barrier.
        assert_eq!((used.operations, used.errors), (8, 0), "{}", peer.transport);
    }
}

struct Peer {
    engine: Engine,
    transport: String,
    region: Region,
    remote: Remote,
    counter: Counter,
}

impl Peer {
    /// Connected with `here`, by the only transport that it has.
    fn new(here: &Engine, config: Config) -> Self {
        let transport = config.transports[0].clone();
        let engine = Engine::new(config).unwrap();
        let region = engine.allocate(NBYTES).unwrap();
        let remote = here.import(&region.descriptor().unwrap().encode()).unwrap();
        here.connect(engine.address(), Some(LONG)).unwrap();
        assert_eq!(here.path(engine.address()).transport, transport);
        // It learns a little later that all is agreed on.
        eventually("the peer knows it too", || engine.path(here.address()).transport == transport);
        let counter = engine.counter(Some(IMM), &[]).unwrap();
        Self { engine, transport, region, remote, counter }
    }

    /// So many arrivals and no more, and these bytes at the beginning, which are then forgotten.
    fn has(&self, counted: u64, bytes: &[u8]) {
        self.counter.wait(counted, Some(LONG)).unwrap();
        assert_eq!(self.counter.value(), counted, "{}", self.transport);
        // SAFETY: inside the region, and nothing is under way.
        let there = unsafe { std::slice::from_raw_parts_mut(self.region.as_ptr(), bytes.len()) };
        assert!(*there == *bytes, "{}: {} bytes", self.transport, bytes.len());
        there.fill(0);
    }
}

fn options() -> WriteOptions {
    WriteOptions { timeout: Some(LONG), ..WriteOptions::counted(IMM) }
}

const NBYTES: u64 = 1 << 20;
const IMM: u32 = 7;
const LONG: Duration = Duration::from_secs(20);
