//! Semantic 3: early arrivals are kept, up to a bound; late ones are never counted for the next request.

use anyfabric_engine::{Code, Imm};

use crate::ask::{Answer, Ask, How};
use crate::fabric::{on_every_fabric, Fabric};
use crate::harness::{assert_code, assert_fault, eventually, Pair, LONG};

on_every_fabric!(kept_until_a_counter_opens, bounded_by_peer, late_arrivals_count_for_nobody, imms_are_checked);

fn kept_until_a_counter_opens(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    for imm in [3, 3, 4, 3, (1 << 29) - 1] {
        let transfer = pair.peer.write(&pair.there, (0, 8), &pair.region, 0, How::counted(imm)).unwrap();
        pair.peer.wait(transfer).unwrap();
    }
    for (imm, n) in [(3, 3), (4, 1), ((1 << 29) - 1, 1)] {
        let counter = pair.engine.counter(Some(imm), &[]).unwrap();
        counter.wait(n, Some(LONG)).unwrap();
        assert_eq!(counter.value(), n, "imm {imm}");
    }
    // A counter that was closed has given its count away.
    assert_eq!(pair.engine.counter(Some(3), &[]).unwrap().value(), 0);
}

fn bounded_by_peer(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    let bound = pair.engine.info().limits["early_imms_per_peer"] as u32;
    let to = pair.region.descriptor().unwrap().encode();
    let mut next = 0;
    // The notice may take a moment where the writer places the bytes: it is told, not asked.
    eventually("the writer is told that no more is kept", || {
        let flood = Ask::Flood { region: pair.there.idx, to: to.clone(), first_imm: next, num_imms: bound + 10 };
        next += bound + 10;
        match pair.peer.ask(flood) {
            Answer::Flooded(_, Some(fault)) => {
                assert_fault::<()>(Err(fault), Code::ResourceExhausted);
                true
            }
            Answer::Flooded(_, None) => next > 100 * bound,
            other => panic!("unexpected answer {other:?}"),
        }
    });
    // The bound is that peer's alone, and what was kept is not lost.
    let counters: Vec<_> = (0..bound).map(|imm| pair.engine.counter(Some(imm), &[]).unwrap()).collect();
    for counter in &counters {
        counter.wait(1, Some(LONG)).unwrap();
    }
    // With room again the writer goes on.
    eventually("the writer may go on", || {
        match pair.peer.write(&pair.there, (0, 8), &pair.region, 0, How::counted(5)) {
            Ok(transfer) => pair.peer.wait(transfer).is_ok(),
            Err(_) => false,
        }
    });
    counters[5].wait(2, Some(LONG)).unwrap();
}

fn late_arrivals_count_for_nobody(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    let mut seen = Vec::new();
    for round in 0..20 {
        let counter = pair.engine.counter(None, std::slice::from_ref(&pair.peer.address)).unwrap();
        let imm = counter.imm().value();
        assert!(imm >= Imm::FIRST_OF_ENGINE, "imm {imm} is the user's");
        assert!(!seen.contains(&imm), "imm {imm} is handed out again");
        assert_eq!(counter.value(), 0, "round {round}: something late was counted");
        let transfer = pair.peer.write(&pair.there, (0, 8), &pair.region, 0, How::counted(imm)).unwrap();
        pair.peer.wait(transfer).unwrap();
        counter.wait(1, Some(LONG)).unwrap();
        counter.close();
        assert_code(counter.wait(2, Some(LONG)), Code::Closed);
        // Late: nobody waits for it any more.
        let transfer = pair.peer.write(&pair.there, (0, 8), &pair.region, 0, How::counted(imm)).unwrap();
        pair.peer.wait(transfer).unwrap();
        seen.push(imm);
    }
}

fn imms_are_checked(fabric: &Fabric) {
    let pair = Pair::new(fabric, 4096);
    assert_code(pair.engine.counter(Some(Imm::FIRST_OF_ENGINE), &[]), Code::InvalidArgument);
    assert_code(pair.engine.counter(Some(u32::MAX), &[]), Code::InvalidArgument);
    let open = pair.engine.counter(Some(1), &[]).unwrap();
    assert_code(pair.engine.counter(Some(1), &[]), Code::InvalidArgument);
    drop(open);
    drop(pair.engine.counter(Some(1), &[]).unwrap());
    let (src, dst) = (pair.region.slice(0..8).unwrap(), pair.remote.slice(0..8).unwrap());
    let options = anyfabric_engine::WriteOptions::counted(Imm::COUNT);
    assert_code(pair.engine.write(&src, &dst, options), Code::InvalidArgument);
    assert_code(pair.engine.barrier(std::slice::from_ref(&pair.peer.address), Imm::COUNT, None), Code::InvalidArgument);
}
