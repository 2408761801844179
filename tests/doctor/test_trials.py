"""Writes that the doctor makes: in this process, and with a partner."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

import anyfabric as af
from anyfabric.doctor import TRIALS, Partner, System, diagnose, pair_check
from anyfabric.doctor.pair import compare
from anyfabric.doctor.trial import End, Way, ways

PROGRAM = [sys.executable, "-m", "anyfabric", "doctor"]


def findings(system, check):
    return [(row.level, row.subject, row.found) for _, row in diagnose(system, [check]).findings]


@pytest.fixture
def laptop(tmp_path):
    return System(tmp_path)


def test_a_laptop_writes_over_what_it_has(laptop):
    well = "1 MiB written, counted and compared"
    assert findings(laptop, *TRIALS) == [("ok", "shm", well), ("ok", "tcp", well)]


def test_every_port_that_is_up_is_a_way(machine, monkeypatch):
    monkeypatch.setattr("anyfabric.doctor.trial.TRANSPORTS", ("shm", "verbs", "libfabric", "tcp"))
    machine.port(1, "state", "1: DOWN")
    assert ways(machine.system.topology) == [Way("shm"), Way("tcp"), Way("verbs", "mlx5_0")]
    assert Way("verbs", "mlx5_0").settings() == {
        "transports": ["verbs"],
        "require": "verbs",
        "nics": ["mlx5_0"],
    }


def test_what_fails_is_named(laptop, monkeypatch):
    def fail(*_, **__):
        raise af.ResourceExhausted("out of locked memory")

    monkeypatch.setattr(End, "write", fail)
    assert findings(laptop, *TRIALS)[0][:2] == ("broken", "shm")
    assert "out of locked memory" in findings(laptop, *TRIALS)[0][2]


def test_a_wrong_byte_is_noticed(laptop, monkeypatch):
    honest = End.write

    def spoil(self, offered, seed):
        honest(self, offered, seed + 1)

    monkeypatch.setattr(End, "write", spoil)
    level, _, found = findings(laptop, *TRIALS)[0]
    assert level == "broken"
    assert re.search(r"counted, but \d+ bytes differ, the first at \d", found)


@contextlib.contextmanager
def partner_of(system):
    stop = threading.Event()
    with Partner(system, listen="127.0.0.1:0") as partner:
        thread = threading.Thread(target=partner.serve, args=[lambda: not stop.is_set()])
        thread.start()
        try:
            yield str(partner.engine.address)
        finally:
            stop.set()
            thread.join()


def test_a_pair(laptop):
    with partner_of(laptop) as address:
        for _ in range(2):
            rows = findings(laptop, pair_check(address))
            assert rows == [("ok", "tcp → there", "1 MiB each way, counted and compared")]


@pytest.mark.parametrize("data", [b"nonsense", b"1", b"[" * 60000, b"[]", b'{"do": [], "way": 0}'])
def test_a_partner_survives_what_is_no_request(laptop, data):
    with partner_of(laptop) as address, af.Engine() as stranger:
        stranger.send(af.Address.parse(address), data).wait(10)
        assert "not a request" in json.loads(stranger.receive(timeout_s=10).data)["error"]


def test_an_offer_begins_anew(monkeypatch):
    """What came to nothing for one client is not the next one's."""
    with End(Way("shm")) as sender, End(Way("shm")) as receiver:
        with monkeypatch.context() as patch, pytest.raises(af.WaitTimeout):
            patch.setattr("anyfabric.doctor.trial.WAIT_S", 0.01)
            receiver.fault(1)
        sender.write(receiver.offer(), 2)
        assert receiver.fault(2) == ""


def test_nobody_there(laptop):
    with partner_of(laptop) as address:
        pass
    ((level, subject, found),) = findings(laptop, pair_check(address))
    assert (level, subject) == ("broken", address)
    assert found.startswith("no partner: ")
    assert findings(laptop, pair_check("nonsense"))[0][0] == "broken"


def test_a_partner_survives_strangers(laptop):
    with partner_of(laptop) as address, af.Engine() as stranger:
        for data in (
            b"\xff",
            b"[]",
            b"{}",
            b'{"do":"offer","way":99}',
            b'{"do":"write","way":0}',
            b'{"do":1}',
        ):
            stranger.send(af.Address.parse(address), data).wait(20)
            assert "error" in json.loads(stranger.receive(timeout_s=20).data)
        assert findings(laptop, pair_check(address))[0][0] == "ok"


def port(**facts):
    return {"name": "mlx5_0", "fabric": "ethernet", "gbps": 400, "packet_bytes": 4096, **facts}


@pytest.mark.parametrize(
    ("theirs", "level", "found"),
    [
        (port(fabric="infiniband", packet_bytes=None), "broken", "here ethernet, there infiniband"),
        (port(packet_bytes=1024), "warning", "carry 4096 bytes here and 1024 there"),
        (port(gbps=200), "warning", "400 Gbit/s here and 200 there"),
    ],
)
def test_ports_that_do_not_fit(theirs, level, found):
    ((given_level, given),) = [(row.level, row.found) for row in compare([port()], [theirs])]
    assert given_level == level
    assert found in given


def test_ports_that_fit():
    assert list(compare([port()], [port(name="mlx5_7")])) == []
    assert list(compare([port()], [])) == []


def test_two_machines_by_the_command_line():
    arguments = [*PROGRAM, "serve", "--listen", "127.0.0.1"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            command = server.stdout.readline().split()
            assert re.fullmatch(r"ANYFABRIC_SECRET=[0-9a-f]{32}", command[0])
            environment = {**os.environ, "ANYFABRIC_SECRET": command[0].partition("=")[2]}
            again = [*PROGRAM, *command[3:], "--json"]
            done = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=50)
            assert done.returncode == 0, done.stdout + done.stderr
            rows = [row for row in json.loads(done.stdout)["findings"] if row["check"] == "pair"]
            assert [row["subject"] for row in rows][:1] == ["tcp → there"]
            stranger = subprocess.run(again, capture_output=True, text=True, timeout=50)
            assert stranger.returncode == 1
            server.send_signal(signal.SIGINT)
            assert server.wait(20) == 0
        finally:
            server.kill()
