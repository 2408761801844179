//! The lock-free files of the product, under a model checker.
//!
//! The files are the product's own, taken by `#[path]`: they have their atomics
//! and locks from `crate::sync`, which is std's there and [loom]'s here. A model
//! in [`models`] runs a few threads through them in every order that the memory
//! model allows, on whatever processor, and states what must hold in each.
//!
//! That it would notice is tested too: every ordering that a file asks for is
//! weakened in turn, and some model of the file has to fail ([`check`]). Of the file that
//! waits, which calls what is not modelled, some of these calls are left out likewise
//! (`engine`).
//!
//! What loom leaves out: values out of thin air, and a load that sees a store of
//! its own future.

// Of the product's files only what the models call is used.
#![allow(dead_code, unexpected_cfgs, unreachable_pub)]

extern crate self as anyfabric_transports;

pub mod check;
mod engine;
pub mod models;
mod stand_ins;
mod sync;
mod sys;

#[path = "../../transports/src/binding.rs"]
mod binding;
#[path = "../../transports/src/clock.rs"]
mod clock;
#[path = "../../transports/src/doorbell.rs"]
mod doorbell;
#[path = "../../engine/src/error.rs"]
mod error;
#[path = "../../engine/src/fractions.rs"]
mod fractions;
#[path = "../../transports/src/mutant.rs"]
mod mutant;
#[path = "../../transports/src/recipients.rs"]
mod recipients;
#[path = "../../transports/src/shm/ring.rs"]
mod ring;
#[path = "../../transports/src/stats.rs"]
mod stats;
#[path = "../../transports/src/ticket.rs"]
mod ticket;
#[path = "../../engine/src/wait.rs"]
mod wait;
#[path = "../../engine/src/waiters.rs"]
mod waiters;

use binding::{Binding, Target};
use clock::Clock;
use doorbell::{Blocked, Doorbell};
use engine::Polling;
use error::{Code, Error, Result};
use recipients::Recipients;
use stand_ins::{driver, inner, lock, rdma, try_lock, Losses, PeerIdx, Region};
use stats::OperationStats;
use ticket::{Failure, Terms, Ticket, TicketOffice, TicketState};
