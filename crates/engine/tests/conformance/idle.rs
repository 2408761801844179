//! Peers that have nothing to say stay peers, and cost next to nothing.

use std::time::{Duration, Instant};

use anyfabric_engine::{Engine, WriteOptions};

use crate::ask::Ask;
use crate::fabric::{on_every_fabric, on_fabrics, Fabric};
use crate::harness::{Pair, Peer, LONG};

on_every_fabric!(idle_is_no_loss);
on_fabrics! { [heartbeats_are_few] [shm SHM, tcp_2 TCP_2] }

/// For longer than any silence that counts as death, which in turn is longer than a busy machine keeps a thread waiting.
fn idle_is_no_loss(fabric: &Fabric) {
    let mut pair = Pair::with(fabric, 4096, |settings| {
        (settings.heartbeat, settings.heartbeats_lost) = (Duration::from_millis(50), 50);
    });
    pair.connect(fabric);
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(pair.engine.path(&pair.peer.address).state, "ready");
    let counter = pair.peer.open(1, &[pair.engine.address()]);
    let (src, dst) = (pair.region.slice(0..8).unwrap(), pair.remote.slice(0..8).unwrap());
    pair.engine.write(&src, &dst, WriteOptions::counted(1)).unwrap().wait(Some(LONG)).unwrap();
    pair.peer.wait_count(counter, 1).unwrap();
}

/// Each is a packet that wakes somebody: over tcp one an interval, however the two sides' clocks lie, and on the same
/// host, where memory shows who lives, far fewer.
fn heartbeats_are_few(fabric: &Fabric) {
    const PEERS: u64 = 16;
    const INTERVALS: u64 = 12;
    let mut settings = fabric.settings(1);
    (settings.heartbeat, settings.heartbeats_lost) = (Duration::from_millis(400), 20);
    let hub = &mut Peer::start(&settings);
    let engines: Vec<_> = (0..PEERS).map(|_| Engine::new(settings.config()).unwrap()).collect();
    for engine in &engines {
        engine.connect(&hub.address, Some(LONG)).unwrap();
    }
    // Until each has seen the other's first beats.
    std::thread::sleep(4 * settings.heartbeat);
    let (before, began) = (hub.count(Ask::NumPackets), Instant::now());
    std::thread::sleep(settings.heartbeat * INTERVALS as u32);
    let packets = hub.count(Ask::NumPackets) - before;
    // A busy machine may let us sleep for longer.
    let intervals = began.elapsed().as_millis().div_ceil(settings.heartbeat.as_millis()) as u64;
    println!("{packets} packets from {PEERS} peers in {intervals} intervals");
    // Who has several peers is an eighth earlier than need be.
    let limit = PEERS * intervals * 3 / if fabric.is_tcp() { 2 } else { 6 };
    assert!(packets <= limit, "{packets} packets from {PEERS} peers in {intervals} intervals");
    let least = PEERS * INTERVALS / 8;
    assert!(packets >= least, "{packets} packets: a control connection that broke would not be noticed");
    assert!(engines.iter().all(|engine| engine.path(&hub.address).state == "ready"));
}
