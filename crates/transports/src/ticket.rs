//! One submitted operation's end: done, or failed with one error.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyfabric_wire::{Imm, Refusal};
use thiserror::Error;

use crate::{lock, Clock, Doorbell, Losses, PeerIdx, Region};

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

/// What the tickets of one engine share.
pub struct TicketOffice {
    doorbell: Arc<Doorbell>,
    clock: Clock,
    /// Counts that will never come.
    pub losses: Losses,
    /// Operations under way: in the upper half those that have not ended, in the
    /// lower those that have not quiesced.
    under_way: AtomicU64,
}

/// What a ticket is for.
pub struct Terms {
    /// Parts, at least one.
    pub num_parts: u32,
    /// Bytes of the operation.
    pub nbytes: u64,
    /// When it was submitted.
    pub submitted_ns: u64,
    /// When it fails unless it has ended.
    pub deadline_ns: u64,
    /// Kept alive until the operation has quiesced.
    pub source: Option<Arc<Region>>,
}

/// Shared by who submitted an operation and by the parts that carry it out.
///
/// Ends when the last part ends, or at the first failure; *quiesces* when no
/// part will touch source or target any more, which after a failure is later.
/// An operation that ends well takes no lock.
pub struct Ticket {
    state: AtomicU32,
    parts: AtomicU32,
    cancelled: AtomicBool,
    is_counted: AtomicBool,
    end: Mutex<End>,
    /// From [`Arc::into_raw`]; null once let go of.
    source: AtomicPtr<Region>,
    ended_ns: AtomicU64,
    submitted_ns: AtomicU64,
    deadline_ns: AtomicU64,
    office: Arc<TicketOffice>,
    /// Parts that have not ended, of an operation with several peers; in the order of the peers.
    awaited: Vec<(PeerIdx, AtomicU32)>,
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
}

impl TicketOffice {
    /// Of the engine with that doorbell and clock.
    pub fn new(doorbell: Arc<Doorbell>, clock: Clock) -> Self {
        Self { doorbell, clock, losses: Losses::default(), under_way: AtomicU64::new(0) }
    }

    /// Counted operations that have not quiesced.
    #[inline]
    pub fn num_under_way(&self) -> usize {
        // ORDERING: a bound for people; who waits for room is woken after it fell.
        (self.under_way.load(Ordering::Relaxed) & u64::from(u32::MAX)) as usize
    }

    /// Counts one more operation, if fewer than `limit` are under way; see
    /// [`Ticket::count`].
    #[inline]
    pub fn enter(&self, limit: usize) -> bool {
        // ORDERING: a bound; who ends a part was given its ticket after this.
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        let one_more =
            |now: u64| ((now & u64::from(u32::MAX)) < limit as u64).then_some(now + NOT_ENDED + NOT_QUIESCED);
        self.under_way.fetch_update(set, fetch, one_more).is_ok()
    }

    /// Counted operations that have not ended.
    pub fn num_pending(&self) -> usize {
        // ORDERING: acquire what ended; partner: `leave`.
        (self.under_way.load(Ordering::Acquire) >> 32) as usize
    }

    fn leave(&self, share: u64) {
        // ORDERING: release; partner: `num_pending`.
        self.under_way.fetch_sub(share, Ordering::Release);
    }
}

impl Ticket {
    /// A ticket for an operation; see [`Ticket::count`].
    pub fn new(office: Arc<TicketOffice>, terms: Terms) -> Self {
        let Terms { num_parts, nbytes, submitted_ns, deadline_ns, source } = terms;
        Self {
            state: AtomicU32::new(PENDING),
            parts: AtomicU32::new(num_parts.max(1)),
            cancelled: AtomicBool::new(false),
            is_counted: AtomicBool::new(false),
            end: Mutex::default(),
            source: AtomicPtr::new(source.map_or(std::ptr::null_mut(), |source| Arc::into_raw(source).cast_mut())),
            ended_ns: AtomicU64::new(0),
            submitted_ns: AtomicU64::new(submitted_ns),
            deadline_ns: AtomicU64::new(deadline_ns),
            office,
            awaited: Vec::new(),
            nbytes,
        }
    }

    /// The same ticket for another operation: nobody else has it, so that of the
    /// first nothing is left to tell anybody.
    pub fn renew(&mut self, terms: Terms) {
        let Terms { num_parts, nbytes, submitted_ns, deadline_ns, source } = terms;
        *self.state.get_mut() = PENDING;
        *self.parts.get_mut() = num_parts.max(1);
        *self.cancelled.get_mut() = false;
        *self.is_counted.get_mut() = false;
        let end = self.end.get_mut().unwrap_or_else(PoisonError::into_inner);
        (end.failure, end.culprit) = (None, None);
        end.unfinished.clear();
        end.on_end.clear();
        self.awaited.clear();
        drop(self.take_source());
        *self.source.get_mut() = source.map_or(std::ptr::null_mut(), |source| Arc::into_raw(source).cast_mut());
        *self.submitted_ns.get_mut() = submitted_ns;
        *self.deadline_ns.get_mut() = deadline_ns;
        self.nbytes = nbytes;
    }

    /// Notes for whom the parts are, before any is submitted: an operation that
    /// fails can then tell which were missing. Of a renewed ticket, with the
    /// memory of the operation before.
    pub fn await_parts_of(&mut self, peers: &[PeerIdx]) {
        self.awaited.clear();
        self.awaited.extend(peers.iter().map(|peer| (*peer, AtomicU32::new(1))));
        if peers.is_sorted_by(|peer, next| peer < next) {
            return;
        }
        self.awaited.sort_unstable_by_key(|(peer, _)| *peer);
        self.awaited.dedup_by(|(peer, _), (before, parts)| {
            let is_same = peer == before;
            *parts.get_mut() += u32::from(is_same);
            is_same
        });
    }

    /// The operation that was counted with [`TicketOffice::enter`] is this one, until
    /// it has quiesced. Before any part of it is carried out, and before anybody else
    /// has the ticket.
    pub fn count(&mut self) {
        *self.is_counted.get_mut() = true;
    }

    /// Counts an operation, whatever the limit, that somebody may cancel this very
    /// moment.
    pub fn count_shared(&self) {
        let _end = self.lock();
        let share = if self.has_ended() { NOT_QUIESCED } else { NOT_ENDED | NOT_QUIESCED };
        // ORDERING: as in `enter`; it fails under the lock, and then sees this.
        self.is_counted.store(true, Ordering::Relaxed);
        self.office.under_way.fetch_add(share, Ordering::Relaxed);
    }

    /// Starts the time again: a watcher has just fired the operation.
    pub fn restart(&self, timeout_ns: u64) {
        let now_ns = self.office.clock.now_ns();
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
    #[inline]
    pub fn submitted_ns(&self) -> u64 {
        // ORDERING: see `restart`.
        self.submitted_ns.load(Ordering::Relaxed)
    }

    /// Where the operation stands.
    pub fn state(&self) -> TicketState {
        // ORDERING: pairs with the release of who settles: who sees DONE may reuse the source.
        match self.state.load(Ordering::Acquire) {
            PENDING | HEARD => TicketState::Pending,
            DONE => TicketState::Done,
            _ => TicketState::Failed(self.lock().failure.clone().unwrap_or(Failure::Cancelled)),
        }
    }

    /// Whether it has ended, well or not.
    #[inline]
    pub fn has_ended(&self) -> bool {
        // ORDERING: see `state`.
        matches!(self.state.load(Ordering::Acquire), DONE | FAILED)
    }

    /// Whether nothing of it will touch source or target any more.
    #[inline]
    pub fn has_quiesced(&self) -> bool {
        // ORDERING: pairs with the release half of `part_ended`.
        self.parts.load(Ordering::Acquire) == 0
    }

    /// One part has ended: it touches nothing any more.
    #[inline]
    pub fn part_ended(&self, result: Result<(), Failure>) {
        if let Err(failure) = result {
            self.fail(failure);
        }
        // ORDERING: release what this part wrote, acquire what the others wrote.
        if self.parts.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.quiesced();
        }
    }

    /// As [`Ticket::part_ended`], of a part for that peer.
    #[inline]
    pub fn part_ended_at(&self, peer: PeerIdx, result: Result<(), Failure>) {
        if let Ok(at) = self.awaited.binary_search_by_key(&peer, |(awaited, _)| *awaited) {
            // ORDERING: for people.
            self.awaited[at].1.fetch_sub(1, Ordering::Relaxed);
        }
        self.part_ended(result);
    }

    fn quiesced(&self) {
        // ORDERING: as in `enter`.
        let is_counted = self.is_counted.load(Ordering::Relaxed);
        let ends_now = self.settle_well();
        drop(self.take_source());
        if is_counted {
            self.office.leave(if ends_now { NOT_ENDED | NOT_QUIESCED } else { NOT_QUIESCED });
        }
        self.office.doorbell.notify();
    }

    /// Fails the operation now, although parts may still be under way.
    pub fn fail(&self, failure: Failure) {
        self.settle_ill(failure, None);
    }

    /// The same, because of the part for that peer.
    pub fn fail_by(&self, peer: PeerIdx, failure: Failure) {
        self.settle_ill(failure, Some(peer));
    }

    /// Has the receiver told that a part's count will never come.
    pub(crate) fn note_loss(&self, peer: PeerIdx, imm: Imm) {
        self.office.losses.note(peer, imm);
    }

    /// The peer whose part made it fail, if it was one's.
    pub fn culprit(&self) -> Option<PeerIdx> {
        self.lock().culprit
    }

    /// Whose parts had not ended when it failed, and how many peers it had; none
    /// for an operation with one peer.
    pub fn unfinished(&self) -> (Vec<PeerIdx>, usize) {
        (self.lock().unfinished.clone(), self.awaited.len())
    }

    /// Asks the parts that have not been posted to give up.
    pub fn cancel(&self) {
        // ORDERING: a hint; whoever sees it late posts one part more.
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether a part that has not been posted should give up, and why.
    #[inline]
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
        // ORDERING: either this is seen by who settles, who then takes the lock, or the end is seen here.
        match self.state.compare_exchange(PENDING, HEARD, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) | Err(HEARD) => end.on_end.push(on_end),
            Err(_) => {
                drop(end);
                on_end();
            }
        }
    }

    /// Every part has ended: well, unless it failed before; true if so. Nobody who
    /// wants to hear of it, no lock.
    fn settle_well(&self) -> bool {
        if self.has_ended() {
            return false;
        }
        // ORDERING: published by the exchange.
        self.ended_ns.store(self.office.clock.now_ns(), Ordering::Relaxed);
        // ORDERING: release, so that who sees the end sees the bytes.
        match self.state.compare_exchange(PENDING, DONE, Ordering::Release, Ordering::Acquire) {
            Ok(_) => true,
            Err(HEARD) => self.settle(DONE, None),
            Err(_) => false,
        }
    }

    fn settle_ill(&self, failure: Failure, culprit: Option<PeerIdx>) {
        if self.settle(FAILED, Some((failure, culprit))) {
            self.office.doorbell.notify();
        }
    }

    /// Ends it, if nobody has, and tells who wanted to hear of it.
    #[cold]
    fn settle(&self, to: u32, failure: Option<(Failure, Option<PeerIdx>)>) -> bool {
        let mut end = self.lock();
        if self.has_ended() {
            return false;
        }
        if failure.is_some() {
            // ORDERING: for people.
            let unfinished = self.awaited.iter().filter(|(_, parts)| parts.load(Ordering::Relaxed) > 0);
            end.unfinished = unfinished.map(|(peer, _)| *peer).collect();
        }
        (end.failure, end.culprit) = failure.map_or((None, None), |(failure, culprit)| (Some(failure), culprit));
        // ORDERING: published by the exchange.
        self.ended_ns.store(self.office.clock.now_ns(), Ordering::Relaxed);
        let on_end = std::mem::take(&mut end.on_end);
        // ORDERING: release, so that who sees the end sees the bytes and the failure; from PENDING it may end well
        // meanwhile, and then nobody wanted to hear of it.
        let settled = self
            .state
            .fetch_update(Ordering::Release, Ordering::Acquire, |state| matches!(state, PENDING | HEARD).then_some(to));
        if settled.is_err() {
            (end.failure, end.culprit) = (None, None);
            end.unfinished.clear();
        }
        // ORDERING: under the lock, see `count_shared`. What ends well leaves when it has quiesced too.
        if to == FAILED && settled.is_ok() && self.is_counted.load(Ordering::Relaxed) {
            self.office.leave(NOT_ENDED);
        }
        drop(end);
        for run in on_end {
            run();
        }
        settled.is_ok()
    }

    fn take_source(&self) -> Option<Arc<Region>> {
        // ORDERING: `parts`, or the exclusive reference, orders it; the swap alone decides who lets go.
        let source = self.source.swap(std::ptr::null_mut(), Ordering::Relaxed);
        // SAFETY: what is not null is from `Arc::into_raw`, and whoever swaps it out is the only one to have it.
        (!source.is_null()).then(|| unsafe { Arc::from_raw(source) })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, End> {
        lock(&self.end)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        drop(self.take_source());
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
/// As [`PENDING`]; somebody wants to hear of the end.
const HEARD: u32 = 3;
/// Shares of [`TicketOffice::under_way`].
const NOT_ENDED: u64 = 1 << 32;
const NOT_QUIESCED: u64 = 1;
