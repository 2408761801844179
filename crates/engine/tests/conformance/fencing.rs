//! Semantic 7: fencing is awaited, never assumed.

use std::cell::UnsafeCell;
use std::sync::Arc;
use std::time::Duration;

use anyfabric_engine::{Code, Engine, WriteOptions};

use crate::ask::{Answer, Ask, How};
use crate::fabric::{on_every_fabric, on_fabrics, random, Fabric};
use crate::harness::{assert_code, assert_fault, bytes, eventually, fill, Pair, LONG};
use crate::pattern;

on_every_fabric!(
    revoked_is_refused,
    revoked_before_it_was_met,
    revoked_under_load,
    new_right_outlives_the_old,
    registered_twice,
    stopped_in_the_middle,
    quarantined_until_exit,
    source_is_held,
    closed_under_load,
    writer_outlives_the_engine,
);

/// Different numbers of NICs.
mod uneven {
    use super::*;

    on_fabrics! { [revoked_under_load] [verbs_4_2 VERBS_4_2, verbs_1_3 VERBS_1_3] }
}

fn revoked_is_refused(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 1 << 20);
    let old = pair.region.descriptor().unwrap().encode();
    let write = |pair: &mut Pair, to: &[u8], nbytes: u64| {
        let (region, how) = (pair.there.idx, How { timeout: Some(LONG), ..How::counted(1) });
        match pair.peer.ask(Ask::Write { region, at: 0, nbytes, to: to.to_vec(), to_at: 0, how }) {
            Answer::Id(transfer) => pair.peer.wait(transfer),
            Answer::Failed(fault) => Err(fault),
            other => panic!("unexpected answer {other:?}"),
        }
    };
    write(&mut pair, &old, 8).unwrap();
    for nbytes in [8, 200_000] {
        pair.region.revoke(None, LONG).unwrap();
        fill(&pair.region, 2);
        let fault = write(&mut pair, &old, nbytes).unwrap_err();
        assert_eq!(fault.code, Code::Refused.as_str(), "{}", fault.message);
        assert_eq!(pattern::mismatch(pair.bytes(), 2, 0), None, "written after the revocation");
        // A new descriptor is a new right.
        let new = pair.region.descriptor().unwrap().encode();
        assert_ne!(new, old);
        write(&mut pair, &new, nbytes).unwrap();
        assert_eq!(pattern::mismatch(&pair.bytes()[..8], 2, 0), Some(0));
    }
    // For one peer, by name.
    pair.region.revoke(Some(&pair.peer.address), LONG).unwrap();
    pair.region.close(LONG);
    assert_code(pair.region.revoke(None, LONG), Code::Closed);
    assert_code(pair.region.descriptor(), Code::Closed);
    let fault = write(&mut pair, &old, 8).unwrap_err();
    assert_eq!(fault.code, Code::Refused.as_str(), "{}", fault.message);
}

/// A right that was given out is taken back from somebody who has not used it yet, by name or with everybody's.
fn revoked_before_it_was_met(fabric: &Fabric) {
    for by_name in [true, false] {
        let mut pair = Pair::new(fabric, 4096);
        let to = pair.region.descriptor().unwrap().encode();
        pair.region.revoke(by_name.then_some(&pair.peer.address), LONG).unwrap();
        let (region, how) = (pair.there.idx, How { timeout: Some(LONG), ..How::counted(1) });
        let written = match pair.peer.ask(Ask::Write { region, at: 0, nbytes: 64, to, to_at: 0, how }) {
            Answer::Id(transfer) => pair.peer.wait(transfer),
            Answer::Failed(fault) => Err(fault),
            other => panic!("unexpected answer {other:?}"),
        };
        assert_fault(written, Code::Refused);
        let transfer = pair.peer.write(&pair.there, (0, 64), &pair.region, 0, how).unwrap();
        pair.peer.wait(transfer).unwrap();
    }
}

/// Threads of the peer write as fast as they can; whenever a revocation returns, nothing changes any more.
fn revoked_under_load(fabric: &Fabric) {
    const BYTES: u64 = 120 << 10;
    let mut pair = Pair::connected(fabric, BYTES);
    pair.peer.fill(&pair.there, (0, BYTES), 1);
    for round in 0..40 {
        let to = pair.region.descriptor().unwrap().encode();
        let counter = pair.engine.counter(Some(round), &[]).unwrap();
        let (region, imm) = (pair.there.idx, Some(round));
        pair.peer.ask(Ask::Hammer { region, nbytes: BYTES, to, to_at: 0, imm, num_threads: 3 });
        counter.wait(5, Some(LONG)).unwrap();
        pair.region.revoke(None, LONG).unwrap();
        fill(&pair.region, 2);
        for _ in 0..20 {
            std::thread::sleep(Duration::from_micros(100));
            assert_eq!(pattern::mismatch(pair.bytes(), 2, 0), None, "round {round}: written after the revocation");
        }
        assert!(pair.peer.count(Ask::HammerEnd) > 0);
    }
}

/// A writer that was stopped hears of a revocation, which nobody waits for any more, and of a new descriptor in any
/// order: the new right stays.
fn new_right_outlives_the_old(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    let counter = pair.engine.counter(Some(1), &[]).unwrap();
    let write = |pair: &Pair| {
        let (to, how) = (pair.region.descriptor().unwrap().encode(), How { timeout: Some(LONG), ..How::counted(1) });
        Ask::Write { region: pair.there.idx, at: 0, nbytes: 64, to, to_at: 0, how }
    };
    let written = |pair: &mut Pair, answer: Answer| match answer {
        Answer::Id(transfer) => pair.peer.wait(transfer),
        Answer::Failed(fault) => Err(fault),
        other => panic!("unexpected answer {other:?}"),
    };
    for round in 0..30 {
        let first = write(&pair);
        let answer = pair.peer.ask(first);
        written(&mut pair, answer).unwrap();
        pair.peer.stop();
        let revoked = pair.region.revoke(None, Duration::from_millis(5));
        if fabric.writer_places() {
            assert_code(revoked, Code::WaitTimeout);
        } else {
            revoked.unwrap();
        }
        let second = write(&pair);
        pair.peer.tell(&second);
        pair.peer.go_on();
        // Where its rails were stopped under it, it waits until they are made again.
        let answer = pair.peer.answer();
        written(&mut pair, answer).unwrap_or_else(|fault| panic!("round {round}: {fault:?}"));
        assert!(pair.region.wait_fenced(None, LONG), "round {round}: the old right is still held");
    }
    counter.wait(60, Some(LONG)).unwrap();
}

/// Two regions over the same bytes are two rights: what becomes of one is nothing to the other.
fn registered_twice(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    let memory = Arc::new(Shared(UnsafeCell::new([0; 4096])));
    let register = || {
        let owner = Box::new(Arc::clone(&memory));
        // SAFETY: the array is on the heap, where each region's owner keeps it.
        unsafe { pair.engine.register(memory.0.get().cast(), 4096, true, owner) }.unwrap()
    };
    let (first, second, third) = (register(), register(), register());
    let to: Vec<_> = [&first, &second, &third].map(|region| region.descriptor().unwrap().encode()).into();
    let counter = pair.engine.counter(Some(1), &[]).unwrap();
    // What is refused is not counted: it would fail the counter, sooner or later.
    let mut write = |idx: usize, how: How| {
        let (region, how) = (pair.there.idx, How { timeout: Some(LONG), ..how });
        match pair.peer.ask(Ask::Write { region, at: 0, nbytes: 4096, to: to[idx].clone(), to_at: 0, how }) {
            Answer::Id(transfer) => pair.peer.wait(transfer),
            Answer::Failed(fault) => Err(fault),
            other => panic!("unexpected answer {other:?}"),
        }
    };
    (0..3).for_each(|idx| write(idx, How::counted(1)).unwrap());
    first.close(LONG);
    second.revoke(None, LONG).unwrap();
    for idx in 0..2 {
        assert_fault(write(idx, How::default()), Code::Refused);
    }
    write(2, How::counted(1)).unwrap();
    drop(first);
    drop(second);
    write(2, How::counted(1)).unwrap();
    counter.wait(5, Some(LONG)).unwrap();
    third.close(LONG);
    assert_fault(write(2, How::default()), Code::Refused);
    assert_eq!(counter.value(), 5);
    drop((third, counter));
    assert_eq!(Arc::strong_count(&memory), 1, "somebody still holds the memory");
}

/// Memory of several regions.
struct Shared(UnsafeCell<[u8; 4096]>);

// SAFETY: it is touched through the regions only, where races are part of what is tested.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// The writer is stopped in the middle of a copy. What its fabric can fence without it is released at once; elsewhere
/// the revocation times out, and only after the writer has gone on and answered the bytes are ours again.
fn stopped_in_the_middle(fabric: &Fabric) {
    const BYTES: u64 = 16 << 20;
    let mut random = random();
    let mut pair = Pair::connected(fabric, BYTES);
    pair.peer.fill(&pair.there, (0, BYTES), 1);
    for round in 0..3 {
        let to = pair.region.descriptor().unwrap().encode();
        let counter = pair.engine.counter(Some(round), &[]).unwrap();
        let (region, imm) = (pair.there.idx, Some(round));
        pair.peer.ask(Ask::Hammer { region, nbytes: BYTES, to, to_at: 0, imm, num_threads: 1 });
        counter.wait(1, Some(LONG)).unwrap();
        std::thread::sleep(Duration::from_micros(random.below(20_000)));
        pair.peer.stop();
        let revoked = pair.region.revoke(None, Duration::from_millis(200));
        if fabric.writer_places() {
            assert_code(revoked, Code::WaitTimeout);
            pair.peer.go_on();
            pair.region.revoke(None, LONG).unwrap();
            fill(&pair.region, 2);
        } else {
            revoked.unwrap();
            fill(&pair.region, 2);
            pair.peer.go_on();
        }
        // The writer goes on, and finds its write refused.
        pair.peer.count(Ask::HammerEnd);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(pattern::mismatch(pair.bytes(), 2, 0), None, "round {round}: written after the revocation");
    }
}

/// A writer that is lost but lives may still touch the bytes: they are listed and kept until it has exited.
fn quarantined_until_exit(fabric: &Fabric) {
    const BYTES: u64 = 8 << 20;
    let mut pair = Pair::with(fabric, BYTES, |settings| {
        // Longer than a busy machine keeps a thread waiting.
        (settings.heartbeat, settings.heartbeats_lost) = (Duration::from_millis(100), 20);
    });
    pair.connect(fabric);
    pair.peer.fill(&pair.there, (0, BYTES), 1);
    let to = pair.region.descriptor().unwrap().encode();
    let counter = pair.engine.counter(Some(1), std::slice::from_ref(&pair.peer.address)).unwrap();
    let region = pair.there.idx;
    pair.peer.ask(Ask::Hammer { region, nbytes: BYTES, to, to_at: 0, imm: Some(1), num_threads: 2 });
    counter.wait(3, Some(LONG)).unwrap();
    pair.peer.stop();
    assert_code(counter.wait(u64::MAX, Some(LONG)), Code::PeerLost);
    let (id, peer) = (pair.region.id(), pair.peer.address.to_string());
    pair.region.close(Duration::from_millis(100));
    drop(pair.region);
    let quarantine = pair.engine.info().quarantine;
    if fabric.writer_places() {
        assert_eq!(quarantine.len(), 1, "{quarantine:?}");
        assert_eq!((quarantine[0].region, quarantine[0].nbytes, &quarantine[0].peer), (id, BYTES, &peer));
    } else {
        assert!(quarantine.is_empty(), "{quarantine:?}");
    }
    // What is handed out now is none of those bytes.
    let reused: Vec<_> = (0..4).map(|_| fabric.region(&pair.engine, BYTES)).collect();
    reused.iter().for_each(|region| fill(region, 5));
    pair.peer.go_on();
    std::thread::sleep(Duration::from_millis(300));
    for region in &reused {
        assert_eq!(pattern::mismatch(bytes(region), 5, 0), None, "the lost writer wrote into what was reused");
    }
    let listed = !pair.engine.info().quarantine.is_empty();
    assert_eq!(listed, fabric.writer_places(), "it lives: {listed}");
    pair.peer.kill();
    eventually("its exit releases the bytes", || pair.engine.info().quarantine.is_empty());
}

/// A failed transfer may still read its source: closing the region keeps the memory until it has quiesced.
fn source_is_held(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    let there = pair.peer.region(32 << 20, fabric.memory);
    let source = fabric.region(&pair.engine, 32 << 20);
    fill(&source, 1);
    pair.peer.stop();
    let (src, dst) = (source.slice(0..32 << 20).unwrap(), there.remote().slice(0..32 << 20).unwrap());
    let options = WriteOptions { timeout: Some(Duration::from_millis(50)), ..WriteOptions::default() };
    let transfer = pair.engine.write(&src, &dst, options).unwrap();
    assert_code(transfer.wait(None), Code::TransferTimeout);
    drop((src, source));
    // Whoever frees too early finds these bytes in the peer's region.
    let other = fabric.region(&pair.engine, 32 << 20);
    fill(&other, 9);
    pair.peer.go_on();
    transfer.wait_quiesced(Some(LONG)).unwrap();
    let there = pair.peer.read(&there, 0, 4096);
    assert!(
        there.iter().all(|byte| *byte == 0) || pattern::mismatch(&there, 1, 0).is_none(),
        "bytes of a freed source arrived"
    );
}

fn closed_under_load(fabric: &Fabric) {
    const BYTES: u64 = 1 << 20;
    let mut pair = Pair::connected(fabric, 4096);
    let source = pair.peer.region(BYTES, fabric.memory);
    pair.peer.fill(&source, (0, BYTES), 1);
    for round in 0..10 {
        let region = fabric.region(&pair.engine, BYTES);
        let to = region.descriptor().unwrap().encode();
        let counter = pair.engine.counter(Some(round), &[]).unwrap();
        let imm = Some(round);
        pair.peer.ask(Ask::Hammer { region: source.idx, nbytes: BYTES, to, to_at: 0, imm, num_threads: 2 });
        counter.wait(2, Some(LONG)).unwrap();
        std::thread::scope(|scope| {
            // Every other time this close is the second one, while the first is under way.
            if round % 2 == 1 {
                scope.spawn(|| region.close(LONG));
                while !region.is_closed() {
                    std::hint::spin_loop();
                }
            }
            region.close(LONG);
            fill(&region, 2);
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(pattern::mismatch(bytes(&region), 2, 0), None, "round {round}: written after the close");
        });
        assert!(pair.engine.info().quarantine.is_empty());
        pair.peer.count(Ask::HammerEnd);
    }
}

/// The end of an engine gives nothing back that a writer can still touch.
fn writer_outlives_the_engine(fabric: &Fabric) {
    const BYTES: u64 = 8 << 20;
    for stops in [false, true] {
        let mut pair = Pair::connected(fabric, 4096);
        let source = pair.peer.region(BYTES, fabric.memory);
        pair.peer.fill(&source, (0, BYTES), 1);
        // Never freed, so that whoever writes too late is seen.
        let memory: &'static mut [u8] = Box::leak(vec![0; BYTES as usize].into_boxed_slice());
        let owner = Arc::new(());
        let address = memory.as_mut_ptr();
        // SAFETY: never freed.
        let region = unsafe { pair.engine.register(address, BYTES, true, Box::new(Arc::clone(&owner))) }.unwrap();
        let to = region.descriptor().unwrap().encode();
        let counter = pair.engine.counter(Some(1), &[]).unwrap();
        pair.peer.ask(Ask::Hammer { region: source.idx, nbytes: BYTES, to, to_at: 0, imm: Some(1), num_threads: 2 });
        counter.wait(3, Some(LONG)).unwrap();
        if stops {
            pair.peer.stop();
        }
        pair.engine.close(Duration::from_millis(100));
        drop((counter, region, pair.region, pair.engine));
        let is_free = Arc::strong_count(&owner) == 1;
        // SAFETY: the leaked memory.
        let memory = unsafe { std::slice::from_raw_parts_mut(address, BYTES as usize) };
        pattern::fill(memory, 5, 0);
        if stops {
            pair.peer.go_on();
        }
        std::thread::sleep(Duration::from_millis(300));
        let touched = pattern::mismatch(memory, 5, 0);
        assert!(!is_free || touched.is_none(), "stops {stops}: written at {touched:?} after the memory was given back");
        if stops {
            assert_eq!(is_free, !fabric.writer_places());
        }
        pair.peer.kill();
        eventually("an engine that comes finds that the writer is gone", || {
            drop(Engine::new(fabric.here().config()).unwrap());
            Arc::strong_count(&owner) == 1
        });
    }
}
