"""What `anyfabric perf` measures: sizes, defaults, and the way a case travels."""

from __future__ import annotations

import json

import numpy as np
import pytest

import anyfabric as af
from anyfabric.cli.perf_baselines import baselines_of
from anyfabric.cli.perf_cases import MEMORIES, OPERATIONS, Case, parse_sizes, plan
from anyfabric.cli.perf_ops import permutations


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("8", (8,)),
        ("8,4K,32M", (8, 4096, 32 << 20)),
        ("8:128", (8, 32, 128)),
        ("8:100", (8, 32, 100)),
        ("1K:8KiB:2", (1024, 2048, 4096, 8192)),
        ("8:8", (8,)),
        ("0,1", (0, 1)),
        ("4G", (4 << 30,)),
    ],
)
def test_sizes(text, sizes):
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize(
    "text", ["", "x", "8:", ":8", "8:4", "8:64:1", "8:64:2:2", "0:8", "-1", "1.5", "8,,9", "1T"]
)
def test_refused_sizes(text):
    with pytest.raises(af.InvalidArgument, match="expected FIRST:LAST"):
        parse_sizes(text)


def the_plan(**changes):
    arguments = {
        "transports": ("shm", "tcp"),
        "ops": OPERATIONS,
        "pollings": ("adaptive",),
        "memories": MEMORIES,
        "sizes": None,
        "pages": None,
        "rounds": None,
    }
    return plan(**{**arguments, **changes})


def test_sizes_beyond_a_message_are_left_out_and_refused_alone():
    cases = the_plan(ops=("send", "write"), memories=("allocated",), sizes=(8, 1 << 20))
    assert {(c.op, c.size_bytes) for c in cases} == {("send", 8), ("write", 8), ("write", 1 << 20)}
    with pytest.raises(af.InvalidArgument, match="1048576: a message has at most 65536 bytes"):
        the_plan(ops=("send",), sizes=(1 << 20,))


def test_the_default_plan_has_every_operation_on_every_transport():
    cases = the_plan()
    assert {(c.transport, c.op) for c in cases} == {(t, o) for t in ("shm", "tcp") for o in OPERATIONS}
    assert all(c.memory == "allocated" for c in cases if c.op in {"send", "barrier"})
    assert len(cases) == len(set(cases))
    for case in cases:
        assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
        assert 1 <= case.window <= 32
        assert case.rounds >= 10


def test_lists_of_large_pages_are_shorter_unless_their_length_is_given():
    cases = the_plan(
        ops=("pages",), sizes=(1024, 1 << 20, 1 << 30), memories=("allocated",), transports=("shm",)
    )
    assert [c.pages for c in cases] == [4096, 256, 1]
    assert the_plan(ops=("pages",), sizes=(1 << 20,), pages=4096)[0].pages == 4096


def test_what_is_asked_for_twice_is_measured_once():
    cases = the_plan(
        transports=("shm", "shm"),
        ops=("write", "write"),
        pollings=("busy", "busy"),
        memories=("allocated", "allocated"),
        sizes=(8, 4096, 8),
    )
    assert [c.size_bytes for c in cases] == [8, 4096]


def test_permutations_are_the_same_on_both_sides_and_complete():
    case = the_plan(ops=("pages",), pages=100)[0]
    src, dst = permutations(case)
    again = permutations(case)
    assert np.array_equal(src, again[0])
    assert np.array_equal(dst, again[1])
    assert sorted(src) == sorted(dst) == list(range(100))
    assert not np.array_equal(src, dst)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"op": "write", "size_bytes": 8}, ["ring"]),
        ({"op": "write", "size_bytes": 32 << 20}, ["memcpy"]),
        ({"op": "pages", "size_bytes": 1024, "pages": 4096}, ["copy_pages"]),
        ({"op": "pages", "size_bytes": 1024, "pages": 65536, "memory": "registered"}, ["process_vm_writev"]),
        ({"op": "write", "size_bytes": 32 << 20, "transport": "tcp"}, ["socket_1", "socket_2"]),
        ({"op": "write", "size_bytes": 8, "transport": "tcp"}, []),
        ({"op": "barrier", "size_bytes": 0}, []),
    ],
)
def test_each_row_has_the_baseline_that_belongs_to_it(changes, names):
    fields = {"transport": "shm", "polling": "busy", "memory": "allocated", "pages": 1, "rounds": 10}
    case = Case(**{**fields, **changes})
    assert baselines_of(case, same_host=True) == names
    if case.transport == "shm":
        assert baselines_of(case, same_host=False) == []
