//! File descriptors that do not survive `fork`.
//!
//! A child that inherited an engine's sockets would keep its peers believing
//! that the engine lives. So every descriptor of ours is noted in a bitmap, and
//! a handler in the child closes them all; it only reads atomics and calls
//! `close`, as is allowed between `fork` and `exec`.

use std::fs::File;
use std::mem::ManuallyDrop;
use std::net::TcpStream;
use std::ops::Deref;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::Once;

/// A file descriptor that is closed on drop, and in a child after `fork`.
#[derive(Debug)]
pub struct Fd {
    fd: ManuallyDrop<OwnedFd>,
    generation: u32,
}

impl Fd {
    /// Takes over a descriptor.
    pub fn new(fd: impl Into<OwnedFd>) -> Self {
        install();
        let fd = fd.into();
        note(fd.as_raw_fd(), true);
        Self { fd: ManuallyDrop::new(fd), generation: fork_generation() }
    }

    /// From a number that a system call just returned.
    ///
    /// # Safety
    /// `fd` is open and nobody else's.
    pub(crate) unsafe fn from_raw(fd: RawFd) -> Self {
        // SAFETY: as promised by the caller.
        Self::new(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// A socket, as the standard library sees it.
    pub fn as_stream(&self) -> impl Deref<Target = TcpStream> + '_ {
        // SAFETY: the descriptor stays open as long as it is borrowed, and what is never dropped does not close it.
        ManuallyDrop::new(unsafe { TcpStream::from_raw_fd(self.as_raw_fd()) })
    }

    /// Gives the descriptor away, for the standard library's types.
    pub fn into_owned(mut self) -> OwnedFd {
        note(self.fd.as_raw_fd(), false);
        // SAFETY: `self` is forgotten right away, so the descriptor is taken once.
        let fd = unsafe { ManuallyDrop::take(&mut self.fd) };
        std::mem::forget(self);
        fd
    }
}

/// Whether this process may open a handful of descriptors more.
pub(crate) fn are_descriptors_left() -> bool {
    (0..FEW).map(|_| File::open("/dev/null")).collect::<Result<Vec<_>, _>>().is_ok()
}

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        if self.generation == fork_generation() {
            note(self.fd.as_raw_fd(), false);
            // SAFETY: dropped once, here. In a child the number was closed by `close_all` and may be another's now.
            unsafe { ManuallyDrop::drop(&mut self.fd) };
        }
    }
}

impl IntoRawFd for Fd {
    fn into_raw_fd(self) -> RawFd {
        self.into_owned().into_raw_fd()
    }
}

/// How often this process is the child of a fork: whoever remembers another
/// number was created by an ancestor.
#[inline]
pub fn fork_generation() -> u32 {
    // ORDERING: written only while the process has one thread.
    GENERATION.load(Ordering::Relaxed)
}

fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: `close_all` is async-signal-safe: atomics and close(2) only.
        unsafe { libc::pthread_atfork(None, None, Some(close_all)) };
    });
}

extern "C" fn close_all() {
    // ORDERING: the child of a fork has one thread.
    GENERATION.fetch_add(1, Ordering::Relaxed);
    for (idx, word) in OPEN.iter().enumerate() {
        let mut bits = word.swap(0, Ordering::Relaxed);
        while bits != 0 {
            let fd = idx * 64 + bits.trailing_zeros() as usize;
            bits &= bits - 1;
            // SAFETY: the descriptor was ours in the parent, so its copy here is ours to close.
            unsafe { libc::close(fd as RawFd) };
        }
    }
}

fn note(fd: RawFd, open: bool) {
    let Ok(fd) = usize::try_from(fd) else { return };
    if let Some(word) = OPEN.get(fd / 64) {
        let bit = 1 << (fd % 64);
        // ORDERING: read only by `close_all`, which runs alone.
        if open {
            word.fetch_or(bit, Ordering::Relaxed);
        } else {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }
}

/// Makes reading from a descriptor of a library's never wait.
pub(crate) fn set_nonblocking(fd: RawFd) {
    // SAFETY: only the flags change of what is open; of what is not, nothing.
    unsafe { libc::fcntl(fd, libc::F_SETFL, libc::fcntl(fd, libc::F_GETFL) | libc::O_NONBLOCK) };
}

/// A descriptor that somebody else opened for us, and closes, is closed in a
/// child after `fork` too; or, with false, from now on not any more.
pub(crate) fn close_in_children(fd: RawFd, close: bool) {
    if close {
        install();
    }
    note(fd, close);
}

/// More than a NIC takes.
const FEW: usize = 16;
static GENERATION: AtomicU32 = AtomicU32::new(0);
/// Descriptors above 2^20 are not tracked; no engine comes near.
static OPEN: [AtomicU64; 1 << 14] = [const { AtomicU64::new(0) }; 1 << 14];
