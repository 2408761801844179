//! What is told of a queue as a whole, by the queue or by the device.

use crate::*;

/// What had arrived may be lost: who waits for a count must not do so for ever. The NIC goes on with other queues.
pub(crate) fn a_queue_that_breaks_ends_every_rail_and_is_renewed() {
    let (mut nic, mut rails, memory) = nic(3);
    let batch = |token| Batch { source: &memory, target: TARGET, writes: &WRITES, marks: Marks::Each(1), token };
    let missed = Fault::Missed(2);
    for round in 0..3 {
        let mut seen = Seen::default();
        let number = u32::from_le_bytes(nic.address(rails[1])[22..26].try_into().unwrap());
        for token in 0..30 {
            let rail = rails[token as usize % 2];
            assert!(nic.post(rail, &batch(token)).unwrap() == 7 && nic.send(rail, b"message", 100 + token).unwrap());
        }
        // Held back for a rail, and of one that has failed by itself before.
        rails.iter().take(round).for_each(|rail| nic.flush(*rail).unwrap());
        assert!(arrive(number, 1) > 0);
        if round == 2 {
            nic.fence(rails[1]);
        }
        knob(Knob::BreaksQueues, Some(1));
        while nic.poll(&mut seen) {}
        seen.broken.sort_unstable_by_key(|(rail, _)| *rail);
        assert_eq!(seen.broken, rails.iter().map(|rail| (*rail, missed)).collect::<Vec<_>>());
        assert_eq!(seen.ended().len(), 60);
        assert!(seen.ended().values().all(|ends| *ends == [Err(missed)]), "{:?}", seen.ended());
        assert!(!nic.poll(&mut seen) && seen.broken.len() == 3, "once");
        assert_eq!(nic.post(rails[0], &batch(200)), Err(missed));
        // One is made before the others are closed.
        nic.close(rails[0]);
        rails[0] = rail(&mut nic);
        for other in &mut rails[1..] {
            nic.close(*other);
            *other = rail(&mut nic);
        }
        assert!(rails.iter().all(|rail| nic.room(*rail) == FULL));
        let number = u32::from_le_bytes(nic.address(rails[1])[22..26].try_into().unwrap());
        assert_eq!(arrive(number, 1), 8191, "all receives are there again");
        assert_eq!(nic.post(rails[1], &batch(201)), Ok(7));
        nic.flush(rails[1]).unwrap();
        let before = seen.broken.len();
        while nic.poll(&mut seen) {}
        assert_eq!(
            (&seen.ended()[&201][..], &seen.arrived[..], seen.broken.len()),
            (&[Ok(())][..], &[(rails[1], 1)][..], before)
        );
    }
}

/// Nobody has looked at the queue when a rail is closed, or stopped: that something may be missing is told all the same.
pub(crate) fn a_broken_queue_is_told_of_a_rail_that_is_closed() {
    let (mut nic, rails, _memory) = nic(3);
    let not_connected = nic.open().unwrap();
    let mut seen = Seen::default();
    knob(Knob::BreaksQueues, Some(1));
    nic.close(rails[0]);
    nic.fence(rails[1]);
    nic.close(rails[2]);
    assert!(nic.open().unwrap_err().to_string().contains("null0: its queues broke"), "nothing was told yet");
    while nic.poll(&mut seen) {}
    seen.broken.sort_unstable_by_key(|(rail, _)| *rail);
    let missed = Fault::Missed(2);
    assert_eq!(seen.broken[..3], [0, 1, 2].map(|idx| (rails[idx], missed)));
    assert_eq!(seen.broken[3..], [(not_connected, Fault::Flushed)], "nothing can have arrived there");
    assert_eq!(nic.open().unwrap(), rails[2], "numbers are free again");
}

/// It says by itself that something failed, and perhaps nothing else does: nothing completes any more. What it says of one
/// port's queues, of two of the device, is not the other's.
pub(crate) fn what_a_device_announces() {
    const CQ_ERR: u32 = 0;
    const SRQ_ERR: u32 = 14;
    const DEVICE_FATAL: u32 = 8;
    let names = ["null8:1".to_owned(), "null8:2".to_owned()];
    let mut nics = open(NicChoice::Named(&names), &settings()).unwrap();
    let mut nic = nics.remove(0);
    let mut other = nics.remove(0);
    let ports = [nic.port(), other.port()];
    let others = rail(&mut other);
    let mut bytes = [0_u8; 64];
    // SAFETY: the null NIC touches no memory.
    let memory = unsafe { nic.domain().register(bytes.as_mut_ptr(), 64, true) }.unwrap();
    let number =
        |nic: &VerbsNic, rail, at: usize| u32::from_le_bytes(nic.address(rail)[at..at + 4].try_into().unwrap());
    // Of the queue pairs for writes and for messages.
    for (at, code, faults) in [
        (22, 1, [Some(Fault::Announced(1)), None]),
        (30, 2, [Some(Fault::Announced(2)), None]),
        (22, 3, [Some(Fault::Announced(3)), None]),
        (22, CQ_ERR, [Some(Fault::Missed(CQ_ERR)); 2]),
        (22, SRQ_ERR, [Some(Fault::Announced(SRQ_ERR)); 2]),
        (30, SRQ_ERR, [Some(Fault::Announced(SRQ_ERR)); 2]),
        // Nothing is wrong: it connects, drains, migrates, gets other names, and what no header has yet.
        (22, 4, [None; 2]),
        (22, 16, [None; 2]),
        (0, 11, [None; 2]),
        (0, 18, [None; 2]),
        (0, 99, [None; 2]),
    ] {
        let rails = [rail(&mut nic), rail(&mut nic)];
        let mut seen = Seen::default();
        knob(Knob::Holds, Some(1));
        for token in 0..2 {
            assert_eq!(nic.signal(rails[token as usize], 1, token), Ok(true));
            assert_eq!(nic.send(rails[token as usize], b"message", 2 + token), Ok(true));
        }
        announce(8, if at == 0 { 0 } else { number(&nic, rails[0], at) }, code);
        // Whichever port is looked at first.
        let first = code as usize % 2;
        assert!(ports[first]() && ports[1 - first](), "event {code}");
        nic.heed();
        other.heed();
        nic.poll(&mut seen);
        for idx in 0..2 {
            let broken: Vec<_> =
                seen.broken.iter().filter(|(rail, _)| *rail == rails[idx]).map(|(_, why)| *why).collect();
            assert_eq!(broken, faults[idx].into_iter().collect::<Vec<_>>(), "event {code}");
        }
        knob(Knob::Holds, Some(0));
        while nic.poll(&mut seen) | other.poll(&mut seen) {}
        assert_eq!(seen.ended().len(), 4, "event {code}");
        for (token, ends) in &seen.ended() {
            assert_eq!(ends[..], [faults[*token as usize % 2].map_or(Ok(()), Err)], "event {code}, {token}");
        }
        for rail in rails {
            nic.close(rail);
        }
        assert_eq!(other.room(others), FULL);
        assert_eq!(
            other.post_one(others, &One { source: &memory, target: TARGET, write: &WRITES[0], imm: None, token: 9 }),
            Ok(true)
        );
        while other.poll(&mut seen) {}
        assert_eq!(seen.ended()[&9], [Ok(())]);
        assert_eq!(knob(Knob::NumUnheeded, None), 0, "a queue pair with one cannot be destroyed");
    }
    announce(8, 0, DEVICE_FATAL);
    assert!(!ports[0]() && !ports[1](), "it says so of no port");
    assert!(!ports[0](), "nor does it return");
}

/// What arrives leaves room for what is posted, however short the device's queues are.
pub(crate) fn a_short_queue_of_completions_is_shared() {
    for max_cqe in [1024, 4096, 8320, 20_000] {
        knob(Knob::MaxCqe, Some(max_cqe));
        let (nic, rails, _memory) = nic(1);
        knob(Knob::MaxCqe, Some(0));
        assert_eq!(nic.room(rails[0]), FULL, "of {max_cqe}");
        let receives =
            arrive(number(&nic, rails[0], WRITES_AT), 1) + message(number(&nic, rails[0], MESSAGES_AT), 0, b"");
        assert!((max_cqe / 4..max_cqe).contains(&receives), "{receives} of {max_cqe}");
    }
}
