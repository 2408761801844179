//! What an engine takes of its machine: the NICs near its devices, and the cores near those.
//!
//! The machine is read when that is first asked, so that an engine that needs no NIC reads nothing, unless its
//! devices are named: then a mistake is an error at the start.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::OnceLock;

use anyfabric_plan::{Device, Fabric, Group, Request, Topology, MAX_NICS};
use anyfabric_transports::sys::{allowed_cpus, pin, read_topology, thread_id};
use anyfabric_wire::NicLibrary;
use serde::Serialize;

use crate::inner::Inner;
use crate::topology::{group_info, GroupInfo};
use crate::Config;

/// What an engine takes of its machine.
#[derive(Debug, Default)]
pub(crate) struct Placement {
    /// What serves each of its devices.
    pub(crate) devices: Vec<GroupInfo>,
    /// NICs of all of them, the devices taking turns, with what they speak.
    nics: Vec<(String, Fabric)>,
    /// Cores for the worker; none when no NIC has a known place.
    cpus: Vec<u32>,
}

/// Where the worker runs.
#[derive(Debug, Clone, Serialize)]
pub struct WorkerInfo {
    /// CPUs that it is kept on; any when empty.
    pub cpus: Vec<u32>,
    /// Why it is, or is not.
    pub reason: String,
}

/// The worker, as far as keeping it on some CPUs goes.
#[derive(Debug, Default)]
pub(crate) struct Pinning {
    /// 0 before it runs.
    worker: AtomicI32,
    done: OnceLock<Result<Vec<u32>, String>>,
}

impl Placement {
    /// Reads the machine.
    ///
    /// # Errors
    /// For a device that is not there, with what is.
    pub(crate) fn of(config: &Config) -> Result<Self, String> {
        let machine = read_topology(&config.machine);
        let allowed = allowed_cpus(&config.machine);
        // Whoever names NICs means all of them, for each device.
        let nics_per_device = if config.nics.is_empty() { config.nics_per_device } else { Some(MAX_NICS) };
        let request = Request { nics: &config.nics, nics_per_device, allowed_cpus: &allowed };
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
        let named = config.devices.iter().map(|name| machine.device(name, visible.as_deref()));
        let mut devices: Vec<Device> = named.collect::<Result<_, _>>()?;
        if devices.is_empty() {
            devices.extend(device_here(&machine));
        }
        let all = machine.groups(&request);
        let groups: Vec<&Group> =
            devices.iter().filter_map(|device| all.iter().find(|group| group.device == *device)).collect();
        let mut this =
            Self { devices: groups.iter().map(|group| group_info(&machine, group)).collect(), ..Self::default() };
        for turn in 0..MAX_NICS {
            for (idx, _) in groups.iter().filter_map(|group| group.nics.get(turn)) {
                let nic = &machine.nics[*idx];
                if this.nics.len() < MAX_NICS && this.nics.iter().all(|(name, _)| *name != nic.name) {
                    this.nics.push((nic.name.clone(), nic.fabric));
                }
            }
        }
        for group in groups {
            if group.nics.iter().any(|(idx, _)| machine.nics[*idx].place.node.is_some()) {
                this.cpus.extend(&group.cpus);
            }
        }
        this.cpus.sort_unstable();
        this.cpus.dedup();
        Ok(this)
    }

    /// Names of the NICs that a library drives, as the system has them.
    pub(crate) fn nics(&self, library: NicLibrary) -> Vec<String> {
        let is_driven = |fabric: Fabric| match library {
            NicLibrary::Verbs => matches!(fabric, Fabric::InfiniBand | Fabric::Ethernet),
            NicLibrary::Libfabric => true,
        };
        self.nics.iter().filter(|(_, fabric)| is_driven(*fabric)).map(|(name, _)| name.clone()).collect()
    }
}

impl Inner {
    /// The worker is the calling thread.
    pub(crate) fn start_worker(&self) {
        // ORDERING: with the opening of NICs, which comes before `pin_worker` elsewhere: one of the two sees both.
        self.pinning.worker.store(thread_id(), Ordering::SeqCst);
        self.pin_worker();
    }

    /// Keeps the worker near the NICs, once it runs and some are open.
    pub(crate) fn pin_worker(&self) {
        // ORDERING: see `start_worker`.
        let worker = self.pinning.worker.load(Ordering::SeqCst);
        if worker == 0 || !self.config.pin_worker || self.groups.opened().next().is_none() {
            return;
        }
        let cpus = &self.groups.placement(&self.config).cpus;
        if !cpus.is_empty() {
            self.pinning.done.get_or_init(|| pin(worker, cpus).map_err(|error| error.to_string()));
        }
    }

    pub(crate) fn worker_info(&self) -> WorkerInfo {
        let free = |reason: &str| WorkerInfo { cpus: Vec::new(), reason: reason.to_owned() };
        match self.pinning.done.get() {
            Some(Ok(cpus)) => WorkerInfo { cpus: cpus.clone(), reason: "near the NICs".into() },
            Some(Err(why)) => free(&format!("it cannot be kept near the NICs: {why}")),
            None if !self.config.pin_worker => free("`pin_worker` is off"),
            None if self.groups.opened().next().is_none() => free("no NIC is open"),
            None => free("no cores are nearer to the NICs than others"),
        }
    }
}

/// The host memory of the node on which the calling thread runs.
fn device_here(machine: &Topology) -> Option<Device> {
    // SAFETY: only returns a number.
    let cpu = u32::try_from(unsafe { libc::sched_getcpu() }).ok();
    let core = machine.cores.iter().find(|core| cpu.is_some_and(|cpu| core.cpus.contains(&cpu)));
    core.or(machine.cores.first()).map(|core| Device::Host(core.node))
}
