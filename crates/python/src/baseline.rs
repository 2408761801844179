//! Baselines of `anyfabric perf`: the least that the hardware and the kernel allow.
//!
//! Nothing of the engine is on the way. Each function repeats one movement of
//! bytes and returns the nanoseconds of every round; what can be prepared is
//! prepared before the clock starts. The two-sided ones have a partner in the
//! other process. They take addresses from `anyfabric.cli.perf_baselines`,
//! which keeps the memory alive, and check nothing.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libc::iovec;
use pyo3::prelude::*;

use crate::error;

/// `(dst_indices_address, src_indices_address, num_pages)`.
type Indices = (usize, usize, usize);

/// Adds the functions of this file to the module.
pub(crate) fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(baseline_memcpy, module)?)?;
    module.add_function(wrap_pyfunction!(baseline_copy_pages, module)?)?;
    module.add_function(wrap_pyfunction!(baseline_process_vm_writev, module)?)?;
    module.add_function(wrap_pyfunction!(baseline_ring_ping, module)?)?;
    module.add_function(wrap_pyfunction!(baseline_ring_pong, module)?)?;
    module.add_function(wrap_pyfunction!(baseline_socket_source, module)?)?;
    module.add_function(wrap_pyfunction!(baseline_socket_sink, module)?)
}

/// Times libc's `memcpy` of one range.
#[pyfunction]
#[pyo3(signature = (dst, src, nbytes, rounds))]
fn baseline_memcpy(py: Python<'_>, dst: usize, src: usize, nbytes: usize, rounds: usize) -> Vec<u64> {
    py.detach(|| {
        timed(rounds, || {
            // SAFETY: the caller vouches for both ranges, which are distinct.
            unsafe { libc::memcpy(dst as *mut _, src as *const _, nbytes) };
        })
    })
}

/// Times a loop of `memcpy`, page by page.
#[pyfunction]
#[pyo3(signature = (dst, src, indices, page_bytes, rounds))]
fn baseline_copy_pages(
    py: Python<'_>,
    dst: usize,
    src: usize,
    indices: Indices,
    page_bytes: usize,
    rounds: usize,
) -> Vec<u64> {
    // SAFETY: the caller vouches for the indices and keeps them alive.
    let pairs = unsafe { pages(dst, src, indices, page_bytes) };
    py.detach(|| {
        timed(rounds, || {
            for &(to, from) in &pairs {
                // SAFETY: the caller vouches for every page.
                unsafe { libc::memcpy(to as *mut _, from as *const _, page_bytes) };
            }
        })
    })
}

/// Times full batches of `process_vm_writev` into another process.
#[pyfunction]
#[pyo3(signature = (pid, dst, src, indices, page_bytes, rounds))]
fn baseline_process_vm_writev(
    py: Python<'_>,
    pid: i32,
    dst: usize,
    src: usize,
    indices: Indices,
    page_bytes: usize,
    rounds: usize,
) -> PyResult<Vec<u64>> {
    // SAFETY: the caller vouches for the indices and keeps them alive.
    let pairs = unsafe { pages(dst, src, indices, page_bytes) };
    py.detach(|| {
        let local: Vec<iovec> = pairs.iter().map(|&(_, from)| piece(from, page_bytes)).collect();
        let remote: Vec<iovec> = pairs.iter().map(|&(to, _)| piece(to, page_bytes)).collect();
        let mut times = Vec::with_capacity(rounds);
        for _ in 0..rounds {
            let begin = Instant::now();
            for (from, to) in local.chunks(IOV_MAX).zip(remote.chunks(IOV_MAX)) {
                write_into(pid, from, to)?;
            }
            times.push(nanoseconds(begin));
        }
        Ok(times)
    })
    .map_err(|cause: io::Error| error::unsupported(format!("process_vm_writev into process {pid}: {cause}")))
}

/// Times half the round trip of 8 bytes through two polled words.
#[pyfunction]
#[pyo3(signature = (memory, rounds))]
fn baseline_ring_ping(py: Python<'_>, memory: usize, rounds: usize) -> PyResult<Vec<u64>> {
    // SAFETY: the caller vouches for the memory and keeps it mapped.
    let (ping, pong) = unsafe { words(memory) };
    py.detach(|| {
        let mut times = Vec::with_capacity(rounds);
        for round in 1..=rounds as u64 {
            let begin = Instant::now();
            // ORDERING: released to the acquiring `await_word` of `baseline_ring_pong`.
            ping.store(round, Ordering::Release);
            await_word(pong, round)?;
            times.push(nanoseconds(begin) / 2);
        }
        Ok(times)
    })
}

/// Answers [`baseline_ring_ping`].
#[pyfunction]
#[pyo3(signature = (memory, rounds))]
fn baseline_ring_pong(py: Python<'_>, memory: usize, rounds: usize) -> PyResult<()> {
    // SAFETY: the caller vouches for the memory and keeps it mapped.
    let (ping, pong) = unsafe { words(memory) };
    py.detach(|| {
        for round in 1..=rounds as u64 {
            await_word(ping, round)?;
            // ORDERING: released to the acquiring `await_word` of `baseline_ring_ping`.
            pong.store(round, Ordering::Release);
        }
        Ok(())
    })
}

/// Times batched `sendmsg` of the source pages over connected stream sockets.
#[pyfunction]
#[pyo3(signature = (fds, src, indices, page_bytes, rounds))]
fn baseline_socket_source(
    py: Python<'_>,
    fds: Vec<i32>,
    src: usize,
    indices: Indices,
    page_bytes: usize,
    rounds: usize,
) -> PyResult<Vec<u64>> {
    // SAFETY: the caller vouches for the indices and keeps them alive.
    let pairs = unsafe { pages(0, src, indices, page_bytes) };
    py.detach(|| {
        let dealt = deal(&pairs.iter().map(|&(_, from)| from).collect::<Vec<_>>(), page_bytes, fds.len());
        let mut times = Vec::with_capacity(rounds);
        let mut answer = 0_u8;
        for _ in 0..rounds {
            let streams = dealt.clone();
            let begin = Instant::now();
            move_all(&fds, streams, Direction::Out)?;
            move_all(&fds[..1], vec![vec![piece(&raw mut answer as usize, 1)]], Direction::In)?;
            times.push(nanoseconds(begin));
        }
        Ok(times)
    })
    .map_err(|cause: io::Error| cause.into())
}

/// Reads what [`baseline_socket_source`] sends into the destination pages.
#[pyfunction]
#[pyo3(signature = (fds, dst, indices, page_bytes, rounds))]
fn baseline_socket_sink(
    py: Python<'_>,
    fds: Vec<i32>,
    dst: usize,
    indices: Indices,
    page_bytes: usize,
    rounds: usize,
) -> PyResult<()> {
    // SAFETY: the caller vouches for the indices and keeps them alive.
    let pairs = unsafe { pages(dst, 0, indices, page_bytes) };
    py.detach(|| {
        let dealt = deal(&pairs.iter().map(|&(to, _)| to).collect::<Vec<_>>(), page_bytes, fds.len());
        let mut answer = 1_u8;
        for _ in 0..rounds {
            move_all(&fds, dealt.clone(), Direction::In)?;
            move_all(&fds[..1], vec![vec![piece(&raw mut answer as usize, 1)]], Direction::Out)?;
        }
        Ok(())
    })
    .map_err(|cause: io::Error| cause.into())
}

/// Runs `step` so many times and says how long each took.
fn timed(rounds: usize, mut step: impl FnMut()) -> Vec<u64> {
    (0..rounds)
        .map(|_| {
            let begin = Instant::now();
            step();
            nanoseconds(begin)
        })
        .collect()
}

fn nanoseconds(begin: Instant) -> u64 {
    u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Addresses of each page at the destination and at the source.
///
/// # Safety
///
/// Both index arrays hold that many aligned `u32`.
unsafe fn pages(dst: usize, src: usize, indices: Indices, page_bytes: usize) -> Vec<(usize, usize)> {
    let (dst_indices, src_indices, num_pages) = indices;
    if num_pages == 0 {
        return Vec::new();
    }
    // SAFETY: promised by the caller.
    let (to, from) = unsafe {
        (
            std::slice::from_raw_parts(dst_indices as *const u32, num_pages),
            std::slice::from_raw_parts(src_indices as *const u32, num_pages),
        )
    };
    to.iter().zip(from).map(|(&t, &f)| (dst + t as usize * page_bytes, src + f as usize * page_bytes)).collect()
}

fn piece(address: usize, nbytes: usize) -> iovec {
    iovec { iov_base: address as *mut _, iov_len: nbytes }
}

fn write_into(pid: i32, from: &[iovec], to: &[iovec]) -> io::Result<()> {
    let expected: usize = from.iter().map(|piece| piece.iov_len).sum();
    // SAFETY: local pieces are readable; the kernel checks the remote ones.
    let written = unsafe {
        libc::process_vm_writev(
            pid,
            from.as_ptr(),
            from.len() as libc::c_ulong,
            to.as_ptr(),
            to.len() as libc::c_ulong,
            0,
        )
    };
    match usize::try_from(written) {
        Ok(nbytes) if nbytes == expected => Ok(()),
        Ok(nbytes) => Err(io::Error::other(format!("wrote {nbytes} of {expected} bytes"))),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// The two words of the ring, on cache lines of their own.
///
/// # Safety
///
/// 128 bytes at `memory`, 64-byte aligned, mapped for as long as the words are used.
unsafe fn words<'a>(memory: usize) -> (&'a AtomicU64, &'a AtomicU64) {
    // SAFETY: promised by the caller.
    unsafe { (&*(memory as *const AtomicU64), &*((memory + 64) as *const AtomicU64)) }
}

fn await_word(word: &AtomicU64, value: u64) -> PyResult<()> {
    let mut spins = 0_u32;
    let mut give_up = None;
    // ORDERING: acquires what the other side released.
    while word.load(Ordering::Acquire) < value {
        std::hint::spin_loop();
        spins = spins.wrapping_add(1);
        if spins.is_multiple_of(SPINS_PER_LOOK)
            && Instant::now() > *give_up.get_or_insert_with(|| Instant::now() + SILENCE)
        {
            return Err(error::wait_timeout(format!("the other process did not answer round {value}")));
        }
    }
    Ok(())
}

/// Deals pages out in equal runs; fewer pages than streams are cut instead.
fn deal(pages: &[usize], page_bytes: usize, num_streams: usize) -> Vec<Vec<iovec>> {
    if pages.len() == 1 {
        let cuts: Vec<usize> = (0..=num_streams).map(|n| page_bytes * n / num_streams).collect();
        return cuts.windows(2).map(|cut| vec![piece(pages[0] + cut[0], cut[1] - cut[0])]).collect();
    }
    let run = pages.len().div_ceil(num_streams);
    (0..num_streams)
        .map(|n| pages.iter().skip(n * run).take(run).map(|&page| piece(page, page_bytes)).collect())
        .collect()
}

/// Moves every stream's pieces to their end, the streams taking turns; sleeps when none can move.
fn move_all(fds: &[i32], mut streams: Vec<Vec<iovec>>, direction: Direction) -> io::Result<()> {
    let mut starts = vec![0; streams.len()];
    let mut idle_turns = 0;
    loop {
        let mut waiting: Vec<libc::pollfd> = Vec::new();
        let mut has_moved = false;
        for ((&fd, pieces), start) in fds.iter().zip(&mut streams).zip(&mut starts) {
            let nbytes = move_some(fd, &mut pieces[*start..], direction)?;
            has_moved |= nbytes > 0;
            *start += consume(&mut pieces[*start..], nbytes);
            if *start < pieces.len() {
                waiting.push(libc::pollfd { fd, events: direction.readiness(), revents: 0 });
            }
        }
        if waiting.is_empty() {
            return Ok(());
        }
        idle_turns = if has_moved { 0 } else { idle_turns + 1 };
        if idle_turns > 0 {
            // The other side may be waiting for this core.
            std::thread::yield_now();
        }
        if idle_turns > TURNS_BEFORE_SLEEP {
            let timeout_ms = i32::try_from(SILENCE.as_millis()).unwrap_or(i32::MAX);
            // SAFETY: `waiting` is an array of that many entries.
            if unsafe { libc::poll(waiting.as_mut_ptr(), waiting.len() as libc::nfds_t, timeout_ms) } == 0 {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "no stream moved"));
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Out,
    In,
}

impl Direction {
    const fn readiness(self) -> i16 {
        match self {
            Self::Out => libc::POLLOUT,
            Self::In => libc::POLLIN,
        }
    }
}

/// Moves what fits without waiting; 0 when nothing does.
fn move_some(fd: i32, pieces: &mut [iovec], direction: Direction) -> io::Result<usize> {
    if pieces.is_empty() {
        return Ok(0);
    }
    // SAFETY: a message header is plain data, valid when zeroed.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len().min(IOV_MAX) as _;
    // SAFETY: the header lists that many pieces, for which the caller vouches.
    let moved = unsafe {
        match direction {
            Direction::Out => libc::sendmsg(fd, &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL),
            Direction::In => libc::recvmsg(fd, &mut message, libc::MSG_DONTWAIT),
        }
    };
    match usize::try_from(moved) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(nbytes) => Ok(nbytes),
        Err(_) => match io::Error::last_os_error() {
            cause if matches!(cause.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
            cause => Err(cause),
        },
    }
}

/// Takes `nbytes` off the front of the pieces; says how many of them are finished.
fn consume(pieces: &mut [iovec], mut nbytes: usize) -> usize {
    let mut num_finished = 0;
    for piece in pieces {
        let step = nbytes.min(piece.iov_len);
        piece.iov_base = (piece.iov_base as usize + step) as *mut _;
        piece.iov_len -= step;
        nbytes -= step;
        if piece.iov_len > 0 {
            break;
        }
        num_finished += 1;
    }
    num_finished
}

const IOV_MAX: usize = 1024;
const SPINS_PER_LOOK: u32 = 1 << 12;
const TURNS_BEFORE_SLEEP: u32 = 100;
const SILENCE: Duration = Duration::from_secs(10);
