//! The NICs that libfabric can drive for us, and which of its providers does.

use std::cmp::Reverse;
use std::ffi::{c_int, CString};
use std::fmt;
use std::net::IpAddr;
use std::path::Path;

use anyfabric_cuda::Driver;

use super::library::{text_of, FabricError, Info, Library};
use super::quirks::Quirks;
use super::sys::*;
use crate::rdma::{open_node, shut_devices};

/// Which NICs are wanted.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Only this provider, which may then be a software one; `None` for every
    /// provider of a NIC.
    pub provider: Option<String>,
    /// Only this NIC: the name of its domain or its device, or an IP address of it.
    pub nic: Option<String>,
}

/// One NIC through one provider.
pub struct Provider {
    info: Info,
    quirks: &'static Quirks,
    /// As the system calls the NIC.
    device_name: String,
    /// "efa", "tcp;ofi_rxm".
    pub name: String,
    /// "efa-direct", "192.168.0.0/16".
    pub fabric: String,
    /// The NIC: "rdmap16s27-rdm", "eth0".
    pub nic: String,
    /// How immediates arrive.
    pub arrivals: Arrivals,
    /// Whether it takes GPU memory: the library knows CUDA, and the process used it
    /// when the NIC was opened.
    pub reaches_gpus: bool,
    /// Where the NIC sits, "0000:10:1b.0"; `None` for a software path.
    pub pci: Option<String>,
    /// Link speed; 0 where the provider does not say.
    pub gbps: u32,
}

/// How a receiver learns what was written, and by whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrivals {
    /// With the write: eight bytes, which name the sender too.
    Tagged,
    /// With the write: four bytes; the provider names the sender.
    Sourced,
    /// Not with the write: in a small message, sent when it has completed.
    Messages,
}

impl Provider {
    /// Every NIC that fits, hardware and the provider's favourites first.
    ///
    /// # Errors
    /// [`FabricError::NoProvider`] when none does, with what there is instead.
    pub fn all(library: &'static Library, wanted: &Wanted) -> Result<Vec<Self>, FabricError> {
        let mut nics = Self::find(library, wanted)?;
        if nics.is_empty() {
            let mut others = Self::find(library, &Wanted { nic: None, ..wanted.clone() })?;
            // Providers know the names of their domains alone; people, and our own topology, those of the devices.
            if let Some(idx) = others.iter().position(|other| wanted.nic.as_deref().is_some_and(|nic| other.is_of(nic)))
            {
                nics.push(others.swap_remove(idx));
                return Ok(nics);
            }
            let mut others: Vec<String> =
                others.iter().map(|other| format!("{} ({})", other.nic, other.name)).collect();
            others.truncate(MAX_LISTED);
            let instead = match (&wanted.nic, others.as_slice()) {
                (None, _) => String::new(),
                (Some(_), []) => ", nor any other".to_owned(),
                (Some(_), others) => format!("; it has {}", others.join(", ")),
            };
            // Providers pass over devices that they cannot open.
            let shut: String = shut_devices(Path::new("/"), open_node).iter().map(|why| format!("; {why}")).collect();
            return Err(FabricError::NoProvider(format!(
                "libfabric {} ({}) has no {wanted}{instead}: needed is a reliable datagram endpoint with messages and \
                 remote writes that complete on delivery, and memory keys that outlive an endpoint{shut}",
                library.version_text(),
                library.path(),
            )));
        }
        Ok(nics)
    }

    fn find(library: &'static Library, wanted: &Wanted) -> Result<Vec<Self>, FabricError> {
        let mut found: Vec<Self> = Vec::new();
        let source = wanted.nic.as_ref().filter(|nic| nic.parse::<IpAddr>().is_ok());
        let source = source.and_then(|address| CString::new(address.as_str()).ok());
        // With GPU memory only where CUDA is in use: EFA's provider makes a context for the asking.
        let kinds: &[bool] = if Driver::is_loaded() { &[true, false] } else { &[false] };
        for (variant, on_gpus) in VARIANTS.iter().flat_map(|variant| kinds.iter().map(move |kind| (variant, *kind))) {
            let ask = |keys| library.entries(&hints(library, wanted, variant, on_gpus, keys)?, source.as_deref());
            let mut entries = ask(FI_MR_PROV_KEY)?;
            if entries.iter().any(renews_keys) {
                entries.retain(|entry| !renews_keys(entry));
                entries.extend(ask(0)?);
            }
            for info in entries {
                let Some(mut provider) = Self::new(info, variant) else { continue };
                match (&source, &wanted.nic) {
                    (Some(_), Some(address)) => provider.nic.clone_from(address),
                    // Some providers answer with others than the one that was asked for.
                    (None, Some(nic)) if *nic != provider.nic && *nic != provider.device_name => continue,
                    _ => {}
                }
                let is_wanted = wanted.provider.is_some() || provider.pci.is_some();
                if is_wanted && !found.iter().any(|other| other.is_same(&provider)) {
                    found.push(provider);
                }
            }
        }
        // Stable: among equals the library's own order stays, which is best first.
        found.sort_by_key(|provider| {
            let is_layered = wanted.provider.as_ref().is_some_and(|name| *name != provider.name);
            (provider.pci.is_none(), is_layered, Reverse(provider.quirks.preference))
        });
        let mut nics: Vec<Self> = Vec::new();
        for provider in found {
            if nics.iter().all(|other| other.device() != provider.device()) {
                nics.push(provider);
            }
        }
        Ok(nics)
    }

    fn new(info: Info, variant: &Variant) -> Option<Self> {
        // SAFETY: an entry of fi_getinfo has all attributes but the NIC's, for as long as it lives.
        let (entry, tx, domain, fabric) = unsafe {
            let entry = &*info.as_ptr();
            (entry, &*entry.tx_attr, &*entry.domain_attr, &*entry.fabric_attr)
        };
        let (name, fabric) = (text_of(fabric.prov_name)?, text_of(fabric.name).unwrap_or_default());
        let quirks = Quirks::of(&name, &fabric);
        if variant.op_flags & FI_DELIVERY_COMPLETE == 0 && !quirks.acknowledges_writes {
            return None;
        }
        if tx.size == 0 || domain.mr_key_size > size_of::<u64>() {
            return None;
        }
        let arrivals = match domain.cq_data_size {
            _ if quirks.drops_write_data => Arrivals::Messages,
            8.. => Arrivals::Tagged,
            4.. if entry.caps & FI_SOURCE != 0 => Arrivals::Sourced,
            // The same NIC comes again, with the source, or not at all.
            4.. if !variant.settles => return None,
            _ => Arrivals::Messages,
        };
        let nic = text_of(domain.name).unwrap_or_default();
        let (device_name, pci, gbps) = hardware(entry);
        let device_name = device_name.unwrap_or_else(|| nic.clone());
        let reaches_gpus = entry.caps & FI_HMEM != 0;
        Some(Self { quirks, device_name, fabric, nic, arrivals, reaches_gpus, pci, gbps, name, info })
    }

    /// How the NIC is driven, for people: the provider, or the fabric where a
    /// provider has several.
    pub fn manner(&self) -> String {
        if self.quirks.fabric.is_empty() {
            self.name.clone()
        } else {
            self.fabric.clone()
        }
    }

    /// Whether the port is up, as far as the system tells.
    pub fn is_up(&self) -> bool {
        let read = |path: String| std::fs::read_to_string(path).unwrap_or_default();
        let device = &self.device_name;
        !read(format!("/sys/class/net/{device}/operstate")).starts_with("down")
            && !read(format!("/sys/class/infiniband/{device}/ports/1/state")).starts_with(PORT_DOWN)
    }

    /// Whether it is the NIC that the system calls so.
    pub(super) fn is_of(&self, device: &str) -> bool {
        self.device_name == device
    }

    pub(super) const fn info(&self) -> &Info {
        &self.info
    }

    /// What is special about it.
    pub const fn quirks(&self) -> &'static Quirks {
        self.quirks
    }

    fn is_same(&self, other: &Self) -> bool {
        (&self.name, &self.fabric, &self.nic) == (&other.name, &other.fabric, &other.nic)
    }

    /// What two entries of one NIC have in common: providers name its domains
    /// differently, but not its place.
    fn device(&self) -> &str {
        self.pci.as_deref().unwrap_or(&self.nic)
    }
}

impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Provider")
            .field("name", &self.name)
            .field("fabric", &self.fabric)
            .field("nic", &self.nic)
            .field("arrivals", &self.arrivals)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.nic, &self.provider) {
            (None, None) => f.write_str("NIC that it drives by itself"),
            (None, Some(provider)) => write!(f, "NIC for provider {provider}"),
            (Some(nic), None) => write!(f, "NIC {nic}"),
            (Some(nic), Some(provider)) => write!(f, "NIC {nic} for provider {provider}"),
        }
    }
}

/// One way to ask. Providers refuse what they do not have, so that one question
/// does not find them all; of two answers for one NIC the earlier is kept.
struct Variant {
    caps: u64,
    mode: u64,
    op_flags: u64,
    /// Four bytes with a write, and no word from whom, are taken too: nothing better
    /// was found.
    settles: bool,
}

/// Whether the provider chooses the keys of memory that it binds to an endpoint:
/// when that is closed and the memory bound to another one, peers have the wrong
/// key. Asked again, it may take ours, which stay.
fn renews_keys(info: &Info) -> bool {
    // SAFETY: an entry has domain attributes for as long as it lives.
    let mr_mode = unsafe { (*(*info.as_ptr()).domain_attr).mr_mode };
    mr_mode & FI_MR_ENDPOINT != 0 && mr_mode & FI_MR_PROV_KEY != 0
}

/// `keys`: FI_MR_PROV_KEY, when the provider may choose those of memory.
fn hints(
    library: &'static Library,
    wanted: &Wanted,
    variant: &Variant,
    on_gpus: bool,
    keys: c_int,
) -> Result<Info, FabricError> {
    let hints = library.new_info()?;
    // SAFETY: a new entry has all of these attributes, zeroed.
    unsafe {
        let entry = &mut *hints.as_ptr();
        entry.caps = variant.caps | if on_gpus { FI_HMEM } else { 0 };
        entry.mode = variant.mode;
        (*entry.ep_attr).r#type = FI_EP_RDM;
        (*entry.tx_attr).op_flags = variant.op_flags;
        let domain = &mut *entry.domain_attr;
        domain.threading = FI_THREAD_SAFE;
        domain.resource_mgmt = FI_RM_ENABLED;
        domain.mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_ENDPOINT | keys;
        domain.mr_mode |= if on_gpus { FI_MR_HMEM } else { 0 };
        if let Some(nic) = wanted.nic.as_ref().filter(|nic| nic.parse::<IpAddr>().is_err()) {
            Info::set_text(&mut domain.name, nic);
        }
        if let Some(provider) = &wanted.provider {
            Info::set_text(&mut (*entry.fabric_attr).prov_name, provider);
        }
    }
    Ok(hints)
}

/// What the system calls the NIC, where it sits, and how fast its link is.
fn hardware(entry: &fi_info) -> (Option<String>, Option<String>, u32) {
    // SAFETY: the NIC's attributes are the entry's, and each part may be missing.
    unsafe {
        let Some(nic) = entry.nic.as_ref() else { return (None, None, 0) };
        let name = nic.device_attr.as_ref().and_then(|device| text_of(device.name));
        let pci = nic.bus_attr.as_ref().filter(|bus| bus.bus_type == FI_BUS_PCI).map(|bus| {
            let fi_pci_attr { domain_id, bus_id, device_id, function_id } = bus.pci;
            format!("{domain_id:04x}:{bus_id:02x}:{device_id:02x}.{function_id:x}")
        });
        let gbps = nic.link_attr.as_ref().map_or(0, |link| (link.speed / 1_000_000_000) as u32);
        (name, pci, gbps)
    }
}

/// NICs that are named instead of one that is not there.
const MAX_LISTED: usize = 8;
/// State of a port of an RDMA device, in sysfs.
const PORT_DOWN: &str = "1:";
const CAPS: u64 = FI_MSG | FI_RMA | FI_WRITE | FI_REMOTE_WRITE | FI_SEND | FI_RECV | FI_LOCAL_COMM | FI_REMOTE_COMM;
const MODE: u64 = FI_CONTEXT | FI_CONTEXT2;

const BASE: Variant = Variant { caps: CAPS, mode: MODE, op_flags: FI_DELIVERY_COMPLETE, settles: false };
const SOURCED: Variant = Variant { caps: CAPS | FI_SOURCE, ..BASE };

const VARIANTS: &[Variant] = &[
    BASE,
    SOURCED,
    // Immediates that consume a posted receive: some providers offer nothing else, others refuse the question.
    Variant { mode: MODE | FI_RX_CQ_DATA, ..SOURCED },
    Variant { op_flags: 0, ..SOURCED },
    Variant { mode: MODE | FI_RX_CQ_DATA, op_flags: 0, ..SOURCED },
    Variant { settles: true, ..BASE },
    Variant { mode: MODE | FI_RX_CQ_DATA, settles: true, ..BASE },
];
