"""The measuring process of `anyfabric perf`.

One case is measured in interleaved repeats: ping-pong for latency, a stream for throughput, then each
baseline; the medians over the repeats are reported, the latencies of all repeats pooled. Clocks: a
latency is half a round trip, from the call that submits until the counter of the same process has the
answer; throughput is operations over the time until all of them are done at the target.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

import anyfabric as af
from anyfabric.cli.perf_baselines import Other, baselines_of, measure
from anyfabric.cli.perf_ops import WAIT_S, End, Introduction, receive

if TYPE_CHECKING:
    from collections.abc import Generator

    from anyfabric.cli.perf_cases import Case

__all__ = ["Link", "local_link", "remote_link", "run_case"]

NUM_REPEATS = 5
WARM_UP = 10
NUM_CHECKED = 3
"""Operations with fresh bytes that are compared before and after the timed ones."""


class Link:
    """An engine here and a `perf_peer.Peer` there."""

    def __init__(self, engine: af.Engine, peer: af.Address, *, same_host: bool) -> None:
        """Talk to `peer` through `engine`; `same_host` allows baselines that share memory."""
        self.engine = engine
        self.peer = peer
        self.same_host = same_host

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            TransferFailed: The peer could not do it.
            PeerLost: It is lost.
        """
        self.engine.send(self.peer, json.dumps({"do": do, **arguments}).encode()).wait(WAIT_S)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Receive an answer; raises as `ask`."""
        answer = json.loads(receive(self.engine, self.peer).data)
        if "error" in answer:
            msg = f"the other process of the measurement said: {answer['error']}"
            raise af.TransferFailed(msg, operation="perf", peer=str(self.peer))
        return answer

    def bye(self, *, more: bool = False) -> None:
        """Let the peer go, or wait for an engine with `more`; what was measured stands if it has gone."""
        with suppress(af.ConnectionBroken):
            self.engine.send(self.peer, json.dumps({"do": "bye", "more": more}).encode()).wait(WAIT_S)


@contextmanager
def local_link(settings: dict[str, Any]) -> Generator[Link]:
    """Start the other process on this host, with engines of the same settings on both sides."""
    # Ctrl-C reaches both processes; this one ends the other.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "from anyfabric.cli.perf_peer import main; main()"
    )
    command = [sys.executable, "-c", program, json.dumps(settings)]
    # Ours first: what is wrong with the settings, or missing, is said here and once.
    with (
        af.Engine(**settings) as engine,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,  # noqa: S603 - ourselves
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            if not line:
                msg = f"the other process ended with code {process.wait()} before it had an address"
                raise af.PeerLost(msg, operation="perf")
            link = Link(engine, af.Address.parse(line), same_host=True)
            yield link
            link.bye()
            process.wait(WAIT_S)
        finally:
            process.kill()


@contextmanager
def remote_link(address: str, settings: dict[str, Any], *, more: bool) -> Generator[Link]:
    """Use an `anyfabric perf serve`, here or elsewhere, which shall wait for `more` afterwards."""
    with af.Engine(**settings) as engine:
        link = Link(engine, af.Address.parse(address), same_host=False)
        engine.connect(link.peer)
        yield link
        link.bye(more=more)


def run_case(link: Link, case: Case, *, check: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure a case.

    Args:
        link: Where.
        case: What.
        check: Compare the bytes at the target before and after.

    Returns:
        The row of the case, and a row for each of its baselines.

    Raises:
        TransferFailed: Bytes at the target were not those at the source.
    """
    with End(link.engine, case, link.peer) as end:
        answer = link.ask("prepare", case=case.to_json(), introduction=asdict(end.introduction()))
        other = Introduction(**answer)
        end.connect(other)
        names = baselines_of(case, same_host=link.same_host)
        host = link.peer.sockets[0].rpartition(":")[0].strip("[]")

        def ask_baseline(name: str, **arguments: object) -> dict[str, Any]:
            return link.ask("baseline", name=name, **arguments)

        partner = Other(other, host, ask_baseline)
        latencies: list[int] = []
        seconds: list[float] = []
        base: dict[str, list[int]] = {name: [] for name in names}
        rounds = max(2, case.rounds // NUM_REPEATS)
        if check:
            _check(link, end, seed=1)
        for repeat in range(NUM_REPEATS):
            latencies += _ping(link, end, rounds, warm_up=WARM_UP if repeat == 0 else 2)
            seconds.append(_stream(link, end, rounds) / rounds)
            for name in names:
                base[name] += measure(name, end, partner, rounds)
                if name == "ring" or name.startswith("socket"):
                    link.answer()
        if check:
            _check(link, end, seed=2)
        link.ask("finish")
        nics = link.engine.path(link.peer).nics
    row = {**_row(case, latencies, seconds, check=check), "nics": list(nics)}
    return row, [_baseline_row(case, name, times) for name, times in base.items()]


def _ping(link: Link, end: End, rounds: int, *, warm_up: int) -> list[int]:
    """Half the round trips, in nanoseconds."""
    link.ask("pong", rounds=warm_up + rounds)
    times: list[int] = []
    submit, arrive, clock = end.submit, end.arrive, time.perf_counter_ns
    with _no_collections():
        for _ in range(warm_up + rounds):
            begin = clock()
            submit()
            arrive()
            times.append(clock() - begin)
    link.answer()
    return [t // 2 for t in times[warm_up:]]


def _stream(link: Link, end: End, rounds: int) -> float:
    """Seconds for `rounds` operations, a window of them in flight."""
    link.ask("absorb", rounds=rounds)
    window, submit = end.case.window, end.submit
    flying: deque[af.Transfer] = deque()
    with _no_collections():
        begin = time.perf_counter_ns()
        for _ in range(rounds):
            if len(flying) >= window:
                flying.popleft().wait(WAIT_S)
            flying.append(submit())
        while flying:
            flying.popleft().wait(WAIT_S)
        elapsed = time.perf_counter_ns() - begin
    link.answer()
    return elapsed / 1e9


def _check(link: Link, end: End, seed: int) -> None:
    for number in range(NUM_CHECKED):
        link.ask("fill", seed=0)
        end.fill(seed=NUM_CHECKED * seed + number)
        link.ask("absorb", rounds=1)
        end.submit().wait(WAIT_S)
        link.answer()
        answer = link.ask("check")
        if answer["counted"] != answer["expected"]:
            msg = (
                f"{end.case.op} over {end.case.transport}: the target counted {answer['counted']} "
                f"arrivals of {answer['expected']}"
            )
            raise af.TransferFailed(msg, operation="perf")
        found, expected = answer["crc"], end.expected_checksum()
        if found != expected:
            msg = (
                f"{end.case.op} of {end.case.nbytes} bytes over {end.case.transport}: the target holds "
                f"bytes of CRC-32 {found:#010x}, the source {expected:#010x}"
            )
            raise af.TransferFailed(msg, operation="perf", nbytes=end.case.nbytes)


@contextmanager
def _no_collections() -> Generator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _row(case: Case, latencies: list[int], seconds: list[float], *, check: bool) -> dict[str, Any]:
    second = statistics.median(seconds)
    return {
        **_common(case),
        "gb_per_s": case.nbytes / second / 1e9,
        "ops_per_s": 1 / second,
        "latency_us": _percentiles(latencies),
        "window": case.window,
        "rounds": len(latencies),
        "checked": check,
    }


def _baseline_row(case: Case, name: str, times: list[int]) -> dict[str, Any]:
    second = statistics.median(times) / 1e9
    size = 8 if name == "ring" else case.nbytes
    return {
        **_common(case),
        "baseline": name,
        "gb_per_s": size / second / 1e9,
        "ops_per_s": 1 / second,
        "latency_us": _percentiles(times),
        "rounds": len(times),
    }


def _common(case: Case) -> dict[str, Any]:
    return {
        "transport": case.transport,
        "op": case.op,
        "polling": case.polling,
        "memory": case.memory,
        "size_bytes": case.size_bytes,
        "pages": case.pages,
    }


def _percentiles(times: list[int]) -> dict[str, float]:
    points = np.percentile(np.array(times) / 1e3, (50, 99, 99.9, 100))
    return {name: round(float(p), 3) for name, p in zip(("p50", "p99", "p999", "max"), points, strict=True)}
