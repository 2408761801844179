//! What an engine says of itself: paths, transports, regions.

use std::net::{IpAddr, SocketAddr};

use anyfabric_transports::Backing;
use anyfabric_wire::handshake::Host;
use anyfabric_wire::{Address, NicLibrary};
use serde::Serialize;

use crate::gpu::{known_gpus, GpuAbout};
use crate::inner::Inner;
use crate::peer::{Peer, Phase};
use crate::placement::WorkerInfo;
use crate::rails::{name_of, Groups};
use crate::topology::GroupInfo;
use crate::{Config, Engine};

/// Which way to a peer.
#[derive(Debug, Clone, Serialize)]
pub struct PathInfo {
    /// Name of the transport, `"none"` when there is no path.
    pub transport: String,
    /// What carries its bytes and how, for people, as one entry; none without a path.
    pub nics: Vec<String>,
    /// `new`, `connecting`, `ready`, `degraded` or `lost`.
    pub state: String,
    /// Why no faster transport is used, or what is wrong.
    pub reason: String,
}

/// What an engine has.
#[derive(Debug, Clone, Serialize)]
pub struct EngineInfo {
    /// Printed address.
    pub address: String,
    /// Its incarnation.
    pub incarnation: String,
    /// Its devices, and what serves each.
    pub devices: Vec<GroupInfo>,
    /// GPUs, once memory of one was registered in this process.
    pub gpus: Vec<GpuAbout>,
    /// Where its worker runs.
    pub worker: WorkerInfo,
    /// Transports, best first.
    pub transports: Vec<TransportInfo>,
    /// Peers that it has talked to.
    pub peers: Vec<PeerInfo>,
    /// Open regions.
    pub regions: Vec<RegionInfo>,
    /// Bytes that a lost or slow writer might still touch.
    pub quarantine: Vec<Quarantined>,
    /// Bounds.
    pub limits: std::collections::BTreeMap<String, u64>,
}

/// One transport.
#[derive(Debug, Clone, Serialize)]
pub struct TransportInfo {
    /// Its name.
    pub name: String,
    /// Whether this engine can use it.
    pub available: bool,
    /// Why not.
    pub reason: Option<String>,
    /// Its NICs.
    pub nics: Vec<NicInfo>,
    /// What it can do, as data: `same_host` is whether it needs both engines on one
    /// host, `foreign_memory` how memory is written that the engine did not allocate.
    pub abilities: std::collections::BTreeMap<String, String>,
}

/// One NIC.
#[derive(Debug, Clone, Serialize)]
pub struct NicInfo {
    /// Its name.
    pub name: String,
    /// `up` or `down`.
    pub state: String,
    /// Link speed in Gbit/s, where known.
    pub gbps: Option<f64>,
}

/// One peer.
#[derive(Debug, Clone, Serialize)]
pub struct PeerInfo {
    /// Printed address.
    pub address: String,
    /// Name of the transport.
    pub transport: String,
    /// As in [`PathInfo`].
    pub state: String,
    /// As in [`PathInfo`].
    pub reason: String,
    /// How the peer's own memory is written on the same host.
    pub foreign_memory: Option<String>,
}

/// One region.
#[derive(Debug, Clone, Serialize)]
pub struct RegionInfo {
    /// Its number.
    pub id: u64,
    /// Its length.
    pub nbytes: u64,
    /// `allocated` or `registered`.
    pub kind: String,
    /// `cpu`, or `cuda:0`.
    pub device: String,
    /// Peers that can write without asking.
    pub granted: usize,
}

/// Bytes that are kept because a writer might still touch them.
#[derive(Debug, Clone, Serialize)]
pub struct Quarantined {
    /// The region's number.
    pub region: u64,
    /// First byte.
    pub offset: u64,
    /// How many.
    pub nbytes: u64,
    /// Who might.
    pub peer: String,
}

impl Engine {
    /// Which way to a peer, and why not a faster one.
    pub fn path(&self, address: &Address) -> PathInfo {
        self.inner.find_peer(address.engine).map_or_else(
            || PathInfo { transport: "none".into(), nics: Vec::new(), state: "new".into(), reason: String::new() },
            |peer| self.inner.path_of(&peer),
        )
    }

    /// What the engine has.
    pub fn info(&self) -> EngineInfo {
        self.inner.info()
    }

    /// Takes the lines for the log, with levels as in Python's logging.
    pub fn take_log(&self) -> Vec<(u8, String)> {
        self.inner.take_log()
    }

    /// Runs `on_log` whenever `take_log` has something new.
    pub fn on_log(&self, on_log: Box<dyn Fn() + Send>) {
        self.inner.on_log(on_log);
    }
}

impl Inner {
    fn path_of(&self, peer: &Peer) -> PathInfo {
        let (phase, reason) = {
            let state = peer.state();
            (state.phase, state.reason.clone())
        };
        let nics = peer.link().map_or_else(Vec::new, |link| vec![link.manner()]);
        let degraded = peer.link().is_some_and(|link| link.is_degraded());
        let state = match phase {
            Phase::Idle => "new",
            Phase::Calling | Phase::Expecting { .. } | Phase::Joining { .. } => "connecting",
            Phase::Broken { .. } => "degraded",
            Phase::Up if degraded || peer.link().is_none() => "degraded",
            Phase::Up => "ready",
            Phase::Lost => "lost",
        };
        let reason = peer.lost().map_or(reason, ToString::to_string);
        let transport = peer.link().map_or("none", |link| link.transport()).to_owned();
        PathInfo { transport, nics, state: state.into(), reason }
    }

    fn info(&self) -> EngineInfo {
        let peers = self.peers();
        let regions = self.regions.all();
        let mut quarantine = Vec::new();
        for region in regions.iter().chain(&self.revokes.quarantined()) {
            for idx in region.granted_to() {
                let Some(peer) = self.peer(idx) else { continue };
                if region.owed_by().contains(&idx) || peer.lost().is_some() {
                    let (region, nbytes) = (region.id, region.nbytes());
                    quarantine.push(Quarantined { region, offset: 0, nbytes, peer: peer.address.to_string() });
                }
            }
        }
        let limits = [
            ("queue_depth", self.config.queue_depth as u64),
            ("max_message_bytes", self.config.max_message_bytes.into()),
            ("early_imms", crate::early::MAX_EARLY_OF_ALL as u64),
            ("early_imms_per_peer", crate::early::MAX_EARLY.into()),
            ("tcp_streams", self.config.tcp_streams as u64),
        ];
        EngineInfo {
            address: self.address.to_string(),
            incarnation: self.address.engine.to_string(),
            devices: match self.simulated {
                Some(_) => Vec::new(),
                None => self.groups.placement(&self.config).devices.clone(),
            },
            gpus: known_gpus(self.config.cuda_library.as_deref()),
            worker: self.worker_info(),
            transports: transports(&self.config, &self.groups),
            peers: peers.iter().map(|peer| self.peer_info(peer)).collect(),
            regions: regions
                .iter()
                .map(|region| RegionInfo {
                    id: region.id,
                    nbytes: region.nbytes(),
                    kind: match region.backing() {
                        Backing::Memfd { .. } => "allocated".into(),
                        Backing::Foreign { .. } | Backing::Gpu { .. } => "registered".into(),
                    },
                    device: region.gpu_memory().map_or_else(|| "cpu".into(), |memory| memory.gpu().label()),
                    granted: region.granted_to().len(),
                })
                .collect(),
            quarantine,
            limits: limits.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        }
    }

    fn peer_info(&self, peer: &Peer) -> PeerInfo {
        let PathInfo { transport, state, reason, .. } = self.path_of(peer);
        let foreign_memory =
            peer.shm().map(|shm| if shm.writes_foreign { "process_vm_writev".into() } else { "bounce".into() });
        PeerInfo { address: peer.address.to_string(), transport, state, reason, foreign_memory }
    }
}

/// Where a listener is reached: what it is bound to, or every address of this
/// machine when it is bound to all.
pub(crate) fn reachable(bound: SocketAddr) -> Vec<SocketAddr> {
    if !bound.ip().is_unspecified() {
        return vec![bound];
    }
    let mut sockets: Vec<SocketAddr> = interface_addresses()
        .into_iter()
        .filter(|ip| !ip.is_loopback() && (bound.is_ipv6() || ip.is_ipv4()))
        .map(|ip| SocketAddr::new(ip, bound.port()))
        .collect();
    sockets.truncate(Address::MAX_SOCKETS - 1);
    // Last: other hosts would reach themselves by it, and find another engine or none.
    sockets.push(SocketAddr::new([127, 0, 0, 1].into(), bound.port()));
    sockets
}

/// This machine, for the question whether two engines share one.
pub(crate) fn this_host() -> Host {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let mut boot_id = [0; 16];
    let digits: String = read("/proc/sys/kernel/random/boot_id").chars().filter(char::is_ascii_hexdigit).collect();
    for (byte, pair) in boot_id.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
        *byte = std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok()).unwrap_or(0);
    }
    let name: String = read("/proc/sys/kernel/hostname").trim().chars().take(64).collect();
    Host { boot_id, pid: std::process::id(), name }
}

fn interface_addresses() -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: getifaddrs fills `list`, which is walked while it lives and freed once.
    unsafe {
        if libc::getifaddrs(&raw mut list) != 0 {
            return addresses;
        }
        let mut at = list;
        while let Some(entry) = at.as_ref() {
            at = entry.ifa_next;
            let up = entry.ifa_flags & libc::IFF_UP as u32 != 0;
            match entry.ifa_addr.as_ref() {
                Some(address) if up && i32::from(address.sa_family) == libc::AF_INET => {
                    let address = &*entry.ifa_addr.cast::<libc::sockaddr_in>();
                    addresses.push(IpAddr::from(address.sin_addr.s_addr.to_ne_bytes()));
                }
                Some(address) if up && i32::from(address.sa_family) == libc::AF_INET6 => {
                    let address = &*entry.ifa_addr.cast::<libc::sockaddr_in6>();
                    let ip = std::net::Ipv6Addr::from(address.sin6_addr.s6_addr);
                    // Link-local addresses need a scope that the other side does not know.
                    if !ip.is_unicast_link_local() {
                        addresses.push(IpAddr::from(ip));
                    }
                }
                _ => {}
            }
        }
        libc::freeifaddrs(list);
    }
    addresses
}

fn transports(config: &Config, groups: &Groups) -> Vec<TransportInfo> {
    let enabled = |name: &str| config.transports.iter().any(|enabled| enabled == name);
    let reason = |name: &str| match &config.require {
        Some(required) if required != name => Some(format!("{required} is required")),
        _ => (!enabled(name)).then(|| "not enabled by `transports`".to_owned()),
    };
    let up = |name: &str| NicInfo { name: name.to_owned(), state: "up".into(), gbps: None };
    let abilities =
        |list: &[(&str, &str)]| list.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    let streams: Vec<NicInfo> = (1..=config.tcp_streams).map(|idx| up(&format!("stream{idx}"))).collect();
    let foreign = if config.isolate { "bounce" } else { "process_vm_writev, bounce where it is not allowed" };
    let absent = |name: &str, reason: &str| TransportInfo {
        name: name.into(),
        available: false,
        reason: Some(reason.into()),
        nics: Vec::new(),
        abilities: abilities(&[]),
    };
    vec![
        absent("nvlink", "not in this build"),
        TransportInfo {
            name: "shm".into(),
            available: reason("shm").is_none(),
            reason: reason("shm"),
            nics: vec![up("memory")],
            abilities: abilities(&[("foreign_memory", foreign), ("same_host", "true")]),
        },
        rails(NicLibrary::Verbs, config, groups, reason("verbs")),
        rails(NicLibrary::Libfabric, config, groups, reason("libfabric")),
        TransportInfo {
            name: "tcp".into(),
            available: reason("tcp").is_none(),
            reason: reason("tcp"),
            nics: streams,
            abilities: abilities(&[("same_host", "false"), ("encrypted", "false")]),
        },
    ]
}

fn rails(library: NicLibrary, config: &Config, groups: &Groups, excluded: Option<String>) -> TransportInfo {
    let reason = excluded.or_else(|| groups.obstacle(library, config));
    let group = groups.opened().find(|group| group.library() == library);
    let nics = group.map_or_else(Vec::new, |group| {
        group
            .nics()
            .iter()
            .map(|nic| NicInfo {
                name: format!("{} ({})", nic.name, nic.manner),
                state: "up".into(),
                gbps: Some(nic.gbps.into()),
            })
            .collect()
    });
    let abilities = [("same_host", "false"), ("encrypted", "false")];
    let abilities = abilities.map(|(name, value)| (name.to_owned(), value.to_owned())).into_iter().collect();
    TransportInfo { name: name_of(library).into(), available: reason.is_none(), reason, nics, abilities }
}
