//! Locks: without poison, and counted in debug builds.
//!
//! Every lock of the project is taken through these functions; `clippy.toml`
//! sees to that. So a test that counts them here has counted all.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

/// Takes a lock, whoever panicked while holding it: a user's callback or owner
/// may, and that must not take the engine along.
#[inline]
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    count(&TAKEN);
    #[allow(clippy::disallowed_methods, reason = "this is the function to use instead")]
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes a lock that is free: one attempt, which never waits.
#[inline]
pub fn try_lock<T: ?Sized>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    count(&TRIED);
    #[allow(clippy::disallowed_methods, reason = "this is the function to use instead")]
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Takes a lock to read, as [`lock`].
#[inline]
pub fn read<T: ?Sized>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    count(&TAKEN);
    #[allow(clippy::disallowed_methods, reason = "this is the function to use instead")]
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// Takes a lock to write, as [`lock`].
#[inline]
pub fn write<T: ?Sized>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    count(&TAKEN);
    #[allow(clippy::disallowed_methods, reason = "this is the function to use instead")]
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Locks that were taken by this process so far, and attempts that never wait.
#[cfg(debug_assertions)]
pub fn num_locks() -> (u64, u64) {
    // ORDERING: read when what is counted is over.
    (TAKEN.load(Ordering::Relaxed), TRIED.load(Ordering::Relaxed))
}

static TAKEN: AtomicU64 = AtomicU64::new(0);
static TRIED: AtomicU64 = AtomicU64::new(0);

#[inline]
fn count(number: &AtomicU64) {
    if cfg!(debug_assertions) {
        // ORDERING: a number, no more.
        number.fetch_add(1, Ordering::Relaxed);
    }
}
