//! The verbs NIC over a libibverbs without hardware: every way in which a post or a completion can fail, and what it
//! may not cost. The knobs are the process's, so this is one test that goes through its chapters.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

mod null_nic;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyfabric_plan::Extent;
use anyfabric_transports::rdma::{
    Batch, Completions, Domain, Fault, Marks, Nic, NicChoice, NicError, One, RailIdx, RemoteMemory,
};
use anyfabric_transports::verbs::{open, VerbsMemory, VerbsNic, VerbsSettings};
use null_nic::{announce, arrive, knob, library, message, say, Knob};

/// Counts what is allocated.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[derive(Default)]
struct Seen {
    ended: HashMap<u32, Vec<Result<(), Fault>>>,
    broken: Vec<(RailIdx, Fault)>,
    arrived: Vec<(RailIdx, u32)>,
    messages: Vec<(RailIdx, Vec<u8>)>,
}

impl Completions for Seen {
    fn completed(&mut self, _rail: RailIdx, token: u32, result: Result<(), Fault>) {
        self.ended.entry(token).or_default().push(result);
    }

    fn arrived(&mut self, rail: RailIdx, imm: u32) {
        self.arrived.push((rail, imm));
    }

    fn message(&mut self, rail: RailIdx, message: &[u8]) {
        self.messages.push((rail, message.to_vec()));
    }

    fn broken(&mut self, rail: RailIdx, why: Fault) {
        self.broken.push((rail, why));
    }
}

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

fn settings() -> VerbsSettings {
    VerbsSettings { library: Some(library().to_owned()), ..VerbsSettings::default() }
}

fn one(name: &str) -> Result<VerbsNic, NicError> {
    open(NicChoice::Named(&[name.to_owned()]), &settings()).map(|mut nics| nics.remove(0))
}

/// A NIC with `num_rails` rails, each connected to itself, and memory.
fn nic(num_rails: usize) -> (VerbsNic, Vec<RailIdx>, VerbsMemory) {
    let mut nic = one("null0").unwrap();
    let rails = (0..num_rails).map(|_| rail(&mut nic)).collect();
    static mut BYTES: [u8; 4096] = [0; 4096];
    // SAFETY: the null NIC touches no memory, and the array is there for ever.
    let memory = unsafe { nic.domain().register((&raw mut BYTES).cast(), 4096, true) }.unwrap();
    (nic, rails, memory)
}

fn rail(nic: &mut VerbsNic) -> RailIdx {
    let rail = nic.open().unwrap();
    let address = nic.address(rail);
    nic.connect(rail, &address).unwrap();
    rail
}

const WRITES: [Extent; 7] = [Extent { src: 0, dst: 0, nbytes: 512 }; 7];
const TARGET: RemoteMemory = RemoteMemory { base: 0x1000, key: 7 };
const FULL: usize = 128;

#[test]
fn the_verbs_nic_without_hardware() {
    devices_and_what_is_wrong_with_them();
    one_that_cannot_be_opened_is_left_out();
    peers_may_write_into_no_buffer_of_ours();
    networks_and_their_names();
    every_failure_at_every_place();
    what_the_device_does_not_take();
    held_back_until_closed();
    what_arrived_counts_when_the_rail_is_closed();
    a_device_that_is_gone_is_fenced_all_the_same();
    a_queue_that_breaks_ends_every_rail_and_is_renewed();
    a_broken_queue_is_told_of_a_rail_that_is_closed();
    what_a_device_announces();
    messages_arrive_whole_and_in_order();
    a_message_finds_no_receive();
    a_receive_fails();
    receives_that_are_refused_are_posted_later();
    a_nic_that_talks_nonsense();
    a_short_queue_of_completions_is_shared();
    chains_are_posted_at_once();
    one_goes_past_the_chain();
    nothing_is_allocated();
}

fn devices_and_what_is_wrong_with_them() {
    let opened = |choice: NicChoice<'_>| -> Vec<String> {
        open(choice, &settings()).unwrap().iter().map(|nic| nic.about().name.clone()).collect()
    };
    let list = |names: &[&str]| -> Vec<String> { names.iter().map(|name| (*name).to_owned()).collect() };
    assert_eq!(opened(NicChoice::Near(&[], 4)), ["null0", "null1", "null2", "null3"]);
    assert_eq!(opened(NicChoice::Named(&list(&["null2", "null0"]))), ["null2", "null0"], "in the order given");
    assert_eq!(opened(NicChoice::Near(&list(&["null6", "hidden", "null2", "null1"]), 2)), ["null6", "null2"]);
    assert_eq!(opened(NicChoice::Near(&list(&["hidden"]), 1)), ["null0"], "what there is");
    let about = one("null1").unwrap().about().clone();
    assert_eq!((about.gbps, about.manner.as_str()), (200, "RoCE v1, GID 0 (10.0.0.1)"));

    let why = |name: &str| one(name).err().unwrap().to_string();
    let known = "null0, null1, null2, null3, null4, null5, null6, null7, null8";
    assert_eq!(why("mlx5_7"), format!("there is no NIC mlx5_7; this host has {known}"));
    assert_eq!(why("null0:9"), "null0: no active port: it has no such port");
    assert!(why("null0:x").contains("is no NIC"));
    knob(Knob::PortIsDown, Some(1));
    assert_eq!(why("null0"), "null0: no active port: port 1 is down");
    assert!(open(NicChoice::Near(&[], 4), &settings()).is_err());
    knob(Knob::PortIsDown, Some(0));
    let wrong_gid = VerbsSettings { gid_index: Some(3), ..settings() };
    let why_gid = open(NicChoice::Named(&["null0".into()]), &wrong_gid).err().unwrap().to_string();
    assert_eq!(why_gid, "null0: port 1 has no GID at index 3; there are: 0");
    knob(Knob::PortWithoutGid, Some(1));
    assert_eq!(opened(NicChoice::Near(&[], 4)), ["null8:2"], "the only port that has one");
    assert_eq!(opened(NicChoice::Named(&list(&["null8"]))), ["null8:2"]);
    assert_eq!(why("null8:1"), "null8: port 1 has no GID; there are: none");
    knob(Knob::PortWithoutGid, Some(0));
    let missing = VerbsSettings { library: Some("/nowhere/libibverbs.so.1".into()), ..settings() };
    assert!(
        matches!(open(NicChoice::Near(&[], 1), &missing), Err(NicError::Library(why)) if why.contains("install libibverbs1"))
    );

    let (mut nic, _, _) = nic(1);
    knob(Knob::NoQueuePairs, Some(1));
    assert!(nic.open().unwrap_err().to_string().starts_with("null0: no queue pair is left (it has 65536)"));
    knob(Knob::NoQueuePairs, Some(0));
    knob(Knob::NoMemory, Some(1));
    let mut bytes = [0_u8; 64];
    // SAFETY: nothing is registered.
    let refused = unsafe { nic.domain().register(bytes.as_mut_ptr(), 64, true) }.unwrap_err();
    assert!(matches!(refused, NicError::LockedMemory { nbytes: 64, .. } | NicError::Device(_)), "{refused}");
    knob(Knob::NoMemory, Some(0));
}

/// Nobody named it; the others serve. Whoever names one wants that one.
fn one_that_cannot_be_opened_is_left_out() {
    let list = |names: &[&str]| -> Vec<String> { names.iter().map(|name| (*name).to_owned()).collect() };
    let opened = |near: &[&str], max_nics| -> Result<Vec<String>, NicError> {
        let nics = open(NicChoice::Near(&list(near), max_nics), &settings())?;
        Ok(nics.iter().map(|nic| nic.about().name.clone()).collect())
    };
    for knob_of in [Knob::Shut, Knob::NoQueues] {
        knob(knob_of, Some(1 << 0 | 1 << 2));
        assert_eq!(opened(&["null0", "null1", "null2", "null3", "null4"], 3).unwrap(), ["null1", "null3", "null4"]);
        assert_eq!(opened(&[], 2).unwrap(), ["null1", "null3"]);
        assert_eq!(opened(&["null2", "null0"], 1).unwrap(), ["null1"], "none that is near can be opened");
        knob(Knob::Narrow, Some(!(1 << 0 | 1 << 2 | 1 << 5)));
        assert_eq!(opened(&[], 4).unwrap(), ["null5"], "the fastest of those that can be opened");
        knob(Knob::Narrow, Some(!(1 << 0 | 1 << 2)));
        assert_eq!(opened(&[], 1).unwrap(), ["null1"]);
        knob(Knob::Narrow, Some(0));
        let named = open(NicChoice::Named(&list(&["null1", "null2"])), &settings());
        assert!(named.err().unwrap().to_string().starts_with("null2"));
        knob(knob_of, Some(i64::MAX));
        assert!(opened(&["null3", "null1"], 2).unwrap_err().to_string().starts_with("null3"), "the first error");
        assert!(opened(&[], 2).unwrap_err().to_string().starts_with("null0"), "the first error");
        knob(knob_of, Some(1));
        assert!(matches!(without_descriptors(|| opened(&["null0", "null1"], 2)), Err(NicError::Descriptors(_))));
        knob(knob_of, Some(0));
    }
}

/// Keys can be guessed, and messages are read where they were received.
fn peers_may_write_into_no_buffer_of_ours() {
    let before = knob(Knob::NumWritable, None);
    let nic = one("null0").unwrap();
    assert_eq!(knob(Knob::NumWritable, None), before);
    let mut bytes = [0_u8; 64];
    // SAFETY: the null NIC touches no memory.
    let _memory = unsafe { nic.domain().register(bytes.as_mut_ptr(), 64, true) }.unwrap();
    assert_eq!(knob(Knob::NumWritable, None), before + 1);
}

/// Calls it while no descriptor is left.
fn without_descriptors<R>(call: impl FnOnce() -> R) -> R {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure lives through the calls; no other thread opens anything meanwhile.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        let none = libc::rlimit { rlim_cur: 0, ..limit };
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const none);
        let result = call();
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        result
    }
}

/// A network gives a port another place in its table while it is down; ends of different networks say so.
fn networks_and_their_names() {
    let mut nic = one("null0").unwrap();
    knob(Knob::GidIndex, Some(5));
    let moved = nic.open().unwrap();
    let address = nic.address(moved);
    nic.connect(moved, &address).unwrap();
    assert_eq!(knob(Knob::SgidIndex, None), 5);
    knob(Knob::GidIndex, Some(77));
    assert!(nic.open().unwrap_err().to_string().contains("no GID"), "it is not there yet");
    knob(Knob::GidIndex, Some(0));

    let rail = nic.open().unwrap();
    let with = |at: usize, value: u8| {
        let mut theirs = address.clone();
        theirs[at] = value;
        theirs
    };
    let refused = |nic: &mut VerbsNic, theirs: &[u8]| nic.connect(rail, theirs).unwrap_err().to_string();
    assert!(refused(&mut nic, &with(1, 0)).contains("Ethernet and InfiniBand"));
    let error = refused(&mut nic, &with(3, 1));
    assert!(error.contains("null0 uses RoCE v1 and the peer's NIC RoCE v2") && error.contains("gid_index"), "{error}");
}

/// One request of many fails, each in turn and with every status: batches end once, other rails go on, and a rail that
/// is made again has all of its room.
fn every_failure_at_every_place() {
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
        assert_eq!(seen.ended.len(), 30, "place {place}");
        let [(broken, why)] = seen.broken[..] else { panic!("place {place}: {:?}", seen.broken) };
        assert_eq!(why, fault);
        let mut failed = false;
        for token in 0..30 {
            let ends = &seen.ended[&token];
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
fn what_the_device_does_not_take() {
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
    assert_eq!(seen.ended[&1].len() + seen.ended[&2].len(), 2);
    assert!(seen.ended[&2][0].is_err());
    assert_eq!(nic.send(rails[0], b"message", 3), Err(Fault::Local(12)));
    assert_eq!(nic.signal(rails[1], 1, 4), Ok(true));
    nic.flush(rails[1]).unwrap();
    while nic.poll(&mut seen) {}
    assert_eq!(seen.ended[&4], [Ok(())]);

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
        assert_eq!(seen.ended, HashMap::from([(5, vec![Err(Fault::Local(12))])]), "request {refused:?} is refused");
        nic.close(rail);
    }
    knob(Knob::IsPrompt, Some(0));
}

/// A rail is closed over what is under way: nothing of it is reported, to whoever has the number next either.
fn held_back_until_closed() {
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
    assert!(seen.ended.is_empty() && seen.broken.is_empty());
    assert_eq!(nic.room(again), FULL);
    nic.fence(again);
    while nic.poll(&mut seen) {}
    assert!(seen.broken.is_empty(), "whoever fences knows");
}

/// The peer's NIC has said of each that it arrived; its writer was told so. More than one poll takes, of two rails.
fn what_arrived_counts_when_the_rail_is_closed() {
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
fn a_device_that_is_gone_is_fenced_all_the_same() {
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
    assert_eq!(seen.ended, HashMap::from([1, 2].map(|token| (token, vec![Err(Fault::Flushed)]))));
    assert_eq!(nic.post(rails[0], &batch(3)), Err(Fault::Flushed));
    nic.close(rails[0]);
    knob(Knob::IsGone, Some(0));
    let again = rail(&mut nic);
    assert_eq!((again, nic.room(again)), (rails[0], FULL));
}

/// What had arrived may be lost: who waits for a count must not do so for ever. The NIC goes on with other queues.
fn a_queue_that_breaks_ends_every_rail_and_is_renewed() {
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
        assert_eq!(seen.ended.len(), 60);
        assert!(seen.ended.values().all(|ends| *ends == [Err(missed)]), "{:?}", seen.ended);
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
            (&seen.ended[&201][..], &seen.arrived[..], seen.broken.len()),
            (&[Ok(())][..], &[(rails[1], 1)][..], before)
        );
    }
}

/// Nobody has looked at the queue when a rail is closed, or stopped: that something may be missing is told all the same.
fn a_broken_queue_is_told_of_a_rail_that_is_closed() {
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
fn what_a_device_announces() {
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
        assert_eq!(seen.ended.len(), 4, "event {code}");
        for (token, ends) in &seen.ended {
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
        assert_eq!(seen.ended[&9], [Ok(())]);
        assert_eq!(knob(Knob::NumUnheeded, None), 0, "a queue pair with one cannot be destroyed");
    }
    announce(8, 0, DEVICE_FATAL);
    assert!(!ports[0]() && !ports[1](), "it says so of no port");
    assert!(!ports[0](), "nor does it return");
}

/// Where in a rail's address the number of each queue pair is.
const WRITES_AT: usize = 22;
const MESSAGES_AT: usize = 30;

fn number(nic: &VerbsNic, rail: RailIdx, at: usize) -> u32 {
    u32::from_le_bytes(nic.address(rail)[at..at + 4].try_into().unwrap())
}

fn messages_arrive_whole_and_in_order() {
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
    assert!((0..1000).all(|no| seen.ended[&no] == [Ok(())]));
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
fn a_message_finds_no_receive() {
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
        assert_eq!(seen.ended.len(), 64);
        let came: Vec<u8> =
            seen.messages.iter().filter(|(_, bytes)| bytes.len() == 1).map(|(_, bytes)| bytes[0]).collect();
        for (token, ends) in &seen.ended {
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
fn a_receive_fails() {
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
            assert_eq!((seen.ended[&1].len(), seen.messages.len(), seen.arrived.len()), (1, 0, 0));
            nic.close(rail);
        }
    }
}

/// Refused at any place, once or for some time: as soon as the device takes them there are as many as before.
fn receives_that_are_refused_are_posted_later() {
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

/// Completions of nothing, twice, of other kinds and from the future: nothing ends twice, and nobody is stuck.
fn a_nic_that_talks_nonsense() {
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
        assert_eq!(seen.ended.len() as u32, posted);
        assert!(seen.ended.values().all(|ends| ends.len() == 1), "{:?}", seen.ended);
        for rail_idx in &mut rails {
            if random(4) == 0 || seen.broken.iter().any(|(broken, _)| broken == rail_idx) {
                nic.close(*rail_idx);
                *rail_idx = rail(&mut nic);
            }
            assert_eq!(nic.room(*rail_idx), FULL);
        }
    }
}

/// What arrives leaves room for what is posted, however short the device's queues are.
fn a_short_queue_of_completions_is_shared() {
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

/// 32 writes are one call of the driver, and one completion.
fn chains_are_posted_at_once() {
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
    assert_eq!(seen.ended.len(), 8, "each batch ends, though one request asked for a completion");
}

/// A request that goes alone is handed over at once, behind what is held back of its own rail and of no other.
fn one_goes_past_the_chain() {
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
    assert!((1..4).all(|token| seen.ended[&token] == [Ok(())]));
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
    assert_eq!((seen.ended[&4].len(), seen.ended[&5].len(), seen.ended.contains_key(&6)), (1, 1, false));
    assert!(seen.ended[&5][0].is_err());
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
fn nothing_is_allocated() {
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
    let (before, ended) = (ALLOCATIONS.load(Ordering::Relaxed), ends.0);
    (0..10).for_each(|_| round(&mut nic, &mut ends));
    assert_eq!(ends.0 - ended, 10 * 64 * 4);
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
}
