//! Who is to be told of something without blocking for it: each once, unless it
//! gives up before.

use std::collections::BTreeMap;

/// Tells one of them; must not block and not call the engine.
pub(crate) type Tell = Box<dyn FnOnce() + Send>;

/// One of those who wait to be told, for giving up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Waiter {
    n: u64,
    order: u64,
}

impl Waiter {
    /// As two numbers, for who cannot keep it as it is.
    pub fn to_parts(self) -> (u64, u64) {
        (self.n, self.order)
    }

    /// Of [`Waiter::to_parts`]; of other numbers it is nobody.
    pub fn from_parts((n, order): (u64, u64)) -> Self {
        Self { n, order }
    }
}

/// Everybody who waits for the same thing, by what they wait for.
#[derive(Default)]
pub(crate) struct Waiters {
    waiting: BTreeMap<Waiter, Tell>,
    next: u64,
}

impl Waiters {
    /// One more, to be told at `n`.
    pub(crate) fn add(&mut self, n: u64, tell: Tell) -> Waiter {
        let waiter = Waiter { n, order: self.next };
        self.next += 1;
        self.waiting.insert(waiter, tell);
        waiter
    }

    /// One less, unless it was told. To be dropped without a lock.
    pub(crate) fn remove(&mut self, waiter: Waiter) -> Option<Tell> {
        self.waiting.remove(&waiter)
    }

    /// Those who wait for no more than `n`.
    pub(crate) fn take_until(&mut self, n: u64) -> Vec<Tell> {
        let Some(later) = n.checked_add(1) else { return self.take_all() };
        let later = self.waiting.split_off(&Waiter { n: later, order: 0 });
        std::mem::replace(&mut self.waiting, later).into_values().collect()
    }

    /// All of them.
    pub(crate) fn take_all(&mut self) -> Vec<Tell> {
        std::mem::take(&mut self.waiting).into_values().collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}
