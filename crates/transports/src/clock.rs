//! Time, real or simulated.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// Nanoseconds since an epoch of the clock's own.
#[derive(Debug, Clone)]
pub enum Clock {
    /// The machine's CLOCK_MONOTONIC, which all processes of a host share and
    /// Python calls `time.monotonic_ns`.
    Real,
    /// A simulation's: stands still until the simulation moves it.
    Virtual(Arc<AtomicU64>),
}

impl Clock {
    /// Now, in nanoseconds.
    #[inline]
    pub fn now_ns(&self) -> u64 {
        match self {
            Self::Real => monotonic_ns(),
            // ORDERING: a simulation runs in one thread; the atomic only makes the clock shareable.
            Self::Virtual(now) => now.load(Ordering::Relaxed),
        }
    }
}

#[inline]
fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is ours; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
