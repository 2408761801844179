//! Semantic 3: early arrivals are kept, up to a bound; late ones are never counted for the next request.

use anyfabric_engine::{Code, Imm};

use crate::ask::{Answer, Ask, How, Memory};
use crate::fabric::{on_every_fabric, Fabric};
use crate::harness::{assert_code, assert_fault, eventually, Pair, LONG};

on_every_fabric!(
    kept_until_a_counter_opens,
    bounded_by_peer,
    what_was_not_kept_is_not_waited_for,
    late_arrivals_count_for_nobody,
    late_arrivals_of_the_users_count_for_the_next,
    imms_are_checked,
);

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
        // The first time exactly as many as are kept: beyond that nothing is ordered.
        let flood = Ask::Flood { region: pair.there.idx, to: to.clone(), first_imm: next, num_imms: bound };
        next += bound;
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

/// Beyond the bound an arrival is dropped. Its writer may think that it went well; whoever opens a counter for it
/// later is told, and waits for nothing.
fn what_was_not_kept_is_not_waited_for(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 4096);
    let bound = pair.engine.info().limits["early_imms_per_peer"] as u32;
    let to = pair.region.descriptor().unwrap().encode();
    let flood = Ask::Flood { region: pair.there.idx, to, first_imm: 0, num_imms: 2 * bound };
    let went_well = match pair.peer.ask(flood) {
        Answer::Flooded(went_well, _) => went_well.min(2 * bound),
        other => panic!("unexpected answer {other:?}"),
    };
    // Everything before it has come, on every fabric that reports a write before it is counted.
    pair.peer.send(pair.engine.address(), b"that was all").unwrap();
    pair.engine.receive(Some(LONG)).unwrap();
    let mut num_dropped = 0;
    for imm in 0..went_well {
        let counter = pair.engine.counter(Some(imm), &[]).unwrap();
        if let Err(error) = counter.wait(1, Some(LONG)) {
            num_dropped += 1;
            assert_eq!((error.code, counter.value()), (Code::TransferFailed, 0), "imm {imm}: {error}");
            assert_eq!(error.context.peer, Some(pair.peer.address.to_string()), "{error}");
            assert!(error.message.contains(&format!("imm {imm} ")), "{error}");
        }
    }
    println!("{went_well} went well, {num_dropped} were dropped");
    // A stream refuses what it does not keep, so what went well was kept. Elsewhere nobody could say no.
    assert_eq!(num_dropped, went_well - bound, "of {went_well} that went well");
    // With its counter a failure is given away: the imm is as good as new.
    let counter = pair.engine.counter(Some(went_well - 1), &[]).unwrap();
    eventually("the writer may go on", || {
        match pair.peer.write(&pair.there, (0, 8), &pair.region, 0, How::counted(went_well - 1)) {
            Ok(transfer) => pair.peer.wait(transfer).is_ok(),
            Err(_) => false,
        }
    });
    counter.wait(1, Some(LONG)).unwrap();
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

/// Unlike those of the engine's own: it cannot know what the user means by an imm.
fn late_arrivals_of_the_users_count_for_the_next(fabric: &Fabric) {
    let mut pair = Pair::connected(fabric, 1 << 20);
    let fresh = pair.peer.region(1 << 20, Memory::Foreign);
    let counter = pair.engine.counter(Some(3), std::slice::from_ref(&pair.peer.address)).unwrap();
    pair.peer.stop();
    pair.peer.tell(&Ask::Write {
        region: fresh.idx,
        at: 0,
        nbytes: 1 << 20,
        to: pair.region.descriptor().unwrap().encode(),
        to_at: 0,
        how: How::counted(3),
    });
    counter.close();
    pair.peer.go_on();
    assert!(matches!(pair.peer.answer(), Answer::Id(_)));
    let next = pair.engine.counter(Some(3), &[]).unwrap();
    next.wait(1, Some(LONG)).unwrap();
    assert_eq!(next.value(), 1);
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
