//! Topologies of real kinds of machines, and what is chosen on them.

// A test may unwrap: its panic is the report.
#![allow(clippy::unwrap_used)]

mod machine;
mod odd;

use std::path::Path;

use anyfabric_plan::{Device, Distance, Fabric, Request, Topology};
use anyfabric_transports::sys::{allowed_cpus, parse_cpu_list, read_topology};

use crate::machine::Machine;

fn read(name: &str) -> Topology {
    let machine = Machine::named(name);
    read_topology(&machine.root)
}

/// Names of the NICs of each GPU's group.
fn gpu_nics(topology: &Topology, request: &Request<'_>) -> Vec<Vec<String>> {
    let groups = topology.groups(request);
    let of_gpus = groups.iter().filter(|group| matches!(group.device, Device::Gpu(_)));
    of_gpus.map(|group| group.nics.iter().map(|(idx, _)| topology.nics[*idx].name.clone()).collect()).collect()
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn p5_has_four_nics_behind_the_switch_of_each_gpu() {
    let p5 = read("aws-p5.48xlarge");
    assert_eq!((p5.cores.len(), p5.gpus.len(), p5.nics.len()), (96, 8, 32));
    assert_eq!(p5.nics[0].fabric, Fabric::Efa);
    assert_eq!((p5.nics[0].gbps, p5.nics[0].is_up), (100, true));
    assert_eq!(p5.gpus[0].pci, "0000:53:00.0");
    let chosen = gpu_nics(&p5, &Request::default());
    assert_eq!(chosen[0], names(&["rdmap79s0", "rdmap80s0", "rdmap81s0", "rdmap82s0"]));
    assert_eq!(chosen[7], names(&["rdmap198s0", "rdmap199s0", "rdmap200s0", "rdmap201s0"]));
    for group in p5.groups(&Request::default()).iter().filter(|group| matches!(group.device, Device::Gpu(_))) {
        assert!(group.nics.iter().all(|(_, distance)| *distance == Distance::Switch));
    }
    // Host memory takes one NIC of each switch of its node.
    let host = &p5.groups(&Request::default())[1];
    assert_eq!(host.device, Device::Host(1));
    let switches: Vec<&str> = host.nics.iter().map(|(idx, _)| p5.nics[*idx].place.path[0].as_str()).collect();
    assert_eq!(switches, ["pci0000:88", "pci0000:99", "pci0000:aa", "pci0000:bb"]);
}

#[test]
fn p5en_divides_four_nics_between_two_gpus() {
    let p5en = read("aws-p5en.48xlarge");
    let chosen = gpu_nics(&p5en, &Request::default());
    assert_eq!(chosen[0], names(&["rdmap85s0", "rdmap86s0"]));
    assert_eq!(chosen[1], names(&["rdmap87s0", "rdmap88s0"]));
    assert_eq!(chosen[6], names(&["rdmap160s0", "rdmap161s0"]));
    let mut all: Vec<String> = chosen.concat();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 16, "every NIC serves one GPU");
    // Whoever asks for more than its part shares.
    let four = Request { nics_per_device: Some(4), ..Request::default() };
    assert_eq!(gpu_nics(&p5en, &four)[1].len(), 4);
}

#[test]
fn hgx_has_one_nic_beside_each_gpu_and_the_ethernet_card_is_for_something_else() {
    let hgx = read("hgx-h100");
    let chosen = gpu_nics(&hgx, &Request::default());
    let expected = ["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_5", "mlx5_6", "mlx5_7", "mlx5_8", "mlx5_9"];
    assert_eq!(chosen, expected.map(|name| names(&[name])));
    let (_, passed_over) = hgx.usable(&Request::default());
    let why: Vec<(&str, &str)> =
        passed_over.iter().map(|(idx, why)| (hgx.nics[*idx].name.as_str(), why.as_str())).collect();
    let other = "another kind of fabric than most of the bandwidth here";
    assert_eq!(why, [("mlx5_3", other), ("mlx5_4", other)]);
    // A second NIC is on the same node, and not always the same one.
    let two = Request { nics_per_device: Some(2), ..Request::default() };
    for group in hgx.groups(&two).iter().filter(|group| matches!(group.device, Device::Gpu(_))) {
        assert_eq!(
            group.nics.iter().map(|(_, distance)| *distance).collect::<Vec<_>>(),
            [Distance::Switch, Distance::Node]
        );
    }
    let mut uses = [0; 10];
    hgx.groups(&two)[2..].iter().flat_map(|group| &group.nics).for_each(|(idx, _)| uses[*idx] += 1);
    assert_eq!(uses.iter().max(), Some(&2));
    assert_eq!((hgx.nics[0].slot_gbps, hgx.nics[0].netdevs.clone()), (504, names(&["ib0"])));
}

#[test]
fn whoever_names_a_nic_means_it() {
    let hgx = read("hgx-h100");
    let nics = names(&["mlx5_3", "mlx5_9:1"]);
    let request = Request { nics: &nics, ..Request::default() };
    assert_eq!(gpu_nics(&hgx, &request)[0], names(&["mlx5_3"]));
    assert_eq!(gpu_nics(&hgx, &request)[7], names(&["mlx5_9"]));
    let both = Request { nics_per_device: Some(4), ..request };
    assert_eq!(gpu_nics(&hgx, &both)[7], names(&["mlx5_9", "mlx5_3"]));
}

#[test]
fn workstation_has_no_nodes_and_one_cable() {
    let desk = read("workstation");
    assert_eq!((desk.cores.len(), desk.gpus.len()), (16, 2));
    assert_eq!(desk.devices(), [Device::Host(0), Device::Gpu(0), Device::Gpu(1)]);
    assert_eq!(gpu_nics(&desk, &Request::default()), [names(&["mlx5_0"]), names(&["mlx5_0"])]);
    assert_eq!(desk.distance(Device::Gpu(0), &desk.nics[0]), Distance::HostBridge);
    assert_eq!(desk.distance(Device::Host(0), &desk.nics[0]), Distance::Unknown);
    // 8 lanes of PCIe 3 carry less than the port.
    assert_eq!((desk.nics[0].gbps, desk.nics[0].slot_gbps), (100, 63));
    let (usable, passed_over) = desk.usable(&Request::default());
    assert_eq!(usable, [0]);
    assert_eq!(passed_over[&1], "its port is down");
}

#[test]
fn cores_are_physical_near_and_nobody_elses() {
    let p5 = read("aws-p5.48xlarge");
    let groups = p5.groups(&Request::default());
    let mut taken: Vec<u32> = Vec::new();
    for group in &groups {
        let node = p5.nics[group.nics[0].0].place.node.unwrap();
        let range = if node == 0 { 1..48 } else { 48..96 };
        assert!(group.cpus.len() >= 9, "{group:?}");
        assert!(group.cpus.iter().all(|cpu| range.contains(cpu)), "{group:?}");
        taken.extend(&group.cpus);
    }
    let num_taken = taken.len();
    taken.sort_unstable();
    taken.dedup();
    assert_eq!(taken.len(), num_taken, "no core has two groups");
    // In a container that was given second threads of a few cores.
    let allowed = parse_cpu_list("100-105,150");
    let few = p5.groups(&Request { allowed_cpus: &allowed, ..Request::default() });
    assert_eq!(few[0].cpus, [100]);
    assert!(few.iter().flat_map(|group| &group.cpus).all(|cpu| allowed.contains(cpu)));
    assert!(few[1].cpus.is_empty(), "one core of a node is no choice");
}

#[test]
fn devices_have_names() {
    let p5 = read("aws-p5.48xlarge");
    for device in p5.devices() {
        assert_eq!(p5.device(&p5.name_of(device), None), Ok(device));
    }
    assert_eq!(p5.name_of(Device::Gpu(0)), "gpu:0000:53:00.0");
    assert_eq!(p5.device("cuda:7", None), Ok(Device::Gpu(7)));
    assert_eq!(p5.device("cuda:1", Some("6, 2")), Ok(Device::Gpu(2)));
    for (name, visible) in [
        ("cuda:8", None),
        ("cuda:2", Some("6,2")),
        ("cuda:0", Some("9")),
        ("cuda:0", Some("-1")),
        ("cuda:-1", None),
        ("cuda:", None),
        ("cuda", None),
        ("gpu:0", None),
        ("cpu:2", None),
        ("", None),
    ] {
        let why = p5.device(name, visible).unwrap_err();
        assert!(why.contains("cpu:0, cpu:1, gpu:0000:53:00.0") || why.contains("PCI address"), "{name}: {why}");
    }
    assert!(p5.device("cuda:0", Some("GPU-8f2c")).unwrap_err().contains("GPU-8f2c"));
    let none = Topology::default().device("cuda:0", None).unwrap_err();
    assert_eq!(none, "there is no device cuda:0; this machine has none that can be named");
}

#[test]
fn slow_and_down_nics_are_passed_over() {
    let mixed = Machine::from(
        "cpus 0-3 node 0\n\
         nic mlx5_0 pci0000:00/0000:00:01.0/0000:01:00.0 node 0 link Ethernet rate 25\n\
         nic mlx5_1 pci0000:00/0000:00:02.0/0000:02:00.0 node 0 link Ethernet rate 200\n\
         nic mlx5_2 pci0000:00/0000:00:03.0/0000:03:00.0 node 0 link Ethernet rate 200 state DOWN\n\
         nic rxe0 pci0000:00/0000:00:04.0/0000:04:00.0 node 0 link Ethernet rate 400 net lo\n",
    );
    let topology = read_topology(&mixed.root);
    let (usable, passed_over) = topology.usable(&Request::default());
    let names: Vec<&str> = topology.nics.iter().map(|nic| nic.name.as_str()).collect();
    assert_eq!(names, ["rxe0", "mlx5_0", "mlx5_1", "mlx5_2"]);
    assert_eq!(usable, [2]);
    assert_eq!(passed_over[&1], "25 Gbit/s, less than a quarter of the fastest one's 200");
    assert_eq!(passed_over[&0], "its interface is lo, which reaches this host only");
    let groups = topology.groups(&Request::default());
    assert_eq!(groups[0].nics, [(2, Distance::Node)]);
}

#[test]
fn a_tree_that_lost_its_links_is_read_by_address() {
    let machine = Machine::named("hgx-h100");
    let link = machine.root.join("sys/class/infiniband/mlx5_0");
    let real = link.canonicalize().unwrap();
    std::fs::remove_file(&link).unwrap();
    std::fs::create_dir_all(link.join("ports/1")).unwrap();
    std::fs::create_dir_all(link.join("device")).unwrap();
    for file in ["ports/1/state", "ports/1/rate", "ports/1/link_layer"] {
        std::fs::copy(real.join(file), link.join(file)).unwrap();
    }
    std::fs::write(link.join("device/uevent"), "DRIVER=mlx5_core\nPCI_SLOT_NAME=0000:18:00.0\n").unwrap();
    let topology = read_topology(&machine.root);
    assert_eq!(topology.distance(Device::Gpu(0), &topology.nics[0]), Distance::Switch);
}

#[test]
fn interfaces_are_those_of_the_gids() {
    let machine = Machine::from("cpus 0-1 node 0\nnic a pci0000:00/0000:00:01.0 node 0 rate 100 slot 16x16\n");
    let netdevs = || read_topology(&machine.root).nics[0].netdevs.clone();
    let own = netdevs();
    let table = machine.root.join("sys/class/infiniband/a/ports/1/gid_attrs/ndevs");
    std::fs::create_dir_all(&table).unwrap();
    // A table has many more places than GIDs, and gaps where interfaces were.
    for index in 0..256 {
        let name = match index {
            0 | 1 => "eth0",
            18 => "eth0.7",
            200 => "stray",
            _ => "",
        };
        std::fs::write(table.join(index.to_string()), name).unwrap();
    }
    let mut expected = [own, names(&["eth0", "eth0.7"])].concat();
    expected.sort_unstable();
    assert_eq!(netdevs(), expected);
}

#[test]
fn nothing_and_nonsense_are_no_machine() {
    let empty = read_topology(Path::new("/nonexistent"));
    assert_eq!(empty, Topology::default());
    assert!(empty.groups(&Request::default()).is_empty());
    let machine =
        Machine::from("cpus 0-1 node 0\nnic a pci0000:00/0000:00:01.0 node 7 rate 99999999999999999999 slot -xx\n");
    for file in ["devices/system/cpu/online", "devices/system/node/node0/cpulist"] {
        std::fs::write(machine.root.join("sys").join(file), "0-4294967295,7-3,,x-,\u{0}").unwrap();
    }
    let topology = read_topology(&machine.root);
    assert_eq!(topology.nics.len(), 1);
    topology.groups(&Request { nics_per_device: Some(usize::MAX), ..Request::default() });
    assert_eq!(parse_cpu_list("0-1,4,x,3-2"), [0, 1, 4]);
    assert!(parse_cpu_list(&"0-65535,".repeat(8000)).len() < 1 << 18, "one list is not memory without end");
}

#[test]
fn this_machine_can_be_read() {
    let here = read_topology(Path::new("/"));
    assert!(!here.cores.is_empty());
    assert!(!allowed_cpus(Path::new("/")).is_empty());
    assert_eq!(here.groups(&Request::default()).len(), here.devices().len());
}
