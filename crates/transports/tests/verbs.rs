//! Real NICs, or Soft-RoCE ones, through the trait: `cargo test -p anyfabric-transports --test verbs`. Skipped without
//! a device. `ANYFABRIC_TEST_NICS=rxe1,rxe2` names the two ends; otherwise each NIC talks to itself.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

// Not every library's tests ask everything of it.
#[allow(dead_code)]
#[path = "common/seen.rs"]
mod seen;

use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use anyfabric_plan::Extent;
use anyfabric_transports::rdma::{Batch, Domain, Fault, Marks, Nic, NicChoice, RailIdx, RemoteMemory};
use anyfabric_transports::verbs::{open, VerbsDomain, VerbsMemory, VerbsNic, VerbsSettings};
use seen::Seen;

/// One side: a NIC, memory registered with it, and what it has reported.
struct Side {
    nic: VerbsNic,
    seen: Seen,
    registration: VerbsMemory,
    bytes: Vec<u8>,
}

impl Side {
    fn new(name: &str, nbytes: usize) -> Self {
        // As patient as the defaults: under emulation a peer may not run for a tenth of a second.
        // Not 7 times: Soft-RoCE takes that for ever.
        let settings = VerbsSettings { retry_count: 6, ..VerbsSettings::default() };
        let mut nics = open(NicChoice::Named(&[name.to_owned()]), &settings).unwrap();
        let nic = nics.remove(0);
        let mut bytes = vec![0_u8; nbytes];
        // SAFETY: the bytes are dropped after the registration, and stay where they are: the vector never grows.
        let registration = unsafe { nic.domain().register(bytes.as_mut_ptr(), nbytes as u64, true) }.unwrap();
        Self { nic, seen: Seen::default(), registration, bytes }
    }

    fn poll(&mut self) {
        self.nic.poll(&mut self.seen);
    }
}

struct Pair {
    a: Side,
    b: Side,
    rails: (RailIdx, RailIdx),
}

impl Pair {
    fn new((a, b): &(String, String), nbytes: usize) -> Self {
        let (mut a, mut b) = (Side::new(a, nbytes), Side::new(b, nbytes));
        let rails = connect(&mut a, &mut b);
        Self { a, b, rails }
    }

    fn target(&self) -> RemoteMemory {
        VerbsDomain::remote(&self.b.registration)
    }

    /// Writes from A to B; returns how many were taken.
    fn post(&mut self, target: RemoteMemory, writes: &[Extent], marks: Marks, token: u32) -> usize {
        let Side { nic, registration, .. } = &mut self.a;
        let batch = Batch { source: registration, target, writes, marks, token };
        let taken = nic.post(self.rails.0, &batch).unwrap();
        nic.flush(self.rails.0).unwrap();
        taken
    }

    #[track_caller]
    fn until(&mut self, what: &str, is_true: impl Fn(&Seen, &Seen) -> bool) {
        let until = Instant::now() + Duration::from_secs(60);
        while !is_true(&self.a.seen, &self.b.seen) {
            assert!(Instant::now() < until, "not within a minute: {what}");
            self.a.poll();
            self.b.poll();
        }
    }
}

fn connect(a: &mut Side, b: &mut Side) -> (RailIdx, RailIdx) {
    let rails = (a.nic.open().unwrap(), b.nic.open().unwrap());
    let addresses = (a.nic.address(rails.0), b.nic.address(rails.1));
    b.nic.connect(rails.1, &addresses.0).unwrap();
    a.nic.connect(rails.0, &addresses.1).unwrap();
    rails
}

/// The pairs to test, after saying why there are none.
fn pairs() -> Vec<(String, String)> {
    if let Ok(named) = std::env::var("ANYFABRIC_TEST_NICS") {
        let (a, b) = named.split_once(',').expect("two names");
        return vec![(a.to_owned(), b.to_owned())];
    }
    match open(NicChoice::Near(&[], 8), &VerbsSettings::default()) {
        Ok(nics) => nics.iter().map(|nic| (nic.about().name.clone(), nic.about().name.clone())).collect(),
        Err(why) => {
            println!("skipped: {why}");
            Vec::new()
        }
    }
}

fn is_readable(fd: RawFd) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd that lives through the call.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

fn pattern(seed: u8, at: usize) -> u8 {
    (at as u8).wrapping_mul(31).wrapping_add(seed).wrapping_add((at >> 8) as u8)
}

#[test]
fn writes_of_every_size_land_before_their_immediate() {
    for pair in pairs() {
        let mut pair = Pair::new(&pair, 1 << 20);
        for (turn, nbytes) in [0, 1, 63, 64, 65, 1023, 1024, 1025, 4096, 65_537, 1 << 20].into_iter().enumerate() {
            (0..nbytes).for_each(|at| pair.a.bytes[at] = pattern(turn as u8, at));
            let extent = Extent { src: 0, dst: 0, nbytes: nbytes as u64 };
            let imm = 0xc000_0000 | turn as u32;
            assert_eq!(pair.post(pair.target(), &[extent], Marks::Last(imm), turn as u32), 1);
            pair.until("the immediate", |_, b| b.arrived.len() > turn);
            assert_eq!(pair.b.seen.arrived[turn], (pair.rails.1, imm));
            let wrong = (0..nbytes).find(|at| pair.b.bytes[*at] != pattern(turn as u8, *at));
            assert_eq!(wrong, None, "of {nbytes} bytes");
            pair.until("the end", |a, _| a.completed.len() > turn);
            assert_eq!(pair.a.seen.completed[turn], (pair.rails.0, turn as u32, Ok(())));
        }
    }
}

#[test]
fn pages_count_each_and_batches_end_once() {
    const PAGES: usize = 5000;
    for pair in pairs() {
        let mut pair = Pair::new(&pair, PAGES * 64);
        (0..PAGES * 64).for_each(|at| pair.a.bytes[at] = pattern(1, at));
        let page = |idx: usize| {
            let (src, dst) = (idx as u64 * 64, (idx as u64 * 7919 % PAGES as u64) * 64);
            Extent { src, dst, nbytes: 64 }
        };
        let writes: Vec<_> = (0..PAGES).map(page).collect();
        let (mut posted, mut batches) = (0, 0);
        while posted < PAGES {
            // Batches of all lengths; more than there is room for is taken in part.
            let end = PAGES.min(posted + 1 + batches as usize * 13 % 97);
            let taken = pair.post(pair.target(), &writes[posted..end], Marks::Each(7), batches);
            batches += u32::from(taken > 0);
            posted += taken;
            pair.a.poll();
            pair.b.poll();
        }
        pair.until("all", |a, b| a.completed.len() as u32 >= batches && b.arrived.len() >= PAGES);
        let tokens: Vec<_> = pair.a.seen.completed.iter().map(|completed| completed.1).collect();
        assert_eq!(tokens, (0..batches).collect::<Vec<_>>());
        assert!(pair.a.seen.completed.iter().all(|completed| completed.2.is_ok()));
        assert_eq!(pair.b.seen.arrived.len(), PAGES);
        for write in &writes {
            let (src, dst) = (write.src as usize, write.dst as usize);
            assert_eq!(pair.a.bytes[src..src + 64], pair.b.bytes[dst..dst + 64]);
        }
    }
}

#[test]
fn signals_and_messages_arrive() {
    for pair in pairs() {
        let mut pair = Pair::new(&pair, 64);
        let (from, to) = pair.rails;
        for token in 0..100 {
            assert!(pair.a.nic.signal(from, token, token).unwrap());
            let message = vec![token as u8; [1, 64, 65, 8192][token as usize % 4]];
            while !pair.a.nic.send(from, &message, 1000 + token).unwrap() {
                pair.a.poll();
                pair.b.poll();
            }
            pair.a.nic.flush(from).unwrap();
        }
        assert!(!pair.a.nic.send(from, &[0; 8193], 1).unwrap(), "longer than a buffer");
        pair.until("all", |a, b| a.completed.len() == 200 && b.arrived.len() == 100 && b.messages.len() == 100);
        for (idx, (rail, message)) in pair.b.seen.messages.iter().enumerate() {
            assert_eq!((*rail, message.len()), (to, [1, 64, 65, 8192][idx % 4]));
            assert!(message.iter().all(|byte| *byte == idx as u8));
        }
    }
}

#[test]
fn a_wrong_key_breaks_its_own_rail_only() {
    for pair in pairs() {
        let mut pair = Pair::new(&pair, 4096);
        let other = connect(&mut pair.a, &mut pair.b);
        let good = pair.target();
        let bad = RemoteMemory { key: good.key ^ 0x5500, ..good };
        let one = [Extent { src: 0, dst: 0, nbytes: 64 }];
        pair.a.bytes[..64].fill(1);
        for token in 0..20 {
            pair.post(if token == 10 { bad } else { good }, &one, Marks::Each(token), token);
        }
        pair.until("all ended", |a, _| a.completed.len() == 20 && !a.broken.is_empty());
        assert_eq!(pair.a.seen.broken, [(pair.rails.0, Fault::Refused)]);
        for (_, token, result) in &pair.a.seen.completed {
            assert_eq!(result.is_ok(), *token < 10, "batch {token}: {result:?}");
        }
        assert!(pair.b.seen.arrived.iter().all(|(_, imm)| *imm < 10), "{:?}", pair.b.seen.arrived);
        assert!(pair.a.nic.signal(pair.rails.0, 1, 1).is_err(), "nothing goes over a broken rail");
        pair.rails = other;
        pair.post(good, &one, Marks::Each(99), 99);
        pair.until("the other rail", |a, _| a.completed.len() == 21);
        assert_eq!(pair.a.seen.completed[20], (other.0, 99, Ok(())));
    }
}

#[test]
fn nothing_lands_after_a_fence_and_a_rail_can_be_made_again() {
    for pair in pairs() {
        let mut pair = Pair::new(&pair, 1 << 20);
        let extent = [Extent { src: 0, dst: 0, nbytes: 1 << 20 }];
        pair.a.bytes.fill(1);
        for token in 0..8 {
            pair.post(pair.target(), &extent, Marks::Last(token), token);
        }
        pair.b.nic.fence(pair.rails.1);
        pair.b.bytes.fill(9);
        // A fast NIC may have placed all of the others before the fence.
        pair.post(pair.target(), &extent, Marks::Last(8), 8);
        pair.until("all ended", |a, _| a.completed.len() == 9);
        assert!(pair.b.bytes.iter().all(|byte| *byte == 9), "bytes landed behind the fence");
        assert!(pair.a.seen.completed[8].2.is_err());
        assert_eq!(pair.a.seen.broken.len(), 1);
        assert_eq!(pair.b.seen.broken.len(), 0, "whoever fences knows");
        pair.a.nic.close(pair.rails.0);
        pair.b.nic.close(pair.rails.1);
        pair.rails = connect(&mut pair.a, &mut pair.b);
        pair.post(pair.target(), &extent, Marks::Last(77), 77);
        let rail = pair.rails.1;
        pair.until("the new rail", |_, b| b.arrived.contains(&(rail, 77)));
        assert!(pair.b.bytes.iter().all(|byte| *byte == 1));
    }
}

#[test]
fn who_sleeps_is_woken() {
    for pair in pairs() {
        let mut pair = Pair::new(&pair, 64);
        let fd = pair.b.nic.event_fd().unwrap();
        assert!(pair.b.nic.arm());
        pair.b.poll();
        assert!(!is_readable(fd));
        pair.a.nic.signal(pair.rails.0, 5, 5).unwrap();
        pair.a.nic.flush(pair.rails.0).unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while !is_readable(fd) {
            assert!(Instant::now() < until, "no event");
        }
        assert!(pair.b.nic.arm());
        pair.until("the arrival", |_, b| !b.arrived.is_empty());
        assert!(!is_readable(fd), "the event was taken");
    }
}
