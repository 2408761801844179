"""anyfabric as a contender, through its public Python interface.

Usage: python -m benchmarks.peers.anyfabric_endpoint TRANSPORT MEMORY POLLING STREAMS

MEMORY is `allocated` (the engine's own, which peers of the host map) or `registered` (numpy's).
Slices and pages are built inside the timed calls, as an application would build them.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Literal, cast

import anyfabric as af
from benchmarks.peers import endpoint, workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.peers.workload import Indices

WORD_IMM = 1
END_IMM = 2


class AnyfabricEndpoint(endpoint.Endpoint):
    """One engine and one region."""

    def __init__(self, transport: str, memory: str, polling: str, num_streams: int) -> None:
        super().__init__()
        self._allocates = memory == "allocated"
        self._engine = af.Engine(
            transports=(transport,),
            polling=cast("Literal['adaptive', 'busy']", polling),
            tcp_streams=num_streams,
            timeout_s=endpoint.DEADLINE_S,
        )
        self._words = self._engine.counter(imm=WORD_IMM)
        self._ends = self._engine.counter(imm=END_IMM)
        self._num_words = 0
        self._num_ends = 0

    def version(self) -> str:
        """Return the version of the package."""
        return af.__version__

    def setup(self, nbytes: int) -> bytes:
        """Allocate from the engine, or register numpy's memory with it."""
        if self._allocates:
            self._region = self._engine.allocate(nbytes)
            self.buffer = self._region.numpy("uint8")
        else:
            self.buffer = endpoint.aligned_buffer(nbytes)
            self._region = self._engine.register(self.buffer)
        descriptor = self._region.descriptor().to_bytes()
        return json.dumps({"address": str(self._engine.address), "descriptor": descriptor.hex()}).encode()

    def connect(self, blob: bytes) -> str:
        """Make the path that the first write would make, so that it can be named."""
        remote = json.loads(blob)
        self._remote = af.Descriptor.from_bytes(bytes.fromhex(remote["descriptor"]))
        self._peer = af.Address.parse(remote["address"])
        self._engine.connect(self._peer, timeout_s=endpoint.DEADLINE_S)
        return self._engine.path(self._peer).transport

    def write(self, offset: int, nbytes: int) -> None:
        """Write and wait until the bytes are placed."""
        end = offset + nbytes
        self._engine.write(self._region[offset:end], self._remote[offset:end]).wait()

    def write_pages(self, source: Indices, target: Indices, page_bytes: int) -> None:
        """Write all pages in one call and wait until they are placed."""
        self._engine.write_pages(
            af.Pages(self._region, source, page_bytes), af.Pages(self._remote, target, page_bytes)
        ).wait()

    def announce(self) -> None:
        """Send one immediate."""
        self._engine.barrier([self._peer], imm=END_IMM).wait()

    def await_announcement(self) -> None:
        """Wait for it."""
        self._num_ends += 1
        self._ends.wait(self._num_ends, timeout_s=endpoint.DEADLINE_S)

    def notifier(self) -> Callable[[], None]:
        """Write the word with an immediate.

        The transfer is not waited for: the peer's answer proves that the word was placed.
        """
        start = self.data_bytes + workload.OUT_OFFSET
        source = self._region[start : start + 8]
        start = self.data_bytes + workload.IN_OFFSET
        target = self._remote[start : start + 8]
        write = self._engine.write

        def notify() -> None:
            write(source, target, imm=WORD_IMM)

        return notify

    def waiter(self) -> Callable[[], None]:
        """Wait for the counter to reach the next word."""
        wait = self._words.wait

        def await_word() -> None:
            self._num_words += 1
            wait(self._num_words, endpoint.DEADLINE_S)

        return await_word

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


if __name__ == "__main__":
    endpoint.serve(AnyfabricEndpoint(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
