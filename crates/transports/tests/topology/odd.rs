//! Machines on which a simple reading of the tree misleads: a host bridge for every device, a hypervisor's bus, several
//! functions of one port, nodes without NICs, switches below switches.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;

use anyfabric_plan::{Device, Distance, Request, Topology};
use anyfabric_transports::sys::read_topology;

use crate::machine::Machine;
use crate::{gpu_nics, names, read};

/// Why each NIC that is passed over is.
fn passed_over(topology: &Topology) -> BTreeMap<String, String> {
    let (_, passed_over) = topology.usable(&Request::default());
    passed_over.into_iter().map(|(idx, why)| (topology.nics[idx].name.clone(), why)).collect()
}

fn distances(topology: &Topology, request: &Request<'_>) -> Vec<Distance> {
    let groups = topology.groups(request);
    let of_gpus = groups.iter().filter(|group| matches!(group.device, Device::Gpu(_)));
    of_gpus.flat_map(|group| &group.nics).map(|(_, distance)| *distance).collect()
}

#[test]
fn p4d_has_one_nic_for_two_gpus() {
    let p4d = read("aws-p4d.24xlarge");
    let chosen = gpu_nics(&p4d, &Request::default());
    let expected = ["rdmap16s27", "rdmap32s27", "rdmap144s27", "rdmap160s27"];
    for (gpu, nics) in chosen.iter().enumerate() {
        assert_eq!(*nics, names(&[expected[gpu / 2]]));
    }
    assert!(distances(&p4d, &Request::default()).iter().all(|distance| *distance == Distance::HostBridge));
}

#[test]
fn gb200_has_a_domain_for_every_device_and_two_nics_on_each_node() {
    let tray = read("gb200-nvl72");
    assert_eq!((tray.cores.len(), tray.gpus.len(), tray.nics.len()), (144, 4, 8));
    assert_eq!(tray.gpus[3].pci, "0019:01:00.0");
    assert_eq!(gpu_nics(&tray, &Request::default()).concat(), names(&["mlx5_0", "mlx5_1", "mlx5_4", "mlx5_5"]));
    assert!(distances(&tray, &Request::default()).iter().all(|distance| *distance == Distance::Node));
    let why = passed_over(&tray);
    assert_eq!(why.keys().cloned().collect::<Vec<_>>(), names(&["mlx5_2", "mlx5_3", "mlx5_6", "mlx5_7"]));
    assert_eq!(why["mlx5_3"], "its port is down");
}

#[test]
fn what_a_hypervisor_has_above_its_host_bridges_brings_nothing_nearer() {
    let azure = read("azure-nd-h100-v5");
    let chosen = gpu_nics(&azure, &Request::default());
    for (gpu, nics) in chosen.iter().enumerate() {
        assert_eq!(*nics, [format!("mlx5_ib{gpu}")]);
    }
    let four = Request { nics_per_device: Some(4), ..Request::default() };
    for (gpu, nics) in gpu_nics(&azure, &four).iter().enumerate() {
        let node = gpu / 4;
        assert!(
            nics.iter().all(|name| (4 * node..4 * node + 4).any(|idx| *name == format!("mlx5_ib{idx}"))),
            "{nics:?}"
        );
    }
    assert!(distances(&azure, &four).iter().all(|distance| *distance == Distance::Node));
    assert_eq!(azure.nics[0].place.path[0], "pcif6b4:00");
}

#[test]
fn nodes_without_a_nic_take_those_of_their_socket() {
    let dgx = read("dgx-a100");
    assert_eq!(gpu_nics(&dgx, &Request::default()).concat().len(), 8);
    let mut all = gpu_nics(&dgx, &Request::default()).concat();
    all.dedup();
    assert_eq!(all.len(), 8, "every NIC serves one GPU: {all:?}");
    for group in dgx.groups(&Request::default()) {
        let Device::Host(node) = group.device else { continue };
        assert_eq!(group.nics.len(), if node % 2 == 1 { 2 } else { 4 });
        for (idx, _) in &group.nics {
            assert_eq!(dgx.nics[*idx].place.node.unwrap() / 4, node / 4, "node {node} has {}", dgx.nics[*idx].name);
        }
    }
    assert_eq!(passed_over(&dgx).into_keys().collect::<Vec<_>>(), names(&["mlx5_4", "mlx5_5"]));
}

#[test]
fn gpus_below_a_switch_of_switches_take_the_nic_beside_them() {
    let switches = "pci0000:17/0000:17:00.0/0000:18:00.0";
    let mut lines = String::from("cpus 0-7 node 0\n");
    for (idx, switch) in ["0000:19:00.0", "0000:19:10.0"].iter().enumerate() {
        lines += &format!("nic mlx5_{idx} {switches}/{switch}/0000:2{idx}:00.0 node 0 link InfiniBand rate 100\n");
        for gpu in 0..2 {
            lines += &format!("gpu {switches}/{switch}/0000:3{idx}:0{gpu}.0 node 0\n");
        }
    }
    let read = read_topology(&Machine::from(&lines).root);
    assert_eq!(gpu_nics(&read, &Request::default()).concat(), names(&["mlx5_0", "mlx5_0", "mlx5_1", "mlx5_1"]));
}

#[test]
fn functions_of_one_port_are_one_nic() {
    let bridge = "pci0000:17/0000:17:00.0";
    let mut lines = format!("cpus 0-7 node 0\ngpu {bridge}/0000:16:00.0 node 0\n");
    for (idx, function) in ["0000:18:00.0", "0000:18:00.1"].iter().enumerate() {
        lines += &format!("nic mlx5_{idx} {bridge}/{function} node 0 link Ethernet rate 100\n");
        for vf in 0..4 {
            let name = format!("mlx5_{}", 2 + 4 * idx + vf);
            let address = format!("0000:18:0{idx}.{}", 2 + vf);
            lines += &format!("nic {name} {bridge}/{address} node 0 link Ethernet rate 100 function {function}\n");
        }
    }
    // Faster than the two together, but not than with their virtual functions.
    lines += &format!("nic mlx5_10 {bridge}/0000:19:00.0 node 0 link InfiniBand rate 400\n");
    let machine = Machine::from(&lines);
    let read = || read_topology(&machine.root);
    assert_eq!(gpu_nics(&read(), &Request::default()), [names(&["mlx5_10"])]);
    assert_eq!(passed_over(&read())["mlx5_3"], "a part of mlx5_0, whose port it shares");
    let state = |name: &str| machine.root.join(format!("sys/class/infiniband/{name}/ports/1/state"));
    std::fs::write(state("mlx5_10"), "1: DOWN\n").unwrap();
    assert_eq!(gpu_nics(&read(), &Request::default()), [names(&["mlx5_0", "mlx5_1"])]);
    // A container without the physical function has one of its virtual ones.
    std::fs::remove_file(machine.root.join("sys/class/infiniband/mlx5_0")).unwrap();
    assert_eq!(gpu_nics(&read(), &Request::default()), [names(&["mlx5_1", "mlx5_2"])]);
    let named = names(&["mlx5_2", "mlx5_3"]);
    let both = Request { nics: &named, nics_per_device: Some(2), ..Request::default() };
    assert_eq!(gpu_nics(&read(), &both)[0], named);
}

#[test]
fn devices_for_management_are_no_nics() {
    let machine = Machine::from(
        "cpus 0-3 node 0\n\
         nic mlx5_0 pci0000:17/0000:17:00.0/0000:18:00.0 node 0 link InfiniBand rate 800\n\
         nic smi1 pci0000:17/0000:17:00.0/0000:18:00.0/0 node 0 link InfiniBand rate 800\n",
    );
    let listed = || -> Vec<String> { read_topology(&machine.root).nics.into_iter().map(|nic| nic.name).collect() };
    // A container that hides which devices programs can open.
    assert_eq!(listed(), ["smi1", "mlx5_0"]);
    let verbs = machine.root.join("sys/class/infiniband_verbs/uverbs0");
    std::fs::create_dir_all(&verbs).unwrap();
    std::fs::write(verbs.join("ibdev"), "mlx5_0\n").unwrap();
    assert_eq!(listed(), ["mlx5_0"]);
    // What is listed there alone says nothing of the others.
    std::fs::write(verbs.join("ibdev"), "mlx5_7\n").unwrap();
    assert_eq!(listed(), ["smi1", "mlx5_0"]);
}

#[test]
fn a_virtual_machine_that_says_nothing_still_divides_its_nics() {
    let mut lines = String::from("cpus 0-15 node -\n");
    for idx in 0..4 {
        lines += &format!("gpu pci0000:00/0000:00:0{idx}.0/0000:1{idx}:00.0 node -1\n");
        lines +=
            &format!("nic mlx5_{idx} pci0000:00/0000:00:1{idx}.0/0000:2{idx}:00.0 node -1 link Ethernet rate 200\n");
    }
    let read = read_topology(&Machine::from(&lines).root);
    assert_eq!(gpu_nics(&read, &Request::default()).concat(), names(&["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3"]));
    let groups = read.groups(&Request::default());
    assert_eq!(groups[0].nics.len(), 4, "host memory has all, at an unknown distance");
    assert!(groups.iter().all(|group| group.cpus.is_empty()) || groups[0].cpus.len() > 1);
}

/// A speed that cannot be read is no slow one.
#[test]
fn a_nic_of_unknown_speed_is_not_passed_over() {
    let lines = "cpus 0-3 node 0\n\
         nic mlx5_0 pci0000:10/0000:10:01.0/0000:11:00.0 node 0 link InfiniBand rate 400\n\
         nic mlx5_1 pci0000:20/0000:20:01.0/0000:21:00.0 node 0 link InfiniBand rate 10\n\
         nic mlx5_2 pci0000:30/0000:30:01.0/0000:31:00.0 node 0 link InfiniBand rate unknown\n";
    let read = read_topology(&Machine::from(lines).root);
    assert_eq!(read.usable(&Request::default()).0, [0, 2]);
}

/// In a container sysfs shows every device of the host; it was given those that have a node.
#[test]
fn a_container_takes_the_nics_and_counts_the_gpus_that_it_was_given() {
    let hgx = Machine::named("hgx-h100");
    let file = |path: &str, content: &str| {
        std::fs::create_dir_all(hgx.root.join(path).parent().unwrap()).unwrap();
        std::fs::write(hgx.root.join(path), content).unwrap();
    };
    for idx in 0..10 {
        file(&format!("sys/class/infiniband_verbs/uverbs{idx}/ibdev"), &format!("mlx5_{idx}\n"));
    }
    // A record without /dev says nothing of it.
    assert_eq!(read_topology(&hgx.root).usable(&Request::default()).0.len(), 8);
    for idx in [2, 8] {
        file(&format!("dev/infiniband/uverbs{idx}"), "");
    }
    let bare = read_topology(&hgx.root);
    assert_eq!(bare.usable(&Request::default()).0, [2, 8]);
    assert_eq!(passed_over(&bare)["mlx5_0"], "it has no device node in /dev/infiniband: not given to this container?");
    assert_eq!(gpu_nics(&bare, &Request::default())[2], names(&["mlx5_2"]));
    assert_eq!(gpu_nics(&bare, &Request::default())[6], names(&["mlx5_8"]));
    // Whoever names one means it.
    let named = names(&["mlx5_0"]);
    assert_eq!(bare.usable(&Request { nics: &named, ..Request::default() }).0, [0]);

    assert_eq!(bare.device("cuda:1", None), Ok(Device::Gpu(1)));
    for gpu in [2, 6] {
        file(&format!("proc/driver/nvidia/gpus/{}/information", bare.gpus[gpu].pci), "");
    }
    let given = read_topology(&hgx.root);
    assert_eq!(given.gpus.len(), 8, "NICs are divided as everywhere on the machine");
    assert_eq!(given.device("cuda:1", None), Ok(Device::Gpu(6)));
    assert_eq!(given.device("cuda:0", Some("1,0")), Ok(Device::Gpu(6)));
    assert!(given.device("cuda:2", None).is_err());
}

/// A scalable function is a device of its own below the card, which the node is written at.
#[test]
fn a_scalable_function_is_where_its_card_is() {
    let machine = Machine::from(
        "cpus 0-3 node 0\ncpus 4-7 node 1\n\
         gpu pci0000:10/0000:10:01.0/0000:11:00.0 node 0\n\
         gpu pci0000:80/0000:80:01.0/0000:81:00.0 node 1\n\
         nic mlx5_0 pci0000:90/0000:90:01.0/0000:91:00.0 node 1 link Ethernet rate 200\n",
    );
    let card = machine.root.join("sys/devices/pci0000:90/0000:90:01.0/0000:91:00.0");
    let function = card.join("mlx5_core.sf.2");
    std::fs::create_dir(&function).unwrap();
    std::fs::rename(card.join("infiniband"), function.join("infiniband")).unwrap();
    let link = machine.root.join("sys/class/infiniband/mlx5_0");
    std::fs::remove_file(&link).unwrap();
    symlink(function.join("infiniband/mlx5_0"), &link).unwrap();
    let read = read_topology(&machine.root);
    assert_eq!((read.nics[0].pci.as_deref(), read.nics[0].place.node), (Some("0000:91:00.0"), Some(1)));
    assert_eq!(distances(&read, &Request::default()), [Distance::System, Distance::Node]);
}

/// A virtual machine may have one host bridge for everything, and nodes nonetheless.
#[test]
fn one_host_bridge_of_two_nodes_is_not_near() {
    let mut lines = String::from("cpus 0-3 node 0\ncpus 4-7 node 1\n");
    for idx in 0..4 {
        let node = idx / 2;
        lines += &format!("gpu pci0000:00/0000:00:1{idx}.0 node {node}\n");
        lines +=
            &format!("nic mlx5_{idx} pci0000:00/0000:00:0{}.0 node {} link Ethernet rate 200\n", 4 + idx, 1 - node);
    }
    let read = read_topology(&Machine::from(&lines).root);
    assert_eq!(gpu_nics(&read, &Request::default()).concat(), names(&["mlx5_2", "mlx5_3", "mlx5_0", "mlx5_1"]));
    assert_eq!(distances(&read, &Request::default()), [Distance::HostBridge; 4]);
}

/// Every file of a machine in turn: a folder, a loop of links, nothing, garbage, the largest number, more than memory has.
#[test]
fn files_that_are_not_what_they_should_be_are_unknown() {
    let most = u32::MAX.to_string();
    for spoilt in 0..6 {
        let machine = Machine::named("workstation");
        let mut files = Vec::new();
        find(&machine.root.join("sys"), &mut files);
        assert!(files.len() > 50);
        let whole = read_topology(&machine.root);
        for file in files {
            let link = std::fs::read_link(&file).ok();
            let content = std::fs::read(&file);
            std::fs::remove_file(&file).unwrap();
            match spoilt {
                0 => std::fs::create_dir(&file).unwrap(),
                1 => symlink(file.file_name().unwrap(), &file).unwrap(),
                2 => (),
                3 => std::fs::write(&file, b"\xff\xfe 99999999999999999999,-,:\n\x00 0x").unwrap(),
                4 => std::fs::write(&file, &most).unwrap(),
                _ => std::fs::File::create(&file).unwrap().set_len(1 << 40).unwrap(),
            }
            let read = read_topology(&machine.root);
            for request in [Request::default(), Request { nics_per_device: Some(8), ..Request::default() }] {
                assert_eq!(read.groups(&request).len(), read.devices().len());
            }
            assert!(read.nics.len() <= whole.nics.len() && read.gpus.len() <= whole.gpus.len(), "{}", file.display());
            let _ = std::fs::remove_dir(&file).or_else(|_| std::fs::remove_file(&file));
            match link {
                Some(target) => symlink(target, &file).unwrap(),
                None => std::fs::write(&file, content.unwrap()).unwrap(),
            }
        }
        assert_eq!(read_topology(&machine.root), whole);
    }
}

/// tar believes the size that sysfs states for every file, 4096, and fills the rest with zeros.
#[test]
fn a_tree_that_was_packed_by_tar_is_the_same() {
    let machine = Machine::named("workstation");
    let (whole, mut files) = (read_topology(&machine.root), Vec::new());
    find(&machine.root.join("sys"), &mut files);
    for file in files.iter().filter(|file| !file.is_symlink()) {
        std::fs::File::options().write(true).open(file).unwrap().set_len(4096).unwrap();
    }
    assert_eq!(read_topology(&machine.root), whole);
}

/// Files and links below a folder, links not followed.
fn find(folder: &std::path::Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap().is_dir() {
            true => find(&entry.path(), found),
            false => found.push(entry.path()),
        }
    }
}
