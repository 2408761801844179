"""The operations that `anyfabric perf` repeats, as either side of a pair runs them.

Both processes hold an `End` of a case: memory to write from and to be written into, a counter, and a
function that submits one operation to the other end. Ping, pong and the stream of writes are loops over
these, in Python, through the public API: what they measure includes the calls.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import anyfabric as af

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from anyfabric.cli.perf_cases import Case

__all__ = ["End", "Introduction", "permutations", "receive"]

WAIT_S = 20.0
"""No operation of any case takes longer, unless the other side is gone."""
NUM_LOOKS = 40
"""How often it is seen within that time whether the other side is."""


@dataclass(frozen=True, slots=True)
class Introduction:
    """What one end tells the other: where to write and what to count.

    Attributes:
        descriptor: Serialised descriptor of the memory to write into, hexadecimal.
        imm: Immediate of the counter there.
        pid: Process, for baselines on the same host.
        dst_address: Where the memory lies in that process, likewise.
    """

    descriptor: str
    imm: int
    pid: int
    dst_address: int


def permutations(case: Case) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Source and destination pages of a case: random, the same in both processes."""
    random = np.random.default_rng(case.pages)
    return (
        random.permutation(case.pages).astype(np.uint32),
        random.permutation(case.pages).astype(np.uint32),
    )


def receive(engine: af.Engine, peer: af.Address) -> af.Message:
    """The next message, while there is a peer to send it.

    Raises:
        PeerLost: `peer` is lost, and so sends none.
        WaitTimeout: It sent none for `WAIT_S`.
    """
    for _ in range(NUM_LOOKS):
        try:
            return engine.receive(timeout_s=WAIT_S / NUM_LOOKS)
        except af.WaitTimeout:  # noqa: PERF203 - it costs nothing until it is raised
            if engine.path(peer).state == "lost":
                msg = "the other process of the measurement is lost"
                raise af.PeerLost(msg, operation="perf", peer=str(peer)) from None
    msg = f"the other process of the measurement was silent for {WAIT_S:g} s"
    raise af.WaitTimeout(msg, operation="perf", peer=str(peer))


class End:
    """One end of one case; a context manager that gives its memory back."""

    def __init__(self, engine: af.Engine, case: Case, peer: af.Address) -> None:
        """Make memory and a counter of what `peer` does; `connect` before anything is submitted."""
        self.case = case
        self._engine = engine
        self._peer = peer
        self.src = self._memory()
        self.dst = self._memory()
        self.host = engine.address.sockets[0].rpartition(":")[0].strip("[]")
        self.counter = engine.counter(sources=[peer])
        self.num_arrived = 0
        self._message = b"\1" * case.nbytes
        self.submit: Callable[[], af.Transfer]

    def __enter__(self) -> End:
        """Return the end itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close counter and regions."""
        self.counter.close()
        for region in (self.src, self.dst):
            region.close()

    @property
    def arrivals(self) -> int:
        """How many times one operation counts at the other end."""
        return self.case.pages if self.case.op in {"pages", "scatter"} else 1

    def introduction(self) -> Introduction:
        """What the other end has to know about this one."""
        descriptor = self.dst.descriptor().to_bytes().hex()
        return Introduction(descriptor, self.counter.imm, os.getpid(), self.dst._address)

    def connect(self, other: Introduction) -> None:
        """Bind `submit` to the other end."""
        engine, case, peer = self._engine, self.case, self._peer
        remote = af.Descriptor.from_bytes(bytes.fromhex(other.descriptor))
        imm, src, nbytes = other.imm, self.src, case.nbytes
        if case.op == "write":
            whole, target = src[0:nbytes], remote[0:nbytes]
            self.submit = lambda: engine.write(whole, target, imm=imm)
        elif case.op == "pages":
            src_indices, dst_indices = permutations(case)
            src_pages = af.Pages(src, src_indices, case.size_bytes)
            dst_pages = af.Pages(remote, dst_indices, case.size_bytes)
            self.submit = lambda: engine.write_pages(src_pages, dst_pages, imm=imm)
        elif case.op == "scatter":
            size = case.size_bytes
            pairs = zip(*permutations(case), strict=True)
            targets = [af.Target(remote, int(a) * size, int(b) * size, size) for a, b in pairs]
            self.submit = lambda: engine.scatter(src, targets, imm=imm)
        elif case.op == "send":
            self.submit = lambda: engine.send(peer, self._message)
        else:
            self.submit = lambda: engine.barrier([peer], imm=imm)

    def arrive(self) -> None:
        """Wait until the other end's next operation is here."""
        if self.case.op == "send":
            self._message = receive(self._engine, self._peer).data
        else:
            self.num_arrived += self.arrivals
            self.counter.wait(self.num_arrived, WAIT_S)

    def pong(self, rounds: int) -> None:
        """Answer each operation with one of our own."""
        transfer: af.Transfer | None = None
        for _ in range(rounds):
            self.arrive()
            transfer = self.submit()
        if transfer is not None:
            transfer.wait(WAIT_S)

    def fill(self, seed: int) -> None:
        """Put bytes that nobody wrote before into the source, and clear the destination."""
        self.src.numpy()[:] = np.random.default_rng(seed).integers(0, 256, self.src.nbytes, np.uint8)
        self.dst.numpy()[:] = 0
        self._message = self.src.numpy()[: self.case.nbytes].tobytes()

    def check(self) -> dict[str, int]:
        """CRC-32 of what was written here, and how often it was counted, really and by right."""
        placed = self._message if self.case.op == "send" else self.dst.numpy()[: self.case.nbytes].data
        return {
            "crc": zlib.crc32(placed),
            "counted": self.counter.value,
            "expected": self.num_arrived,
        }

    def expected_checksum(self) -> int:
        """CRC-32 of what our operations leave at the other end."""
        case, source = self.case, self.src.numpy()[: self.case.nbytes]
        if case.op in {"pages", "scatter"} and case.nbytes:
            src_indices, dst_indices = permutations(case)
            flat: Any = source
            pages: Any = flat.reshape(case.pages, case.size_bytes)
            placed: Any = np.empty_like(pages)
            placed[dst_indices] = pages[src_indices]
            source = placed.reshape(-1)
        return zlib.crc32(source.data)

    def _memory(self) -> af.Region:
        if self.case.memory == "allocated":
            region = self._engine.allocate(self.case.region_bytes)
            region.numpy()[:] = 1  # touched, as memory in use is
            return region
        return self._engine.register(np.ones(self.case.region_bytes, np.uint8))
