//! Semantic 4: a transfer ends: done, or failed with one error.

use std::time::{Duration, Instant};

use anyfabric_engine::{Code, PageList, Remote, ScatterTarget, Transfer, WriteOptions};
use anyfabric_wire::Descriptor;

use crate::ask::Memory;
use crate::fabric::{on_every_fabric, Fabric};
use crate::harness::{assert_code, assert_fault, eventually, fill, Pair, Peer, LONG};
use crate::pattern;

on_every_fabric!(
    done_means_placed,
    deadline_ends_it,
    deadline_ends_every_operation,
    waiting_ends_nothing,
    cancelled_ends_and_quiesces,
    full_queue_raises,
    full_queue_blocks,
    counter_of_a_failed_write_fails,
    errors_say_where,
    errors_say_whose_part_failed,
    many_under_way,
);

/// A write to a region that the peer has not been asked for yet, so that a stopped peer holds it up on every fabric.
fn held_up(pair: &mut Pair, timeout: Duration) -> Transfer {
    let fresh = pair.peer.region(1 << 20, Memory::Foreign);
    pair.peer.stop();
    let (src, dst) = (pair.region.slice(0..1 << 20).unwrap(), fresh.remote().slice(0..1 << 20).unwrap());
    let options = WriteOptions { imm: Some(5), timeout: Some(timeout), ..WriteOptions::default() };
    pair.engine.write(&src, &dst, options).unwrap()
}

fn done_means_placed(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 8 << 20);
    for (round, nbytes) in [1, 100, 20_000, 200_000, 8 << 20].into_iter().enumerate() {
        let seed = round as u64 + 1;
        fill(&pair.region, seed);
        let (src, dst) = (pair.region.slice(0..nbytes).unwrap(), pair.remote.slice(0..nbytes).unwrap());
        let transfer = pair.engine.write(&src, &dst, WriteOptions::default()).unwrap();
        transfer.wait(Some(LONG)).unwrap();
        assert!(transfer.is_done() && transfer.error().is_none());
        // The source may be reused at once, and the bytes are at the target.
        pair.bytes().fill(0xee);
        assert_eq!(pair.peer.mismatch(&pair.there, (0, nbytes), seed, 0), None, "{nbytes} bytes");
        transfer.wait_quiesced(Some(LONG)).unwrap();
        assert!(transfer.interval_ns().is_none_or(|(began, ended)| began <= ended));
    }
}

fn deadline_ends_it(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 1 << 20);
    let began = Instant::now();
    let transfer = held_up(&mut pair, Duration::from_millis(300));
    assert_code(transfer.wait(None), Code::TransferTimeout);
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(300), "it ended {took:?} after its submission");
    assert_code(transfer.wait(None), Code::TransferTimeout);
    assert_eq!(operations(&pair), (1, 1, 0));
    pair.peer.go_on();
    transfer.wait_quiesced(Some(LONG)).unwrap();
    // The peer was merely stopped: what comes later goes well.
    let (src, dst) = (pair.region.slice(0..8).unwrap(), pair.remote.slice(0..8).unwrap());
    pair.engine.write(&src, &dst, WriteOptions::default()).unwrap().wait(Some(LONG)).unwrap();
    assert_eq!(operations(&pair), (2, 1, 8));
}

/// With the peer: that have ended, those that failed, and the bytes of the others.
fn operations(pair: &Pair) -> (u64, u64, u64) {
    let with_peer = &pair.engine.stats().peers[&pair.peer.address.to_string()];
    (with_peer.operations, with_peer.errors, with_peer.bytes)
}

/// Pages, a scatter of which one part went well, and a message.
fn deadline_ends_every_operation(fabric: &Fabric) {
    // Time enough for the part that goes well, also on a busy machine.
    const TIMEOUT: Duration = Duration::from_secs(2);
    let mut pair = Pair::connected(fabric, 1 << 20);
    let mut other = Peer::start(&fabric.there());
    let near = other.region(4096, fabric.memory);
    let arrived = other.open(6, &[]);
    pair.engine.connect(&other.address, Some(LONG)).unwrap();
    let fresh = pair.peer.region(1 << 20, Memory::Foreign).remote();
    pair.peer.stop();
    let began = Instant::now();
    let options = |imm| WriteOptions { imm: Some(imm), timeout: Some(TIMEOUT), ..WriteOptions::default() };
    let pages = || PageList::new((0..16).collect::<Vec<u32>>().into(), 4096, 4096, 0);
    let targets = [near.remote(), fresh.clone()].map(|remote| {
        let (src_offset, dst_offset, nbytes) = (0, 0, 4096);
        ScatterTarget { remote, src_offset, dst_offset, nbytes }
    });
    let engine = &pair.engine;
    let transfers = [
        ("write_pages", engine.write_pages((&pair.region, pages()), (&fresh, pages()), options(5)).unwrap()),
        ("scatter", engine.scatter(&pair.region, &targets, None, options(6)).unwrap()),
        ("send", engine.send(&pair.peer.address, vec![1; 100], Some(TIMEOUT)).unwrap()),
    ];
    for (operation, transfer) in &transfers {
        let error = assert_code(transfer.wait(None), Code::TransferTimeout);
        assert!(began.elapsed() >= TIMEOUT, "{operation} ended after {:?}", began.elapsed());
        assert!(error.message.starts_with(operation), "{error}");
        assert_eq!(error.context.operation, Some(*operation));
        // Of several peers the one that is missing is named, and no other.
        let (missing, arrived) = (pair.peer.address.to_string(), other.address.to_string());
        assert_eq!(error.context.peer.as_deref(), Some(&*missing), "{error}");
        assert!(error.message.contains(&missing) && !error.message.contains(&arrived), "{error}");
    }
    // The part for somebody else went its own way.
    other.wait_count(arrived, 1).unwrap();
    pair.peer.go_on();
    for (_, transfer) in &transfers {
        transfer.wait_quiesced(Some(LONG)).unwrap();
    }
    // Who counts on it is told; that it may have arrived all the same does not make it whole.
    for (imm, n) in [(5, 17), (6, 2)] {
        let counter = pair.peer.open(imm, &[]);
        assert_fault(pair.peer.wait_count(counter, n), Code::TransferFailed);
    }
}

fn waiting_ends_nothing(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 1 << 20);
    let transfer = held_up(&mut pair, LONG);
    assert_code(transfer.wait(Some(Duration::from_millis(50))), Code::WaitTimeout);
    assert_code(transfer.wait(Some(Duration::ZERO)), Code::WaitTimeout);
    assert!(!transfer.is_done() && !transfer.is_quiesced());
    pair.peer.go_on();
    transfer.wait(None).unwrap();
    transfer.wait_quiesced(Some(LONG)).unwrap();
}

fn cancelled_ends_and_quiesces(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 1 << 20);
    let transfer = held_up(&mut pair, LONG);
    transfer.cancel();
    assert_code(transfer.wait(Some(LONG)), Code::Cancelled);
    transfer.cancel();
    assert_eq!(operations(&pair), (1, 1, 0));
    pair.peer.go_on();
    transfer.wait_quiesced(Some(LONG)).unwrap();
    // Whoever waited for it is told, unless its bytes have arrived all the same.
    let counter = pair.peer.open(5, &[]);
    let _ = pair.peer.wait_count(counter, 1);
    let done = pair.engine.write(
        &pair.region.slice(0..1).unwrap(),
        &pair.remote.slice(0..1).unwrap(),
        WriteOptions::default(),
    );
    let done = done.unwrap();
    done.wait(Some(LONG)).unwrap();
    done.cancel();
    done.wait(None).unwrap();
    assert_eq!(operations(&pair), (2, 1, 1));
}

fn full_queue_raises(fabric: &Fabric) {
    let mut pair = Pair::with(fabric, 1 << 20, |settings| {
        settings.queue_depth = 2;
        settings.raise_when_full = true;
    });
    pair.connect(fabric);
    let first = held_up(&mut pair, LONG);
    let again = |pair: &Pair| {
        let (src, dst) = (pair.region.slice(0..8).unwrap(), pair.remote.slice(0..8).unwrap());
        pair.engine.write(&src, &dst, WriteOptions::default())
    };
    // The path to this region has not been asked for either.
    let second = again(&pair).unwrap();
    assert_code(again(&pair), Code::QueueFull);
    pair.peer.go_on();
    first.wait(None).unwrap();
    second.wait(None).unwrap();
    eventually("there is room again", || again(&pair).is_ok());
}

fn full_queue_blocks(fabric: &Fabric) {
    let mut pair = Pair::with(fabric, 1 << 20, |settings| settings.queue_depth = 1);
    pair.connect(fabric);
    let first = held_up(&mut pair, LONG);
    let again = |timeout: Duration| {
        let (src, dst) = (pair.region.slice(0..8).unwrap(), pair.remote.slice(0..8).unwrap());
        let options = WriteOptions { timeout: Some(timeout), ..WriteOptions::default() };
        pair.engine.write(&src, &dst, options)
    };
    let began = Instant::now();
    assert_code(again(Duration::from_millis(200)), Code::QueueFull);
    assert!(began.elapsed() >= Duration::from_millis(200));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            pair.peer.go_on();
        });
        again(LONG).unwrap().wait(None).unwrap();
    });
    first.wait(None).unwrap();
}

fn counter_of_a_failed_write_fails(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 1 << 20);
    let before = pair.peer.open(6, &[]);
    let wrong: Remote = Descriptor { key: pair.remote.descriptor().key ^ 1, ..pair.remote.descriptor().clone() }.into();
    for imm in [6, 7] {
        for nbytes in [8, 1 << 20] {
            let (src, dst) = (pair.region.slice(0..nbytes).unwrap(), wrong.slice(0..nbytes).unwrap());
            let transfer = pair.engine.write(&src, &dst, WriteOptions::counted(imm));
            assert_code(transfer.and_then(|transfer| transfer.wait(Some(LONG))), Code::Refused);
        }
    }
    let fault = pair.peer.wait_count(before, 1).unwrap_err();
    assert_eq!(fault.code, Code::TransferFailed.as_str(), "{}", fault.message);
    // Also for whoever comes later.
    let after = pair.peer.open(7, &[]);
    let fault = pair.peer.wait_count(after, 1).unwrap_err();
    assert_eq!(fault.code, Code::TransferFailed.as_str(), "{}", fault.message);
    assert_eq!((pair.peer.value(before), pair.peer.value(after)), (0, 0));
}

fn errors_say_where(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 1 << 20);
    let transfer = held_up(&mut pair, Duration::from_millis(100));
    let error = assert_code(transfer.wait(None), Code::TransferTimeout);
    assert_eq!(error.context.operation, Some("write"));
    assert_eq!(error.context.peer.as_deref(), Some(pair.peer.address.to_string().as_str()));
    assert_eq!(error.context.region, Some(pair.region.id()));
    assert_eq!(error.context.nbytes, Some(1 << 20));
    assert_eq!(error.context.path, Some(fabric.transport));
    for part in ["write", "1048576", fabric.transport, &pair.peer.address.to_string()] {
        assert!(error.message.contains(part), "{part:?} is missing in {:?}", error.message);
    }
    pair.peer.go_on();
}

/// Of one operation to many peers.
fn errors_say_whose_part_failed(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    let mut others: Vec<_> = (0..2).map(|_| Peer::start(&fabric.settings(fabric.streams.1))).collect();
    let theirs: Vec<_> = others.iter_mut().map(|other| other.region(4096, fabric.memory).remote()).collect();
    let scatter = |pair: &Pair, remotes: [&Remote; 3]| {
        let targets = remotes.map(|remote| {
            let (src_offset, dst_offset, nbytes) = (0, 0, 100);
            ScatterTarget { remote: remote.clone(), src_offset, dst_offset, nbytes }
        });
        pair.engine.scatter(&pair.region, &targets, None, WriteOptions::default()).unwrap()
    };
    scatter(&pair, [&pair.remote, &theirs[0], &theirs[1]]).wait(Some(LONG)).unwrap();
    let right = theirs[0].descriptor();
    let wrong: Remote = Descriptor { key: right.key ^ 1, ..right.clone() }.into();
    let error = assert_code(scatter(&pair, [&pair.remote, &wrong, &theirs[1]]).wait(Some(LONG)), Code::Refused);
    let culprit = others[0].address.to_string();
    assert_eq!(error.context.peer.as_deref(), Some(&*culprit));
    assert!(error.message.contains(&culprit) && error.message.contains("300 bytes"), "{error}");
    let fresh = pair.peer.region(4096, Memory::Foreign).remote();
    pair.peer.stop();
    let transfer = scatter(&pair, [&theirs[0], &fresh, &theirs[1]]);
    pair.peer.kill();
    let error = transfer.wait(Some(LONG)).unwrap_err();
    assert!(matches!(error.code, Code::PeerLost | Code::ConnectionBroken), "{error}");
    assert_eq!(error.context.peer.as_deref(), Some(&*pair.peer.address.to_string()), "{error}");
}

/// More than any ring, queue or socket holds: all end, and in the end every byte is there.
fn many_under_way(fabric: &Fabric) {
    const SLOT: u64 = 2048;
    const SLOTS: u64 = 3000;
    let mut pair = Pair::connected(fabric, SLOT * SLOTS);
    fill(&pair.region, 8);
    let counter = pair.peer.open(2, &[]);
    let transfers: Vec<_> = (0..SLOTS)
        .map(|slot| {
            let range = slot * SLOT..(slot + 1) * SLOT;
            let (src, dst) = (pair.region.slice(range.clone()).unwrap(), pair.remote.slice(range).unwrap());
            pair.engine.write(&src, &dst, WriteOptions::counted(2)).unwrap()
        })
        .collect();
    for transfer in &transfers {
        transfer.wait(Some(LONG)).unwrap();
    }
    pair.peer.wait_count(counter, SLOTS).unwrap();
    assert_eq!(pair.peer.mismatch(&pair.there, (0, SLOT * SLOTS), 8, 0), None);
    assert_eq!(pair.peer.value(counter), SLOTS);
    assert_eq!(pattern::mismatch(pair.bytes(), 8, 0), None);
    let stats = pair.engine.stats();
    let to_peer = &stats.peers[&pair.peer.address.to_string()];
    assert_eq!((to_peer.bytes, to_peer.operations, to_peer.errors), (SLOT * SLOTS, SLOTS, 0));
}
