"""What an engine costs and how it behaves at its limits: start, memory, idle, many peers, crowded cores.

Usage: python -m benchmarks.limits [--json FILE] [--only NAME,...]

Each row is measured through the public API between real processes, and printed beside its goal.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anyfabric as af
from benchmarks.peers import machine

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

MIB = 1 << 20
CALLED = 7
Found = TypeVar("Found")
SPAWN = mp.get_context("spawn")


def num_descriptors() -> int:
    """Open file descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def measure_start() -> dict[str, float]:
    """Engine start in ms, and the resident memory of an idle engine in MiB; medians of 5.

    The memory is told without and with the package, most of which is numpy.
    """
    code = (
        "import resource,time,json;"
        "rss=lambda:int(open('/proc/self/statm').read().split()[1])*resource.getpagesize()/2**20;"
        "bare=rss();import anyfabric as af;before=rss();"
        "t=time.perf_counter();e=af.Engine();ms=(time.perf_counter()-t)*1e3;"
        "time.sleep(0.5);print(json.dumps([ms,rss()-before,rss()-bare]))"
    )
    rows = [
        json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
        for _ in range(5)
    ]
    return {
        "start_ms": statistics.median(row[0] for row in rows),
        "rss_mib": statistics.median(row[1] for row in rows),
        "rss_with_package_mib": statistics.median(row[2] for row in rows),
    }


def measure_idle() -> dict[str, float]:
    """Share of one core that an idle engine uses, in percent, over 5 s."""
    with af.Engine():
        time.sleep(0.5)
        before, began = time.process_time(), time.monotonic()
        time.sleep(5)
        return {"idle_percent": 100 * (time.process_time() - before) / (time.monotonic() - began)}


def serve(pipe: Connection, transport: str, nbytes: int) -> None:
    """Own a region and a counter, until told to stop."""
    with af.Engine(transports=(transport,)) as engine:
        region = engine.allocate(nbytes)
        pipe.send(region.descriptor().to_bytes())
        with engine.counter(imm=1):
            pipe.recv()


def with_server(transport: str, nbytes: int, body: Callable[[af.Descriptor], Found]) -> Found:
    """Run `body` against the region of a server process."""
    ours, theirs = SPAWN.Pipe()
    server = SPAWN.Process(target=serve, args=(theirs, transport, nbytes))
    server.start()
    try:
        return body(af.Descriptor.from_bytes(ours.recv()))
    finally:
        ours.send(None)
        server.join(10)


def measure_first_write() -> dict[str, float]:
    """First 4 KiB write to a peer never met, until it is done, in ms; median of 5."""

    def once(transport: str) -> float:
        def body(remote: af.Descriptor) -> float:
            with af.Engine(transports=(transport,)) as engine:
                region = engine.allocate(4096)
                began = time.perf_counter()
                engine.write(region, remote, imm=1).wait(5)
                return (time.perf_counter() - began) * 1e3

        return with_server(transport, 4096, body)

    return {
        f"first_write_{transport}_ms": statistics.median(once(transport) for _ in range(5))
        for transport in ("shm", "tcp")
    }


def measure_behind() -> dict[str, float]:
    """8-byte writes while a 1 GiB write to the same peer is under way: p50 and p99 in us."""
    found: dict[str, float] = {}
    for transport in ("shm", "tcp"):

        def body(remote: af.Descriptor, transport: str = transport) -> list[float]:
            latencies: list[float] = []
            with af.Engine(transports=(transport,)) as engine:
                region = engine.allocate(1 << 30)
                engine.write(region, remote).wait(60)  # the first touch of memory is not what is measured
                for _ in range(3):
                    large = engine.write(region, remote)
                    while not large.done:
                        began = time.perf_counter()
                        engine.write(region[:8], remote[:8], imm=1).wait(5)
                        latencies.append((time.perf_counter() - began) * 1e6)
                    large.wait(60)
            return sorted(latencies)

        latencies = with_server(transport, 1 << 30, body)
        found[f"behind_1gib_{transport}_p50_us"] = latencies[len(latencies) // 2]
        found[f"behind_1gib_{transport}_p99_us"] = latencies[int(len(latencies) * 0.99)]
        found[f"behind_1gib_{transport}_writes"] = len(latencies)
    return found


def all_to_all_member(pipe: Connection, seconds: float) -> None:
    """Write 1 MiB blocks to every other member in turn; report bytes and the slowest transfer."""
    with af.Engine() as engine:
        region = engine.allocate(MIB)
        landing = engine.allocate(MIB)
        pipe.send(landing.descriptor().to_bytes())
        remotes = [af.Descriptor.from_bytes(data) for data in pipe.recv()]
        for remote in remotes:
            engine.write(region, remote).wait(10)
        pipe.send(None)
        pipe.recv()
        moved, slowest = 0, 0.0
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for remote in remotes:
                began = time.monotonic()
                engine.write(region, remote, imm=1).wait(10)
                slowest = max(slowest, time.monotonic() - began)
                moved += MIB
        pipe.send((moved, slowest))
        pipe.recv()


def all_to_all(num_members: int, seconds: float) -> tuple[float, float]:
    """GB/s of all members together, and the slowest transfer in ms."""
    pipes = [SPAWN.Pipe() for _ in range(num_members)]
    members = [SPAWN.Process(target=all_to_all_member, args=(theirs, seconds)) for _, theirs in pipes]
    for member in members:
        member.start()
    ours = [pipe for pipe, _ in pipes]
    regions = [pipe.recv() for pipe in ours]
    for idx, pipe in enumerate(ours):
        pipe.send([region for other, region in enumerate(regions) if other != idx])
    for pipe in ours:
        pipe.recv()
    for pipe in ours:
        pipe.send(None)
    rows = [pipe.recv() for pipe in ours]
    for pipe in ours:
        pipe.send(None)
    for member in members:
        member.join(10)
    return sum(row[0] for row in rows) / seconds / 1e9, max(row[1] for row in rows) * 1e3


def measure_crowd() -> dict[str, float]:
    """4 processes all to all beside 2, on the same cores; median of 3 rounds each, interleaved.

    The slowest transfer is that of all rounds.
    """
    two: list[tuple[float, float]] = []
    four: list[tuple[float, float]] = []
    for _ in range(3):
        two.append(all_to_all(2, 1.0))
        four.append(all_to_all(4, 1.0))
    two_gb, four_gb = (statistics.median(row[0] for row in rows) for rows in (two, four))
    return {
        "two_gb_per_s": two_gb,
        "four_gb_per_s": four_gb,
        "four_of_two": four_gb / two_gb,
        "four_slowest_ms": max(row[1] for row in four),
    }


def many_engines(pipe: Connection, num_engines: int, transport: str) -> None:
    """Own `num_engines` engines, which call an address all at once when told one, until told to stop."""
    engines = [af.Engine(transports=(transport,)) for _ in range(num_engines)]
    pipe.send([engine.address.to_bytes() for engine in engines])
    while address := pipe.recv():
        called = [af.Address.from_bytes(address)]
        for transfer in [engine.barrier(called, imm=CALLED) for engine in engines]:
            transfer.wait(30)
        pipe.send(None)
    for engine in engines:
        engine.close(timeout_s=0.1)


def measure_peers(num_peers: int = 256) -> dict[str, float]:
    """Paths to 256 peers within a soft limit of 1024 descriptors: seconds, descriptors, and the cost idle.

    The peers call one engine, all at once, and another one calls them. Only the one engine's process is
    measured, not the peers', which share its cores.
    """
    found: dict[str, float] = {}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for transport in ("shm", "tcp"):
        pipes = [SPAWN.Pipe() for _ in range(4)]
        owners = [
            SPAWN.Process(target=many_engines, args=(theirs, num_peers // 4, transport))
            for _, theirs in pipes
        ]
        for owner in owners:
            owner.start()
        addresses = [af.Address.from_bytes(data) for ours, _ in pipes for data in ours.recv()]
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        try:
            with af.Engine(transports=(transport,)) as engine:
                began = time.monotonic()
                for ours, _ in pipes:
                    ours.send(engine.address.to_bytes())
                engine.counter(imm=CALLED).wait(num_peers, 30)
                found[f"callers_256_{transport}_s"] = time.monotonic() - began
                for ours, _ in pipes:
                    ours.recv()  # what the callers know to be done
            with af.Engine(transports=(transport,)) as engine:
                before = num_descriptors()
                began = time.monotonic()
                engine.peer_group(addresses)
                found[f"peers_256_{transport}_s"] = time.monotonic() - began
                time.sleep(2)  # meeting them is not what is measured
                found[f"descriptors_per_peer_{transport}"] = (num_descriptors() - before) / num_peers
                cpu, began = time.process_time(), time.monotonic()
                time.sleep(8)
                idle = (time.process_time() - cpu) / (time.monotonic() - began)
                found[f"idle_256_{transport}_percent"] = 100 * idle
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for ours, _ in pipes:
                ours.send(None)
            for owner in owners:
                owner.join(30)
    return found


MEASURES: dict[str, Callable[[], dict[str, float]]] = {
    "start": measure_start,
    "idle": measure_idle,
    "first_write": measure_first_write,
    "behind": measure_behind,
    "crowd": measure_crowd,
    "peers": measure_peers,
}
LIMITS: dict[str, tuple[str, float]] = {
    "start_ms": ("<=", 50),
    "rss_mib": ("<=", 32),
    "rss_with_package_mib": ("<=", 32),
    "idle_percent": ("<", 1),
    "first_write_shm_ms": ("<=", 20),
    "first_write_tcp_ms": ("<=", 20),
    "behind_1gib_shm_p99_us": ("<=", 200),
    "behind_1gib_tcp_p99_us": ("<=", 200),
    "four_of_two": (">=", 0.6),
    "four_slowest_ms": ("<=", 100),
    "callers_256_shm_s": ("<=", 5),
    "callers_256_tcp_s": ("<=", 5),
    "peers_256_shm_s": ("<=", 5),
    "peers_256_tcp_s": ("<=", 5),
    "descriptors_per_peer_shm": ("<=", 3),
    "descriptors_per_peer_tcp": ("<=", 3),
    "idle_256_shm_percent": ("<", 1),
    "idle_256_tcp_percent": ("<", 1),
}


def main() -> None:
    """Measure, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default=",".join(MEASURES))
    options = parser.parse_args()
    started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    values: dict[str, float] = {}
    for name in options.only.split(","):
        values |= MEASURES[name]()
    for name, value in values.items():
        sign, limit = LIMITS.get(name, ("", 0.0))
        print(f"{name:28} {value:12.3f}  {f'{sign} {limit:g}' if sign else ''}")
    if options.json:
        commit, is_modified = machine.commit(Path(__file__).parents[1])
        record = {
            "kind": "limits",
            "started_at": started_at,
            "command": " ".join(["python -m benchmarks.limits", *sys.argv[1:]]),
            "commit": commit,
            "modified": is_modified,
            "machine": asdict(machine.here()),
            "versions": {"python": platform.python_version(), "anyfabric": af.__version__},
            "values": values,
            "limits": {name: f"{sign} {limit:g}" for name, (sign, limit) in LIMITS.items()},
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
