"""GPU memory over a libcuda without a GPU: what is registered, and what the CPU is kept from touching.

The library's memory cannot be read or written: where somebody does, the process dies.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

import anyfabric as af
from anyfabric.gpu import bytes_of_dlpack, bytes_of_interface, driver_gpus
from anyfabric.memory import memory_of
from gpu_array import Array

SOURCE = Path(__file__).parents[2] / "crates/cuda/tests/fake/cuda.c"
DEVICE, MANAGED = 0, 1
NBYTES = 4096


class Fake:
    """The library, and its memory."""

    def __init__(self, folder):
        self.path = str(folder / "libcuda-fake.so")
        command = ["cc", "-shared", "-fPIC", "-o", self.path, str(SOURCE)]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(self.path)
        self.library.fake_cuda_alloc.restype = ctypes.c_uint64

    def alloc(self, kind=DEVICE, gpu=0):
        address = self.library.fake_cuda_alloc(ctypes.c_uint64(NBYTES), kind, gpu)
        assert address
        return address


class Tensor(ctypes.Structure):
    """`DLManagedTensor` of dlpack.h; written down apart from ours, so that a wrong field there shows."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class Exporter:
    """Speaks DLPack and nothing else."""

    def __init__(self, address, shape, strides=None, *, offset=0):
        numbers = ctypes.c_int64 * len(shape)
        self.shape, self.strides = numbers(*shape), None if strides is None else numbers(*strides)
        self.tensor = Tensor(address, 2, 0, len(shape), 0, 16, 1, self.shape, self.strides, offset)
        self.streams = []

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, *, stream=None):
        self.streams.append(stream)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return Fake(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def engine(fake):
    with af.Engine(transports=("tcp",), cuda_library=fake.path) as engine:
        yield engine


def test_a_region_knows_its_gpu_and_keeps_the_array(engine, fake):
    array = Array(fake.alloc(gpu=1))
    alive = weakref.ref(array)
    region = engine.register(array)
    assert (region.device, region.nbytes) == ("cuda:1", NBYTES)
    assert repr(region) == f"Region({region.id}, {NBYTES} bytes on cuda:1)"
    assert region.descriptor().device == "cuda:01112131415161718191a1b1c1d1e1f1"
    del array
    gc.collect()
    assert alive() is not None
    region.close()
    gc.collect()
    assert alive() is None


def test_the_cpu_gets_no_view_of_it(engine, fake):
    region = engine.register(Array(fake.alloc()))
    with pytest.raises(af.Unsupported, match=r"is on cuda:0.*Region\.torch") as caught:
        region.numpy()
    assert caught.value.region == region.id


def test_the_cpu_moves_none_of_it(engine, fake):
    with af.Engine(transports=("tcp",), cuda_library=fake.path) as there:
        ours, theirs = engine.register(Array(fake.alloc())), there.register(Array(fake.alloc()))
        host, host_there = engine.allocate(NBYTES), there.allocate(NBYTES)
        for source, target, verify in (
            (ours, host_there, False),
            (host, theirs, False),
            (ours, host_there, True),
        ):
            transfer = engine.write(source, target.descriptor(), verify=verify)
            with pytest.raises(af.Unsupported, match="tcp moves host memory only, and the") as caught:
                transfer.wait(timeout_s=10)
            assert caught.value.region == source.id


def test_information_names_the_gpus_once_they_are_used(engine, fake):
    engine.register(Array(fake.alloc()))
    found = engine.info()
    assert [gpu["device"] for gpu in found["gpus"]] == ["cuda:0", "cuda:1"]
    assert found["gpus"][0]["writes"] == "ordered"


def test_the_command_names_them_too(fake):
    def info(*arguments, library):
        program = [sys.executable, "-m", "anyfabric", "info", *arguments]
        environment = {**os.environ, "ANYFABRIC_CUDA_LIBRARY": library, "COLUMNS": "200"}
        return subprocess.run(program, check=True, capture_output=True, text=True, env=environment).stdout

    found = json.loads(info("--json", library=fake.path))
    assert [gpu["pci"] for gpu in found["gpus"]] == ["0000:5a:00.0", "0000:5b:00.0"]
    assert found["no_gpus"] is None
    shown = info(library=fake.path)
    assert "Fake H100 1" in shown
    assert "visible in order" in shown
    found = json.loads(info("--json", library="/nowhere/libcuda.so"))
    assert found["gpus"] == []
    assert "install the NVIDIA driver" in found["no_gpus"]


def test_without_a_driver_nothing_of_a_gpu_is_registered():
    with (
        af.Engine(transports=("tcp",), cuda_library="/nowhere/libcuda.so") as engine,
        pytest.raises(af.Unsupported, match="install the NVIDIA driver"),
    ):
        engine.register(Array(1 << 40))
    with pytest.raises(af.Unsupported, match="install the NVIDIA driver"):
        driver_gpus("/nowhere/libcuda.so")


def test_memory_that_is_no_gpus_alone_is_refused(engine, fake):
    with pytest.raises(af.InvalidArgument, match="managed memory"):
        engine.register(Array(fake.alloc(MANAGED)))
    host = np.zeros(NBYTES, np.uint8)
    with pytest.raises(af.InvalidArgument, match="no memory of a GPU"):
        engine.register(Array(host.ctypes.data))


def test_an_array_of_no_bytes_lies_nowhere(engine):
    region = engine.register(Array(0, (0, 7), "<f4"))
    assert (region.nbytes, region.device) == (0, "cpu")


@pytest.mark.parametrize(
    ("shape", "typestr", "strides", "nbytes"),
    [
        ((2, 3), "<f4", None, 24),
        ((2, 3), "<f4", (12, 4), 24),
        ((), "<i8", (), 8),
        ((1, 5), "<i2", (999, 2), 10),
        ((0, 5), "<i2", (1, 1), 0),
    ],
)
def test_interfaces_that_are_contiguous_are_read(shape, typestr, strides, nbytes):
    found = bytes_of_interface(Array(64, shape, typestr, strides=strides), writable=True)
    assert (found.address, found.nbytes) == (64, nbytes)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (Array(64, (2, 3), "<f4", strides=(4, 8)), "not C-contiguous"),
        (Array(64, (4,), "|u1", strides=(2,)), "not C-contiguous"),
        (Array(64, (4,), "|O8"), "Python objects"),
        (Array(64, (4,), "|u1", mask=Array(64)), "masked"),
        (Array(64, read_only=True), r"read-only.*writable=False"),
        (Array(64, ("many",)), "not what it should be"),
        (Array(64, typestr="float"), "not what it should be"),
    ],
)
def test_interfaces_of_anything_else_are_refused(array, message):
    with pytest.raises(af.InvalidArgument, match=message):
        bytes_of_interface(array, writable=True)


def test_read_only_arrays_can_be_sent_from(engine, fake):
    region = engine.register(Array(fake.alloc(), read_only=True), writable=False)
    with pytest.raises(af.Unsupported, match="read-only"):
        region.descriptor()


def test_dlpack_is_asked_not_to_synchronise(engine, fake):
    address = fake.alloc()
    exporter = Exporter(address, (10, 4), (4, 1), offset=64)
    found = memory_of(exporter, writable=True)
    assert (found.address, found.nbytes, found.is_on_gpu) == (address + 64, 80, True)
    assert exporter.streams == [-1]
    assert engine.register(exporter).device == "cuda:0"
    with pytest.raises(af.InvalidArgument, match="not C-contiguous"):
        bytes_of_dlpack(Exporter(address, (10, 4), (1, 10)))


def test_dlpack_that_does_not_export_says_why():
    class Refusing(Exporter):
        def __dlpack__(self, *, stream=None):
            raise BufferError("it is a view")

    with pytest.raises(af.Unsupported, match="does not export its memory through DLPack: it is a view"):
        bytes_of_dlpack(Refusing(64, (1,)))
