"""Operations as values: lists of pages, targets, and what a watcher fires.

Owns the shape of these values and the validation of page indices, vectorised. Bounds against a region
are checked in native code when an operation is submitted, not here: the region may be closed by then.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from anyfabric.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from anyfabric._core import Descriptor, Region, RemoteSlice, Slice

__all__ = ["Pages", "Target", "Write", "WritePages", "operands"]

Memory = TypeVar("Memory", "Region", "Descriptor")
Native = tuple["npt.NDArray[np.uint32]", int, int, int]

UINT32 = np.dtype(np.uint32)
MAX_INDEX = 2**32 - 1
MAX_BYTES = 2**64 - 1


@dataclass(frozen=True, slots=True, eq=False, init=False)
class Pages(Generic[Memory]):
    """Equal pieces of a region, picked by index: page `i` starts at `offset + indices[i] * stride`.

    Attributes:
        memory: The local region, or the descriptor of a peer's.
        indices: `[num_pages]` integers below 2**32, in any order, repeats allowed. Kept as uint32; an
            array that is contiguous uint32 already is not copied. Read when the operation is
            submitted; free to change after that.
        page_bytes: Size of a page in bytes, 0 or more.
        stride: Distance in bytes between the starts of page 0 and page 1; default `page_bytes`.
        offset: Start of page 0 in bytes.

    Raises:
        InvalidArgument: An index or a size is not an integer, is negative or does not fit.
    """

    memory: Memory
    indices: npt.NDArray[np.uint32]
    page_bytes: int
    stride: int
    offset: int

    def __init__(
        self,
        memory: Memory,
        indices: npt.NDArray[Any] | Sequence[int],
        page_bytes: int,
        stride: int | None = None,
        offset: int = 0,
    ) -> None:
        """Validate, and turn the indices into what native code reads."""
        # Once each: lists of pages are made for every call.
        store = object.__setattr__
        page_bytes = _size("page_bytes", page_bytes)
        stride = page_bytes if stride is None else _size("stride", stride)
        store(self, "memory", memory)
        store(self, "indices", _as_indices(indices))
        store(self, "page_bytes", page_bytes)
        store(self, "stride", stride)
        store(self, "offset", _size("offset", offset))

    def __len__(self) -> int:
        """Number of pages."""
        return len(self.indices)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages together."""
        return len(self.indices) * self.page_bytes


class Target(NamedTuple):
    """One range of a scatter, from the source region into a peer's.

    A named tuple rather than a dataclass: scatters list hundreds, and native code takes it as it is.

    Attributes:
        remote: The peer's region.
        src_offset: First byte in the source region.
        dst_offset: First byte in the peer's region.
        nbytes: Length in bytes.
    """

    remote: Descriptor
    src_offset: int
    dst_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Write:
    """One write, for a watcher to fire; the fields are the arguments of `Engine.write`."""

    src: Region | Slice
    dst: Descriptor | RemoteSlice
    imm: int | None = None


@dataclass(frozen=True, slots=True)
class WritePages:
    """A write of pages, for a watcher to fire; the fields are the arguments of `Engine.write_pages`."""

    src: Pages[Region]
    dst: Pages[Descriptor]
    imm: int | None = None


def operands(src: Pages[Region], dst: Pages[Descriptor]) -> tuple[Region, Native, Descriptor, Native]:
    """Both sides of a write of pages, as native code takes them.

    Raises:
        TypeError: One of them is a region, say, and not pages of it.
    """
    try:
        return (
            src.memory,
            (src.indices, src.page_bytes, src.stride, src.offset),
            dst.memory,
            (dst.indices, dst.page_bytes, dst.stride, dst.offset),
        )
    except AttributeError:
        msg = f"expected `Pages` of a region and of a descriptor; given {_kind(src)} and {_kind(dst)}"
        raise TypeError(msg) from None


def _as_indices(given: Any) -> npt.NDArray[np.uint32]:
    if type(given) is np.ndarray and given.dtype is UINT32 and given.ndim == 1:
        return _plain(given)
    try:
        if isinstance(given, range):
            given = np.arange(given.start, given.stop, given.step, dtype=np.int64)
        array = np.asarray(given)
    except (MemoryError, TypeError, ValueError, OverflowError, RuntimeError) as cause:
        msg = f"page indices must be a sequence or an array of integers; given a {_kind(given)}: {cause}"
        raise InvalidArgument(msg, operation="pages") from cause
    if array.ndim != 1:
        what = f"shape {array.shape}; try `.reshape(-1)`" if array.ndim else f"a {_kind(given)}"
        msg = f"page indices must have one dimension; given {what}"
        raise InvalidArgument(msg, operation="pages")
    if array.size and array.dtype.kind not in "iu":
        msg = f"page indices must be integers below 2**32; given {array.dtype} from a {_kind(given)}"
        raise InvalidArgument(msg, operation="pages")
    if array.size and array.dtype != np.uint32:
        smallest, largest = int(array.min()), int(array.max())
        if smallest < 0 or largest > MAX_INDEX:
            wrong = smallest if smallest < 0 else largest
            position = int(np.argmax(array == wrong))
            msg = f"page index {wrong} at position {position}: expected 0 to {MAX_INDEX}"
            raise InvalidArgument(msg, operation="pages")
    return _plain(array)


def _plain(array: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    flags = array.flags
    if array.dtype is UINT32 and flags.c_contiguous and flags.aligned:
        return array
    return np.array(array, dtype=np.uint32, order="C")


def _size(name: str, value: Any) -> int:
    try:
        size = operator.index(value)
    except TypeError as cause:
        msg = f"`{name}` must be a whole number of bytes; given a {_kind(value)}: {value!r}"
        raise InvalidArgument(msg, operation="pages") from cause
    if not 0 <= size <= MAX_BYTES:
        msg = f"`{name}` must be 0 or more and fit 64 bits; given {size}"
        raise InvalidArgument(msg, operation="pages")
    return size


def _kind(value: object) -> str:
    return type(value).__name__
