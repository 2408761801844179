//! Messages, and the receives that they take.

use crate::*;

pub(crate) fn messages_arrive_whole_and_in_order() {
    let (mut nic, rails, _memory) = nic(3);
    knob(Knob::Delivers, Some(1));
    let mut seen = Seen::default();
    let text = |no: u32| vec![no as u8; (no as usize * 977) % 8193];
    for no in 0..1000 {
        while !nic.send(rails[no as usize % 3], &text(no), no).unwrap() {
            nic.poll(&mut seen);
        }
    }
    while nic.poll(&mut seen) {}
    let ended = seen.ended();
    assert!((0..1000).all(|no| ended[&no] == [Ok(())]));
    for (idx, rail) in rails.iter().enumerate() {
        let came: Vec<_> = seen.messages.iter().filter(|(of, _)| of == rail).map(|(_, message)| message).collect();
        let sent: Vec<_> = (0..1000).filter(|no| *no as usize % 3 == idx).map(text).collect();
        assert!(came.into_iter().eq(&sent), "of rail {rail}");
    }
    assert_eq!(nic.send(rails[0], &[0; 8193], 0), Ok(false));
    assert!(seen.broken.is_empty());
    knob(Knob::Delivers, Some(0));
}

/// More come than there are receives for: what the NIC gives up fails, with its rail, and the rest has arrived.
pub(crate) fn a_message_finds_no_receive() {
    let (mut nic, mut rails, memory) = nic(4);
    knob(Knob::Delivers, Some(1));
    for round in 0..30 {
        let mut seen = Seen::default();
        let num_taken = 70 + round;
        (0..num_taken).for_each(|_| assert!(message(number(&nic, rails[0], MESSAGES_AT), 0, b"other") >= 0));
        for token in 0..64 {
            assert_eq!(nic.send(rails[token as usize % 4], &[token as u8], token), Ok(true));
        }
        assert_eq!(nic.send(rails[0], b"", 0), Ok(false));
        while nic.poll(&mut seen) {}
        nic.poll(&mut seen);
        assert_eq!(seen.ended().len(), 64);
        let came: Vec<u8> =
            seen.messages.iter().filter(|(_, bytes)| bytes.len() == 1).map(|(_, bytes)| bytes[0]).collect();
        for (token, ends) in &seen.ended() {
            assert_eq!(ends.len(), 1);
            assert_eq!(ends[0].is_ok(), came.contains(&(*token as u8)), "message {token}: {ends:?}");
        }
        // Those that were used up before are not all posted again.
        assert!((128 - 16 - num_taken..=128 - num_taken).contains(&(came.len() as u32)), "{}", came.len());
        assert!(!seen.broken.is_empty() && seen.broken.iter().all(|(_, why)| *why == Fault::NotReady));
        for (broken, _) in seen.broken {
            // With its queue pair for messages that for writes.
            let one = One { source: &memory, target: TARGET, write: &WRITES[0], imm: None, token: 0 };
            assert_eq!(nic.post_one(broken, &one), Err(Fault::NotReady));
            nic.close(broken);
            let again = rail(&mut nic);
            rails.iter_mut().filter(|rail| **rail == broken).for_each(|rail| *rail = again);
        }
    }
    knob(Knob::Delivers, Some(0));
}

/// Whatever its status: the rail breaks, but not for what is only flushed, and the buffer is used again.
pub(crate) fn a_receive_fails() {
    let (mut nic, _, _memory) = nic(0);
    for round in 0..10 {
        for status in 1..=23 {
            let rail = rail(&mut nic);
            let mut seen = Seen::default();
            if round % 2 == 0 {
                assert!(message(number(&nic, rail, MESSAGES_AT), status, b"message") >= 0);
            } else {
                say(number(&nic, rail, WRITES_AT), 2 << 56, status, 0xffff_ffff);
            }
            assert_eq!(nic.send(rail, b"message", 1), Ok(true));
            while nic.poll(&mut seen) {}
            nic.poll(&mut seen);
            let fault = match status {
                1..=4 => Some(Fault::Local(status)),
                5 => None,
                9..=11 => Some(Fault::Refused),
                12 => Some(Fault::Unanswered),
                13 => Some(Fault::NotReady),
                _ => Some(Fault::Other(status)),
            };
            assert_eq!(seen.broken, fault.map(|fault| (rail, fault)).into_iter().collect::<Vec<_>>());
            assert_eq!((seen.ended()[&1].len(), seen.messages.len(), seen.arrived.len()), (1, 0, 0));
            nic.close(rail);
        }
    }
}

/// Refused at any place, once or for some time: as soon as the device takes them there are as many as before.
pub(crate) fn receives_that_are_refused_are_posted_later() {
    let (mut nic, rails, _memory) = nic(1);
    let pairs = [number(&nic, rails[0], WRITES_AT), number(&nic, rails[0], MESSAGES_AT)];
    let mut seen = Seen::default();
    for refused in (1..=64).chain([1; 20]) {
        for is_refused in (0..100).map(|no| no % 3 > 0) {
            knob(Knob::RefusesReceives, Some(if is_refused { refused } else { 0 }));
            assert!(arrive(pairs[0], 1) >= 0 && message(pairs[1], 0, b"message") >= 0);
            while nic.poll(&mut seen) {}
        }
    }
    knob(Knob::RefusesReceives, Some(0));
    assert_eq!((seen.arrived.len(), seen.messages.len()), (8400, 8400));
    assert!(seen.messages.iter().all(|(_, message)| message == b"message") && seen.broken.is_empty());
    let left = [arrive(pairs[0], 1), message(pairs[1], 0, b"")];
    assert!(left[0] >= 8192 - 2 * 64 && left[1] >= 128 - 2 * 16, "{left:?}");
}

/// So long that none is left: nothing arrives any more with which the next ones could be posted.
pub(crate) fn receives_come_back_when_none_is_left() {
    let (mut nic, rails, _memory) = nic(1);
    let pairs = [number(&nic, rails[0], WRITES_AT), number(&nic, rails[0], MESSAGES_AT)];
    let mut seen = Seen::default();
    knob(Knob::RefusesReceives, Some(1));
    while arrive(pairs[0], 1) >= 0 {}
    while message(pairs[1], 0, b"") >= 0 {}
    while nic.poll(&mut seen) {}
    nic.heed();
    assert_eq!([arrive(pairs[0], 1), message(pairs[1], 0, b"")], [-1, -1]);
    knob(Knob::RefusesReceives, Some(0));
    nic.heed();
    assert_eq!([arrive(pairs[0], 1), message(pairs[1], 0, b"")], [8191, 127], "as many as at first");
}
