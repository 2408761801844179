//! Semantic 1: no order between operations, and an immediate is counted only after its bytes are visible.

use std::sync::atomic::{fence, Ordering};
use std::time::Instant;

use crate::ask::{Ask, How};
use crate::fabric::{on_every_fabric, random, Fabric};
use crate::harness::{eventually, Pair, LONG};
use crate::pattern;

on_every_fabric!(bytes_are_there_when_counted, no_more_is_counted_than_placed, each_imm_counts_for_itself);

/// The receiver spins on the count and looks at the bytes at once, the last first.
fn bytes_are_there_when_counted(fabric: &Fabric) {
    const BYTES: u64 = 2 << 20;
    let mut random = random();
    let mut pair = Pair::connected(fabric, BYTES);
    let counter = pair.engine.counter(Some(1), &[]).unwrap();
    let to = pair.region.descriptor().unwrap().encode();
    // Soft-RoCE is emulated, and takes longer for fifty than others for all.
    let num_rounds = if fabric.transport == "verbs" { 50 } else { 250 };
    for round in 1..=num_rounds {
        // Mostly such as the writing thread carries out itself, now and then one that takes several turns.
        let nbytes = if round % 10 == 0 { BYTES } else { (100 << 10) + random.below(28 << 10) };
        let mut expected = [0; 8];
        pattern::fill(&mut expected, round, nbytes - 8);
        let last = pair.bytes()[nbytes as usize - 8..].as_ptr().cast::<[u8; 8]>();
        pair.peer.fill(&pair.there, (0, nbytes), round);
        let (to, how) = (to.clone(), How::counted(1));
        pair.peer.tell(&Ask::Write { region: pair.there.idx, at: 0, nbytes, to, to_at: 0, how });
        let until = Instant::now() + LONG;
        while counter.value() < round {
            assert!(Instant::now() < until, "not counted within {LONG:?}");
        }
        // SAFETY: inside the region; at once, before anything else takes time.
        let seen = unsafe { last.read_volatile() };
        assert_eq!(seen, expected, "round {round}: the last bytes");
        assert_eq!(pattern::mismatch(&pair.bytes()[..nbytes as usize], round, 0), None, "round {round}");
        pair.peer.answer();
    }
}

/// Pages keep coming while another thread polls the count: at no time more is counted than placed.
fn no_more_is_counted_than_placed(fabric: &Fabric) {
    const PAGE: u64 = 1024;
    const PAGES: u32 = 3200;
    let mut random = random();
    let mut pair = Pair::connected(fabric, PAGE * u64::from(PAGES));
    pair.peer.fill(&pair.there, (0, PAGE * u64::from(PAGES)), 7);
    let counter = pair.engine.counter(Some(2), &[]).unwrap();
    let region = pair.region.as_ptr() as usize;
    let placed = move || {
        (0..PAGES as usize)
            .filter(|page| {
                let last = (region + (page + 1) * PAGE as usize - 8) as *const u64;
                // SAFETY: aligned, inside the region, which the test keeps; the pattern there is never zero.
                unsafe { last.read_volatile() != 0 }
            })
            .count() as u64
    };
    std::thread::scope(|scope| {
        let poll = scope.spawn(|| {
            let (mut before, until) = (0, Instant::now() + LONG);
            while before < u64::from(PAGES) && Instant::now() < until {
                let counted = counter.value();
                fence(Ordering::Acquire);
                let placed = placed();
                assert!(counted <= placed, "{counted} pages counted, {placed} placed");
                assert!(counted >= before, "the count fell from {before} to {counted}");
                before = counted;
            }
            before
        });
        let mut pages: Vec<u32> = (0..PAGES).collect();
        random.shuffle(&mut pages);
        let mut transfers = Vec::new();
        for chunk in pages.chunks(64) {
            let written = (&pair.region, chunk.to_vec());
            let peer = &mut pair.peer;
            transfers.push(peer.write_pages(&pair.there, chunk.to_vec(), written, PAGE, How::counted(2)).unwrap());
        }
        for transfer in transfers {
            pair.peer.wait(transfer).unwrap();
        }
        assert_eq!(poll.join().unwrap(), u64::from(PAGES));
    });
    assert_eq!(pattern::mismatch(pair.bytes(), 7, 0), None);
}

/// Writes with an immediate each, waited for in another order than they were submitted in.
fn each_imm_counts_for_itself(fabric: &Fabric) {
    const SLOT: u64 = 40_000;
    const SLOTS: u64 = 100;
    let mut random = random();
    let mut pair = Pair::connected(fabric, SLOT * SLOTS);
    pair.peer.fill(&pair.there, (0, SLOT * SLOTS), 9);
    let mut order: Vec<u64> = (0..SLOTS).collect();
    random.shuffle(&mut order);
    for &slot in &order {
        let nbytes = 1 + random.below(SLOT);
        let (range, how) = ((slot * SLOT, nbytes), How::counted(slot as u32));
        pair.peer.write(&pair.there, range, &pair.region, slot * SLOT, how).unwrap();
    }
    random.shuffle(&mut order);
    for slot in order {
        let counter = pair.engine.counter(Some(slot as u32), &[]).unwrap();
        counter.wait(1, Some(LONG)).unwrap();
        let first = pair.bytes()[(slot * SLOT) as usize];
        assert_eq!(pattern::mismatch(&[first], 9, slot * SLOT), None, "slot {slot}");
    }
    eventually("nothing is counted twice", || pair.engine.counter(Some(0), &[]).unwrap().value() == 0);
}
