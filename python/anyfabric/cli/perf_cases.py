"""What `anyfabric perf` measures: cases, sizes, and the plan when nothing is asked for.

Pure: parses and enumerates. A case travels to the peer as JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal, get_args

from anyfabric.config import parse_size
from anyfabric.errors import InvalidArgument

__all__ = ["MEMORIES", "OPERATIONS", "USE_MEMORY", "Case", "parse_sizes", "plan"]

Operation = Literal["write", "pages", "scatter", "send", "barrier"]
Memory = Literal["allocated", "registered"]

OPERATIONS: tuple[str, ...] = get_args(Operation)
MEMORIES: tuple[str, ...] = get_args(Memory)
USE_MEMORY = {"write", "pages", "scatter"}
"""Operations on regions; the others carry bytes of their own, or none."""

NUM_TARGETS = 16
"""Targets of a scatter when `--pages` does not say."""
NUM_PAGES = 4096
"""Pages of a list when `--pages` does not say: a few hundred tokens of a KV cache."""
MAX_LIST_BYTES = 256 << 20
"""Then a list of large pages or targets is shorter, to move no more than this."""
MAX_SEND_BYTES = 65536
"""Default of `max_message_bytes`."""
DEFAULT_SIZES: dict[str, tuple[int, ...]] = {
    "write": (8, 4096, 256 << 10, 32 << 20),
    "pages": (1024, 16 << 10),
    "scatter": (8, 4096),
    "send": (8, 4096),
    "barrier": (0,),
}
TIMED_BYTES = 1 << 30
"""A case moves about this much in each phase, within the bounds below."""
MIN_ROUNDS = 10
MAX_ROUNDS = 4000
STREAM_WINDOW_BYTES = 1 << 20
"""Operations smaller than this are kept in flight several at a time when throughput is measured."""
MAX_WINDOW = 32


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table.

    Attributes:
        transport: Name of the transport.
        op: Operation, one of `OPERATIONS`.
        polling: `polling` of both engines.
        memory: Whether the engines allocate the memory, or register numpy arrays.
        size_bytes: Bytes of the write, message, page or target; 0 for a barrier.
        pages: Pages or targets of one operation; 1 for the others.
        rounds: Operations of each timed phase.
    """

    transport: str
    op: Operation
    polling: str
    memory: Memory
    size_bytes: int
    pages: int
    rounds: int

    @property
    def nbytes(self) -> int:
        """Payload of one operation."""
        return self.size_bytes * self.pages

    @property
    def region_bytes(self) -> int:
        """Memory that one operation reads at one side and writes at the other."""
        return max(self.nbytes, 8)

    @property
    def window(self) -> int:
        """Operations in flight when throughput is measured; 1 where one alone fills the path."""
        if self.nbytes >= STREAM_WINDOW_BYTES:
            return 1
        return max(1, min(MAX_WINDOW, STREAM_WINDOW_BYTES // max(self.nbytes, 1)))

    def to_json(self) -> dict[str, Any]:
        """Make what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Case:
        """Read what `to_json` made."""
        return cls(**values)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Read `8:32M` (each size four times the one before), `8:1K:2` (twice), or `8,4K,32M`.

    Raises:
        InvalidArgument: Not of that form.
    """
    if ":" not in text:
        return tuple(_size(part, text) for part in text.split(","))
    parts = text.split(":")
    if len(parts) > 3:
        raise _malformed(text)
    first, last = _size(parts[0], text), _size(parts[1], text)
    factor = _size(parts[2], text) if len(parts) == 3 else 4
    if factor < 2 or first < 1 or last < first:
        raise _malformed(text)
    sizes: list[int] = []
    while first < last:
        sizes.append(first)
        first *= factor
    return (*sizes, last)


def plan(
    *,
    transports: tuple[str, ...],
    ops: tuple[str, ...],
    pollings: tuple[str, ...],
    memories: tuple[str, ...],
    sizes: tuple[int, ...] | None,
    pages: int | None,
    rounds: int | None,
) -> list[Case]:
    """Enumerate the cases, those of one pair of engines next to one another.

    Args:
        transports: Which, in order; likewise `ops`, `pollings` and `memories`. What any of these or `sizes`
            names twice is measured once.
        ops: Operations.
        pollings: Polling modes; each needs engines of its own.
        memories: Kinds of memory; messages and barriers use none and are listed once.
        sizes: Sizes in bytes, or `None` for each operation's own.
        pages: Pages or targets per operation, or `None` for the operation's own.
        rounds: Operations per phase, or `None` for about a gibibyte of them.

    Raises:
        InvalidArgument: Nothing is left to measure: only messages are, and all sizes are too large for one.
    """
    kinds = [(memory, op) for memory in memories for op in ops if op in USE_MEMORY]
    kinds += [(memories[0], op) for op in ops if op not in USE_MEMORY]
    cases: list[Case] = []
    for transport, polling in product(transports, pollings):
        for memory, op in kinds:
            for size in _sizes_of(op, sizes):
                num = _pages_of(op, size, pages)
                number = rounds or _rounds_of(size * num)
                cases.append(Case(transport, op, polling, memory, size, num, number))  # pyright: ignore[reportArgumentType] - click lets no others in
    if not cases:
        msg = f"sizes {', '.join(map(str, sizes or ()))}: a message has at most {MAX_SEND_BYTES} bytes"
        raise InvalidArgument(msg, operation="perf")
    return list(dict.fromkeys(cases))


def _sizes_of(op: str, sizes: tuple[int, ...] | None) -> tuple[int, ...]:
    if op == "barrier":
        return (0,)
    if sizes is None:
        return DEFAULT_SIZES[op]
    return tuple(size for size in sizes if size <= MAX_SEND_BYTES) if op == "send" else sizes


def _pages_of(op: str, size: int, pages: int | None) -> int:
    if op not in {"pages", "scatter"}:
        return 1
    default = NUM_PAGES if op == "pages" else NUM_TARGETS
    return pages or max(1, min(default, MAX_LIST_BYTES // max(size, 1)))


def _rounds_of(nbytes: int) -> int:
    return max(MIN_ROUNDS, min(MAX_ROUNDS, TIMED_BYTES // max(nbytes, 1)))


def _size(part: str, text: str) -> int:
    size = parse_size(part)
    if size is None:
        raise _malformed(text)
    return size


def _malformed(text: str) -> InvalidArgument:
    return InvalidArgument(
        f"sizes {text!r}: expected FIRST:LAST, FIRST:LAST:FACTOR or a list such as 8,4K,32M",
        operation="perf",
    )
