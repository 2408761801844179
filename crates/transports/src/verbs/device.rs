//! Open devices, their ports, and memory registered with them.

use std::ffi::{c_int, c_void, CStr};
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::Arc;

use super::sys::{self, Context, DeviceAttr, Gid, GidEntry, Library, Mr, Pd, PortAttr};
use super::VerbsSettings;
use crate::rdma::{Domain, NicError, RemoteMemory};
use crate::sys::{close_in_children, fork_generation};

/// An open device with a protection domain: what registers memory.
pub struct VerbsDomain {
    pub(super) library: Library,
    pub(super) context: *mut Context,
    pub(super) pd: *mut Pd,
    pub(super) name: String,
    pub(super) attributes: DeviceAttr,
    relaxed_ordering: bool,
    generation: u32,
}

// SAFETY: libibverbs may be called from any thread; what is exclusive to one, posting and polling, is VerbsNic's.
unsafe impl Send for VerbsDomain {}
// SAFETY: as above.
unsafe impl Sync for VerbsDomain {}

/// Memory registered with one device.
pub struct VerbsMemory {
    domain: Arc<VerbsDomain>,
    /// Null for no bytes at all.
    mr: *mut Mr,
    pub(super) base: u64,
    pub(super) lkey: u32,
    rkey: u32,
}

// SAFETY: the registration is only read, and ended once.
unsafe impl Send for VerbsMemory {}
// SAFETY: as above.
unsafe impl Sync for VerbsMemory {}

/// A port as it was found, and the GID to use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Port {
    pub(super) number: u8,
    pub(super) lid: u16,
    pub(super) mtu: u8,
    pub(super) max_message: u32,
    pub(super) is_ethernet: bool,
    pub(super) gbps: u32,
    pub(super) gid: Gid,
    pub(super) gid_index: u8,
    pub(super) gid_type: u32,
}

impl Port {
    /// Whether it wraps packets in UDP, as routers know them.
    pub(super) const fn is_roce_v2(&self) -> bool {
        self.is_ethernet && self.gid_type == sys::GID_TYPE_ROCE_V2
    }
}

/// Why there is certainly no device on this machine, without opening anything.
pub fn no_device() -> Option<String> {
    let devices = std::fs::read_dir("/sys/class/infiniband").map(|list| list.count()).unwrap_or(0);
    (devices == 0).then(|| "no RDMA device on this host (/sys/class/infiniband is empty)".to_owned())
}

/// One NIC of the machine: a device and a port of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) device: String,
    pub(super) port: u8,
}

/// A device's domain and one of its active ports.
type Opened = (Arc<VerbsDomain>, Port);

/// Opens the NICs that are named ("mlx5_0": its first active port, "mlx5_0:2"),
/// in that order.
pub(super) fn open_named(library: Library, nics: &[String], settings: &VerbsSettings) -> Result<Vec<Opened>, NicError> {
    let wanted: Vec<Found> = nics.iter().map(|name| parse(name)).collect::<Result<_, _>>()?;
    let names = list(&library)?;
    let mut found: Vec<Opened> = Vec::new();
    for Found { device, port } in &wanted {
        if !names.contains(device) {
            return Err(NicError::Device(format!("there is no NIC {device}; this host has {}", listed(&names))));
        }
        // Ports of one device share a domain, and so a registration.
        let known = found.iter().map(|(domain, _)| domain).find(|domain| domain.name == *device).cloned();
        let domain = known.map_or_else(|| VerbsDomain::open(library, device, settings), Ok)?;
        found.extend(domain.ports(*port, settings)?.into_iter().take(1));
    }
    Ok(found)
}

/// Opens those of the NICs that can be, in that order; if none can be, the
/// fastest active ports, by name. At most `max_nics`.
pub(super) fn open_near(
    library: Library,
    nics: &[String],
    max_nics: usize,
    settings: &VerbsSettings,
) -> Result<Vec<Opened>, NicError> {
    let mut found: Vec<Opened> = Vec::new();
    for name in nics {
        // The system lists devices that a container was not given, or whose user-space driver is missing.
        found.extend(open_named(library, std::slice::from_ref(name), settings).unwrap_or_default());
    }
    if found.is_empty() {
        let mut why_not = Vec::new();
        for name in &list(&library)? {
            match VerbsDomain::open(library, name, settings).and_then(|domain| domain.ports(0, settings)) {
                Ok(ports) => found.extend(ports),
                Err(error) => why_not.push(error.to_string()),
            }
        }
        if found.is_empty() {
            return Err(NicError::Device(why_not.join("; ")));
        }
        let fastest = found.iter().map(|(_, port)| port.gbps).max().unwrap_or(0);
        found.retain(|(_, port)| port.gbps == fastest);
    }
    found.truncate(max_nics);
    Ok(found)
}

fn parse(name: &str) -> Result<Found, NicError> {
    let (device, port) = name.split_once(':').unwrap_or((name, "0"));
    let port = port.parse().map_err(|_| NicError::Device(format!("{name:?} is no NIC: expected \"name:port\"")))?;
    Ok(Found { device: device.to_owned(), port })
}

fn listed(names: &[String]) -> String {
    if names.is_empty() {
        "none".into()
    } else {
        names.join(", ")
    }
}

/// Names of the devices that have a user-space driver.
fn list(library: &Library) -> Result<Vec<String>, NicError> {
    let mut count = 0;
    // SAFETY: fills `count`, and returns a list that is freed below, or null.
    let devices = unsafe { (library.get_device_list)(&raw mut count) };
    let mut names = Vec::new();
    if !devices.is_null() {
        for idx in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: the list has `count` devices, whose names are strings that live as long as the list.
            names.push(unsafe {
                CStr::from_ptr((library.get_device_name)(*devices.add(idx))).to_string_lossy().into_owned()
            });
        }
        // SAFETY: the list that was returned above.
        unsafe { (library.free_device_list)(devices) };
    }
    if names.is_empty() {
        let why = no_device().unwrap_or_else(|| {
            "the kernel has RDMA devices, libibverbs finds none: is a user-space provider missing \
             (ibverbs-providers), or /dev/infiniband in this container?"
                .into()
        });
        return Err(NicError::Device(why));
    }
    names.sort_unstable();
    Ok(names)
}

impl VerbsDomain {
    fn open(library: Library, name: &str, settings: &VerbsSettings) -> Result<Arc<Self>, NicError> {
        let mut count = 0;
        // SAFETY: as in `list`; a device is opened before the list is freed, as the library wants it.
        let context = unsafe {
            let devices = (library.get_device_list)(&raw mut count);
            let mut context = std::ptr::null_mut();
            for idx in 0..usize::try_from(count).unwrap_or(0) {
                let device = *devices.add(idx);
                if CStr::from_ptr((library.get_device_name)(device)).to_bytes() == name.as_bytes() {
                    *libc::__errno_location() = 0;
                    context = (library.open_device)(device);
                    break;
                }
            }
            let error = std::io::Error::last_os_error();
            if !devices.is_null() {
                (library.free_device_list)(devices);
            }
            if context.is_null() {
                return Err(cannot_open(name, &error));
            }
            context
        };
        // SAFETY: plain numbers, all of which may be zero.
        let mut attributes: DeviceAttr = unsafe { std::mem::zeroed() };
        // SAFETY: an open device; fills the attributes.
        let (failed, pd) =
            unsafe { ((library.query_device)(context, &raw mut attributes), (library.alloc_pd)(context)) };
        if failed != 0 || pd.is_null() {
            let error = std::io::Error::last_os_error();
            // SAFETY: opened above, and nobody else has it.
            unsafe {
                if !pd.is_null() {
                    (library.dealloc_pd)(pd);
                }
                (library.close_device)(context);
            }
            return Err(NicError::Device(format!("{name}: cannot be used: {error}")));
        }
        let relaxed_ordering = settings.relaxed_ordering && library.reg_mr_iova2.is_some();
        let generation = fork_generation();
        let this = Self { library, context, pd, name: name.to_owned(), attributes, relaxed_ordering, generation };
        this.descriptors().into_iter().for_each(|fd| close_in_children(fd, true));
        Ok(Arc::new(this))
    }

    /// Whether this process opened it. A forked child must leave its parent's
    /// queues and registrations alone: the kernel would end them for both.
    pub(super) fn is_ours(&self) -> bool {
        self.generation == fork_generation()
    }

    fn descriptors(&self) -> [RawFd; 2] {
        // SAFETY: an open device.
        unsafe { [(*self.context).cmd_fd, (*self.context).async_fd] }
    }

    /// The port asked for, or all with 0, of those that are active.
    fn ports(self: Arc<Self>, asked: u8, settings: &VerbsSettings) -> Result<Vec<(Arc<Self>, Port)>, NicError> {
        let mut active = Vec::new();
        let mut states = Vec::new();
        for number in 1..=self.attributes.phys_port_cnt {
            if asked != 0 && asked != number {
                continue;
            }
            let port = self.query_port(number)?;
            if port.state == sys::PORT_ACTIVE {
                active.push((Arc::clone(&self), self.describe(number, &port, settings)?));
            } else {
                states.push(format!("port {number} is {}", state_name(port.state)));
            }
        }
        if active.is_empty() {
            let states = if states.is_empty() { "it has no such port".into() } else { states.join(", ") };
            return Err(NicError::Device(format!("{}: no active port: {states}", self.name)));
        }
        Ok(active)
    }

    pub(super) fn query_port(&self, number: u8) -> Result<PortAttr, NicError> {
        // SAFETY: plain numbers, all of which may be zero.
        let mut port: PortAttr = unsafe { std::mem::zeroed() };
        // SAFETY: an open device; fills at most what `PortAttr` has.
        let failed = unsafe { (self.library.query_port)(self.context, number, &raw mut port) };
        if failed != 0 {
            let error = std::io::Error::from_raw_os_error(failed);
            return Err(NicError::Device(format!("{}: port {number} cannot be queried: {error}", self.name)));
        }
        Ok(port)
    }

    /// A port as it is now: the network may have given it another LID or GID since
    /// it was last up, and the system moves GIDs in its table.
    pub(super) fn port(&self, number: u8, settings: &VerbsSettings) -> Result<Port, NicError> {
        self.describe(number, &self.query_port(number)?, settings)
    }

    fn describe(&self, number: u8, port: &PortAttr, settings: &VerbsSettings) -> Result<Port, NicError> {
        let is_ethernet = port.link_layer == sys::LINK_LAYER_ETHERNET;
        let gids = self.gids(number, port.gid_tbl_len);
        let chosen = match settings.gid_index {
            Some(index) => gids.iter().find(|gid| gid.gid_index == u32::from(index)),
            None => best_gid(&gids, is_ethernet),
        };
        let Some(gid) = chosen else {
            let given = settings.gid_index.map_or("no GID".into(), |index| format!("no GID at index {index}"));
            let known: Vec<_> = gids.iter().map(|gid| gid.gid_index.to_string()).collect();
            let message = format!("{}: port {number} has {given}; there are: {}", self.name, listed(&known));
            return Err(NicError::Device(message));
        };
        Ok(Port {
            number,
            lid: port.lid,
            mtu: port.active_mtu.clamp(1, 5) as u8,
            max_message: port.max_msg_sz,
            is_ethernet,
            gbps: gbps(port.active_width, port.active_speed),
            gid: gid.gid,
            gid_index: gid.gid_index as u8,
            gid_type: gid.gid_type,
        })
    }

    /// The port's GIDs that are not empty.
    fn gids(&self, port: u8, len: c_int) -> Vec<GidEntry> {
        let len = usize::try_from(len).unwrap_or(0).min(MAX_GIDS);
        if let Some(query) = self.library.query_gid_table {
            let mut entries = vec![GidEntry::default(); MAX_GIDS];
            // SAFETY: an open device; fills at most MAX_GIDS entries of the size given.
            let count =
                unsafe { query(self.context, entries.as_mut_ptr(), MAX_GIDS, 0, std::mem::size_of::<GidEntry>()) };
            if let Ok(count) = usize::try_from(count) {
                entries.truncate(count);
                entries.retain(|entry| entry.port_num == u32::from(port) && entry.gid_index <= u8::MAX.into());
                return entries;
            }
        }
        let mut entries = Vec::new();
        for index in 0..len {
            let mut gid = Gid::default();
            // SAFETY: an open device; fills the GID.
            let failed = unsafe { (self.library.query_gid)(self.context, port, index as c_int, &raw mut gid) };
            if failed == 0 && gid != Gid::default() {
                let path = format!("/sys/class/infiniband/{}/ports/{port}/gid_attrs/types/{index}", self.name);
                let kind = std::fs::read_to_string(Path::new(&path)).unwrap_or_default();
                let gid_type = if kind.trim() == "RoCE v2" { sys::GID_TYPE_ROCE_V2 } else { 0 };
                let (gid_index, port_num) = (index as u32, port.into());
                entries.push(GidEntry { gid, gid_index, port_num, gid_type, ndev_ifindex: 0 });
            }
        }
        entries
    }
}

/// The GID that most networks route: see [`VerbsSettings::gid_index`].
fn best_gid(gids: &[GidEntry], is_ethernet: bool) -> Option<&GidEntry> {
    let rank = |entry: &GidEntry| {
        let raw = &entry.gid.raw;
        let is_v2 = entry.gid_type == sys::GID_TYPE_ROCE_V2;
        let is_ipv4 = raw[..10] == [0; 10] && raw[10..12] == [0xff; 2];
        let is_link_local = raw[..2] == [0xfe, 0x80];
        match (is_ethernet, is_v2) {
            // InfiniBand: the first is the port's own.
            (false, _) => 0,
            (true, true) if is_ipv4 => 0,
            (true, true) if !is_link_local => 1,
            (true, true) => 2,
            (true, false) if is_ipv4 => 3,
            (true, false) if !is_link_local => 4,
            (true, false) => 5,
        }
    };
    gids.iter().min_by_key(|entry| (rank(entry), entry.gid_index))
}

/// Link speed from the codes of the InfiniBand specification; at least 1.
const fn gbps(width: u8, speed: u8) -> u32 {
    let lanes = match width {
        2 => 4,
        4 => 8,
        8 => 12,
        16 => 2,
        _ => 1,
    };
    // In tenths, for the slow ones.
    let lane = match speed {
        2 => 50,
        4 | 8 => 100,
        16 => 140,
        32 => 250,
        64 => 500,
        128 => 1000,
        _ => 25,
    };
    let gbps = lanes * lane / 10;
    if gbps == 0 {
        1
    } else {
        gbps
    }
}

const fn state_name(state: u32) -> &'static str {
    match state {
        1 => "down",
        2 => "initialising (is a subnet manager running?)",
        3 => "armed",
        5 => "active, deferred",
        _ => "in an unknown state",
    }
}

fn cannot_open(name: &str, error: &std::io::Error) -> NicError {
    let hint = match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => {
            ": this user may not open /dev/infiniband/uverbs*; add it to the group that owns them (often `rdma`)"
        }
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            ": is /dev/infiniband in this container (--device=/dev/infiniband), and ib_uverbs loaded?"
        }
        _ => "",
    };
    NicError::Device(format!("{name} cannot be opened: {error}{hint}"))
}

impl Drop for VerbsDomain {
    fn drop(&mut self) {
        if !self.is_ours() {
            return;
        }
        self.descriptors().into_iter().for_each(|fd| close_in_children(fd, false));
        // SAFETY: every registration and queue keeps the domain alive, so nothing uses either any more.
        unsafe {
            (self.library.dealloc_pd)(self.pd);
            (self.library.close_device)(self.context);
        }
    }
}

impl Domain for VerbsDomain {
    type Memory = VerbsMemory;

    unsafe fn register(
        self: &Arc<Self>,
        address: *mut u8,
        nbytes: u64,
        writable: bool,
    ) -> Result<VerbsMemory, NicError> {
        let base = address as u64;
        if nbytes == 0 {
            let mr = std::ptr::null_mut();
            return Ok(VerbsMemory { domain: Arc::clone(self), mr, base, lkey: 0, rkey: 0 });
        }
        let access = if writable { sys::ACCESS_LOCAL_WRITE | sys::ACCESS_REMOTE_WRITE } else { 0 };
        let len = usize::try_from(nbytes).map_err(|_| NicError::Device(format!("{nbytes} bytes are too many")))?;
        let relaxed = self.library.reg_mr_iova2.filter(|_| self.relaxed_ordering);
        // SAFETY: the caller vouches for the memory; the domain is open. A device that knows no relaxed ordering
        // ignores the flag, an old kernel refuses it, and then it is left out.
        let mr = unsafe {
            let mut mr = relaxed.map_or(std::ptr::null_mut(), |register| {
                register(self.pd, address.cast::<c_void>(), len, base, (access | sys::ACCESS_RELAXED_ORDERING) as u32)
            });
            if mr.is_null() {
                mr = (self.library.reg_mr)(self.pd, address.cast::<c_void>(), len, access);
            }
            mr
        };
        if mr.is_null() {
            return Err(self.cannot_register(nbytes, &std::io::Error::last_os_error()));
        }
        // SAFETY: just returned, so it points to a registration.
        let (lkey, rkey) = unsafe { ((*mr).lkey, (*mr).rkey) };
        Ok(VerbsMemory { domain: Arc::clone(self), mr, base, lkey, rkey })
    }

    fn remote(memory: &VerbsMemory) -> RemoteMemory {
        RemoteMemory { base: memory.base, key: memory.rkey.into() }
    }
}

impl VerbsDomain {
    /// Registers memory of another device: `nbytes` of a dmabuf from `offset`,
    /// which peers address from `base`.
    ///
    /// # Errors
    /// When the library, the kernel or the device knows nothing of dmabuf.
    pub fn register_dmabuf(
        self: &Arc<Self>,
        fd: RawFd,
        (offset, nbytes): (u64, usize),
        base: u64,
    ) -> Result<VerbsMemory, NicError> {
        let Some(register) = self.library.reg_dmabuf_mr else {
            return Err(NicError::Library("libibverbs has no ibv_reg_dmabuf_mr: it is older than rdma-core 34".into()));
        };
        let access = sys::ACCESS_LOCAL_WRITE | sys::ACCESS_REMOTE_WRITE;
        // SAFETY: the domain is open; the kernel checks the descriptor and takes a reference of its own.
        let mr = unsafe { register(self.pd, offset, nbytes, base, fd, access) };
        if mr.is_null() {
            return Err(self.cannot_register(nbytes as u64, &std::io::Error::last_os_error()));
        }
        // SAFETY: just returned, so it points to a registration.
        let (lkey, rkey) = unsafe { ((*mr).lkey, (*mr).rkey) };
        Ok(VerbsMemory { domain: Arc::clone(self), mr, base, lkey, rkey })
    }

    fn cannot_register(&self, nbytes: u64, error: &std::io::Error) -> NicError {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: fills the limit.
        let known = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } == 0;
        if error.raw_os_error() == Some(libc::ENOMEM) && known && limit.rlim_cur != libc::RLIM_INFINITY {
            return NicError::LockedMemory { nic: self.name.clone(), nbytes, limit: limit.rlim_cur };
        }
        NicError::Device(format!("{}: {nbytes} bytes cannot be registered: {error}", self.name))
    }
}

impl Drop for VerbsMemory {
    fn drop(&mut self) {
        if !self.mr.is_null() && self.domain.is_ours() {
            // SAFETY: registered in `register`, and dropped once.
            unsafe { (self.domain.library.dereg_mr)(self.mr) };
        }
    }
}

impl std::fmt::Debug for VerbsDomain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerbsDomain").field("name", &self.name).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for VerbsMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerbsMemory").field("base", &self.base).finish_non_exhaustive()
    }
}

/// GIDs of one device that are looked at.
const MAX_GIDS: usize = 256;
