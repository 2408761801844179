"""The errors of `anyfabric`: one tree, stable codes.

This file owns the Python half of the list; the other half is one Rust enum, and
`tests/unit/test_errors.py` compares the two. Native code names an error by its code, and
`class_of_code` finds the class. A code never changes its meaning and is never used again.

A message says what failed, what was given, what was expected, and what to try.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AnyFabricError",
    "Cancelled",
    "Closed",
    "ConnectionBroken",
    "DeviceLost",
    "EngineForked",
    "Internal",
    "InvalidArgument",
    "PeerLost",
    "QueueFull",
    "Refused",
    "ResourceExhausted",
    "TransferFailed",
    "TransferTimeout",
    "Unsupported",
    "WaitTimeout",
    "class_of_code",
    "codes",
]


class AnyFabricError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        code: Stable name of the kind of error, such as `"peer_lost"`.
        operation: What was being done, such as `"write"`.
        peer: Printed address of the peer.
        region: Number of the local region.
        nbytes: Bytes of the operation.
        path: Transport and NIC, such as `"tcp/stream1"`.
    """

    default_code: ClassVar[str] = "error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        operation: str | None = None,
        peer: str | None = None,
        region: int | None = None,
        nbytes: int | None = None,
        path: str | None = None,
    ) -> None:
        """Keep the message and the context; unknown context stays `None`."""
        super().__init__(message)
        self.code = code if code is not None else self.default_code
        self.operation = operation
        self.peer = peer
        self.region = region
        self.nbytes = nbytes
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with the context, so that errors cross process pools whole."""
        return (_rebuild, (type(self), str(self.args[0]), self.context()))

    def context(self) -> dict[str, str | int | None]:
        """The attributes as one dictionary, for logs and JSON."""
        return {
            "code": self.code,
            "operation": self.operation,
            "peer": self.peer,
            "region": self.region,
            "nbytes": self.nbytes,
            "path": self.path,
        }


def _rebuild(error_class: type[AnyFabricError], message: str, context: dict[str, object]) -> AnyFabricError:
    error = error_class(message)
    error.__dict__.update(context)
    return error


class InvalidArgument(AnyFabricError, ValueError):
    """Something passed in cannot be right: out of range, closed, foreign, malformed."""

    default_code = "invalid_argument"


class Unsupported(AnyFabricError):
    """The request makes sense, but nothing here can serve it."""

    default_code = "unsupported"


class ResourceExhausted(AnyFabricError):
    """A bound was reached: descriptors, memory, threads, unread messages."""

    default_code = "resource_exhausted"


class QueueFull(ResourceExhausted):
    """The submission queue is full, and the engine was told to raise rather than block."""

    default_code = "queue_full"


class ConnectionBroken(AnyFabricError):
    """A connection could not be made or kept; the peer may live."""

    default_code = "connection_broken"


class PeerLost(ConnectionBroken):
    """This incarnation of the peer is gone for good; a restarted one has another address."""

    default_code = "peer_lost"


class TransferFailed(AnyFabricError):
    """A transfer ended without placing all its bytes."""

    default_code = "transfer_failed"


class Refused(TransferFailed):
    """The peer turned this one operation down: revoked, unknown or out of bounds there."""

    default_code = "refused"


class TransferTimeout(AnyFabricError, TimeoutError):
    """The deadline of a submission passed; the transfer has failed."""

    default_code = "transfer_timeout"


class WaitTimeout(AnyFabricError, TimeoutError):
    """A wait gave up; what it waited for goes on."""

    default_code = "wait_timeout"


class Cancelled(AnyFabricError):
    """The caller cancelled the operation before it was done."""

    default_code = "cancelled"


class Closed(AnyFabricError):
    """The engine, or the object of it that was used, is closed."""

    default_code = "closed"


class EngineForked(Closed):
    """The engine belongs to the parent of this process; make a new one here."""

    default_code = "engine_forked"


class DeviceLost(AnyFabricError):
    """A device or NIC stopped working; others may go on."""

    default_code = "device_lost"


class Internal(AnyFabricError):
    """An invariant of this library is broken; the engine refuses further work. Report it."""

    default_code = "internal"


def codes() -> dict[str, type[AnyFabricError]]:
    """Every code with its class, bases before what is derived from them."""
    found: dict[str, type[AnyFabricError]] = {}
    queue: list[type[AnyFabricError]] = list(AnyFabricError.__subclasses__())
    while queue:
        error_class = queue.pop(0)
        if error_class.__module__ == __name__:
            found[error_class.default_code] = error_class
            queue.extend(error_class.__subclasses__())
    return found


def class_of_code(code: str) -> type[AnyFabricError]:
    """The class for a code of the native module; `Internal` for one that is not listed here."""
    return codes().get(code, Internal)
