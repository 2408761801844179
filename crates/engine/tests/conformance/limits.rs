//! Bounds of the machine: descriptors, memory, many peers.

use std::time::{Duration, Instant};

use anyfabric_engine::{Address, Code, Engine, WriteOptions};

use crate::ask::{Answer, Ask, Forbidden, How, Memory};
use crate::fabric::{on_every_fabric, on_fabrics, Fabric};
use crate::harness::{assert_fault, eventually, Pair, Peer, PeerRegion, LONG};
use crate::intruder::dial;
use crate::pattern;

on_every_fabric!(no_descriptors_left, lost_peers_leave_nothing);
on_fabrics! { [many_peers, more_memory_than_there_is, no_addresses_left] [shm SHM, tcp_2 TCP_2] }
on_fabrics! { [control_group_is_full, no_descriptor_for_a_region, callers_that_cannot_be_taken_in] [shm SHM] }

fn no_descriptors_left(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    // Some providers of libfabric connect when something is sent, rail by rail: as many as there can be.
    for _ in 0..4 {
        pair.engine.send(&pair.peer.address, b"a path".to_vec(), None).unwrap().wait(Some(LONG)).unwrap();
        assert_eq!(pair.peer.receive().unwrap(), b"a path");
    }
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

/// What keeps an engine from them costs it next to nothing while they wait, whatever it is.
fn callers_that_cannot_be_taken_in(fabric: &Fabric) {
    let mut peer = Peer::bare();
    peer.ask(Ask::Forbid(Forbidden::Accept));
    peer.address = peer.start_engine(&fabric.settings(1));
    let callers: Vec<_> = (0..4).map(|_| dial(&peer.address)).collect();
    let worked = |peer: &Peer| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", peer.pid())).unwrap();
        // After the name, which may be anything: 11 fields, then the ticks of user and of system, 100 a second.
        let fields = stat[stat.rfind(')').unwrap() + 2..].split(' ').skip(11).take(2);
        Duration::from_millis(fields.map(|ticks| 10 * ticks.parse::<u64>().unwrap()).sum())
    };
    let before = worked(&peer);
    std::thread::sleep(Duration::from_secs(2));
    let worked = worked(&peer) - before;
    assert!(worked < Duration::from_millis(200), "it worked for {worked:?} in 2 s");
    drop(callers);
}

/// An engine that serves for weeks loses many peers, by their closing and by their death.
fn lost_peers_leave_nothing(fabric: &Fabric) {
    let mut hub = Peer::start(&fabric.settings(2));
    let there = hub.region(4096, fabric.memory);
    let counter = hub.open(1, &[]);
    // What is opened once and for all is there after the first.
    let mut used = None;
    for round in 1..=4 {
        let guest = Engine::new(fabric.settings(1).config()).unwrap();
        let region = fabric.region(&guest, 64);
        let (src, dst) = (region.slice(0..64).unwrap(), there.remote().slice(0..64).unwrap());
        guest.write(&src, &dst, WriteOptions::counted(1)).unwrap().wait(Some(LONG)).unwrap();
        hub.wait_count(counter, 2 * round - 1).unwrap();
        guest.close(LONG);
        let mut victim = Peer::start(&fabric.settings(1));
        let source = victim.region(64, fabric.memory);
        let to = there.descriptor.clone();
        let write = Ask::Write { region: source.idx, at: 0, nbytes: 64, to, to_at: 0, how: How::counted(1) };
        let Answer::Id(transfer) = victim.ask(write) else { panic!("no write") };
        victim.wait(transfer).unwrap();
        hub.wait_count(counter, 2 * round).unwrap();
        victim.kill();
        let is_lost =
            |hub: &mut Peer, address: &Address| match hub.ask(Ask::Path { engine: 0, address: address.to_string() }) {
                Answer::Text(path) => path.contains("lost"),
                other => panic!("no path: {other:?}"),
            };
        for address in [guest.address(), &victim.address] {
            eventually("the peer is lost", || is_lost(&mut hub, address));
        }
        match used {
            None => {
                // Most of a socket's end comes a moment after the news of it.
                std::thread::sleep(Duration::from_millis(200));
                used = Some(hub.count(Ask::NumFiles));
            }
            Some(used) => eventually("as few descriptors as after the first", || hub.count(Ask::NumFiles) <= used),
        }
    }
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

/// What cannot be had is refused; and memory that cannot be mapped is written through its owner.
fn no_addresses_left(fabric: &Fabric) {
    const BYTES: u64 = 160 << 20;
    let mut pair = Pair::connected(fabric, BYTES);
    let source = pair.peer.region(8 << 20, fabric.memory);
    pair.peer.fill(&source, (0, 8 << 20), 1);
    pair.peer.ask(Ask::LimitMemory { nbytes: 64 << 20 });
    match pair.peer.ask(Ask::TryAllocate { engine: 0, nbytes: BYTES }) {
        Answer::Failed(fault) => {
            let fault = assert_fault::<()>(Err(fault), Code::ResourceExhausted);
            assert!(fault.message.contains(&BYTES.to_string()), "{}", fault.message);
        }
        other => panic!("allocated beyond the limit: {other:?}"),
    }
    assert_eq!(pair.peer.ask(Ask::TryAllocate { engine: 0, nbytes: 1 << 20 }), Answer::Done);
    writes_and_is_written(&mut pair, &source);
}

/// The kernel would end some process of the group; the engine asks first.
fn control_group_is_full(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 8 << 20);
    let Some(group) = Group::around(pair.peer.pid(), 256 << 20) else {
        return println!("skipped: this user may not make control groups for memory");
    };
    let source = pair.peer.region(8 << 20, fabric.memory);
    pair.peer.fill(&source, (0, 8 << 20), 1);
    match pair.peer.ask(Ask::TryAllocate { engine: 0, nbytes: 1 << 30 }) {
        Answer::Failed(fault) => drop(assert_fault::<()>(Err(fault), Code::ResourceExhausted)),
        other => panic!("allocated beyond the limit: {other:?}"),
    }
    assert_eq!(pair.peer.ask(Ask::TryAllocate { engine: 0, nbytes: 100 << 20 }), Answer::Done);
    writes_and_is_written(&mut pair, &source);
    pair.peer.kill();
    drop(group);
}

/// A peer's memory comes as a descriptor; without room for it its owner places the bytes.
fn no_descriptor_for_a_region(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 8 << 20);
    let source = pair.peer.region(8 << 20, fabric.memory);
    pair.peer.fill(&source, (0, 8 << 20), 1);
    pair.peer.count(Ask::LimitFiles { soft: 100 });
    assert!(pair.peer.count(Ask::TakeFiles) > 0);
    writes_and_is_written(&mut pair, &source);
    assert_eq!(pair.peer.ask(Ask::GiveFiles), Answer::Done);
}

/// The peer works, both ways.
fn writes_and_is_written(pair: &mut Pair, source: &PeerRegion) {
    let counter = pair.engine.counter(Some(1), &[]).unwrap();
    for nbytes in [64, 8 << 20] {
        let transfer = pair.peer.write(source, (0, nbytes), &pair.region, 0, How::counted(1)).unwrap();
        pair.peer.wait(transfer).unwrap();
    }
    counter.wait(2, Some(LONG)).unwrap();
    assert_eq!(pattern::mismatch(&pair.bytes()[..8 << 20], 1, 0), None);
    let counter = pair.peer.open(1, &[]);
    let (src, dst) = (pair.region.slice(0..4 << 20).unwrap(), source.remote().slice(4 << 20..8 << 20).unwrap());
    pair.engine.write(&src, &dst, WriteOptions::counted(1)).unwrap().wait(Some(LONG)).unwrap();
    pair.peer.wait_count(counter, 1).unwrap();
    assert_eq!(pair.peer.mismatch(source, (4 << 20, 4 << 20), 1, 0), None);
    pair.region.revoke(None, LONG).unwrap();
}

/// A control group of its own for one process, below the one we are in.
struct Group(std::path::PathBuf);

impl Group {
    fn around(pid: i32, limit_bytes: u64) -> Option<Self> {
        let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let (parent, limit) = groups.lines().find_map(|line| match line.splitn(3, ':').collect::<Vec<_>>()[..] {
            [_, "memory", path] => Some((format!("/sys/fs/cgroup/memory{path}"), "memory.limit_in_bytes")),
            [_, "", path] if groups.lines().count() == 1 => Some((format!("/sys/fs/cgroup{path}"), "memory.max")),
            _ => None,
        })?;
        let this = Self(std::path::Path::new(&parent).join(format!("anyfabric-{pid}")));
        std::fs::create_dir(&this.0).ok()?;
        std::fs::write(this.0.join(limit), limit_bytes.to_string()).ok()?;
        std::fs::write(this.0.join("cgroup.procs"), pid.to_string()).ok()?;
        Some(this)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        eventually("its process has left the group", || std::fs::remove_dir(&self.0).is_ok());
    }
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
    println!("{PEERS} peers over {} in {:?}", fabric.transport, began.elapsed());
    // Everybody is reached, those who called too.
    let all = called.iter().chain(calls).collect::<Vec<_>>();
    let second = hub.barrier(&all, 1).unwrap();
    hub.wait(second).unwrap();
    // What a handshake took is given back a moment after it.
    eventually("three descriptors a peer", || hub.count(Ask::NumFiles) - before <= 3 * PEERS as u64);
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
