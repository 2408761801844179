"""The machine as Python sees it; what is chosen is tested in Rust, on trees of real kinds of machines."""

from __future__ import annotations

import dataclasses

import pytest

import anyfabric as af


@pytest.fixture
def machine(tmp_path):
    """One node, a GPU and a NIC behind one switch."""
    switch = "pci0000:40/0000:40:01.0/0000:41:00.0"
    write(tmp_path, "devices/system/cpu/online", "0-3")
    for cpu in range(4):
        write(tmp_path, f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", str(cpu))
    write(tmp_path, "devices/system/node/node0/cpulist", "0-3")
    for path, vendor, kind in (
        (f"{switch}/0000:42:00.0/0000:43:00.0", "0x10de", "0x030200"),
        (f"{switch}/0000:42:01.0/0000:44:00.0", "0x15b3", "0x020000"),
    ):
        for name, content in (("vendor", vendor), ("class", kind), ("numa_node", "0")):
            write(tmp_path, f"devices/{path}/{name}", content)
        link(tmp_path, f"bus/pci/devices/{path.rpartition('/')[2]}", f"../../../devices/{path}")
    nic = f"devices/{switch}/0000:42:01.0/0000:44:00.0/infiniband/mlx5_0"
    for name, content in (
        ("state", "4: ACTIVE"),
        ("rate", "400 Gb/sec (4X NDR)"),
        ("link_layer", "Ethernet"),
    ):
        write(tmp_path, f"{nic}/ports/1/{name}", content)
    link(tmp_path, f"{nic}/device", "../..")
    link(tmp_path, "class/infiniband/mlx5_0", f"../../{nic}")
    return tmp_path


def write(root, path, content):
    file = root / "sys" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content + "\n")


def link(root, path, target):
    place = root / "sys" / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


def test_a_recorded_machine(machine):
    found = af.read_topology(machine)
    assert found.num_cores == 4
    (gpu,) = found.gpus
    assert (gpu.pci, gpu.node, gpu.is_given) == ("0000:43:00.0", 0, True)
    (nic,) = found.nics
    assert (nic.name, nic.fabric, nic.state, nic.gbps, nic.pci) == (
        "mlx5_0", "ethernet", "up", 400, "0000:44:00.0")  # fmt: skip
    host, device = found.groups
    assert (host.device, device.device) == ("cpu:0", "gpu:0000:43:00.0")
    assert [(nic.name, nic.distance) for nic in device.nics] == [("mlx5_0", "switch")]
    assert [(nic.name, nic.distance) for nic in host.nics] == [("mlx5_0", "node")]
    assert not set(host.cpus) & set(device.cpus)


def test_named_nics(machine):
    found = af.read_topology(machine, nics=["mlx5_7"])
    assert found.nics[0].passed_over == "not among the NICs that were named"
    assert all(group.nics == () for group in found.groups)


@pytest.mark.parametrize("number", [0, 9, -1])
def test_nics_per_device_has_a_range(number):
    with pytest.raises(af.InvalidArgument, match="expected 1 to 8"):
        af.read_topology(nics_per_device=number)


def test_this_machine():
    found = af.read_topology()
    assert found.num_cores > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.num_cores = 1
