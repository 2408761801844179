//! How whoever has news wakes whoever waits for it.
//!
//! One page of shared memory per engine, mapped by every peer on the host:
//!
//! ```text
//! 0   4  bell       futex; incremented to wake user threads
//! 4   4  sleepers   user threads blocked on the bell
//! 64  4  blocked    1 while a thread of the engine blocks in epoll
//! 68  4  holds      1 while that thread has the driver in its hands
//! 128 4  patience   arrivals that who blocks can wait for; 0: none
//! 132 4  pending    arrivals since it said so
//! ```
//!
//! A sleeper announces itself, looks once more for news, then blocks; who has
//! news publishes it, then looks for sleepers. A full fence between the two
//! steps on both sides makes it impossible that both miss each other. Of
//! several that block, one is woken who can look: nobody can but who blocks
//! with the driver in its hands, and that one wakes the others.
//!
//! A wake-up costs the writer far more than a write. So who waits for a count
//! says how many arrivals are missing, and is woken when as many have come, not
//! for each. It resets `patience` and `pending` after it has announced itself,
//! and says its patience after it has looked once more, if it is alone:
//! whatever comes between is counted twice at most, and so wakes early at
//! worst. A peer may scribble over this page: then wake-ups are late, never
//! lost for good, because every block has a timeout.

use std::time::Duration;

use crate::lock;
use crate::sync::atomic::{fence, AtomicU32, Ordering};
use crate::sync::Mutex;
use crate::sys::{self, Mapping};

/// Which thread of an engine blocks in epoll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocked {
    /// None.
    Nobody,
    /// The worker: others may look meanwhile.
    Worker,
    /// One that has the driver in its hands: nobody else can look.
    Driver,
}

/// An engine's own doorbell, or a peer's.
#[derive(Debug)]
pub struct Doorbell {
    mapping: Mapping,
    /// Among the owner's threads; peers only read.
    patience: Mutex<()>,
}

impl Doorbell {
    /// Bytes of the shared page.
    pub const BYTES: usize = 4096;

    /// Over a mapping of at least [`Doorbell::BYTES`] zeroed bytes.
    pub fn new(mapping: Mapping) -> Self {
        assert!(mapping.len() >= Self::BYTES, "a doorbell needs a page");
        Self { mapping, patience: Mutex::default() }
    }

    /// One that no other process sees.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn private() -> std::io::Result<Self> {
        Ok(Self::new(Mapping::anonymous(Self::BYTES)?))
    }

    /// Wakes the owner's user threads, if any sleep. Local news: a transfer's
    /// end, a count that a worker added.
    #[inline]
    pub fn notify(&self) {
        // ORDERING: the Dekker fence described above; partner: `sleep`.
        fence(Ordering::SeqCst);
        if self.word(SLEEPERS).load(Ordering::Relaxed) > 0 {
            self.ring();
        }
    }

    /// As [`Doorbell::notify`], right after a sequentially consistent
    /// read-modify-write that published the news.
    #[inline]
    pub fn notify_after_swap(&self) {
        // ORDERING: the swap before is the fence; partner: `sleep`.
        if self.word(SLEEPERS).load(Ordering::SeqCst) > 0 {
            self.ring();
        }
    }

    /// Wakes whoever of the owner's threads should look at its rings; returns
    /// true when that one blocks in epoll, where only a kick through its socket
    /// wakes it. Called right after the swap that published an entry of `arrivals`
    /// counts; 0 means that it cannot wait.
    #[inline]
    pub fn notify_remote(&self, arrivals: u32) -> bool {
        // ORDERING: the swap before is the fence; partners: `sleep`, `set_blocked`.
        let sleepers = self.word(SLEEPERS).load(Ordering::SeqCst);
        let blocked = self.word(BLOCKED).load(Ordering::SeqCst) == 1;
        (sleepers > 0 || blocked) && self.wake_remote(arrivals, sleepers)
    }

    #[cold]
    fn wake_remote(&self, arrivals: u32, sleepers: u32) -> bool {
        // ORDERING: before the fence of `reset_patience`, or after its reset; a late look at what came since wakes early.
        let patience = self.word(PATIENCE).load(Ordering::SeqCst);
        if arrivals > 0 && patience > 0 {
            let before = self.word(PENDING).fetch_add(arrivals, Ordering::SeqCst);
            if before.saturating_add(arrivals) < patience {
                return false;
            }
        }
        // ORDERING: see `set_blocked`.
        if sleepers > 0 && self.word(HOLDS).load(Ordering::SeqCst) == 0 {
            self.ring();
            return false;
        }
        self.word(BLOCKED).compare_exchange(1, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// From now on nothing can wait, for who is announced and looks afterwards.
    pub fn reset_patience(&self) {
        let _guard = lock(&self.patience);
        self.word(PATIENCE).store(0, Ordering::Relaxed);
        self.word(PENDING).store(0, Ordering::Relaxed);
        // ORDERING: what was published by who still found patience is seen by the look; partner: `wake_remote`.
        fence(Ordering::SeqCst);
    }

    /// Who is about to block in epoll, announced and after its last look, can wait
    /// for so many arrivals, unless threads sleep on the bell.
    pub fn set_patience(&self, arrivals: impl FnOnce() -> u32) {
        self.set_patience_if(|sleepers, _| sleepers == 0, arrivals);
    }

    fn set_patience_if(&self, is_alone: impl FnOnce(u32, bool) -> bool, arrivals: impl FnOnce() -> u32) {
        // Asked for under the lock: whoever comes to want every arrival says so before it resets what is said here.
        let _guard = lock(&self.patience);
        // ORDERING: under the lock: who is announced is seen, or resets this. Two who wait for different things have no
        // patience.
        let holds = self.word(HOLDS).load(Ordering::Relaxed) == 1;
        if is_alone(self.word(SLEEPERS).load(Ordering::Relaxed), holds) {
            self.word(PATIENCE).store(arrivals(), Ordering::Relaxed);
        }
    }

    /// Blocks until the bell rings, or `timeout` passes; not at all when `has_news`
    /// after a look. `patience` says how many arrivals it can wait for.
    pub fn sleep(&self, timeout: Duration, has_news: impl FnOnce() -> bool, patience: impl FnOnce() -> u32) {
        // ORDERING: acquire: the bell is read before `has_news` looks.
        let seen = self.word(BELL).load(Ordering::Acquire);
        // ORDERING: the Dekker fence described above, which the reset ends with; partners: `notify`, `notify_remote`.
        self.word(SLEEPERS).fetch_add(1, Ordering::Relaxed);
        self.reset_patience();
        if !has_news() {
            self.set_patience_if(|sleepers, holds| sleepers == 1 && !holds, patience);
            sys::futex_wait(self.word(BELL), seen, timeout);
        }
        // ORDERING: who sees it late rings once too often.
        self.word(SLEEPERS).fetch_sub(1, Ordering::Relaxed);
    }

    /// Says who blocks in epoll and so needs a kick. Who blocked looks once more
    /// after it has said that nobody does.
    #[inline]
    pub fn set_blocked(&self, who: Blocked) {
        let (blocked, holds) = (self.word(BLOCKED), self.word(HOLDS));
        // ORDERING: only who has the driver changes it.
        if holds.load(Ordering::Relaxed) != u32::from(who == Blocked::Driver) {
            // ORDERING: who has news sees this and rings, or what it published is seen by the look that follows.
            holds.swap(u32::from(who == Blocked::Driver), Ordering::SeqCst);
        }
        if who != Blocked::Nobody || blocked.load(Ordering::Relaxed) != 0 {
            blocked.swap(u32::from(who != Blocked::Nobody), Ordering::SeqCst);
        }
        if who != Blocked::Nobody {
            // ORDERING: the Dekker fence described above, before whoever blocks looks once more; partner: `notify_remote`.
            fence(Ordering::SeqCst);
        }
    }

    /// Whether one of the owner's threads blocks in epoll, or will after a last look
    /// that came too early for what is known here.
    pub fn is_blocked(&self) -> bool {
        // ORDERING: who is not seen here looks after this; partner: `set_blocked`.
        fence(Ordering::SeqCst);
        self.word(BLOCKED).load(Ordering::Relaxed) == 1
    }

    #[cold]
    fn ring(&self) {
        // ORDERING: release: who sees the new bell sees the news.
        self.word(BELL).fetch_add(1, Ordering::Release);
        sys::futex_wake_all(self.word(BELL));
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        // SAFETY: one of the words above, which lie inside the page; nothing else is done with it.
        let [word] = unsafe { self.mapping.words(at) };
        word
    }
}

const BELL: usize = 0;
const SLEEPERS: usize = 4;
const BLOCKED: usize = 64;
const HOLDS: usize = 68;
const PATIENCE: usize = 128;
const PENDING: usize = 132;
