"""What the hardware and the kernel allow, measured in the run that measures us.

Each baseline moves the same bytes over the same permutation as the case beside it, with nothing of the
engine on the way: two polled words, `memcpy`, a loop of copies, `process_vm_writev`, raw sockets. The
loops are native (`_core.baseline_*`); this file makes them meet across the two processes.
"""

from __future__ import annotations

import mmap
import os
import socket
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from anyfabric import _core
from anyfabric.cli.perf_ops import WAIT_S, permutations

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from anyfabric.cli.perf_cases import Case
    from anyfabric.cli.perf_ops import End, Introduction

__all__ = ["Other", "baselines_of", "measure", "serve"]

RING_BYTES = 4096
RING_MAX_SIZE = 64
COPY_MIN_BYTES = 64 << 10
"""Below this a repeated copy stays in the first cache, which no write to another process can."""
SOCKET_MIN_BYTES = 256 << 10


class Other:
    """The other process, as a baseline needs it."""

    def __init__(self, introduction: Introduction, host: str, ask: Callable[..., dict[str, Any]]) -> None:
        """Keep who it is; `ask(name, **arguments)` starts its half and returns its first answer."""
        self.introduction = introduction
        self.host = host
        self.ask = ask


def baselines_of(case: Case, *, same_host: bool) -> list[str]:
    """Names of the baselines that belong beside a case; empty where there is none."""
    bulk = case.op in {"write", "pages"}
    if case.transport == "tcp" and bulk and case.nbytes >= SOCKET_MIN_BYTES:
        return ["socket_1", "socket_2"]
    if case.transport != "shm" or not same_host:
        return []
    if case.op == "write" and case.size_bytes <= RING_MAX_SIZE:
        return ["ring"]
    if not bulk or case.nbytes < COPY_MIN_BYTES:
        return []
    if case.memory == "registered":
        return ["process_vm_writev"]
    return ["memcpy" if case.op == "write" else "copy_pages"]


def measure(name: str, end: End, other: Other, rounds: int) -> list[int]:
    """Run a baseline; return the nanoseconds of each round."""
    case = end.case
    with _indices(case) as (dst_indices, src_indices):
        indices = (dst_indices, src_indices, case.pages)
        if name == "memcpy":
            return _core.baseline_memcpy(end.dst._address, end.src._address, case.nbytes, rounds)
        if name == "copy_pages":
            return _core.baseline_copy_pages(
                end.dst._address, end.src._address, indices, case.size_bytes, rounds
            )
        if name == "process_vm_writev":
            peer = other.introduction
            return _core.baseline_process_vm_writev(
                peer.pid, peer.dst_address, end.src._address, indices, case.size_bytes, rounds
            )
        if name == "ring":
            return _ring(other, rounds)
        return _sockets(int(name.removeprefix("socket_")), end, other, indices, rounds)


def serve(end: End, request: dict[str, Any], *, ready: Callable[..., None]) -> None:
    """Run the other half of a baseline that has two.

    Args:
        end: This process's end of the case.
        request: `name` and what `measure` sent with it.
        ready: Tells the measuring side to begin, with keywords.
    """
    if request["name"] == "ring":
        with open(request["path"], "r+b") as file, _mapped(file.fileno()) as address:  # noqa: PTH123 - a descriptor's link
            ready()
            _core.baseline_ring_pong(address, request["rounds"])
        return
    host = end.host
    with ExitStack() as stack, _indices(end.case) as (dst_indices, src_indices):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = stack.enter_context(socket.create_server((host, 0), family=family))
        listener.settimeout(WAIT_S)
        ready(port=listener.getsockname()[1])
        streams = [stack.enter_context(listener.accept()[0]) for _ in range(request["streams"])]
        _core.baseline_socket_sink(
            [stream.fileno() for stream in streams],
            end.dst._address,
            (dst_indices, src_indices, end.case.pages),
            end.case.size_bytes,
            request["rounds"],
            timeout_s=WAIT_S,
        )


def _ring(other: Other, rounds: int) -> list[int]:
    fd = os.memfd_create("anyfabric-perf-ring")
    try:
        os.ftruncate(fd, RING_BYTES)
        with _mapped(fd) as address:
            other.ask("ring", path=f"/proc/{os.getpid()}/fd/{fd}", rounds=rounds)
            return _core.baseline_ring_ping(address, rounds)
    finally:
        os.close(fd)


def _sockets(
    num_streams: int, end: End, other: Other, indices: tuple[int, int, int], rounds: int
) -> list[int]:
    answer = other.ask("socket", streams=num_streams, rounds=rounds)
    with ExitStack() as stack:
        streams: list[socket.socket] = []
        for _ in range(num_streams):
            stream = socket.create_connection((other.host, answer["port"]), timeout=WAIT_S)
            stack.enter_context(stream)
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream.settimeout(None)
            streams.append(stream)
        fds = [stream.fileno() for stream in streams]
        return _core.baseline_socket_source(
            fds, end.src._address, indices, end.case.size_bytes, rounds, timeout_s=WAIT_S
        )


@contextmanager
def _indices(case: Case) -> Generator[tuple[int, int]]:
    """Addresses of the destination and source indices of a case, alive within the block."""
    src, dst = permutations(case)
    yield dst.__array_interface__["data"][0], src.__array_interface__["data"][0]
    del src, dst


@contextmanager
def _mapped(fd: int) -> Generator[int]:
    """Address of a shared mapping of a descriptor's first page."""
    with mmap.mmap(fd, RING_BYTES) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        yield view.__array_interface__["data"][0]
        del view  # an exported buffer would keep the mapping from being closed
