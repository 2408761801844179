//! Reads a machine's topology from sysfs.
//!
//! Every path is below a root, so that a recorded tree is read as the machine
//! itself is. A file that is missing, unreadable or nonsense leaves its fact
//! unknown: containers hide parts of sysfs, and a guess would be worse.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use anyfabric_plan::{Core, Fabric, Gpu, NicPort, Place, Topology};

/// Reads `<root>/sys`, and of `<root>/dev` and `<root>/proc` what a container was given; `/` for this machine.
pub fn read_topology(root: &Path) -> Topology {
    let sys = root.join("sys");
    Topology { cores: cores(&sys), gpus: gpus(root), nics: nics(root), node_distances: node_distances(&sys) }
}

/// CPUs that this process may use, by `<root>/proc/self/status`; none when that
/// does not say.
pub fn allowed_cpus(root: &Path) -> Vec<u32> {
    let status = text(&root.join("proc/self/status"));
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    list.map(parse_cpu_list).unwrap_or_default()
}

/// CPUs of a list such as `0-47,96-143`; what is not one is left out.
pub fn parse_cpu_list(text: &str) -> Vec<u32> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        if cpus.len() > MAX_CPUS as usize {
            break;
        }
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.trim().parse(), last.trim().parse::<u32>()) {
            cpus.extend(first..=last.min(MAX_CPUS));
        }
    }
    cpus
}

fn cores(sys: &Path) -> Vec<Core> {
    let mut node_of = BTreeMap::new();
    for (node, folder) in nodes(sys) {
        for cpu in parse_cpu_list(&text(&folder.join("cpulist"))) {
            node_of.insert(cpu, node);
        }
    }
    let cpus = sys.join("devices/system/cpu");
    // By first thread: every thread of a core lists all of them.
    let mut cores = BTreeMap::new();
    for cpu in parse_cpu_list(&text(&cpus.join("online"))) {
        let listed = parse_cpu_list(&text(&cpus.join(format!("cpu{cpu}/topology/thread_siblings_list"))));
        let threads = if listed.contains(&cpu) { listed } else { vec![cpu] };
        let node = node_of.get(&cpu).copied().unwrap_or(0);
        cores.entry(threads[0]).or_insert(Core { cpus: threads, node });
    }
    cores.into_values().collect()
}

/// NUMA nodes with their folders; those of memory alone too.
fn nodes(sys: &Path) -> BTreeMap<u32, PathBuf> {
    let number = |name: &str| name.strip_prefix("node").and_then(|number| number.parse().ok());
    let folders = entries(&sys.join("devices/system/node")).into_iter();
    folders.filter_map(|(name, folder)| Some((number(&name)?, folder))).collect()
}

/// What the firmware says of the ways between nodes: each lists its distance to every node, in their order.
fn node_distances(sys: &Path) -> BTreeMap<(u32, u32), u32> {
    let nodes = nodes(sys);
    let mut distances = BTreeMap::new();
    for (node, folder) in &nodes {
        let row = text(&folder.join("distance"));
        for (other, distance) in nodes.keys().zip(row.split_whitespace()) {
            distances.extend(distance.parse().map(|distance| ((*node, *other), distance)));
        }
    }
    distances
}

fn gpus(root: &Path) -> Vec<Gpu> {
    let sys = root.join("sys");
    let mut gpus = Vec::new();
    // The driver lists those of the host; in a container, those that it was given.
    let given: BTreeSet<String> =
        entries(&root.join("proc/driver/nvidia/gpus")).into_iter().map(|(pci, _)| pci).collect();
    for (pci, folder) in entries(&sys.join("bus/pci/devices")) {
        // 0x03: a display controller. Only NVIDIA's can be used by the CUDA paths.
        if text(&folder.join("vendor")) == NVIDIA && text(&folder.join("class")).starts_with("0x03") {
            gpus.push(Gpu { place: place(&sys, &folder), is_given: given.contains(&pci), pci });
        }
    }
    let is_known = gpus.iter().any(|gpu| gpu.is_given);
    gpus.iter_mut().for_each(|gpu| gpu.is_given |= !is_known);
    gpus
}

fn nics(root: &Path) -> Vec<NicPort> {
    let sys = &root.join("sys");
    let mut nics = Vec::new();
    let devices = entries(&sys.join("class/infiniband"));
    let openable = entries(&sys.join("class/infiniband_verbs")).into_iter();
    let verbs: BTreeMap<String, bool> = openable
        .map(|(node, folder)| (text(&folder.join("ibdev")), root.join("dev/infiniband").join(node).exists()))
        .collect();
    let is_known = devices.iter().any(|(device, _)| verbs.get(device) == Some(&true));
    for (device, folder) in &devices {
        // Where programs can open some, those that they cannot are for management alone: `smi1` beside a ConnectX-8.
        if !verbs.contains_key(device) && devices.iter().any(|(other, _)| verbs.contains_key(other)) {
            continue;
        }
        let hardware = folder.join("device");
        let place = place(sys, &hardware);
        let pci = place.path.last().filter(|name| is_pci(name)).cloned();
        let driver = link_name(&hardware.join("driver"));
        let function = link_name(&hardware.join("physfn")).or_else(|| pci.clone());
        let ports = entries(&folder.join("ports"));
        for (number, port) in &ports {
            let Ok(number) = number.parse() else { continue };
            let name = if ports.len() > 1 { format!("{device}:{number}") } else { device.clone() };
            nics.push(NicPort {
                name,
                device: device.clone(),
                port: number,
                pci: pci.clone(),
                function: function.clone(),
                netdevs: netdevs(folder, port, number),
                fabric: fabric(&text(&port.join("link_layer")), driver.as_deref()),
                is_up: text(&port.join("state")).ends_with("ACTIVE"),
                is_given: !is_known || verbs.get(device) == Some(&true),
                gbps: port_gbps(port),
                slot_gbps: slot_gbps(&hardware),
                place: place.clone(),
            });
        }
    }
    // mlx5_2 before mlx5_10.
    nics.sort_by_cached_key(|nic| (nic.device.len(), nic.device.clone(), nic.port));
    nics
}

/// Link rate of a port, by its folder in sysfs; 0 where that does not say.
pub(crate) fn port_gbps(port: &Path) -> u32 {
    leading_number(&text(&port.join("rate"))).round() as u32
}

fn fabric(link_layer: &str, driver: Option<&str>) -> Fabric {
    match (link_layer, driver) {
        (_, Some("efa")) => Fabric::Efa,
        ("InfiniBand", _) => Fabric::InfiniBand,
        ("Ethernet", _) => Fabric::Ethernet,
        _ => Fabric::Other,
    }
}

fn netdevs(device: &Path, port: &Path, number: u32) -> Vec<String> {
    // The kernel says of each GID which interface it belongs to; not of InfiniBand's. A new GID gets the first free place
    // of a table with up to a thousand, and reading them all would take most of an engine's start.
    let (table, mut found, mut num_empty) = (port.join("gid_attrs/ndevs"), Vec::new(), 0);
    for index in 0_u32.. {
        match text(&table.join(index.to_string())) {
            name if !name.is_empty() => {
                found.push(name);
                num_empty = 0;
            }
            _ if num_empty < MAX_GID_GAP => num_empty += 1,
            _ => break,
        }
    }
    for (name, folder) in entries(&device.join("device/net")) {
        if text(&folder.join("dev_port")).parse().unwrap_or(0_u32).checked_add(1) == Some(number) {
            found.push(name);
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// The path below `devices`, and the node. The folder is a link to it, or, in
/// a copy that lost its links, a folder whose `uevent` names the PCI address.
fn place(sys: &Path, device: &Path) -> Place {
    let real = device.canonicalize().ok();
    // A scalable function has no node of its own: it is in the folder of its card.
    let above = real.as_deref().and_then(|real| real.ancestors().find(|folder| folder.join("numa_node").exists()));
    let node = text(&above.unwrap_or(device).join("numa_node")).parse().ok();
    let direct = real.as_deref().and_then(|real| path_below(sys, real));
    let path = direct.or_else(|| {
        let uevent = text(&device.join("uevent"));
        let pci = uevent.lines().find_map(|line| line.strip_prefix("PCI_SLOT_NAME="))?;
        path_below(sys, &sys.join("bus/pci/devices").join(pci).canonicalize().ok()?)
    });
    Place { node, path: path.unwrap_or_default() }
}

fn path_below(sys: &Path, real: &Path) -> Option<Vec<String>> {
    let below = real.strip_prefix(sys.canonicalize().ok()?.join("devices")).ok()?;
    let names: Vec<String> = below.components().filter_map(normal).collect();
    let end = names.iter().rposition(|name| is_pci(name))?;
    // A virtual machine's bus, or the platform, may be what host bridges have in common.
    let start = names.iter().position(|name| is_host_bridge(name)).unwrap_or(0);
    Some(names.get(start..=end)?.to_vec())
}

fn normal(component: Component<'_>) -> Option<String> {
    match component {
        Component::Normal(name) => name.to_str().map(str::to_owned),
        _ => None,
    }
}

/// `0000:53:00.0`; domains behind a controller of their own have five digits.
fn is_pci(name: &str) -> bool {
    let mut lengths = name.split([':', '.']).map(str::len);
    matches!(lengths.next(), Some(4 | 5)) && lengths.eq([2, 2, 1])
}

/// `pci0000:44`
fn is_host_bridge(name: &str) -> bool {
    name.strip_prefix("pci").is_some_and(|rest| rest.contains(':'))
}

/// Rate per lane times lanes, less the coding: what the slot carries.
fn slot_gbps(device: &Path) -> u32 {
    let per_lane = leading_number(&text(&device.join("current_link_speed")));
    let num_lanes = leading_number(&text(&device.join("current_link_width")));
    // 8b/10b up to 5 GT/s, 128b/130b and the like above.
    let coding = if per_lane > 5.0 { 128.0 / 130.0 } else { 0.8 };
    (per_lane * num_lanes * coding).round() as u32
}

/// `400` of `400 Gb/sec (4X NDR)`; 0 of anything else.
fn leading_number(text: &str) -> f64 {
    let number = text.split(|character: char| !character.is_ascii_digit() && character != '.').next();
    number.and_then(|number| number.parse().ok()).unwrap_or(0.0)
}

/// Entries of a folder by name; none if there is no such folder.
fn entries(folder: &Path) -> Vec<(String, PathBuf)> {
    let Ok(list) = fs::read_dir(folder) else { return Vec::new() };
    let mut entries: Vec<_> = list
        .filter_map(Result::ok)
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .collect();
    entries.sort_unstable();
    entries
}

/// Last name of what a link points to.
fn link_name(link: &Path) -> Option<String> {
    fs::read_link(link).ok()?.file_name().and_then(|name| name.to_str()).map(str::to_owned)
}

fn text(file: &Path) -> String {
    let mut text = String::new();
    let read = File::open(file).and_then(|file| file.take(MAX_TEXT_BYTES).read_to_string(&mut text));
    match read {
        // tar fills a copy up to the size that sysfs states, with zeros.
        Ok(nbytes) if (nbytes as u64) < MAX_TEXT_BYTES => text.trim_end_matches('\0').trim().to_owned(),
        _ => String::new(),
    }
}

const NVIDIA: &str = "0x10de";
/// Free places between two GIDs of a port: those of interfaces that were there and are gone.
const MAX_GID_GAP: u32 = 16;
/// More than any file here has; what is longer is not one of the kernel's.
const MAX_TEXT_BYTES: u64 = 1 << 16;
/// More than any machine; a list is not believed beyond.
const MAX_CPUS: u32 = 1 << 16;
