//! Who drives an engine, and how threads wait.
//!
//! Exactly one thread at a time holds the driver: the worker, or a user thread
//! that waits and so saves the hand-over. A user thread drives while it spins,
//! and asks for the driver when the worker has it; the worker notices, steps
//! aside and looks again after a short lease (`worker`). When
//! the spin is over the thread blocks: in epoll with the driver in its hands
//! when the worker is out of the way, else on the doorbell while the worker
//! blocks in epoll. Whoever has news for this engine looks at the doorbell to
//! see which of these it is.

// Found from where the models have this file, too.
#[path = "wait/worker.rs"]
mod worker;

use std::sync::OnceLock;
use std::time::Duration;

use anyfabric_transports::{try_lock, Blocked};

use crate::driver::Driver;
use crate::inner::{nanos, Inner};
use crate::sync::atomic::{fence, AtomicBool, AtomicU64, Ordering};
use crate::sync::thread::{self, Thread};
use crate::sync::MutexGuard;
use crate::Polling;

/// Where the threads of an engine are.
#[derive(Default)]
pub(crate) struct Presence {
    worker: OnceLock<Thread>,
    /// When a user thread that drove last looked at the clock.
    driven_ns: AtomicU64,
    /// A user thread has driven since the worker last asked: one that is soon done does not look at the clock again.
    has_driven: AtomicBool,
    /// When the driver last began to read what descriptors had to say, and has finished since.
    listened_ns: AtomicU64,
    /// When whoever blocks, or blocked last, looks at the clock next.
    next_tick_ns: AtomicU64,
    /// Something that was read is being understood.
    is_hearing: AtomicBool,
    /// The worker is in epoll.
    worker_blocked: AtomicBool,
    /// A user thread is in epoll, the driver in its hands.
    user_blocked: AtomicBool,
    /// A user thread spins beside the worker and would rather drive itself.
    wanted: AtomicBool,
    /// What a closing engine asked of whoever drives is done.
    has_turned_last: AtomicBool,
    stop: AtomicBool,
}

impl Presence {
    pub(crate) fn set_worker(&self, thread: Thread) {
        let _ = self.worker.set(thread);
    }

    pub(crate) fn set_turned_last(&self) {
        // ORDERING: release what was ended; partner: `has_turned_last`.
        self.has_turned_last.store(true, Ordering::Release);
    }

    pub(crate) fn has_turned_last(&self) -> bool {
        // ORDERING: see `set_turned_last`.
        self.has_turned_last.load(Ordering::Acquire)
    }

    pub(crate) fn stop(&self) {
        // ORDERING: followed by a wake-up.
        self.stop.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// When a user thread drove last, as far as is known at that time.
    fn driven_until(&self, now_ns: u64) -> u64 {
        // ORDERING: hints.
        if self.has_driven.swap(false, Ordering::Relaxed) {
            self.driven_ns.store(now_ns, Ordering::Relaxed);
        }
        self.driven_ns.load(Ordering::Relaxed)
    }

    fn set_next_tick(&self, next_tick_ns: u64) {
        // ORDERING: sequentially consistent: before a thread announces that it blocks, and then looks at what was
        // submitted; partner: `looks_before`.
        self.next_tick_ns.store(next_tick_ns, Ordering::SeqCst);
    }

    /// Whether the clock is looked at once more no later than then, whoever sleeps.
    #[inline]
    pub(crate) fn looks_before(&self, deadline_ns: u64) -> bool {
        // ORDERING: after the operation was submitted; see `set_next_tick`.
        self.next_tick_ns.load(Ordering::SeqCst) <= deadline_ns
    }

    /// The driver has read what there was from that time on.
    fn listened(&self, began_ns: u64) {
        // ORDERING: after what was read has been acted upon; partner: `has_listened`.
        self.listened_ns.store(began_ns, Ordering::Release);
    }

    /// Whether the driver has lately read everything.
    #[inline]
    pub(crate) fn has_listened(&self, now_ns: u64) -> bool {
        // ORDERING: see `listened`.
        now_ns.saturating_sub(self.listened_ns.load(Ordering::Acquire)) < FRESH_NS
    }

    /// What is read from now on has not been acted upon, until this is called with
    /// false.
    pub(crate) fn set_hearing(&self, is_hearing: bool) {
        // ORDERING: before a descriptor is read, and after all of it was acted upon; partner: `Inner::is_behind`.
        self.is_hearing.store(is_hearing, Ordering::SeqCst);
    }

    pub(crate) fn is_hearing(&self) -> bool {
        // ORDERING: see `set_hearing`.
        self.is_hearing.load(Ordering::SeqCst)
    }

    /// Wakes the worker if it stepped aside.
    pub(crate) fn wake_worker(&self) {
        if let Some(worker) = self.worker.get() {
            worker.unpark();
        }
    }
}

impl Inner {
    /// Waits until `done`, at most `timeout` (`None`: for as long as it
    /// takes); true when done.
    pub(crate) fn wait(&self, timeout: Option<Duration>, done: impl Fn() -> bool) -> bool {
        self.wait_for_arrivals(timeout, done, || 0)
    }

    /// As [`Inner::wait`], for something that so many arrivals will settle.
    pub(crate) fn wait_for_arrivals(
        &self,
        timeout: Option<Duration>,
        done: impl Fn() -> bool,
        missing: impl Fn() -> u32,
    ) -> bool {
        // Somebody else may wait for any of them.
        let patience = || if self.counters.has_waiters() { 0 } else { missing() };
        if done() {
            return true;
        }
        let now_ns = self.clock.now_ns();
        let until_ns = timeout.map_or(u64::MAX, |timeout| now_ns.saturating_add(nanos(timeout)));
        if let Some(endpoint) = &self.simulated {
            return endpoint.wait(until_ns, &done);
        }
        let busy = self.config.polling == Polling::Busy;
        let mut spin_until_ns = now_ns + SPIN_NS;
        let mut now_ns = now_ns;
        loop {
            now_ns = match self.try_driver() {
                Some(mut driver) => {
                    // ORDERING: a hint.
                    self.presence.wanted.store(false, Ordering::Relaxed);
                    let span = Span { spin_until_ns: if busy { until_ns } else { spin_until_ns }, until_ns };
                    match self.drive(&mut driver, now_ns, span, &done) {
                        Driven::Done => return true,
                        Driven::SpinOver(now_ns) if now_ns >= until_ns => return done(),
                        Driven::SpinOver(now_ns) => self.block_in_epoll(driver, until_ns, now_ns, &done, &patience),
                    }
                }
                None => self.spin_aside(spin_until_ns.min(until_ns), &done),
            };
            if done() {
                return true;
            }
            if now_ns >= until_ns {
                return false;
            }
            if !busy && now_ns >= spin_until_ns {
                self.block_on_doorbell(until_ns - now_ns, &done, &patience);
                spin_until_ns = self.clock.now_ns() + SPIN_NS;
            }
        }
    }

    /// Looks for news once, without waiting, for a thread that asks for them.
    pub(crate) fn glance(&self) {
        if !self.uses_streams() {
            self.look();
            return;
        }
        // In a forked child the rings still are the parent's: what we took from them it would miss.
        if self.check_fork().is_err() {
            return;
        }
        // Who asks again and again sends what the links have; the worker beside it, on as few cores, would only be in
        // its way. So it does all that the worker does.
        if let Some(mut driver) = self.try_driver() {
            let now_ns = self.clock.now_ns();
            // ORDERING: a hint for the worker.
            self.presence.driven_ns.store(now_ns, Ordering::Relaxed);
            self.listen(&mut driver, now_ns);
            self.tick(&mut driver, now_ns);
            self.leave_to_worker(&mut driver);
        }
    }

    /// Looks for what needs no descriptor once, for a thread that does not drive;
    /// false when another one does.
    pub(crate) fn look(&self) -> bool {
        // As in `glance`; nor is there another one.
        if self.check_fork().is_err() {
            return true;
        }
        let driver = self.try_driver();
        driver.map(|mut driver| self.poll_links(&mut driver)).is_some()
    }

    /// There is something new to drive: wakes who blocks in epoll. A worker
    /// that stepped aside looks again by itself when its lease is over.
    pub(crate) fn wake(&self) {
        let presence = &self.presence;
        // ORDERING: with the stores before blocking: either we see the thread blocked, or it sees what is new.
        fence(Ordering::SeqCst);
        if presence.worker_blocked.load(Ordering::SeqCst) || presence.user_blocked.load(Ordering::SeqCst) {
            self.wake_fd.notify();
        }
    }

    pub(crate) fn try_driver(&self) -> Option<MutexGuard<'_, Driver>> {
        try_lock(&self.driver)
    }

    fn drive(&self, driver: &mut Driver, now_ns: u64, span: Span, done: &impl Fn() -> bool) -> Driven {
        // While we poll nobody needs to kick.
        self.doorbell.set_blocked(Blocked::Nobody);
        let driven = self.spin(driver, now_ns, span, done);
        if matches!(driven, Driven::Done) {
            // ORDERING: a hint for the worker.
            self.presence.has_driven.store(true, Ordering::Relaxed);
        }
        // ORDERING: the worker in epoll must be kicked again from now on; then look once more for what came between.
        if self.presence.worker_blocked.load(Ordering::SeqCst) {
            self.doorbell.set_blocked(Blocked::Worker);
            self.leave_to_worker(driver);
        }
        driven
    }

    /// Looks a last time. A worker in epoll does not know of what we took and leave behind, half of a copy or a deadline,
    /// and what woke it for that may have been read by us before it ran.
    fn leave_to_worker(&self, driver: &mut Driver) {
        // What moves twice goes on: once may be no more than the answers to what we read.
        let goes_on = self.poll_links(driver) && self.poll_links(driver);
        if goes_on
            || driver.awaits_room()
            || driver.is_expecting() && !self.presence.looks_before(driver.next_tick_ns())
        {
            self.wake();
        }
    }

    fn spin(&self, driver: &mut Driver, mut now_ns: u64, mut span: Span, done: &impl Fn() -> bool) -> Driven {
        let mut yield_from_ns = now_ns + YIELD_NS;
        // Whose waits are all soon done never comes to the end of a round, and the worker steps aside for it.
        if !self.presence.has_listened(now_ns) {
            self.listen(driver, now_ns);
            self.tick(driver, now_ns);
        }
        loop {
            // ORDERING: a hint for the worker.
            self.presence.driven_ns.store(now_ns, Ordering::Relaxed);
            // Streams bring their news through descriptors only.
            let turns = if self.uses_streams() { 1 } else { TURNS };
            let (mut has_moved, mut is_moving, began_ns) = (false, false, now_ns);
            for _ in 0..turns {
                is_moving = self.poll_links(driver);
                if done() {
                    return Driven::Done;
                }
                has_moved |= is_moving;
                if !is_moving {
                    std::hint::spin_loop();
                } else if self.clock.now_ns().saturating_sub(began_ns) >= FRESH_NS {
                    // A turn may have copied for every peer, and from memory that nobody had touched.
                    break;
                }
            }
            has_moved |= self.listen(driver, now_ns);
            now_ns = self.clock.now_ns();
            self.tick(driver, now_ns);
            if done() {
                return Driven::Done;
            }
            // Arrivals alone take a fraction of that.
            let is_copying = is_moving && now_ns.saturating_sub(began_ns) >= SPIN_NS;
            if is_copying || has_moved && self.uses_streams() {
                // Who moves bytes does not spin. Blocked halfway it would leave the rest to the worker, which may have
                // stepped aside for long, and over streams would run on the core that the peer needs.
                // MEASURED: benchmarks/records/turns-20261122-053200, pages over tcp; docs/decisions/0020.
                span.spin_until_ns = span.spin_until_ns.max(now_ns + SPIN_NS);
                yield_from_ns = now_ns + YIELD_NS;
            }
            if now_ns >= span.spin_until_ns.min(span.until_ns) {
                return Driven::SpinOver(now_ns);
            }
            if now_ns >= yield_from_ns && self.config.polling == Polling::Adaptive {
                // Whom we wait for may need this core.
                thread::yield_now();
            }
        }
    }

    /// Acts upon what descriptors have to say at that time; true when there was something.
    fn listen(&self, driver: &mut Driver, now_ns: u64) -> bool {
        let some = self.poll_descriptors(driver, Duration::ZERO);
        self.presence.listened(now_ns);
        some
    }

    /// Blocks with the driver in our hands, when the worker is not in epoll;
    /// returns the time.
    fn block_in_epoll(
        &self,
        mut driver: MutexGuard<'_, Driver>,
        until_ns: u64,
        now_ns: u64,
        done: &impl Fn() -> bool,
        patience: &impl Fn() -> u32,
    ) -> u64 {
        let presence = &self.presence;
        let is_busy = self.config.polling == Polling::Busy || self.groups.must_be_polled() || driver.awaits_room();
        if is_busy || presence.worker_blocked.load(Ordering::SeqCst) {
            return now_ns;
        }
        // ORDERING: announce, then look once more; partners: `wake` and `Doorbell::notify_remote`.
        presence.set_next_tick(driver.next_tick_ns());
        presence.user_blocked.store(true, Ordering::SeqCst);
        self.doorbell.set_blocked(Blocked::Driver);
        self.doorbell.reset_patience();
        let is_armed = self.arm_nics(&driver);
        // NICs that promise no event are the worker's, which looks at them again and again.
        if !self.poll_links(&mut driver) && is_armed && !done() {
            self.doorbell.set_patience(patience);
            let timeout = driver.until_tick(now_ns).min(Duration::from_nanos(until_ns - now_ns));
            self.poll_descriptors(&mut driver, timeout);
        }
        self.doorbell.set_blocked(Blocked::Nobody);
        presence.user_blocked.store(false, Ordering::SeqCst);
        let now_ns = self.clock.now_ns();
        // ORDERING: a hint for the worker.
        presence.driven_ns.store(now_ns, Ordering::Relaxed);
        self.tick(&mut driver, now_ns);
        self.poll_links(&mut driver);
        drop(driver);
        // It parks for long while we block; from now on it has to look again.
        presence.wake_worker();
        now_ns
    }

    /// Another thread drives: looks a while whether it settles our matter.
    fn spin_aside(&self, spin_end_ns: u64, done: &impl Fn() -> bool) -> u64 {
        let yield_from_ns = self.clock.now_ns() + YIELD_NS;
        loop {
            // ORDERING: a hint for the worker, which looks at it between turns.
            self.presence.wanted.store(true, Ordering::Relaxed);
            for _ in 0..TURNS {
                if done() {
                    break;
                }
                std::hint::spin_loop();
            }
            let now_ns = self.clock.now_ns();
            if done() || now_ns >= spin_end_ns || self.try_driver().is_some() {
                self.presence.wanted.store(false, Ordering::Relaxed);
                return now_ns;
            }
            if now_ns >= yield_from_ns {
                // We may have taken this core from the very thread that drives.
                thread::yield_now();
            }
        }
    }

    fn block_on_doorbell(&self, left_ns: u64, done: &impl Fn() -> bool, patience: &impl Fn() -> u32) {
        if done() {
            return;
        }
        // Nobody may be driving, if the worker stepped aside for us.
        let nobody =
            !self.presence.worker_blocked.load(Ordering::SeqCst) && !self.presence.user_blocked.load(Ordering::SeqCst);
        if nobody {
            // ORDERING: hints for the worker, which is woken after them.
            self.presence.has_driven.store(false, Ordering::Relaxed);
            self.presence.driven_ns.store(0, Ordering::Relaxed);
            self.presence.wake_worker();
        }
        let timeout = Duration::from_nanos(left_ns).min(NAP);
        let has_news = || {
            self.look_or_wake();
            done()
        };
        self.doorbell.sleep(timeout, has_news, patience);
        // What rang for us while we woke has nobody else to look at it.
        self.look_or_wake();
    }

    /// Looks once; or has whoever is on his way into epoll, or there, with the driver in his hands, look again: he may
    /// have looked before what rang for us came, or wait for more than that.
    fn look_or_wake(&self) {
        if !self.look() && (self.doorbell.is_blocked() || self.presence.user_blocked.load(Ordering::SeqCst)) {
            self.wake_fd.notify();
        }
    }
}

enum Driven {
    Done,
    SpinOver(u64),
}

/// How long a thread that drives goes on.
#[derive(Clone, Copy)]
struct Span {
    /// Until then, unless something moves meanwhile.
    spin_until_ns: u64,
    /// In any case no longer.
    until_ns: u64,
}

/// How long a waiting thread spins before it blocks: longer than it takes a
/// peer to wake somebody, or two processes that answer each other would find
/// each other asleep in every round.
///
/// MEASURED: crates/engine/examples/pair.rs, adaptive. Waking an idle virtual CPU takes 60 µs; with 50 µs of spinning
/// an 8-byte write took 59 µs in the median, with 150 µs it takes 0.33 µs, and 5.9 µs on one shared core.
const SPIN_NS: u64 = 150_000;
/// For so long nothing that was said is missed: less than anybody waits for an answer.
pub(crate) const FRESH_NS: u64 = 1_000_000;
/// From when on it lets others have the core between looks.
const YIELD_NS: u64 = 4_000;
/// Turns between looks at deadlines and at descriptors, unless they take longer than [`FRESH_NS`].
const TURNS: usize = 32;
/// Longest sleep on the doorbell: bounds what a lost wake-up can cost.
const NAP: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    /// The worker that looks after a long call finds that somebody drives, although the clock was not looked at.
    #[test]
    fn who_has_driven_since_the_last_look_is_not_gone() {
        let presence = Presence::default();
        assert_eq!(presence.driven_until(5), 0);
        presence.has_driven.store(true, Ordering::Relaxed);
        assert_eq!((presence.driven_until(7), presence.driven_until(9)), (7, 7));
    }
}
