"""RDMA ports: whether they are up, their speed, addresses and packet sizes."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from typing import TYPE_CHECKING

from anyfabric.doctor.finding import Check, Finding, broken, note, ok, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyfabric.doctor.system import System
    from anyfabric.topology import Nic

__all__ = ["PORT_CHECKS", "packet_bytes"]

# What an RDMA packet may carry, and the most that the kernel reserves for the headers around it.
PACKET_SIZES = (4096, 2048, 1024, 512, 256)
HEADERS_BYTES = 96
GIVE_GUID = (
    "a virtual function is given one on the host: ip link set dev PHYSICAL vf NUMBER node_guid GUID, then "
    "with port_guid, and bind its driver again"
)


def link(system: System) -> Iterator[Finding]:
    """Whether each port is up, and each NIC that is named is here."""
    nics = system.topology.nics
    for name in system.named:
        ports = system.named_ports(name)
        if not _is_here(system, name):
            here = ", ".join(nic.name for nic in nics) or "no RDMA port"
            yield broken(
                name, f"the setting `nics` names it, and here is {here}", "unset or correct ANYFABRIC_NICS"
            )
        elif ports and not any(nic.is_given for nic in ports):
            found = "the setting `nics` names it, and it has no device node in /dev/infiniband"
            yield broken(name, found, "unset or correct ANYFABRIC_NICS, or give the NIC to the container")
    nics = system.nics
    named = [system.named_ports(name) for name in system.named]
    lacking = [nic for ports in named if all(port.state != "up" for port in ports) for nic in ports]
    num_up = sum(nic.state == "up" for nic in nics)
    for nic in nics:
        if nic.state == "up":
            continue
        phys = system.text(f"{_port(nic)}/phys_state").partition(":")[2].strip() or "unknown"
        state = system.text(f"{_port(nic)}/state").partition(":")[2].strip() or "unknown"
        interface = nic.netdevs[0] if nic.netdevs else ""
        if nic.fabric == "infiniband" and state == "INIT":
            mend = "start a subnet manager in this fabric, or ask who runs it: systemctl start opensm"
        elif interface:
            mend = f"ip link set dev {interface} up; then look at cable and switch: ethtool {interface}"
        else:
            mend = "look at cable and switch"
        found = f"the port is {state} (physical: {phys})"
        # Others serve, unless it was this one that was asked for.
        yield (warning if num_up and nic not in lacking else broken)(nic.name, found, mend)
    if num_up:
        yield ok("", f"{num_up} of {len(nics)} ports are up")


def speed(system: System) -> Iterator[Finding]:
    """Whether a port is slower than its like, or its slot slower than the port."""
    nics = [nic for nic in system.nics if nic.state == "up"]
    needed = [nic for nic in nics if system.needs(nic)]
    usual: dict[str, int] = {}
    for fabric in {nic.fabric for nic in needed}:
        rates = Counter(nic.gbps for nic in needed if nic.fabric == fabric)
        usual[fabric] = max(rates, key=lambda gbps: (rates[gbps], gbps))
    # One that is too slow to be used may be a card like those that are.
    models: set[str] = set() if system.named else {_model(system, nic) for nic in needed} - {""}
    for nic in nics:
        is_like = nic in needed or _model(system, nic) in models
        if nic.pci and is_like and 0 < nic.gbps < usual.get(nic.fabric, 0):
            found = f"{nic.gbps} Gbit/s, where most of its kind here have {usual[nic.fabric]}"
            interface = nic.netdevs[0] if nic.netdevs else nic.device
            yield warning(nic.name, found, f"look at cable, transceiver and switch port: ethtool {interface}")
        if nic.slot_gbps and nic.slot_gbps < nic.gbps:
            found = f"{nic.gbps} Gbit/s in a slot that carries {nic.slot_gbps}"
            yield warning(
                nic.name, found, f"move the card to a wider slot; compare: lspci -vv -s {nic.pci} | grep Lnk"
            )
    known = Counter(nic.gbps for nic in nics if nic.gbps)
    for gbps, number in sorted(known.items(), reverse=True):
        yield ok("", f"{number} of {gbps} Gbit/s")


def gid(system: System) -> Iterator[Finding]:
    """Whether each port has an address that peers can reach."""
    good: list[str] = []
    for nic in system.nics:
        if nic.state != "up" or nic.fabric == "other":
            continue
        gids = [(address, kind) for _, address, kind in _gids(system, nic)]
        if system.gid_index is not None and nic.fabric != "efa" and system.names(f"{_port(nic)}/gids"):
            yield from _chosen(system, nic, system.gid_index)
            continue
        if nic.fabric == "ethernet" and gids and not any(kind for _, kind in gids):
            yield note(nic.name, "the kinds of its GIDs cannot be read")
            continue
        if nic.fabric == "ethernet":
            gids = [(address, kind) for address, kind in gids if kind == "RoCE v2"]
        interface = nic.netdevs[0] if nic.netdevs else "INTERFACE"
        give = f"ip addr add ADDRESS/24 dev {interface}" if nic.fabric == "ethernet" else GIVE_GUID
        if nic.netdevs == ("lo",):
            yield note(nic.name, "on the interface lo: its GIDs reach this host only")
        elif not gids and not system.names(f"{_port(nic)}/gids"):
            yield note(nic.name, "its GIDs cannot be read")
        elif not gids:
            kind = "RoCE v2 GID" if nic.fabric == "ethernet" else "GID"
            in_container = (
                "the container may lack the host's interfaces: --network=host; else " * system.is_container
            )
            level = broken if system.needs(nic) else note
            yield level(nic.name, f"the port has no {kind}", f"{in_container}{give}")
        elif nic.fabric == "ethernet" and all(address.is_link_local for address, _ in gids):
            level = warning if system.needs(nic) else note
            yield level(nic.name, f"only a link-local GID ({gids[0][0]}): it reaches no other subnet", give)
        else:
            good.append(nic.name)
    if good:
        yield ok("", f"{len(good)} port{'s' * (len(good) > 1)} with a GID that peers can reach")


def _chosen(system: System, nic: Nic, chosen: int) -> Iterator[Finding]:
    """Whether the GID that the settings choose reaches peers."""
    gids = {index: (address, kind) for index, address, kind in _gids(system, nic)}
    address, kind = gids.get(chosen, (None, ""))
    level = warning if system.needs(nic) else note
    mend = "unset or correct ANYFABRIC_GID_INDEX"
    if address is None:
        there = ", ".join(map(str, sorted(gids))) or "none"
        found = f"no GID at index {chosen}, which the setting `gid_index` names; there are: {there}"
        yield (broken if system.needs(nic) else note)(nic.name, found, mend)
    elif nic.fabric == "ethernet" and kind not in {"RoCE v2", ""}:
        found = f"GID {chosen}, which the setting `gid_index` names, is of {kind}: it is not routed"
        yield level(nic.name, f"{found}, and no peer with RoCE v2 is reached", mend)
    elif nic.fabric == "ethernet" and address.is_link_local:
        found = f"GID {chosen}, which the setting `gid_index` names, is link-local ({address})"
        yield level(nic.name, f"{found}: it reaches no other subnet", mend)
    else:
        shown = address.ipv4_mapped or address
        yield ok(nic.name, f"GID {chosen}, which the setting `gid_index` names: {shown}")


def mtu(system: System) -> Iterator[Finding]:
    """Whether packets are full, and of one size."""
    ports: list[tuple[Nic, str, int]] = []
    for nic in system.nics:
        interface = nic.netdevs[0] if nic.netdevs else ""
        size = system.number(f"sys/class/net/{interface}/mtu") if interface else None
        if nic.fabric == "ethernet" and nic.state == "up" and size is not None and system.needs(nic):
            ports.append((nic, interface, size))
    if len({packet_bytes(size) for _, _, size in ports}) > 1:
        listed = ", ".join(f"{nic.name} {size}" for nic, _, size in ports)
        mend = "the same everywhere, switches included: ip link set dev X mtu 9000"
        yield warning("", f"interfaces differ: {listed}", mend)
    for nic, interface, size in ports:
        packet = packet_bytes(size)
        if packet < PACKET_SIZES[0]:
            found = f"MTU {size}: RDMA packets carry {packet} bytes of {PACKET_SIZES[0]}"
            mend = f"ip link set dev {interface} mtu 9000, and the same on switches and peers"
            yield warning(nic.name, found, mend)
    if ports and all(packet_bytes(size) == PACKET_SIZES[0] for _, _, size in ports):
        yield ok("", f"MTU {min(size for _, _, size in ports)} or more: RDMA packets are full")


def packet_bytes(mtu_bytes: int) -> int:
    """What an RDMA packet carries over an interface of that MTU; 0 when nothing."""
    return next((packet for packet in PACKET_SIZES if packet + HEADERS_BYTES <= mtu_bytes), 0)


def _is_here(system: System, name: str) -> bool:
    """Whether a NIC may be here that any library calls so: by device, interface or address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        pass
    else:
        return True
    device = name.partition(":")[0]
    if device in system.names("sys/class/net"):
        return True
    # libfabric's domains begin with the device: rdmap16s27-rdm.
    return any(
        device == known or device.startswith(f"{known}-") for known in system.names("sys/class/infiniband")
    )


def _model(system: System, nic: Nic) -> str:
    """The PCI device; empty where unknown."""
    return system.text(f"sys/bus/pci/devices/{nic.pci}/device") if nic.pci else ""


def _port(nic: Nic) -> str:
    return f"sys/class/infiniband/{nic.device}/ports/{nic.port}"


def _gids(system: System, nic: Nic) -> list[tuple[int, ipaddress.IPv6Address, str]]:
    """Addresses that are not empty, with their index and kind."""
    found: list[tuple[int, ipaddress.IPv6Address, str]] = []
    for index in system.names(f"{_port(nic)}/gids"):
        text = system.text(f"{_port(nic)}/gids/{index}")
        if re.fullmatch(r"[0-9a-f]{4}(:[0-9a-f]{4}){7}", text):
            address = ipaddress.IPv6Address(text)
            # InfiniBand and EFA number ports by GUID: zero is the prefix alone.
            if index.isdecimal() and int(address) & (1 << 64) - 1:
                found.append((int(index), address, system.text(f"{_port(nic)}/gid_attrs/types/{index}")))
    return found


PORT_CHECKS = (
    Check(
        "link",
        "The state of each RDMA port.",
        "A port that is down carries nothing; the engine uses the others, and `info` lists it.",
        link,
    ),
    Check(
        "speed",
        "The rate of each port beside its like, and beside its PCIe slot.",
        "A bad cable or a narrow slot makes one NIC of several slow, and whoever waits for all waits for it.",
        speed,
    ),
    Check(
        "gid",
        "The GIDs of each port: on Ethernet one of RoCE v2, with an IP address behind it; or the one that "
        "`gid_index` names.",
        "A GID is the address of a port. Those of RoCE v1 are not routed, link-local ones stay in one "
        "subnet, and without an IP address on the interface there is no other.",
        gid,
    ),
    Check(
        "mtu",
        "The MTU of each Ethernet interface below an RDMA port.",
        "RDMA packets carry 4096 bytes where the interface has room; at the usual 1500 they carry 1024. "
        "Where two ends differ, large packets vanish and only small transfers work.",
        mtu,
    ),
)
