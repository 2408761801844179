//! One submitted operation's end: done, or failed with one error.

use std::sync::PoisonError;
use std::time::Duration;

use anyfabric_wire::{Imm, Refusal};
use thiserror::Error;

use crate::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, MutexGuard};
use crate::{lock, Clock, Doorbell, Losses, PeerIdx, Recipients, Region};

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
    /// The submission's deadline passed, this long after it.
    #[error("the deadline of {} s passed", .0.as_secs_f64())]
    Timeout(Duration),
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
#[derive(Default)]
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
    /// It is none of the user's operations: statistics say nothing of it.
    pub is_probe: bool,
}

/// Shared by who submitted an operation and by the parts that carry it out.
///
/// Ends when the last part ends, or at the first failure; *quiesces* when no
/// part will touch source or destination any more, which after a failure is later.
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
    recipients: Recipients,
    is_probe: bool,
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
        let Terms { num_parts, nbytes, submitted_ns, deadline_ns, source, is_probe } = terms;
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
            recipients: Recipients::default(),
            is_probe,
            nbytes,
        }
    }

    /// The same ticket for another operation: nobody else has it, so that of the
    /// first nothing is left to tell anybody.
    pub fn renew(&mut self, terms: Terms) {
        let Terms { num_parts, nbytes, submitted_ns, deadline_ns, source, is_probe } = terms;
        self.state = AtomicU32::new(PENDING);
        self.parts = AtomicU32::new(num_parts.max(1));
        self.cancelled = AtomicBool::new(false);
        self.is_counted = AtomicBool::new(false);
        let end = self.end.get_mut().unwrap_or_else(PoisonError::into_inner);
        (end.failure, end.culprit) = (None, None);
        end.unfinished.clear();
        end.on_end.clear();
        self.recipients.clear();
        drop(self.take_source());
        self.source = AtomicPtr::new(source.map_or(std::ptr::null_mut(), |source| Arc::into_raw(source).cast_mut()));
        self.submitted_ns = AtomicU64::new(submitted_ns);
        self.deadline_ns = AtomicU64::new(deadline_ns);
        (self.nbytes, self.is_probe) = (nbytes, is_probe);
    }

    /// Notes for whom the parts are, before any is submitted: an operation that
    /// fails can then tell which were missing. Leaves the list of the operation
    /// before, of a renewed ticket.
    pub fn set_recipients(&mut self, recipients: &mut Recipients) {
        std::mem::swap(&mut self.recipients, recipients);
        self.recipients.await_parts();
        recipients.clear();
    }

    /// For whom the parts are.
    pub const fn recipients(&self) -> &Recipients {
        &self.recipients
    }

    /// The operation that was counted with [`TicketOffice::enter`] is this one, until
    /// it has quiesced. Before any part of it is carried out, and before anybody else
    /// has the ticket.
    pub fn count(&mut self) {
        self.is_counted = AtomicBool::new(true);
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
        // ORDERING: `has_ended` acquires what who settled it stored.
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
            DONE => TicketState::Done,
            FAILED => TicketState::Failed(self.lock().failure.clone().unwrap_or(Failure::Cancelled)),
            _ => TicketState::Pending,
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
        self.parts_ended(1);
    }

    /// So many parts have ended, and touch nothing any more.
    #[inline]
    pub(crate) fn parts_ended(&self, num_parts: u32) {
        // ORDERING: release what these parts wrote, acquire what the others wrote.
        if num_parts > 0 && self.parts.fetch_sub(num_parts, Ordering::AcqRel) == num_parts {
            self.quiesced();
        }
    }

    /// As [`Ticket::part_ended`], of a part for that peer.
    #[inline]
    pub fn part_ended_at(&self, peer: PeerIdx, result: Result<(), Failure>) {
        self.note_ended(peer);
        self.part_ended(result);
    }

    /// A part for that peer has ended, of which [`Ticket::parts_ended`] is told later.
    #[inline]
    pub(crate) fn note_ended(&self, peer: PeerIdx) {
        self.recipients.part_ended(peer);
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
        (self.lock().unfinished.clone(), self.recipients.num_awaited())
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
        let heard = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| match state {
            PENDING => Some(HEARD),
            ENDING => Some(ENDING_HEARD),
            _ => None,
        });
        match heard {
            Err(DONE | FAILED) => {
                drop(end);
                on_end();
            }
            _ => end.on_end.push(on_end),
        }
    }

    /// Every part has ended: well, unless it failed before; true if so. Nobody who
    /// wants to hear of it, no lock.
    fn settle_well(&self) -> bool {
        // ORDERING: nobody else ends it from now on; the parts are ordered by their number.
        let claim = |from, to| self.state.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed);
        let is_heard = match claim(PENDING, ENDING) {
            Ok(_) => false,
            Err(HEARD) if claim(HEARD, ENDING_HEARD).is_ok() => true,
            Err(_) => return false,
        };
        let took_ns = self.note_end();
        if !self.is_probe {
            // Before the end is told: whoever waited for it finds it in the statistics.
            self.recipients.note_done(took_ns);
        }
        // ORDERING: release, so that who sees the end sees the bytes.
        let (told, seen) = (Ordering::Release, Ordering::Relaxed);
        if is_heard || self.state.compare_exchange(ENDING, DONE, told, seen).is_err() {
            self.tell_done();
        }
        true
    }

    /// Notes that it ends now; how long after its submission.
    #[inline]
    fn note_end(&self) -> u64 {
        let now_ns = self.office.clock.now_ns();
        // ORDERING: published by who settles.
        self.ended_ns.store(now_ns, Ordering::Relaxed);
        now_ns.saturating_sub(self.submitted_ns())
    }

    /// It ends well, and somebody wants to hear of it.
    #[cold]
    fn tell_done(&self) {
        let mut end = self.lock();
        let on_end = std::mem::take(&mut end.on_end);
        // ORDERING: as in `settle_well`; under the lock, for whoever wants to hear of it just now.
        self.state.store(DONE, Ordering::Release);
        drop(end);
        on_end.into_iter().for_each(|run| run());
    }

    /// Fails it, unless it ends already, and tells who wanted to hear of it.
    #[cold]
    fn settle_ill(&self, failure: Failure, culprit: Option<PeerIdx>) {
        let mut end = self.lock();
        let is_open = |state| matches!(state, PENDING | HEARD);
        // ORDERING: a first look.
        if !is_open(self.state.load(Ordering::Relaxed)) {
            return;
        }
        let unfinished = self.recipients.unfinished();
        self.note_end();
        // ORDERING: release the time of the end; who asks for the failure asks for the lock.
        let fails = |state| is_open(state).then_some(FAILED);
        if self.state.fetch_update(Ordering::Release, Ordering::Relaxed, fails).is_err() {
            return;
        }
        (end.failure, end.culprit, end.unfinished) = (Some(failure), culprit, unfinished);
        if !self.is_probe {
            // Under the lock: whoever waited for it finds it in the statistics.
            self.recipients.note_failed();
        }
        // ORDERING: under the lock, see `count_shared`. What ends well leaves when it has quiesced too.
        if self.is_counted.load(Ordering::Relaxed) {
            self.office.leave(NOT_ENDED);
        }
        let on_end = std::mem::take(&mut end.on_end);
        drop(end);
        on_end.into_iter().for_each(|run| run());
        self.office.doorbell.notify();
    }

    fn take_source(&self) -> Option<Arc<Region>> {
        // ORDERING: `parts`, or the exclusive reference, orders it; the swap alone decides who lets go.
        let source = self.source.swap(std::ptr::null_mut(), Ordering::Relaxed);
        // SAFETY: what is not null is from `Arc::into_raw`, and whoever swaps it out is the only one to have it.
        (!source.is_null()).then(|| unsafe { Arc::from_raw(source) })
    }

    fn lock(&self) -> MutexGuard<'_, End> {
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
/// All parts have ended, and it will be done: nobody fails it any more.
const ENDING: u32 = 4;
/// As [`ENDING`]; somebody wants to hear of the end.
const ENDING_HEARD: u32 = 5;
/// Shares of [`TicketOffice::under_way`].
const NOT_ENDED: u64 = 1 << 32;
const NOT_QUIESCED: u64 = 1;
