"""Who is measured, and how each is started.

A contender is one library in one configuration. Everything that favours or limits one of them is
said here, as `note`, and ends up in the record.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers import build
from benchmarks.peers.workload import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

REPOSITORY = Path(__file__).parents[2]

ANYFABRIC, PEER, BASELINE = "anyfabric", "peer", "baseline"
NO_FLAG = "not measured: it has a notification"


class UnavailableError(RuntimeError):
    """A contender cannot be started here; the text says why."""


@dataclass(frozen=True)
class Contender:
    """One library in one configuration.

    Attributes:
        name: What the table calls it; unique.
        kind: `anyfabric`, `peer` or `baseline`.
        language: What its caller is written in; a Python caller costs microseconds of its own.
        command: Builds the argument vector of either process; raises `UnavailableError`.
        env: Added to the environment of both processes.
        unsupported: Operations it does not offer, and why.
        latency_calls: Fewer bounced words for what takes milliseconds each.
        note: What a reader must know to judge the row.
    """

    name: str
    kind: str
    language: str
    command: Callable[[], tuple[str, ...]]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    unsupported: Mapping[Operation, str] = field(default_factory=dict[Operation, str])
    latency_calls: int | None = None
    note: str = ""


def _baseline(*arguments: str) -> Callable[[], tuple[str, ...]]:
    return lambda: (str(_built(build.baseline)), *arguments)


def _ucx(*arguments: str) -> Callable[[], tuple[str, ...]]:
    return lambda: (str(_built(build.ucx)), *arguments)


def _built(compile_it: Callable[[], Path]) -> Path:
    try:
        return compile_it()
    except build.BuildError as error:
        raise UnavailableError(str(error)) from None


def _peer(module: str, *arguments: str) -> Callable[[], tuple[str, ...]]:
    def command() -> tuple[str, ...]:
        python = build.peers_python()
        if not python.exists():
            msg = "the peers are not installed: run benchmarks/peers/setup"
            raise UnavailableError(msg)
        return (str(python), "-m", f"benchmarks.peers.{module}", *arguments)

    return command


def _anyfabric(*arguments: str) -> Callable[[], tuple[str, ...]]:
    return lambda: (sys.executable, "-m", "benchmarks.peers.anyfabric_endpoint", *arguments)


def _mooncake_env() -> dict[str, str]:
    env = {"MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535", "GLOG_minloglevel": "2"}
    unpacked = sorted((build.FOLDER / ".venv" / "system").glob("**/*-linux-gnu"))
    if unpacked:
        env["LD_LIBRARY_PATH"] = ":".join(map(str, unpacked))
    return env


_NO_FLAG_NEEDED = {Operation.FLAG: NO_FLAG}
_OWN_PACKAGE = {"PYTHONPATH": str(REPOSITORY / "python")}
_NIXL_ENV = {"UCX_MODULES": "^ib"}
_LOOPBACK_UCX = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}


def _own(name: str, *arguments: str, note: str) -> Contender:
    return Contender(
        name, ANYFABRIC, "Python", _anyfabric(*arguments), _OWN_PACKAGE, _NO_FLAG_NEEDED, note=note
    )


def _own_rust(name: str, *arguments: str, note: str) -> Contender:
    def command() -> tuple[str, ...]:
        return (str(_built(build.rust_endpoint)), *arguments)

    return Contender(name, ANYFABRIC, "Rust", command, {}, _NO_FLAG_NEEDED, note=note)


def _anyfabric_contenders() -> tuple[Contender, ...]:
    configurations = (
        ("shm", "shm", "allocated", "adaptive", "1", "allocate()d memory"),
        ("shm, busy", "shm", "allocated", "busy", "1", "allocate()d memory, busy polling"),
        ("shm, registered", "shm", "registered", "adaptive", "1", "memory of the application"),
        ("tcp, 1 stream", "tcp", "registered", "adaptive", "1", "memory of the application"),
        ("tcp, 2 streams", "tcp", "registered", "adaptive", "2", "memory of the application"),
    )
    python = (_own(f"anyfabric {name}", *rest, note=note) for name, *rest, note in configurations)
    rust = (_own_rust(f"anyfabric {name} (Rust)", *rest, note=note) for name, *rest, note in configurations)
    return (*python, *rust)


def all_contenders() -> tuple[Contender, ...]:
    """Return every contender, in the order of the table."""
    return (
        *_anyfabric_contenders(),
        *_nixl(),
        Contender(
            "Mooncake tcp",
            PEER,
            "Python",
            _peer("mooncake_endpoint"),
            _mooncake_env(),
            note="P2PHANDSHAKE; queue limit raised, since its default refuses 4096 pages in one call",
        ),
        *_ucx_contenders(),
        RING,
        Contender(
            "process_vm_writev",
            BASELINE,
            "C",
            _baseline("vmwrite"),
            unsupported={Operation.NOTIFY: "it cannot notify"},
            note="1024 pages a call",
        ),
        _raw_tcp(1),
        _raw_tcp(2),
    )


def _nixl() -> tuple[Contender, ...]:
    plain, threaded = _peer("nixl_endpoint"), _peer("nixl_endpoint", "--progress-thread")
    prepared = "requests and descriptor lists prepared outside the timed calls"
    return (
        Contender(
            "NIXL, no progress thread",
            PEER,
            "Python",
            plain,
            _NIXL_ENV,
            _NO_FLAG_NEEDED,
            note=f"{prepared}; the application polls",
        ),
        Contender(
            "NIXL, progress thread",
            PEER,
            "Python",
            threaded,
            _NIXL_ENV,
            _NO_FLAG_NEEDED,
            latency_calls=100,
            note=f"its default; {prepared}; a thread a process spins",
        ),
        Contender(
            "NIXL tcp",
            PEER,
            "Python",
            plain,
            {**_NIXL_ENV, **_LOOPBACK_UCX},
            _NO_FLAG_NEEDED,
            note=f"UCX_TLS=tcp, no progress thread; {prepared}",
        ),
    )


def _ucx_contenders() -> tuple[Contender, ...]:
    return (
        Contender(
            "UCX shm",
            PEER,
            "C",
            _ucx("allocated"),
            note="memory allocated by UCX; put, flush, active message; busy polling",
        ),
        Contender(
            "UCX cma",
            PEER,
            "C",
            _ucx("user"),
            note="memory of the process; put, flush, active message; busy polling",
        ),
        Contender(
            "UCX tcp",
            PEER,
            "C",
            _ucx("user"),
            _LOOPBACK_UCX,
            note="UCX_TLS=tcp; put, flush, active message; busy polling",
        ),
    )


def _raw_tcp(num_streams: int) -> Contender:
    plural = "s" if num_streams > 1 else ""
    return Contender(
        f"raw tcp, {num_streams} stream{plural}",
        BASELINE,
        "C",
        _baseline("tcp", str(num_streams)),
        unsupported={Operation.FLAG: NO_FLAG},
        note="sendmsg and recvmsg into place without headers; non-blocking, yields while it waits",
    )


RING = Contender(
    "memcpy into mapped memory",
    BASELINE,
    "C",
    _baseline("memcpy"),
    note="page by page; the notification is a bare polled ring of one slot",
)
"""The least that a notification between two processes can take."""
