"""Mooncake's transfer engine as a contender, over TCP, with its peer-to-peer handshake.

Usage: python -m benchmarks.peers.mooncake_endpoint

Needs MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER raised: at the default a call with 2500 pages or more is
refused. Its writes block and need nothing of the target, so a target only waits for the driver.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.peers import endpoint, workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.peers.workload import Indices

PACKAGE = "mooncake-transfer-engine-non-cuda"


def _check(status: int, what: str) -> None:
    if status < 0:
        msg = f"Mooncake's {what} returned {status}"
        raise RuntimeError(msg)


class MooncakeEndpoint(endpoint.Endpoint):
    """One transfer engine; addresses travel as integers."""

    def __init__(self) -> None:
        super().__init__()
        self._library: Any = None
        self._engine: Any = None
        self._session = ""
        self._remote_base = 0
        self._arrived = 0
        self._awaited = 0

    def version(self) -> str:
        """Return the version of the wheel."""
        return importlib.metadata.version(PACKAGE)

    def setup(self, nbytes: int) -> bytes:
        """Start the engine and register the buffer."""
        self._library = importlib.import_module("mooncake.engine")
        self._engine = self._library.TransferEngine()
        _check(self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""), "initialize")
        self.buffer = endpoint.aligned_buffer(nbytes)
        self._base = int(self.buffer.ctypes.data)
        _check(self._engine.register_memory(self._base, nbytes), "register_memory")
        session = f"127.0.0.1:{self._engine.get_rpc_port()}"
        return json.dumps({"session": session, "base": self._base}).encode()

    def connect(self, blob: bytes) -> str:
        """Remember where the peer is; the first write connects."""
        remote = json.loads(blob)
        self._session, self._remote_base = str(remote["session"]), int(remote["base"])
        return "tcp"

    def write(self, offset: int, nbytes: int) -> None:
        """Write and wait, in one call of the library."""
        status = self._engine.transfer_sync_write(
            self._session, self._base + offset, self._remote_base + offset, nbytes
        )
        _check(status, "transfer_sync_write")

    def write_pages(self, source: Indices, target: Indices, page_bytes: int) -> None:
        """Turn the index arrays into the lists of addresses the library takes, and write them."""
        status = self._engine.batch_transfer_sync_write(
            self._session,
            (source.astype(np.int64) * page_bytes + self._base).tolist(),
            (target.astype(np.int64) * page_bytes + self._remote_base).tolist(),
            [page_bytes] * len(source),
        )
        _check(status, "batch_transfer_sync_write")

    def announce(self) -> None:
        """Do nothing: every write has ended where it was called."""

    def await_announcement(self) -> None:
        """Do nothing: the library's own threads receive."""

    def _mail(self) -> tuple[str, int, int, int]:
        source = self._base + self.data_bytes + workload.OUT_OFFSET
        target = self._remote_base + self.data_bytes + workload.IN_OFFSET
        return self._session, source, target, 8

    def notifier(self) -> Callable[[], None]:
        """Write the word with the library's notification, which follows the data as a message."""
        mail, write = self._mail(), self._library.TransferOpcode.Write
        note = self._library.TransferNotify("word", "word")
        return lambda: _check(self._engine.transfer_sync(*mail, write, note), "transfer_sync")

    def waiter(self) -> Callable[[], None]:
        """Poll for notifications."""
        return self._await_notification

    def _await_notification(self) -> None:
        self._awaited += 1
        polls, deadline = 0, time.monotonic() + endpoint.DEADLINE_S
        while self._arrived < self._awaited:
            self._arrived += len(self._engine.get_notifies())
            polls += 1
            if polls % 4096 == 0 and time.monotonic() > deadline:
                msg = f"no notification within {endpoint.DEADLINE_S} s"
                raise TimeoutError(msg)

    def flagger(self) -> Callable[[], None]:
        """Write the word and tell nobody."""
        mail = self._mail()
        return lambda: _check(self._engine.transfer_sync_write(*mail), "transfer_sync_write")


if __name__ == "__main__":
    endpoint.serve(MooncakeEndpoint())
