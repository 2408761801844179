"""What this machine has, and which NICs and cores would serve which of its devices."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anyfabric import _core
from anyfabric.errors import InvalidArgument

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

__all__ = ["Gpu", "Group", "GroupNic", "Nic", "Topology", "read_topology"]


@dataclass(frozen=True, slots=True)
class Nic:
    """One RDMA port.

    Attributes:
        name: As settings take it: `"mlx5_0"`, or `"mlx5_0:2"` where a device has several ports.
        device: RDMA device.
        port: Port of it, from 1.
        pci: PCI address; `None` for a NIC of software.
        netdevs: Network interfaces on the same port.
        fabric: `"infiniband"`, `"ethernet"`, `"efa"` or `"other"`.
        state: `"up"` or `"down"`.
        is_given: Whether programs can open it: false where it has no device node and others have, as in a
            container that was given some of its host's.
        gbps: Link rate in Gbit/s; 0 where unknown.
        slot_gbps: What its PCIe slot carries, in Gbit/s; 0 where unknown.
        node: NUMA node, where known.
        passed_over: Why no group has it; `None` when some may.
    """

    name: str
    device: str
    port: int
    pci: str | None
    netdevs: tuple[str, ...]
    fabric: str
    state: str
    is_given: bool
    gbps: int
    slot_gbps: int
    node: int | None
    passed_over: str | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU.

    Attributes:
        pci: PCI address.
        node: NUMA node, where known.
        is_given: Whether programs can use it: false where the driver lists others and not it, as in a
            container that was given some of its host's.
    """

    pci: str
    node: int | None
    is_given: bool


@dataclass(frozen=True, slots=True)
class GroupNic:
    """A NIC of a group, and how far it is from the device.

    Attributes:
        name: As in `Nic`.
        distance: `"switch"` (not through the CPU), `"host bridge"`, `"node"`, `"system"` (between NUMA nodes)
            or `"unknown"`.
    """

    name: str
    distance: str


@dataclass(frozen=True, slots=True)
class Group:
    """What serves one device.

    Attributes:
        device: `"cpu:0"` for host memory of NUMA node 0, `"gpu:0000:53:00.0"` for a GPU.
        nics: Nearest first; at most 4, unless `nics_per_device` says otherwise.
        cpus: For its worker, one of each core; empty when there is no reason to prefer any.
    """

    device: str
    nics: tuple[GroupNic, ...]
    cpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """A machine and its groups; devices that several groups could use are divided among them.

    Attributes:
        num_cores: Physical cores.
        gpus: In order of their PCI addresses.
        nics: RDMA ports.
        groups: One of each NUMA node's host memory, then of each GPU.
    """

    num_cores: int
    gpus: tuple[Gpu, ...]
    nics: tuple[Nic, ...]
    groups: tuple[Group, ...]


def read_topology(
    root: str | os.PathLike[str] = "/", *, nics: Sequence[str] = (), nics_per_device: int | None = None
) -> Topology:
    """Read the machine from `<root>/sys` and choose the groups of its devices.

    The same on every process of a machine that asks the same, so that ranks divide it without talking. What
    cannot be read is unknown; nothing is opened or changed.

    Args:
        root: Where `sys` and `proc` are: another folder for a recorded machine.
        nics: Only these, whatever their state and speed; all that suit when empty.
        nics_per_device: 1 to 8; by default those nearest, divided among the GPUs that are as near, and no
            more than 4, which is what one operation uses.

    Raises:
        InvalidArgument: `nics_per_device` is out of range.
    """
    if nics_per_device is not None and not 1 <= nics_per_device <= _core.MAX_NICS:
        msg = f"nics_per_device is {nics_per_device}, expected 1 to {_core.MAX_NICS}"
        raise InvalidArgument(msg)
    found = json.loads(_core.topology_json(str(root), list(nics), nics_per_device))
    return Topology(
        num_cores=found["num_cores"],
        gpus=tuple(Gpu(**gpu) for gpu in found["gpus"]),
        nics=tuple(_nic(nic) for nic in found["nics"]),
        groups=tuple(_group(group) for group in found["groups"]),
    )


def _nic(found: dict[str, Any]) -> Nic:
    facts: dict[str, Any] = {**found, "netdevs": tuple(found["netdevs"])}
    return Nic(**facts)


def _group(found: dict[str, Any]) -> Group:
    nics = tuple(GroupNic(**nic) for nic in found["nics"])
    return Group(device=found["device"], nics=nics, cpus=tuple(found["cpus"]))
