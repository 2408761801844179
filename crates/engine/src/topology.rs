//! The machine, and which NICs and cores would serve which of its devices; for people and for Python.

use std::path::Path;

use anyfabric_plan::{Distance, Fabric, Gpu, Group, NicPort, Request, Topology};
use anyfabric_transports::sys::{allowed_cpus, read_topology};
use serde::Serialize;

/// A machine and the groups chosen on it.
#[derive(Debug, Clone, Serialize)]
pub struct TopologyInfo {
    /// Number of physical cores.
    pub num_cores: usize,
    /// GPUs.
    pub gpus: Vec<GpuInfo>,
    /// RDMA ports.
    pub nics: Vec<NicPortInfo>,
    /// One of each device.
    pub groups: Vec<GroupInfo>,
}

/// One GPU.
#[derive(Debug, Clone, Serialize)]
pub struct GpuInfo {
    /// PCI address.
    pub pci: String,
    /// NUMA node, where known.
    pub node: Option<u32>,
    /// Whether programs can use it: false where the driver lists others and not it.
    pub is_given: bool,
}

/// One RDMA port.
#[derive(Debug, Clone, Serialize)]
pub struct NicPortInfo {
    /// Name, as settings take it.
    pub name: String,
    /// RDMA device.
    pub device: String,
    /// Port of it, from 1.
    pub port: u32,
    /// PCI address; `None` for software.
    pub pci: Option<String>,
    /// Network interfaces on the same port.
    pub netdevs: Vec<String>,
    /// `infiniband`, `ethernet`, `efa` or `other`.
    pub fabric: &'static str,
    /// `up` or `down`.
    pub state: &'static str,
    /// Whether programs can open it: false where it has no device node and others have.
    pub is_given: bool,
    /// Link rate in Gbit/s; 0 where unknown.
    pub gbps: u32,
    /// Rate of its slot in Gbit/s; 0 where unknown.
    pub slot_gbps: u32,
    /// NUMA node, where known.
    pub node: Option<u32>,
    /// Why no group has it; `None` when some may.
    pub passed_over: Option<String>,
}

/// The NICs and cores of one device.
#[derive(Debug, Clone, Serialize)]
pub struct GroupInfo {
    /// `cpu:0` for host memory of node 0, `gpu:0000:53:00.0` for a GPU.
    pub device: String,
    /// Nearest first.
    pub nics: Vec<GroupNic>,
    /// CPUs for its worker; empty when there is no reason to prefer any.
    pub cpus: Vec<u32>,
}

/// A NIC of a group.
#[derive(Debug, Clone, Serialize)]
pub struct GroupNic {
    /// Its name.
    pub name: String,
    /// `switch`, `host bridge`, `node`, `system` or `unknown`.
    pub distance: &'static str,
}

/// Reads the machine below `root`, `/` for this one, and chooses the groups
/// that an engine with these settings would use.
///
/// What cannot be read is unknown: this does not fail.
pub fn topology(root: &Path, nics: &[String], nics_per_device: Option<usize>) -> TopologyInfo {
    let machine = read_topology(root);
    let allowed = allowed_cpus(root);
    let request = Request { nics, nics_per_device, allowed_cpus: &allowed };
    let (_, passed_over) = machine.usable(&request);
    let nic_info = |(idx, nic): (usize, &NicPort)| NicPortInfo {
        name: nic.name.clone(),
        device: nic.device.clone(),
        port: nic.port,
        pci: nic.pci.clone(),
        netdevs: nic.netdevs.clone(),
        fabric: fabric_name(nic.fabric),
        state: if nic.is_up { "up" } else { "down" },
        is_given: nic.is_given,
        gbps: nic.gbps,
        slot_gbps: nic.slot_gbps,
        node: nic.place.node,
        passed_over: passed_over.get(&idx).cloned(),
    };
    TopologyInfo {
        num_cores: machine.cores.len(),
        gpus: machine.gpus.iter().map(gpu_info).collect(),
        nics: machine.nics.iter().enumerate().map(nic_info).collect(),
        groups: machine.groups(&request).iter().map(|group| group_info(&machine, group)).collect(),
    }
}

fn gpu_info(gpu: &Gpu) -> GpuInfo {
    GpuInfo { pci: gpu.pci.clone(), node: gpu.place.node, is_given: gpu.is_given }
}

pub(crate) fn group_info(machine: &Topology, group: &Group) -> GroupInfo {
    let device = machine.name_of(group.device);
    let nic = |(idx, distance): &(usize, Distance)| GroupNic {
        name: machine.nics[*idx].name.clone(),
        distance: distance_name(*distance),
    };
    GroupInfo { device, nics: group.nics.iter().map(nic).collect(), cpus: group.cpus.clone() }
}

fn fabric_name(fabric: Fabric) -> &'static str {
    match fabric {
        Fabric::InfiniBand => "infiniband",
        Fabric::Ethernet => "ethernet",
        Fabric::Efa => "efa",
        Fabric::Other => "other",
    }
}

fn distance_name(distance: Distance) -> &'static str {
    match distance {
        Distance::Switch => "switch",
        Distance::HostBridge => "host bridge",
        Distance::Node => "node",
        Distance::System => "system",
        Distance::Unknown => "unknown",
    }
}
