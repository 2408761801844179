"""Trials: a write over every way that this machine has, from one engine to another in this process."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from anyfabric._core import Descriptor
from anyfabric.config import TRANSPORTS
from anyfabric.doctor.finding import Check, Finding, broken, ok, warning
from anyfabric.engine import Engine
from anyfabric.errors import AnyFabricError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyfabric._core import Counter, Region
    from anyfabric.doctor.system import System
    from anyfabric.topology import Topology

__all__ = ["TRIALS", "TRIAL_BYTES", "WAIT_S", "End", "Way", "allowed", "ways"]

TRIAL_BYTES = 1 << 20
# Generous: a busy machine is no broken one.
WAIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Way:
    """One transport, and one NIC of it where it has several."""

    transport: str
    nic: str = ""

    def __str__(self) -> str:
        """For the table: `shm`, `verbs mlx5_0`."""
        return f"{self.transport} {self.nic}".strip()

    def settings(self) -> dict[str, Any]:
        """Of an engine that has this way only."""
        only: dict[str, Any] = {"transports": [self.transport], "require": self.transport}
        return {**only, "nics": [self.nic]} if self.nic else only


def ways(topology: Topology) -> list[Way]:
    """Each built-in transport, and each RDMA port that is up with the transport that drives it."""
    known: frozenset[str] = frozenset(TRANSPORTS)
    found = [Way(transport) for transport in ("shm", "tcp")]
    for nic in topology.nics:
        transport = "libfabric" if nic.fabric == "efa" else "verbs"
        if nic.state == "up" and nic.is_given and transport in known:
            found.append(Way(transport, nic.name))
    return found


def allowed(system: System) -> list[Way]:
    """Those that the settings allow, and libfabric where it needs no RDMA device."""
    found = ways(system.topology)
    if (system.names_libfabric or system.has_slingshot) and all(
        way.transport != "libfabric" for way in found
    ):
        found.append(Way("libfabric"))
    return [way for way in found if system.may_use(way.transport)]


class End(contextlib.AbstractContextManager["End"]):
    """An engine with one way, a region, and a counter of what arrives in it."""

    engine: Engine
    region: Region
    counter: Counter

    def __init__(self, way: Way, **settings: Any) -> None:
        self.way = way
        self.engine = Engine(**{**way.settings(), **settings})
        self.region = self.engine.allocate(TRIAL_BYTES)
        self.counter = self.engine.counter()
        self._num_arrived = 0

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the engine."""
        self.engine.close(timeout_s=1.0)

    def offer(self) -> dict[str, Any]:
        """What the other end needs; JSON-able. What came for an earlier offer, or failed, counts no more."""
        self.counter.close()
        self.counter = self.engine.counter()
        self._num_arrived = 0
        return {"descriptor": self.region.descriptor().to_bytes().hex(), "imm": self.counter.imm}

    def write(self, offered: dict[str, Any], seed: int) -> None:
        """Write the bytes of a seed into the other end, and wait until they are there.

        Raises:
            AnyFabricError: As the engine does.
            ValueError: The offer is none.
        """
        source = self.engine.register(pattern(seed))
        try:
            remote = Descriptor.from_bytes(bytes.fromhex(offered["descriptor"]))
            self.engine.write(source, remote, imm=int(offered["imm"]), timeout_s=WAIT_S).wait()
        finally:
            source.close()

    def fault(self, seed: int) -> str:
        """Wait for one arrival, and say what is wrong with its bytes; empty when nothing is."""
        self._num_arrived += 1
        self.counter.wait(self._num_arrived, timeout_s=WAIT_S)
        wrong = np.flatnonzero(self.region.numpy("uint8") != pattern(seed))
        return f"counted, but {len(wrong)} bytes differ, the first at {wrong[0]}" if len(wrong) else ""


def pattern(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes that follow from a seed."""
    return np.frombuffer(bytearray(random.Random(seed).randbytes(TRIAL_BYTES)), dtype=np.uint8)  # noqa: S311 - no secret


def write_to_itself(system: System) -> Iterator[Finding]:
    """A write over every way that the settings allow."""
    needed = {nic.name for nic in system.nics if system.needs(nic)}
    for seed, way in enumerate(allowed(system)):
        fail = broken if not way.nic or way.nic in needed else warning
        mend = "what is broken above, first; then ANYFABRIC_TRANSPORTS without it"
        try:
            with End(way) as sender, End(way) as receiver:
                sender.write(receiver.offer(), seed)
                fault = receiver.fault(seed)
        except AnyFabricError as error:
            yield fail(str(way), f"{error.code}: {error}", mend)
            continue
        if fault:
            yield fail(str(way), fault, mend)
        else:
            yield ok(str(way), "1 MiB written, counted and compared")


TRIALS = (
    Check(
        "write",
        "A write of 1 MiB with an immediate over every transport that the settings allow and every RDMA "
        "port, between two engines here.",
        "Everything else is a reason why this might fail; this is whether it does.",
        write_to_itself,
    ),
)
