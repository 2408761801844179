"""asyncio: one notifier per running loop, one future per wait.

Native code delivers a token when something is done, which makes the notifier's descriptor readable;
the loop wakes, takes all tokens in one call and resolves their futures. No thread is involved, and a
wait that is given up leaves nothing behind.

The waiter of a loop lives as long as the loop: it holds no reference to it, the loop's selector and a
weak dictionary hold the waiter.
"""

from __future__ import annotations

import asyncio
import itertools
import weakref
from typing import TYPE_CHECKING

from anyfabric._core import Notifier
from anyfabric.errors import InvalidArgument, WaitTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyfabric import _core

    Arm = Callable[[Notifier, int], Callable[[], None] | None]
    """Promises that a token will be delivered; what it returns takes the promise back."""

__all__ = ["counter_reached", "message_received", "transfer_done"]


class _LoopWaiter:
    """The notifier of one loop and the futures that wait on it; used from the loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._notifier = Notifier()
        self._futures: dict[int, asyncio.Future[None]] = {}
        self._tokens = itertools.count(1)
        loop.add_reader(self._notifier.fileno(), self._wake)

    async def wait(self, arm: Arm, timeout_s: float | None) -> bool:
        """Let `arm` promise a token and wait for it; False when the time is over."""
        token = next(self._tokens)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._futures[token] = future
        give_up: Callable[[], None] | None = None
        try:
            give_up = arm(self._notifier, token)
            done, _ = await asyncio.wait((future,), timeout=timeout_s)
            return bool(done)
        finally:
            del self._futures[token]
            if give_up is not None and not future.done():
                give_up()

    def _wake(self) -> None:
        for token in self._notifier.drain():
            future = self._futures.get(token)
            if future is not None and not future.done():
                future.set_result(None)


_waiters: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopWaiter] = weakref.WeakKeyDictionary()


def _waiter() -> _LoopWaiter:
    loop = asyncio.get_running_loop()
    waiter = _waiters.get(loop)
    if waiter is None:
        waiter = _waiters[loop] = _LoopWaiter(loop)
    return waiter


def _check_timeout(timeout_s: float | None) -> None:
    if timeout_s is not None and not timeout_s >= 0:
        msg = f"given {timeout_s!r}; expected seconds, 0 or more"
        raise InvalidArgument(msg, operation="wait")


async def transfer_done(transfer: _core.Transfer) -> None:
    """Wait for the outcome of a transfer; raises its error."""
    if not transfer.done:
        await _waiter().wait(transfer._notify, None)
    transfer.wait(0)


async def counter_reached(counter: _core.Counter, n: int, timeout_s: float | None) -> None:
    """`Counter.reached`."""

    def arm(notifier: Notifier, token: int) -> Callable[[], None]:
        waiter = counter._notify(n, notifier, token)
        return lambda: counter._give_up(waiter)

    _check_timeout(timeout_s)
    if counter.value < n and not await _waiter().wait(arm, timeout_s) and counter.value < n:
        msg = f"imm {counter.imm}: {counter.value} of {n} arrivals after {timeout_s} s"
        raise WaitTimeout(msg, operation="counter")
    counter.wait(n, 0)


async def message_received(engine: _core.Engine, timeout_s: float | None) -> _core.Message:
    """`Engine.receive_async`."""

    def arm(notifier: Notifier, token: int) -> Callable[[], None]:
        waiter = engine._notify_receive(notifier, token)
        return lambda: engine._give_up_receive(waiter)

    _check_timeout(timeout_s)
    loop = asyncio.get_running_loop()
    deadline = None if timeout_s is None else loop.time() + timeout_s
    while True:
        message = engine._try_receive()
        if message is not None:
            return message
        left = None if deadline is None else deadline - loop.time()
        if left is not None and left <= 0:
            msg = f"no message within {timeout_s} s"
            raise WaitTimeout(msg, operation="receive")
        await _waiter().wait(arm, left)
