"""Which objects can be registered, where their bytes are, and what keeps them there."""

from __future__ import annotations

import array
import ctypes
import gc
import mmap
import subprocess
import sys
import weakref

import numpy as np
import pytest

import anyfabric as af
from anyfabric.memory import memory_of


def bytes_at(found):
    return ctypes.string_at(found.address, found.nbytes)


@pytest.mark.parametrize(
    "given",
    [
        np.arange(5, dtype=np.int16),
        np.arange(6.0).reshape(2, 3)[1],
        np.array(7, np.uint32),
        np.zeros(3, dtype=[("a", "u1"), ("b", "f8")]),
        np.array([1, 2], dtype=">i4"),
        np.array(["2026-01-01"], dtype="datetime64[D]"),
        np.empty((0, 4)),
        bytearray(b"hello"),
        bytearray(),
        memoryview(bytearray(b"abcd"))[1:3],
        array.array("d", [1.0, 2.0]),
        (ctypes.c_int * 3)(1, 2, 3),
        memoryview(np.zeros(3, dtype=[("Owner", "f4"), ("b", ">u8")])),
    ],
    ids=lambda given: f"{type(given).__name__}-{getattr(given, 'dtype', '')}",
)
def test_the_bytes_are_those_of_the_object(given):
    found = memory_of(given, writable=True)
    expected = given.tobytes() if hasattr(given, "tobytes") else bytes(given)
    assert bytes_at(found) == expected


def test_read_only_objects_can_only_be_read():
    frozen = np.arange(4)
    frozen.flags.writeable = False
    for given in (frozen, b"1234", memoryview(bytearray(b"1234")).toreadonly()):
        with pytest.raises(af.InvalidArgument, match=r"read-only.*writable=False"):
            memory_of(given, writable=True)
        assert memory_of(given, writable=False).nbytes == len(memoryview(given).cast("B"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.arange(10)[::2], "C-contiguous"),
        (np.zeros((3, 3), order="F"), "C-contiguous"),
        (np.broadcast_to(np.zeros(1), (4,)), "C-contiguous"),
        (memoryview(bytearray(8))[::2], "C-contiguous"),
        (np.array([object()]), "Python objects"),
        (np.zeros(2, dtype=[("a", "O")]), "Python objects"),
        ([1, 2, 3], "expected a numpy array"),
        (None, "expected a numpy array"),
        (12, "expected a numpy array"),
        ("text", "expected a numpy array"),
        (np.float64(1.0), "read-only"),
    ],
)
def test_refused(given, message):
    with pytest.raises(af.InvalidArgument, match=message):
        memory_of(given, writable=True)


def test_buffers_that_are_gone_are_refused():
    released = memoryview(bytearray(8))
    released.release()
    closed = mmap.mmap(-1, 4096)
    closed.close()
    for given in (released, closed):
        with pytest.raises(af.InvalidArgument, match="has no bytes to give"):
            memory_of(given, writable=False)
    with pytest.raises(af.InvalidArgument, match="Python objects"):
        memory_of((ctypes.py_object * 2)(), writable=True)


def test_the_owner_keeps_the_bytes_in_place():
    growing = bytearray(b"12345678")
    found = memory_of(growing, writable=True)
    with pytest.raises(BufferError):
        growing.extend(b"more")
    with mmap.mmap(-1, 4096) as mapping:
        mapped = memory_of(mapping, writable=True)
        with pytest.raises(BufferError):
            mapping.close()
        del mapped
    kept = np.arange(3)
    alive = weakref.ref(kept)
    found = memory_of(kept, writable=True)
    del kept
    gc.collect()
    assert alive() is not None
    assert bytes_at(found) == np.arange(3).tobytes()


class Exporter:
    """A DLPack exporter that is nothing else."""

    def __init__(self, source, device=(1, 0)):
        self.source, self.device = source, device

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **arguments):
        if isinstance(self.source, Exception):
            raise self.source
        return self.source.__dlpack__(**arguments)


def test_dlpack():
    source = np.arange(6, dtype=np.float32)
    found = memory_of(Exporter(source), writable=True)
    assert found.address == source.ctypes.data
    assert bytes_at(found) == source.tobytes()


def test_dlpack_that_cannot_say_whether_it_may_be_written_says_what_to_do():
    class Older(Exporter):
        def __dlpack__(self, stream=None):
            return self.source.__dlpack__(stream=stream)

    older = Older(np.arange(6))
    with pytest.raises(af.InvalidArgument, match=r"this Older through DLPack.*torch\.from_dlpack"):
        memory_of(older, writable=True)
    assert memory_of(older, writable=False).address == older.source.ctypes.data


def test_dlpack_of_other_devices_and_dtypes_is_unsupported():
    with pytest.raises(af.Unsupported, match=r"DLPack device \(10, 1\)"):
        memory_of(Exporter(np.zeros(1), device=(10, 1)), writable=True)
    with pytest.raises(af.Unsupported, match="integer dtype"):
        memory_of(Exporter(BufferError("bfloat16?")), writable=True)


def test_torch_is_not_imported_for_the_asking():
    program = (
        "import sys, numpy, anyfabric.memory as m; m.memory_of(numpy.zeros(3), writable=True);"
        "m.memory_of(bytearray(3), writable=True); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


class TestTorch:
    """CPU tensors."""

    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch", reason="torch is not installed: make .venv with `make test`")

    def test_bytes_and_dtypes(self, torch):
        for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int64):
            tensor = torch.zeros(3, 5).to(dtype)[1:]
            found = memory_of(tensor, writable=True)
            assert found.address == tensor.data_ptr()
            assert found.nbytes == 10 * tensor.element_size()
        assert memory_of(torch.empty(0), writable=True).nbytes == 0
        assert memory_of(torch.nn.Parameter(torch.zeros(2)), writable=True).nbytes == 8

    def test_the_storage_outlives_a_swap(self, torch):
        tensor = torch.full((1000,), 7, dtype=torch.uint8)
        found = memory_of(tensor, writable=True)
        tensor.data = torch.zeros(1000, dtype=torch.uint8)
        gc.collect()
        filler = [torch.zeros(1000, dtype=torch.uint8) for _ in range(100)]
        assert bytes_at(found) == b"\x07" * 1000
        assert len(filler) == 100

    def test_refused(self, torch):
        for tensor in (torch.zeros(4, 4).t(), torch.zeros(4)[::2], torch.zeros(1).expand(3)):
            with pytest.raises(af.InvalidArgument, match=r"\.contiguous\(\)"):
                memory_of(tensor, writable=True)
        with pytest.raises(af.InvalidArgument, match=r"sparse_coo; try `\.to_dense\(\)`"):
            memory_of(torch.eye(3).to_sparse(), writable=True)
        with pytest.raises(af.Unsupported, match="meta"):
            memory_of(torch.zeros(3, device="meta"), writable=True)

    def test_lazy_views_are_refused(self, torch):
        """Their bytes are those of another tensor, and the values others."""
        lazy = torch.ones(3, dtype=torch.complex64).conj()
        assert lazy.is_contiguous()
        for tensor in (lazy, torch._neg_view(torch.ones(3))):
            with pytest.raises(af.InvalidArgument, match="resolve_conj"):
                memory_of(tensor, writable=True)
        memory_of(lazy.resolve_conj(), writable=True)

    def test_tensors_without_memory_are_refused(self, torch):
        """Freed under the tensor, shrunk, or never there."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        freed, shrunk = torch.ones(8), torch.ones(8)
        tail = shrunk[2:6]
        freed.untyped_storage().resize_(0)
        shrunk.untyped_storage().resize_(16)
        with FakeTensorMode():
            fake = torch.ones(8)
        for tensor in (freed, shrunk, tail, fake, torch.nn.Parameter(freed)):
            with pytest.raises(af.InvalidArgument, match="has no memory"):
                memory_of(tensor, writable=True)
        assert memory_of(shrunk[:4], writable=True).nbytes == 16
        assert memory_of(fake[:0], writable=True).nbytes == 0
