//! Counting arrivals.
//!
//! A counter's number is its total of arrived quarters, divided by four; it
//! only grows. Quarters of different peers are kept apart until they make a
//! whole: two writes that both fail halfway are not one that came. Arrivals that
//! nobody has opened a counter for are kept, up to a bound
//! ([`crate::early`]). Immediates of the engine's own (2^29 and up) are handed out
//! in one sequence; a late arrival for one whose counter is closed is dropped,
//! and it is not handed out again before every source has said that nothing
//! with it is under way.

mod missed;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyfabric_transports::{Doorbell, Failure, PeerIdx};
use anyfabric_wire::{EngineId, Imm, Refusal};
use arc_swap::ArcSwapOption;
use rustc_hash::FxHashMap;

use crate::early::{Early, Missing};
use crate::fractions::Fractions;
use crate::inner::{lock, Inner};
use crate::{Code, Error, Result};

/// The arrivals of one immediate at this engine. Closed on drop.
pub struct Counter {
    inner: Arc<Inner>,
    state: Arc<State>,
}

impl Counter {
    pub(crate) fn new(inner: Arc<Inner>, state: Arc<State>) -> Self {
        Self { inner, state }
    }

    /// The immediate.
    pub fn imm(&self) -> Imm {
        self.state.imm
    }

    /// Arrivals since the first.
    pub fn value(&self) -> u64 {
        self.inner.glance();
        self.state.value()
    }

    /// Waits until at least `n` arrivals were counted in all; the bytes of
    /// each are visible then.
    ///
    /// # Errors
    /// `WaitTimeout`; `PeerLost`, `TransferFailed` when `n` will not be
    /// reached; `Closed`.
    pub fn wait(&self, n: u64, timeout: Option<Duration>) -> Result<()> {
        self.inner.check_fork()?;
        let state = &self.state;
        let missing = || u32::try_from(n.saturating_sub(state.value())).unwrap_or(u32::MAX);
        if self.inner.wait_for_arrivals(timeout, || state.is_settled(n), missing) {
            return state.outcome(n);
        }
        let message = format!("imm {}: {} of {n} arrivals within {timeout:?}", state.imm.value(), state.value());
        Err(Error::new(Code::WaitTimeout, message).during("counter"))
    }

    /// Runs `on_settled` once, when `wait(n)` would return; at once if so.
    pub fn on_settled(&self, n: u64, on_settled: Box<dyn FnOnce() + Send>) {
        // From now on every arrival may be the one: whoever blocks must hear of each.
        self.inner.counters.add_waiter();
        self.inner.doorbell.reset_patience();
        let inner = Arc::clone(&self.inner);
        let run = Box::new(move || {
            inner.counters.remove_waiter();
            on_settled();
        });
        self.state.on_settled(n, run);
        self.inner.wake();
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        // ORDERING: for people.
        self.state.closed.load(Ordering::Relaxed)
    }

    /// Stops counting; fails the waiters with `Closed`.
    pub fn close(&self) {
        if !self.is_closed() && self.inner.check_fork().is_ok() {
            let retire = self.inner.counters.close(&self.state);
            self.inner.retire_imm(self.state.imm, retire);
        }
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.close();
    }
}

impl std::fmt::Debug for Counter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Counter").field("imm", &self.state.imm.value()).field("value", &self.state.value()).finish()
    }
}

/// What is counted, shared by the counter and the table.
pub(crate) struct State {
    imm: Imm,
    quarters: AtomicU64,
    closed: AtomicBool,
    settled_early: AtomicBool,
    has_waiters: AtomicBool,
    rest: Mutex<Rest>,
}

#[derive(Default)]
struct Rest {
    failure: Option<Error>,
    sources: Vec<EngineId>,
    waiters: Vec<(u64, Box<dyn FnOnce() + Send>)>,
}

impl State {
    pub(crate) fn value(&self) -> u64 {
        // ORDERING: acquire the bytes; partner: `add`. Sequentially consistent because a sleeper looks here
        // after it has announced itself at the doorbell.
        self.quarters.load(Ordering::SeqCst) / 4
    }

    fn add(&self, quarters: u64, doorbell: &Doorbell) {
        // ORDERING: release the bytes, which the transport has made visible to this thread; and the fence before the
        // looks for waiters and sleepers.
        self.quarters.fetch_add(quarters, Ordering::SeqCst);
        if self.has_waiters.load(Ordering::SeqCst) {
            self.run_waiters();
        }
        doorbell.notify_after_swap();
    }

    fn is_settled(&self, n: u64) -> bool {
        // ORDERING: acquire the failure; partner: `fail`.
        self.value() >= n || self.settled_early.load(Ordering::Acquire)
    }

    pub(crate) fn outcome(&self, n: u64) -> Result<()> {
        if self.value() >= n {
            return Ok(());
        }
        let failure = self.lock().failure.clone();
        Err(failure.unwrap_or_else(|| Error::new(Code::Closed, "the counter is closed").during("counter")))
    }

    fn on_settled(&self, n: u64, on_settled: Box<dyn FnOnce() + Send>) {
        let mut rest = self.lock();
        rest.waiters.push((n, on_settled));
        // ORDERING: announced before the look below; partner: `add`.
        self.has_waiters.store(true, Ordering::SeqCst);
        if self.is_settled(n) {
            let own = rest.waiters.pop();
            drop(rest);
            if let Some((_, run)) = own {
                run();
            }
        }
    }

    fn fail(&self, error: Error) {
        let waiters = {
            let mut rest = self.lock();
            rest.failure.get_or_insert(error);
            // ORDERING: release the failure; partner: `is_settled`.
            self.settled_early.store(true, Ordering::Release);
            std::mem::take(&mut rest.waiters)
        };
        for (_, run) in waiters {
            run();
        }
    }

    fn run_waiters(&self) {
        let value = self.value();
        let due: Vec<_> = {
            let mut rest = self.lock();
            let (due, kept): (Vec<_>, Vec<_>) =
                std::mem::take(&mut rest.waiters).into_iter().partition(|(n, _)| *n <= value);
            // ORDERING: under the lock.
            self.has_waiters.store(!kept.is_empty(), Ordering::SeqCst);
            rest.waiters = kept;
            due
        };
        for (_, run) in due {
            run();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Rest> {
        lock(&self.rest)
    }
}

/// Every counter of an engine.
pub(crate) struct Counters {
    table: Mutex<Table>,
    /// Counters that are open, each at the place of its imm; of several the last
    /// that counted something. Found here, an arrival takes no lock.
    recent: Box<[ArcSwapOption<State>; NUM_RECENT]>,
    doorbell: Arc<Doorbell>,
    num_waiters: AtomicUsize,
}

#[derive(Default)]
struct Table {
    by_imm: FxHashMap<u32, Entry>,
    early: Early,
    /// Quarters that do not make a whole yet, by imm and peer. Only of imms that
    /// have an entry.
    fractions: Fractions,
    /// Imms of ours that may still be under way somewhere.
    retiring: HashMap<u32, HashSet<EngineId>>,
    next: u32,
    /// The engine closes: nothing is counted any more.
    is_closed: bool,
}

enum Entry {
    Open(Arc<State>),
    Early { quarters: u64, peer: PeerIdx, missing: Option<Missing> },
}

impl Counters {
    pub(crate) fn new(doorbell: Arc<Doorbell>) -> Self {
        let table = Table { next: Imm::FIRST_OF_ENGINE, ..Table::default() };
        let recent = Box::new([const { ArcSwapOption::const_empty() }; NUM_RECENT]);
        Self { table: Mutex::new(table), recent, doorbell, num_waiters: AtomicUsize::new(0) }
    }

    /// Whether somebody wants to hear of a count without blocking for it.
    pub(crate) fn has_waiters(&self) -> bool {
        // ORDERING: `add_waiter` comes before the reset of the patience, which has a lock.
        self.num_waiters.load(Ordering::SeqCst) > 0
    }

    fn add_waiter(&self) {
        self.num_waiters.fetch_add(1, Ordering::SeqCst);
    }

    fn remove_waiter(&self) {
        self.num_waiters.fetch_sub(1, Ordering::SeqCst);
    }

    /// Opens a counter for `imm`, or for a fresh one. `name_of` tells a peer's
    /// address.
    pub(crate) fn open(
        &self,
        imm: Option<Imm>,
        sources: Vec<EngineId>,
        name_of: impl FnOnce(PeerIdx) -> String,
    ) -> Result<Arc<State>> {
        let mut table = self.lock();
        if table.is_closed {
            return Err(Error::new(Code::Closed, "the engine is closed").during("counter"));
        }
        let imm = match imm {
            Some(imm) => imm,
            None => table.fresh()?,
        };
        let (quarters, missing) = match table.by_imm.remove(&imm.value()) {
            Some(Entry::Open(state)) => {
                table.by_imm.insert(imm.value(), Entry::Open(state));
                let message = format!("a counter for imm {} is open already; close it first", imm.value());
                return Err(Error::invalid(message).during("counter"));
            }
            Some(Entry::Early { quarters, peer, missing }) => {
                table.early.given(peer);
                (quarters, missing)
            }
            None => (0, table.early.take_dropped(imm)),
        };
        let state = Arc::new(State {
            imm,
            quarters: AtomicU64::new(quarters),
            closed: AtomicBool::new(false),
            settled_early: AtomicBool::new(false),
            has_waiters: AtomicBool::new(false),
            rest: Mutex::new(Rest { failure: None, sources, waiters: Vec::new() }),
        });
        table.by_imm.insert(imm.value(), Entry::Open(Arc::clone(&state)));
        drop(table);
        if let Some(missing) = missing {
            state.fail(missing.error(imm, &name_of(missing.peer())));
        }
        Ok(state)
    }

    /// Counts an arrival.
    ///
    /// # Errors
    /// [`Refusal::Full`]: there is no counter, and no room to keep it for one.
    #[inline]
    pub(crate) fn add(&self, peer: PeerIdx, imm: Imm, quarters: u64) -> std::result::Result<(), Refusal> {
        if quarters.is_multiple_of(4) {
            let recent = self.recent(imm).load();
            // ORDERING: an arrival that overtakes the end of its counter came before it.
            if let Some(state) = recent.as_ref().filter(|it| it.imm == imm && !it.closed.load(Ordering::Acquire)) {
                state.add(quarters, &self.doorbell);
                return Ok(());
            }
        }
        self.add_slowly(peer, imm, quarters)
    }

    fn add_slowly(&self, peer: PeerIdx, imm: Imm, quarters: u64) -> std::result::Result<(), Refusal> {
        let mut guard = self.lock();
        let table = &mut *guard;
        match table.by_imm.get_mut(&imm.value()) {
            Some(Entry::Open(state)) => {
                let quarters = table.fractions.whole(peer, imm, quarters);
                let state = Arc::clone(state);
                // Under the lock, like `close`, which takes it out again.
                self.recent(imm).store(Some(Arc::clone(&state)));
                drop(guard);
                state.add(quarters, &self.doorbell);
                Ok(())
            }
            Some(Entry::Early { quarters: early, .. }) => {
                *early += table.fractions.whole(peer, imm, quarters);
                Ok(())
            }
            // Nobody opens an imm of ours but by asking for a fresh one: this is a late arrival.
            None if imm.is_of_engine() => Ok(()),
            None => {
                let missing = table.keep(peer, imm)?;
                let quarters = table.fractions.whole(peer, imm, quarters);
                table.by_imm.insert(imm.value(), Entry::Early { quarters, peer, missing });
                Ok(())
            }
        }
    }

    /// A counted operation of `peer` failed: its count will never come.
    ///
    /// # Errors
    /// As [`Counters::add`].
    pub(crate) fn lost(&self, peer: PeerIdx, peer_name: &str, imm: Imm) -> std::result::Result<(), Refusal> {
        self.lacks(Missing::Failed(peer), peer_name, imm)
    }

    /// An arrival came, and its bytes cannot be made visible.
    ///
    /// # Errors
    /// As [`Counters::add`].
    pub(crate) fn invisible(&self, peer: PeerIdx, peer_name: &str, imm: Imm) -> std::result::Result<(), Refusal> {
        self.lacks(Missing::Invisible(peer), peer_name, imm)
    }

    fn lacks(&self, failed: Missing, peer_name: &str, imm: Imm) -> std::result::Result<(), Refusal> {
        let peer = failed.peer();
        let mut table = self.lock();
        match table.by_imm.get_mut(&imm.value()) {
            Some(Entry::Open(state)) => {
                let state = Arc::clone(state);
                drop(table);
                state.fail(failed.error(imm, peer_name));
                self.doorbell.notify();
            }
            Some(Entry::Early { missing, .. }) => *missing = Some(failed),
            None if imm.is_of_engine() => {}
            None => {
                table.keep(peer, imm)?;
                table.by_imm.insert(imm.value(), Entry::Early { quarters: 0, peer, missing: Some(failed) });
            }
        }
        Ok(())
    }

    /// A peer is lost: fails the counters that name it as a source.
    pub(crate) fn peer_lost(&self, engine: EngineId, peer_name: &str, why: &Failure) {
        let states: Vec<_> = {
            let mut table = self.lock();
            table.retiring.retain(|_, sources| {
                sources.remove(&engine);
                !sources.is_empty()
            });
            table.open_states()
        };
        for state in states {
            if state.lock().sources.contains(&engine) {
                let message = format!("source {peer_name} of imm {}: {why}", state.imm.value());
                let mut error = Error::new(Code::PeerLost, message).during("counter");
                error.context.peer = Some(peer_name.to_owned());
                state.fail(error);
            }
        }
        self.doorbell.notify();
    }

    /// Fails every counter: the engine closes.
    pub(crate) fn close_all(&self) {
        let mut table = self.lock();
        table.is_closed = true;
        let states = table.open_states();
        drop(table);
        for state in states {
            // ORDERING: for people.
            state.closed.store(true, Ordering::Relaxed);
            state.fail(Error::new(Code::Closed, "the engine is closed").during("counter"));
        }
        self.doorbell.notify();
    }

    /// Closes a counter; returns the sources that must say that nothing with
    /// its imm is under way before it is handed out again.
    fn close(&self, state: &State) -> Vec<EngineId> {
        // ORDERING: the swap alone decides who closes.
        if state.closed.swap(true, Ordering::AcqRel) {
            return Vec::new();
        }
        let sources = state.lock().sources.clone();
        {
            let mut table = self.lock();
            table.by_imm.remove(&state.imm.value());
            table.fractions.forget(state.imm);
            let recent = self.recent(state.imm);
            if recent.load().as_ref().is_some_and(|recent| recent.imm == state.imm) {
                recent.store(None);
            }
            if state.imm.is_of_engine() && !sources.is_empty() {
                table.retiring.insert(state.imm.value(), sources.iter().copied().collect());
            }
        }
        state.fail(Error::new(Code::Closed, "the counter is closed").during("counter"));
        self.doorbell.notify();
        sources
    }

    /// `engine` has nothing with `imm` under way, or is no source any more.
    pub(crate) fn retired(&self, imm: Imm, engine: EngineId) {
        let mut table = self.lock();
        if let Some(sources) = table.retiring.get_mut(&imm.value()) {
            sources.remove(&engine);
            if sources.is_empty() {
                table.retiring.remove(&imm.value());
            }
        }
    }

    /// What is kept for counters to come.
    pub(crate) fn early<R>(&self, ask: impl FnOnce(&mut Early) -> R) -> R {
        ask(&mut self.lock().early)
    }

    #[inline]
    fn recent(&self, imm: Imm) -> &ArcSwapOption<State> {
        &self.recent[imm.value() as usize % NUM_RECENT]
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }
}

impl Table {
    fn fresh(&mut self) -> Result<Imm> {
        for _ in 0..Imm::FIRST_OF_ENGINE {
            let value = self.next;
            self.next = if value + 1 < Imm::COUNT { value + 1 } else { Imm::FIRST_OF_ENGINE };
            if !self.by_imm.contains_key(&value) && !self.retiring.contains_key(&value) {
                if let Some(imm) = Imm::new(value) {
                    return Ok(imm);
                }
            }
        }
        Err(Error::new(Code::ResourceExhausted, "every immediate is in use").during("counter"))
    }

    /// See [`Early::keep`]; makes room first, where what is kept can go.
    fn keep(&mut self, peer: PeerIdx, imm: Imm) -> std::result::Result<Option<Missing>, Refusal> {
        if self.early.takes_leavings() {
            let Self { by_imm, early, fractions, .. } = self;
            let is_left = |entry: &Entry| matches!(entry, Entry::Early { peer, .. } if !early.knows(*peer));
            let left: Vec<_> = by_imm.extract_if(|_, entry| is_left(entry)).map(|(imm, _)| imm).collect();
            left.iter().filter_map(|imm| Imm::new(*imm)).for_each(|imm| fractions.forget(imm));
            early.drop_leavings(&left);
        }
        self.early.keep(peer, imm)
    }

    fn open_states(&self) -> Vec<Arc<State>> {
        let open = |entry: &Entry| if let Entry::Open(state) = entry { Some(Arc::clone(state)) } else { None };
        self.by_imm.values().filter_map(open).collect()
    }
}

/// Places for counters that arrivals find without a lock. Engines hand out imms in
/// sequence, so as many that are open at a time do not collide.
const NUM_RECENT: usize = 256;
