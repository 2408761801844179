//! A machine as transports see it, and which NICs and cores serve a device.
//!
//! What is here was read by somebody else (`transports::sys::read_topology`);
//! here it is compared and chosen from.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::{MAX_NICS, MAX_SHARDS};

/// What a machine has. Order is stable: by name or PCI address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Topology {
    /// Physical cores.
    pub cores: Vec<Core>,
    /// GPUs.
    pub gpus: Vec<Gpu>,
    /// RDMA ports.
    pub nics: Vec<NicPort>,
    /// How far each NUMA node is from each, in the firmware's measure, where it says: 10 is the node itself.
    pub node_distances: BTreeMap<(u32, u32), u32>,
}

/// One physical core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Core {
    /// Its hardware threads, in order.
    pub cpus: Vec<u32>,
    /// Its NUMA node; 0 on a machine without nodes.
    pub node: u32,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// PCI address, `0000:53:00.0`.
    pub pci: String,
    /// Where it is plugged in.
    pub place: Place,
    /// Whether this process may have it: a container sees all GPUs of its host, and is given some.
    pub is_given: bool,
}

/// One port of an RDMA device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicPort {
    /// `mlx5_0`, or `mlx5_0:2` where a device has several ports.
    pub name: String,
    /// The RDMA device.
    pub device: String,
    /// Its port, from 1.
    pub port: u32,
    /// PCI address of the device; `None` for one of software.
    pub pci: Option<String>,
    /// PCI address of the function whose ports it has: another one's when it is a virtual function.
    pub function: Option<String>,
    /// Network interfaces on the same port.
    pub netdevs: Vec<String>,
    /// What it speaks.
    pub fabric: Fabric,
    /// Whether the port is active.
    pub is_up: bool,
    /// Whether programs can open it: false where it has no device node and others have.
    pub is_given: bool,
    /// Link rate in Gbit/s; 0 where unknown.
    pub gbps: u32,
    /// Rate of its slot in Gbit/s, as negotiated; 0 where unknown.
    pub slot_gbps: u32,
    /// Where it is plugged in.
    pub place: Place,
}

/// What a port speaks: NICs of one group speak the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fabric {
    /// InfiniBand.
    InfiniBand,
    /// RoCE or iWARP.
    Ethernet,
    /// AWS Elastic Fabric Adapter.
    Efa,
    /// Anything else.
    Other,
}

/// Where a device is plugged in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// NUMA node, where the firmware says.
    pub node: Option<u32>,
    /// Names from the host bridge (`pci0000:44`) down to the device's own
    /// address; empty for a device of software.
    pub path: Vec<String>,
}

/// How far two places are apart, nearest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Distance {
    /// Below one port of a host bridge: through a PCIe switch, not through the CPU.
    Switch,
    /// Below one host bridge.
    HostBridge,
    /// On one NUMA node.
    Node,
    /// Between NUMA nodes.
    System,
    /// One of them has no known place.
    Unknown,
}

/// Where bytes lie, as far as choosing NICs is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Device {
    /// Host memory of a NUMA node.
    Host(u32),
    /// A GPU, by its index in [`Topology::gpus`].
    Gpu(usize),
}

/// What the user asked for.
#[derive(Debug, Clone, Default)]
pub struct Request<'a> {
    /// Only these NICs, by name; all when empty. They are used whatever their
    /// state, speed and fabric: whoever names a NIC means it.
    pub nics: &'a [String],
    /// NICs of each device, 1 to [`MAX_NICS`]; when `None` as many as are nearest, but no more than one operation uses.
    pub nics_per_device: Option<usize>,
    /// CPUs that this process may use; all when empty.
    pub allowed_cpus: &'a [u32],
}

/// The NICs and the cores of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The device.
    pub device: Device,
    /// Indices in [`Topology::nics`] and how far each is, nearest first.
    pub nics: Vec<(usize, Distance)>,
    /// CPUs for its worker, one of each core, near its NICs; empty when there
    /// is no reason to prefer any.
    pub cpus: Vec<u32>,
}

impl Place {
    /// How far another place is.
    pub fn distance(&self, other: &Self) -> Distance {
        match (self.depth(other), self.node, other.node) {
            (2.., _, _) => Distance::Switch,
            // A virtual machine may have one host bridge for all its nodes.
            (1, ours, theirs) if ours.zip(theirs).is_none_or(|(ours, theirs)| ours == theirs) => Distance::HostBridge,
            (_, Some(ours), Some(theirs)) if ours == theirs => Distance::Node,
            (_, Some(_), Some(_)) => Distance::System,
            _ => Distance::Unknown,
        }
    }

    /// How many of the bridges above both they have in common.
    fn depth(&self, other: &Self) -> usize {
        self.path.iter().zip(&other.path).take_while(|(ours, theirs)| ours == theirs).count()
    }
}

impl Topology {
    /// Its devices: host memory of each node, then each GPU.
    pub fn devices(&self) -> Vec<Device> {
        let mut nodes: Vec<u32> = self.cores.iter().map(|core| core.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes.into_iter().map(Device::Host).chain((0..self.gpus.len()).map(Device::Gpu)).collect()
    }

    /// Name of a device: `cpu:0` for host memory of node 0, `gpu:0000:53:00.0` for
    /// a GPU.
    pub fn name_of(&self, device: Device) -> String {
        match device {
            Device::Host(node) => format!("cpu:{node}"),
            Device::Gpu(idx) => format!("gpu:{}", self.gpus.get(idx).map_or("?", |gpu| gpu.pci.as_str())),
        }
    }

    /// The device of that name, which may also be `cuda:N`: the N-th GPU of those
    /// that this process was given and that `visible`, the value of CUDA_VISIBLE_DEVICES,
    /// lets CUDA see, which counts them by PCI address where they are of one kind.
    ///
    /// # Errors
    /// What there is instead.
    pub fn device(&self, name: &str, visible: Option<&str>) -> Result<Device, String> {
        let device = match name.strip_prefix("cuda:").map(str::parse) {
            Some(Ok(number)) => self.visible_gpu(number, visible)?.map(Device::Gpu),
            Some(Err(_)) => None,
            None => self.devices().into_iter().find(|device| self.name_of(*device) == name),
        };
        device.ok_or_else(|| {
            let mut known: Vec<String> = self.devices().into_iter().map(|device| self.name_of(device)).collect();
            if known.is_empty() {
                known.push("none that can be named".into());
            }
            format!("there is no device {name}; this machine has {}", known.join(", "))
        })
    }

    fn visible_gpu(&self, number: usize, visible: Option<&str>) -> Result<Option<usize>, String> {
        let given = |number: usize| (0..self.gpus.len()).filter(|idx| self.gpus[*idx].is_given).nth(number);
        let Some(visible) = visible else { return Ok(given(number)) };
        let Some(entry) = visible.split(',').map(str::trim).nth(number) else { return Ok(None) };
        match entry.parse() {
            Ok(number) => Ok(given(number)),
            Err(_) => Err(format!(
                "CUDA_VISIBLE_DEVICES names GPUs in a way that only the driver understands ({entry}); name the device \
                 by its PCI address, as gpu:0000:53:00.0"
            )),
        }
    }

    /// How far a NIC is from a device.
    pub fn distance(&self, device: Device, nic: &NicPort) -> Distance {
        match device {
            Device::Host(node) => Place { node: Some(node), path: Vec::new() }.distance(&nic.place),
            Device::Gpu(idx) => self.gpus.get(idx).map_or(Distance::Unknown, |gpu| gpu.place.distance(&nic.place)),
        }
    }

    /// How far a NIC is for choosing, nearest first: other nodes in the firmware's measure too.
    fn nearness(&self, device: Device, nic: &NicPort) -> (Distance, u32) {
        let distance = self.distance(device, nic);
        let nodes = self.node(device).zip(nic.place.node).filter(|_| distance == Distance::System);
        (distance, nodes.and_then(|nodes| self.node_distances.get(&nodes).copied()).unwrap_or(0))
    }

    /// NICs that groups are made of, without those that `request` rules out; of
    /// each other one, why it is passed over.
    pub fn usable(&self, request: &Request<'_>) -> (Vec<usize>, BTreeMap<usize, String>) {
        let all = 0..self.nics.len();
        if !request.nics.is_empty() {
            let named = |idx: &usize| {
                let nic = &self.nics[*idx];
                request.nics.iter().any(|name| *name == nic.name || *name == format!("{}:{}", nic.device, nic.port))
            };
            let why = |idx: usize| (idx, "not among the NICs that were named".to_owned());
            return (all.clone().filter(named).collect(), all.filter(|idx| !named(idx)).map(why).collect());
        }
        let mut passed_over = BTreeMap::new();
        for (idx, nic) in self.nics.iter().enumerate() {
            if !nic.is_given {
                let why = "it has no device node in /dev/infiniband: not given to this container?";
                passed_over.insert(idx, why.to_owned());
            } else if !nic.is_up {
                passed_over.insert(idx, "its port is down".to_owned());
            } else if nic.netdevs == ["lo"] {
                passed_over.insert(idx, "its interface is lo, which reaches this host only".to_owned());
            }
        }
        for idx in all.clone() {
            if let Some(owner) = self.owner(idx, &passed_over) {
                passed_over.insert(idx, format!("a part of {}, whose port it shares", self.nics[owner].name));
            }
        }
        let up: Vec<usize> = all.clone().filter(|idx| !passed_over.contains_key(idx)).collect();
        let fastest = up.iter().map(|idx| self.nics[*idx].gbps).max().unwrap_or(0);
        let (slow, quick): (Vec<usize>, Vec<usize>) =
            up.into_iter().partition(|idx| (1..fastest / SLOW).contains(&self.nics[*idx].gbps));
        for idx in slow {
            let why = format!("{} Gbit/s, less than a quarter of the fastest one's {fastest}", self.nics[idx].gbps);
            passed_over.insert(idx, why);
        }
        let mut gbps_of: BTreeMap<Fabric, u64> = BTreeMap::new();
        for idx in &quick {
            *gbps_of.entry(self.nics[*idx].fabric).or_default() += u64::from(self.nics[*idx].gbps);
        }
        let chosen = gbps_of.iter().max_by_key(|(fabric, gbps)| (**gbps, Reverse(**fabric))).map(|(fabric, _)| *fabric);
        for idx in quick.into_iter().filter(|idx| Some(self.nics[*idx].fabric) != chosen) {
            passed_over.insert(idx, "another kind of fabric than most of the bandwidth here".to_owned());
        }
        (all.filter(|idx| !passed_over.contains_key(idx)).collect(), passed_over)
    }

    /// The NIC that has the same port, when it is to be preferred: the physical function, or the first of its
    /// virtual ones. Two of them have no more bandwidth than one.
    fn owner(&self, idx: usize, passed_over: &BTreeMap<usize, String>) -> Option<usize> {
        let NicPort { function: Some(function), port, .. } = &self.nics[idx] else { return None };
        let has_port = |other: &usize| {
            let other = &self.nics[*other];
            (other.function.as_ref(), other.port) == (Some(function), *port)
        };
        let sharing = (0..self.nics.len()).filter(|other| !passed_over.contains_key(other)).filter(has_port);
        let owner = sharing.min_by_key(|other| (self.nics[*other].pci.as_ref() != Some(function), *other))?;
        (owner != idx && !passed_over.contains_key(&idx)).then_some(owner)
    }

    /// The group of every device of the machine. Every process of it that asks
    /// the same gets the same answer: NICs and cores that several devices could
    /// use are divided among them, the same way everywhere.
    pub fn groups(&self, request: &Request<'_>) -> Vec<Group> {
        let (usable, _) = self.usable(request);
        let mut num_users = vec![0_usize; self.nics.len()];
        let mut groups: Vec<Group> = Vec::new();
        let devices = self.devices();
        for device in &devices {
            // GPUs compete with GPUs; host memory is not what the bandwidth is for.
            if *device == Device::Gpu(0) {
                num_users.fill(0);
            }
            let few = || self.share(*device, &usable).min(MAX_SHARDS);
            let wanted = request.nics_per_device.unwrap_or_else(few).min(MAX_NICS);
            let nics = self.nearest(*device, &usable, wanted, &mut num_users);
            groups.push(Group { device: *device, nics, cpus: Vec::new() });
        }
        self.assign_cores(&mut groups, request);
        groups
    }

    /// The part of the nearest NICs that is this device's: all of them over the
    /// GPUs that are as near to them.
    fn share(&self, device: Device, usable: &[usize]) -> usize {
        let Some(nearest) = usable.iter().map(|idx| self.nearness(device, &self.nics[*idx])).min() else { return 0 };
        let near: Vec<usize> =
            usable.iter().copied().filter(|idx| self.nearness(device, &self.nics[*idx]) == nearest).collect();
        let num_sharing = match device {
            Device::Host(_) => 1,
            Device::Gpu(_) => (0..self.gpus.len())
                .filter(|gpu| near.iter().any(|idx| self.nearness(Device::Gpu(*gpu), &self.nics[*idx]) <= nearest))
                .count(),
        };
        near.len().div_ceil(num_sharing.max(1))
    }

    fn nearest(
        &self,
        device: Device,
        usable: &[usize],
        wanted: usize,
        num_users: &mut [usize],
    ) -> Vec<(usize, Distance)> {
        let mut chosen: Vec<(usize, Distance)> = Vec::new();
        let most_users = (self.gpus.len() * wanted).div_ceil(usable.len().max(1));
        while chosen.len() < wanted {
            let is_chosen = |idx: usize| chosen.iter().any(|(other, _)| *other == idx);
            let beside = |idx: usize| {
                let place = &self.nics[idx].place;
                chosen.iter().filter(|(other, _)| self.nics[*other].place.distance(place) == Distance::Switch).count()
            };
            // Near first; of those that do not serve their part of the GPUs yet, below the same smallest switch; then one
            // that fewer others use; then, for host memory, behind another switch.
            let rank = |idx: &usize| {
                let (nic, users) = (&self.nics[*idx], num_users[*idx]);
                let (depth, spread) = match device {
                    Device::Host(_) => (0, beside(*idx)),
                    Device::Gpu(gpu) => (self.gpus[gpu].place.depth(&nic.place), 0),
                };
                (
                    self.nearness(device, nic),
                    users >= most_users,
                    Reverse(depth),
                    users,
                    spread,
                    Reverse(nic.gbps),
                    *idx,
                )
            };
            let Some(next) = usable.iter().copied().filter(|idx| !is_chosen(*idx)).min_by_key(rank) else { break };
            num_users[next] += 1;
            chosen.push((next, self.distance(device, &self.nics[next])));
        }
        chosen
    }

    /// Divides each node's cores among the groups whose NICs, or else whose
    /// device, are on it.
    fn assign_cores(&self, groups: &mut [Group], request: &Request<'_>) {
        let allowed = |cpu: u32| request.allowed_cpus.is_empty() || request.allowed_cpus.contains(&cpu);
        let node_of = |group: &Group| {
            let of_nic = group.nics.first().and_then(|(idx, _)| self.nics[*idx].place.node);
            of_nic.or_else(|| self.node(group.device))
        };
        let nodes: Vec<Option<u32>> = groups.iter().map(node_of).collect();
        let mut distinct: Vec<u32> = nodes.iter().copied().flatten().collect();
        distinct.sort_unstable();
        distinct.dedup();
        for node in distinct {
            let on_node = self.cores.iter().filter(|core| core.node == node);
            let mut cpus: Vec<u32> =
                on_node.filter_map(|core| core.cpus.iter().copied().find(|cpu| allowed(*cpu))).collect();
            let mut members: Vec<&mut Group> =
                groups.iter_mut().zip(&nodes).filter(|(_, of)| **of == Some(node)).map(|(group, _)| group).collect();
            // The kernel's own work gathers on the machine's first CPU.
            if cpus.len() > members.len() {
                cpus.retain(|cpu| *cpu != 0);
            }
            let (num_cpus, num_members) = (cpus.len(), members.len());
            if num_cpus < 2 {
                continue;
            }
            for (idx, group) in members.iter_mut().enumerate() {
                let start = (idx * num_cpus / num_members).min(num_cpus - 1);
                let end = ((idx + 1) * num_cpus / num_members).max(start + 1);
                group.cpus = cpus[start..end].to_vec();
            }
        }
    }

    fn node(&self, device: Device) -> Option<u32> {
        match device {
            Device::Host(node) => Some(node),
            Device::Gpu(idx) => self.gpus.get(idx).and_then(|gpu| gpu.place.node),
        }
    }
}

/// A NIC this many times slower than the fastest is for something else.
const SLOW: u32 = 4;
