"""What a run of the comparison leaves behind: the record, its JSON, and the medians read from it.

Pure: nothing here starts a process or reads a clock. The JSON is written for people as well, so it
repeats the medians beside the rounds they come from; reading it back takes the rounds only.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.peers.workload import Operation, Shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SCHEMA = 1
KIND = "peers"
FAR = 3


class RecordError(ValueError):
    """A file is no record of this kind, or of another schema."""


@dataclass(frozen=True)
class Machine:
    """Where the rounds ran, as far as it can explain their numbers."""

    cpu: str
    num_cpus: int
    memory_bytes: int
    kernel: str
    hypervisor: bool
    huge_pages: str


@dataclass(frozen=True)
class Round:
    """One contender's turn at one operation: distribution over its timed calls.

    Attributes:
        num_calls: Timed calls.
        total_ns: Their sum; rates are taken from it, so that a slow call counts.
        p50_ns: Median call, or half round trip of the 8 B operations.
        p99_ns: 99th percentile of the same.
        max_ns: Slowest call.
        foreign_cpu: Share of the machine's cores that other processes used meanwhile.
        ring_ns: What a bare ring took, the slower of before and after the turn; 0 for not known.
        is_near: Whether that was at most `FAR` times what the quickest quarter of them took. Others do not
            count where some do.
    """

    num_calls: int
    total_ns: int
    p50_ns: int
    p99_ns: int
    max_ns: int
    foreign_cpu: float = 0.0
    ring_ns: int = 0
    is_near: bool = True

    @staticmethod
    def of(durations_ns: Sequence[int], foreign_cpu: float = 0.0) -> Round:
        """Summarise the calls of one turn."""
        ordered = sorted(durations_ns)
        return Round(
            num_calls=len(ordered),
            total_ns=sum(ordered),
            p50_ns=percentile(ordered, 50),
            p99_ns=percentile(ordered, 99),
            max_ns=ordered[-1],
            foreign_cpu=foreign_cpu,
        )


def percentile(ordered: Sequence[int], percent: float) -> int:
    """Return the smallest value that at least `percent` of the sorted values do not exceed."""
    if not ordered:
        msg = "no values to take a percentile of"
        raise ValueError(msg)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


@dataclass(frozen=True)
class Row:
    """One contender at one operation.

    Attributes:
        rounds: The turns; empty when there is a `problem`.
        problem: Why there is no number: `unavailable`, `unsupported` or `failed`, and the reason.
    """

    contender: str
    shape: Shape
    rounds: tuple[Round, ...] = ()
    problem: str | None = None

    def median(self, name: str) -> float | None:
        """Return the median over rounds of one of `rates`; None without rounds."""
        values = self.values(name)
        return statistics.median(values) if values else None

    def values(self, name: str) -> list[float]:
        """Return one of `rates` for every round that counts."""
        near = [turn for turn in self.rounds if turn.is_near]
        return [self._rates(turn)[name] for turn in near or self.rounds]

    def _rates(self, turn: Round) -> dict[str, float]:
        mean_ns = turn.total_ns / turn.num_calls
        return {
            "gb_per_s": self.shape.size_bytes * self.shape.num_pages / mean_ns,
            "ops_per_s": 1e9 / mean_ns,
            "pages_per_s": self.shape.num_pages * 1e9 / mean_ns,
            "p50_us": turn.p50_ns / 1e3,
            "p99_us": turn.p99_ns / 1e3,
        }


@dataclass(frozen=True)
class Participant:
    """One contender as it ran."""

    name: str
    kind: str
    language: str
    version: str
    path: str
    note: str
    env: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Record:
    """A whole run."""

    started_at: str
    command: str
    commit: str
    modified: bool
    machine: Machine
    versions: Mapping[str, str]
    num_rounds: int
    participants: tuple[Participant, ...]
    rows: tuple[Row, ...]

    def row(self, contender: str, shape: Shape) -> Row | None:
        """Return the row of one contender at one operation."""
        for row in self.rows:
            if row.contender == contender and row.shape == shape:
                return row
        return None

    def failures(self) -> tuple[Row, ...]:
        """Return the rows whose data check or transfer failed."""
        return tuple(row for row in self.rows if row.problem and row.problem.startswith("failed"))


def _row_json(row: Row) -> dict[str, Any]:
    """Return a row with its medians, under the names that `anyfabric perf --json` uses too."""
    latency = {name: row.median(f"{name}_us") for name in ("p50", "p99")}
    return {
        "contender": row.contender,
        "op": row.shape.op.value,
        "size_bytes": row.shape.size_bytes,
        "pages": row.shape.num_pages,
        "span_bytes": row.shape.span_bytes,
        "gb_per_s": row.median("gb_per_s"),
        "ops_per_s": row.median("ops_per_s"),
        "latency_us": latency if row.rounds else None,
        "checked": bool(row.rounds),
        "problem": row.problem,
        "rounds": [asdict(turn) for turn in row.rounds],
    }


def to_json(record: Record) -> str:
    """Return the record as JSON text."""
    body = asdict(record)
    body["rows"] = [_row_json(row) for row in record.rows]
    return json.dumps({"schema": SCHEMA, "kind": KIND, **body}, indent=1) + "\n"


def from_json(text: str) -> Record:
    """Read what `to_json` wrote.

    Raises:
        RecordError: The text is not such a record.
    """
    try:
        body: Any = json.loads(text)
        if (body["schema"], body["kind"]) != (SCHEMA, KIND):
            msg = f"schema {body['schema']} of kind {body['kind']}, expected {SCHEMA} of {KIND}"
            raise RecordError(msg)
        return Record(
            started_at=body["started_at"],
            command=body["command"],
            commit=body["commit"],
            modified=body["modified"],
            machine=Machine(**body["machine"]),
            versions=body["versions"],
            num_rounds=body["num_rounds"],
            participants=tuple(Participant(**each) for each in body["participants"]),
            rows=tuple(_row(each) for each in body["rows"]),
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        msg = f"this is no record of kind {KIND}: {error!r}"
        raise RecordError(msg) from error


def _row(body: Mapping[str, Any]) -> Row:
    return Row(
        contender=body["contender"],
        shape=Shape(Operation(body["op"]), body["size_bytes"], body["pages"], body["span_bytes"]),
        rounds=tuple(Round(**turn) for turn in body["rounds"]),
        problem=body["problem"],
    )
