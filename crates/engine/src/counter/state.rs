//! What one counter has counted, and who waits for more.

use anyfabric_transports::Doorbell;
use anyfabric_wire::{EngineId, Imm};

use crate::fractions::Places;
use crate::inner::lock;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard};
use crate::waiters::{Tell, Waiter, Waiters};
use crate::{Code, Error, Result};

/// What is counted, shared by the counter and the table.
pub(crate) struct State {
    pub(super) imm: Imm,
    quarters: AtomicU64,
    pub(super) fractions: Places,
    pub(super) closed: AtomicBool,
    settled_early: AtomicBool,
    has_waiters: AtomicBool,
    rest: Mutex<Rest>,
}

#[derive(Default)]
pub(super) struct Rest {
    failure: Option<Error>,
    pub(super) sources: Vec<EngineId>,
    waiters: Waiters,
}

impl State {
    pub(super) fn new(imm: Imm, quarters: u64, fractions: Places, sources: Vec<EngineId>) -> Self {
        Self {
            imm,
            quarters: AtomicU64::new(quarters),
            fractions,
            closed: AtomicBool::new(false),
            settled_early: AtomicBool::new(false),
            has_waiters: AtomicBool::new(false),
            rest: Mutex::new(Rest { sources, ..Rest::default() }),
        }
    }

    /// Whether an arrival of `imm` is for it. One that overtakes its end came before it.
    #[inline]
    pub(super) fn counts(&self, imm: Imm) -> bool {
        // ORDERING: the end alone.
        self.imm == imm && !self.closed.load(Ordering::Acquire)
    }

    #[inline]
    pub(crate) fn value(&self) -> u64 {
        // ORDERING: acquire the bytes; partner: `add`. Sequentially consistent because a sleeper looks here
        // after it has announced itself at the doorbell.
        self.quarters.load(Ordering::SeqCst) / 4
    }

    #[inline]
    pub(super) fn add(&self, quarters: u64, doorbell: &Doorbell) {
        // Of a split write only the part that makes it whole is news.
        if quarters == 0 {
            return;
        }
        // ORDERING: release the bytes, which the transport has made visible to this thread; and the fence before the
        // looks for waiters and sleepers.
        self.quarters.fetch_add(quarters, Ordering::SeqCst);
        if self.has_waiters.load(Ordering::SeqCst) {
            self.run_waiters();
        }
        doorbell.notify_after_swap();
    }

    pub(super) fn is_settled(&self, n: u64) -> bool {
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

    pub(super) fn on_settled(&self, n: u64, tell: Tell) -> Waiter {
        let mut rest = self.lock();
        let waiter = rest.waiters.add(n, tell);
        // ORDERING: announced before the look below; partner: `add`.
        self.has_waiters.store(true, Ordering::SeqCst);
        if self.is_settled(n) {
            let own = rest.waiters.remove(waiter);
            drop(rest);
            if let Some(tell) = own {
                tell();
            }
        }
        waiter
    }

    pub(super) fn give_up(&self, waiter: Waiter) {
        let mut rest = self.lock();
        let own = rest.waiters.remove(waiter);
        // ORDERING: under the lock.
        self.has_waiters.store(!rest.waiters.is_empty(), Ordering::SeqCst);
        drop(rest);
        drop(own);
    }

    pub(super) fn fail(&self, error: Error) {
        let waiters = {
            let mut rest = self.lock();
            rest.failure.get_or_insert(error);
            // ORDERING: release the failure; partner: `is_settled`.
            self.settled_early.store(true, Ordering::Release);
            rest.waiters.take_all()
        };
        waiters.into_iter().for_each(|tell| tell());
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Rest> {
        lock(&self.rest)
    }

    fn run_waiters(&self) {
        let value = self.value();
        let due = {
            let mut rest = self.lock();
            let due = rest.waiters.take_until(value);
            // ORDERING: under the lock.
            self.has_waiters.store(!rest.waiters.is_empty(), Ordering::SeqCst);
            due
        };
        due.into_iter().for_each(|tell| tell());
    }
}
