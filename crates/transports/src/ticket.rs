//! One submitted operation's end: done, or failed with one error.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use anyfabric_wire::Refusal;
use thiserror::Error;

use crate::{lock, Clock, Doorbell, PeerIdx, Region};

/// Why an operation failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Failure {
    /// The target said no.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// The peer is dead, or was given up.
    #[error("the peer is lost: {0}")]
    PeerLost(String),
    /// The stream or NIC that carried it broke; the peer may live.
    #[error("the connection broke: {0}")]
    ConnectionBroken(String),
    /// The submission's deadline passed.
    #[error("the deadline of {0} ms passed")]
    Timeout(u64),
    /// Cancelled by its owner.
    #[error("cancelled")]
    Cancelled,
    /// The engine was closed.
    #[error("the engine was closed")]
    Closed,
    /// No path to the peer could be made.
    #[error("no path to the peer: {0}")]
    NoPath(String),
    /// No common secret, or the wrong one.
    #[error("not authenticated: {0}")]
    Unauthenticated(String),
    /// A bound of this machine was reached: descriptors, memory.
    #[error("{0}")]
    Exhausted(String),
    /// Nothing here can carry it.
    #[error("{0}")]
    Unsupported(String),
    /// The GPU that the source lies on is gone.
    #[error("{0}")]
    DeviceLost(String),
    /// The operating system refused.
    #[error("{0}")]
    System(String),
}

/// Where an operation stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TicketState {
    /// Under way.
    Pending,
    /// Source reusable, bytes placed at the target.
    Done,
    /// Any subset of the bytes may have landed.
    Failed(Failure),
}

/// Runs once when an operation ends; must be quick and must not block.
pub(crate) type OnEnd = Box<dyn FnOnce() + Send>;

/// Shared by who submitted an operation and by the parts that carry it out.
///
/// Ends when the last part ends, or at the first failure; *quiesces* when no
/// part will touch source or target any more, which after a failure is later.
pub struct Ticket {
    state: AtomicU32,
    parts: AtomicU32,
    cancelled: AtomicBool,
    end: Mutex<End>,
    ended_ns: AtomicU64,
    submitted_ns: AtomicU64,
    deadline_ns: AtomicU64,
    doorbell: Arc<Doorbell>,
    clock: Clock,
    /// Parts that have not ended, of an operation with several peers; in the order of the peers.
    awaited: OnceLock<Box<[(PeerIdx, AtomicU32)]>>,
    /// Bytes of the operation.
    pub nbytes: u64,
}

#[derive(Default)]
struct End {
    failure: Option<Failure>,
    /// Whose part failed, of several.
    culprit: Option<PeerIdx>,
    /// Whose parts had not ended when it failed, of several.
    unfinished: Vec<PeerIdx>,
    on_end: Vec<OnEnd>,
    /// Kept until the operation has quiesced.
    holds: Vec<Arc<Region>>,
}

impl Ticket {
    /// A ticket for `num_parts` parts, at least one. It fails at `deadline_ns`
    /// unless it has ended.
    pub fn new(doorbell: Arc<Doorbell>, clock: Clock, num_parts: u32, nbytes: u64, deadline_ns: u64) -> Self {
        let submitted_ns = clock.now_ns();
        Self {
            state: AtomicU32::new(PENDING),
            parts: AtomicU32::new(num_parts.max(1)),
            cancelled: AtomicBool::new(false),
            end: Mutex::default(),
            ended_ns: AtomicU64::new(0),
            submitted_ns: AtomicU64::new(submitted_ns),
            deadline_ns: AtomicU64::new(deadline_ns),
            doorbell,
            clock,
            awaited: OnceLock::new(),
            nbytes,
        }
    }

    /// Notes for whom the parts are, before any is submitted: an operation that
    /// fails can then tell which were missing.
    pub fn await_parts_of(&self, peers: impl Iterator<Item = PeerIdx>) {
        let mut peers: Vec<_> = peers.collect();
        peers.sort_unstable();
        let runs = peers.chunk_by(|left, right| left == right);
        let awaited = runs.map(|run| (run[0], AtomicU32::new(run.len() as u32))).collect();
        let _ = self.awaited.set(awaited);
    }

    /// Starts the time again: a watcher has just fired the operation.
    pub fn restart(&self, timeout_ns: u64) {
        let now_ns = self.clock.now_ns();
        // ORDERING: times are for people, and for a deadline that is looked at now and then.
        self.submitted_ns.store(now_ns, Ordering::Relaxed);
        self.deadline_ns.store(now_ns.saturating_add(timeout_ns), Ordering::Relaxed);
    }

    /// When it was submitted and when it ended, by the engine's clock.
    pub fn interval_ns(&self) -> Option<(u64, u64)> {
        // ORDERING: `has_ended` acquires what `settle` stored.
        self.has_ended().then(|| (self.submitted_ns.load(Ordering::Relaxed), self.ended_ns.load(Ordering::Relaxed)))
    }

    /// When it fails unless it has ended.
    pub fn deadline_ns(&self) -> u64 {
        // ORDERING: see `restart`.
        self.deadline_ns.load(Ordering::Relaxed)
    }

    /// When it was submitted.
    pub fn submitted_ns(&self) -> u64 {
        // ORDERING: see `restart`.
        self.submitted_ns.load(Ordering::Relaxed)
    }

    /// Keeps a region alive until the operation has quiesced.
    pub fn hold(&self, region: Arc<Region>) {
        self.lock().holds.push(region);
    }

    /// Where the operation stands.
    pub fn state(&self) -> TicketState {
        // ORDERING: pairs with the release in `settle`: who sees DONE may reuse the source.
        match self.state.load(Ordering::Acquire) {
            PENDING => TicketState::Pending,
            DONE => TicketState::Done,
            _ => TicketState::Failed(self.lock().failure.clone().unwrap_or(Failure::Cancelled)),
        }
    }

    /// Whether it has ended, well or not.
    #[inline]
    pub fn has_ended(&self) -> bool {
        // ORDERING: see `state`.
        self.state.load(Ordering::Acquire) != PENDING
    }

    /// Whether nothing of it will touch source or target any more.
    pub fn has_quiesced(&self) -> bool {
        // ORDERING: pairs with the release half of `part_ended`.
        self.parts.load(Ordering::Acquire) == 0
    }

    /// One part has ended: it touches nothing any more.
    pub fn part_ended(&self, result: Result<(), Failure>) {
        if let Err(failure) = result {
            self.fail(failure);
        }
        // ORDERING: release what this part wrote, acquire what the others wrote.
        if self.parts.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.settle(DONE, None, None);
            drop(std::mem::take(&mut self.lock().holds));
            self.doorbell.notify();
        }
    }

    /// As [`Ticket::part_ended`], of a part for that peer.
    pub fn part_ended_at(&self, peer: PeerIdx, result: Result<(), Failure>) {
        if let Some(awaited) = self.awaited.get() {
            if let Ok(at) = awaited.binary_search_by_key(&peer, |(awaited, _)| *awaited) {
                // ORDERING: for people.
                awaited[at].1.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.part_ended(result);
    }

    /// Fails the operation now, although parts may still be under way.
    pub fn fail(&self, failure: Failure) {
        self.settle(FAILED, Some(failure), None);
    }

    /// The same, because of the part for that peer.
    pub fn fail_by(&self, peer: PeerIdx, failure: Failure) {
        self.settle(FAILED, Some(failure), Some(peer));
    }

    /// The peer whose part made it fail, if it was one's.
    pub fn culprit(&self) -> Option<PeerIdx> {
        self.lock().culprit
    }

    /// Whose parts had not ended when it failed, and how many peers it had; none
    /// for an operation with one peer.
    pub fn unfinished(&self) -> (Vec<PeerIdx>, usize) {
        (self.lock().unfinished.clone(), self.awaited.get().map_or(0, |awaited| awaited.len()))
    }

    /// Asks the parts that have not been posted to give up.
    pub fn cancel(&self) {
        // ORDERING: a hint; whoever sees it late posts one part more.
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether a part that has not been posted should give up, and why.
    pub fn given_up(&self) -> Option<Failure> {
        if let TicketState::Failed(failure) = self.state() {
            return Some(failure);
        }
        // ORDERING: see `cancel`.
        self.cancelled.load(Ordering::Relaxed).then_some(Failure::Cancelled)
    }

    /// Runs `on_end` when the operation ends; at once if it has.
    pub fn on_end(&self, on_end: OnEnd) {
        let mut end = self.lock();
        if self.has_ended() {
            drop(end);
            on_end();
        } else {
            end.on_end.push(on_end);
        }
    }

    fn settle(&self, state: u32, failure: Option<Failure>, culprit: Option<PeerIdx>) {
        let mut end = self.lock();
        if self.has_ended() {
            return;
        }
        if let (true, Some(awaited)) = (failure.is_some(), self.awaited.get()) {
            // ORDERING: for people.
            let unfinished = awaited.iter().filter(|(_, parts)| parts.load(Ordering::Relaxed) > 0);
            end.unfinished = unfinished.map(|(peer, _)| *peer).collect();
        }
        (end.failure, end.culprit) = (failure, culprit);
        // ORDERING: published by the store of the state.
        self.ended_ns.store(self.clock.now_ns(), Ordering::Relaxed);
        let on_end = std::mem::take(&mut end.on_end);
        // ORDERING: release, so that who sees the end sees the bytes and the failure.
        self.state.store(state, Ordering::Release);
        drop(end);
        for run in on_end {
            run();
        }
        self.doorbell.notify();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, End> {
        lock(&self.end)
    }
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticket").field("state", &self.state()).field("nbytes", &self.nbytes).finish()
    }
}

const PENDING: u32 = 0;
const DONE: u32 = 1;
const FAILED: u32 = 2;
