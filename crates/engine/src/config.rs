//! Settings of an engine.

use std::path::PathBuf;
use std::time::Duration;

use anyfabric_transports::libfabric::FabricSettings;
use anyfabric_transports::tcp::TcpLink;
use anyfabric_transports::verbs::VerbsSettings;

use crate::{Error, Result};

/// How threads wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Polling {
    /// Spin briefly, then block: two processes on two cores do not starve
    /// each other.
    #[default]
    Adaptive,
    /// Never block; for dedicated cores.
    Busy,
}

/// What a submission to a full queue does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QueueFull {
    /// Block until there is room or the deadline passes.
    #[default]
    Block,
    /// Fail at once.
    Raise,
}

/// Settings of an engine.
#[derive(Clone)]
pub struct Config {
    /// Transports to use, of `shm`, `verbs`, `libfabric` and `tcp`.
    pub transports: Vec<String>,
    /// Refuse every other transport than this one.
    pub require: Option<String>,
    /// Both sides of a connection must prove that they hold it; not empty.
    pub secret: Option<Vec<u8>>,
    /// `HOST:PORT` of the control listener; port 0 lets the kernel choose.
    pub listen: String,
    /// Devices whose memory the engine moves, near which it takes NICs: "cpu:0" (host
    /// memory of NUMA node 0), "cuda:0", "gpu:0000:53:00.0". When empty, the host
    /// memory of the node on which the NICs are opened.
    pub devices: Vec<String>,
    /// NICs to use, 8 at most: "mlx5_0", "mlx5_0:2", "rdmap16s27"; those near the
    /// devices when empty, and where no place is known the fastest active ports.
    pub nics: Vec<String>,
    /// NICs of each device, 1 to 8; when `None` those nearest, divided among the GPUs
    /// that are as near, 4 at most, which is what one operation uses. An engine takes
    /// 8 at most, its devices taking turns.
    pub nics_per_device: Option<usize>,
    /// Whether the worker stays on cores near the NICs, once there are any.
    pub pin_worker: bool,
    /// Below which `sys` and `proc` describe the machine; tests put a recorded one
    /// there.
    pub machine: PathBuf,
    /// Of the verbs transport.
    pub verbs: VerbsSettings,
    /// Of the libfabric transport.
    pub libfabric: FabricSettings,
    /// Path of libcuda; the driver's own when `None`. Opened when the first GPU
    /// memory is registered.
    pub cuda_library: Option<String>,
    /// Data streams per tcp peer, 1 to 4.
    pub tcp_streams: usize,
    /// How threads wait.
    pub polling: Polling,
    /// Neither use nor allow process_vm_writev.
    pub isolate: bool,
    /// Between heartbeats to a peer.
    pub heartbeat: Duration,
    /// Heartbeats missed in a row after which a peer is lost.
    pub heartbeats_lost: u32,
    /// Deadline of a submission that names none.
    pub timeout: Duration,
    /// Operations under way at most; a connect counts as none.
    pub queue_depth: usize,
    /// What a submission to a full queue does.
    pub queue_full: QueueFull,
    /// Largest message, at most [`Config::MAX_MESSAGE_BYTES`].
    pub max_message_bytes: u32,
}

impl Config {
    /// Largest value of `max_message_bytes`.
    pub const MAX_MESSAGE_BYTES: u32 = 1 << 20;

    /// Most NICs of an engine, and of a device.
    pub const MAX_NICS: usize = anyfabric_plan::MAX_NICS;

    /// Whether every value is in its range.
    ///
    /// # Errors
    /// `InvalidArgument` names the value and what was expected.
    pub(crate) fn validate(&self) -> Result<()> {
        let fail = |message: String| Err(Error::invalid(message).during("start"));
        for name in self.transports.iter().chain(&self.require) {
            if !TRANSPORTS.contains(&name.as_str()) {
                return fail(format!("unknown transport {name:?}; this build has {}", TRANSPORTS.join(", ")));
            }
        }
        if self.transports.is_empty() {
            return fail("no transport is left; give at least one of ".to_owned() + &TRANSPORTS.join(", "));
        }
        if let Some(required) = &self.require {
            if !self.transports.contains(required) {
                return fail(format!("`require` is {required:?}, but `transports` are {:?}", self.transports));
            }
        }
        if self.secret.as_ref().is_some_and(Vec::is_empty) {
            return fail("the secret is empty; give none, or one of some bytes".into());
        }
        if !(1..=TcpLink::MAX_STREAMS).contains(&self.tcp_streams) {
            return fail(format!("tcp_streams is {}, expected 1 to {}", self.tcp_streams, TcpLink::MAX_STREAMS));
        }
        let num_nics = self.nics.len().max(self.nics_per_device.unwrap_or(1));
        if num_nics > Self::MAX_NICS || self.nics_per_device == Some(0) {
            let more = "every peer costs a connection for each; for more open an engine for each device";
            return fail(format!("{num_nics} NICs are given, expected 1 to {}: {more}", Self::MAX_NICS));
        }
        if let Some(fault) = self.verbs.fault().or_else(|| self.libfabric.fault()) {
            return fail(fault);
        }
        if self.queue_depth == 0 {
            return fail("queue_depth is 0, expected 1 or more".into());
        }
        if self.heartbeats_lost == 0 {
            return fail("heartbeats_lost is 0, expected 1 or more".into());
        }
        if self.heartbeat.is_zero() {
            return fail("heartbeat is 0 s, expected more".into());
        }
        if self.max_message_bytes > Config::MAX_MESSAGE_BYTES {
            let limit = Config::MAX_MESSAGE_BYTES;
            return fail(format!("max_message_bytes is {}, at most {limit}", self.max_message_bytes));
        }
        Ok(())
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            transports: TRANSPORTS.map(str::to_owned).to_vec(),
            require: None,
            secret: None,
            listen: "127.0.0.1:0".into(),
            devices: Vec::new(),
            nics: Vec::new(),
            nics_per_device: None,
            pin_worker: true,
            machine: "/".into(),
            verbs: VerbsSettings::default(),
            libfabric: FabricSettings::default(),
            cuda_library: None,
            tcp_streams: 2,
            polling: Polling::Adaptive,
            isolate: false,
            heartbeat: Duration::from_secs(1),
            heartbeats_lost: 3,
            timeout: Duration::from_secs(30),
            queue_depth: 1024,
            queue_full: QueueFull::Block,
            max_message_bytes: 1 << 16,
        }
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the secret.
        f.debug_struct("Config")
            .field("transports", &self.transports)
            .field("listen", &self.listen)
            .field("secret", &self.secret.as_ref().map(|_| "(set)"))
            .finish_non_exhaustive()
    }
}

/// Transports between processes, fastest first.
pub(crate) const TRANSPORTS: [&str; 4] = ["shm", "verbs", "libfabric", "tcp"];
