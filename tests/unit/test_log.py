"""What the transports log reaches Python's logging."""

from __future__ import annotations

import logging

import pytest

import anyfabric as af


def test_a_nic_that_is_left_out_is_in_the_log(null_nic, caplog):
    library, set_knob = null_nic
    set_knob("shut", 1)
    with (
        caplog.at_level(logging.INFO, "anyfabric"),
        af.Engine(transports=("verbs",), verbs_library=library) as engine,
    ):
        info = str(engine.info()["transports"])
    set_knob("shut", 0)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "null1" in info
    assert any(line.startswith("NIC null0 is not used: ") for line in lines), lines


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"listen": "0.0.0.0"}, True),
        ({"listen": "0.0.0.0", "secret": b"secret"}, False),
        ({}, False),
    ],
)
def test_an_engine_that_anyone_may_call_says_so(caplog, settings, warns):
    with caplog.at_level(logging.INFO, "anyfabric"), af.Engine(transports=("tcp",), **settings) as engine:
        sockets = engine.address.sockets
    if not any(not socket.startswith("127.") for socket in sockets) and warns:
        pytest.skip("this machine has loopback alone")
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("ANYFABRIC_SECRET" in line for line in lines) == warns, lines
