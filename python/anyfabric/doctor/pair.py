"""Two machines: `anyfabric doctor serve` on one, `anyfabric doctor --peer ADDRESS` on the other.

Each of our ways is tried with each of the partner's of the same transport, in both directions. Requests and
answers are JSON in `Engine.send`, one at a time:

    hello                                  -> the partner's ways and ports
    offer   way                            -> descriptor and imm of that way's region
    check   way, seed                      -> what is wrong with what has arrived; empty when nothing is
    write   way, descriptor, imm, seed     -> when the partner has written into our region
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from anyfabric._core import Address
from anyfabric.doctor.checks.ports import packet_bytes
from anyfabric.doctor.finding import Check, Finding, broken, ok, warning
from anyfabric.doctor.trial import WAIT_S, End, Way, allowed
from anyfabric.engine import Engine
from anyfabric.errors import AnyFabricError, WaitTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anyfabric.doctor.system import System

__all__ = ["Partner", "compare", "pair_check", "ports"]

POLL_S = 0.5


def ports(system: System) -> list[dict[str, Any]]:
    """What of the RDMA ports must agree between two machines; JSON-able."""
    found: list[dict[str, Any]] = []
    for nic in system.nics:
        if nic.state == "up" and system.needs(nic):
            size = system.number(f"sys/class/net/{nic.netdevs[0]}/mtu") if nic.netdevs else None
            packet = packet_bytes(size) if nic.fabric == "ethernet" and size is not None else None
            found.append({"name": nic.name, "fabric": nic.fabric, "gbps": nic.gbps, "packet_bytes": packet})
    return found


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Iterator[Finding]:
    """Differences between two machines that make traffic fail or slow."""
    if not ours or not theirs:
        return
    fabrics = [sorted({port["fabric"] for port in side}) for side in (ours, theirs)]
    if not set(fabrics[0]) & set(fabrics[1]):
        found = f"here {', '.join(fabrics[0])}, there {', '.join(fabrics[1])}: RDMA cannot connect them"
        yield broken("", found, "use tcp, or NICs of one kind")
    packets = [
        {port["packet_bytes"] for port in side if port["packet_bytes"] is not None} for side in (ours, theirs)
    ]
    if packets[0] and packets[1] and packets[0] != packets[1]:
        listed = [", ".join(str(packet) for packet in sorted(side)) for side in packets]
        found = f"RDMA packets carry {listed[0]} bytes here and {listed[1]} there"
        yield warning("", found, "one MTU on both, and on what lies between: ip link set dev X mtu 9000")
    rates = [max(port["gbps"] for port in side) for side in (ours, theirs)]
    if rates[0] != rates[1]:
        found = f"the fastest port has {rates[0]} Gbit/s here and {rates[1]} there"
        yield warning("", found, "nothing, if the machines are not alike; else cable and switch port")


class Partner(contextlib.AbstractContextManager["Partner"]):
    """The other machine: does what it is asked, for one client after another."""

    def __init__(self, system: System, *, listen: str, secret: str | bytes | None = None) -> None:
        """Listen on `listen`; both sides prove `secret`, or that of the settings."""
        self._ports = ports(system)
        host = listen.rpartition(":")[0] or listen
        self.engine = Engine(listen=listen, secret=secret)
        # Memory of this host cannot be tried from another.
        offered = [way for way in needed(system) if way.transport != "shm"]
        self._ends = [End(way, listen=host, secret=secret) for way in offered]

    def __exit__(self, *_: object) -> None:
        """Close every engine."""
        for end in self._ends:
            end.close()
        self.engine.close(timeout_s=1.0)

    def serve(self, alive: Callable[[], bool] = lambda: True) -> None:
        """Answer until `alive`, asked twice a second, says no."""
        while alive():
            try:
                message = self.engine.receive(timeout_s=POLL_S)
            except WaitTimeout:
                continue
            try:
                answer = self._answer(json.loads(message.data))
            except AnyFabricError as error:
                answer = {"error": f"{error.code}: {error}"}
            except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
                answer = {"error": f"not a request: {error!r}"}
            with contextlib.suppress(AnyFabricError):
                self.engine.send(message.source, json.dumps(answer).encode())

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "hello":
            listed = [{"transport": end.way.transport, "nic": end.way.nic} for end in self._ends]
            return {"ways": listed, "ports": self._ports}
        end = self._ends[int(request["way"])]
        if request["do"] == "offer":
            return end.offer()
        if request["do"] == "check":
            return {"fault": end.fault(int(request["seed"]))}
        if request["do"] == "write":
            end.write(request, int(request["seed"]))
            return {}
        msg = f"unknown request {request['do']!r}"
        raise ValueError(msg)


def pair_check(address: str) -> Check:
    """The check that tries every pair of ways with the partner at an address."""
    return Check(
        "pair",
        "With `--peer`: the ports of both machines, and a write both ways over every pair of NICs in use.",
        "Each machine may be well, and what lies between them not: switch, MTU, VLAN, firewall, partition.",
        lambda system: _try_pairs(system, address),
    )


def _try_pairs(system: System, address: str) -> Iterator[Finding]:
    try:
        with Engine() as engine:
            partner = _Asked(engine, Address.parse(address))
            hello = partner.ask({"do": "hello"})
            yield from compare(ports(system), hello["ports"])
            for ours, theirs in pairs(system, hello):
                yield _try_pair(partner, ours, theirs)
    except AnyFabricError as error:
        mend = "run `anyfabric doctor serve` there, and paste what it prints"
        yield broken(address, f"no partner: {error.code}: {error}", mend)
    except (KeyError, TypeError, ValueError) as error:
        yield broken(address, f"the partner answers nonsense: {error!r}", "the same version on both machines")


def pairs(system: System, hello: dict[str, Any]) -> Iterator[tuple[Way, tuple[int, Way]]]:
    """Our ways, each with the numbered ones of the partner that it could reach: NICs of one fabric."""
    fabrics = {port["name"]: port["fabric"] for port in hello["ports"]}
    for ours in needed(system):
        fabric = next((nic.fabric for nic in system.nics if nic.name == ours.nic), None)
        for number, way in enumerate(hello["ways"]):
            theirs = Way(way["transport"], way["nic"])
            if ours.transport == theirs.transport and fabric == fabrics.get(theirs.nic):
                yield ours, (number, theirs)


def needed(system: System) -> list[Way]:
    """Ways over NICs that an engine uses, and over none."""
    names = {"", *(nic.name for nic in system.nics if system.needs(nic))}
    return [way for way in allowed(system) if way.nic in names]


def _try_pair(partner: _Asked, ours: Way, theirs: tuple[int, Way]) -> Finding:
    number, other = theirs
    name = f"{ours} → {other.nic or 'there'}"
    mend = "look at switch, MTU, VLAN and firewall between the two (RoCE is UDP port 4791)"
    seed = number + 1
    try:
        with End(ours) as end:
            end.write(partner.ask({"do": "offer", "way": number}), seed)
            fault = partner.ask({"do": "check", "way": number, "seed": seed})["fault"]
            if not fault:
                partner.ask({"do": "write", "way": number, "seed": -seed, **end.offer()})
                fault = end.fault(-seed)
    except AnyFabricError as error:
        return broken(name, f"{error.code}: {error}", mend)
    return broken(name, fault, mend) if fault else ok(name, "1 MiB each way, counted and compared")


class _Asked:
    """The partner, as the one who asks sees it."""

    def __init__(self, engine: Engine, address: Address) -> None:
        self._engine = engine
        self._address = address

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._engine.send(self._address, json.dumps(request).encode(), timeout_s=WAIT_S).wait()
        answer = json.loads(self._engine.receive(timeout_s=2 * WAIT_S).data)
        if "error" in answer:
            msg = f"the partner says: {answer['error']}"
            raise AnyFabricError(msg)
        return answer
