"""What the native module calls in Python, all of it; looked up by name on first use.

`crates/python` looks here no sooner than for its first engine, and imports nothing then that could fail:
`anyfabric` has imported this module. Each function here is the body of the method of the same name in
`_core.pyi`, for what is easier or only possible in Python. They run with the GIL, on the thread of the
caller, never on a worker.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from anyfabric import _asyncio, errors, memory
from anyfabric.engine import Engine
from anyfabric.watcher import watcher_at

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

    from anyfabric import _core

__all__ = [
    "await_transfer",
    "counter_reached",
    "make_error",
    "on_done",
    "region_numpy",
    "region_torch",
    "revoke_async",
    "watcher_at",
    "watcher_numpy",
]

region_numpy = memory.region_numpy
region_torch = memory.region_torch
watcher_numpy = memory.watcher_numpy
counter_reached = _asyncio.counter_reached


def make_error(
    code: str,
    message: str,
    operation: str | None,
    peer: str | None,
    region: int | None,
    nbytes: int | None,
    path: str | None,
) -> errors.AnyFabricError:
    """Make the exception for a native error; all arguments by position."""
    return errors.class_of_code(code)(
        message,
        code=code,
        operation=operation,
        peer=peer,
        region=region,
        nbytes=nbytes,
        path=path,
    )


def await_transfer(transfer: _core.Transfer) -> Generator[Any]:
    """`Transfer.__await__`."""
    return _asyncio.transfer_done(transfer).__await__()


def revoke_async(
    region: _core.Region, peer: _core.Address | None, timeout_s: float
) -> Coroutine[Any, Any, None]:
    """`Region.revoke_async`: revoking is rare, so a thread of the loop's pool will do."""
    return asyncio.to_thread(region.revoke, peer, timeout_s=timeout_s)


def on_done(transfer: _core.Transfer, callback: Callable[[_core.Transfer], object]) -> None:
    """`Transfer.on_done`: hand the callback to the callback thread of the transfer's engine."""
    if not callable(callback):
        msg = f"`on_done` calls a function with the transfer; given a {type(callback).__name__}"
        raise TypeError(msg)
    engine = transfer._engine
    if not isinstance(engine, Engine):
        msg = f"`on_done` needs an `anyfabric.Engine`; this transfer belongs to a {type(engine).__name__}"
        raise errors.Unsupported(msg, operation="on_done")
    engine._service().call_when_done(transfer, callback)
