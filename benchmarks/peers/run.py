"""Measures every contender beside every other and writes one record.

Usage: python -m benchmarks.peers.run [--rounds 5] [--only TEXT] [--op NAME] [--quick]
           [--quiet-s 60] [--json FILE]

In each round every contender has one turn, in an order that rotates by one from round to round. A
turn starts a fresh pair of processes, runs all operations, checks every byte of every operation and
ends the pair. A bare ring before and after it tells how far apart the cores are: a turn that found them
far apart is taken again, three times at most, and counts only where no other does.

A contender that cannot be started is recorded as unavailable with the reason; one that moves a wrong
byte, or fails, is recorded as failed, keeps no number, and makes this program exit 1.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers import machine, placement, records
from benchmarks.peers.contenders import REPOSITORY, Contender, UnavailableError, all_contenders
from benchmarks.peers.pair import Pair, PairError
from benchmarks.peers.workload import DATA_BYTES, Load, Operation, Shape

if TYPE_CHECKING:
    from collections.abc import Sequence

RECORDS = REPOSITORY / "benchmarks" / "records"
KIB, MIB = 1 << 10, 1 << 20
QUICK_DIVISOR = 8
MAX_TURNS = 3


# Each shape with the calls that a turn times, and those before them that it does not.
PLAN = {
    Shape(Operation.NOTIFY, 8, 1, DATA_BYTES): (2000, 200),
    Shape(Operation.FLAG, 8, 1, DATA_BYTES): (2000, 200),
    Shape(Operation.WRITE, 64 * KIB, 1, DATA_BYTES): (1024, 64),
    Shape(Operation.WRITE, MIB, 1, DATA_BYTES): (128, 8),
    Shape(Operation.WRITE, 32 * MIB, 1, DATA_BYTES): (16, 2),
    # The caches of a busy host hold them only after some calls.
    Shape(Operation.PAGES, KIB, 4096, 4 * MIB): (64, 32),
    Shape(Operation.PAGES, KIB, 4096, DATA_BYTES): (32, 2),
    Shape(Operation.PAGES, 8 * KIB, 4096, DATA_BYTES): (16, 2),
}


@dataclass
class Standing:
    """What is known so far about one contender."""

    contender: Contender
    version: str = "-"
    path: str = "-"
    problem: str | None = None
    rounds: dict[Shape, list[records.Round]] = field(default_factory=dict[Shape, list[records.Round]])
    problems: dict[Shape, str] = field(default_factory=dict[Shape, str])

    def participant(self) -> records.Participant:
        """Return the contender as the record describes it."""
        each = self.contender
        env = {name: value for name, value in each.env.items() if str(REPOSITORY) not in value}
        return records.Participant(
            each.name, each.kind, each.language, self.version, self.path, each.note, env
        )

    def row(self, shape: Shape) -> records.Row:
        """Return what the record says about one operation: rounds, or why there are none."""
        problem = self.problem or self.problems.get(shape)
        if problem:
            problem = problem.replace(f"{REPOSITORY}/", "")
        unsupported = self.contender.unsupported.get(shape.op)
        if problem is None and unsupported is not None:
            problem = f"unsupported: {unsupported}"
        rounds = () if problem else tuple(self.rounds.get(shape, ()))
        return records.Row(self.contender.name, shape, rounds, problem)


def load_of(shape: Shape, contender: Contender, seed: int, *, quick: bool) -> Load:
    """Return the load of one turn."""
    num_calls, num_warmup = PLAN[shape]
    if shape.op.is_latency and contender.latency_calls is not None:
        num_calls, num_warmup = contender.latency_calls, contender.latency_calls // 10
    if quick:
        num_calls, num_warmup = max(1, num_calls // QUICK_DIVISOR), max(1, num_warmup // QUICK_DIVISOR)
    return Load(shape, num_calls, num_warmup, seed)


def take_turn(standing: Standing, shapes: Sequence[Shape], round_idx: int, *, quick: bool) -> int:
    """Let one contender run all operations once; what goes wrong is noted, not raised.

    Returns:
        What a bare ring took meanwhile, in nanoseconds; 0 for not known.
    """
    todo = [
        shape
        for shape in shapes
        if shape.op not in standing.contender.unsupported and shape not in standing.problems
    ]
    turns: dict[Shape, records.Round] = {}
    ring_ns = placement.ring_ns()
    while todo and standing.problem is None:
        todo = _one_pair(standing, todo, round_idx, turns, quick=quick)
    ring_ns = max(ring_ns, placement.ring_ns())
    for shape, turn in turns.items():
        standing.rounds.setdefault(shape, []).append(replace(turn, ring_ns=ring_ns))
    return ring_ns


def _one_pair(
    standing: Standing, todo: list[Shape], round_idx: int, turns: dict[Shape, records.Round], *, quick: bool
) -> list[Shape]:
    """Run operations on one pair until the last or until one fails; return those not yet run."""
    contender = standing.contender
    try:
        pair = Pair(contender.command(), contender.env, REPOSITORY, DATA_BYTES)
    except (UnavailableError, PairError) as error:
        standing.problem = f"{'failed' if standing.rounds or turns else 'unavailable'}: {error}"
        return []
    with pair:
        standing.version, standing.path = pair.version, pair.path
        for done, shape in enumerate(todo):
            load = load_of(shape, contender, seed_of(round_idx, shape), quick=quick)
            meter = machine.CpuMeter(pair.pids)
            try:
                measured = pair.measure(load)
            except PairError as error:
                standing.problems[shape] = f"failed: {error}"
                return todo[done + 1 :]
            if measured.num_wrong:
                standing.problems[shape] = f"failed: {measured.num_wrong} bytes or words were wrong"
                continue
            turns[shape] = records.Round.of(measured.durations_ns, meter.foreign_share())
    return []


def seed_of(round_idx: int, shape: Shape) -> int:
    """Return the seed of contents and placement: another every round, the same for everyone."""
    return round_idx * 1_000_003 + list(PLAN).index(shape) * 101 + 1


def measure_all(
    contenders: Sequence[Contender], shapes: Sequence[Shape], options: argparse.Namespace
) -> list[Standing]:
    """Run all rounds, saying on stderr what is being measured."""
    standings = [Standing(contender) for contender in contenders]
    num_rounds: int = options.rounds
    rings = [placement.ring_ns()]
    for round_idx in range(num_rounds):
        shift = round_idx % len(standings)
        for standing in standings[shift:] + standings[:shift]:
            print(f"round {round_idx + 1}/{num_rounds}: {standing.contender.name}", file=sys.stderr)
            before = len(standing.problems)
            for _ in range(MAX_TURNS):
                machine.wait_until_quiet(options.quiet_s)
                ring_ns = take_turn(standing, shapes, round_idx, quick=options.quick)
                rings.append(ring_ns)
                if ring_ns <= near_ns(rings):
                    break
            for problem in list(standing.problems.values())[before:]:
                print(f"  {problem}", file=sys.stderr)
            if standing.problem and round_idx == 0:
                print(f"  {standing.problem}", file=sys.stderr)
    for standing in standings:
        for shape, turns in standing.rounds.items():
            standing.rounds[shape] = [replace(turn, is_near=turn.ring_ns <= near_ns(rings)) for turn in turns]
    return standings


def near_ns(rings: Sequence[int]) -> int:
    """Return the most that a ring may take for a turn to count, after the rings seen so far.

    Against the quickest quarter and not the best: on a host that lends two threads of one core for a moment,
    a ring once takes a third of what it takes otherwise, and no other turn would count.
    """
    seen = sorted(filter(None, rings))
    return records.FAR * records.percentile(seen, 25) if seen else 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.run", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (5)")
    parser.add_argument("--only", action="append", metavar="TEXT", help="contenders whose name has TEXT")
    parser.add_argument("--op", action="append", choices=[op.value for op in Operation])
    parser.add_argument("--quick", action="store_true", help="an eighth of the calls: does it run at all?")
    parser.add_argument(
        "--quiet-s", type=float, default=0.0, help="wait so long before a turn for others to be quiet (0)"
    )
    parser.add_argument("--json", type=Path, help="where to write (benchmarks/records/peers-DATE.json)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Measure, write the record, print its table; 1 if anything failed its check."""
    options = parse_arguments(arguments)
    started_at = dt.datetime.now(dt.timezone.utc)
    contenders = [
        each
        for each in all_contenders()
        if not options.only or any(text in each.name for text in options.only)
    ]
    shapes = [shape for shape in PLAN if not options.op or shape.op.value in options.op]
    if not contenders or options.rounds < 1:
        print("nothing to measure: no contender has that name, or no rounds", file=sys.stderr)
        return 2
    standings = measure_all(contenders, shapes, options)
    commit, modified = machine.commit(REPOSITORY)
    record = records.Record(
        started_at=started_at.isoformat(timespec="seconds"),
        command=shlex.join(["python", "-m", "benchmarks.peers.run", *arguments]),
        commit=commit,
        modified=modified,
        machine=machine.here(),
        versions={"python": platform.python_version(), "libc": " ".join(platform.libc_ver())},
        num_rounds=options.rounds,
        participants=tuple(standing.participant() for standing in standings),
        rows=tuple(standing.row(shape) for standing in standings for shape in shapes),
    )
    file = options.json or RECORDS / f"peers-{started_at:%Y%m%d-%H%M%S}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(records.to_json(record))
    print(f"wrote {os.path.relpath(file)}", file=sys.stderr)
    return 1 if record.failures() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
