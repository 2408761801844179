//! Who may block until a NIC has news: a group of NICs over one that is only what the test says.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Barrier};

use anyfabric_cuda::GpuMemory;
use anyfabric_transports::rdma::{
    Batch, Completions, Domain, Fault, Nic, NicAbout, NicError, NicGroup, RailGroup, RailIdx, RemoteMemory,
};
use anyfabric_transports::{Clock, PeerIdx, Sink};
use anyfabric_wire::{Imm, NicLibrary, Refusal};

/// What a NIC does, and what was asked of it.
#[derive(Default)]
struct Knobs {
    /// It promises no event now.
    refuses: AtomicBool,
    /// The next poll finds something.
    has_news: AtomicBool,
    num_armed: AtomicU32,
    num_polled: AtomicU32,
}

/// A NIC without rails.
struct StubNic {
    knobs: Arc<Knobs>,
    domain: Arc<StubDomain>,
    about: NicAbout,
    /// Whoever asks for the descriptor first stays there, the NICs in its hands, until the second barrier.
    stay: Option<Arc<(AtomicBool, Barrier, Barrier)>>,
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
    fn is_up(&mut self) -> bool {
        true
    }
    fn open(&mut self) -> Result<RailIdx, NicError> {
        Err(NicError::Device("it has no rails".into()))
    }
    fn address(&self, _: RailIdx) -> Vec<u8> {
        Vec::new()
    }
    fn connect(&mut self, _: RailIdx, _: &[u8]) -> Result<(), NicError> {
        Ok(())
    }
    fn fence(&mut self, _: RailIdx) {}
    fn close(&mut self, _: RailIdx) {}
    fn room(&self, _: RailIdx) -> usize {
        0
    }
    fn post(&mut self, _: RailIdx, _: &Batch<'_, ()>) -> Result<usize, Fault> {
        Ok(0)
    }
    fn signal(&mut self, _: RailIdx, _: u32, _: u32) -> Result<bool, Fault> {
        Ok(false)
    }
    fn send(&mut self, _: RailIdx, _: &[u8], _: u32) -> Result<bool, Fault> {
        Ok(false)
    }
    fn flush(&mut self, _: RailIdx) -> Result<(), Fault> {
        Ok(())
    }
    fn poll(&mut self, _: &mut impl Completions) -> bool {
        self.knobs.num_polled.fetch_add(1, Ordering::SeqCst);
        self.knobs.has_news.swap(false, Ordering::SeqCst)
    }
    fn event_fd(&self) -> Option<RawFd> {
        if let Some(stay) = self.stay.as_ref().filter(|stay| !stay.0.swap(true, Ordering::SeqCst)) {
            stay.1.wait();
            stay.2.wait();
        }
        Some(-1)
    }
    fn arm(&mut self) -> bool {
        self.knobs.num_armed.fetch_add(1, Ordering::SeqCst);
        !self.knobs.refuses.load(Ordering::SeqCst)
    }
}

/// Nothing is reported by a NIC without rails.
struct Nobody;

impl Sink for Nobody {
    fn arrived(&self, _: PeerIdx, _: Imm, _: u64) -> Result<(), Refusal> {
        Ok(())
    }
    fn invisible(&self, _: PeerIdx, _: Imm, _: &str) {}
    fn message(&self, _: PeerIdx, _: Vec<u8>) -> Result<(), Refusal> {
        Ok(())
    }
    fn control(&self, _: PeerIdx, _: u64, _: &[u8]) {}
    fn heard(&self, _: PeerIdx) {}
    fn broken(&self, _: PeerIdx, _: u8, _: &str) {}
    fn exited(&self, _: PeerIdx) {}
}

fn nic(stay: Option<Arc<(AtomicBool, Barrier, Barrier)>>) -> (StubNic, Arc<Knobs>) {
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
    let stay = Arc::new((AtomicBool::new(false), Barrier::new(2), Barrier::new(2)));
    let (nic, knobs) = nic(Some(Arc::clone(&stay)));
    let group = RailGroup::new(NicLibrary::Verbs, vec![nic], Clock::Real);
    std::thread::scope(|scope| {
        let holder = scope.spawn(|| group.event_fds());
        stay.1.wait();
        assert!(!group.arm(&Nobody), "nobody was asked for an event");
        assert_eq!(armed(&knobs), 0);
        stay.2.wait();
        holder.join().unwrap();
    });
    assert!(group.arm(&Nobody));
    assert_eq!(armed(&knobs), 1);
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
