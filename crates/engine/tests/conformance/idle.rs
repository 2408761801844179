//! Peers that have nothing to say stay peers, and cost next to nothing.

use std::time::Duration;

use anyfabric_engine::{Engine, WriteOptions};

use crate::ask::Ask;
use crate::fabric::{on_every_fabric, on_fabrics, Fabric};
use crate::harness::{Pair, Peer, LONG};

on_every_fabric!(idle_is_no_loss);
on_fabrics! { [heartbeats_are_few] [shm SHM, tcp_2 TCP_2] }

/// For longer than any silence that counts as death.
fn idle_is_no_loss(fabric: &Fabric) {
    let mut pair = Pair::with(fabric, 4096, |settings| {
        (settings.heartbeat, settings.heartbeats_lost) = (Duration::from_millis(50), 10);
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
    let before = hub.count(Ask::NumPackets);
    std::thread::sleep(settings.heartbeat * INTERVALS as u32);
    let packets = hub.count(Ask::NumPackets) - before;
    let every = PEERS * INTERVALS;
    println!("{packets} packets from {PEERS} peers in {INTERVALS} intervals");
    // Who has several peers is an eighth earlier than need be.
    let limit = if fabric.is_tcp() { every * 3 / 2 } else { every / 2 };
    assert!(packets <= limit, "{packets} packets from {PEERS} peers in {INTERVALS} intervals");
    assert!(packets >= every / 8, "{packets} packets: a control connection that broke would not be noticed");
    assert!(engines.iter().all(|engine| engine.path(&hub.address).state == "ready"));
}
