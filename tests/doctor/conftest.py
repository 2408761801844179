"""A made-up machine that is well: two GPUs, each with a NIC behind its switch. Tests break a part of it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import pytest

from anyfabric.doctor import System, diagnose

SWITCHES = {
    0: ("pci0000:10", "0000:10:01.0", "0000:11:00.0"),
    1: ("pci0000:80", "0000:80:01.0", "0000:81:00.0"),
}
STATUS = "Name:\tpython\nCapEff:\t0000000000000000\nCpus_allowed_list:\t0-7\n"


class Machine:
    """A root folder."""

    def __init__(self, root):
        self.root = root
        self.outputs = {}
        self.write("proc/sys/kernel/osrelease", "6.1.0-56-amd64")
        self.write("proc/meminfo", "MemTotal:       67108864 kB")
        self.write("proc/self/status", STATUS)
        self.limit("unlimited")
        self.write("proc/self/maps", "7f00-7f01 r-xp 0 00:00 1    /usr/lib/x86_64-linux-gnu/libc.so.6")
        self.write(
            "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05"
        )
        self.write("sys/devices/system/cpu/online", "0-7")
        for node, cpus in ((0, "0-3"), (1, "4-7")):
            self.write(f"sys/devices/system/node/node{node}/cpulist", cpus)
        self.write("usr/lib/x86_64-linux-gnu/libibverbs.so.1", "")
        self.provider("mlx5")
        for idx in (0, 1):
            self.gpu(idx)
            self.nic(idx)

    def write(self, path, content):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content + "\n")

    def link(self, path, target):
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)

    def remove(self, path):
        file = self.root / path
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink()

    def limit(self, soft):
        self.write("proc/self/limits", f"Max locked memory         {soft}    unlimited            bytes")

    def provider(self, name):
        self.write(f"usr/lib/x86_64-linux-gnu/libibverbs/lib{name}-rdmav34.so", name)

    def pci(self, path, vendor, device, kind, *, node):
        address = path.rpartition("/")[2]
        facts = (("vendor", vendor), ("device", device), ("class", kind), ("numa_node", str(node)))
        for name, content in facts:
            self.write(f"sys/devices/{path}/{name}", content)
        self.write(f"sys/devices/{path}/config", bytes(4096))
        self.link(f"sys/bus/pci/devices/{address}", f"../../../devices/{path}")
        for bridge in path.split("/")[1:-1]:
            if not (self.root / f"sys/bus/pci/devices/{bridge}").exists():
                above = path.partition(bridge)[0]
                self.write(f"sys/devices/{above}{bridge}/config", bytes(4096))
                self.link(f"sys/bus/pci/devices/{bridge}", f"../../../devices/{above}{bridge}")

    def gpu(self, idx):
        bridge = "/".join((*SWITCHES[idx], f"0000:{12 + 70 * idx}:00.0"))
        self.pci(f"{bridge}/0000:{13 + 70 * idx}:00.0", "0x10de", "0x2330", "0x030200", node=idx)

    def nic(self, idx, *, driver="mlx5_core", link_layer="Ethernet"):
        address = f"0000:{14 + 70 * idx}:00.0"
        path = "/".join((*SWITCHES[idx], f"0000:{12 + 70 * idx}:01.0", address))
        name = f"mlx5_{idx}"
        self.pci(path, "0x15b3", "0x1021", "0x020000", node=idx)
        (self.root / f"sys/bus/pci/drivers/{driver}").mkdir(parents=True, exist_ok=True)
        self.link(f"sys/devices/{path}/driver", "../" * 6 + f"bus/pci/drivers/{driver}")
        for file, content in (("current_link_speed", "32.0 GT/s PCIe"), ("current_link_width", "16")):
            self.write(f"sys/devices/{path}/{file}", content)
        self.write(f"sys/devices/{path}/net/eth{idx}/dev_port", "0")
        self.write(f"sys/class/net/eth{idx}/mtu", "9000")
        rdma = f"sys/devices/{path}/infiniband/{name}"
        self.link(f"{rdma}/device", "../..")
        self.link(f"sys/class/infiniband/{name}", f"../../../{rdma}")
        facts = (("state", "4: ACTIVE"), ("phys_state", "5: LinkUp"), ("rate", "400 Gb/sec (4X NDR)"))
        for file, content in (*facts, ("link_layer", link_layer)):
            self.write(f"{rdma}/ports/1/{file}", content)
        self.gids(idx, f"0000:0000:0000:0000:0000:ffff:0a00:000{idx + 1}")
        self.write(f"sys/class/infiniband_verbs/uverbs{idx}/ibdev", name)
        self.write(f"dev/infiniband/uverbs{idx}", "")

    def port(self, idx, file, content):
        self.write(f"sys/class/infiniband/mlx5_{idx}/ports/1/{file}", content)

    def gids(self, idx, *addresses, kind="RoCE v2"):
        for number in range(4):
            empty = "0000:0000:0000:0000:0000:0000:0000:0000"
            self.port(idx, f"gids/{number}", addresses[number] if number < len(addresses) else empty)
            self.port(idx, f"gid_attrs/types/{number}", kind)

    @staticmethod
    def extended_config(capability: int, control: int) -> bytes:
        """Configuration space with one extended capability, behind another."""
        config = bytearray(4096)
        struct.pack_into("<I", config, 0x100, 0x0001 | 1 << 16 | 0x148 << 20)
        struct.pack_into("<I", config, 0x148, capability | 1 << 16)
        struct.pack_into("<HH", config, 0x14C, 0xFFFF, control)
        return bytes(config)

    @property
    def system(self):
        return System(self.root, run=lambda command: self.outputs.get(command[-1], ""))

    def findings_of_nobody(self):
        """The findings that are broken, for a user without rights: tests may be run by root."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                os.write(writer, json.dumps(self.findings("broken")).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as told:
            found = json.load(told)
        os.waitpid(child, 0)
        return found

    def findings(self, level=None):
        """(check, level, subject, found, mend) of what is not ok, or of one level."""
        return [
            (check.name, finding.level, finding.subject, finding.found, finding.mend)
            for check, finding in diagnose(self.system).findings
            if (finding.level != "ok" if level is None else finding.level == level)
        ]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def open_machine():
    """One whose files everybody may read, unlike those in pytest's folders."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        machine = Machine(Path(folder) / "machine")
        machine.findings()  # What it imports is imported, with all rights.
        yield machine
