"""What the run must say about where it ran: machine, commit, and how busy other processes kept it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers.records import Machine

if TYPE_CHECKING:
    from collections.abc import Sequence

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _field(text: str, name: str) -> str:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def here() -> Machine:
    """Describe this machine."""
    cpu = Path("/proc/cpuinfo").read_text()
    memory_kib = _field(Path("/proc/meminfo").read_text(), "MemTotal").split()[0]
    return Machine(
        cpu=_field(cpu, "model name"),
        num_cpus=len(os.sched_getaffinity(0)),
        memory_bytes=int(memory_kib) * 1024,
        kernel=platform.release().partition("-")[0],
        hypervisor=" hypervisor" in _field(cpu, "flags"),
        huge_pages=_HUGE_PAGES.read_text().strip() if _HUGE_PAGES.exists() else "none",
    )


def commit(repository: Path) -> tuple[str, bool]:
    """Return the commit that is checked out, and whether tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(repository), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "HEAD") or "unknown", bool(git("status", "--porcelain", "-uno"))


def wait_until_quiet(timeout_s: float, most: float = 0.05, look_s: float = 0.5) -> None:
    """Return once other processes use at most the share `most` of the machine, or after the timeout."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        meter = CpuMeter(())
        time.sleep(look_s)
        if meter.foreign_share() <= most:
            return


class CpuMeter:
    """Tells the share of this machine's cores that processes other than the named ones used.

    Ticks are 10 ms, so a short span reads coarsely. Work that the kernel does for the named
    processes in interrupts counts as foreign.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = (os.getpid(), *pids)
        self._before = self._read()

    def foreign_share(self) -> float:
        """Return the share since the meter was made."""
        own, busy, total = (after - before for after, before in zip(self._read(), self._before, strict=True))
        return round(max(0.0, (busy - own) / total), 4) if total else 0.0

    def _read(self) -> tuple[int, int, int]:
        """Return ticks of the named processes, of everyone, and of everyone and idleness."""
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        idle = ticks[3] + ticks[4]
        own = 0
        for pid in self._pids:
            # Fields 14 and 15, counted behind the name, which may hold spaces.
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            own += int(words[11]) + int(words[12])
        return own, sum(ticks) - idle, sum(ticks)
