"""The endpoint's half of the line protocol, for contenders written in Python.

A contender is a pair of processes, `source` and `target`, that run the same program. The driver
(`pair.py`) writes one command a line to stdin and reads one answer a line from what was stdout:

    version                  ok WORD
    setup ROLE DATA_BYTES    ok HEX          allocate and register; HEX is what the other side needs
    connect HEX              ok WORD         the other side's HEX; WORD names the path in use, or -
    fill SEED                ok              source: contents of the round; target: clear
    run LOAD                 ok [NS ...]     source: one duration a call; target: nothing
    verify LOAD              ok NUM_WRONG    bytes that differ, plus bad words seen while bouncing
    quit                     (exits)

Anything that goes wrong answers `error TEXT`. A library that prints would corrupt the answers, so
the answers use a private copy of stdout and descriptor 1 is pointed at stderr. `endpoint.h` is the
same in C. One registered buffer a process: the data area, then a page of mail whose first word goes
out and whose word at IN_OFFSET comes in.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TextIO

import numpy as np

from benchmarks.peers import workload
from benchmarks.peers.workload import Bytes, Indices, Load, Operation

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE_S = 60.0


class Endpoint(ABC):
    """One process of a contender; a subclass supplies the library, this class the measurement."""

    role: str
    data_bytes: int
    buffer: Bytes

    def __init__(self) -> None:
        self.bad_words = 0

    @abstractmethod
    def version(self) -> str:
        """Return the version of the library that is measured."""

    @abstractmethod
    def setup(self, nbytes: int) -> bytes:
        """Allocate `self.buffer` of `nbytes`, register it, and return what the peer needs."""

    @abstractmethod
    def connect(self, blob: bytes) -> str:
        """Take the peer's `setup` result; return the name of the path in use, or `-`."""

    @abstractmethod
    def write(self, offset: int, nbytes: int) -> None:
        """Write the same range of the buffer to the peer; return when it is placed there."""

    @abstractmethod
    def write_pages(self, source: Indices, target: Indices, page_bytes: int) -> None:
        """Write pages between the named slots; return when all are placed at the peer."""

    @abstractmethod
    def announce(self) -> None:
        """Tell the peer that the last bulk call has ended."""

    @abstractmethod
    def await_announcement(self) -> None:
        """Wait for `announce`, making whatever progress the library needs meanwhile."""

    @abstractmethod
    def notifier(self) -> Callable[[], None]:
        """Return a call that writes the outgoing word to the peer's mail and notifies the peer."""

    @abstractmethod
    def waiter(self) -> Callable[[], None]:
        """Return a call that waits for the peer's next notification."""

    def flagger(self) -> Callable[[], None]:
        """Return a call that writes the outgoing word to the peer's mail and notifies nobody."""
        msg = "this contender measures no write without notification"
        raise ValueError(msg)

    def prepare(self, load: Load) -> None:  # noqa: B027  most libraries prepare nothing
        """Do what a user would do once, long before the first transfer of this shape."""

    def progress(self) -> bool:
        """Make progress between commands; return False if the library needs none of it."""
        return False

    def close(self) -> None:  # noqa: B027  the process ends anyway
        """Let go of the library."""

    # What follows is the measurement.

    def run(self, load: Load) -> list[int]:
        """Run one load; return nanoseconds of each timed call at the source, nothing elsewhere."""
        self.prepare(load)
        if load.shape.op.is_latency:
            self.bad_words = 0
            return self._bounce(load)
        if self.role == "target":
            self.await_announcement()
            return []
        durations = self._write_all(load) if load.shape.op is Operation.WRITE else self._page_all(load)
        self.announce()
        return durations[load.num_warmup :]

    def _write_all(self, load: Load) -> list[int]:
        durations: list[int] = []
        for call in range(load.total_calls):
            offset = workload.offset_of_call(load, call)
            start = time.perf_counter_ns()
            self.write(offset, load.shape.size_bytes)
            durations.append(time.perf_counter_ns() - start)
        return durations

    def _page_all(self, load: Load) -> list[int]:
        place = workload.Placement.of(load)
        durations: list[int] = []
        for call in range(load.total_calls):
            source, target = place.of_call(call)
            start = time.perf_counter_ns()
            self.write_pages(source, target, load.shape.size_bytes)
            durations.append(time.perf_counter_ns() - start)
        return durations

    def _bounce(self, load: Load) -> list[int]:
        mail = memoryview(self.buffer)[self.data_bytes :]
        outgoing = mail[workload.OUT_OFFSET : workload.OUT_OFFSET + 8].cast("Q")
        incoming = mail[workload.IN_OFFSET : workload.IN_OFFSET + 8].cast("Q")
        words = [workload.mix(load.seed + call) for call in range(load.total_calls)]
        if load.shape.op is Operation.NOTIFY:
            send, wait = self.notifier(), self.waiter()
        else:
            send, wait = self.flagger(), None
        serve = self._serve if self.role == "source" else self._return
        durations = serve(words, outgoing, incoming, send, wait)
        return [duration // 2 for duration in durations[load.num_warmup :]]

    def _serve(
        self,
        words: list[int],
        outgoing: memoryview[int],
        incoming: memoryview[int],
        send: Callable[[], None],
        wait: Callable[[], None] | None,
    ) -> list[int]:
        durations: list[int] = []
        clock = time.perf_counter_ns
        for word in words:
            outgoing[0] = word
            start = clock()
            send()
            if wait is None:
                poll_word(incoming, word)
            else:
                wait()
            durations.append(clock() - start)
            if incoming[0] != word:
                self.bad_words += 1
        return durations

    def _return(
        self,
        words: list[int],
        outgoing: memoryview[int],
        incoming: memoryview[int],
        send: Callable[[], None],
        wait: Callable[[], None] | None,
    ) -> list[int]:
        for word in words:
            if wait is None:
                poll_word(incoming, word)
            else:
                wait()
            received = incoming[0]
            outgoing[0] = received
            send()
            if received != word:
                self.bad_words += 1
        return []

    def verify(self, load: Load) -> int:
        """Return how many bytes or bounced words of the last load were wrong."""
        if load.shape.op.is_latency:
            return self.bad_words
        if self.role == "source":
            return 0
        return workload.num_wrong_bytes(self.buffer[: self.data_bytes], load)


def poll_word(incoming: memoryview[int], word: int) -> None:
    """Spin until a mailed word arrives.

    The previous word differs, so equality means arrival. Time is looked at rarely: a look costs as
    much as the poll.
    """
    polls = 0
    deadline = time.monotonic() + DEADLINE_S
    while incoming[0] != word:
        polls += 1
        if polls % 65536 == 0 and time.monotonic() > deadline:
            msg = f"no word arrived within {DEADLINE_S} s"
            raise TimeoutError(msg)


def aligned_buffer(nbytes: int) -> Bytes:
    """Return page-aligned, touched host memory of the process, as an application would hold it."""
    raw = np.zeros(nbytes + 4096, dtype=np.uint8)
    start = -raw.ctypes.data % 4096
    buffer = raw[start : start + nbytes]
    buffer[:] = 0
    return buffer


def _die_with_the_driver() -> None:
    """Ask the kernel to end this process when its parent goes, so that none is left behind."""
    pr_set_pdeathsig, sigkill = 1, 9
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, sigkill)


class _Commands:
    """Lines from descriptor 0, unbuffered by Python so that readiness can be polled."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._pending = b""

    def next(self) -> list[str]:
        """Wait for a command, progressing the library meanwhile; empty at the end of input."""
        while b"\n" not in self._pending:
            busy = self._endpoint.progress()
            ready, _, _ = select.select([0], [], [], 0.0 if busy else None)
            if ready:
                chunk = os.read(0, 1 << 20)
                if not chunk:
                    return []
                self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode().split()


def serve(endpoint: Endpoint) -> None:
    """Answer the driver until it says `quit`; the main program of every Python contender."""
    answers: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _die_with_the_driver()
    commands = _Commands(endpoint)
    while (words := commands.next()) and words[0] != "quit":
        answers.write(_reply(endpoint, words) + "\n")
    endpoint.close()
    # Libraries with threads of their own may crash while the interpreter winds down (NIXL's wheel
    # does); every answer is out, so leave without that.
    answers.flush()
    sys.stderr.flush()
    os._exit(0)


def _reply(endpoint: Endpoint, words: list[str]) -> str:
    """Return the answer line of one command; every failure becomes one, none is lost."""
    try:
        return f"ok {_answer(endpoint, words)}"
    except Exception as error:  # noqa: BLE001  the driver records it and goes on
        return " ".join(f"error {type(error).__name__}: {error}".split())


def _answer(endpoint: Endpoint, words: list[str]) -> str:
    command, arguments = words[0], words[1:]
    if command == "version":
        return endpoint.version()
    if command == "setup":
        endpoint.role, endpoint.data_bytes = arguments[0], int(arguments[1])
        return endpoint.setup(endpoint.data_bytes + workload.MAIL_BYTES).hex()
    if command == "connect":
        return endpoint.connect(bytes.fromhex(arguments[0]))
    if command == "fill":
        data = endpoint.buffer[: endpoint.data_bytes]
        if endpoint.role == "source":
            workload.fill_source(data, int(arguments[0]))
        else:
            workload.fill_target(data)
        endpoint.buffer[endpoint.data_bytes :] = 0
        return ""
    if command == "run":
        return " ".join(map(str, endpoint.run(Load.parse(arguments))))
    if command == "verify":
        return str(endpoint.verify(Load.parse(arguments)))
    msg = f"unknown command {command}"
    raise ValueError(msg)
