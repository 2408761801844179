//! Ways from one engine to another, behind one trait.
//!
//! A [`Link`] carries one engine's operations to one peer. It is given
//! operations that have been checked ([`Op`]), ends their [`Ticket`]s, and
//! reports what arrives to a [`Sink`]. It knows nothing of counters, heartbeats
//! or addresses: that is the engine's.
//!
//! `shm` and `tcp` are built in; `verbs` and `libfabric` open a library at run
//! time, and share everything above it ([`rdma`]); `loopback` simulates a fabric
//! inside one process from a seed.

mod binding;
mod clock;
mod controls;
mod copy;
mod doorbell;
mod leg;
pub mod libfabric;
mod link;
mod lock;
pub mod loopback;
pub mod mutant;
pub mod rdma;
mod recipients;
mod region;
pub mod shm;
mod splits;
mod stats;
mod sync;
pub mod sys;
pub mod tcp;
mod ticket;
pub mod verbs;

pub(crate) use binding::BindingTable;
pub use binding::{Binding, BindingState, Target};
pub use clock::Clock;
pub use copy::{copy, copy_large, NON_TEMPORAL_BYTES};
pub use doorbell::{Blocked, Doorbell};
pub(crate) use leg::Stub;
pub use leg::{Leg, Spread};
pub use link::{ControlPath, Inline, Link, Loss, Losses, Op, Payload, Place, Sink};
#[cfg(debug_assertions)]
pub use lock::num_locks;
pub use lock::{lock, read, try_lock, write};
pub use recipients::Recipients;
pub use region::{Backing, PeerIdx, Region, RegionTable};
pub(crate) use splits::Splits;
pub use stats::{Histogram, NicStats, OperationStats, PeerStats};
pub use ticket::{Failure, Terms, Ticket, TicketOffice, TicketState};
