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
mod state;

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyfabric_transports::{Doorbell, Failure, PeerIdx};
use anyfabric_wire::{EngineId, Imm, Refusal};
use arc_swap::ArcSwapOption;
use rustc_hash::FxHashMap;

use crate::early::{Early, Missing};
use crate::error::seconds;
use crate::fractions::Fractions;
use crate::inner::{lock, Inner};
use crate::waiters::Waiter;
use crate::{Code, Error, Result};
use state::State;

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
    /// `WaitTimeout`; `PeerLost`, `TransferFailed`, `DeviceLost` when `n` will not
    /// be reached; `Closed`.
    pub fn wait(&self, n: u64, timeout: Option<Duration>) -> Result<()> {
        self.inner.check_fork()?;
        let state = &self.state;
        let missing = || u32::try_from(n.saturating_sub(state.value())).unwrap_or(u32::MAX);
        if self.inner.wait_for_arrivals(timeout, || state.is_settled(n), missing) {
            return state.outcome(n);
        }
        let (imm, value) = (state.imm.value(), state.value());
        let message = format!("imm {imm}: {value} of {n} arrivals after {}", seconds(timeout));
        Err(Error::new(Code::WaitTimeout, message).during("counter"))
    }

    /// Runs `on_settled` once, when `wait(n)` would return; at once if so. It
    /// must not block and not call the engine.
    pub fn on_settled(&self, n: u64, on_settled: Box<dyn FnOnce() + Send>) -> Waiter {
        // From now on every arrival may be the one: whoever blocks must hear of each.
        let announced = Announced::new(&self.inner);
        self.inner.doorbell.reset_patience();
        let tell = Box::new(move || {
            drop(announced);
            on_settled();
        });
        let waiter = self.state.on_settled(n, tell);
        self.inner.wake();
        waiter
    }

    /// What waits will not be told any more, unless it was already.
    pub fn give_up(&self, waiter: Waiter) {
        // The lock may be held by a thread that is not in a forked child.
        if self.inner.check_fork().is_ok() {
            self.state.give_up(waiter);
        }
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

/// Keeps those who have news from thinking that nobody waits but who blocks.
struct Announced(Arc<Inner>);

impl Announced {
    fn new(inner: &Arc<Inner>) -> Self {
        inner.counters.add_waiter();
        Self(Arc::clone(inner))
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        self.0.counters.remove_waiter();
    }
}

/// Every counter of an engine.
pub(crate) struct Counters {
    table: Mutex<Table>,
    /// Counters that are open, each at the place of its imm; of several the last
    /// that was opened or looked for. Found here, an arrival takes no lock.
    recent: Box<[ArcSwapOption<State>; NUM_RECENT]>,
    doorbell: Arc<Doorbell>,
    num_waiters: AtomicUsize,
}

/// Counters that arrivals were for lately, each at the place of its imm, in the hands of whoever drives: what is found
/// here costs no look at what others may change.
#[derive(Default)]
pub(crate) struct AtHand([Cell<Option<Arc<State>>>; NUM_AT_HAND]);

impl AtHand {
    #[inline]
    fn place(&self, imm: Imm) -> &Cell<Option<Arc<State>>> {
        &self.0[imm.value() as usize % NUM_AT_HAND]
    }
}

#[derive(Default)]
struct Table {
    by_imm: FxHashMap<u32, Entry>,
    early: Early,
    /// Only of imms that have an entry.
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
        let state = Arc::new(State::new(imm, quarters, table.fractions.hand_over(imm), sources));
        table.by_imm.insert(imm.value(), Entry::Open(Arc::clone(&state)));
        // Under the lock, like `close`, which takes it out again.
        self.recent(imm).store(Some(Arc::clone(&state)));
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
    pub(crate) fn add(
        &self,
        at_hand: &AtHand,
        peer: PeerIdx,
        imm: Imm,
        quarters: u64,
    ) -> std::result::Result<(), Refusal> {
        let place = at_hand.place(imm);
        let known = place.take().filter(|it| it.counts(imm));
        if let Some(state) = known.or_else(|| self.recent(imm).load_full().filter(|it| it.counts(imm))) {
            if let Some(whole) = state.fractions.whole(peer, quarters) {
                state.add(whole, &self.doorbell);
                place.set(Some(state));
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
                let state = Arc::clone(state);
                let placed = state.fractions.whole(peer, quarters);
                let whole = placed.unwrap_or_else(|| table.fractions.whole(peer, imm, quarters));
                // As in `open`.
                self.recent(imm).store(Some(Arc::clone(&state)));
                drop(guard);
                state.add(whole, &self.doorbell);
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
        let sources = state.lock().sources.clone();
        {
            let mut table = self.lock();
            // ORDERING: the swap alone decides who closes; under the lock, for who finds it closed may open it again.
            if state.closed.swap(true, Ordering::AcqRel) {
                return Vec::new();
            }
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
const NUM_AT_HAND: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever drives still has the one that was closed, and that of another imm in its place.
    #[test]
    fn an_arrival_counts_where_its_imm_is_open() {
        let counters = Counters::new(Arc::new(Doorbell::private().unwrap()));
        let at_hand = AtHand::default();
        let arrives = |imm| assert_eq!(counters.add(&at_hand, 1, imm, 4), Ok(()));
        let open = |imm| counters.open(Some(imm), Vec::new(), |_| String::new()).unwrap();
        let [imm, other] = [7, 7 + NUM_AT_HAND as u32].map(|value| Imm::new(value).unwrap());
        let (first, beside) = (open(imm), open(other));
        (0..3).for_each(|_| arrives(imm));
        arrives(other);
        arrives(imm);
        counters.close(&first);
        // Kept for the next, although the first is at hand.
        arrives(imm);
        let second = open(imm);
        arrives(imm);
        assert_eq!([first.value(), second.value(), beside.value()], [4, 2, 1]);
    }

    /// Whoever finds it closed, by whichever thread, may open it again.
    #[test]
    fn what_is_closed_is_out_of_the_table() {
        let counters = Counters::new(Arc::new(Doorbell::private().unwrap()));
        let state = counters.open(Imm::new(7), Vec::new(), |_| String::new()).unwrap();
        std::thread::scope(|scope| {
            let table = counters.lock();
            scope.spawn(|| counters.close(&state));
            std::thread::sleep(Duration::from_millis(50));
            let is_closed = state.closed.load(Ordering::Relaxed);
            assert!(!is_closed || !table.by_imm.contains_key(&7), "it says that it is closed, and is in the table");
        });
        assert!(state.closed.load(Ordering::Relaxed) && counters.lock().by_imm.is_empty());
    }
}
