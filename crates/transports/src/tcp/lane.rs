//! One stream of a link: what is to be sent, and what is being received.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::receive::Receive;
use super::send::{Part, Send, Submitted};
use crate::sys::{Fd, Interest, Poller};
use crate::{lock, Failure};

/// One stream.
#[derive(Debug)]
pub struct Lane {
    /// Its number, and its channel at the poller.
    pub idx: u8,
    socket: Fd,
    poller: Arc<Poller>,
    token: u64,
    /// Handed over by any thread, taken by whoever holds `send`.
    pub(super) submitted: Mutex<Submitted>,
    pub(super) send: Mutex<Send>,
    pub(super) receive: Mutex<Receive>,
    /// Something waits for room in the socket, or for its turn.
    pub(super) pending: AtomicBool,
    /// The socket is full: the poller says when there is room.
    pub(super) blocked: AtomicBool,
    pub(super) broken: AtomicBool,
    /// Whoever polls has heard that it breaks.
    is_reported: AtomicBool,
}

impl Lane {
    /// Over a connected stream, which is watched from now on. It breaks when the peer's system does not take what was
    /// sent within `patience`.
    ///
    /// # Errors
    /// The system's.
    pub fn new(socket: Fd, idx: u8, token: u64, poller: Arc<Poller>, patience: Duration) -> io::Result<Self> {
        {
            let stream = socket.as_stream();
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            if matches!((stream.local_addr(), stream.peer_addr()), (Ok(here), Ok(there)) if here.ip() == there.ip()) {
                suit_to_host(&stream);
            }
            // The control connection has heartbeats.
            if idx > 0 {
                notice_dead_way(&stream, patience);
            }
        }
        poller.add(&socket, token, Interest::Read)?;
        Ok(Self {
            idx,
            socket,
            poller,
            token,
            submitted: Mutex::default(),
            send: Mutex::default(),
            receive: Mutex::default(),
            pending: AtomicBool::new(false),
            blocked: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            is_reported: AtomicBool::new(false),
        })
    }

    /// It breaks: true the first time.
    pub(super) fn report(&self) -> bool {
        // ORDERING: among those who poll, one at a time.
        !self.is_reported.swap(true, Ordering::Relaxed)
    }

    pub(super) fn is_reported(&self) -> bool {
        // ORDERING: see `report`.
        self.is_reported.load(Ordering::Relaxed)
    }

    pub(super) fn raw(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }

    /// Notes whether the socket is full, and asks the poller to say when it is
    /// not; true when that is news.
    pub(super) fn set_blocked(&self, blocked: bool) -> bool {
        // ORDERING: changed under the lock of `send`; a late look costs a system call.
        let is_news = self.blocked.swap(blocked, Ordering::AcqRel) != blocked;
        if is_news {
            let interest = if blocked { Interest::ReadWrite } else { Interest::Read };
            let _ = self.poller.modify(&self.socket, self.token, interest);
        }
        is_news
    }

    /// Whether a flush could move something.
    pub(super) fn can_flush(&self) -> bool {
        // ORDERING: hints; see `set_blocked` and `TcpLink::push`.
        self.pending.load(Ordering::Acquire) && !self.blocked.load(Ordering::Acquire)
    }

    /// Whether bytes, or the end of the stream, wait to be read.
    pub(super) fn has_news(&self) -> bool {
        let mut byte = 0_u8;
        // SAFETY: our own descriptor, and room for one byte, which stays in the socket.
        let found = unsafe {
            libc::recv(self.socket.as_raw_fd(), (&raw mut byte).cast(), 1, libc::MSG_PEEK | libc::MSG_DONTWAIT)
        };
        found >= 0
    }

    /// Stops the stream: from now on nothing of the peer's lands through it, and what was to be sent ends with `why`.
    /// Returns what was sent, some of it or all, and not answered.
    pub(super) fn stop(&self, why: &Failure) -> Vec<Arc<Part>> {
        // ORDERING: the locks order the rest.
        self.broken.store(true, Ordering::Release);
        self.poller.remove(&self.socket);
        // SAFETY: our own descriptor; both directions end, the peer sees it at once.
        unsafe { libc::shutdown(self.socket.as_raw_fd(), libc::SHUT_RDWR) };
        lock(&self.receive).abandon();
        let (mut sent, mut unsent) = (Vec::new(), Vec::new());
        lock(&self.submitted).drain(&mut unsent);
        lock(&self.send).drain(&mut sent, &mut unsent);
        for part in unsent {
            part.end(Err(why.clone()));
        }
        sent
    }
}

/// For a stream that never leaves this host, where there is no network to spare
/// and none to fill.
fn suit_to_host(stream: &TcpStream) {
    // A congestion control that does not pace. Reno is always allowed.
    // MEASURED: `perf record` of 32 MiB over two streams, where the system's choice is BBR; docs/decisions/0010.
    set(stream, libc::IPPROTO_TCP, libc::TCP_CONGESTION, b"reno");
    // What waits in the socket for the reader is sent by the very call that reads, or by any other that comes by.
    set(stream, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, &MAX_UNSENT_BYTES.to_ne_bytes());
}

/// The way of one stream may be lost without a word while others stand, as where a firewall forgets what was idle. The
/// system then goes on trying for a quarter of an hour, and of a stream on which nothing is sent it never knows.
fn notice_dead_way(stream: &TcpStream, patience: Duration) {
    let patience_ms = patience.max(SHORTEST_PATIENCE).as_millis().min(libc::c_int::MAX as u128) as libc::c_int;
    set(stream, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, &patience_ms.to_ne_bytes());
    set(stream, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, &IDLE_S.to_ne_bytes());
    set(stream, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, &ASK_AGAIN_S.to_ne_bytes());
    set(stream, libc::SOL_SOCKET, libc::SO_KEEPALIVE, &1_i32.to_ne_bytes());
}

/// Refused, the stream is as the system made it.
fn set(stream: &TcpStream, level: libc::c_int, name: libc::c_int, value: &[u8]) {
    let len = value.len() as libc::socklen_t;
    // SAFETY: `value` is `len` bytes long.
    unsafe { libc::setsockopt(stream.as_raw_fd(), level, name, value.as_ptr().cast(), len) };
}

/// What may wait in a socket of this host for its peer to have room.
///
/// MEASURED: benchmarks/limits.py, 8 bytes behind 1 GiB; docs/decisions/0019.
const MAX_UNSENT_BYTES: libc::c_int = 64 << 10;
/// Several times what the system waits before it sends once more what was lost.
const SHORTEST_PATIENCE: Duration = Duration::from_secs(1);
/// After so many seconds without anything the peer's system is asked whether the stream stands: sooner than any firewall
/// forgets it.
const IDLE_S: libc::c_int = 15;
const ASK_AGAIN_S: libc::c_int = 5;
