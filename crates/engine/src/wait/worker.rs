//! The worker: drives an engine while no user thread does.
//!
//! On few cores it is mostly in the way: woken beside a user thread that drives,
//! it takes that thread's core, and finding the driver free it keeps it for a
//! whole slice of the scheduler. So it steps aside for longer, the longer user
//! threads drive; and it stays awake for more of a stream for longer, the longer
//! the stream goes on, for a wake-up puts it on the core of whoever sends.

use std::sync::Arc;
use std::time::Duration;

use anyfabric_transports::Blocked;

use crate::driver::Driver;
use crate::inner::{nanos, Inner};
use crate::sync::atomic::Ordering;
use crate::sync::{thread, MutexGuard};
use crate::Polling;

impl Inner {
    /// The worker's life.
    pub(crate) fn work(self: &Arc<Self>) {
        self.start_worker();
        let busy = self.config.polling == Polling::Busy;
        let mut news_ns = self.clock.now_ns();
        let (mut woke_ns, mut linger_until_ns) = (news_ns, 0);
        let mut aside_since_ns = None;
        let mut has_offered = false;
        while !self.presence.is_stopped() {
            let Some(mut driver) = self.try_driver() else {
                if self.presence.user_blocked.load(Ordering::SeqCst) {
                    aside_since_ns = None;
                    thread::park_timeout(PARK);
                } else {
                    self.step_aside(&mut aside_since_ns);
                }
                continue;
            };
            // ORDERING: a hint.
            if self.presence.wanted.load(Ordering::Relaxed) && !has_offered {
                // Parked, not yielding: whoever wants it may have to move to this core first.
                drop(driver);
                thread::park_timeout(OFFER);
                has_offered = true;
                continue;
            }
            has_offered = false;
            let now_ns = self.clock.now_ns();
            let driven_ns = self.presence.driven_until(now_ns);
            news_ns = news_ns.max(driven_ns);
            let undriven_ns = now_ns.saturating_sub(driven_ns);
            if undriven_ns < nanos(LEASE) {
                drop(driver);
                self.step_aside(&mut aside_since_ns);
                continue;
            }
            aside_since_ns = None;
            let moved = self.poll_links(&mut driver);
            self.tick(&mut driver, now_ns);
            if busy {
                let heard = self.listen(&mut driver, now_ns);
                drop(driver);
                if moved || heard {
                    news_ns = now_ns;
                }
                if now_ns.saturating_sub(news_ns) >= nanos(SHORTEST_LINGER) {
                    // Who writes over shm drives nothing, and may have no core but this one.
                    thread::yield_now();
                }
                continue;
            }
            if moved {
                news_ns = now_ns;
                self.listen(&mut driver, now_ns);
                if undriven_ns < nanos(SLICE) && self.uses_streams() {
                    drop(driver);
                    // Who drove a moment ago may have nothing else to do, and no core for it but this one.
                    thread::yield_now();
                }
                continue;
            }
            if now_ns < linger_until_ns {
                // More of a stream is on its way: whoever sends it would pay for waking us.
                if self.poll_descriptors(&mut driver, Duration::ZERO) {
                    linger_until_ns =
                        now_ns + nanos(eighth(now_ns.saturating_sub(woke_ns), SHORTEST_LINGER, LONGEST_LINGER));
                }
                drop(driver);
                thread::yield_now();
                continue;
            }
            if self.block_worker(driver, now_ns.saturating_sub(news_ns)) && self.uses_streams() {
                woke_ns = self.clock.now_ns();
                linger_until_ns = woke_ns + nanos(SHORTEST_LINGER);
            }
        }
    }

    /// Leaves the driver to user threads that drive, since when it notes.
    fn step_aside(&self, since_ns: &mut Option<u64>) {
        let now_ns = self.clock.now_ns();
        let driven_for_ns = now_ns.saturating_sub(*since_ns.get_or_insert(now_ns));
        thread::park_timeout(eighth(driven_for_ns, LEASE, LONGEST_LEASE));
    }

    /// Blocks in epoll, after so long without news; true when a descriptor was
    /// ready for more than heartbeats.
    fn block_worker(&self, mut driver: MutexGuard<'_, Driver>, idle_ns: u64) -> bool {
        // ORDERING: announce, then look once more; partners: `wake` and `Doorbell::notify_remote`.
        self.doorbell.set_patience(|| 0);
        self.presence.set_next_tick(driver.next_tick_ns());
        self.presence.worker_blocked.store(true, Ordering::SeqCst);
        self.doorbell.set_blocked(Blocked::Worker);
        let is_armed = self.arm_nics(&driver);
        let timeout = if self.poll_links(&mut driver) || self.presence.is_stopped() {
            Duration::ZERO
        } else {
            // Nobody sleeps, so nobody waits: arrivals can lie in the ring until it is half full, or the next tick.
            self.doorbell.set_patience(|| if self.counters.has_waiters() { 0 } else { u32::MAX });
            let until_tick = driver.until_tick(self.clock.now_ns());
            if self.groups.must_be_polled() || !is_armed || driver.awaits_room() {
                until_tick.min(eighth(idle_ns, SHORTEST_PAUSE, LONGEST_PAUSE))
            } else {
                until_tick
            }
        };
        let mut ready = driver.take_ready();
        drop(driver);
        let _ = self.poller.wait(timeout, &mut ready);
        let mut num_news = ready.len();
        self.presence.worker_blocked.store(false, Ordering::SeqCst);
        // Who drives meanwhile sees the same descriptors: they stay ready until they are read.
        if let Some(mut driver) = self.try_driver() {
            self.doorbell.set_blocked(Blocked::Nobody);
            let before = driver.num_heartbeats;
            driver.put_ready(ready);
            self.handle_ready(&mut driver);
            num_news = num_news.saturating_sub(driver.num_heartbeats - before);
            self.poll_links(&mut driver);
        }
        num_news > 0
    }
}

/// An eighth of how long something has lasted: what comes after it is seen little
/// later, measured by how long that was.
fn eighth(lasted_ns: u64, shortest: Duration, longest: Duration) -> Duration {
    Duration::from_nanos(lasted_ns / 8).clamp(shortest, longest)
}

/// How long the worker leaves the driver to a user thread that wants it.
const OFFER: Duration = Duration::from_micros(20);
/// How long the worker steps aside for a user thread that drives, at first and at most.
///
/// MEASURED: benchmarks/limits.py, 8 bytes behind 1 GiB; docs/decisions/0019.
const LEASE: Duration = Duration::from_micros(200);
const LONGEST_LEASE: Duration = Duration::from_millis(1);
/// The same while that thread blocks in epoll; it unparks the worker itself.
const PARK: Duration = Duration::from_millis(100);
/// For so long another thread may have kept a user thread from its core.
const SLICE: Duration = Duration::from_millis(4);
/// How long a worker looks for more of a stream before it blocks, at first and at most.
///
/// MEASURED: longer than a gap within a stream on loopback; shorter than what a heartbeat may cost an idle engine. The
/// longest: benchmarks/limits.py, 8 bytes behind 1 GiB; docs/decisions/0019.
const SHORTEST_LINGER: Duration = Duration::from_micros(100);
const LONGEST_LINGER: Duration = Duration::from_millis(1);
/// Between two looks at a NIC that announces nothing, or for room in a ring, an eighth of the time without news: an idle
/// engine costs next to nothing. Shorter, and the kernel's own way to sleep and back would be most of it.
const SHORTEST_PAUSE: Duration = Duration::from_micros(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);
