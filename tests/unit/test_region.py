"""Regions: views of them, what they keep alive, what is refused."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

import anyfabric as af


def test_allocated_memory_is_zeroed_and_viewed(engine):
    region = engine.allocate(4096)
    assert (region.nbytes, len(region), region.writable, region.closed) == (4096, 4096, True, False)
    assert not region.numpy().any()
    region.numpy("float32", (2, 3))[1, 2] = 7.0
    assert region.numpy("<f4")[5] == 7.0
    assert region.numpy(np.uint8).shape == (4096,)
    assert region.numpy("u8", 3).shape == (3,)
    assert region.numpy("u2", ()).shape == ()
    assert region.numpy("u2", np.int64(7)).shape == region.numpy("u2", np.array([7])).shape == (7,)
    assert region.numpy("V3").shape == (1365,)


def test_one_length_of_a_view_may_be_left_open(engine):
    region = engine.allocate(48)
    whole = np.zeros(48, "u1")
    for dtype, shape in (("u1", -1), ("u1", (-1,)), ("u4", (-1, 4)), ("f8", (2, -1, 3)), ("u4", (12, -1))):
        assert region.numpy(dtype, shape).shape == whole.view(dtype).reshape(shape).shape
    for dtype, shape in (
        ("u1", (-1, -1)),
        ("u1", (-1, 5)),
        ("u1", (-1, 0)),
        ("u1", -2),
        ("V5", -1),
        ("u4", (-1, -3)),
    ):
        with pytest.raises(
            af.InvalidArgument, match=r"-1 at most once, where the others divide the 48 bytes"
        ):
            region.numpy(dtype, shape)


def test_views_that_do_not_fit(engine):
    region = engine.allocate(10)
    for dtype, shape in (
        ("u8", 2),
        ("u1", 11),
        ("u1", (3, 4)),
        ("u1", (-2,)),
        ("u8", -1),
        ("O", 1),
        ("?!", 1),
        ("u1,,", None),
        (("u1", -1), None),
        ("(2,)u1", None),
        ("u1", (1,) * 99),
        ("u1", (0, 1 << 70)),
    ):
        with pytest.raises(af.InvalidArgument):
            region.numpy(dtype, shape)
    with pytest.raises(af.InvalidArgument):
        engine.allocate(0).numpy("u1", (0,) * 99)
    assert region.numpy("u8").shape == (1,)


def test_a_view_outlives_the_names_of_region_and_engine():
    with af.Engine() as engine:
        view = engine.allocate(1 << 20).numpy("u4")
        gc.collect()
        view[:] = 5
    gc.collect()
    assert (view == 5).all()
    del engine
    gc.collect()
    view[:] = 6
    assert (view == 6).all()


def test_torch_views(engine):
    torch = pytest.importorskip("torch", reason="torch is not installed: make .venv with `make test`")
    region = engine.allocate(64)
    tensor = region.torch(torch.bfloat16, (4, 8))
    tensor[3, 7] = 2.5
    assert region.torch(torch.bfloat16)[31] == 2.5
    assert region.torch().dtype == torch.uint8
    assert engine.allocate(0).torch(torch.float32).shape == (0,)
    with pytest.raises(af.InvalidArgument, match="torch dtype"):
        region.torch("float32")
    with pytest.raises(af.Unsupported, match="read-only"):
        engine.register(b"1234", writable=False).torch()


def test_a_region_keeps_its_array_until_it_is_closed(engine):
    array = np.arange(100)
    alive = weakref.ref(array)
    region = engine.register(array)
    del array
    gc.collect()
    assert alive() is not None
    assert region.numpy("i8")[99] == 99
    region.close()
    region.close()
    assert region.closed
    gc.collect()
    assert alive() is None


@contextlib.contextmanager
def stopped_writer(region, **settings):
    """A process that has written into the region, and was stopped: it may still write."""
    program = (
        "import anyfabric as af, json, sys\n"
        "engine = af.Engine(**json.loads(sys.argv[1]))\n"
        "to = af.Descriptor.from_bytes(bytes.fromhex(sys.argv[2]))\n"
        "engine.write(engine.allocate(64), to).wait(10)\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, json.dumps(settings), region.descriptor().to_bytes().hex()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout.readline() == b"\n"
            writer.send_signal(signal.SIGSTOP)
            os.waitpid(writer.pid, os.WUNTRACED)
            yield
        finally:
            writer.kill()


@pytest.mark.parametrize("is_registered", [False, True])
def test_who_closes_beside_another_waits_too(is_registered):
    """Once the first has given up nobody waits again."""
    with af.Engine(heartbeat_s=60) as engine:
        region = engine.register(np.zeros(64, np.uint8)) if is_registered else engine.allocate(64)
        with stopped_writer(region):
            first = threading.Thread(target=region.close, kwargs={"timeout_s": 1.0})
            first.start()
            while not region.closed:
                time.sleep(0.001)
            began = time.monotonic()
            region.close(timeout_s=0.3)
            assert 0.3 <= time.monotonic() - began < 1
            first.join()
            began = time.monotonic()
            region.close(timeout_s=10)
            assert time.monotonic() - began < 5
            assert [kept["region"] for kept in engine.info()["quarantine"]] == [region.id]


def test_nics_are_not_stopped_before_the_time_is_over(libfabric_of_the_wheel):
    settings = {
        "transports": ["libfabric"],
        "nics": ["127.0.0.1"],
        "libfabric_provider": "tcp",
        "libfabric_library": libfabric_of_the_wheel,
    }
    with af.Engine(heartbeat_s=60, **settings) as engine:
        region = engine.allocate(64)
        with stopped_writer(region, **settings):
            began = time.monotonic()
            region.revoke(timeout_s=0.5)
            assert time.monotonic() - began >= 0.5


def test_a_region_of_a_closed_engine_closes_at_once():
    """Also one that a peer has mapped: nobody is left who would hear that it lets go."""
    with af.Engine() as writer, af.Engine() as engine:
        region = engine.allocate(64)
        writer.write(writer.allocate(64)[:], region.descriptor()[:]).wait(10)
        engine.close()
        began = time.monotonic()
        region.close(timeout_s=10)
        assert time.monotonic() - began < 5


def test_a_dropped_region_gives_its_array_back(engine):
    array = np.arange(100)
    alive = weakref.ref(array)
    region = engine.register(array)
    del array, region
    gc.collect()
    assert alive() is None


def test_a_region_that_is_read_only_has_no_descriptor(engine):
    region = engine.register(b"constant", writable=False)
    assert not region.writable
    assert not region.numpy().flags.writeable
    with pytest.raises(af.Unsupported):
        region.descriptor()


def test_slices_count_from_the_region(engine):
    region = engine.allocate(100)
    part = region[10:60]
    assert (part.offset, part.nbytes, len(part)) == (10, 50, 50)
    assert (part[5:].offset, part[5:].nbytes) == (15, 45)
    assert (part[-10:].offset, part[-10:].nbytes) == (50, 10)
    assert region[:].nbytes == 100
    assert region[100:100].nbytes == 0
    assert part.region is region
    remote = region.descriptor()
    assert (remote[10:60][5:].offset, remote[10:60][5:].nbytes) == (15, 45)
    assert remote[10:60].descriptor == remote


def test_slices_never_reach_outside(engine):
    region = engine.allocate(100)
    for whole in (region, region.descriptor(), region[0:100], region.descriptor()[0:100]):
        for key in (
            slice(0, 101),
            slice(101, 101),
            slice(-101, 5),
            slice(5, 4),
            slice(0, 10, 2),
            slice(2**70),
        ):
            with pytest.raises(af.InvalidArgument):
                whole[key]
        with pytest.raises(TypeError):
            whole[0]


def test_empty_regions(engine):
    for region in (engine.allocate(0), engine.register(np.empty(0)), engine.register(bytearray())):
        assert region.nbytes == 0
        assert region.numpy().size == 0
        assert region.descriptor().nbytes == 0
        assert region[0:0].nbytes == 0


def test_registering_twice_and_overlapping_is_fine(engine, peer):
    array = np.arange(64, dtype=np.uint8)
    alive = weakref.ref(array)
    first, second, inner = engine.register(array), engine.register(array), engine.register(array[8:16])
    del array
    source = peer.allocate(64)
    source.numpy()[:] = 7
    to = [region.descriptor() for region in (first, second)]
    assert to[0] != to[1]
    for remote in to:
        peer.write(source, remote).wait()
    first.close()
    with pytest.raises(af.Refused):
        peer.write(source, to[0]).wait()
    source.numpy()[:] = 9
    peer.write(source, to[1]).wait()
    assert second.numpy()[63] == 9
    assert inner.numpy().tolist() == [9] * 8
    second.close()
    gc.collect()
    assert alive() is not None
    inner.close()
    gc.collect()
    assert alive() is None


def test_descriptors_and_addresses_travel(engine):
    descriptor = engine.allocate(32).descriptor()
    for copy in (af.Descriptor.from_bytes(descriptor.to_bytes()), pickle.loads(pickle.dumps(descriptor))):
        assert copy == descriptor
        assert hash(copy) == hash(descriptor)
        assert (copy.nbytes, copy.device, copy.address) == (32, "cpu", engine.address)
    address = engine.address
    for copy in (
        af.Address.parse(str(address)),
        af.Address.from_bytes(address.to_bytes()),
        pickle.loads(pickle.dumps(address)),
    ):
        assert copy == address
        assert hash(copy) == hash(address)
        assert copy.incarnation == engine.incarnation
    assert engine.allocate(32).descriptor() != descriptor


@pytest.mark.parametrize("data", [b"", b"x", b"\x00" * 64, b"AFD1" + b"\xff" * 200])
def test_garbage_is_refused(data):
    with pytest.raises(af.InvalidArgument):
        af.Descriptor.from_bytes(data)
    with pytest.raises(af.InvalidArgument):
        af.Address.from_bytes(data)


@pytest.mark.parametrize(
    "text", ["", "af://", "http://1.2.3.4:5/00", "af://1.2.3.4:99999/" + "0" * 32, "\x00", "af://\udcff"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(af.InvalidArgument):
        af.Address.parse(text)


def test_no_class_can_be_made_by_hand():
    for made in (af.Address, af.Region, af.Slice, af.Descriptor, af.RemoteSlice, af.Transfer, af.Counter):
        with pytest.raises(TypeError):
            made()


def test_reprs_inform(engine):
    region = engine.allocate(48)
    assert "48" in repr(region)
    assert "48" in repr(region.descriptor())
    assert str(engine.address) in repr(engine.address)
    assert "8..24" in repr(region[8:24])


def test_views_hold_their_bytes_past_the_close(engine):
    array = np.arange(100, dtype=np.uint8)
    alive = weakref.ref(array)
    registered, allocated = engine.register(array), engine.allocate(100)
    views = registered.numpy(), allocated.numpy()
    del array
    registered.close()
    allocated.close()
    gc.collect()
    assert views[0].tolist() == list(range(100))
    assert not views[1].any()
    del views
    gc.collect()
    assert alive() is None
    for closed in (registered, allocated):
        with pytest.raises(af.Closed):
            closed.numpy()
