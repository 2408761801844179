//! Bare stream sockets: pages out with `sendmsg`, in with `readv`, one thread a
//! socket. They block in the kernel, which costs least, until nothing has moved for too long.

use std::io;
use std::os::fd::RawFd;
use std::sync::Barrier;
use std::time::Duration;

use anyfabric_engine::transports::sys::IOV_MAX;
use anyfabric_engine::Code;
use pyo3::prelude::*;

use super::{fail, indices_at, time_rounds, Indices};

/// Sends the source pages; a round ends when a byte came back on every socket.
#[allow(clippy::too_many_arguments, reason = "the contract of the stub; nobody else calls it")]
#[pyfunction]
#[pyo3(signature = (fds, src, indices, page_bytes, rounds, *, timeout_s))]
pub(crate) fn baseline_socket_source(
    py: Python<'_>,
    fds: Vec<RawFd>,
    src: usize,
    indices: Indices,
    page_bytes: usize,
    rounds: usize,
    timeout_s: f64,
) -> PyResult<Vec<u64>> {
    set_patience(py, &fds, timeout_s)?;
    let (_, src_indices, num_pages) = indices;
    let round = |fd: RawFd, ranges: &[libc::iovec]| {
        move_all(fd, ranges, |fd, list| {
            // SAFETY: an empty header is valid; the list is filled in below and lives through the call.
            let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
            header.msg_iov = list.as_ptr().cast_mut();
            header.msg_iovlen = list.len() as _;
            // SAFETY: the contract of the stub: the ranges are readable.
            unsafe { libc::sendmsg(fd, &raw const header, libc::MSG_NOSIGNAL) }
        })?;
        let mut answer = 0_u8;
        move_all(fd, &[range((&raw mut answer) as usize, 1)], read_some)
    };
    // SAFETY: the contract of the stub: the caller holds the array through the call.
    let indices = unsafe { indices_at(src_indices, num_pages) };
    run(py, &fds, deal(src, indices, page_bytes, fds.len()), rounds, round)
}

/// Reads the destination pages and answers.
#[allow(clippy::too_many_arguments, reason = "the contract of the stub; nobody else calls it")]
#[pyfunction]
#[pyo3(signature = (fds, dst, indices, page_bytes, rounds, *, timeout_s))]
pub(crate) fn baseline_socket_sink(
    py: Python<'_>,
    fds: Vec<RawFd>,
    dst: usize,
    indices: Indices,
    page_bytes: usize,
    rounds: usize,
    timeout_s: f64,
) -> PyResult<()> {
    set_patience(py, &fds, timeout_s)?;
    let (dst_indices, _, num_pages) = indices;
    let round = |fd: RawFd, ranges: &[libc::iovec]| {
        move_all(fd, ranges, read_some)?;
        let answer = 0_u8;
        move_all(fd, &[range((&raw const answer) as usize, 1)], |fd, list| {
            // SAFETY: the list holds the one byte above.
            unsafe { libc::send(fd, list[0].iov_base, list[0].iov_len, libc::MSG_NOSIGNAL) }
        })
    };
    // SAFETY: the contract of the stub: the caller holds the array through the call.
    let indices = unsafe { indices_at(dst_indices, num_pages) };
    run(py, &fds, deal(dst, indices, page_bytes, fds.len()), rounds, round).map(drop)
}

/// What one socket moves in a round.
struct Share(Vec<libc::iovec>);

// SAFETY: addresses of memory that the caller holds through the call; each share is used by one thread.
unsafe impl Send for Share {}
// SAFETY: as above; nothing in it changes.
unsafe impl Sync for Share {}

/// Deals the pages out in equal runs; one page of the whole size is cut into
/// equal parts.
fn deal(base: usize, indices: &[u32], page_bytes: usize, num_shares: usize) -> Vec<Share> {
    let cut = |total: usize, idx: usize| total * idx / num_shares;
    (0..num_shares)
        .map(|idx| match indices {
            [only] => {
                let (from, to) = (cut(page_bytes, idx), cut(page_bytes, idx + 1));
                vec![range(base + *only as usize * page_bytes + from, to - from)]
            }
            many => many[cut(many.len(), idx)..cut(many.len(), idx + 1)]
                .iter()
                .map(|page| range(base + *page as usize * page_bytes, page_bytes))
                .collect(),
        })
        .map(Share)
        .collect()
}

/// Runs the rounds, the first socket in this thread and each other in its own.
fn run(
    py: Python<'_>,
    fds: &[RawFd],
    shares: Vec<Share>,
    rounds: usize,
    round: impl Fn(RawFd, &[libc::iovec]) -> io::Result<()> + Sync,
) -> PyResult<Vec<u64>> {
    let moved = py.detach(|| {
        let barrier = Barrier::new(fds.len());
        let work = |fd: RawFd, share: &Share| {
            // Whoever fails goes on to meet the others, who would wait for ever.
            let mut failed = None;
            let times = time_rounds(rounds, || {
                barrier.wait();
                if failed.is_none() {
                    failed = round(fd, &share.0).err();
                }
                barrier.wait();
                Ok::<(), std::convert::Infallible>(())
            });
            let Ok(times) = times;
            failed.map_or(Ok(times), Err)
        };
        let Some(((first_fd, first_share), others)) =
            fds.iter().zip(&shares).collect::<Vec<_>>().split_first().map(|(first, others)| (*first, others.to_vec()))
        else {
            return Ok(Vec::new());
        };
        std::thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = others
                .iter()
                .map(|(fd, share)| (**fd, *share))
                .map(|(fd, share)| scope.spawn(move || work(fd, share)))
                .collect();
            let times = work(*first_fd, first_share);
            let panicked = || Err(io::Error::other("a thread of the baseline panicked"));
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| panicked()).map(drop))?;
            times
        })
    });
    moved.map_err(|error| failed(py, &error))
}

/// From now on no call on these sockets takes longer.
fn set_patience(py: Python<'_>, fds: &[RawFd], timeout_s: f64) -> PyResult<()> {
    let patience = Duration::try_from_secs_f64(timeout_s).unwrap_or(Duration::MAX);
    let tv_sec = patience.as_secs().min(i32::MAX as u64) as libc::time_t;
    // All zeroes are for ever.
    let timeout = libc::timeval { tv_sec, tv_usec: patience.subsec_micros().max(1).into() };
    for fd in fds {
        for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
            let (value, len) = ((&raw const timeout).cast(), size_of::<libc::timeval>() as libc::socklen_t);
            // SAFETY: a timeval that lives through the call.
            if unsafe { libc::setsockopt(*fd, libc::SOL_SOCKET, option, value, len) } != 0 {
                return Err(failed(py, &io::Error::last_os_error()));
            }
        }
    }
    Ok(())
}

fn failed(py: Python<'_>, error: &io::Error) -> PyErr {
    let error = match error.kind() {
        io::ErrorKind::WouldBlock => "nothing moved within the timeout".to_owned(),
        _ => error.to_string(),
    };
    fail(py, Code::ConnectionBroken, format!("a socket of the baseline: {error}"))
}

/// Moves every byte of `ranges`, in full batches.
fn move_all(fd: RawFd, ranges: &[libc::iovec], move_some: impl Fn(RawFd, &[libc::iovec]) -> isize) -> io::Result<()> {
    let mut rest = ranges;
    // The range that was cut off, if any, is the first of `rest`.
    let mut done = 0;
    let mut batch: Vec<libc::iovec> = Vec::with_capacity(rest.len().min(IOV_MAX));
    while let Some(first) = rest.first() {
        if first.iov_len == done {
            (rest, done) = (&rest[1..], 0);
            continue;
        }
        batch.clear();
        batch.extend_from_slice(&rest[..rest.len().min(IOV_MAX)]);
        batch[0] = range(first.iov_base as usize + done, first.iov_len - done);
        let moved = move_some(fd, &batch);
        let mut moved = match usize::try_from(moved) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => moved + done,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            },
        };
        done = 0;
        while let Some(first) = rest.first() {
            if moved < first.iov_len {
                done = moved;
                break;
            }
            moved -= first.iov_len;
            rest = &rest[1..];
        }
    }
    Ok(())
}

fn read_some(fd: RawFd, list: &[libc::iovec]) -> isize {
    // SAFETY: the contract of the stub: the ranges are writable.
    unsafe { libc::readv(fd, list.as_ptr(), list.len() as libc::c_int) }
}

fn range(address: usize, nbytes: usize) -> libc::iovec {
    libc::iovec { iov_base: address as *mut libc::c_void, iov_len: nbytes }
}
