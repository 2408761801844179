//! The limit of locked memory, for tests of every library.

/// How many bytes may be locked from now on; returns how many might be before.
pub(crate) fn lock_at_most(nbytes: libc::rlim_t) -> libc::rlim_t {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structures live through the calls.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit), 0);
        let wanted = libc::rlimit { rlim_cur: nbytes, ..limit };
        assert_eq!(libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const wanted), 0);
    }
    limit.rlim_cur
}
