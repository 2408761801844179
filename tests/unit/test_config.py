"""Settings: where a value comes from, what is refused, what is never shown."""

from __future__ import annotations

import inspect
import json
import os
import re

import pytest

import anyfabric as af
from anyfabric import config


def values(arguments=None, environment=None):
    return config.native_config(config.resolve(arguments or {}, environment or {}))


def test_argument_beats_environment_beats_default():
    environment = {"ANYFABRIC_TCP_STREAMS": "3"}
    found = config.resolve({"tcp_streams": 4, "polling": None}, environment)
    assert (found["tcp_streams"].value, found["tcp_streams"].origin) == (4, "argument")
    found = config.resolve({}, environment)
    assert (found["tcp_streams"].value, found["tcp_streams"].origin) == (3, "environment")
    found = config.resolve({}, {"ANYFABRIC_TCP_STREAMS": ""})
    assert (found["tcp_streams"].value, found["tcp_streams"].origin) == (2, "default")


def test_every_setting_is_an_argument_of_the_engine_and_documented_there():
    parameters = inspect.signature(af.Engine.__new__).parameters
    assert [name for name in parameters if name != "cls"] == [s.name for s in config.SETTINGS]
    entries = re.split(r"^ {12}(\w+): ", af.Engine.__new__.__doc__, flags=re.MULTILINE)
    documented = dict(zip(entries[1::2], entries[2::2], strict=True))
    for setting in config.SETTINGS:
        default = json.dumps(setting.default) if isinstance(setting.default, str) else setting.default
        is_given = default is not None and setting.name != "transports"
        assert ("Default: " in documented[setting.name]) == (default is not None)
        assert not is_given or f"Default: {default}." in documented[setting.name]
        assert setting.env == "ANYFABRIC_" + setting.name.upper()


def test_defaults_parse_to_themselves():
    for setting in config.SETTINGS:
        if setting.default is not None:
            assert setting.parse(setting.default) == setting.default


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("transports", "tcp", ("tcp",)),
        ("transports", " tcp , shm ", ("tcp", "shm")),
        ("transports", ["shm"], ("shm",)),
        ("listen", "10.0.0.1", "10.0.0.1:0"),
        ("listen", "node7:4000", "node7:4000"),
        ("listen", "[::1]:80", "[::1]:80"),
        ("listen", "[fe80::1%eth0]", "[fe80::1%eth0]:0"),
        ("isolate", "yes", True),
        ("isolate", False, False),
        ("heartbeat_s", "0.25", 0.25),
        ("heartbeat_s", 2, 2.0),
        ("max_message_bytes", "64K", 65536),
        ("max_message_bytes", "1 MiB", 1 << 20),
        ("secret", "ä", "ä".encode()),
        ("secret", b"\x00", b"\x00"),
        ("secret", os.fsdecode(b"\xff\x01"), b"\xff\x01"),
    ],
)
def test_parsed(name, given, expected):
    assert values({name: given})[name] == expected


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("transports", ""),
        ("transports", "nvlink"),
        ("devices", ""),
        ("pin_worker", "perhaps"),
        ("nics_per_device", 9),
        ("nics", ""),
        ("nics", "a,,b"),
        ("nics", "a,a"),
        ("nics", "a,b,c,d,e,f,g,h,i"),
        ("gid_index", 256),
        ("rnr_retry", 7),
        ("verbs_library", " "),
        ("libfabric_provider", ""),
        ("libfabric_answer_timeout_s", 0),
        ("libfabric_max_endpoints", 5000),
        ("transports", ["shm", "shm"]),
        ("transports", 7),
        ("transports", [[]]),
        ("require", "fast"),
        ("secret", ""),
        ("secret", 7),
        ("secret", "\ud800"),
        ("listen", ""),
        ("listen", "host:70000"),
        ("listen", "::1"),
        ("listen", "a b"),
        ("listen", 80),
        ("listen", os.fsdecode(b"\xff")),
        ("nics", ["mlx5_0", "\ud800"]),
        ("devices", os.fsdecode(b"cuda:\xff")),
        ("verbs_library", os.fsdecode(b"/tmp/\xff.so")),
        ("libfabric_provider", "\ud800"),
        ("tcp_streams", 0),
        ("tcp_streams", 5),
        ("tcp_streams", 2.0),
        ("tcp_streams", True),
        ("tcp_streams", "two"),
        ("polling", "Busy"),
        ("isolate", "maybe"),
        ("isolate", 1),
        ("heartbeat_s", 0),
        ("heartbeat_s", float("nan")),
        ("heartbeat_s", float("inf")),
        ("heartbeat_s", "soon"),
        ("heartbeats_lost", -1),
        ("timeout_s", 1e9),
        ("timeout_s", 10**400),
        ("queue_depth", 1 << 40),
        ("queue_full", "drop"),
        ("max_message_bytes", "1T"),
        ("max_message_bytes", -1),
    ],
)
def test_refused_with_what_was_given_and_expected(name, given):
    with pytest.raises(af.InvalidArgument) as caught:
        values({name: given})
    message = str(caught.value)
    assert name in message
    assert "expected" in message
    assert "object is not" not in message
    assert caught.value.code == "invalid_argument"


def test_a_refused_variable_is_named():
    with pytest.raises(af.InvalidArgument, match="ANYFABRIC_POLLING was given 'fast'; expected one of"):
        values(environment={"ANYFABRIC_POLLING": "fast"})


def test_words_in_capitals_stay_so_in_a_refusal():
    with pytest.raises(af.InvalidArgument, match=r"\(NICs to take for each device"):
        values({"nics_per_device": 0})


def test_a_ninth_nic_is_refused_with_what_to_do():
    names = tuple(f"mlx5_{idx}" for idx in range(9))
    with pytest.raises(af.InvalidArgument, match=r"1 to 8 names.*open an engine for each device"):
        af.Engine(nics=names)
    assert values({"nics": names[:8]})["nics"] == names[:8]


def test_unknown_names():
    with pytest.raises(af.InvalidArgument, match="pollin"):
        config.resolve({"pollin": "busy"}, {})
    environment = {"ANYFABRIC_POLING": "busy", "ANYFABRIC_POLLING": "busy", "PATH": "/bin"}
    assert config.unknown_variables(environment) == ["ANYFABRIC_POLING"]


def test_the_secret_is_never_shown():
    found = config.resolve({"secret": "hunter2"}, {})
    assert found["secret"].value == b"hunter2"
    rows = json.dumps([entry.as_dict() for entry in found.values()])
    assert "hunter2" not in rows + repr(found) + str(found["secret"])
    assert found["secret"].shown() == "(set)"
    with pytest.raises(af.InvalidArgument) as caught:
        config.resolve({"secret": ["hunter2"]}, {})
    assert "hunter2" not in str(caught.value)
