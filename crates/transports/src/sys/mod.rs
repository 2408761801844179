//! The few Linux calls that the standard library does not offer, made safe; and what Linux says of the machine.

mod affinity;
mod fd;
mod futex;
mod memory;
mod poll;
mod process;
mod socket;
mod topology;

pub use affinity::{affinity, pin, thread_id};
pub(crate) use fd::{are_descriptors_left, close_in_children, set_nonblocking};
pub use fd::{fork_generation, Fd};
pub use futex::{futex_wait, futex_wake_all};
pub use memory::check_memfd;
pub use memory::{memfd, populate, Mapping};
pub use poll::{is_readable_within, EventFd, Interest, Poller, Ready};
pub use process::{foreign_read, foreign_write, pid_fd, Foreign, ForeignWrite};
pub use socket::{
    abstract_listener, accept, connect_local, peer_credentials, receive_with_fds, send_with_fds, Credentials, BACKLOG,
};
pub(crate) use topology::port_gbps;
pub use topology::{allowed_cpus, parse_cpu_list, read_topology};

use std::io;

/// Most ranges that a system call takes at once.
pub const IOV_MAX: usize = libc::UIO_MAXIOV as usize;

/// Turns the `-1` of a system call into its error.
pub(crate) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// As [`check`], for calls that return a length.
pub(crate) fn check_len(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
