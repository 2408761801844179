"""The driver's half of the line protocol: two processes of one contender, started, asked, ended.

`endpoint.py` lists the commands. A pair belongs to one round: contenders that spin while they idle
would slow the others down, so none outlives its turn.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from benchmarks.peers.workload import Load

ANSWER_S = 180.0
QUIT_S = 5.0
ROLES = ("source", "target")


class PairError(RuntimeError):
    """A process of the pair answered `error`, ended, or did not answer in time."""


class Process:
    """One endpoint; its stderr goes to a file, from which a failure quotes the last line."""

    def __init__(self, role: str, command: Sequence[str], env: Mapping[str, str], cwd: Path) -> None:
        self.role = role
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by end
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **env},
            cwd=cwd,
        )
        self._pending = b""

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ask(self, line: str) -> None:
        """Write one command; `read` brings its answer."""
        assert self._process.stdin
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            msg = f"the {self.role} ended: {self._last_words()}"
            raise PairError(msg) from None

    def fileno(self) -> int:
        """Descriptor that becomes readable with an answer, for a selector."""
        assert self._process.stdout
        return self._process.stdout.fileno()

    def read(self) -> str | None:
        """Return what follows `ok` in the next answer, or None if it has not come completely."""
        chunk = os.read(self.fileno(), 1 << 20)
        if not chunk:
            msg = f"the {self.role} ended: {self._last_words()}"
            raise PairError(msg)
        self._pending += chunk
        if b"\n" not in self._pending:
            return None
        line, _, self._pending = self._pending.partition(b"\n")
        word, _, rest = line.decode().partition(" ")
        if word != "ok":
            msg = f"{self.role}: {rest}"
            raise PairError(msg)
        return rest

    def _last_words(self) -> str:
        status = self._process.wait(QUIT_S)
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return f"status {status}, last line: {said[-1][:300]}" if said else f"status {status}"

    def end(self) -> None:
        """Ask it to quit, and kill it if it does not."""
        try:
            self.ask("quit")
            self._process.wait(QUIT_S)
        except (PairError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@dataclass(frozen=True)
class Measured:
    """What one load gave: a duration per timed call, and how much of what arrived was wrong."""

    durations_ns: tuple[int, ...]
    num_wrong: int


class Pair:
    """Both processes of one contender, connected; a context manager."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: Path, data_bytes: int) -> None:
        self._processes = tuple(Process(role, command, env, cwd) for role in ROLES)
        try:
            self.version = self._both("version")[0]
            source, target = self._each(*(f"setup {role} {data_bytes}" for role in ROLES))
            self.path = self._each(f"connect {target}", f"connect {source}")[0]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, source first."""
        return tuple(process.pid for process in self._processes)

    def measure(self, load: Load) -> Measured:
        """Fill, run and verify one load.

        Raises:
            PairError: Either process failed or took too long; the pair is then of no further use.
        """
        self._both(f"fill {load.seed}")
        durations = self._both(f"run {load.words()}")[0]
        wrong = self._both(f"verify {load.words()}")
        return Measured(tuple(map(int, durations.split())), sum(map(int, wrong)))

    def close(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.end()

    def _both(self, line: str) -> tuple[str, str]:
        return self._each(line, line)

    def _each(self, to_source: str, to_target: str) -> tuple[str, str]:
        """Ask both at once, the target first, and wait for both; whoever fails first is quoted."""
        source, target = self._processes
        target.ask(to_target)
        source.ask(to_source)
        answers: dict[Process, str] = {}
        deadline = time.monotonic() + ANSWER_S
        with selectors.DefaultSelector() as selector:
            for process in self._processes:
                selector.register(process, selectors.EVENT_READ, process)
            while len(answers) < len(self._processes):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = [p.role for p in self._processes if p not in answers]
                    msg = f"no answer from {' and '.join(missing)} within {ANSWER_S:.0f} s"
                    raise PairError(msg)
                for key, _ in ready:
                    answer = key.data.read()
                    if answer is not None:
                        answers[key.data] = answer
                        selector.unregister(key.data)
        return answers[source], answers[target]
