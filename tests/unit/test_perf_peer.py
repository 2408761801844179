"""The other process of `anyfabric perf`: one client after another, whatever each of them does."""

from __future__ import annotations

import itertools
import json
import threading
import time

import pytest

import anyfabric as af
from anyfabric.cli import perf_peer
from anyfabric.cli.perf_cases import Case
from anyfabric.cli.perf_ops import End
from anyfabric.cli.perf_peer import Peer
from anyfabric.cli.perf_run import Link, run_case


def ask(engine, server, data):
    engine.send(server.address, data).wait(10)


def lose(engine, server):
    """Close an engine, and wait until the server knows."""
    engine.close()
    deadline = time.monotonic() + 20
    while server.path(engine.address).state != "lost":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def serve(server, *, looks=3):
    """Serve the messages that are here; what was reported, and whether it ended by itself."""
    reports = []
    left = itertools.count(looks, -1)
    Peer(server, report=reports.append).serve(once=True, alive=lambda: next(left) > 0)
    return reports, next(left) >= 0


@pytest.mark.parametrize("data", [b"nonsense", b"[" * 60000, b'{"do": "pong"}'])
def test_a_stranger_that_is_gone_before_its_answer_does_no_harm(engine, peer, data):
    stranger = af.Engine()
    ask(peer, engine, b'{"do": "check"}')
    ask(stranger, engine, data)
    lose(stranger, engine)
    ask(peer, engine, b'{"do": "bye"}')
    assert serve(engine) == ([f"client {peer.address}", "client is done"], True)
    assert "without a case" in json.loads(peer.receive(timeout_s=10).data)["error"]


def test_a_client_that_says_so_comes_again_for_what_is_left(engine, peer):
    ask(peer, engine, b'{"do": "bye", "more": true}')
    with af.Engine() as other:
        ask(other, engine, b'{"do": "bye"}')
        clients = [f"client {one.address}" for one in (peer, other)]
        assert serve(engine) == ([clients[0], "client is done", clients[1], "client is done"], True)


def test_a_client_that_said_so_and_is_gone_was_the_one(engine, peer, monkeypatch):
    monkeypatch.setattr(perf_peer, "WAIT_S", 0)
    ask(peer, engine, b'{"do": "bye", "more": true}')
    reports, ended = serve(engine)
    assert (reports[1:], ended) == (["client is done", "client did not come again"], True)


def test_a_client_that_is_gone_before_its_answer_was_the_one(engine):
    client = af.Engine()
    ask(client, engine, b'{"do": "check"}')
    lose(client, engine)
    assert serve(engine) == ([f"client {client.address}", "client was lost"], True)


def test_a_lost_client_makes_room_for_the_next_at_once(engine, peer):
    client = af.Engine()
    served = Peer(engine)
    ask(client, engine, b'{"do": "check"}')
    served._answer(engine.receive(timeout_s=10))
    lose(client, engine)
    ask(peer, engine, b'{"do": "check"}')
    left = itertools.count(1, -1)
    served.serve(once=False, alive=lambda: next(left) > 0)
    assert "without a case" in json.loads(peer.receive(timeout_s=10).data)["error"]


@pytest.mark.parametrize("op", ["barrier", "send"])
def test_who_waits_for_an_operation_hears_of_the_loss(engine, op):
    other = af.Engine()
    case = Case("shm", op, "adaptive", "allocated", 8, 1, 10)
    with End(engine, case, other.address) as end:
        engine.connect(other.address)
        other.close()
        with pytest.raises(af.PeerLost):
            end.arrive()


@pytest.mark.parametrize("error", [OSError("no socket"), MemoryError(), RuntimeError("whatever")])
def test_what_cannot_be_done_is_said(engine, peer, monkeypatch, error):
    class Failing:
        @staticmethod
        def from_json(_):
            raise error

    monkeypatch.setattr(perf_peer, "Case", Failing)
    ask(peer, engine, b'{"do": "prepare", "case": {}}')
    ask(peer, engine, b'{"do": "bye"}')
    serve(engine)
    assert json.loads(peer.receive(timeout_s=10).data)["error"] == f"cannot `prepare`: {error!r}"


def spoil_bytes(monkeypatch):
    monkeypatch.setattr(End, "expected_checksum", lambda _: 0)
    return "bytes of CRC-32"


def spoil_count(monkeypatch):
    ask = Link.ask

    def miscounted(link, what, **rest):
        answer = ask(link, what, **rest)
        return {**answer, "counted": 0} if what == "check" else answer

    monkeypatch.setattr(Link, "ask", miscounted)
    return "the target counted 0 arrivals"


@pytest.mark.parametrize("spoil", [spoil_bytes, spoil_count])
def test_what_arrives_otherwise_fails_the_measurement(engine, peer, monkeypatch, spoil):
    message = spoil(monkeypatch)
    serving = threading.Thread(target=Peer(peer).serve, kwargs={"once": True})
    serving.start()
    engine.connect(peer.address)
    link = Link(engine, peer.address, same_host=True)
    case = Case("shm", "pages", "adaptive", "allocated", size_bytes=64, pages=4, rounds=10)
    with pytest.raises(af.TransferFailed, match=message):
        run_case(link, case, check=True)
    link.bye()
    serving.join(10)
    assert not serving.is_alive()
