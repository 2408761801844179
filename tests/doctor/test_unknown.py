"""What cannot be read is not guessed: a note says so, and nothing is called broken for it."""

from __future__ import annotations

import pytest


def no_version(machine):
    machine.write("proc/sys/kernel/osrelease", "garbage")


def no_kinds_of_gids(machine):
    machine.remove("sys/class/infiniband/mlx5_1/ports/1/gid_attrs")


def no_rate(machine):
    machine.port(0, "rate", "")


def no_limits(machine):
    machine.remove("proc/self/limits")


def kernel_that_takes_over_what_is_newer(machine):
    machine.write("proc/sys/kernel/osrelease", "4.18.0-553.el8_10.x86_64")


@pytest.mark.parametrize(
    ("hide", "told"),
    [
        (no_version, [("kernel", "the kernel's version cannot be read")]),
        (no_kinds_of_gids, [("gid", "the kinds of its GIDs cannot be read")]),
        (no_rate, []),
        (no_limits, [("locked-memory", "the limit cannot be read")]),
        (
            kernel_that_takes_over_what_is_newer,
            [
                ("kernel", "pidfd_open, of 5.3, may be there"),
                ("gpu-memory", "dmabuf, of 5.12, may be there; nvidia-peermem is not"),
            ],
        ),
    ],
)
def test_what_cannot_be_read_is_no_fault(machine, hide, told):
    hide(machine)
    assert [(row[0], row[1]) for row in machine.findings()] == [(name, "note") for name, _ in told]
    for row, (_, found) in zip(machine.findings(), told, strict=True):
        assert found in row[3]


def test_an_address_mends_no_port_of_infiniband(machine):
    for idx in (0, 1):
        machine.port(idx, "link_layer", "InfiniBand")
        machine.gids(idx, "fe80:0000:0000:0000:0000:0000:0000:0000")
    found = machine.findings("broken")
    assert [row[2:4] for row in found] == [(f"mlx5_{idx}", "the port has no GID") for idx in (0, 1)]
    assert all("port_guid" in row[4] and "ip addr" not in row[4] for row in found)
