"""NIXL as a contender: one agent a process, the UCX plugin, host memory.

Usage: python -m benchmarks.peers.nixl_endpoint [--progress-thread]

Favours NIXL where its interface leaves a choice: requests for plain writes and for the bounced word
are built once and posted again, descriptor lists for pages are prepared once, and only what depends
on the pages of a call (`make_prepped_xfer` from two index arrays) is timed. A request must be
polled to its end, since NIXL sends its notification from that poll.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.peers import endpoint, workload
from benchmarks.peers.workload import Indices, Load, Operation

if TYPE_CHECKING:
    from collections.abc import Callable

WORD = b"word"
END = b"end"


class NixlEndpoint(endpoint.Endpoint):
    """One NIXL agent and the requests it posts again."""

    def __init__(self, *, progress_thread: bool) -> None:
        super().__init__()
        self._progress_thread = progress_thread
        self._agent: Any = None
        self._peer = ""
        self._remote_base = 0
        self._arrived = {WORD: 0, END: 0}
        self._awaited = {WORD: 0, END: 0}
        self._requests: dict[int, Any] = {}
        self._lists: tuple[Any, Any] | None = None

    def version(self) -> str:
        """Return the version of the wheel."""
        return importlib.metadata.version("nixl")

    def setup(self, nbytes: int) -> bytes:
        """Make the agent and register the buffer."""
        nixl = importlib.import_module("nixl._api")
        settings = nixl.nixl_agent_config(
            enable_prog_thread=self._progress_thread, enable_listen_thread=False, backends=["UCX"]
        )
        self._agent = nixl.nixl_agent(self.role, settings)
        self.buffer = endpoint.aligned_buffer(nbytes)
        self._base = int(self.buffer.ctypes.data)
        self._agent.register_memory([(self._base, nbytes, 0, "")], "DRAM")
        metadata: bytes = self._agent.get_agent_metadata()
        return json.dumps({"base": self._base, "metadata": metadata.hex()}).encode()

    def connect(self, blob: bytes) -> str:
        """Add the other agent and connect to it."""
        remote = json.loads(blob)
        peer: str | bytes = self._agent.add_remote_agent(bytes.fromhex(remote["metadata"]))
        self._peer = peer if isinstance(peer, str) else peer.decode()
        self._remote_base = int(remote["base"])
        self._agent.make_connection(self._peer)
        return "UCX_plugin"

    def _request(self, source: int, target: int, nbytes: int, note: bytes = b"") -> Any:
        local = self._agent.get_xfer_descs([(self._base + source, nbytes, 0)], "DRAM")
        remote = self._agent.get_xfer_descs([(self._remote_base + target, nbytes, 0)], "DRAM")
        return self._agent.initialize_xfer("WRITE", local, remote, self._peer, note)

    def prepare(self, load: Load) -> None:
        """Build the requests, or the descriptor lists, that a user would keep."""
        self._release()
        if self.role != "source" or load.shape.op.is_latency:
            return
        starts = np.arange(0, load.shape.span_bytes, load.shape.size_bytes, dtype=np.uint64)
        if load.shape.op is Operation.WRITE:
            for start in map(int, starts):
                self._requests[start] = self._request(start, start, load.shape.size_bytes)
            return
        rows = np.zeros((len(starts), 3), dtype=np.uint64)
        rows[:, 1] = load.shape.size_bytes
        local, remote = rows.copy(), rows.copy()
        local[:, 0] = starts + np.uint64(self._base)
        remote[:, 0] = starts + np.uint64(self._remote_base)
        self._lists = (
            self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", local, "DRAM"),
            self._agent.prep_xfer_dlist(self._peer, remote, "DRAM"),
        )

    def _release(self) -> None:
        for request in self._requests.values():
            self._agent.release_xfer_handle(request)
        self._requests.clear()
        if self._lists is not None:
            for prepared in self._lists:
                self._agent.release_dlist_handle(prepared)
            self._lists = None

    def _post(self, request: Any, note: bytes = b"") -> None:
        state: str = self._agent.transfer(request, note)
        check, pause = self._agent.check_xfer_state, self._pause
        while state == "PROC":
            state = check(request)
            pause()
        if state != "DONE":
            msg = f"NIXL ended a transfer as {state}"
            raise RuntimeError(msg)

    def _pause(self) -> None:
        if self._progress_thread:
            os.sched_yield()

    def write(self, offset: int, nbytes: int) -> None:
        """Post the kept request of the slot and poll it to its end."""
        del nbytes
        self._post(self._requests[offset])

    def write_pages(self, source: Indices, target: Indices, page_bytes: int) -> None:
        """Build a request from the prepared lists, post it and poll it to its end."""
        del page_bytes
        if self._lists is None:
            msg = "prepare was not called"
            raise RuntimeError(msg)
        local, remote = self._lists
        request = self._agent.make_prepped_xfer(
            "WRITE", local, source.view(np.int32), remote, target.view(np.int32)
        )
        self._post(request)
        self._agent.release_xfer_handle(request)

    def _collect(self) -> None:
        new: dict[str, list[bytes]] = self._agent.get_new_notifs()
        for notes in new.values():
            for note in notes:
                self._arrived[note] += 1

    def _await(self, note: bytes) -> None:
        self._awaited[note] += 1
        polls, deadline = 0, time.monotonic() + endpoint.DEADLINE_S
        while self._arrived[note] < self._awaited[note]:
            self._collect()
            self._pause()
            polls += 1
            if polls % 4096 == 0 and time.monotonic() > deadline:
                msg = f"no notification within {endpoint.DEADLINE_S} s"
                raise TimeoutError(msg)

    def announce(self) -> None:
        """Send a notification that belongs to no transfer."""
        self._agent.send_notif(self._peer, END)

    def await_announcement(self) -> None:
        """Poll for it, which also progresses what is written here."""
        self._await(END)

    def notifier(self) -> Callable[[], None]:
        """Post the kept request for the word with its notification."""
        mail = self.data_bytes
        request = self._request(mail + workload.OUT_OFFSET, mail + workload.IN_OFFSET, 8, WORD)
        return lambda: self._post(request, WORD)

    def waiter(self) -> Callable[[], None]:
        """Poll for the next notification."""
        return lambda: self._await(WORD)

    def progress(self) -> bool:
        """Poll, unless a thread of NIXL does."""
        if self._agent is None or not self._peer or self._progress_thread:
            return False
        self._collect()
        return True


if __name__ == "__main__":
    endpoint.serve(NixlEndpoint(progress_thread="--progress-thread" in sys.argv[1:]))
