//! Posting: in chains, alone, and without allocating.

use crate::allocations::allocations;
use crate::*;

/// Counts ends and nothing else: it must not allocate.
struct Ends(usize);

impl Completions for Ends {
    fn completed(&mut self, _rail: RailIdx, _token: u32, result: Result<(), Fault>) {
        self.0 += usize::from(result.is_ok());
    }

    fn arrived(&mut self, _rail: RailIdx, _imm: u32) {}

    fn message(&mut self, _rail: RailIdx, _message: &[u8]) {}

    fn broken(&mut self, _rail: RailIdx, _why: Fault) {}
}

/// 32 writes are one call of the driver, and one completion.
pub(crate) fn chains_are_posted_at_once() {
    let (mut nic, rails, memory) = nic(1);
    let before = (knob(Knob::NumPosts, None), knob(Knob::NumRequests, None));
    for token in 0..8 {
        let batch = Batch { source: &memory, target: TARGET, writes: &WRITES[..4], marks: Marks::Each(1), token };
        nic.post(rails[0], &batch).unwrap();
    }
    nic.flush(rails[0]).unwrap();
    let after = (knob(Knob::NumPosts, None), knob(Knob::NumRequests, None));
    assert_eq!((after.0 - before.0, after.1 - before.1), (1, 32));
    let mut seen = Seen::default();
    while nic.poll(&mut seen) {}
    assert_eq!(seen.ended().len(), 8, "each batch ends, though one request asked for a completion");
}

/// A request that goes alone is handed over at once, behind what is held back of its own rail and of no other.
pub(crate) fn one_goes_past_the_chain() {
    let (mut nic, rails, memory) = nic(2);
    let batch = |token| Batch { source: &memory, target: TARGET, writes: &WRITES, marks: Marks::None, token };
    let one = |token| One { source: &memory, target: TARGET, write: &WRITES[0], imm: Some(1), token };
    let requests = || knob(Knob::NumRequests, None);
    let mut seen = Seen::default();
    let before = requests();
    assert_eq!(nic.post(rails[0], &batch(1)), Ok(7));
    assert_eq!(nic.post_one(rails[1], &one(2)), Ok(true));
    assert_eq!(requests() - before, 1, "the chain waits");
    assert_eq!(nic.post_one(rails[0], &one(3)), Ok(true));
    assert_eq!(requests() - before, 9);
    while nic.poll(&mut seen) {}
    assert!((1..4).all(|token| seen.ended()[&token] == [Ok(())]));
    // What the device does not take ends with a fault, behind what it took.
    knob(Knob::Holds, Some(1));
    assert_eq!(nic.post_one(rails[0], &one(4)), Ok(true));
    knob(Knob::Refuses, Some(1));
    assert_eq!(nic.post_one(rails[0], &one(5)), Ok(true));
    assert_eq!(nic.post_one(rails[0], &one(6)), Err(Fault::Local(libc::ENOMEM as u32)));
    knob(Knob::Refuses, Some(0));
    knob(Knob::Holds, Some(0));
    while nic.poll(&mut seen) {}
    nic.poll(&mut seen);
    assert_eq!((seen.ended()[&4].len(), seen.ended()[&5].len(), seen.ended().contains_key(&6)), (1, 1, false));
    assert!(seen.ended()[&5][0].is_err());
    assert_eq!(seen.broken, [(rails[0], Fault::Local(libc::ENOMEM as u32))]);
    // As many as there is room for.
    knob(Knob::Holds, Some(1));
    let posted = (0..).take_while(|token| nic.post_one(rails[1], &one(*token)).unwrap()).count();
    assert_eq!(posted, FULL);
    knob(Knob::Holds, Some(0));
    while nic.poll(&mut seen) {}
    assert_eq!(nic.room(rails[1]), FULL);
}

/// From the post to the end of a batch nothing is allocated, once the queues have grown; there is no lock to take.
pub(crate) fn nothing_is_allocated() {
    let (mut nic, rails, memory) = nic(8);
    let mut ends = Ends(0);
    let round = |nic: &mut VerbsNic, ends: &mut Ends| {
        for token in 0..64 {
            let rail = rails[token as usize % rails.len()];
            let batch = Batch { source: &memory, target: TARGET, writes: &WRITES, marks: Marks::Each(1), token };
            let one = One { source: &memory, target: TARGET, write: &WRITES[0], imm: None, token };
            nic.post(rail, &batch).unwrap();
            nic.signal(rail, 1, token).unwrap();
            nic.post_one(rail, &one).unwrap();
            nic.send(rail, b"message", token).unwrap();
            nic.flush(rail).unwrap();
            nic.poll(ends);
        }
        while nic.poll(ends) {}
    };
    round(&mut nic, &mut ends);
    let ended = ends.0;
    assert_eq!(allocations(|| (0..10).for_each(|_| round(&mut nic, &mut ends))), 0);
    assert_eq!(ends.0 - ended, 10 * 64 * 4);
    assert!(allocations(|| drop(std::hint::black_box(vec![0_u8; 8]))) > 0, "the count would show one");
}
