//! Point-to-point tensor transfers between the processes of an LLM system.
//!
//! Two engines, here in one process; a descriptor and an imm travel however you like:
//!
//! ```
//! use std::time::Duration;
//!
//! use anyfabric_engine::{Config, Engine, WriteOptions};
//!
//! # fn main() -> Result<(), anyfabric_engine::Error> {
//! let receiver = Engine::new(Config::default())?;
//! let region = receiver.allocate(1 << 20)?;
//! let counter = receiver.counter(None, &[])?;
//! let (descriptor, imm) = (region.descriptor()?.encode(), counter.imm().value());
//!
//! let sender = Engine::new(Config::default())?;
//! let source = sender.allocate(4096)?;
//! let remote = sender.import(&descriptor)?;
//! sender.write(&source.slice(0..4096)?, &remote.slice(0..4096)?, WriteOptions::counted(imm))?.wait(None)?;
//!
//! counter.wait(1, Some(Duration::from_secs(5)))?;
//! # Ok(())
//! # }
//! ```
//!
//! An [`Engine`] owns a listener, the memory registered with it and the paths
//! to its peers. Nothing is ordered; an immediate is counted after its bytes
//! are visible; every wait has a deadline; a dead peer fails what concerns it
//! and nothing else.

mod arrivals;
mod backoff;
mod base;
mod calls;
mod checks;
mod close;
mod config;
mod connect;
mod control;
mod counter;
mod driver;
mod early;
mod engine;
mod error;
mod events;
mod fractions;
mod gpu;
mod heartbeat;
mod info;
mod inner;
mod join;
mod listeners;
mod meet;
mod messages;
mod peer;
mod peers;
mod placement;
mod rails;
mod region;
mod remote;
mod revoke;
mod scatter;
mod simulated;
mod stats;
mod submission;
mod submit;
mod sync;
mod topology;
mod transfer;
mod under_way;
mod wait;
mod waiters;
mod watcher;

pub use anyfabric_plan::PageList;
pub use anyfabric_transports as transports;
pub use anyfabric_wire::{Address, Descriptor, Device, EngineId, Imm, WireImm, VERSION as WIRE_VERSION};
pub use config::{Config, Polling, QueueFull};
pub use connect::PeerGroup;
pub use counter::Counter;
pub use engine::{Engine, WriteOptions};
pub use error::{Code, Context, Error, Result};
pub use gpu::{gpus, GpuAbout};
pub use info::{EngineInfo, NicInfo, PathInfo, PeerInfo, Quarantined, RegionInfo, TransportInfo};
pub use messages::Message;
pub use placement::WorkerInfo;
pub use region::{Region, Slice};
pub use remote::{Remote, RemoteSlice};
pub use scatter::ScatterTarget;
pub use stats::{EngineStats, LatencyStats, MessageStats, NicUse, PeerUse};
pub use topology::{topology, GpuInfo, GroupInfo, GroupNic, NicPortInfo, TopologyInfo};
pub use transfer::Transfer;
pub use waiters::Waiter;
pub use watcher::{Operation, Watcher};
