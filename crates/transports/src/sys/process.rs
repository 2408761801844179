//! Other processes: their end, and their memory.

use std::io;

use super::{check, check_len, Fd, IOV_MAX};

/// A descriptor that becomes readable when the process exits. It names this
/// process for good: a recycled pid is another process.
///
/// # Errors
/// The system's: no such process, or none that this namespace sees.
pub fn pid_fd(pid: u32) -> io::Result<Fd> {
    // SAFETY: returns a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    // SAFETY: the descriptor is new.
    Ok(unsafe { Fd::from_raw(check(fd as libc::c_int)?) })
}

/// One range to write into another process.
#[derive(Debug, Clone, Copy)]
pub struct ForeignWrite {
    /// In this process.
    pub src: *const u8,
    /// In the other.
    pub dst: u64,
    /// Length in bytes.
    pub nbytes: usize,
}

/// Room for the scatter lists of one process_vm_writev call.
#[derive(Default)]
pub struct Foreign {
    local: Vec<libc::iovec>,
    remote: Vec<libc::iovec>,
}

// SAFETY: the lists are empty between calls.
unsafe impl Send for Foreign {}

impl std::fmt::Debug for Foreign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Foreign").finish_non_exhaustive()
    }
}

/// Writes every range into process `pid`, in as few calls as the kernel
/// allows; ranges that touch are joined, short returns continued.
///
/// # Errors
/// The system's: no right (Yama, namespaces, another user), the process is
/// gone, or its memory is.
///
/// # Safety
/// Every `src` is readable for its length.
pub unsafe fn foreign_write(
    pid: u32,
    room: &mut Foreign,
    ranges: impl Iterator<Item = ForeignWrite>,
) -> io::Result<()> {
    let mut ranges = ranges.filter(|range| range.nbytes > 0).peekable();
    while ranges.peek().is_some() {
        room.local.clear();
        room.remote.clear();
        while let Some(range) = ranges.next_if(|_| room.local.len() < IOV_MAX && room.remote.len() < IOV_MAX) {
            push(&mut room.local, range.src as usize, range.nbytes);
            push(&mut room.remote, range.dst as usize, range.nbytes);
        }
        let total: usize = room.local.iter().map(|iov| iov.iov_len).sum();
        let mut written = 0;
        while written < total {
            // SAFETY: the lists live through the call, and the caller vouches for the local ranges; the kernel checks
            // the remote ones.
            let moved = check_len(unsafe {
                libc::process_vm_writev(
                    pid as libc::pid_t,
                    room.local.as_ptr(),
                    room.local.len() as libc::c_ulong,
                    room.remote.as_ptr(),
                    room.remote.len() as libc::c_ulong,
                    0,
                )
            })?;
            if moved == 0 {
                return Err(io::Error::from(io::ErrorKind::WriteZero));
            }
            written += moved;
            if written < total {
                advance(&mut room.local, moved);
                advance(&mut room.remote, moved);
            }
        }
    }
    Ok(())
}

/// Reads bytes of process `pid`; the probe for the right to write.
///
/// # Errors
/// The system's.
pub fn foreign_read(pid: u32, src: u64, dst: &mut [u8]) -> io::Result<()> {
    let local = libc::iovec { iov_base: dst.as_mut_ptr().cast(), iov_len: dst.len() };
    let remote = libc::iovec { iov_base: src as *mut libc::c_void, iov_len: dst.len() };
    // SAFETY: `dst` is ours for its length; the kernel checks the other side.
    let moved =
        check_len(unsafe { libc::process_vm_readv(pid as libc::pid_t, &raw const local, 1, &raw const remote, 1, 0) })?;
    if moved == dst.len() {
        Ok(())
    } else {
        Err(io::Error::from(io::ErrorKind::UnexpectedEof))
    }
}

fn push(list: &mut Vec<libc::iovec>, address: usize, nbytes: usize) {
    match list.last_mut() {
        Some(last) if last.iov_base as usize + last.iov_len == address => last.iov_len += nbytes,
        _ => list.push(libc::iovec { iov_base: address as *mut libc::c_void, iov_len: nbytes }),
    }
}

fn advance(list: &mut Vec<libc::iovec>, mut nbytes: usize) {
    let whole = list
        .iter()
        .take_while(|iov| {
            let fits = iov.iov_len <= nbytes;
            if fits {
                nbytes -= iov.iov_len;
            }
            fits
        })
        .count();
    list.drain(..whole);
    if let Some(first) = list.first_mut() {
        first.iov_base = (first.iov_base as usize + nbytes) as *mut libc::c_void;
        first.iov_len -= nbytes;
    }
}
