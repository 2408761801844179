//! `shm`: processes of one host, host memory.
//!
//! Memory that the engine allocated is a memfd that peers map; a write is a
//! copy by the writer. Other memory is written with process_vm_writev where
//! the kernel allows it, through a mapped bounce area where it does not.
//! Immediates, messages and bounced bytes go through one [`ring`] per sending
//! process; file descriptors and kicks through a Unix socket.

mod incoming;
mod link;
mod local;
mod outgoing;
mod pulse;
pub mod ring;
mod walk;
mod witness;

pub use link::{ShmLink, ShmOptions};
pub use local::{ring_memory, LocalChannel};
pub use pulse::Pulse;
