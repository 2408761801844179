//! Bounds of the machine: descriptors, memory, many peers.

use std::time::{Duration, Instant};

use anyfabric_engine::{Code, Engine, WriteOptions};

use crate::ask::{Answer, Ask, Memory};
use crate::fabric::{on_every_fabric, on_fabrics, Fabric};
use crate::harness::{assert_fault, eventually, Pair, Peer, LONG};

on_every_fabric!(no_descriptors_left);
on_fabrics! { [many_peers, more_memory_than_there_is] [shm SHM, tcp_2 TCP_2] }

fn no_descriptors_left(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    pair.peer.count(Ask::LimitFiles { soft: 100 });
    assert!(pair.peer.count(Ask::TakeFiles) > 0);
    // A typed error for whoever needs one more.
    match pair.peer.ask(Ask::Start(fabric.settings(1))) {
        Answer::Failed(fault) => drop(assert_fault::<()>(Err(fault), Code::ResourceExhausted)),
        other => panic!("an engine without descriptors: {other:?}"),
    }
    // Who is connected is not concerned.
    let (src, dst) = (pair.region.slice(0..64).unwrap(), pair.remote.slice(0..64).unwrap());
    let counter = pair.peer.open(1, &[]);
    pair.engine.send(&pair.peer.address, b"hello".to_vec(), None).unwrap().wait(Some(LONG)).unwrap();
    assert_eq!(pair.peer.receive().unwrap(), b"hello");
    // A newcomer fails or waits, and gets in once there is room again.
    let newcomer = Engine::new(fabric.settings(1).config()).unwrap();
    let refused = newcomer.connect(&pair.peer.address, Some(Duration::from_millis(500)));
    assert!(refused.is_err(), "a connection without a descriptor");
    assert_eq!(pair.peer.ask(Ask::GiveFiles), Answer::Done);
    eventually("a newcomer gets in again", || newcomer.connect(&pair.peer.address, Some(LONG)).is_ok());
    pair.engine.write(&src, &dst, WriteOptions::counted(1)).unwrap().wait(Some(LONG)).unwrap();
    pair.peer.wait_count(counter, 1).unwrap();
}

fn more_memory_than_there_is(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 64);
    for nbytes in [1 << 46, 1 << 62, u64::MAX >> 1, u64::MAX] {
        assert!(pair.engine.allocate(nbytes).is_err(), "{nbytes} bytes");
    }
    let there = pair.peer.region(4096, Memory::Allocated);
    let (src, dst) = (pair.region.slice(0..64).unwrap(), there.remote().slice(0..64).unwrap());
    pair.engine.write(&src, &dst, WriteOptions::default()).unwrap().wait(Some(LONG)).unwrap();
}

/// 256 peers of one engine within 1024 descriptors; then as many as there is room for, and a typed error beyond.
fn many_peers(fabric: &Fabric) {
    const PEERS: usize = 256;
    let mut hub = Peer::bare();
    hub.count(Ask::LimitFiles { soft: 1024 });
    hub.address = hub.start_engine(&fabric.settings(2));
    let before = hub.count(Ask::NumFiles);
    let mut others = Peer::bare();
    others.count(Ask::LimitFiles { soft: 20_000 });
    let addresses: Vec<_> = (0..PEERS).map(|_| others.start_engine(&fabric.settings(2))).collect();
    let began = Instant::now();
    // Half are called by the hub and half call it.
    let (calls, called) = addresses.split_at(PEERS / 2);
    let group = calls.iter().map(ToString::to_string).collect();
    let Answer::Id(barrier) = hub.ask(Ask::Barrier { engine: 0, peers: group, imm: 1 }) else {
        panic!("no barrier");
    };
    for engine in PEERS / 2..PEERS {
        let connect = Ask::Connect { engine, address: hub.address.to_string() };
        assert_eq!(others.ask(connect), Answer::Done);
    }
    hub.wait(barrier).unwrap();
    let took = began.elapsed();
    println!("{PEERS} peers over {} in {took:?}", fabric.transport);
    assert!(took < Duration::from_secs(30), "{PEERS} peers took {took:?}");
    // Everybody is reached, those who called too.
    let all = called.iter().chain(calls).collect::<Vec<_>>();
    let second = hub.barrier(&all, 1).unwrap();
    hub.wait(second).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let used = hub.count(Ask::NumFiles) - before;
    println!("{used} descriptors for {PEERS} peers");
    assert!(used <= 3 * PEERS as u64, "{used} descriptors for {PEERS} peers");
    // Beyond the limit: an error that says so, and those who are there stay.
    assert!(hub.count(Ask::TakeFiles) > 0);
    let late = others.start_engine(&fabric.settings(2));
    match hub.ask(Ask::Connect { engine: 0, address: late.to_string() }) {
        Answer::Failed(fault) => drop(assert_fault::<()>(Err(fault), Code::ResourceExhausted)),
        other => panic!("a peer without descriptors: {other:?}"),
    }
    let third = hub.barrier(&all, 1).unwrap();
    hub.wait(third).unwrap();
}
