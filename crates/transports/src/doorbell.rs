//! How whoever has news wakes whoever waits for it.
//!
//! One page of shared memory per engine, mapped by every peer on the host:
//!
//! ```text
//! 0   4  bell       futex; incremented to wake user threads
//! 4   4  sleepers   user threads blocked on the bell
//! 64  4  worker     1 while a thread of the engine blocks in epoll
//! 128 4  patience   arrivals that who blocks can wait for; 0: none
//! 132 4  pending    arrivals since it said so
//! ```
//!
//! A sleeper announces itself, looks once more for news, then blocks; who has
//! news publishes it, then looks for sleepers. A full fence between the two
//! steps on both sides makes it impossible that both miss each other.
//!
//! A wake-up costs the writer far more than a write. So who waits for a count
//! says how many arrivals are missing, and is woken when as many have come, not
//! for each. It resets `pending` before it announces itself and says its
//! patience after it has looked once more: whatever comes between is counted
//! twice at most, and so wakes early at worst. A peer
//! may scribble over this page: then wake-ups are late, never lost for good,
//! because every block has a timeout.

use std::sync::atomic::{fence, AtomicU32, Ordering};
use std::sync::Mutex;
use std::time::Duration;

use crate::lock;
use crate::sys::{self, Mapping};

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
    /// true when that is the worker, which only a kick through its socket wakes.
    /// Called right after the swap that published an entry of `arrivals` counts;
    /// 0 means that it cannot wait.
    #[inline]
    pub fn notify_remote(&self, arrivals: u32) -> bool {
        // ORDERING: the swap before is the fence; partners: `sleep`, `set_worker_blocked`.
        let sleepers = self.word(SLEEPERS).load(Ordering::SeqCst);
        let worker = self.word(WORKER).load(Ordering::SeqCst) == 1;
        (sleepers > 0 || worker) && self.wake_remote(arrivals, sleepers)
    }

    #[cold]
    fn wake_remote(&self, arrivals: u32, sleepers: u32) -> bool {
        // ORDERING: sequentially consistent with `reset_patience` and `set_patience`, as described above.
        let patience = self.word(PATIENCE).load(Ordering::SeqCst);
        if arrivals > 0 && patience > 0 && sleepers <= 1 {
            let before = self.word(PENDING).fetch_add(arrivals, Ordering::SeqCst);
            if before.saturating_add(arrivals) < patience {
                return false;
            }
        }
        if sleepers > 0 {
            self.ring();
            return false;
        }
        self.word(WORKER).compare_exchange(1, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// From now on nothing can wait.
    pub fn reset_patience(&self) {
        let _guard = lock(&self.patience);
        // ORDERING: see `wake_remote`.
        self.word(PATIENCE).store(0, Ordering::SeqCst);
        self.word(PENDING).store(0, Ordering::SeqCst);
    }

    /// Who is about to block, announced and after its last look, can wait for
    /// so many arrivals, if no more than `sleepers` threads sleep on the bell.
    pub fn set_patience(&self, arrivals: u32, sleepers: u32) {
        let _guard = lock(&self.patience);
        // ORDERING: see `wake_remote`. Two who wait for different things have no patience.
        if self.word(SLEEPERS).load(Ordering::SeqCst) <= sleepers {
            self.word(PATIENCE).store(arrivals, Ordering::SeqCst);
        }
    }

    /// Blocks until the bell rings, or `timeout` passes; not at all when `look`
    /// finds news. It returns the patience, or `None` when there is news.
    pub fn sleep(&self, timeout: Duration, look: impl FnOnce() -> Option<u32>) {
        self.reset_patience();
        // ORDERING: acquire: the bell is read before `look` looks.
        let seen = self.word(BELL).load(Ordering::Acquire);
        // ORDERING: the Dekker fence described above; partners: `notify`, `notify_remote`.
        self.word(SLEEPERS).fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if let Some(patience) = look() {
            self.set_patience(patience, 1);
            sys::futex_wait(self.word(BELL), seen, timeout);
        }
        self.word(SLEEPERS).fetch_sub(1, Ordering::SeqCst);
    }

    /// Says whether the worker blocks in epoll and so needs a kick.
    #[inline]
    pub fn set_worker_blocked(&self, blocked: bool) {
        let worker = self.word(WORKER);
        if blocked || worker.load(Ordering::Relaxed) != 0 {
            worker.swap(u32::from(blocked), Ordering::SeqCst);
        }
        if blocked {
            // ORDERING: the Dekker fence described above, before whoever blocks looks once more; partner: `notify_remote`.
            fence(Ordering::SeqCst);
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
const PATIENCE: usize = 128;
const PENDING: usize = 132;
