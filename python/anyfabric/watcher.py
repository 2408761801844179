"""Triggers: the Python face of `Watcher.at`.

The word, the comparison and the operations live in native code; this file only takes an operation
value apart and names what comes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anyfabric.pages import Write, WritePages, operands

if TYPE_CHECKING:
    from collections.abc import Generator

    from anyfabric._core import Transfer, Watcher
    from anyfabric.errors import AnyFabricError

__all__ = ["Trigger", "watcher_at"]


@dataclass(frozen=True, slots=True)
class Trigger:
    """An operation that waits for a watcher's word, then for its transfer.

    Attributes:
        value: The word's value that fires it.
        operation: What is fired.
        transfer: Pending until fired and done.
    """

    value: int
    operation: Write | WritePages
    transfer: Transfer

    @property
    def done(self) -> bool:
        """True when the outcome is known."""
        return self.transfer.done

    @property
    def failed(self) -> bool:
        """True when done with an error."""
        return self.transfer.failed

    @property
    def error(self) -> AnyFabricError | None:
        """The error, once failed."""
        return self.transfer.error

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until fired and done; raises as `Transfer.wait`.

        Args:
            timeout_s: Longest wait in seconds; `None` waits for as long as nobody fires it.
        """
        self.transfer.wait(timeout_s)

    def cancel(self) -> None:
        """Take it back; once fired, as `Transfer.cancel`."""
        self.transfer.cancel()

    def __await__(self) -> Generator[Any, None, None]:
        """Wait on the running asyncio loop, as `wait`."""
        return self.transfer.__await__()


def watcher_at(watcher: Watcher, value: int, operation: Write | WritePages) -> Trigger:
    """`Watcher.at`.

    Raises:
        TypeError: `operation` is neither a `Write` nor a `WritePages`.
    """
    if isinstance(operation, WritePages):
        transfer = watcher._at_write_pages(value, *operands(operation.src, operation.dst), operation.imm)
    elif isinstance(operation, Write):  # pyright: ignore[reportUnnecessaryIsInstance] - a user may give anything
        transfer = watcher._at_write(value, operation.src, operation.dst, operation.imm)
    else:
        msg = f"`at` fires a `Write` or a `WritePages`; given a {type(operation).__name__}"
        raise TypeError(msg)
    return Trigger(value, operation, transfer)
