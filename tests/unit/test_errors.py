"""The error tree: codes equal those of the native module, context survives, families hold."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys

import pytest

import anyfabric as af
from anyfabric import _core, _hooks, errors


def test_codes_are_those_of_the_native_module():
    assert sorted(_core.error_codes()) == sorted(errors.codes())


def test_every_class_is_public_and_has_one_code():
    classes = set(errors.codes().values())
    assert len(classes) == len(errors.codes())
    assert {c.__name__ for c in classes} | {"AnyFabricError"} == {
        name
        for name in af.__all__
        if isinstance(getattr(af, name), type) and issubclass(getattr(af, name), Exception)
    }


@pytest.mark.parametrize(
    ("derived", "base"),
    [
        (af.InvalidArgument, ValueError),
        (af.QueueFull, af.ResourceExhausted),
        (af.PeerLost, af.ConnectionBroken),
        (af.Refused, af.TransferFailed),
        (af.TransferTimeout, TimeoutError),
        (af.WaitTimeout, TimeoutError),
        (af.EngineForked, af.Closed),
    ],
)
def test_families(derived, base):
    assert issubclass(derived, base)
    assert issubclass(derived, af.AnyFabricError)
    assert not issubclass(af.WaitTimeout, af.TransferTimeout)


@pytest.mark.parametrize("code", sorted(errors.codes()))
def test_context_survives_pickling_and_copying(code):
    error = _hooks.make_error(code, "it broke", "write", "af://1/2", 7, 4096, "tcp/stream1")
    assert type(error) is errors.codes()[code]
    for found in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(found) is type(error)
        assert str(found) == "it broke"
        assert found.context() == {
            "code": code,
            "operation": "write",
            "peer": "af://1/2",
            "region": 7,
            "nbytes": 4096,
            "path": "tcp/stream1",
        }


def test_an_unknown_code_is_internal_and_keeps_its_name():
    error = _hooks.make_error("from_the_future", "?", None, None, None, None, None)
    assert isinstance(error, af.Internal)
    assert error.code == "from_the_future"


def test_classes_of_users_are_no_codes():
    class Mine(af.PeerLost):
        default_code = "mine"

    assert "mine" not in errors.codes()
    assert Mine("x").code == "mine"


PROGRAM_THAT_WRITES_AT_THE_END = """
import numpy as np, anyfabric as af
class Keeper:
    def __init__(self):
        self.engine, self.peer = af.Engine(), af.Engine()
        self.src, self.dst = self.engine.register(np.ones(8)), self.peer.allocate(64).descriptor()
    def __del__(self, closed=af.Closed, say=print):
        try:
            self.engine.write(self.src, self.dst)
        except closed as error:
            say(error)
keeper = Keeper()
"""


def test_who_uses_an_engine_while_the_interpreter_ends_is_told_that_it_is_closed():
    """Nothing can be imported by then."""
    program = [sys.executable, "-c", PROGRAM_THAT_WRITES_AT_THE_END]
    done = subprocess.run(program, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the engine is closed\n", "")


def test_wrong_types_are_told_what_to_pass(engine, peer):
    src, dst = engine.allocate(64), peer.allocate(64)
    remote, text = dst.descriptor(), "af://host"
    pages = af.Pages(src, [0], 8)
    no_address = "expected an Address, which `Address.parse` makes of text; given a str"
    cases = [
        (lambda: engine.write(b"bytes", remote), "`src` must be a Region or a Slice of one; given a bytes"),
        (lambda: engine.write(src, src), "`dst` must be "),
        (
            lambda: engine.write_pages(src, remote),
            "expected `Pages` of a region and of a descriptor; given Region and",
        ),
        (
            lambda: engine.write_pages(af.Pages(src[8:16], [0], 8), pages),
            "of a whole Region; `offset` says where",
        ),
        (lambda: engine.write_pages(pages, pages), "of a whole Descriptor; "),
        (
            lambda: engine.scatter(src, [(remote, 0, 8)]),
            "`targets` must be values of `Target`; given a tuple",
        ),
        (
            lambda: engine.write(src, remote).on_done(None),
            "calls a function with the transfer; given a NoneType",
        ),
        (lambda: engine.send(peer.address, "text"), "bytes"),
        (lambda: engine.send(text, b""), no_address),
        (lambda: engine.connect(text), no_address),
        (lambda: engine.path(text), no_address),
        (lambda: engine.counter(sources=[text]), no_address),
        (lambda: engine.barrier([peer.address, text], imm=1), no_address),
        (lambda: src.revoke(text), no_address),
        (lambda: engine.barrier(text, imm=1), "expected a list of Addresses; given a str"),
        (lambda: engine.barrier(peer.address, imm=1), "expected a list of Addresses; given a Address"),
        (lambda: engine.peer_group(text), "expected a list of Addresses; given a str"),
    ]
    for operation, words in cases:
        with pytest.raises(TypeError, match=re.escape(words)):
            operation()
