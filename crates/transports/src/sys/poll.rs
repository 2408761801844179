//! Waiting for descriptors.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use super::{check, check_len, Fd};

/// What to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Something to read.
    Read,
    /// Something to read, or room to write.
    ReadWrite,
}

/// One descriptor that is ready.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    /// Given at [`Poller::add`].
    pub token: u64,
    /// There is something to read, or the end of the stream, or an error.
    pub readable: bool,
    /// There is room to write.
    pub writable: bool,
    /// It has failed, or nobody is at the other end.
    pub is_over: bool,
}

/// Whether there is something to read, now or within a timeout of at most some
/// milliseconds.
pub fn is_readable_within(fd: &Fd, timeout: Duration) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let millis = libc::c_int::try_from(timeout.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: one entry, which lives through the call.
    unsafe { libc::poll(&raw mut poll, 1, millis) == 1 }
}

/// An epoll instance, level-triggered.
#[derive(Debug)]
pub struct Poller {
    fd: Fd,
}

impl Poller {
    /// A new one.
    ///
    /// # Errors
    /// The system's.
    pub fn new() -> io::Result<Self> {
        // SAFETY: returns a new descriptor.
        Ok(Self { fd: unsafe { Fd::from_raw(check(libc::epoll_create1(libc::EPOLL_CLOEXEC))?) } })
    }

    /// Watches a descriptor.
    ///
    /// # Errors
    /// The system's.
    pub fn add(&self, fd: &impl AsRawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd, token, interest)
    }

    /// Changes what a descriptor is watched for.
    ///
    /// # Errors
    /// The system's.
    pub fn modify(&self, fd: &impl AsRawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd, token, interest)
    }

    /// Watches a descriptor no more; closing it does the same.
    pub fn remove(&self, fd: &impl AsRawFd) {
        let _ = self.control(libc::EPOLL_CTL_DEL, fd, 0, Interest::Read);
    }

    /// Descriptors that are ready now or within `timeout`.
    ///
    /// # Errors
    /// The system's; an interruption is no error.
    pub fn wait(&self, timeout: Duration, ready: &mut Vec<Ready>) -> io::Result<()> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
        let timeout = if timeout < MILLISECOND { self.doze(timeout) } else { timeout };
        let timeout_ms = timeout.as_micros().div_ceil(1000).min(60_000) as libc::c_int;
        ready.clear();
        // SAFETY: `events` has room for BATCH events.
        let count = check_len(unsafe {
            libc::epoll_wait(self.fd.as_raw_fd(), events.as_mut_ptr(), BATCH as libc::c_int, timeout_ms) as isize
        });
        match count {
            Ok(count) => {
                ready.extend(events.iter().take(count).map(|event| Ready {
                    token: event.u64,
                    readable: event.events & !(libc::EPOLLOUT as u32) != 0,
                    writable: event.events & libc::EPOLLOUT as u32 != 0,
                    is_over: event.events & (libc::EPOLLERR | libc::EPOLLHUP) as u32 != 0,
                }));
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Waits for less than epoll can count; returns what is left to wait: nothing.
    fn doze(&self, timeout: Duration) -> Duration {
        if !timeout.is_zero() {
            let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            let timeout = libc::timespec { tv_sec: 0, tv_nsec: timeout.subsec_nanos().into() };
            // SAFETY: one pollfd and a timeout that live through the call; no signal mask.
            unsafe { libc::ppoll(&raw mut poll, 1, &raw const timeout, std::ptr::null()) };
        }
        Duration::ZERO
    }

    fn control(&self, operation: libc::c_int, fd: &impl AsRawFd, token: u64, interest: Interest) -> io::Result<()> {
        let events = match interest {
            Interest::Read => libc::EPOLLIN | libc::EPOLLRDHUP,
            Interest::ReadWrite => libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLOUT,
        };
        let mut event = libc::epoll_event { events: events as u32, u64: token };
        // SAFETY: both descriptors are open, the event lives through the call.
        check(unsafe { libc::epoll_ctl(self.fd.as_raw_fd(), operation, fd.as_raw_fd(), &raw mut event) })?;
        Ok(())
    }
}

/// A descriptor that one thread makes readable for another.
#[derive(Debug)]
pub struct EventFd {
    fd: Fd,
}

impl EventFd {
    /// A new one, not readable.
    ///
    /// # Errors
    /// The system's.
    pub fn new() -> io::Result<Self> {
        // SAFETY: returns a new descriptor.
        Ok(Self { fd: unsafe { Fd::from_raw(check(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK))?) } })
    }

    /// Makes it readable.
    pub fn notify(&self) {
        let one = 1_u64;
        // SAFETY: writes eight bytes; when the counter is full it is readable already.
        unsafe { libc::write(self.fd.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Makes it unreadable.
    pub fn clear(&self) {
        let mut count = 0_u64;
        // SAFETY: reads eight bytes; it does not block.
        unsafe { libc::read(self.fd.as_raw_fd(), (&raw mut count).cast(), 8) };
    }

    /// Waits until it is readable, at most `timeout`; true when it is.
    pub fn wait(&self, timeout: Duration) -> bool {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let timeout_ms = timeout.as_millis().min(i32::MAX as u128) as libc::c_int;
        // SAFETY: one pollfd that lives through the call.
        unsafe { libc::poll(&raw mut poll, 1, timeout_ms) > 0 }
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}

const BATCH: usize = 64;
const MILLISECOND: Duration = Duration::from_millis(1);
