//! On which CPUs a thread may run.

use std::io;

/// The calling thread's number, as the kernel has it.
pub fn thread_id() -> libc::pid_t {
    // SAFETY: only returns a number.
    unsafe { libc::gettid() }
}

/// CPUs on which a thread of this process may run, in order.
///
/// # Errors
/// The system's: no such thread.
pub fn affinity(thread: libc::pid_t) -> io::Result<Vec<u32>> {
    let mut mask = [0_u64; MASK_WORDS];
    // SAFETY: the kernel fills at most the mask's own length.
    let filled =
        unsafe { libc::syscall(libc::SYS_sched_getaffinity, thread, std::mem::size_of_val(&mask), mask.as_mut_ptr()) };
    if filled < 0 {
        return Err(io::Error::last_os_error());
    }
    let is_set = |cpu: &u32| mask[*cpu as usize / 64] >> (cpu % 64) & 1 == 1;
    Ok((0..MAX_CPUS).filter(is_set).collect())
}

/// Keeps a thread of this process on those of `cpus` on which it may run already;
/// returns them.
///
/// # Errors
/// `NotFound` when there is none, or the system's.
pub fn pin(thread: libc::pid_t, cpus: &[u32]) -> io::Result<Vec<u32>> {
    let mut kept = affinity(thread)?;
    kept.retain(|cpu| cpus.contains(cpu));
    if kept.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "it may not run on any of them"));
    }
    let mut mask = [0_u64; MASK_WORDS];
    kept.iter().for_each(|cpu| mask[*cpu as usize / 64] |= 1 << (cpu % 64));
    // SAFETY: the kernel reads the mask.
    let failed =
        unsafe { libc::syscall(libc::SYS_sched_setaffinity, thread, std::mem::size_of_val(&mask), mask.as_ptr()) };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(kept)
}

/// The most that Linux can be built for on any machine of today.
const MAX_CPUS: u32 = 8192;
const MASK_WORDS: usize = MAX_CPUS as usize / 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_stays_where_it_is_put_and_never_leaves_what_it_was_given() {
        let before = affinity(thread_id()).unwrap();
        std::thread::spawn(move || {
            let thread = thread_id();
            let last = *before.last().unwrap();
            assert_eq!(pin(thread, &[last, MAX_CPUS - 1]).unwrap(), [last]);
            assert_eq!(affinity(thread).unwrap(), [last]);
            // What it was kept from before, it does not get by being pinned.
            let others: Vec<u32> = (0..MAX_CPUS).filter(|cpu| *cpu != last).collect();
            assert_eq!(pin(thread, &others).unwrap_err().kind(), io::ErrorKind::NotFound);
            assert_eq!(affinity(thread).unwrap(), [last]);
        })
        .join()
        .unwrap();
    }
}
