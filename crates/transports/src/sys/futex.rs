//! Futexes in shared memory.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Blocks while `word` holds `seen`, at most `timeout`. May return early.
pub fn futex_wait(word: &AtomicU32, seen: u32, timeout: Duration) {
    let timeout = libc::timespec {
        tv_sec: timeout.as_secs().min(1 << 30) as libc::time_t,
        tv_nsec: timeout.subsec_nanos().into(),
    };
    // SAFETY: `word` outlives the call; a shared futex, since peers wake it through another mapping.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, seen, &raw const timeout, 0, 0);
    }
}

/// Wakes everybody who blocks on `word`, in any process.
pub fn futex_wake_all(word: &AtomicU32) {
    // SAFETY: the address is only used as a key.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX, 0, 0, 0);
    }
}
