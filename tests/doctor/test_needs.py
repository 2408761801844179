"""What is needed: what nobody uses is no fault, and what was asked for by name is one."""

from __future__ import annotations

from dataclasses import replace

import pytest

import anyfabric as af
from anyfabric.doctor import TRIALS, System, diagnose
from anyfabric.doctor.pair import pairs, ports
from anyfabric.doctor.trial import End, Way, allowed, ways


def rows(system, *levels):
    told = diagnose(system).findings
    return [(check.name, row.level, row.subject) for check, row in told if row.level in levels]


def slow_card(machine):
    """The second NIC is a card of another kind, for something else."""
    machine.port(1, "rate", "50 Gb/sec (2X EDR)")
    machine.write("sys/bus/pci/devices/0000:84:00.0/device", "0x1015")


def test_a_port_that_no_group_uses_needs_no_address(machine):
    slow_card(machine)
    machine.gids(1)
    machine.write("sys/class/net/eth1/mtu", "1500")
    assert machine.system.topology.nics[1].passed_over
    assert rows(machine.system, "broken") == []
    assert {row for row in rows(machine.system, "warning", "note") if row[2] != "0000:83:00.0"} == {
        ("gid", "note", "mlx5_1")
    }
    # But whoever names it means it.
    assert ("gid", "broken", "mlx5_1") in rows(replace(machine.system, named=("mlx5_1",)), "broken")


def test_a_card_like_the_others_that_is_too_slow_to_be_used_is_told(machine):
    machine.port(1, "rate", "10 Gb/sec (1X SDR)")
    assert "less than a quarter" in machine.system.topology.nics[1].passed_over
    assert ("speed", "warning", "mlx5_1") in rows(machine.system, "warning")
    slow_card(machine)
    assert "speed" not in {row[0] for row in rows(machine.system, "warning")}


@pytest.mark.parametrize("name", ["mlx5_1", "mlx5_1:1", "mlx5_1-rdm", "eth1"])
def test_a_named_port_that_is_down_is_not_replaced_by_another(machine, name):
    machine.port(1, "state", "1: DOWN")
    assert rows(machine.system, "broken") == []
    assert rows(replace(machine.system, named=(name,)), "broken") == [("link", "broken", "mlx5_1")]
    assert rows(replace(machine.system, named=("mlx5_0",)), "broken") == []


def test_who_leaves_rdma_out_is_not_troubled_by_it(machine):
    machine.limit(8 << 20)
    machine.gids(0)
    for changes in ({"enabled": ("shm", "tcp")}, {"required": "tcp"}):
        system = replace(machine.system, **changes)
        found = diagnose(system)
        assert not found.is_broken
        assert {("locked-memory", "note", ""), ("gid", "note", "mlx5_0")} <= set(rows(system, "note"))
        assert "ulimit" in next(row.mend for check, row in found.findings if check.name == "locked-memory")
    machine.write("proc/sys/kernel/osrelease", "4.19.0")
    assert rows(replace(machine.system, enabled=("shm",)), "broken") == [("kernel", "broken", "")]


def test_what_fails_over_a_nic_that_nobody_uses_is_no_fault(machine, monkeypatch):
    slow_card(machine)

    def fail(*_, **__):
        raise af.ResourceExhausted("out of locked memory")

    monkeypatch.setattr(End, "__init__", fail)
    told = diagnose(machine.system, TRIALS).findings
    levels = {row.subject: row.level for _, row in told}
    assert levels == {"shm": "broken", "tcp": "broken", "verbs mlx5_0": "broken", "verbs mlx5_1": "warning"}
    told = diagnose(replace(machine.system, enabled=("tcp", "shm"), required="tcp"), TRIALS).findings
    assert [row.subject for _, row in told] == ["tcp"]


def test_pairs_are_of_one_fabric_and_of_nics_in_use(machine):
    """Two machines with a NIC for InfiniBand and one for Ethernet, of which the engine uses one kind."""
    machine.port(1, "link_layer", "InfiniBand")
    system = machine.system
    hello = {
        "ways": [{"transport": way.transport, "nic": way.nic} for way in ways(system.topology)],
        "ports": ports(system),
    }
    assert {port["name"] for port in hello["ports"]} == {"mlx5_1"}
    found = [(ours, theirs) for ours, (_, theirs) in pairs(system, hello) if ours.nic]
    assert found == [(Way("verbs", "mlx5_1"), Way("verbs", "mlx5_1"))]
    # A partner that offers nothing else, and says so.
    hello["ports"] = [{"name": "mlx5_0", "fabric": "ethernet"}]
    assert [theirs for ours, (_, theirs) in pairs(system, hello) if ours.nic] == []


def test_libfabric_may_do_without_an_rdma_device(tmp_path):
    """By Slingshot's driver, or by a provider or library that the settings name."""
    laptop = System(tmp_path)
    assert diagnose(replace(laptop, required="libfabric")).is_broken
    assert not diagnose(replace(laptop, required="libfabric")).has_nic
    named = replace(laptop, required="libfabric", names_libfabric=True)
    assert not diagnose(named).is_broken
    assert allowed(named) == [Way("libfabric")]
    assert diagnose(replace(named, required="verbs")).is_broken
    (tmp_path / "sys/class/cxi/cxi0").mkdir(parents=True)
    assert allowed(laptop) == [Way("shm"), Way("tcp"), Way("libfabric")]
    found = diagnose(replace(laptop, required="libfabric"))
    assert (found.is_broken, found.has_nic) == (False, True)


def test_a_library_that_the_settings_name_is_the_one(machine):
    there = replace(machine.system, verbs_library="/nowhere/libibverbs.so.1")
    assert "/nowhere/libibverbs.so.1 is not installed" in {row.found for _, row in diagnose(there).findings}
    machine.remove("usr/lib/x86_64-linux-gnu/libibverbs.so.1")
    assert [row[0] for row in rows(machine.system, "broken")] == ["provider"]
    machine.write("opt/rdma/libibverbs.so.1", "")
    assert rows(replace(machine.system, verbs_library="/opt/rdma/libibverbs.so.1"), "broken") == []
    machine.remove("usr/lib/x86_64-linux-gnu/libibverbs")
    machine.write("opt/rdma/libibverbs/libmlx5-rdmav34.so", "")
    assert rows(replace(machine.system, verbs_library="/opt/rdma/libibverbs.so.1"), "broken") == []


def test_a_provider_that_is_half_installed(machine):
    def found():
        return [
            (row.level, row.found) for check, row in diagnose(machine.system).findings if row.level != "ok"
        ]

    machine.write("etc/os-release", "ID=debian")
    assert found() == [("note", "nothing in /etc/libibverbs.d names mlx5: libibverbs may not load it")]
    machine.write("etc/libibverbs.d/rxe.driver", "driver rxe")
    assert found() == [("broken", "nothing in /etc/libibverbs.d names mlx5: libibverbs does not load it")]
    machine.write("etc/libibverbs.d/mlx5.driver", "# comment\ndriver  mlx5")
    assert found() == []
    provider = "usr/lib/x86_64-linux-gnu/libibverbs/libmlx5-rdmav34.so"
    machine.remove(provider)
    machine.link(provider, "../libmlx5.so.1.24.44.0")
    assert found() == [("broken", "libibverbs has no provider mlx5 for the driver mlx5_core")] * 2
    machine.write("usr/lib/x86_64-linux-gnu/libmlx5.so.1.24.44.0", "")
    assert found() == []
