"""`anyfabric doctor`, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = [sys.executable, "-m", "anyfabric", "doctor"]


def run(*arguments, code):
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=50)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_a_machine_that_is_well(machine):
    text = run("--root", str(machine.root), code=0)
    assert "everything that was looked at is well" in text
    assert "→" not in text


def test_what_is_broken_is_explained(machine):
    machine.limit(8 << 20)
    machine.gids(0)
    text = run("--root", str(machine.root), code=1)
    assert "2 broken, 0 that work badly" in text
    for word in ("ulimit -l unlimited", "ip addr add", "A NIC reads and writes physical memory"):
        assert word in text


def test_a_warning_is_no_failure(machine):
    machine.write("sys/class/net/eth1/mtu", "1500")
    assert "0 broken, 2 that work badly" in run("--root", str(machine.root), code=0)


def test_json(machine):
    machine.limit(8 << 20)
    found = json.loads(run("--root", str(machine.root), "--json", code=1))
    assert (found["is_broken"], found["has_nic"]) == (True, True)
    (row,) = [row for row in found["findings"] if row["level"] == "broken"]
    assert row["check"] == "locked-memory"
    assert row["why"]
    assert row["mend"]


def test_the_settings_say_what_is_needed(machine, monkeypatch):
    """Each reaches the checks that heed it."""
    for name, value in (
        ("NICS", "mlx5_7,mlx5_1"),
        ("GID_INDEX", "7"),
        ("VERBS_LIBRARY", "/own/libibverbs.so.1"),
        ("LIBFABRIC_LIBRARY", "/own/libfabric.so.1"),
    ):
        monkeypatch.setenv(f"ANYFABRIC_{name}", value)
    (machine.root / "sys/bus/pci/drivers/efa").mkdir()
    (driver,) = machine.root.glob("sys/devices/**/0000:14:00.0/driver")
    driver.unlink()
    driver.symlink_to("../" * 6 + "bus/pci/drivers/efa")
    rows = json.loads(run("--root", str(machine.root), "--json", code=1))["findings"]
    broken = {row["check"]: row["found"] for row in rows if row["level"] == "broken"}
    assert "the setting `nics` names it" in broken["link"]
    assert "no GID at index 7" in broken["gid"]
    assert broken["provider"] == "/own/libibverbs.so.1 is not installed"
    assert broken["efa-library"] == "/own/libfabric.so.1 is not there"
    monkeypatch.setenv("ANYFABRIC_TRANSPORTS", "shm,tcp")
    run("--root", str(machine.root), code=0)
    monkeypatch.setenv("ANYFABRIC_TRANSPORTS", "shm,verbs,tcp")
    monkeypatch.setenv("ANYFABRIC_REQUIRE", "tcp")
    run("--root", str(machine.root), code=0)


def test_another_process():
    with subprocess.Popen(["sleep", "30"]) as other:
        try:
            assert "findings" in json.loads(run("--pid", str(other.pid), "--json", code=0))
        finally:
            other.kill()


def test_a_process_that_is_not_there():
    with subprocess.Popen(["true"]) as gone:
        pass
    done = subprocess.run([*PROGRAM, "--pid", str(gone.pid)], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"--pid {gone.pid}: there is no such process" in done.stderr


def test_here():
    done = subprocess.run(PROGRAM, capture_output=True, text=True, timeout=50)
    assert "1 MiB written, counted and compared" in done.stdout, done.stderr
    if not list(Path("/sys/class").glob("infiniband/*")):
        assert done.returncode == 0
        assert "no RDMA NIC: shm and tcp are used" in done.stdout
