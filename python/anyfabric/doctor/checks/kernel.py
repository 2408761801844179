"""The kernel: its version, its RDMA modules, and the device nodes that they make."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from anyfabric.doctor.finding import Check, Finding, broken, note, ok, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyfabric.doctor.system import System

__all__ = ["KERNEL_CHECKS", "nodes"]

PIDFD_KERNEL = (5, 3)

# PCI vendor and device of NICs that are bought for RDMA, and the module that makes them RDMA devices.
RDMA_HARDWARE = (
    ("0x15b3", re.compile(r"0x10(1[3-9a-f]|2)|0xa2d"), "mlx5_ib"),
    ("0x1d0f", re.compile(r"0xefa"), "efa"),
    ("0x14e4", re.compile(r"0x17[56]"), "bnxt_re"),
)
# Drivers that hand a card to a virtual machine or to a program.
GIVEN_AWAY = ("vfio", "uio", "igb_uio")


def version(system: System) -> Iterator[Finding]:
    """Whether the kernel has what the engine itself uses."""
    release = system.text("proc/sys/kernel/osrelease")
    if system.kernel == (0, 0):
        yield note("", "the kernel's version cannot be read")
    elif system.kernel >= PIDFD_KERNEL:
        yield ok("", f"Linux {release}")
    elif system.takes_over_newer:
        yield note("", f"Linux {release}, which takes over newer functions: pidfd_open, of 5.3, may be there")
    else:
        yield broken("", f"Linux {release} has no pidfd_open", "install Linux 5.3 or later")


def modules(system: System) -> Iterator[Finding]:
    """Whether each RDMA-capable card is an RDMA device, and whether programs can reach it."""
    rdma = system.names("sys/class/infiniband")
    for pci, module in _undriven(system):
        found = f"the card can do RDMA, but {module} does not drive it"
        # One card of several may serve as a plain interface on purpose.
        yield (warning if rdma else broken)(pci, found, _drive(system, pci, module))
    if not rdma:
        may_do_without = system.names_libfabric or system.has_slingshot
        if system.required == "verbs" or (system.required == "libfabric" and not may_do_without):
            found = f"{system.required} is required, and the kernel has no RDMA device"
            yield broken("", found, "unset ANYFABRIC_REQUIRE; or put in a NIC")
    elif not system.names("sys/class/infiniband_verbs"):
        yield broken("", "ib_uverbs is not loaded: programs cannot reach RDMA devices", "modprobe ib_uverbs")
    else:
        yield ok("", f"{_few(rdma)}: the kernel drives what there is")


def _drive(system: System, pci: str, module: str) -> str:
    """What makes the module take the card."""
    if system.exists(f"sys/module/{module}"):
        switch = f"devlink dev param set pci/{pci} name enable_rdma value true cmode driverinit"
        enable = f"{switch}; devlink dev reload pci/{pci}; or " * (module == "mlx5_ib")
        return f"{enable}look why the module, which is loaded, did not take it: dmesg | grep {pci}"
    if system.is_container:
        return f"on the host: modprobe {module}; or give the container its RDMA device: --network=host"
    return f"modprobe {module}"


def _undriven(system: System) -> Iterator[tuple[str, str]]:
    bonds = {name for nic in system.topology.nics for name in nic.netdevs}
    for pci in system.names("sys/bus/pci/devices"):
        folder = f"sys/bus/pci/devices/{pci}"
        vendor, device = system.text(f"{folder}/vendor"), system.text(f"{folder}/device")
        is_network = system.text(f"{folder}/class").startswith("0x02")
        if not is_network or system.names(f"{folder}/infiniband"):
            continue
        # Virtual functions without a driver are kept for virtual machines.
        driver = system.target(f"{folder}/driver")
        if driver.startswith(GIVEN_AWAY) or (not driver and system.target(f"{folder}/physfn")):
            continue
        # Ports of one card that are bonded have one RDMA device, at the first.
        if any(
            system.target(f"{folder}/net/{name}/master") in bonds for name in system.names(f"{folder}/net")
        ):
            continue
        for known, devices, module in RDMA_HARDWARE:
            if vendor == known and devices.match(device):
                yield pci, module


def nodes(system: System) -> Iterator[Finding]:
    """Whether /dev/infiniband has a node of each RDMA device, that this process may open."""
    if system.is_container and not _has_node(system):
        return  # The check of containers says so.
    if system.exists("dev/infiniband") and not system.may_enter("dev/infiniband"):
        yield broken("", "no permission to look into /dev/infiniband", "as root: chmod 0755 /dev/infiniband")
        return
    usable: list[str] = []
    withheld: list[str] = []
    for uverbs in system.names("sys/class/infiniband_verbs"):
        device = system.text(f"sys/class/infiniband_verbs/{uverbs}/ibdev")
        if not device:
            continue
        node = f"/dev/infiniband/{uverbs}"
        if not system.exists(node[1:]) and system.is_container:
            withheld.append(device)
        elif not system.exists(node[1:]):
            yield broken(
                device, f"{node} is missing", "install rdma-core, or: udevadm trigger; udevadm settle"
            )
        elif not system.is_usable(node[1:]):
            yield broken(device, f"no permission to open {node}", f"as root: chmod 0666 {node}")
        else:
            usable.append(device)
    if usable:
        yield ok("", f"{_few(usable)}: device nodes can be opened")
    if withheld:
        yield note("", f"of the host's devices this container was not given {_few(withheld)}")


def _has_node(system: System) -> bool:
    """Whether /dev/infiniband has the node of an RDMA device, or may have: who may not look cannot tell."""
    if system.exists("dev/infiniband") and not system.may_enter("dev/infiniband"):
        return True
    return any(
        system.exists(f"dev/infiniband/{uverbs}")
        for uverbs in system.names("sys/class/infiniband_verbs")
        if system.text(f"sys/class/infiniband_verbs/{uverbs}/ibdev")
    )


def container(system: System) -> Iterator[Finding]:
    """Whether a container was given what RDMA needs."""
    if not system.is_container or not system.names("sys/class/infiniband"):
        return
    flags = "docker run --device=/dev/infiniband --cap-add=IPC_LOCK --ulimit memlock=-1 --network=host ..."
    pod = "in Kubernetes: the NIC as a resource of the device plugin, and capabilities: {add: [IPC_LOCK]}"
    if not _has_node(system):
        found = (
            "has no /dev/infiniband"
            if not system.exists("dev/infiniband")
            else ("was given no RDMA device in /dev/infiniband")
        )
        yield broken("", f"the container {found}, and the host has RDMA NICs", f"{flags} ({pod})")
    elif not system.may_lock_memory and system.locked_memory_limit is not None:
        yield warning(
            "",
            "the container has /dev/infiniband, but neither IPC_LOCK nor unlimited memlock",
            f"{flags} ({pod})",
        )
    else:
        yield ok("", "the container has /dev/infiniband and may lock memory")


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


KERNEL_CHECKS = (
    Check(
        "kernel",
        "The version of the kernel.",
        "The engine learns of a peer's death on the same host by pidfd_open, which came with Linux 5.3; "
        "GPU memory is registered through dmabuf, which came to RDMA with 5.12 (see `gpu-memory`).",
        version,
    ),
    Check(
        "modules",
        "Whether every card that can do RDMA is driven as an RDMA device, and whether ib_uverbs is loaded.",
        "A card works as a network interface without its RDMA module, so that nobody notices; programs "
        "reach RDMA devices through ib_uverbs only.",
        modules,
    ),
    Check(
        "device-nodes",
        "A node in /dev/infiniband for each RDMA device, and the right to open it.",
        "Every queue and every registration is made through this node.",
        nodes,
    ),
    Check(
        "container",
        "In a container: /dev/infiniband, and the right to lock memory.",
        "sysfs shows the host's NICs in every container; that a container was not given them shows at "
        "the first open.",
        container,
    ),
)
