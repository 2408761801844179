//! Pure decisions: which bytes go where, over which NIC, and what they count.
//!
//! No I/O, no clock, no thread, no memory but what is passed in: everything
//! here is a function and is tested as one.

mod choose;
mod extents;
mod pages;
mod rails;
mod rota;
mod shards;
mod topology;

pub use choose::{choose, Candidate, Choice};
pub use extents::{Extent, Extents, PageLists};
pub use pages::{PageError, PageList};
pub use rails::{join_nics, RailPlan, MAX_NICS};
pub use rota::{Rota, Speeds};
pub use shards::{num_shards, quarters, shard_bytes, shard_pages, Shard, Shards, MAX_SHARDS};
pub use topology::{Core, Device, Distance, Fabric, Gpu, Group, NicPort, Place, Request, Topology};
