"""The GID that the settings choose, instead of the best one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anyfabric.doctor import diagnose

LINK_LOCAL = "fe80:0000:0000:0000:1234:56ff:fe78:9abc"
IPV4 = "0000:0000:0000:0000:0000:ffff:0a00:0001"


def told(machine, gid_index):
    system = replace(machine.system, gid_index=gid_index, named=("mlx5_0",))
    found = diagnose(system).findings
    ((level, text, mend),) = [
        (row.level, row.found, row.mend)
        for check, row in found
        if check.name == "gid" and row.subject == "mlx5_0"
    ]
    assert ("ANYFABRIC_GID_INDEX" in mend) == (level != "ok")
    return level, text


def test_the_chosen_gid_is_judged(machine):
    machine.gids(0, LINK_LOCAL, IPV4, IPV4)
    machine.port(0, "gid_attrs/types/2", "IB/RoCE v1")
    assert told(machine, 1) == ("ok", "GID 1, which the setting `gid_index` names: 10.0.0.1")
    level, text = told(machine, 0)
    assert level == "warning"
    assert "is link-local (fe80::1234" in text
    level, text = told(machine, 2)
    assert level == "warning"
    assert "is of IB/RoCE v1: it is not routed" in text
    for missing in (3, 200):
        level, text = told(machine, missing)
        assert level == "broken"
        assert text.startswith(f"no GID at index {missing}, ")
        assert text.endswith("there are: 0, 1, 2")
    machine.gids(0)
    assert told(machine, 0)[1].endswith("there are: none")


@pytest.mark.parametrize("index", [0, 3])
def test_a_nic_that_nobody_uses_is_no_fault(machine, index):
    machine.gids(0, LINK_LOCAL)
    system = replace(machine.system, gid_index=index, named=("mlx5_1",))
    rows = [
        row for check, row in diagnose(system).findings if check.name == "gid" and row.subject == "mlx5_0"
    ]
    assert [row.level for row in rows] == ["note"]


def test_infiniband_has_prefixes_of_its_own(machine):
    machine.port(0, "link_layer", "InfiniBand")
    machine.gids(0, LINK_LOCAL, kind="IB/RoCE v1")
    assert told(machine, 0)[0] == "ok"
