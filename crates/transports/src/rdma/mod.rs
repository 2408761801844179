//! What verbs and libfabric have in common.
//!
//! A [`Nic`] is one port, driven through one library; a *rail* is the
//! connection between one of our NICs and one of a peer's.

mod nic;
mod registrations;

pub use nic::{
    Batch, Completions, Domain, Fault, Marks, Nic, NicAbout, NicError, RailIdx, RemoteMemory, MAX_ADDRESS_BYTES,
};
pub use registrations::Registrations;
