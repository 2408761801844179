//! Point-to-point tensor transfers between the processes of an LLM system.
//!
//! ```no_run
//! use anyfabric_engine::{Config, Engine, WriteOptions};
//!
//! # fn main() -> Result<(), anyfabric_engine::Error> {
//! # let received: Vec<u8> = Vec::new();
//! let engine = Engine::new(Config::default())?;
//! let region = engine.allocate(1 << 20)?;
//! let remote = engine.import(&received)?;
//! let transfer = engine.write(&region.slice(0..4096)?, &remote.slice(0..4096)?, WriteOptions::counted(7))?;
//! transfer.wait(None)?;
//! # Ok(())
//! # }
//! ```
//!
//! An [`Engine`] owns a listener, the memory registered with it and the paths
//! to its peers. Nothing is ordered; an immediate is counted after its bytes
//! are visible; every wait has a deadline; a dead peer fails what concerns it
//! and nothing else.

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
pub use anyfabric_wire::{Address, Descriptor, EngineId, Imm, WireImm, VERSION as WIRE_VERSION};
pub use config::{Config, Polling, QueueFull};
pub use connect::PeerGroup;
pub use counter::Counter;
pub use engine::{Engine, WriteOptions};
pub use error::{Code, Context, Error, Result};
pub use gpu::{gpus, GpuAbout};
pub use info::{EngineInfo, PathInfo, Quarantined, RegionInfo, TransportInfo};
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
