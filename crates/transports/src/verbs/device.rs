//! Open devices.

use std::ffi::CStr;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

use super::library::Library;
use super::nic::VerbsNic;
use super::port::Port;
use super::sys::{Context, DeviceAttr, Pd};
use super::VerbsSettings;
use crate::rdma::{cannot_open, kind_of, NicError, Opening, CHANNEL_ADAPTER, IWARP_ADAPTER};
use crate::sys::{close_in_children, fork_generation, set_nonblocking};

/// An open device with a protection domain: what registers memory.
pub struct VerbsDomain {
    pub(super) library: Library,
    pub(super) context: *mut Context,
    pub(super) pd: *mut Pd,
    pub(super) name: String,
    pub(super) attributes: DeviceAttr,
    pub(super) relaxed_ordering: bool,
    /// It has said so itself, and nothing brings it back: it would have to be opened again.
    pub(super) is_lost: AtomicBool,
    generation: u32,
}

// SAFETY: libibverbs may be called from any thread; what is exclusive to one, posting and polling, is VerbsNic's.
unsafe impl Send for VerbsDomain {}
// SAFETY: as above.
unsafe impl Sync for VerbsDomain {}

/// Why there is certainly no device on this machine that verbs drives, without opening anything.
pub fn no_device() -> Option<String> {
    why_none(Path::new(CLASS))
}

fn why_none(class: &Path) -> Option<String> {
    let devices = std::fs::read_dir(class).into_iter().flatten().flatten();
    let devices = devices.map(|device| device.file_name().to_string_lossy().into_owned()).collect();
    match adapters(class, devices) {
        Ok(_) => None,
        Err(others) if others.is_empty() => {
            Some("no RDMA device on this host (/sys/class/infiniband is empty)".to_owned())
        }
        Err(others) => Some(format!("no InfiniBand or RoCE adapter on this host; it has {}", listed(&others))),
    }
}

/// Those of the devices that are adapters or may be: others, as EFA's, have no reliable connected queue pairs, and another
/// library drives them. Without one, the devices.
fn adapters(class: &Path, devices: Vec<String>) -> Result<Vec<String>, Vec<String>> {
    let may_be = |device: &String| matches!(kind_of(class, device), None | Some(CHANNEL_ADAPTER | IWARP_ADAPTER));
    let (adapters, others): (Vec<_>, Vec<_>) = devices.into_iter().partition(may_be);
    if adapters.is_empty() {
        return Err(others);
    }
    Ok(adapters)
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
    for nic in &wanted {
        if !names.contains(&nic.device) {
            let device = &nic.device;
            return Err(NicError::Device(format!("there is no NIC {device}; this host has {}", listed(&names))));
        }
        let known = found.iter().map(|(domain, _)| domain).find(|domain| domain.name == nic.device).cloned();
        found.push(open_beside(library, known, nic, settings)?);
    }
    Ok(found)
}

/// Opens a NIC; ports of one device share a domain, and so a registration.
fn open_beside(
    library: Library,
    known: Option<Arc<VerbsDomain>>,
    nic: &Found,
    settings: &VerbsSettings,
) -> Result<Opened, NicError> {
    let domain = known.map_or_else(|| VerbsDomain::open(library, &nic.device, settings), Ok)?;
    let mut ports = domain.ports(nic.port, settings)?;
    Ok(ports.swap_remove(0))
}

/// Opens those of the NICs that can be, in that order; if none can be, the
/// fastest active ports, by name. At most `max_nics`.
pub(super) fn open_near(
    library: Library,
    nics: &[String],
    max_nics: usize,
    settings: &VerbsSettings,
) -> Result<Vec<VerbsNic>, NicError> {
    let names = list(&library).map_err(NicError::or_descriptors)?;
    let names = adapters(Path::new(CLASS), names)
        .map_err(|others| NicError::Device(format!("no InfiniBand or RoCE adapter; there is {}", listed(&others))))?;
    let (mut opening, mut tried) = (Opening::new(max_nics), Vec::new());
    // The system lists devices that a container was not given, or whose user-space driver is missing.
    let near = nics.iter().filter_map(|name| Some((name, parse(name).ok()?)));
    for (name, nic) in near.filter(|(_, nic)| names.contains(&nic.device)) {
        let domain = |open: &VerbsNic| (open.domain.name == nic.device).then(|| Arc::clone(&open.domain));
        let known = opening.nics().iter().find_map(domain);
        opening.add(name, || {
            let (domain, port) = open_beside(library, known, &nic, settings)?;
            VerbsNic::new(domain, port, settings)
        })?;
        tried.push(nic);
    }
    let mut why_not = Vec::new();
    if opening.nics().is_empty() {
        let was_tried = |device: &str, port| tried.iter().any(|nic| nic.device == device && nic.port == port);
        let mut found = Vec::new();
        for name in names.iter().filter(|name| !was_tried(name, 0)) {
            let Some(domain) = opening.keep(name, VerbsDomain::open(library, name, settings))? else { continue };
            match domain.ports(0, settings) {
                Ok(ports) => found.extend(ports),
                Err(error) => why_not.push(error.to_string()),
            }
        }
        found.retain(|(domain, port)| !was_tried(&domain.name, port.number));
        let found = found.into_iter().map(|(domain, port)| (port.gbps, domain.name.clone(), (domain, port))).collect();
        opening.add_fastest(found, |(domain, port)| VerbsNic::new(domain, port, settings))?;
    }
    opening.finish(|| NicError::Device(why_not.join("; ")))
}

fn parse(name: &str) -> Result<Found, NicError> {
    let (device, port) = name.split_once(':').unwrap_or((name, "0"));
    let port = port.parse().map_err(|_| NicError::Device(format!("{name:?} is no NIC: expected \"name:port\"")))?;
    Ok(Found { device: device.to_owned(), port })
}

pub(super) fn listed(names: &[String]) -> String {
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
                return Err(NicError::Device(cannot_open(name, &error)));
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
        let relaxed_ordering = settings.relaxed_ordering;
        let generation = fork_generation();
        let (name, is_lost) = (name.to_owned(), AtomicBool::new(false));
        let this = Self { library, context, pd, name, attributes, relaxed_ordering, is_lost, generation };
        set_nonblocking(this.announcements());
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

impl std::fmt::Debug for VerbsDomain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerbsDomain").field("name", &self.name).finish_non_exhaustive()
    }
}

/// RDMA devices, as the system has them.
const CLASS: &str = "/sys/class/infiniband";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_library_drives_is_left_to_it() {
        let class = std::env::temp_dir().join(format!("anyfabric-adapters-{}", std::process::id()));
        assert!(why_none(&class).unwrap().contains("is empty"));
        let add = |device: &str, kind: Option<&str>| {
            std::fs::create_dir_all(class.join(device)).unwrap();
            kind.into_iter().for_each(|kind| std::fs::write(class.join(device).join("node_type"), kind).unwrap());
        };
        add("rdmap16s27", Some("7: unspecified\n"));
        let why = "no InfiniBand or RoCE adapter on this host; it has rdmap16s27";
        assert_eq!(why_none(&class).as_deref(), Some(why));
        add("mlx5_0", Some("1: CA\n"));
        add("iwarp0", Some("4: RNIC\n"));
        add("unknown", None);
        assert_eq!(why_none(&class), None);
        let devices = ["iwarp0", "mlx5_0", "rdmap16s27", "unknown", "not_there"].map(str::to_owned).to_vec();
        assert_eq!(adapters(&class, devices).unwrap(), ["iwarp0", "mlx5_0", "unknown", "not_there"]);
        std::fs::remove_dir_all(class).unwrap();
    }
}
