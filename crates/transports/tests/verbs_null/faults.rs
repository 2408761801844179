//! A request or a device that fails: what ends, what goes on, and what is not reported.

use std::collections::HashMap;

use crate::*;

/// One request of many fails, each in turn and with every status: batches end once, other rails go on, and a rail that
/// is made again has all of its room.
pub(crate) fn every_failure_at_every_place() {
    let (mut nic, mut rails, memory) = nic(3);
    let statuses = [
        (4, Fault::Local(4)),
        (10, Fault::Refused),
        (12, Fault::Unanswered),
        (13, Fault::NotReady),
        (21, Fault::Other(21)),
    ];
    for place in 0..60 {
        let (status, fault) = statuses[place % statuses.len()];
        let (mut seen, mut owners) = (Seen::default(), HashMap::new());
        knob(Knob::Holds, Some(1));
        for (token, writes) in (0..30).zip([1, 3, 7, 2, 5].into_iter().cycle()) {
            let rail = rails[token % 3];
            let batch = Batch {
                source: &memory,
                target: TARGET,
                writes: &WRITES[..writes],
                marks: Marks::Each(1),
                token: token as u32,
            };
            assert_eq!(nic.post(rail, &batch), Ok(writes));
            owners.insert(token as u32, rail);
        }
        for rail in &rails {
            nic.flush(*rail).unwrap();
        }
        knob(Knob::FailsAfter, Some(place as i64));
        knob(Knob::Status, Some(status));
        knob(Knob::Holds, Some(0));
        while nic.poll(&mut seen) {}
        let ended = seen.ended();
        assert_eq!(ended.len(), 30, "place {place}");
        let [(broken, why)] = seen.broken[..] else { panic!("place {place}: {:?}", seen.broken) };
        assert_eq!(why, fault);
        let mut failed = false;
        for token in 0..30 {
            let ends = &ended[&token];
            assert_eq!(ends.len(), 1, "batch {token} at place {place}");
            if owners[&token] != broken {
                assert_eq!(ends[0], Ok(()), "another rail's");
            } else {
                assert!(!failed || ends[0].is_err(), "nothing goes well behind the fault");
                failed |= ends[0].is_err();
            }
        }
        assert!(failed);
        let batch = Batch { source: &memory, target: TARGET, writes: &WRITES, marks: Marks::None, token: 99 };
        assert_eq!(nic.post(broken, &batch), Err(fault));
        nic.close(broken);
        let again = rail(&mut nic);
        rails.iter_mut().filter(|rail| **rail == broken).for_each(|rail| *rail = again);
        assert!(rails.iter().all(|rail| nic.room(*rail) == FULL));
    }
}

/// The device refuses a post: what it took is flushed, the rest ends too.
pub(crate) fn what_the_device_does_not_take() {
    let (mut nic, rails, memory) = nic(2);
    let batch =
        |token, writes| Batch { source: &memory, target: TARGET, writes: &WRITES[..writes], marks: Marks::None, token };
    let mut seen = Seen::default();
    assert_eq!(nic.post(rails[0], &batch(1, 3)), Ok(3));
    nic.flush(rails[0]).unwrap();
    knob(Knob::Refuses, Some(1));
    assert_eq!(nic.post(rails[0], &batch(2, 7)), Ok(7), "held back");
    assert_eq!(nic.flush(rails[0]), Err(Fault::Local(libc::ENOMEM as u32)));
    knob(Knob::Refuses, Some(0));
    while nic.poll(&mut seen) {}
    nic.poll(&mut seen);
    assert_eq!(seen.broken, [(rails[0], Fault::Local(12))]);
    assert_eq!(seen.ended()[&1].len() + seen.ended()[&2].len(), 2);
    assert!(seen.ended()[&2][0].is_err());
    assert_eq!(nic.send(rails[0], b"message", 3), Err(Fault::Local(12)));
    assert_eq!(nic.signal(rails[1], 1, 4), Ok(true));
    nic.flush(rails[1]).unwrap();
    while nic.poll(&mut seen) {}
    assert_eq!(seen.ended()[&4], [Ok(())]);

    // A batch of several chains ends wherever the device stops to take it: also when what it took is placed by then, and
    // nothing says so, for only the last was to be announced.
    let many = [WRITES[0]; 100];
    for refused in (1..=100).flat_map(|refused| [(refused, 0), (refused, 1)]) {
        let rail = rail(&mut nic);
        let (mut seen, batch) = (Seen::default(), Batch { writes: &many, ..batch(5, 0) });
        knob(Knob::Refuses, Some(refused.0));
        knob(Knob::IsPrompt, Some(refused.1));
        assert_eq!(nic.post(rail, &batch), Ok(100));
        let _ = nic.flush(rail);
        knob(Knob::Refuses, Some(0));
        while nic.poll(&mut seen) {}
        nic.poll(&mut seen);
        assert_eq!(seen.broken, [(rail, Fault::Local(12))]);
        assert_eq!(seen.ended(), HashMap::from([(5, vec![Err(Fault::Local(12))])]), "request {refused:?} is refused");
        nic.close(rail);
    }
    knob(Knob::IsPrompt, Some(0));
}

/// A rail is closed over what is under way: nothing of it is reported, to whoever has the number next either.
pub(crate) fn held_back_until_closed() {
    let (mut nic, rails, memory) = nic(1);
    let mut seen = Seen::default();
    knob(Knob::Holds, Some(1));
    let mut posted = 0;
    while nic.room(rails[0]) > 0 {
        let batch = Batch { source: &memory, target: TARGET, writes: &WRITES, marks: Marks::Each(1), token: posted };
        posted += nic.post(rails[0], &batch).unwrap() as u32;
    }
    assert_eq!(posted as usize, FULL, "no more than there is room for");
    nic.flush(rails[0]).unwrap();
    nic.poll(&mut seen);
    nic.close(rails[0]);
    knob(Knob::Holds, Some(0));
    let again = rail(&mut nic);
    assert_eq!(again, rails[0], "the number is used again");
    nic.poll(&mut seen);
    assert!(seen.ended().is_empty() && seen.broken.is_empty());
    assert_eq!(nic.room(again), FULL);
    nic.fence(again);
    while nic.poll(&mut seen) {}
    assert!(seen.broken.is_empty(), "whoever fences knows");
}

/// The peer's NIC has said of each that it arrived; its writer was told so. More than one poll takes, of two rails.
pub(crate) fn what_arrived_counts_when_the_rail_is_closed() {
    let (mut nic, rails, _memory) = nic(2);
    // The number of the queue pair for writes, in a rail's address.
    let number = |nic: &VerbsNic, rail| u32::from_le_bytes(nic.address(rail)[22..26].try_into().unwrap());
    let pairs = [number(&nic, rails[0]), number(&nic, rails[1])];
    for imm in 0..200 {
        assert!(arrive(pairs[imm as usize % 2], imm) > 0);
    }
    let mut seen = Seen::default();
    nic.close(rails[0]);
    let again = rail(&mut nic);
    assert_ne!(again, rails[0], "the number rests until its arrivals are told");
    while nic.poll(&mut seen) {}
    assert_eq!(seen.arrived, (0..200).map(|imm| (rails[imm as usize % 2], imm)).collect::<Vec<_>>());
    assert_eq!(rail(&mut nic), rails[0]);
}

/// Nothing can be stopped and nothing is flushed any more. No peer must write for that, and what was posted ends.
pub(crate) fn a_device_that_is_gone_is_fenced_all_the_same() {
    let (mut nic, rails, memory) = nic(1);
    let batch = |token| Batch { source: &memory, target: TARGET, writes: &WRITES, marks: Marks::None, token };
    let number = u32::from_le_bytes(nic.address(rails[0])[22..26].try_into().unwrap());
    let mut seen = Seen::default();
    knob(Knob::IsGone, Some(1));
    nic.post(rails[0], &batch(1)).unwrap();
    nic.flush(rails[0]).unwrap();
    nic.send(rails[0], b"message", 2).unwrap();
    nic.fence(rails[0]);
    assert_eq!(arrive(number, 1), -1, "there is no queue pair for it");
    nic.poll(&mut seen);
    assert_eq!(seen.ended(), HashMap::from([1, 2].map(|token| (token, vec![Err(Fault::Flushed)]))));
    assert_eq!(nic.post(rails[0], &batch(3)), Err(Fault::Flushed));
    nic.close(rails[0]);
    knob(Knob::IsGone, Some(0));
    let again = rail(&mut nic);
    assert_eq!((again, nic.room(again)), (rails[0], FULL));
}

/// A device that neither stops nor destroys a queue pair may carry out what that has for as long as it is open: it never
/// ends, and nothing of it is used for another. Others are not touched.
pub(crate) fn a_queue_pair_that_is_kept() {
    for (is_gone, error, stops) in
        [(0, libc::EBUSY, true), (1, libc::EIO, true), (1, libc::EBUSY, false), (1, libc::EINVAL, false)]
    {
        let (mut nic, rails, memory) = nic(2);
        let batch = |token| Batch { source: &memory, target: TARGET, writes: &WRITES, marks: Marks::None, token };
        let mut seen = Seen::default();
        knob(Knob::Holds, Some(1));
        nic.post(rails[0], &batch(1)).unwrap();
        nic.flush(rails[0]).unwrap();
        nic.send(rails[0], b"message", 2).unwrap();
        knob(Knob::IsGone, Some(is_gone));
        knob(Knob::KeepsQueuePairs, Some(error.into()));
        assert_eq!(nic.fence(rails[0]), stops, "error {error}");
        knob(Knob::Holds, Some(0));
        (0..5).for_each(|_| _ = nic.poll(&mut seen));
        assert_eq!(seen.ended().len(), if stops { 2 } else { 0 }, "error {error}");
        assert_eq!(nic.post(rails[0], &batch(3)), Err(Fault::Flushed));
        assert_eq!(nic.fence(rails[0]), stops, "asked again");
        assert_eq!(nic.close(rails[0]), stops, "error {error}");
        knob(Knob::KeepsQueuePairs, Some(0));
        knob(Knob::IsGone, Some(0));
        let again = rail(&mut nic);
        assert_eq!((again == rails[0], nic.room(again)), (stops, FULL));
        for token in 10..200 {
            for rail in [again, rails[1]] {
                assert_eq!(nic.post(rail, &batch(token)), Ok(WRITES.len()));
                nic.flush(rail).unwrap();
                assert_eq!(nic.send(rail, b"message", 1000 + token), Ok(true));
            }
            (0..5).for_each(|_| _ = nic.poll(&mut seen));
        }
        assert_eq!(seen.ended().len(), if stops { 382 } else { 380 }, "error {error}");
        assert!(nic.close(again) && nic.close(rails[1]));
    }
}

/// Completions of nothing, twice, of other kinds and from the future: nothing ends twice, and nobody is stuck.
pub(crate) fn a_nic_that_talks_nonsense() {
    let (mut nic, mut rails, memory) = nic(3);
    let mut state = 7_u64;
    let mut random = move |end: u64| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 33) % end
    };
    for round in 0..300 {
        let mut seen = Seen::default();
        knob(Knob::Holds, Some(1));
        let mut posted = 0;
        for token in 0..30 {
            let rail = rails[random(3) as usize];
            let batch = Batch { source: &memory, target: TARGET, writes: &WRITES, marks: Marks::Each(1), token };
            posted += u32::from(matches!(nic.post(rail, &batch), Ok(1..)));
            posted += u32::from(nic.send(rail, b"message", 100 + token) == Ok(true));
        }
        for rail in &rails {
            let _ = nic.flush(*rail);
        }
        for _ in 0..random(40) {
            let life = random(3) + if random(2) == 0 { 0 } else { random(256) };
            let low = if random(8) == 0 { random(1 << 32) } else { random(300) };
            let id = random(4) << 56 | life << 48 | random(4) << 32 | low;
            let status = if round % 2 == 0 { 0 } else { random(30) };
            let at = if random(2) == 0 { WRITES_AT } else { MESSAGES_AT };
            let pair = number(&nic, rails[random(3) as usize], at);
            (0..=random(2)).for_each(|_| say(pair, id, status as u32, random(1 << 32) as u32));
        }
        nic.poll(&mut seen);
        knob(Knob::Holds, Some(0));
        while nic.poll(&mut seen) {}
        nic.poll(&mut seen);
        assert_eq!(seen.ended().len() as u32, posted);
        assert!(seen.ended().values().all(|ends| ends.len() == 1), "{:?}", seen.ended());
        for rail_idx in &mut rails {
            if random(4) == 0 || seen.broken.iter().any(|(broken, _)| broken == rail_idx) {
                nic.close(*rail_idx);
                *rail_idx = rail(&mut nic);
            }
            assert_eq!(nic.room(*rail_idx), FULL);
        }
    }
}
