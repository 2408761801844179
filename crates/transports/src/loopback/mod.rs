//! A fabric and its clock, simulated inside one process from a seed.
//!
//! Engines that live in a [`Simulation`] share one thread and one clock, which
//! stands still until somebody waits: then the next event comes due, the clock
//! moves to it, and every engine takes its turn. The same seed and the same
//! calls give the same run, event by event.
//!
//! The fabric is as unkind as an RDMA one may be. It is reliable and not in
//! order: every operation is sharded over the sender's NICs, every part has a
//! delay of its own, long parts go in segments, and an immediate is counted
//! when, and only when, all segments of its part are placed. NICs place and
//! acknowledge by themselves, so a stopped engine is written to as before.
//! Engines are killed and stopped, NICs go down and come back, control
//! connections break. Nothing is ever duplicated.

mod endpoint;
mod fabric;
mod faults;
mod link;
mod parts;
mod random;
mod simulation;

pub use endpoint::{Endpoint, Mail, Resident};
pub use fabric::Fabric;
pub use faults::Fault;
pub use link::SimLink;
pub use random::Random;
pub use simulation::Simulation;
