//! The link between two processes of a host, without the other one.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyfabric_plan::{Extent, Extents};
use anyfabric_transports::shm::ring::{Consumer, Entry, Producer, AREA, ENTRIES};
use anyfabric_transports::shm::{ring_memory, LocalChannel, ShmLink, ShmOptions};
use anyfabric_transports::sys::{check_memfd, memfd, pid_fd, Fd, Mapping, Ready};
use anyfabric_transports::{
    lock, Backing, Clock, Doorbell, Failure, Inline, Link, Loss, Op, Payload, PeerIdx, Region, Sink, Terms, Ticket,
    TicketOffice, TicketState,
};
use anyfabric_wire::{Access, Imm, Local, Refusal, WireImm};

/// Somebody has the ring of a peer that is gone, and announces an arrival for each that is taken.
struct Restless {
    producer: Mutex<Producer>,
    num_taken: Mutex<u32>,
}

impl Restless {
    fn push(&self) -> bool {
        let imm = WireImm { imm: Imm::new(1).unwrap(), quarters: 4 };
        lock(&self.producer).push(&Entry::Arrival { imm, count: 1 })
    }
}

impl Sink for Restless {
    fn arrived(&self, _: PeerIdx, _: Imm, _: u64) -> Result<(), Refusal> {
        self.push();
        let mut num_taken = lock(&self.num_taken);
        *num_taken += 1;
        assert!(*num_taken < 100 * ENTRIES, "there is no end to it");
        Ok(())
    }
}

/// Whoever is told of its messages puts another one into the ring.
struct Talkative {
    producer: Mutex<Producer>,
    num_taken: Mutex<usize>,
}

impl Talkative {
    fn push(&self) {
        let mut producer = lock(&self.producer);
        let (start, _) = producer.reserve(MESSAGE).expect("room for some messages");
        assert!(producer.push(&Entry::Message { op: 1, start, nbytes: MESSAGE as u32 }));
    }
}

impl Sink for Talkative {
    fn message(&self, _: PeerIdx, bytes: Vec<u8>) -> Result<(), Refusal> {
        assert_eq!(bytes.len(), MESSAGE);
        *lock(&self.num_taken) += 1;
        self.push();
        Ok(())
    }
}

/// A child that another test starts has the descriptors of this one until it has begun: then their end is not seen.
static ALONE: Mutex<()> = Mutex::new(());

/// Nobody cares for what is reported.
struct Nobody;

impl Sink for Nobody {}

/// A link of a peer that is this process, as it seems; the other end of its Unix socket, and its ring to us.
fn link(pid_fd: Fd) -> (ShmLink, LocalChannel, Arc<Mapping>) {
    link_over(ring_memory().unwrap().1, pid_fd)
}

/// The same, with the ring that the peer reads.
fn link_over(outgoing: Arc<Mapping>, pid_fd: Fd) -> (ShmLink, LocalChannel, Arc<Mapping>) {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let (_, incoming) = ring_memory().unwrap();
    let link = ShmLink::new(ShmOptions {
        peer: 1,
        pid: std::process::id(),
        pid_fd,
        channel: LocalChannel::new(Fd::new(OwnedFd::from(ours))),
        outgoing,
        incoming: Arc::clone(&incoming),
        doorbell: Doorbell::private().unwrap(),
        regions: Arc::default(),
        isolate: false,
        writes_foreign: true,
        peer_writes_foreign: None,
    });
    (link, LocalChannel::new(Fd::new(OwnedFd::from(theirs))), incoming)
}

/// What it published before its end still counts, and no more than its ring holds: the driver has others to look after.
#[test]
fn a_peer_that_is_gone_is_read_to_its_end_and_no_further() {
    let _alone = lock(&ALONE);
    for channel in [ShmLink::LOCAL, ShmLink::PROCESS] {
        let (link, theirs, incoming) = link(pid_fd(std::process::id()).unwrap());
        let restless = Restless { producer: Mutex::new(Producer::new(incoming)), num_taken: Mutex::new(0) };
        while restless.push() {}
        drop(theirs);
        link.ready(channel, Ready { token: 0, readable: true, writable: false, is_over: false }, &restless);
        assert!(*lock(&restless.num_taken) >= ENTRIES, "some of what came before the end is lost");
    }
}

/// However fast a peer refills its ring: after what that holds the others are served.
#[test]
fn a_peer_that_refills_its_ring_is_not_read_for_long() {
    let (link, _theirs, incoming) = link(pid_fd(std::process::id()).unwrap());
    let talkative = Talkative { producer: Mutex::new(Producer::new(incoming)), num_taken: Mutex::new(0) };
    (0..4).for_each(|_| talkative.push());
    for turn in 1..10 {
        assert!(link.poll(&talkative));
        assert_eq!(*lock(&talkative.num_taken), turn * AREA / MESSAGE);
    }
}

/// The peer's process was waited for, and its pid is this process's now: nothing of what is meant for it lands here.
#[test]
fn a_pid_that_is_anothers_now_is_not_written_to() {
    let _alone = lock(&ALONE);
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let (link, theirs, _) = link(pid_fd(child.id()).unwrap());
    let mut there = vec![0_u8; 64];
    let (address, nbytes) = (there.as_mut_ptr() as u64, there.len() as u64);
    let binding = link.bind(1, 2, nbytes);
    theirs.send(&Local::Imported { request: 0, result: Ok(Access::Foreign { address, nbytes }) }, None).unwrap();
    link.ready(ShmLink::LOCAL, Ready { token: 0, readable: true, writable: false, is_over: false }, &Nobody);
    let mut bytes = vec![7_u8; 64].into_boxed_slice();
    let backing = Backing::Foreign { address: bytes.as_mut_ptr(), owner: Box::new(bytes) };
    let source = Region::new(1, 1, nbytes, true, backing);
    let extents = Extents::One(Extent { src: 0, dst: 0, nbytes });
    let write = || {
        let inline = Inline { source: &source, binding: &binding, extents: &extents, imm: None };
        // SAFETY: both are this process's, and live.
        unsafe { std::ptr::write_bytes(address as *mut u8, 0, 64) };
        let result = link.try_inline(&inline).unwrap();
        // SAFETY: as above.
        (result, unsafe { (address as *const u8).read_volatile() })
    };
    assert_eq!(write(), (Ok(()), 7), "while it lives");
    child.kill().unwrap();
    child.wait().unwrap();
    // For a moment nobody looks again: no pid is given anew as soon.
    let until = Instant::now() + Duration::from_secs(10);
    while write().0.is_ok() {
        assert!(Instant::now() < until, "its exit is not seen");
    }
    let (result, byte) = write();
    assert!(matches!(result, Err(Failure::PeerLost(_))), "{result:?}");
    assert_eq!(byte, 0, "written to after it was known");
}

/// Where a peer's memory would end is beyond all addresses.
#[test]
fn no_memory_lies_across_the_last_address() {
    let _alone = lock(&ALONE);
    let (link, theirs, _) = link(pid_fd(std::process::id()).unwrap());
    let binding = link.bind(1, 2, 4096);
    let result = Ok(Access::Foreign { address: u64::MAX - 100, nbytes: 4096 });
    theirs.send(&Local::Imported { request: 0, result }, None).unwrap();
    link.ready(ShmLink::LOCAL, Ready { token: 0, readable: true, writable: false, is_over: false }, &Nobody);
    assert_eq!(binding.refusal(), Some(Refusal::OutOfBounds));
}

/// Their pages can be taken out again although the file does not shrink, and when none is left an access faults.
#[test]
fn huge_pages_of_a_peer_are_refused() {
    let _alone = lock(&ALONE);
    // SAFETY: returns a new descriptor, which is ours.
    let fd = unsafe {
        let fd = libc::memfd_create(c"huge".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | libc::MFD_HUGETLB);
        if fd < 0 {
            return println!("skipped: no huge pages: {}", std::io::Error::last_os_error());
        }
        Fd::new(OwnedFd::from_raw_fd(fd))
    };
    // SAFETY: our own descriptor.
    let failed = unsafe {
        libc::ftruncate(fd.as_raw_fd(), 2 << 20) | libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK)
    };
    assert_eq!(failed, 0);
    let error = check_memfd(&fd, 4096).unwrap_err();
    assert!(error.to_string().contains("huge pages"), "{error}");
}

fn office() -> Arc<TicketOffice> {
    Arc::new(TicketOffice::new(Arc::new(Doorbell::private().unwrap()), Clock::Real))
}

/// A count that is posted, of nothing.
fn signal(link: &ShmLink, office: &Arc<TicketOffice>, id: u64) -> Arc<Ticket> {
    let ticket = Arc::new(Ticket::new(Arc::clone(office), Terms { num_parts: 1, ..Terms::default() }));
    let (imm, loss) = (Some((Imm::new(1).unwrap(), 1)), Loss::default());
    let payload = Payload::Signal;
    link.post(Op { id, peer: 1, payload, imm, verify: false, ticket: Arc::clone(&ticket), loss });
    ticket
}

/// Nobody reads the ring any more: what is posted is not said to be done, nor what waited for room, whether there is some.
#[test]
fn a_peer_that_has_given_this_process_up_counts_nothing() {
    let _alone = lock(&ALONE);
    let (_, ring) = ring_memory().unwrap();
    let mut consumer = Consumer::new(Arc::clone(&ring));
    let (link, _theirs, _) = link_over(ring, pid_fd(std::process::id()).unwrap());
    let office = office();
    (0..ENTRIES.into()).for_each(|id| assert!(signal(&link, &office, id).has_quiesced()));
    let waiting = signal(&link, &office, u64::MAX - 1);
    assert!(!waiting.has_ended());
    while consumer.pop().is_some() {}
    consumer.publish_head(true);
    consumer.fence();
    link.poll(&Nobody);
    for ticket in [waiting, signal(&link, &office, u64::MAX)] {
        let state = ticket.state();
        assert!(matches!(state, TicketState::Failed(Failure::PeerLost(_))), "{state:?}");
    }
}

/// Its bytes have been placed, and only its count waits, behind others.
#[test]
fn what_waits_for_a_full_ring_is_given_up_at_once() {
    let _alone = lock(&ALONE);
    let (link, _theirs, _) = link(pid_fd(std::process::id()).unwrap());
    let office = office();
    let signal = |id| signal(&link, &office, id);
    (0..ENTRIES.into()).for_each(|id| assert!(signal(id).has_quiesced()));
    let [first, last] = [signal(u64::MAX - 1), signal(u64::MAX)];
    last.cancel();
    link.reap();
    assert!(last.has_quiesced() && !first.has_ended());
}

/// The answer that gave it and the word that takes it back come on two ways: the user may hold a descriptor, and so the link.
#[test]
fn memory_that_was_taken_back_before_it_came_is_not_mapped() {
    let _alone = lock(&ALONE);
    let (link, theirs, _) = link(pid_fd(std::process::id()).unwrap());
    let region = Arc::new(memfd(c"late", 8192).unwrap());
    let binding = link.bind(1, 2, 8192);
    assert!(link.release(1, 2, Refusal::Revoked));
    let result = Ok(Access::Mapped { nbytes: 8192 });
    theirs.send(&Local::Imported { request: 0, result }, Some(Arc::clone(&region))).unwrap();
    link.ready(ShmLink::LOCAL, Ready { token: 0, readable: true, writable: false, is_over: false }, &Nobody);
    assert_eq!((binding.refusal(), num_mappings(&region)), (Some(Refusal::Revoked), 0));
}

/// A peer that is gone is remembered, and the user may hold descriptors of its regions: nothing of it stays mapped.
#[test]
fn of_a_peer_that_is_gone_nothing_stays_mapped() {
    let _alone = lock(&ALONE);
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let (bell, region) = (memfd(c"bell", Doorbell::BYTES).unwrap(), Arc::new(memfd(c"region", 8192).unwrap()));
    let ((outgoing_fd, outgoing), (incoming_fd, incoming)) = (ring_memory().unwrap(), ring_memory().unwrap());
    let link = ShmLink::new(ShmOptions {
        peer: 1,
        pid: child.id(),
        pid_fd: pid_fd(child.id()).unwrap(),
        channel: LocalChannel::new(Fd::new(OwnedFd::from(ours))),
        outgoing,
        incoming,
        doorbell: Doorbell::new(Mapping::shared(&bell, Doorbell::BYTES, false).unwrap()),
        regions: Arc::default(),
        isolate: false,
        writes_foreign: false,
        peer_writes_foreign: None,
    });
    let theirs = LocalChannel::new(Fd::new(OwnedFd::from(theirs)));
    let binding = link.bind(1, 2, 8192);
    theirs
        .send(&Local::Imported { request: 0, result: Ok(Access::Mapped { nbytes: 8192 }) }, Some(Arc::clone(&region)))
        .unwrap();
    link.ready(ShmLink::LOCAL, Ready { token: 0, readable: true, writable: false, is_over: false }, &Nobody);
    let files = [&outgoing_fd, &incoming_fd, &bell, &*region];
    assert_eq!(files.map(num_mappings), [1; 4]);
    child.kill().unwrap();
    child.wait().unwrap();
    link.ready(ShmLink::PROCESS, Ready { token: 0, readable: true, writable: false, is_over: false }, &Nobody);
    link.close(&Failure::PeerLost("its process has exited".into()));
    assert!(link.is_quiet());
    link.give_back();
    assert_eq!(files.map(num_mappings), [0; 4]);
    // Whoever still has the link, or the binding, finds it closed.
    let source =
        Region::new(1, 1, 0, true, Backing::Foreign { address: std::ptr::dangling_mut(), owner: Box::new(()) });
    let extents = Extents::One(Extent { src: 0, dst: 0, nbytes: 0 });
    let inline = Inline { source: &source, binding: &binding, extents: &extents, imm: Some((Imm::new(1).unwrap(), 1)) };
    assert_eq!(link.try_inline(&inline), None);
    assert!(!link.poll(&Nobody));
    link.beat();
    link.stats();
    link.ready(ShmLink::PROCESS, Ready { token: 0, readable: true, writable: false, is_over: false }, &Nobody);
    link.give_back();
}

/// How often a file is mapped into this process.
fn num_mappings(file: &Fd) -> usize {
    let inode = std::fs::metadata(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap().ino().to_string();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.split_whitespace().nth(4) == Some(&inode) && line.contains("memfd:")).count()
}

const MESSAGE: usize = 64 << 10;
