"""Cards that can do RDMA: which are for something else, and what mends those that nothing drives."""

from __future__ import annotations

import shutil

import pytest

from .conftest import SWITCHES


def card(machine, function, *, vendor="0x15b3", device="0x101d", driver=""):
    """One more function beside the first NIC, without an RDMA device."""
    path = "/".join((*SWITCHES[0], "0000:12:01.0", f"0000:14:00.{function}"))
    machine.pci(path, vendor, device, "0x020000", node=0)
    if driver:
        machine.link(f"sys/devices/{path}/driver", "../" * 6 + f"bus/pci/drivers/{driver}")
    return f"sys/devices/{path}"


def found(machine):
    return [row for row in machine.findings() if row[0] == "modules"]


def test_what_serves_virtual_machines_is_left_alone(machine):
    card(machine, 1, driver="vfio-pci")
    machine.link(f"{card(machine, 2, device='0x101e')}/physfn", "../0000:14:00.0")
    assert found(machine) == []


def test_the_second_port_of_a_bond_has_the_device_of_the_first(machine):
    second = card(machine, 1, driver="mlx5_core")
    machine.write(f"{second}/net/eth9/dev_port", "0")
    machine.link(f"{second}/net/eth9/master", "../" * 7 + "virtual/net/bond0")
    assert len(found(machine)) == 1, "a bond that no RDMA device is on"
    machine.port(0, "gid_attrs/ndevs/0", "bond0")
    assert found(machine) == []


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_module_that_is_loaded_need_not_be(machine, is_loaded):
    card(machine, 1, driver="mlx5_core")
    if is_loaded:
        machine.write("sys/module/mlx5_ib/refcnt", "0")
    ((_, level, subject, _, mend),) = found(machine)
    assert (level, subject) == ("warning", "0000:14:00.1")
    assert mend.startswith(
        "devlink dev param set pci/0000:14:00.1 name enable_rdma" if is_loaded else "modprobe"
    )


def test_a_container_loads_no_module(machine):
    machine.write(".dockerenv", "")
    card(machine, 1, driver="mlx5_core")
    ((*_, mend),) = found(machine)
    assert mend.startswith("on the host: modprobe mlx5_ib")


@pytest.mark.parametrize("device", ["0x1750", "0x1760"])
def test_thor_without_its_module(machine, device):
    for folder in ("sys/class/infiniband", "sys/class/infiniband_verbs"):
        shutil.rmtree(machine.root / folder)
    for folder in machine.root.glob("sys/devices/**/0000:*4:00.0"):
        (folder / "vendor").write_text("0x14e4\n")
        (folder / "device").write_text(f"{device}\n")
        shutil.rmtree(folder / "infiniband")
    rows = found(machine)
    assert [row[1:3] for row in rows] == [("broken", "0000:14:00.0"), ("broken", "0000:84:00.0")]
    assert all(row[4] == "modprobe bnxt_re" for row in rows)
