//! What a group of NICs does with one that is only what the test says: who may block until it has news, and what becomes
//! of what it brings.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Barrier, Mutex};

use anyfabric_cuda::GpuMemory;
use anyfabric_transports::rdma::{
    Batch, Completions, Domain, Fault, Nic, NicAbout, NicError, NicGroup, PathOptions, PortLook, RailGroup, RailIdx,
    RailPath, RemoteMemory,
};
use anyfabric_transports::tcp::TcpLink;
use anyfabric_transports::{lock, Clock, Sink};
use anyfabric_wire::{NicLibrary, Rails};

/// What a NIC does, and what was asked of it.
#[derive(Default)]
struct Knobs {
    /// It promises no event now.
    refuses: AtomicBool,
    /// The next poll finds something.
    has_news: AtomicBool,
    num_armed: AtomicU32,
    num_polled: AtomicU32,
    num_looked: AtomicU32,
    num_heeded: AtomicU32,
    /// The next poll brings these messages.
    comes: Mutex<Vec<Vec<u8>>>,
    sent: Mutex<Vec<Vec<u8>>>,
    /// Of what was sent and has not ended.
    tokens: Mutex<Vec<u32>>,
    /// The next poll ends all that was sent.
    ends: AtomicBool,
}

/// A NIC with one rail.
struct StubNic {
    knobs: Arc<Knobs>,
    domain: Arc<StubDomain>,
    about: NicAbout,
    stay: Option<Arc<Stay>>,
}

/// Where a thread stays: while it asks for the descriptor, the NICs in its hands, or while it looks at the port.
struct Stay {
    at: Place,
    entered: Barrier,
    left: Barrier,
    was_there: AtomicBool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Descriptor,
    Port,
}

impl Stay {
    fn new(at: Place) -> Arc<Self> {
        let was_there = AtomicBool::new(false);
        Arc::new(Self { at, entered: Barrier::new(2), left: Barrier::new(2), was_there })
    }

    /// The first thread that comes by stays until the test lets it go on.
    fn pass(&self, place: Place) {
        if place == self.at && !self.was_there.swap(true, Ordering::SeqCst) {
            self.entered.wait();
            self.left.wait();
        }
    }
}

struct StubDomain;

impl Domain for StubDomain {
    type Memory = ();
    unsafe fn register(self: &Arc<Self>, _: *mut u8, _: u64, _: bool) -> Result<(), NicError> {
        Ok(())
    }
    unsafe fn register_gpu(self: &Arc<Self>, _: &GpuMemory, _: bool) -> Result<(), NicError> {
        Ok(())
    }
    fn forget((): ()) -> bool {
        true
    }
    fn remote((): &()) -> RemoteMemory {
        RemoteMemory { base: 0, key: 0 }
    }
}

impl Nic for StubNic {
    type Domain = StubDomain;

    fn domain(&self) -> &Arc<StubDomain> {
        &self.domain
    }
    fn about(&self) -> &NicAbout {
        &self.about
    }
    fn port(&self) -> PortLook {
        let (stay, knobs) = (self.stay.clone(), Arc::clone(&self.knobs));
        Box::new(move || {
            knobs.num_looked.fetch_add(1, Ordering::SeqCst);
            stay.iter().for_each(|stay| stay.pass(Place::Port));
            true
        })
    }
    fn announcements(&self) -> Option<RawFd> {
        Some(-1)
    }
    fn heed(&mut self) {
        self.knobs.num_heeded.fetch_add(1, Ordering::SeqCst);
    }
    fn open(&mut self) -> Result<RailIdx, NicError> {
        Ok(0)
    }
    fn address(&self, _: RailIdx) -> Vec<u8> {
        Vec::new()
    }
    fn connect(&mut self, _: RailIdx, _: &[u8]) -> Result<(), NicError> {
        Ok(())
    }
    fn fence(&mut self, _: RailIdx) -> bool {
        true
    }
    fn close(&mut self, _: RailIdx) -> bool {
        true
    }
    fn room(&self, _: RailIdx) -> usize {
        0
    }
    fn post(&mut self, _: RailIdx, _: &Batch<'_, ()>) -> Result<usize, Fault> {
        Ok(0)
    }
    fn signal(&mut self, _: RailIdx, _: u32, _: u32) -> Result<bool, Fault> {
        Ok(false)
    }
    fn send(&mut self, _: RailIdx, message: &[u8], token: u32) -> Result<bool, Fault> {
        lock(&self.knobs.sent).push(message.to_vec());
        lock(&self.knobs.tokens).push(token);
        Ok(true)
    }
    fn flush(&mut self, _: RailIdx) -> Result<(), Fault> {
        Ok(())
    }
    fn poll(&mut self, to: &mut impl Completions) -> bool {
        lock(&self.knobs.comes).drain(..).for_each(|message| to.message(0, &message));
        if self.knobs.ends.swap(false, Ordering::SeqCst) {
            lock(&self.knobs.tokens).drain(..).for_each(|token| to.completed(0, token, Ok(())));
        }
        self.knobs.num_polled.fetch_add(1, Ordering::SeqCst);
        self.knobs.has_news.swap(false, Ordering::SeqCst)
    }
    fn event_fd(&self) -> Option<RawFd> {
        self.stay.iter().for_each(|stay| stay.pass(Place::Descriptor));
        Some(-1)
    }
    fn arm(&mut self) -> bool {
        self.knobs.num_armed.fetch_add(1, Ordering::SeqCst);
        !self.knobs.refuses.load(Ordering::SeqCst)
    }
}

/// Nobody cares for what is reported.
struct Nobody;

impl Sink for Nobody {}

fn nic(stay: Option<Arc<Stay>>) -> (StubNic, Arc<Knobs>) {
    let about = NicAbout {
        name: "stub".into(),
        manner: "none".into(),
        gbps: 1,
        max_write_bytes: 1 << 20,
        max_message_bytes: 0,
        is_ordered: true,
        reaches_gpus: false,
    };
    let knobs = Arc::<Knobs>::default();
    (StubNic { knobs: Arc::clone(&knobs), domain: Arc::new(StubDomain), about, stay }, knobs)
}

fn armed(knobs: &Knobs) -> u32 {
    knobs.num_armed.load(Ordering::SeqCst)
}

/// Whoever has the NICs just now does not wait for their news: who blocks without having asked for an event would miss it.
#[test]
fn nobody_may_block_while_another_thread_has_the_nics() {
    let stay = Stay::new(Place::Descriptor);
    let (nic, knobs) = nic(Some(Arc::clone(&stay)));
    let group = RailGroup::new(NicLibrary::Verbs, vec![nic], Clock::Real);
    std::thread::scope(|scope| {
        let holder = scope.spawn(|| group.event_fds());
        stay.entered.wait();
        assert!(!group.arm(&Nobody), "nobody was asked for an event");
        assert_eq!(armed(&knobs), 0);
        stay.left.wait();
        holder.join().unwrap();
    });
    assert!(group.arm(&Nobody));
    assert_eq!(armed(&knobs), 1);
}

/// A device may take its time to say how its port is; what is posted or polled meanwhile does not wait for that.
#[test]
fn nobody_waits_for_a_look_at_the_ports() {
    let stay = Stay::new(Place::Port);
    let (nic, _) = nic(Some(Arc::clone(&stay)));
    let group = RailGroup::new(NicLibrary::Verbs, vec![nic], Clock::Real);
    std::thread::scope(|scope| {
        let looker = scope.spawn(|| group.look_at_ports(u64::MAX / 2));
        stay.entered.wait();
        assert!(group.arm(&Nobody), "the NICs are free");
        stay.left.wait();
        looker.join().unwrap();
    });
}

/// Time alone brings a look every tenth of a second; after each a NIC acts on what the look has read.
#[test]
fn an_announcement_is_looked_after_at_once() {
    let ((first, knobs), (second, _)) = (nic(None), nic(None));
    let group = RailGroup::new(NicLibrary::Verbs, vec![first, second], Clock::Real);
    assert_eq!(group.announcements(), [-1], "ports of one device have one descriptor");
    let begin = u64::MAX / 2;
    for (now_ns, is_announced, looks) in [
        (begin, false, 1),
        (begin + 1, false, 1),
        (begin + 1, true, 2),
        (begin + 2, false, 2),
        (begin + 100_000_001, false, 3),
    ] {
        if is_announced {
            group.hear(now_ns);
        } else {
            group.look_at_ports(now_ns);
        }
        assert_eq!(knobs.num_looked.load(Ordering::SeqCst), looks);
        assert_eq!(knobs.num_heeded.load(Ordering::SeqCst), looks);
    }
}

/// What came before the event was asked for makes none: it is looked for once more.
#[test]
fn nobody_may_block_before_what_came_was_found() {
    let (nic, knobs) = nic(None);
    let group = RailGroup::new(NicLibrary::Verbs, vec![nic], Clock::Real);
    knobs.has_news.store(true, Ordering::SeqCst);
    assert!(!group.arm(&Nobody));
    assert_eq!(knobs.num_polled.load(Ordering::SeqCst), 1);
    assert!(group.arm(&Nobody));
}

#[test]
fn nobody_may_block_while_one_nic_promises_nothing() {
    let ((first, knobs), (second, others)) = (nic(None), nic(None));
    let group = RailGroup::new(NicLibrary::Verbs, vec![first, second], Clock::Real);
    knobs.refuses.store(true, Ordering::SeqCst);
    assert!(!group.arm(&Nobody));
    assert_eq!((armed(&knobs), armed(&others)), (1, 1), "each is asked, although one refuses");
    knobs.refuses.store(false, Ordering::SeqCst);
    assert!(group.arm(&Nobody));
}

/// The caller may send as soon as both ends are connected, and says so over another way: a message overtakes that word.
#[test]
fn a_message_before_the_rail_is_said_to_stand_is_answered() {
    let (group, path, knobs) = called();
    lock(&knobs.comes).push([header(0, 7), b"hello".to_vec()].concat());
    group.poll(&Nobody);
    assert_eq!(*lock(&knobs.sent), [header(1, 7)]);
    path.on_message(Rails::Ready { rail: 0, attempt: 1 });
    lock(&knobs.comes).push(header(0, 8));
    group.poll(&Nobody);
    assert_eq!(*lock(&knobs.sent), [header(1, 7), header(1, 8)]);
}

/// An engine that closes asks for it: a NIC may drop what it has not sent when it is closed.
#[test]
fn an_answer_is_owed_until_its_send_has_ended() {
    let (group, path, knobs) = called();
    assert!(!path.owes_answers());
    lock(&knobs.comes).extend([header(0, 7), header(0, 8)]);
    group.poll(&Nobody);
    assert_eq!(lock(&knobs.sent).len(), 2);
    assert!(path.owes_answers());
    knobs.ends.store(true, Ordering::SeqCst);
    group.poll(&Nobody);
    assert!(!path.owes_answers());
    // Nor is one owed over a rail that is gone.
    lock(&knobs.comes).push(header(0, 9));
    group.poll(&Nobody);
    assert!(path.owes_answers());
    path.on_message(Rails::Broken { rail: 0, attempt: 1 });
    assert!(!path.owes_answers());
}

/// A group of one NIC, and a path whose peer has called its rail.
fn called() -> (Arc<RailGroup<StubNic>>, Arc<dyn RailPath>, Arc<Knobs>) {
    let (nic, knobs) = nic(None);
    let group = RailGroup::new(NicLibrary::Libfabric, vec![nic], Clock::Real);
    let control = Arc::new(TcpLink::new(1, Arc::default(), 1 << 16, 1, Clock::Real));
    let options =
        PathOptions { peer: 1, regions: Arc::default(), control, is_caller: false, key: KEY, tell: Arc::new(|_| ()) };
    let path = Arc::clone(&group).path(options);
    path.on_message(Rails::Offer { nics: vec![1] });
    path.on_message(Rails::Call { rail: 0, attempt: 1, address: vec![1] });
    (group, path, knobs)
}

/// A message without bytes, or an answer.
fn header(kind: u8, number: u64) -> Vec<u8> {
    let mut header = vec![0; 24];
    header[0] = kind;
    header[8..16].copy_from_slice(&number.to_le_bytes());
    header[16..].copy_from_slice(&KEY.to_le_bytes());
    header
}

const KEY: u64 = 0x0123_4567_89ab_cdef;
