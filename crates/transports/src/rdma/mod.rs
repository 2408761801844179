//! What verbs and libfabric have in common.
//!
//! A [`Nic`] is one port, driven through one library; a *rail* is the
//! connection between one of our NICs and one of a peer's. Everything above is
//! written once: a [`RailGroup`] has the NICs of an engine, and a path over up to
//! eight rails to each peer. Rail `r` joins our NIC `r mod n` and the peer's
//! `r mod m`, so two peers may have different numbers of NICs, and different
//! speeds: large writes are cut over up to four rails by speed, all rails taking
//! turns, and small ones go round (`anyfabric_plan::Rota`).

mod book;
mod cut;
mod group;
mod legs;
mod limbo;
mod link;
mod lone;
mod messages;
mod nic;
mod nodes;
mod opening;
mod post;
mod registrations;
mod roll;
mod setup;
mod slab;
mod turn;
mod visible;

pub use group::{NicGroup, RailGroup};
pub use link::{PathOptions, RailPath, Standing};
pub use nic::{
    Batch, Completions, Domain, Fault, Marks, Nic, NicAbout, NicChoice, NicError, One, PortLook, RailIdx, RemoteMemory,
    MAX_ADDRESS_BYTES,
};
pub(crate) use nodes::{cannot_open, kind_of, open_node, shut_devices, CHANNEL_ADAPTER, IWARP_ADAPTER};
pub(crate) use opening::Opening;
pub use registrations::Registrations;
