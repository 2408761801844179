//! Mutexes without poison.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes a lock, whoever panicked while holding it: a user's callback or owner
/// may, and that must not take the engine along.
#[inline]
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
