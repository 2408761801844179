//! `tcp`: anything with an IP address.
//!
//! A [`TcpLink`] has one to five streams, *lanes*. Lane 0 is the authenticated
//! control connection; it also carries messages and small writes, so that they
//! are never stuck behind large ones in a socket's buffer. Lanes 1 to 4 carry
//! the rest and count as NICs. Everything is framed as [`anyfabric_wire::Frame`]
//! says; payload is read straight into the region it is meant for, after key
//! and bounds were checked; every operation is acknowledged or refused.

mod batch;
mod control;
mod held;
mod joins;
mod lane;
mod limbo;
mod link;
mod receive;
mod send;
mod turns;

pub use lane::Lane;
pub use link::TcpLink;
