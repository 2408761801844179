"""What every contender moves: operations, contents, placement and the check of the result.

Owns the definition that `endpoint.h` repeats in C; `tests/unit/test_bench_workload.py` compares the
two word for word. Nothing here touches a transport, a clock or a process.

Contents and placement come from one seed per round, through splitmix64:

    word i of the source        mix(mix(seed) + i)
    page n of the operation     source slot order(seed, SOURCE_SALT)[n % num_slots]
                                target slot order(seed, TARGET_SALT)[n % num_slots]
    untouched target bytes      CLEAR_BYTE

A slot is `size_bytes` of the load's span, the first `span_bytes` of the data area. `order` is a
permutation of all slots: those sorted by mix(mix(seed ^ salt) + slot). Call k moves pages
k * num_pages and following, so consecutive calls walk the whole span: one of the size of the data
area stays in no cache, one of a few MiB stays in all. A plain write of call k goes from slot k to
slot k. Indices count over the calls and wrap around the slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.uint32]

DATA_BYTES = 64 << 20
MAIL_BYTES = 4096
OUT_OFFSET = 0
IN_OFFSET = 64
SOURCE_SALT = 0x534F_5552_4345
TARGET_SALT = 0x5441_5247_4554
CLEAR_BYTE = 0xA5
_MASK = (1 << 64) - 1


class Operation(str, Enum):
    """What is timed. The first two move bulk data, the others bounce 8 bytes between both sides."""

    WRITE = "write"
    """One contiguous write, timed from the call until the writer knows the bytes are placed."""

    PAGES = "pages"
    """Many pages between random places in one call, timed likewise from two index arrays."""

    NOTIFY = "notify"
    """8 B and a notification that the library orders behind them; half the round trip."""

    FLAG = "flag"
    """8 B, the receiver polls the bytes themselves; half the round trip. Counts nothing."""

    @property
    def is_latency(self) -> bool:
        """Whether both sides act in turn, instead of one writing and the other waiting."""
        return self in (Operation.NOTIFY, Operation.FLAG)


@dataclass(frozen=True)
class Shape:
    """One thing that is measured.

    Attributes:
        op: Operation.
        size_bytes: Bytes of one write, or of one page.
        num_pages: Pages of one call; 1 for everything else.
        span_bytes: Memory on either side that consecutive calls walk over.
    """

    op: Operation
    size_bytes: int
    num_pages: int
    span_bytes: int

    @property
    def num_slots(self) -> int:
        """Places that a write, or a page, can take."""
        return self.span_bytes // self.size_bytes


@dataclass(frozen=True)
class Load:
    """One shape in one round, as both sides of a contender are told it."""

    shape: Shape
    num_calls: int
    num_warmup: int
    seed: int

    @property
    def total_calls(self) -> int:
        """Timed and untimed calls; both leave bytes behind."""
        return self.num_calls + self.num_warmup

    def words(self) -> str:
        """Return the load as the words of a protocol line."""
        each = self.shape
        return (
            f"{each.op.value} {each.size_bytes} {each.num_pages} {each.span_bytes} "
            f"{self.num_calls} {self.num_warmup} {self.seed}"
        )

    @staticmethod
    def parse(words: list[str]) -> Load:
        """Read what `words` wrote."""
        size_bytes, num_pages, span_bytes, num_calls, num_warmup, seed = map(int, words[1:])
        shape = Shape(Operation(words[0]), size_bytes, num_pages, span_bytes)
        return Load(shape, num_calls, num_warmup, seed)


def mix(value: int) -> int:
    """Return splitmix64's output for the state `value`."""
    value = (value + 0x9E37_79B9_7F4A_7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
    return value ^ (value >> 31)


def mixed_words(seed: int, num_words: int) -> Words:
    """Return mix(mix(seed) + i) for i below `num_words`; uint64, wrapping."""
    start = np.uint64((mix(seed) + 0x9E37_79B9_7F4A_7C15) & _MASK)
    with np.errstate(over="ignore"):
        words = np.arange(num_words, dtype=np.uint64) + start
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return words ^ (words >> np.uint64(31))


def order(seed: int, salt: int, num_slots: int) -> Indices:
    """Return the permutation of `num_slots` slots that `seed` and `salt` name."""
    keys = mixed_words(seed ^ salt, num_slots)
    return np.argsort(keys, kind="stable").astype(np.uint32)


def fill_source(data: Bytes, seed: int) -> None:
    """Write the round's contents into a source's data area, in place."""
    data[:] = mixed_words(seed, data.nbytes // 8).view(np.uint8)


def fill_target(data: Bytes) -> None:
    """Overwrite a target's data area with bytes that no write of the round leaves, in place."""
    data[:] = CLEAR_BYTE


def offset_of_call(load: Load, call: int) -> int:
    """Return the byte offset, at source and target alike, of plain write number `call`."""
    return (call % load.shape.num_slots) * load.shape.size_bytes


@dataclass(frozen=True)
class Placement:
    """Both permutations of a paged load, cut into one pair of index arrays per call."""

    source: Indices
    target: Indices
    num_pages: int

    @staticmethod
    def of(load: Load) -> Placement:
        """Build the placement; the number of slots must be a multiple of the pages of a call."""
        num_slots, num_pages = load.shape.num_slots, load.shape.num_pages
        if num_slots % num_pages:
            msg = f"{num_slots} slots are no multiple of {num_pages} pages a call"
            raise ValueError(msg)
        return Placement(
            order(load.seed, SOURCE_SALT, num_slots), order(load.seed, TARGET_SALT, num_slots), num_pages
        )

    def of_call(self, call: int) -> tuple[Indices, Indices]:
        """Return the source and target slots of call number `call`."""
        num_slots = len(self.source)
        start = call * self.num_pages % num_slots
        cut = slice(start, start + self.num_pages)
        return self.source[cut], self.target[cut]


def expected_target(load: Load, data_bytes: int) -> Bytes:
    """Return every byte that a target's data area must hold once `load` is done."""
    contents = mixed_words(load.seed, data_bytes // 8).view(np.uint8)
    expected = np.full(data_bytes, CLEAR_BYTE, dtype=np.uint8)
    shape = load.shape
    if shape.op is Operation.WRITE:
        covered = min(load.total_calls, shape.num_slots) * shape.size_bytes
        expected[:covered] = contents[:covered]
    elif shape.op is Operation.PAGES:
        place = Placement.of(load)
        num_moved = min(load.total_calls * shape.num_pages, shape.num_slots)
        pages = (shape.num_slots, shape.size_bytes)
        moved = contents[: shape.span_bytes].reshape(pages)[place.source[:num_moved]]
        expected[: shape.span_bytes].reshape(pages)[place.target[:num_moved]] = moved
    return expected


def num_wrong_bytes(data: Bytes, load: Load) -> int:
    """Return how many bytes of a target's data area differ from what `load` must leave."""
    differing: Any = np.count_nonzero(data != expected_target(load, data.nbytes))
    return int(differing)
