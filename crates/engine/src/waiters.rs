//! Who waits for a number to be reached without blocking for it: each is taken
//! once, unless it gives up before. What either costs grows with the logarithm
//! of how many wait, be it for the same number.

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
pub(crate) struct Waiters<T = Tell> {
    waiting: BTreeMap<Waiter, T>,
    next: u64,
}

impl<T> Default for Waiters<T> {
    fn default() -> Self {
        Self { waiting: BTreeMap::new(), next: 0 }
    }
}

impl<T> Waiters<T> {
    /// One more, whose turn comes at `n`.
    pub(crate) fn add(&mut self, n: u64, what: T) -> Waiter {
        let waiter = Waiter { n, order: self.next };
        self.next += 1;
        self.waiting.insert(waiter, what);
        waiter
    }

    /// One less, unless it was taken. To be dropped without a lock.
    pub(crate) fn remove(&mut self, waiter: Waiter) -> Option<T> {
        self.waiting.remove(&waiter)
    }

    /// The smallest number that somebody waits for.
    pub(crate) fn first(&self) -> Option<u64> {
        self.waiting.first_key_value().map(|(waiter, _)| waiter.n)
    }

    /// Those who wait for no more than `n`.
    pub(crate) fn take_until(&mut self, n: u64) -> Vec<T> {
        let Some(later) = n.checked_add(1) else { return self.take_all() };
        let later = self.waiting.split_off(&Waiter { n: later, order: 0 });
        std::mem::replace(&mut self.waiting, later).into_values().collect()
    }

    /// All of them.
    pub(crate) fn take_all(&mut self) -> Vec<T> {
        std::mem::take(&mut self.waiting).into_values().collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}
