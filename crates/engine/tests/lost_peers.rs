//! An engine that serves for weeks loses many peers, and remembers the last: of none anything stays mapped.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use anyfabric_engine::{Config, Engine, WriteOptions};

const LONG: Duration = Duration::from_secs(40);

#[test]
fn nothing_of_a_lost_peer_stays_mapped() {
    let config = || Config { transports: vec!["shm".into()], ..Config::default() };
    let engine = Engine::new(config()).unwrap();
    let ours = engine.allocate(4096).unwrap();
    let before = num_mappings();
    let mut kept = Vec::new();
    for _ in 0..NUM_PEERS {
        let other = Engine::new(config()).unwrap();
        let theirs = other.allocate(4096).unwrap();
        let remote = engine.import(&theirs.descriptor().unwrap().encode()).unwrap();
        let (src, dst) = (ours.slice(0..8).unwrap(), remote.slice(0..8).unwrap());
        engine.write(&src, &dst, WriteOptions::default()).unwrap().wait(Some(LONG)).unwrap();
        assert_eq!(engine.path(other.address()).transport, "shm");
        other.close(LONG);
        // As somebody who forgets to drop it.
        kept.push(dst);
    }
    let until = Instant::now() + LONG;
    while num_mappings() > before {
        assert!(Instant::now() < until, "{before} mappings before, {} with {NUM_PEERS} peers lost", num_mappings());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Of memory that engines share: their regions, rings and doorbells.
fn num_mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("memfd:anyfabric")).count()
}

const NUM_PEERS: usize = 20;
