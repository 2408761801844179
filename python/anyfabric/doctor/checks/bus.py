"""The PCIe bus: IOMMU, access control, address translation; what lies between a GPU and a NIC."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from anyfabric.doctor.finding import Check, Finding, note, ok, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyfabric.doctor.system import System

__all__ = ["BUS_CHECKS", "extended_capability"]

ACS_CAPABILITY = 0x000D
ATS_CAPABILITY = 0x000F
# Redirection of requests and of completions between devices below one switch: up to the CPU and back.
ACS_REDIRECTS = 0b1100
ATS_ENABLED = 1 << 15


def iommu(system: System) -> Iterator[Finding]:
    """Whether addresses of the NICs are translated."""
    kinds: dict[str, list[str]] = {}
    for nic in system.nics:
        if nic.pci:
            kind = system.text(f"sys/bus/pci/devices/{nic.pci}/iommu_group/type")
            kinds.setdefault(kind or "none", []).append(nic.name)
    translated = [name for kind, names in kinds.items() if kind.startswith("DMA") for name in names]
    if translated:
        yield warning(
            "",
            f"the IOMMU translates every address of {', '.join(translated)}",
            "on the kernel's command line: iommu.passthrough=1 (iommu=pt on x86 before Linux 5.3); then boot",
        )
    elif kinds:
        yield ok("", "the IOMMU is off or passes addresses through")


def acs(system: System) -> Iterator[Finding]:
    """Whether a switch sends traffic between GPU and NIC up to the CPU."""
    unknown = False
    redirecting: dict[str, str] = {}
    num_switched = 0
    for pci, group in system.gpu_groups():
        near = [nic.name for nic in group.nics if nic.distance == "switch"]
        if not near:
            continue
        num_switched += 1
        for nic in system.topology.nics:
            if nic.name not in near or nic.pci is None:
                continue
            for bridge in _bridges(system, pci) ^ _bridges(system, nic.pci):
                config = system.content(f"sys/bus/pci/devices/{bridge}/config")
                at = extended_capability(config, ACS_CAPABILITY)
                # Without root the file ends before the extended capabilities.
                unknown |= len(config) <= 256
                if at is not None and struct.unpack_from("<H", config, at + 6)[0] & ACS_REDIRECTS:
                    redirecting[bridge] = f"{nic.name} and {pci}"
    for bridge, between in redirecting.items():
        found = f"the bridge sends what goes between {between} up to the CPU"
        mend = (
            f"as root, after every boot: setpci -s {bridge} ECAP_ACS+0x6.w=0000; or ACS off in the firmware"
        )
        yield warning(bridge, found, mend)
    if unknown and not redirecting:
        yield note("", "access control of the bridges cannot be read", "run `anyfabric doctor` as root")
    elif num_switched and not redirecting:
        yield ok("", f"{num_switched} GPU{'s' * (num_switched > 1)}: straight through the switch to the NIC")


def ats(system: System) -> Iterator[Finding]:
    """Whether a NIC whose addresses are translated may keep the translations."""
    for nic in system.nics:
        if nic.pci is None:
            continue
        folder = f"sys/bus/pci/devices/{nic.pci}"
        config = system.content(f"{folder}/config")
        at = extended_capability(config, ATS_CAPABILITY)
        if at is None or not system.text(f"{folder}/iommu_group/type").startswith("DMA"):
            continue
        if struct.unpack_from("<H", config, at + 6)[0] & ATS_ENABLED:
            yield ok(nic.name, "address translation service is on")
        else:
            yield warning(
                nic.name,
                "addresses are translated, and the NIC asks for each: its translation service is off",
                "iommu.passthrough=1 on the kernel's command line; or in the card's firmware: "
                f"mlxconfig -d {nic.pci} set ATS_ENABLED=1",
            )


def distance(system: System) -> Iterator[Finding]:
    """How far each GPU is from its nearest NIC."""
    near = 0
    for pci, group in system.gpu_groups():
        if not group.nics:
            continue
        nic = group.nics[0]
        if nic.distance == "system":
            yield warning(
                pci,
                f"its nearest usable NIC, {nic.name}, is on another NUMA node: bytes cross the sockets",
                "put a NIC into a slot of the GPU's node, or use GPUs that have one: CUDA_VISIBLE_DEVICES",
            )
        elif nic.distance == "unknown":
            yield note(pci, f"how far {nic.name} is cannot be told: the firmware gives no NUMA node")
        elif nic.distance == "node":
            yield note(pci, f"its nearest NIC, {nic.name}, is below another host bridge of the same node")
        else:
            near += 1
    if near:
        yield ok("", f"{near} GPU{'s' * (near > 1)} with a NIC below the same host bridge or switch")


def extended_capability(config: bytes, wanted: int) -> int | None:
    """Offset of a PCIe extended capability in a device's configuration space."""
    at, seen = 0x100, set[int]()
    while 0x100 <= at <= len(config) - 4 and at not in seen:
        seen.add(at)
        (header,) = struct.unpack_from("<I", config, at)
        if header in {0, 0xFFFFFFFF}:
            return None
        if header & 0xFFFF == wanted and at + 8 <= len(config):
            return at
        at = header >> 20
    return None


def _bridges(system: System, pci: str) -> set[str]:
    """Addresses of the bridges above a device."""
    real = os.path.realpath(system.path(f"sys/bus/pci/devices/{pci}"))
    return {part for part in real.split("/") if part.count(":") == 2 and part != pci}


BUS_CHECKS = (
    Check(
        "iommu",
        "Whether the IOMMU translates the addresses that NICs use.",
        "Each translation costs a look-up, and traffic between GPU and NIC then goes up to the CPU.",
        iommu,
    ),
    Check(
        "acs",
        "Access control of the bridges between each GPU and a NIC behind the same switch.",
        "With redirection on, a switch sends what goes from GPU to NIC up to the CPU and back, over one link "
        "that everything below the switch shares.",
        acs,
    ),
    Check(
        "ats",
        "The address translation service of NICs whose addresses are translated.",
        "It lets a NIC keep translations instead of asking for each.",
        ats,
    ),
    Check(
        "gpu-distance",
        "How far each GPU is from the NIC that would serve it.",
        "Behind one switch, bytes do not touch the CPU; between sockets they share a link with all else.",
        distance,
    ),
)
