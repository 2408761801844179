//! An engine of which only the waiting is the product's (`wait`): what is driven is a toy.
//!
//! ```text
//! submit ── pieces ──▶ poll_links, one piece a look ──▶ the end is told
//! a peer ── arrived ─▶ poll_links ──▶ counted
//! a peer ── data ────▶ poll_descriptors ──▶ poll_links ──▶ answered
//! ```
//!
//! Time stands still but for looks at the clock, each of which costs some: so whoever
//! sleeps until the clock would next be looked at sleeps for ever, unless he is woken.

use std::panic::Location;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use loom::sync::Condvar;

use crate::check;
use crate::stand_ins::lock;
use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use crate::sync::thread::LONG;
use crate::sync::{Arc, Mutex};
use crate::sys::Mapping;
use crate::wait::Presence;
use crate::Doorbell;

/// As the engine's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Polling {
    Adaptive,
    Busy,
}

/// What the product's file waits with, and what the models drive.
pub(crate) struct Inner {
    pub(crate) config: Config,
    pub(crate) clock: Clock,
    pub(crate) simulated: Option<Endpoint>,
    pub(crate) doorbell: Doorbell,
    pub(crate) poller: Arc<Poller>,
    pub(crate) wake_fd: EventFd,
    pub(crate) counters: Counters,
    pub(crate) groups: Groups,
    pub(crate) presence: Presence,
    pub(crate) driver: Mutex<Driver>,
    uses_streams: bool,
    /// Pieces of the operation that was submitted; none: none was.
    pieces: AtomicU32,
    /// It was submitted with a deadline before the next tick.
    is_urgent: AtomicBool,
    closes: AtomicBool,
    has_ended: AtomicBool,
    arrived: AtomicU32,
    counted: AtomicU32,
    /// Who was told by a call: that the operation has ended, that the data was answered.
    told: Mutex<bool>,
    tells: Condvar,
}

#[derive(Default)]
pub(crate) struct Driver {
    pub(crate) num_heartbeats: usize,
    ready: Vec<u8>,
    left: u32,
    counted: u32,
    owes_answer: bool,
    is_expecting: bool,
}

impl Driver {
    pub(crate) const fn awaits_room(&self) -> bool {
        false
    }

    pub(crate) const fn is_expecting(&self) -> bool {
        self.is_expecting
    }

    pub(crate) const fn next_tick_ns(&self) -> u64 {
        if self.is_expecting {
            DEADLINE_NS
        } else {
            TICK_NS
        }
    }

    pub(crate) const fn until_tick(&self, _now_ns: u64) -> Duration {
        if self.is_expecting {
            Duration::ZERO
        } else {
            Duration::MAX
        }
    }

    pub(crate) fn take_ready(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.ready)
    }

    pub(crate) fn put_ready(&mut self, ready: Vec<u8>) {
        self.ready = ready;
    }
}

impl Inner {
    /// With data in streams, or with news in rings only.
    pub(crate) fn new(uses_streams: bool) -> Self {
        let poller = Arc::new(Poller { ready: Mutex::new(0), changed: Condvar::new() });
        Self {
            config: Config { polling: Polling::Adaptive },
            clock: Clock(AtomicU64::new(TICK_NS / 2)),
            simulated: None,
            doorbell: Doorbell::new(Mapping::of_doorbell()),
            wake_fd: EventFd(Arc::clone(&poller)),
            poller,
            counters: Counters,
            groups: Groups,
            presence: Presence::default(),
            driver: Mutex::new(Driver::default()),
            uses_streams,
            pieces: AtomicU32::new(0),
            is_urgent: AtomicBool::new(false),
            closes: AtomicBool::new(false),
            has_ended: AtomicBool::new(false),
            arrived: AtomicU32::new(0),
            counted: AtomicU32::new(0),
            told: Mutex::new(false),
            tells: Condvar::new(),
        }
    }

    /// An operation, as `submit` does it.
    pub(crate) fn submit(&self, pieces: u32) {
        self.pieces.store(pieces, Ordering::Release);
        self.wake();
    }

    /// One that nothing is done for until its deadline, as `submit` does it.
    pub(crate) fn submit_urgent(&self) {
        // As the ring of what was submitted is written.
        self.is_urgent.swap(true, Ordering::SeqCst);
        if !self.presence.looks_before(DEADLINE_NS) {
            self.wake();
        }
    }

    /// What is under way is to be ended, as `finish` does it.
    pub(crate) fn submit_end(&self) {
        self.closes.store(true, Ordering::Release);
        self.wake();
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Acquire)
    }

    /// An arrival, as a peer's `shm` publishes it.
    pub(crate) fn arrive(&self) {
        self.arrived.swap(1, Ordering::SeqCst);
        if self.doorbell.notify_remote(1) {
            self.poller.set(KICK);
        }
    }

    pub(crate) fn counted(&self) -> u32 {
        self.counted.load(Ordering::SeqCst)
    }

    /// A stream brings what is to be answered.
    pub(crate) fn bring_data(&self) {
        self.poller.set(DATA);
    }

    /// Waits for the operation's end, or for the answer, and looks for nothing.
    pub(crate) fn is_told(&self) {
        let mut told = lock(&self.told);
        while !*told {
            told = self.tells.wait(told).expect("a thread of the model panicked");
        }
    }

    fn tell(&self) {
        *lock(&self.told) = true;
        self.tells.notify_all();
    }

    fn end(&self) {
        self.has_ended.store(true, Ordering::Release);
        self.doorbell.notify();
        self.tell();
    }

    // ---- what `wait` finds in the other files of the engine --------------------------------------

    pub(crate) const fn check_fork(&self) -> Result<(), ()> {
        Ok(())
    }

    pub(crate) const fn uses_streams(&self) -> bool {
        self.uses_streams
    }

    pub(crate) const fn start_worker(&self) {}

    /// No NIC.
    pub(crate) const fn arm_nics(&self, _driver: &Driver) -> bool {
        true
    }

    #[track_caller]
    pub(crate) fn poll_links(&self, driver: &mut Driver) -> bool {
        let mut has_moved = false;
        let pieces = self.pieces.load(Ordering::Acquire);
        if pieces > 0 && driver.left == 0 {
            self.pieces.store(0, Ordering::Relaxed);
            driver.left = pieces;
        }
        if driver.left > 0 {
            driver.left -= 1;
            has_moved = true;
            if driver.left == 0 {
                self.end();
            }
        }
        if self.is_urgent.load(Ordering::SeqCst) {
            self.is_urgent.store(false, Ordering::Relaxed);
            driver.is_expecting = true;
        }
        if std::mem::take(&mut driver.owes_answer) {
            has_moved = true;
            self.tell();
        }
        let arrived = self.arrived.load(Ordering::Acquire);
        if arrived > driver.counted {
            driver.counted = arrived;
            has_moved = true;
            self.counted.swap(arrived, Ordering::SeqCst);
            self.doorbell.notify_after_swap();
        }
        if self.closes.load(Ordering::Acquire) {
            self.closes.store(false, Ordering::Relaxed);
            has_moved = true;
            self.end();
            self.presence.set_turned_last();
            self.doorbell.notify();
        }
        has_moved && check::is_kept(Location::caller())
    }

    #[track_caller]
    pub(crate) fn poll_descriptors(&self, driver: &mut Driver, timeout: Duration) -> bool {
        let mut ready = driver.take_ready();
        let _ = self.poller.wait(timeout, &mut ready);
        let some = !ready.is_empty();
        driver.put_ready(ready);
        self.handle_ready(driver);
        some && check::is_kept(Location::caller())
    }

    pub(crate) fn handle_ready(&self, driver: &mut Driver) {
        for event in driver.take_ready() {
            driver.owes_answer |= self.poller.clear(event) && event == DATA;
        }
    }

    pub(crate) fn tick(&self, driver: &mut Driver, _now_ns: u64) {
        if std::mem::take(&mut driver.is_expecting) {
            self.end();
        }
    }
}

pub(crate) struct Config {
    pub(crate) polling: Polling,
}

/// No scheduling point: what time it is depends on nobody.
pub(crate) struct Clock(AtomicU64);

impl Clock {
    pub(crate) fn now_ns(&self) -> u64 {
        self.0.fetch_add(STEP_NS, Ordering::Relaxed)
    }
}

/// There is none.
pub(crate) enum Endpoint {}

impl Endpoint {
    pub(crate) fn wait(&self, _until_ns: u64, _done: &impl Fn() -> bool) -> bool {
        match *self {}
    }
}

pub(crate) struct Counters;

impl Counters {
    pub(crate) const fn has_waiters(&self) -> bool {
        false
    }
}

/// No NIC.
pub(crate) struct Groups;

impl Groups {
    pub(crate) const fn must_be_polled(&self) -> bool {
        false
    }
}

/// Descriptors that are ready until they are read, whoever was woken for them.
pub(crate) struct Poller {
    ready: Mutex<u8>,
    changed: Condvar,
}

impl Poller {
    pub(crate) fn wait(&self, timeout: Duration, ready: &mut Vec<u8>) -> Result<(), ()> {
        let mut now = lock(&self.ready);
        while *now == 0 && timeout >= LONG {
            now = self.changed.wait(now).map_err(drop)?;
        }
        ready.clear();
        ready.extend([WAKE, KICK, DATA].iter().filter(|event| *now & **event > 0));
        Ok(())
    }

    fn set(&self, event: u8) {
        *lock(&self.ready) |= event;
        self.changed.notify_all();
    }

    /// Whether it was ready still.
    fn clear(&self, event: u8) -> bool {
        let mut ready = lock(&self.ready);
        let was_ready = *ready & event > 0;
        *ready &= !event;
        was_ready
    }
}

pub(crate) struct EventFd(Arc<Poller>);

impl EventFd {
    #[track_caller]
    pub(crate) fn notify(&self) {
        if check::is_kept(Location::caller()) {
            self.0.set(WAKE);
        }
    }
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Of the descriptors: the engine's own, a peer's socket with a kick, and one with data.
const WAKE: u8 = 1;
const KICK: u8 = 2;
const DATA: u8 = 4;
/// A look at the clock costs less than a spin may last, and more than half of it.
const STEP_NS: u64 = 100_000;
/// When the clock is looked at next if nothing is urgent.
const TICK_NS: u64 = 1 << 60;
const DEADLINE_NS: u64 = TICK_NS - 1;
