//! The Unix socket between two engines of one host.
//!
//! Messages keep their boundaries, and some carry descriptors. When the socket
//! is full the message waits here: nothing on this channel is ever dropped
//! except kicks, of which one is as good as many.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use anyfabric_wire::Local;

use super::ring;
use crate::lock;
use crate::sys::{self, Fd, Mapping};

/// The Unix socket of one link.
#[derive(Debug)]
pub struct LocalChannel {
    socket: Fd,
    waiting: Mutex<Waiting>,
}

/// Encoded messages and the descriptors that go with them.
type Waiting = VecDeque<(Vec<u8>, Option<Arc<Fd>>)>;

impl LocalChannel {
    /// Over a connected socket.
    pub fn new(socket: Fd) -> Self {
        Self { socket, waiting: Mutex::default() }
    }

    /// The socket, for the poller.
    pub fn socket(&self) -> &Fd {
        &self.socket
    }

    /// Sends a message, now or when there is room.
    ///
    /// # Errors
    /// The system's: the other side is gone.
    pub fn send(&self, message: &Local, fd: Option<Arc<Fd>>) -> io::Result<()> {
        let mut waiting = lock(&self.waiting);
        if waiting.len() >= MAX_WAITING {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the peer does not read its local socket"));
        }
        waiting.push_back((message.encode(), fd));
        self.flush_locked(&mut waiting)
    }

    /// Sends what waits, as far as there is room.
    ///
    /// # Errors
    /// The system's: the other side is gone.
    pub fn flush(&self) -> io::Result<()> {
        let mut waiting = lock(&self.waiting);
        self.flush_locked(&mut waiting)
    }

    /// Wakes the other side's worker.
    pub fn kick(&self) {
        // A full socket wakes it just as well.
        let _ = sys::send_with_fds(&self.socket, &Local::Kick.encode(), &[]);
    }

    /// The next message, `None` when there is none yet.
    ///
    /// # Errors
    /// `UnexpectedEof`: the other side is gone; `InvalidData`: it sends garbage.
    pub fn receive(&self) -> io::Result<Option<(Local, Vec<Fd>)>> {
        let mut bytes = [0; Local::MAX_ENCODED];
        match sys::receive_with_fds(&self.socket, &mut bytes) {
            Ok((0, _)) => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            Ok((len, fds)) => match Local::decode(&bytes[..len]) {
                Ok(message) => Ok(Some((message, fds))),
                Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn flush_locked(&self, waiting: &mut Waiting) -> io::Result<()> {
        while let Some((bytes, fd)) = waiting.front() {
            let fds: Vec<RawFd> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
            match sys::send_with_fds(&self.socket, bytes, &fds) {
                Ok(()) => {
                    waiting.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Memory for a ring to one peer: the descriptor to hand over, and our mapping.
///
/// # Errors
/// The system's.
pub fn ring_memory() -> io::Result<(Fd, Arc<Mapping>)> {
    let fd = sys::memfd(c"anyfabric-ring", ring::BYTES)?;
    let mapping = Mapping::shared(&fd, ring::BYTES, false)?;
    Ok((fd, Arc::new(mapping)))
}

const MAX_WAITING: usize = 4096;
