//! Watchers: what fires natively when a word grows, and every way in which it does not.

use std::time::{Duration, Instant};

use anyfabric_engine::{Code, Operation, PageList, Transfer, Watcher, WriteOptions};

use crate::ask::{Ask, Memory};
use crate::fabric::{on_every_fabric, Fabric};
use crate::harness::{assert_code, assert_fault, fill, Pair, LONG};

on_every_fabric!(
    fires_at_its_value,
    cancelled_fires_never,
    revoked_before_it_fires,
    fires_beyond_a_full_queue,
    deadline_starts_when_it_fires,
    fires_at_a_dead_peer,
);

/// A write of the first `nbytes` bytes to where the peer has the same.
fn arm(pair: &Pair, watcher: &Watcher, value: u64, nbytes: u64, imm: u32) -> Transfer {
    let (src, dst) = (pair.region.slice(0..nbytes).unwrap(), pair.remote.slice(0..nbytes).unwrap());
    watcher.at(value, Operation::Write { src, dst }, Some(imm)).unwrap()
}

fn fires_at_its_value(fabric: &Fabric) {
    const PAGE: u64 = 40_000;
    let mut pair = Pair::connected(fabric, 16 * PAGE);
    let (single, paged) = (pair.peer.open(1, &[]), pair.peer.open(2, &[]));
    let watcher = pair.engine.watch().unwrap();
    let word = watcher.as_ptr().unwrap();
    let pages = |indices: Vec<u32>| PageList::new(indices.into(), PAGE, PAGE, 0);
    let mut fired = Vec::new();
    for round in 0..6_u64 {
        let source = fabric.region(&pair.engine, 16 * PAGE);
        let operation = Operation::WritePages {
            src: (&source).into(),
            src_pages: pages((0..16).collect()),
            dst: (&pair.remote).into(),
            dst_pages: pages((0..16).rev().collect()),
        };
        let transfers =
            [arm(&pair, &watcher, 2 * round + 1, 100, 1), watcher.at(2 * round + 2, operation, Some(2)).unwrap()];
        assert_code(transfers[0].wait(Some(Duration::from_millis(5))), Code::WaitTimeout);
        assert_eq!(pair.peer.value(single), round);
        // What fires reads its source then; and the armed operation keeps it.
        fill(&source, round + 1);
        if round % 2 == 0 {
            drop(source);
        }
        match round % 3 {
            0 => drop(watcher.add(2).unwrap()),
            1 => std::thread::scope(|scope| drop(scope.spawn(|| watcher.set(2 * round + 2).unwrap()))),
            // A store by somebody who knows nothing of watchers.
            // SAFETY: the word, which nobody else grows now.
            _ => unsafe { word.write_volatile(2 * round + 2) },
        }
        for transfer in &transfers {
            transfer.wait(Some(LONG)).unwrap();
        }
        fired.extend(transfers);
        pair.peer.wait_count(single, round + 1).unwrap();
        pair.peer.wait_count(paged, 16 * (round + 1)).unwrap();
        // Page 0 is where the single write went, maybe later.
        let placed = (1..16).map(|page| (page * PAGE, (15 - page) * PAGE)).collect();
        assert_eq!(pair.peer.page_mismatch(&pair.there, placed, PAGE, round + 1), None, "round {round}");
    }
    assert_eq!((pair.peer.value(single), pair.peer.value(paged)), (6, 96));
    assert!(fired.iter().all(Transfer::is_quiesced));
}

/// Its owner changes his mind, or closes the watcher: whoever counts on it is told, and its region is let go of.
fn cancelled_fires_never(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    let before = pair.peer.open(5, &[]);
    let watcher = pair.engine.watch().unwrap();
    let (kept, cancelled) = (arm(&pair, &watcher, 1, 64, 4), arm(&pair, &watcher, 1, 64, 5));
    cancelled.cancel();
    assert_code(cancelled.wait(Some(LONG)), Code::Cancelled);
    assert!(cancelled.is_quiesced(), "it waits for a word that may never grow");
    assert_fault(pair.peer.wait_count(before, 1), Code::TransferFailed);
    watcher.add(1).unwrap();
    kept.wait(Some(LONG)).unwrap();
    kept.cancel();
    let closed = arm(&pair, &watcher, 9, 64, 6);
    drop(watcher);
    assert_code(closed.wait(Some(LONG)), Code::Cancelled);
    let after = pair.peer.open(6, &[]);
    assert_fault(pair.peer.wait_count(after, 1), Code::TransferFailed);
    let kept = pair.peer.open(4, &[]);
    pair.peer.wait_count(kept, 1).unwrap();
    assert_eq!((pair.peer.value(before), pair.peer.value(after), pair.peer.value(kept)), (0, 0, 1));
}

fn revoked_before_it_fires(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 1 << 20);
    pair.peer.fill(&pair.there, (0, 1 << 20), 3);
    let counter = pair.peer.open(1, &[]);
    let watcher = pair.engine.watch().unwrap();
    // The right has been used, so that it must be taken back and not only be refused.
    let (src, dst) = (pair.region.slice(0..0).unwrap(), pair.remote.slice(0..0).unwrap());
    pair.engine.write(&src, &dst, WriteOptions::default()).unwrap().wait(Some(LONG)).unwrap();
    let transfers = [arm(&pair, &watcher, 1, 64, 1), arm(&pair, &watcher, 1, 1 << 20, 1)];
    pair.peer.ask(Ask::Revoke { region: pair.there.idx, timeout: LONG });
    watcher.add(1).unwrap();
    for transfer in &transfers {
        assert_code(transfer.wait(Some(LONG)), Code::Refused);
        transfer.wait_quiesced(Some(LONG)).unwrap();
    }
    assert_fault(pair.peer.wait_count(counter, 1), Code::TransferFailed);
    assert_eq!(pair.peer.mismatch(&pair.there, (0, 1 << 20), 3, 0), None, "written after the revocation");
}

/// Nobody is there to be told that there is no room.
fn fires_beyond_a_full_queue(fabric: &Fabric) {
    let mut pair = Pair::with(fabric, 1 << 20, |settings| {
        settings.queue_depth = 2;
        settings.raise_when_full = true;
    });
    pair.connect(fabric);
    let watcher = pair.engine.watch().unwrap();
    let fresh = pair.peer.region(1 << 20, Memory::Foreign).remote();
    pair.peer.stop();
    let src = pair.region.slice(0..64).unwrap();
    let write = || pair.engine.write(&src, &fresh.slice(0..64).unwrap(), WriteOptions::default());
    let mut transfers = vec![write().unwrap(), write().unwrap()];
    assert_code(write(), Code::QueueFull);
    for value in 1..=3 {
        let dst = fresh.slice(0..64).unwrap();
        transfers.push(watcher.at(value, Operation::Write { src: src.clone(), dst }, None).unwrap());
    }
    watcher.add(3).unwrap();
    assert_code(write(), Code::QueueFull);
    pair.peer.go_on();
    for transfer in &transfers {
        transfer.wait(Some(LONG)).unwrap();
    }
    write().unwrap().wait(Some(LONG)).unwrap();
}

fn deadline_starts_when_it_fires(fabric: &Fabric) {
    const TIMEOUT: Duration = Duration::from_millis(300);
    let mut pair = Pair::with(fabric, 4096, |settings| settings.timeout = TIMEOUT);
    pair.engine.connect(&pair.peer.address, Some(LONG)).unwrap();
    let watcher = pair.engine.watch().unwrap();
    let fresh = pair.peer.region(4096, Memory::Foreign).remote();
    let arm = |value, nbytes| {
        let (src, dst) = (pair.region.slice(0..nbytes).unwrap(), fresh.slice(0..nbytes).unwrap());
        watcher.at(value, Operation::Write { src, dst }, None).unwrap()
    };
    let late = arm(1, 64);
    std::thread::sleep(2 * TIMEOUT);
    assert!(!late.is_done(), "{:?}", late.error());
    pair.peer.stop();
    let began = Instant::now();
    watcher.add(1).unwrap();
    assert_code(late.wait(Some(LONG)), Code::TransferTimeout);
    assert!(began.elapsed() >= TIMEOUT, "ended {:?} after it fired", began.elapsed());
    pair.peer.go_on();
    late.wait_quiesced(Some(LONG)).unwrap();
}

fn fires_at_a_dead_peer(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    let watcher = pair.engine.watch().unwrap();
    let transfer = arm(&pair, &watcher, 1, 64, 1);
    let counter = pair.engine.counter(Some(1), std::slice::from_ref(&pair.peer.address)).unwrap();
    pair.peer.kill();
    assert_code(counter.wait(1, Some(LONG)), Code::PeerLost);
    watcher.add(1).unwrap();
    assert_code(transfer.wait(Some(LONG)), Code::PeerLost);
    let (src, dst) = (pair.region.slice(0..64).unwrap(), pair.remote.slice(0..64).unwrap());
    assert_code(watcher.at(2, Operation::Write { src, dst }, None), Code::PeerLost);
}
