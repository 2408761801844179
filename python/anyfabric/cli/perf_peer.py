"""The other process of `anyfabric perf`: does what the measuring one asks, through messages.

Requests and answers are JSON in `Engine.send`, one at a time; the first request of a stranger makes it
the client until it says `bye` or is lost. `perf` itself runs `main` in a child and reads the
address from its stdout; `anyfabric perf serve` runs a `Peer` in the open.

    prepare   case, the client's introduction -> our introduction
    pong      answer so many operations
    absorb    take so many operations without an answer -> when they are here
    fill      seed: new source bytes, cleared destination
    check     -> CRC-32 of the destination
    baseline  name and arguments: the other half of a baseline
    finish    give the memory of the case back
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import anyfabric as af
from anyfabric.cli import perf_baselines
from anyfabric.cli.perf_cases import Case
from anyfabric.cli.perf_ops import WAIT_S, End, Introduction

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Peer", "main"]

POLL_S = 1.0
"""How often a child looks whether its parent still lives."""


class Peer:
    """Serves one client after another."""

    def __init__(self, engine: af.Engine, *, report: Callable[[str], None] = lambda _: None) -> None:
        """Serve on `engine`; `report` gets one line per client that comes and goes."""
        self._engine = engine
        self._report = report
        self._client: af.Address | None = None
        self._num_served = 0
        # When to give up a client that said it comes again.
        self._comes_by_s = math.inf
        self._end: End | None = None

    def serve(self, *, once: bool, alive: Callable[[], bool] = lambda: True) -> None:
        """Answer requests until told to stop.

        Args:
            once: Return after the first client's last `bye`, or its loss; also when it said that it comes
                again, and did not.
            alive: Asked every second; False ends the service.
        """
        while not (once and self._num_served) and alive():
            try:
                message = self._engine.receive(timeout_s=POLL_S)
            except af.WaitTimeout:
                self._forget_if_lost()
                if self._client is None and time.monotonic() > self._comes_by_s:
                    self._forget("did not come again")
                continue
            # Whoever said `bye` may have gone since.
            if message.source != self._client:
                self._forget_if_lost()
            self._answer(message)

    def _forget_if_lost(self) -> None:
        if self._client is not None and self._engine.path(self._client).state == "lost":
            self._forget("was lost")

    def _answer(self, message: af.Message) -> None:
        try:
            request = json.loads(message.data)
            asked = request["do"]
        except (ValueError, KeyError, TypeError, RecursionError):
            self._refuse(message.source, "not a request")
            return
        if self._client is not None and message.source != self._client:
            self._refuse(message.source, "busy with another client")
            return
        if self._client is None:
            self._client = message.source
            self._report(f"client {message.source}")
        if asked == "bye":
            # With other settings it comes as another engine.
            self._forget("is done", more=bool(request.get("more")))
            return
        try:
            self._send(message.source, self._tried(request))
        except af.AnyFabricError:
            # Who can take no answer is served no more.
            self._forget("was lost")

    def _tried(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer; raises only what says that there is nobody to answer."""
        try:
            return self._do(request) or {}
        except af.ConnectionBroken:
            raise
        except af.AnyFabricError as error:
            return {"error": f"{error.code}: {error}"}
        except Exception as error:  # noqa: BLE001 - whatever one client asks for, the next one is served
            return {"error": f"cannot `{request['do']}`: {error!r}"}

    def _do(self, request: dict[str, Any]) -> dict[str, Any] | None:
        if request["do"] == "prepare":
            return self._prepare(request)
        if self._end is None:
            return {"error": f"`{request['do']}` without a case"}
        actions: dict[str, Callable[[End, dict[str, Any]], dict[str, Any] | None]] = {
            "pong": self._pong,
            "absorb": self._absorb,
            "fill": lambda end, asked: end.fill(asked["seed"]),
            "check": lambda end, _: end.check(),
            "baseline": lambda end, asked: perf_baselines.serve(end, asked, ready=self._send_ready),
            "finish": lambda _, __: self._finish(),
        }
        return actions[request["do"]](self._end, request)

    def _prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        self._finish()
        assert self._client is not None
        self._end = End(self._engine, Case.from_json(request["case"]), self._client)
        self._end.connect(Introduction(**request["introduction"]))
        return asdict(self._end.introduction())

    def _pong(self, end: End, request: dict[str, Any]) -> None:
        self._send_ready()
        end.pong(request["rounds"])

    def _absorb(self, end: End, request: dict[str, Any]) -> None:
        self._send_ready()
        for _ in range(request["rounds"]):
            end.arrive()

    def _finish(self) -> None:
        if self._end is not None:
            self._end.close()
            self._end = None

    def _forget(self, why: str, *, more: bool = False) -> None:
        self._finish()
        self._report(f"client {why}")
        self._client = None
        self._num_served += not more
        self._comes_by_s = time.monotonic() + WAIT_S if more else math.inf

    def _refuse(self, stranger: af.Address, why: str) -> None:
        """Answer who is not served, and do not wait: it may be gone."""
        with contextlib.suppress(af.AnyFabricError):
            self._engine.send(stranger, json.dumps({"error": why}).encode())

    def _send_ready(self, **more: object) -> None:
        assert self._client is not None
        self._send(self._client, {"ready": True, **more})

    def _send(self, address: af.Address, answer: dict[str, Any]) -> None:
        self._engine.send(address, json.dumps(answer).encode()).wait(WAIT_S)


def main() -> None:
    """Run as a child: settings as JSON in `argv`, the address on stdout, then serve the parent."""
    parent = os.getppid()
    with af.Engine(**json.loads(sys.argv[1])) as engine:
        sys.stdout.write(f"{engine.address}\n")
        sys.stdout.flush()
        Peer(engine).serve(once=True, alive=lambda: os.getppid() == parent)
