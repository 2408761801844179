//! Machines of a few lines each, written out as the sysfs tree that Linux would show.
//!
//! ```text
//! cpus 0-47 node 0 threads +96       cores 0 to 47 of node 0, whose second threads are 96 to 143
//! gpu PATH node 0                    PATH from the host bridge down: pci0000:44/0000:44:00.0/...
//! nic NAME PATH node 0 driver efa rate 100 [link Ethernet] [state DOWN] [slot 16x16] [net eth0]
//!     [function 0000:44:00.0]        of which it is a virtual function
//! distances 0 10 12 32               how far node 0 is from each node
//! ```
//!
//! `node -` leaves out the folder of nodes, as a kernel without NUMA does; `node -1` is a device whose firmware does
//! not say.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// A tree in a folder of its own, removed on drop.
pub(crate) struct Machine {
    pub(crate) root: PathBuf,
}

impl Machine {
    /// The one described in `tests/machines`.
    pub(crate) fn named(name: &str) -> Self {
        Self::from(&described(name))
    }

    pub(crate) fn from(described: &str) -> Self {
        // ORDERING: a number that nobody else has; nothing is published by it.
        let number = NEXT.fetch_add(1, Relaxed);
        let root = std::env::temp_dir().join(format!("anyfabric-machine-{}-{number}", std::process::id()));
        let machine = Self { root };
        machine.write("devices/system/cpu/online", "");
        for line in described.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[0] {
                "cpus" => machine.cpus(words[1], option(&words, "node"), option(&words, "threads")),
                "gpu" => machine.pci(words[1], "0x10de", "0x030200", option(&words, "node")),
                "nic" => machine.nic(words[1], words[2], &words),
                "distances" => {
                    machine.write(&format!("devices/system/node/node{}/distance", words[1]), &words[2..].join(" "));
                }
                other => panic!("unknown line {other}"),
            }
        }
        machine
    }

    fn cpus(&self, range: &str, node: Option<&str>, stride: Option<&str>) {
        let (first, last) = range.split_once('-').expect("a range");
        let (first, last): (u32, u32) = (first.parse().expect("a CPU"), last.parse().expect("a CPU"));
        let stride: u32 = stride.map_or(0, |stride| stride.parse().expect("a stride"));
        let mut list = format!("{first}-{last}");
        if stride > 0 {
            write!(list, ",{}-{}", first + stride, last + stride).expect("a string");
        }
        for cpu in first..=last {
            let threads = if stride > 0 { format!("{cpu},{}", cpu + stride) } else { cpu.to_string() };
            for thread in threads.split(',') {
                self.write(&format!("devices/system/cpu/cpu{thread}/topology/thread_siblings_list"), &threads);
            }
        }
        if let Some(node) = node.filter(|node| *node != "-") {
            self.write(&format!("devices/system/node/node{node}/cpulist"), &list);
        }
        let online = self.root.join("sys/devices/system/cpu/online");
        let before = fs::read_to_string(&online).expect("a list").trim().to_owned();
        let all = if before.is_empty() { list } else { format!("{before},{list}") };
        self.write("devices/system/cpu/online", &all);
    }

    fn pci(&self, path: &str, vendor: &str, class: &str, node: Option<&str>) {
        let address = path.rsplit('/').next().expect("a path");
        for (file, content) in [("vendor", vendor), ("class", class), ("numa_node", node.unwrap_or("-1"))] {
            self.write(&format!("devices/{path}/{file}"), content);
        }
        self.write(&format!("devices/{path}/uevent"), &format!("PCI_SLOT_NAME={address}"));
        self.link(&format!("../../../devices/{path}"), &format!("bus/pci/devices/{address}"));
    }

    fn nic(&self, name: &str, path: &str, words: &[&str]) {
        self.pci(path, "0x15b3", "0x020000", option(words, "node"));
        let device = format!("devices/{path}");
        let driver = option(words, "driver").unwrap_or("mlx5_core");
        fs::create_dir_all(self.root.join(format!("sys/bus/pci/drivers/{driver}"))).expect("a folder");
        let up = "../".repeat(path.split('/').count() + 1);
        self.link(&format!("{up}bus/pci/drivers/{driver}"), &format!("{device}/driver"));
        if let Some(function) = option(words, "function") {
            self.link(&format!("../{function}"), &format!("{device}/physfn"));
        }
        if let Some((per_lane, num_lanes)) = option(words, "slot").and_then(|slot| slot.split_once('x')) {
            self.write(&format!("{device}/current_link_speed"), &format!("{per_lane}.0 GT/s PCIe"));
            self.write(&format!("{device}/current_link_width"), num_lanes);
        }
        if let Some(net) = option(words, "net") {
            self.write(&format!("{device}/net/{net}/dev_port"), "0");
        }
        let port = format!("{device}/infiniband/{name}/ports/1");
        let state = option(words, "state").unwrap_or("ACTIVE");
        let number = if state == "ACTIVE" { 4 } else { 1 };
        self.write(&format!("{port}/state"), &format!("{number}: {state}"));
        self.write(&format!("{port}/link_layer"), option(words, "link").unwrap_or("Unspecified"));
        let rate = option(words, "rate").unwrap_or("0");
        self.write(&format!("{port}/rate"), &format!("{rate} Gb/sec (4X EDR)"));
        self.link("../..", &format!("{device}/infiniband/{name}/device"));
        self.link(&format!("../../devices/{path}/infiniband/{name}"), &format!("class/infiniband/{name}"));
    }

    fn write(&self, path: &str, content: &str) {
        let file = self.root.join("sys").join(path);
        fs::create_dir_all(file.parent().expect("a folder")).expect("a folder");
        fs::write(file, format!("{content}\n")).expect("a file");
    }

    fn link(&self, target: &str, path: &str) {
        let link = self.root.join("sys").join(path);
        fs::create_dir_all(link.parent().expect("a folder")).expect("a folder");
        symlink(target, link).expect("a link");
    }
}

/// The lines of a machine in `tests/machines`.
pub(crate) fn described(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../transports/tests/machines");
    fs::read_to_string(folder.join(format!("{name}.machine"))).expect("a machine")
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

fn option<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    words.iter().position(|word| *word == name).map(|at| words[at + 1])
}

static NEXT: AtomicU32 = AtomicU32::new(0);
