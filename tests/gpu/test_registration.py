"""Memory of a real GPU: registered, viewed, kept, and refused where no NIC carries it."""

from __future__ import annotations

import ctypes
import gc
import weakref

import pytest

import anyfabric as af
from anyfabric.gpu import driver_gpus
from gpu_array import Array

pytestmark = pytest.mark.requires_gpus(1)

NBYTES = 1 << 20


class Cuda:
    """The driver, with the first GPU's primary context current."""

    def __init__(self):
        self.library = ctypes.CDLL("libcuda.so.1")
        context = ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.call("cuCtxSetCurrent", context)

    def call(self, name, *arguments):
        assert getattr(self.library, name)(*arguments) == 0, name

    def allocate(self, name, *flags):
        address = ctypes.c_uint64()
        self.call(name, ctypes.byref(address), ctypes.c_size_t(NBYTES), *flags)
        return address.value


@pytest.fixture(scope="module")
def cuda():
    return Cuda()


@pytest.fixture
def engine():
    with af.Engine(transports=("tcp",)) as engine:
        yield engine


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch was built without CUDA")
    return torch


def test_the_driver_describes_its_gpus():
    gpu = driver_gpus()[0]
    assert gpu.device == "cuda:0"
    assert gpu.uuid.startswith("GPU-")
    assert gpu.writes in {"ordered", "flushed", "never"}


def test_a_region_knows_its_gpu_and_keeps_the_array(engine, cuda):
    array = Array(cuda.allocate("cuMemAlloc_v2"), (NBYTES,))
    alive = weakref.ref(array)
    region = engine.register(array)
    assert (region.device, region.nbytes) == ("cuda:0", NBYTES)
    assert region.descriptor().device.startswith("cuda:")
    assert engine.info()["gpus"][0]["device"] == "cuda:0"
    del array
    gc.collect()
    assert alive() is not None
    region.close()
    gc.collect()
    assert alive() is None


def test_tensors_are_registered_and_viewed_in_place(engine, torch):
    tensor = torch.arange(4096, dtype=torch.int32, device="cuda:0").reshape(64, 64)
    region = engine.register(tensor)
    view = region.torch(torch.int32, (64, 64))
    assert view.data_ptr() == tensor.data_ptr()
    assert view.device == tensor.device
    view += 1
    assert torch.equal(view, tensor)
    with pytest.raises(af.Unsupported, match=r"is on cuda:0.*Region\.torch"):
        region.numpy()
    with pytest.raises(af.InvalidArgument, match="not contiguous"):
        engine.register(tensor.T)
    assert engine.register(tensor[:, :0]).nbytes == 0


def test_other_libraries_arrays_are_registered(engine, cuda):
    with pytest.raises(af.InvalidArgument, match="read-only"):
        engine.register(Array(cuda.allocate("cuMemAlloc_v2"), (NBYTES,), read_only=True))
    cupy = pytest.importorskip("cupy")
    assert engine.register(cupy.zeros(100, "f8")).device == "cuda:0"


def test_memory_that_is_no_gpus_alone_is_refused(engine, cuda):
    with pytest.raises(af.InvalidArgument, match="managed memory"):
        engine.register(Array(cuda.allocate("cuMemAllocManaged", 1), (NBYTES,)))
    with pytest.raises(af.InvalidArgument, match="no memory of a GPU"):
        engine.register(Array(cuda.allocate("cuMemAllocHost_v2"), (NBYTES,)))
    with pytest.raises(af.InvalidArgument, match=r"nothing is allocated|no memory of a GPU"):
        engine.register(Array(cuda.allocate("cuMemAlloc_v2"), (1 << 40,)))


@pytest.mark.parametrize("transports", [("shm", "tcp"), ("tcp",)])
def test_transports_of_host_memory_refuse_it(cuda, transports):
    with af.Engine(transports=transports) as here, af.Engine(transports=transports) as there:
        ours, theirs = (
            side.register(Array(cuda.allocate("cuMemAlloc_v2"), (NBYTES,))) for side in (here, there)
        )
        host = there.allocate(NBYTES)
        with pytest.raises(af.Unsupported, match=r"host memory only, and the source lies on cuda:0; verbs"):
            here.write(ours, host.descriptor()).wait(timeout_s=10)
        with pytest.raises(af.Unsupported, match=r"the destination lies on a GPU"):
            here.write(here.allocate(NBYTES), theirs.descriptor()).wait(timeout_s=10)
