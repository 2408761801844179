//! How whoever has news wakes whoever waits for it.
//!
//! One page of shared memory per engine, mapped by every peer on the host:
//!
//! ```text
//! 0   4  bell       futex; incremented to wake user threads
//! 4   4  sleepers   user threads blocked on the bell
//! 64  4  worker     1 while the engine's worker blocks in epoll
//! ```
//!
//! A sleeper announces itself, looks once more for news, then blocks; who has
//! news publishes it, then looks for sleepers. A full fence between the two
//! steps on both sides makes it impossible that both miss each other. A peer
//! may scribble over this page: then wake-ups are late, never lost for good,
//! because every block has a timeout.

use std::sync::atomic::{fence, AtomicU32, Ordering};
use std::time::Duration;

use crate::sys::{self, Mapping};

/// An engine's own doorbell, or a peer's.
#[derive(Debug)]
pub struct Doorbell {
    mapping: Mapping,
}

impl Doorbell {
    /// Bytes of the shared page.
    pub const BYTES: usize = 4096;

    /// Over a mapping of at least [`Doorbell::BYTES`] zeroed bytes.
    pub fn new(mapping: Mapping) -> Self {
        assert!(mapping.len() >= Self::BYTES, "a doorbell needs a page");
        Self { mapping }
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
    /// true when that is the worker, which only a kick through its socket wakes.
    /// Called right after the swap that published an entry.
    #[inline]
    pub fn notify_remote(&self) -> bool {
        // ORDERING: the swap before is the fence; partners: `sleep`, `set_worker_blocked`.
        if self.word(SLEEPERS).load(Ordering::SeqCst) > 0 {
            self.ring();
            return false;
        }
        let worker = self.word(WORKER);
        worker.load(Ordering::SeqCst) == 1 && worker.compare_exchange(1, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Blocks until the bell rings, `news` finds some, or `timeout` passes.
    pub fn sleep(&self, timeout: Duration, news: impl FnOnce() -> bool) {
        // ORDERING: acquire: the bell is read before `news` looks.
        let seen = self.word(BELL).load(Ordering::Acquire);
        // ORDERING: the Dekker fence described above; partners: `notify`, `notify_remote`.
        self.word(SLEEPERS).fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if !news() {
            sys::futex_wait(self.word(BELL), seen, timeout);
        }
        self.word(SLEEPERS).fetch_sub(1, Ordering::SeqCst);
    }

    /// Says whether the worker blocks in epoll and so needs a kick.
    #[inline]
    pub fn set_worker_blocked(&self, blocked: bool) {
        let worker = self.word(WORKER);
        // ORDERING: a swap is a full fence, as described above; partner: `notify_remote`.
        if blocked || worker.load(Ordering::Relaxed) != 0 {
            worker.swap(u32::from(blocked), Ordering::SeqCst);
        }
    }

    #[cold]
    fn ring(&self) {
        // ORDERING: release: who sees the new bell sees the news.
        self.word(BELL).fetch_add(1, Ordering::Release);
        sys::futex_wake_all(self.word(BELL));
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        // SAFETY: `at` is 4-aligned inside the page, the mapping lives as long as `self`, and every access to these
        // words, here and in peers, is atomic.
        unsafe { &*self.mapping.as_ptr().add(at).cast::<AtomicU32>() }
    }
}

const BELL: usize = 0;
const SLEEPERS: usize = 4;
const WORKER: usize = 64;
