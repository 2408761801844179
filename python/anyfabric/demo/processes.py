"""Starting, watching and ending the two processes, and the pipes between them and the command.

The command talks to a child in JSON lines: configuration and addresses go to its standard input,
events come from its standard output. A child whose standard input ends has lost the command and
exits; a command that fails ends its own children, by their process ids, and nobody else's.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

import anyfabric as af

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Child", "ChildLostError", "Console", "Event", "Pair", "run_child"]

Event = dict[str, Any]

# A child has this long to end by itself, or to notice that the other one did.
STOP_S = 5.0
ORPHANED = 3
STDERR_LINES = 30


class ChildLostError(Exception):
    """A child ended, failed or fell silent; the message is for the user."""


class Console:
    """A child's side of the pipes."""

    def __init__(self) -> None:
        """Take over standard input and output; what libraries print goes to standard error."""
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._lines: queue.Queue[Event] = queue.Queue()
        threading.Thread(target=self._read, name="demo-stdin", daemon=True).start()

    def write(self, event: str, **values: Any) -> None:
        """Tell the command something."""
        self._out.write(json.dumps({"event": event, **values}) + "\n")
        self._out.flush()

    def read(self, *, timeout_s: float) -> Event:
        """Wait for the command's next line.

        Raises:
            TimeoutError: None came.
        """
        try:
            return self._lines.get(timeout=timeout_s)
        except queue.Empty:
            msg = f"the command said nothing for {timeout_s:g} s"
            raise TimeoutError(msg) from None

    def _read(self) -> None:
        # Raw reads: a daemon thread must not hold a buffer's lock when the interpreter ends.
        pending = b""
        while data := os.read(0, 65536):
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                self._lines.put(json.loads(line))
        os._exit(ORPHANED)


def run_child(main: Callable[[Console, Event], None]) -> NoReturn:
    """Run a child's `main` with its configuration; tell the command when it fails, then exit."""
    console = Console()
    try:
        main(console, console.read(timeout_s=30.0))
    except Exception as error:  # noqa: BLE001 - whatever it is, the command must hear of it
        traceback.print_exc()
        # A count fails when the other one gave up what it was to write.
        lost_the_other = isinstance(error, (af.ConnectionBroken, af.TransferFailed, ConnectionError))
        console.write("failed", message=f"{type(error).__name__}: {error}", lost_the_other=lost_the_other)
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries may still run; every engine is closed by now.
    os._exit(code)


class Child:
    """The command's side: one process and its events."""

    def __init__(self, role: str, events: queue.Queue[tuple[Child, Event | None]]) -> None:
        """Start `python -m anyfabric.demo.ROLE`.

        Args:
            role: `"prefill"` or `"decode"`.
            events: Gets `(self, event)` for each event, and `(self, None)` when there are no more.
        """
        self.role = role
        self.failure: str | None = None
        self.lost_the_other = False
        environment = {
            **os.environ,
            # Equal results need equal numbers of threads; two processes share the cores anyway.
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and modules
            [sys.executable, "-m", f"anyfabric.demo.{role}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._errors: collections.deque[str] = collections.deque(maxlen=STDERR_LINES)
        self._threads = [
            threading.Thread(target=self._read, args=(events,), name=f"{role}-events", daemon=True),
            threading.Thread(target=self._read_errors, name=f"{role}-errors", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def write(self, **values: Any) -> None:
        """Send one line; a child that is gone is noticed by its events, not here."""
        stdin = self._process.stdin
        try:
            if stdin is not None:
                stdin.write(json.dumps(values).encode() + b"\n")
                stdin.flush()
        except BrokenPipeError:
            return

    def obituary(self) -> str:
        """Say how it ended, once it has."""
        code = self._process.poll()
        name = f"the {self.role} process (pid {self.pid})"
        if self.failure is not None:
            return f"{name} failed: {self.failure}"
        if code is None:
            return f"{name} {'is stopped' if self._is_stopped() else 'is still running'}"
        if code < 0:
            return f"{name} was killed by {signal.Signals(-code).name}"
        text = f"{name} ended with code {code}"
        return text + "".join(f"\n    {line}" for line in self._errors) if code else text

    def ended_well(self) -> bool:
        """Say whether it has ended, and cleanly."""
        return self._process.poll() == 0

    def _is_stopped(self) -> bool:
        """Say whether a signal holds it (SIGSTOP, or a debugger)."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in "Tt"

    def wait(self, *, timeout_s: float) -> bool:
        """Wait for its end; say whether it came."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def hear_out(self, *, timeout_s: float) -> None:
        """Wait for its end, and for all that it said before."""
        if self.wait(timeout_s=timeout_s):
            for thread in self._threads:
                thread.join(timeout=STOP_S)

    def finish(self, *, timeout_s: float) -> None:
        """Wait for an end that is expected.

        Raises:
            ChildLostError: It did not come, or it was not a clean one.
        """
        if not self.wait(timeout_s=timeout_s) or self._process.returncode:
            raise ChildLostError(self.obituary())

    def ask_to_stop(self) -> None:
        """Close its standard input, which it hears once it has begun to listen, and terminate it."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process.terminate()

    def stop(self, *, timeout_s: float) -> None:
        """Wait for its end, then force it; a stopped process takes no signal but this one."""
        if not self.wait(timeout_s=timeout_s):
            self._process.kill()
            self._process.wait()
        self.hear_out(timeout_s=0)

    def _read(self, events: queue.Queue[tuple[Child, Event | None]]) -> None:
        with cast("IO[bytes]", self._process.stdout) as lines:
            for line in lines:
                event = cast("Event", json.loads(line))
                if event["event"] == "failed":
                    self.lost_the_other = bool(event.get("lost_the_other"))
                    self.failure = str(event["message"])
                events.put((self, event))
        self.wait(timeout_s=STOP_S)
        events.put((self, None))

    def _read_errors(self) -> None:
        with cast("IO[bytes]", self._process.stderr) as lines:
            self._errors.extend(line.decode(errors="replace").rstrip() for line in lines)


class Pair:
    """Both children; one dies, the other is heard and ended."""

    def __init__(self) -> None:
        self._events: queue.Queue[tuple[Child, Event | None]] = queue.Queue()
        self.children: list[Child] = []
        # Those whose last event was not taken yet.
        self._running: set[Child] = set()

    def start(self, role: str) -> Child:
        """Start a child."""
        child = Child(role, self._events)
        self.children.append(child)
        self._running.add(child)
        return child

    def next_event(self, *, timeout_s: float) -> tuple[Child, Event]:
        """Wait for an event of either child.

        Raises:
            ChildLostError: One failed or was killed, both ended, or were silent for too long.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                child, event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                msg = f"neither process said anything for {timeout_s:g} s"
                raise ChildLostError(msg) from None
            if event is not None and event["event"] != "failed":
                return child, event
            # Both end by themselves, in either order: the last event of one may follow the other's end.
            self._running.discard(child)
            if event is not None or not child.ended_well() or not self._running:
                raise ChildLostError(self._obituaries(child))

    def _obituaries(self, first: Child) -> str:
        """Give the survivor time to notice for itself, then say what became of both.

        Of two failures one may be no more than the other's consequence; that is left out.
        """
        ends = [first, *(child for child in self.children if child is not first)]
        for child in ends:
            child.hear_out(timeout_s=STOP_S)
        causes = [child for child in ends if not child.lost_the_other]
        told = causes if any(child.failure is not None for child in causes) else ends
        return "\n".join(child.obituary() for child in told)

    def stop(self) -> None:
        """End both, however they are."""
        for child in self.children:
            child.ask_to_stop()
        deadline = time.monotonic() + STOP_S
        for child in self.children:
            child.stop(timeout_s=max(0.0, deadline - time.monotonic()))
