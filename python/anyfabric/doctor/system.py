"""What the checks look at: a machine below a root folder, and one process on it.

Every fact is a file, so that a recorded or made-up machine is examined as this one is. What cannot be read is
empty: a check says what it could not see, it never guesses.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from anyfabric.config import TRANSPORTS
from anyfabric.topology import Nic, Topology, read_topology

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from anyfabric.gpu import DriverGpu
    from anyfabric.topology import Group

__all__ = ["System"]

CAP_IPC_LOCK = 14
LAYER_FOLDERS = ("docker", "containerd", "containers/storage")
RUN_TIMEOUT_S = 20


def run_command(command: Sequence[str]) -> str:
    """Standard output of a command; empty when it fails."""
    try:
        done = subprocess.run(  # noqa: S603 - the checks name what they run
            list(command), capture_output=True, text=True, check=True, timeout=RUN_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


@dataclass(frozen=True)
class System:
    """A machine and a process.

    Attributes:
        root: Where `proc`, `sys`, `dev`, `usr` and so on are.
        process: The process in question: a number, or `"self"`.
        required: The transport that the settings insist on; empty when any will do.
        named: The NICs that the settings name; none when the engine chooses.
        enabled: The transports that the settings allow.
        names_libfabric: Whether the settings name libfabric's provider or library, which may be software.
        gid_index: The GID that the settings choose; `None` when the engine does.
        verbs_library: The libibverbs that the settings name; empty when the system finds one.
        libfabric_library: The libfabric that they name; empty when the engine looks for one.
        gpus: What the driver answers of the GPUs, where it can be asked: of this machine.
        run: Runs a command and returns its output. This and `gpus` are all that is no file.
    """

    root: Path = Path("/")
    process: str = "self"
    required: str = ""
    named: tuple[str, ...] = ()
    enabled: tuple[str, ...] = TRANSPORTS
    names_libfabric: bool = False
    gid_index: int | None = None
    verbs_library: str = ""
    libfabric_library: str = ""
    gpus: tuple[DriverGpu, ...] = ()
    run: Callable[[Sequence[str]], str] = field(default=run_command)

    def path(self, name: str) -> Path:
        """A file of this machine, named without the leading slash."""
        return self.root / name

    def text(self, name: str) -> str:
        """A file without the spaces around; empty when it cannot be read."""
        try:
            # tar fills a copy up to the size that sysfs states, with zeros.
            return self.path(name).read_text(errors="replace").rstrip("\0").strip()
        except OSError:
            return ""

    def number(self, name: str) -> int | None:
        """The number that a file begins with."""
        found = re.match(r"-?\d{1,18}", self.text(name))
        return int(found.group()) if found else None

    def content(self, name: str) -> bytes:
        """A file's bytes; empty when it cannot be read."""
        try:
            return self.path(name).read_bytes()
        except OSError:
            return b""

    def names(self, name: str) -> list[str]:
        """Names in a folder, sorted; none when there is no such folder."""
        try:
            return sorted(entry.name for entry in self.path(name).iterdir())
        except OSError:
            return []

    def find(self, *patterns: str) -> list[Path]:
        """Files that match patterns below the root, each real file once."""
        found: dict[Path, Path] = {}
        for pattern in patterns:
            for path in sorted(self.root.glob(pattern)):
                found.setdefault(Path(os.path.realpath(path)), path)
        return list(found.values())

    def exists(self, name: str) -> bool:
        """Whether there is such a file; false when nobody may say."""
        return os.path.exists(self.path(name))  # noqa: PTH110 (`Path.exists` raises before Python 3.12)

    def may_enter(self, name: str) -> bool:
        """Whether this process may look into the folder."""
        return os.access(self.path(name), os.R_OK | os.X_OK)

    def is_usable(self, name: str) -> bool:
        """Whether this process may read and write the file."""
        return os.access(self.path(name), os.R_OK | os.W_OK)

    def target(self, name: str) -> str:
        """Last name of what a link points to; empty when it is no link."""
        try:
            return self.path(name).readlink().name
        except OSError:
            return ""

    @cached_property
    def topology(self) -> Topology:
        """GPUs, RDMA ports and the groups that an engine would use."""
        return read_topology(self.root)

    @cached_property
    def nics(self) -> tuple[Nic, ...]:
        """RDMA ports, without those that this container was not given while it was given others."""
        return tuple(nic for nic in self.topology.nics if nic.is_given)

    def gpu_groups(self) -> Iterator[tuple[str, Group]]:
        """PCI address and group of each GPU that this container was given."""
        given = {gpu.pci for gpu in self.topology.gpus if gpu.is_given}
        for group in self.topology.groups:
            pci = group.device.partition(":")[2]
            if pci in given:
                yield pci, group

    @cached_property
    def has_slingshot(self) -> bool:
        """Whether there is a NIC that is no RDMA device, and that libfabric drives."""
        return bool(self.names("sys/class/cxi"))

    def named_ports(self, name: str) -> list[Nic]:
        """The RDMA ports that a name in the settings means: one of these serves."""
        return [
            nic
            for nic in self.topology.nics
            if name in {nic.name, nic.device, f"{nic.device}:{nic.port}", *nic.netdevs}
            # libfabric's domains begin with the device: rdmap16s27-rdm.
            or name.startswith(f"{nic.device}-")
        ]

    def needs(self, nic: Nic) -> bool:
        """Whether an engine uses the port: it is named, or else not passed over."""
        if named := [port for name in self.named for port in self.named_ports(name)]:
            return nic in named
        return nic.passed_over is None

    def may_use(self, *transports: str) -> bool:
        """Whether the settings allow one of the transports."""
        return any(name in self.enabled and self.required in {"", name} for name in transports)

    @cached_property
    def kernel(self) -> tuple[int, int]:
        """Version of the kernel; zeroes when unknown."""
        found = re.match(r"(\d{1,9})\.(\d{1,9})", self.text("proc/sys/kernel/osrelease"))
        return (int(found.group(1)), int(found.group(2))) if found else (0, 0)

    @cached_property
    def takes_over_newer(self) -> bool:
        """Whether the kernel is one that keeps its number and takes over what is new."""
        return re.search(r"\.el\d|\.amzn", self.text("proc/sys/kernel/osrelease")) is not None

    @cached_property
    def is_container(self) -> bool:
        """Whether the process runs in a container."""
        if self.exists(".dockerenv") or self.exists("run/.containerenv"):
            return True
        if re.search(r"docker|kubepods|containerd|lxc|podman", self.text("proc/1/cgroup")):
            return True
        # With a cgroup namespace, as Kubernetes has, what tells is where the root's layers lie.
        layers = rf"^\d+ \d+ \S+ \S+ / .* - overlay .*({'|'.join(LAYER_FOLDERS)})/"
        return re.search(layers, self.text("proc/self/mountinfo"), re.MULTILINE) is not None

    @cached_property
    def locked_memory_limit(self) -> int | None:
        """Bytes that the process may lock; `None` without a limit or when unknown."""
        found = re.search(
            r"^Max locked memory\s+(\d{1,20})", self.text(f"proc/{self.process}/limits"), re.MULTILINE
        )
        return int(found.group(1)) if found else None

    @cached_property
    def may_lock_memory(self) -> bool:
        """Whether the process has the host's CAP_IPC_LOCK: the limit does not hold for it."""
        users = self.text(f"proc/{self.process}/uid_map").split()
        if users and users != ["0", "0", "4294967295"]:
            return False
        found = re.search(r"^CapEff:\s*([0-9a-f]+)", self.text(f"proc/{self.process}/status"), re.MULTILINE)
        return found is not None and bool(int(found.group(1), 16) >> CAP_IPC_LOCK & 1)

    @cached_property
    def loaded_libraries(self) -> list[str]:
        """Shared libraries that the process has mapped."""
        maps = self.text(f"proc/{self.process}/maps")
        return sorted(set(re.findall(r"(/\S+\.so[.\d]*)(?: \(deleted\))?$", maps, re.MULTILINE)))

    def rdma_driver(self, device: str) -> str:
        """Name of the kernel driver of an RDMA device; `"rdma_rxe"` and the like for those of software."""
        driver = self.target(f"sys/class/infiniband/{device}/device/driver")
        return driver or ("rdma_rxe" if self.exists(f"sys/class/infiniband/{device}/parent") else "")
