//! Memory whose bytes repeat: the same pages are mapped one behind the other, so that 4 GiB cost 40 MiB.

use anyfabric_engine::transports::sys::{memfd, Mapping};
use std::os::fd::AsRawFd;

/// After so many bytes the memory begins again: whole pages, and 4 GiB are no multiple of it, so that an offset cut
/// to 32 bits shows.
pub(crate) const PERIOD: u64 = (40 << 20) + (12 << 10);

/// A range of addresses that shows the same [`PERIOD`] bytes over and over.
pub(crate) struct Alias {
    mapping: Mapping,
}

impl Alias {
    pub(crate) fn new(nbytes: u64) -> Self {
        let fd = memfd(c"conformance-alias", PERIOD as usize).expect("memory");
        let mapping = Mapping::anonymous(nbytes as usize).expect("addresses");
        for start in (0..nbytes).step_by(PERIOD as usize) {
            let len = PERIOD.min(nbytes - start) as usize;
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            // SAFETY: replaces a part of our own mapping, which nobody uses yet.
            let mapped = unsafe {
                let at = mapping.as_ptr().add(start as usize).cast();
                libc::mmap(at, len, libc::PROT_READ | libc::PROT_WRITE, flags, fd.as_raw_fd(), 0)
            };
            assert_ne!(mapped, libc::MAP_FAILED, "a mapping");
        }
        Self { mapping }
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }
}
