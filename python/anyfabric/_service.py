"""The callback thread of an engine.

One Python thread per engine, `anyfabric-callbacks`, blocked in native code without the GIL until a
token arrives. It runs `on_done` callbacks and writes the engine's log lines; workers never enter
Python. The engine owns it and joins it in `close`; the thread holds no reference to the engine, so
that an engine nobody uses any more is collected and takes its thread with it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from typing import TYPE_CHECKING

from anyfabric._core import Notifier
from anyfabric.errors import Closed

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyfabric import _core

__all__ = ["Service"]

EVENTS = 0
"""Token of the engine's log lines; those of callbacks count from 2."""
STOP = 1
"""Token that ends the thread."""


class Service:
    """Runs callbacks of one engine, in the order in which their transfers end."""

    def __init__(self, engine: _core.Engine) -> None:
        """Start the thread and subscribe to the engine's log lines."""
        self._notifier = Notifier()
        self._engine = weakref.ref(engine)
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._tokens = itertools.count(2)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="anyfabric-callbacks", daemon=True)
        self._thread.start()
        engine._notify_events(self._notifier, EVENTS)

    def call_when_done(self, transfer: _core.Transfer, callback: Callable[[_core.Transfer], object]) -> None:
        """Run `callback(transfer)` on the thread once the transfer is done.

        Raises:
            Closed: The thread has ended, or does before it would come to this callback.
        """
        token = next(self._tokens)
        self._callbacks[token] = lambda: callback(transfer)
        transfer._notify(self._notifier, token)
        # Looked at after the promise: a token that was delivered before `STOP` runs. No lock, which a handler
        # of signals that closes the engine would have to take once more.
        if self._stopping and self._callbacks.pop(token, None) is not None:
            msg = "the engine is closed, and its callbacks have run"
            raise Closed(msg, operation="on_done")

    def stop(self) -> None:
        """End the thread after the callbacks that are due; idempotent, also from a callback."""
        self._stopping = True
        self._notifier.wake(STOP)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            for token in self._notifier.wait():
                if token == STOP:
                    self._notifier.close()
                    return
                self._call(token)

    def _call(self, token: int) -> None:
        try:
            if token == EVENTS:
                self._log_events()
            else:
                callback = self._callbacks.pop(token, None)
                if callback is not None:
                    callback()
        except BaseException:  # also what would end the thread, and with it the callbacks of everybody else
            logging.getLogger("anyfabric").exception("a callback of a transfer raised; it ends here")

    def _log_events(self) -> None:
        engine = self._engine()
        if engine is None:
            return
        logger = logging.getLogger("anyfabric")
        for level, line in engine._take_events():
            logger.log(level, "%s", line)
