"""libfabric on machines with EFA: judged is the one that an engine opens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anyfabric.doctor import diagnose

EFA, SYSTEM, OWN = (
    f"{folder}/libfabric.so.1" for folder in ("opt/amazon/efa/lib", "usr/lib/x86_64-linux-gnu", "opt/own")
)


@pytest.fixture
def efa(machine):
    """The first NIC is EFA's."""
    (driver,) = machine.root.glob("sys/devices/**/0000:14:00.0/driver")
    driver.unlink()
    (machine.root / "sys/bus/pci/drivers/efa").mkdir()
    driver.symlink_to("../" * 6 + "bus/pci/drivers/efa")
    return machine


def install(machine, name, version):
    """A library; without a version one that cannot be asked."""
    machine.write(name, "")
    if version is not None:
        program = f"import ctypes; print(ctypes.CDLL({str(machine.root / name)!r}).fi_version())"
        machine.outputs[program] = f"{version[0] << 16 | version[1]}\n"


def told(machine, **changes):
    rows = diagnose(replace(machine.system, **changes)).findings
    return [
        (row.level, row.subject, row.found, row.mend) for check, row in rows if check.name == "efa-library"
    ]


@pytest.mark.parametrize(
    ("version", "level", "found"),
    [
        ((1, 17), "broken", "libfabric 1.17 has no write with immediate"),
        ((1, 20), "warning", "libfabric 1.20: immediates use up"),
        ((2, 1), "ok", "libfabric 2.1"),
        (None, "warning", "its version cannot be asked for"),
    ],
)
def test_its_version(efa, version, level, found):
    ((missing, *_),) = told(efa)
    assert missing == "broken"
    install(efa, EFA, version)
    ((*row, _, mend),) = told(efa)
    assert row == [level, f"/{EFA}"]
    assert found in told(efa)[0][2]
    assert ("efa-start" in mend) == (level != "ok")


def test_another_that_is_installed_is_not_judged(efa):
    """An engine opens EFA's before it asks the loader, and first of all what is loaded."""
    install(efa, SYSTEM, (1, 17))
    assert told(efa)[0][:2] == ("broken", f"/{SYSTEM}")
    install(efa, EFA, (2, 1))
    assert [row[:2] for row in told(efa)] == [("ok", f"/{EFA}")]
    efa.write("proc/self/maps", f"7f00-7f01 r-xp 0 00:00 1    /{SYSTEM}")
    assert [row[:2] for row in told(efa)] == [("broken", f"/{SYSTEM}")]


@pytest.mark.parametrize("named", [f"/{OWN}", "libown.so.1"])
def test_one_that_the_settings_name_is_the_one(efa, named):
    install(efa, EFA, (1, 17))
    ((level, _, found, mend),) = told(efa, libfabric_library=named)
    assert (level, found) == ("broken", f"{named} is not there")
    assert "ANYFABRIC_LIBFABRIC_LIBRARY" in mend
    install(efa, OWN if "/" in named else "usr/local/lib/libown.so.1", (2, 1))
    assert [row[0] for row in told(efa, libfabric_library=named)] == ["ok"]


def test_who_names_one_needs_no_advice_which(machine):
    install(machine, SYSTEM, None)
    install(machine, EFA, None)

    def notes(**changes):
        rows = diagnose(replace(machine.system, **changes)).findings
        return [row.mend for check, row in rows if (check.name, row.level) == ("one-libfabric", "note")]

    (mend,) = notes()
    assert "ANYFABRIC_LIBFABRIC_LIBRARY" in mend
    assert notes(libfabric_library=f"/{SYSTEM}") == []
