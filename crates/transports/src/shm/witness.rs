//! Whether a number still names the peer's process.
//!
//! process_vm_writev takes a pid, which may be another process's once the peer's has exited and been waited for. A
//! process that is seen to live, by its pidfd, had its pid until then, so a look after the write says whether the bytes
//! went where they should, and one before it that they will, unless the process ends in between. A kernel gives a pid
//! anew only after all others have had their turn, which takes far longer than a tick of its clock. So within a tick one
//! look is enough, for looks are system calls, and a short write is one itself.
//!
//! Left out: an exec keeps the pid and changes the memory. It ends the peer's sockets, as an exit does, and until that
//! has been read a write may go to the new program.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

/// When a process was last seen to live.
#[derive(Debug, Default)]
pub(super) struct Witness {
    /// 0 is never.
    seen_ns: AtomicU64,
}

impl Witness {
    /// Asks whether the process has exited, unless it was seen to live a moment ago.
    ///
    /// # Errors
    /// `ESRCH`, as of a pid that nobody has.
    #[inline]
    pub(super) fn check(&self, has_exited: impl FnOnce() -> bool) -> io::Result<()> {
        // Before the look: it lived then, too.
        let now_ns = coarse_ns();
        // ORDERING: whoever reads another thread's note late looks once more.
        let seen_ns = self.seen_ns.load(Ordering::Relaxed);
        if seen_ns > 0 && now_ns == seen_ns {
            return Ok(());
        }
        if has_exited() {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        self.seen_ns.store(now_ns, Ordering::Relaxed);
        Ok(())
    }
}

/// The time of the last tick, of which a second has at least a hundred. A tick is a moment: in one, no kernel starts as many
/// processes as there are pids, 32768 where nobody chose fewer.
fn coarse_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a timespec that lives through the call. Should it fail all moments are never, and everybody is asked.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
