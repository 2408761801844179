"""Memory of other libraries, as address and size; and regions as arrays.

Owns the answer to "which objects can be registered": numpy arrays, torch tensors, whatever speaks DLPack or
`__cuda_array_interface__`, whatever exports a buffer; in host memory or on a CUDA GPU, C-contiguous, without
Python objects in it. torch is never imported for the asking: an object can only be a tensor if torch is
loaded already.
"""

from __future__ import annotations

import importlib
import math
import operator
import re
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from anyfabric import gpu
from anyfabric.errors import Closed, InvalidArgument, Unsupported

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from anyfabric._core import Region, Watcher

__all__ = ["Memory", "memory_of", "region_numpy", "region_torch", "watcher_numpy"]

DLPACK_CPU_DEVICES = {1, 3}
"""kDLCPU, and kDLCUDAHost: pinned, but host memory all the same."""
FIELD_NAMES = re.compile(":[^:]*:")
"""In a buffer's format, where any letter may be part of a name."""


class Memory(NamedTuple):
    """Where an object's bytes lie, and what must live for them to stay there."""

    address: int
    nbytes: int
    owner: object
    is_on_gpu: bool = False
    """Then the address is none that the CPU may touch. False for no bytes at all."""


def memory_of(array: object, *, writable: bool) -> Memory:
    """Find the bytes of `array`.

    Args:
        array: numpy array, torch tensor, `__cuda_array_interface__`, DLPack or buffer exporter;
            C-contiguous; may be empty.
        writable: Whether peers shall write into it.

    Returns:
        Address, size, and an owner that keeps the bytes in place: for a tensor also its storage, for
        a resizable exporter (`bytearray`, `mmap`) the export that forbids resizing.

    Raises:
        InvalidArgument: Not such an object, not contiguous, holds Python objects, or is read-only
            although `writable`.
        Unsupported: The bytes are on a device that is neither the CPU nor a CUDA GPU.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return _of_tensor(array)
    if isinstance(array, np.ndarray):
        return _of_ndarray(array, array, writable=writable)  # pyright: ignore[reportUnknownArgumentType] - of any dtype
    if hasattr(array, "__cuda_array_interface__"):
        return _on_gpu(gpu.bytes_of_interface(array, writable=writable))
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return _of_dlpack(array, writable=writable)
    return _of_buffer(array, writable=writable)


def region_numpy(region: Region, dtype: npt.DTypeLike, shape: int | Sequence[int] | None) -> npt.NDArray[Any]:
    """`Region.numpy`."""
    if region.device != "cpu":
        msg = f"region {region.id} is on {region.device}, and numpy has host memory only; use `Region.torch`"
        raise Unsupported(msg, operation="numpy", region=region.id)
    try:
        element = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError) as cause:
        msg = f"no numpy dtype: {dtype!r}; for torch dtypes use `Region.torch`"
        raise InvalidArgument(msg, operation="numpy", region=region.id) from cause
    if element.hasobject or element.itemsize == 0 or element.subdtype is not None:
        msg = f"a region can be viewed with fixed-size dtypes without objects or shape; given {element}"
        raise InvalidArgument(msg, operation="numpy", region=region.id)
    dimensions = _dimensions(region, shape, element.itemsize)
    address = region._address
    if not address and region.nbytes:
        msg = f"region {region.id} is closed"
        raise Closed(msg, operation="view", region=region.id)
    if not address:
        # numpy takes no null pointer, though there is nothing behind it
        return _shaped(np.empty(0, element), dimensions, region)
    # A view outlives the registration: it also holds what was registered, which the region lets go of.
    data: Any = np.asarray(_Exporter((region, region._owner), address, region.nbytes, region.writable))
    return _shaped(data[: math.prod(dimensions) * element.itemsize].view(element), dimensions, region)


def region_torch(region: Region, dtype: Any, shape: int | Sequence[int] | None) -> Any:
    """`Region.torch`."""
    torch: Any = importlib.import_module("torch")  # only here, where the caller asks for it by name
    element: Any = torch.uint8 if dtype is None else dtype
    if not isinstance(element, torch.dtype):
        msg = f"no torch dtype: {element!r}; for numpy dtypes use `Region.numpy`"
        raise InvalidArgument(msg, operation="torch", region=region.id)
    if not region.writable:
        msg = f"region {region.id} is read-only and torch has no read-only tensors; use `Region.numpy`"
        raise Unsupported(msg, operation="torch", region=region.id)
    dimensions = _dimensions(region, shape, element.itemsize)
    nbytes = math.prod(dimensions) * element.itemsize
    if region.device == "cpu":
        flat = torch.from_numpy(region_numpy(region, np.uint8, nbytes))
    else:
        flat = torch.as_tensor(_GpuExporter(region, nbytes), device=region.device)
    return _shaped(flat.view(element), dimensions, region)


def watcher_numpy(watcher: Watcher) -> npt.NDArray[Any]:
    """`Watcher.numpy`."""
    word: Any = np.asarray(_Exporter(watcher, watcher._address, 8, writable=True))
    return word.view(np.uint64)


class _Exporter:
    """Bytes of a native object for numpy, which keeps this object, and so its owner, as the base."""

    def __init__(self, owner: object, address: int, nbytes: int, writable: bool) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, not writable),
            "version": 3,
        }


class _GpuExporter:
    """As `_Exporter`, for GPU libraries."""

    def __init__(self, region: Region, nbytes: int) -> None:
        if not region._address:
            msg = f"region {region.id} is closed"
            raise Closed(msg, operation="view", region=region.id)
        self.owner = (region, region._owner)
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (region._address, not region.writable),
            "version": 3,
        }


def _of_tensor(tensor: Any) -> Memory:
    if tensor.device.type not in {"cpu", "cuda"}:
        msg = (
            f"cannot register a tensor on {tensor.device}: host memory and CUDA GPUs are reached; "
            "copy it with `.cpu()`"
        )
        raise Unsupported(msg, operation="register")
    if tensor.layout != sys.modules["torch"].strided:
        msg = f"cannot register a tensor of layout {tensor.layout}; try `.to_dense()`, which copies"
        raise InvalidArgument(msg, operation="register")
    if not tensor.is_contiguous():
        msg = (
            f"cannot register a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()}: "
            "it is not contiguous; try `.contiguous()`, which copies, or register the whole storage"
        )
        raise InvalidArgument(msg, operation="register")
    if tensor.is_conj() or tensor.is_neg():
        msg = (
            "cannot register a tensor that is the conjugate or negative of another one and shares its bytes; "
            "try `.resolve_conj()` or `.resolve_neg()`, which copy"
        )
        raise InvalidArgument(msg, operation="register")
    nbytes = tensor.numel() * tensor.element_size()
    try:
        storage = tensor.untyped_storage()
        # Storages can be freed or shrunk under their tensors, as FSDP does; those of fake tensors are none.
        is_there = storage.device == tensor.device and storage.nbytes() >= nbytes + (
            tensor.storage_offset() * tensor.element_size()
        )
        address = tensor.data_ptr() if nbytes and is_there else 0
    except (RuntimeError, NotImplementedError) as cause:
        msg = f"a {type(tensor).__name__} has no memory of its own: {cause}"
        raise InvalidArgument(msg, operation="register") from cause
    if nbytes and not address:
        msg = (
            f"a {type(tensor).__name__} of {nbytes} bytes has no memory for them: "
            f"its storage holds {storage.nbytes()} bytes on {storage.device}"
        )
        raise InvalidArgument(msg, operation="register")
    return Memory(address, nbytes, (tensor, storage), is_on_gpu=nbytes > 0 and tensor.device.type == "cuda")


def _on_gpu(found: gpu.GpuBytes) -> Memory:
    return Memory(found.address, found.nbytes, found.owner, is_on_gpu=found.nbytes > 0)


def _of_ndarray(array: npt.NDArray[Any], owner: object, *, writable: bool) -> Memory:
    if array.dtype.hasobject:
        msg = f"cannot register an array of {array.dtype}: Python objects have no meaning elsewhere"
        raise InvalidArgument(msg, operation="register")
    if not array.flags.c_contiguous:
        msg = (
            f"cannot register an array of shape {array.shape} and strides {array.strides}: it is not "
            "C-contiguous; try `numpy.ascontiguousarray`, which copies"
        )
        raise InvalidArgument(msg, operation="register")
    if writable and not array.flags.writeable:
        _raise_read_only(type(owner).__name__)
    address = int(array.__array_interface__["data"][0]) if array.nbytes else 0
    return Memory(address, array.nbytes, owner)


def _of_dlpack(exporter: Any, *, writable: bool) -> Memory:
    device, index = exporter.__dlpack_device__()
    if int(device) in gpu.CUDA_DEVICES:
        return _on_gpu(gpu.bytes_of_dlpack(exporter))
    if int(device) not in DLPACK_CPU_DEVICES:
        msg = (
            f"cannot register a {type(exporter).__name__} on DLPack device ({int(device)}, {index}): "
            "host memory and CUDA GPUs are reached; copy it to the CPU"
        )
        raise Unsupported(msg, operation="register")
    try:
        array = np.from_dlpack(exporter)
    except (BufferError, RuntimeError, TypeError, ValueError) as cause:
        msg = (
            f"numpy cannot take this {type(exporter).__name__} through DLPack: {cause}; "
            "view it as an integer dtype of the same size"
        )
        raise Unsupported(msg, operation="register") from cause
    if writable and not array.flags.writeable:
        msg = (
            f"numpy gets only a read-only view of this {type(exporter).__name__} through DLPack: it is "
            "read-only, or it or numpy (before 2.2) is too old to say that it is not; try "
            "`torch.from_dlpack`, or pass `writable=False` to only send from it"
        )
        raise InvalidArgument(msg, operation="register")
    return _of_ndarray(array, array, writable=writable)


def _of_buffer(exporter: Any, *, writable: bool) -> Memory:
    try:
        view = memoryview(exporter)
    except TypeError as cause:
        msg = (
            f"cannot register a {type(exporter).__name__}: expected a numpy array, a torch tensor, "
            "or an object that speaks DLPack, the buffer protocol or `__cuda_array_interface__`"
        )
        raise InvalidArgument(msg, operation="register") from cause
    except (BufferError, ValueError) as cause:  # released, closed
        msg = f"cannot register this {type(exporter).__name__}, it has no bytes to give: {cause}"
        raise InvalidArgument(msg, operation="register") from cause
    if not view.c_contiguous:
        msg = f"cannot register a buffer of strides {view.strides}: it is not C-contiguous"
        raise InvalidArgument(msg, operation="register")
    if "O" in FIELD_NAMES.sub("", view.format):
        msg = f"cannot register a buffer of format {view.format!r}: it holds Python objects"
        raise InvalidArgument(msg, operation="register")
    if writable and view.readonly:
        _raise_read_only(type(exporter).__name__)
    if view.nbytes == 0:
        return Memory(0, 0, exporter)
    array = np.frombuffer(view, dtype=np.uint8)
    return Memory(int(array.__array_interface__["data"][0]), view.nbytes, array)


def _raise_read_only(kind: str) -> None:
    msg = (
        f"this {kind} is read-only, but peers are to write into it; pass `writable=False` to only send "
        "from it, or register a writable copy"
    )
    raise InvalidArgument(msg, operation="register")


def _dimensions(region: Region, shape: int | Sequence[int] | None, itemsize: int) -> tuple[int, ...]:
    if shape is None:
        return (region.nbytes // itemsize,)
    given = _lengths(shape)
    dimensions = _infer(given, region.nbytes // itemsize) if region.nbytes % itemsize == 0 else given
    nbytes = math.prod(dimensions) * itemsize
    if any(n < 0 for n in dimensions):
        msg = (
            f"shape {given} of {itemsize}-byte elements: expected lengths, and -1 at most once, where the "
            f"others divide the {region.nbytes} bytes of region {region.id}"
        )
    elif nbytes > region.nbytes:
        msg = (
            f"shape {given} of {itemsize}-byte elements needs {nbytes} bytes; "
            f"region {region.id} has {region.nbytes}"
        )
    else:
        return dimensions
    raise InvalidArgument(msg, operation="view", region=region.id, nbytes=region.nbytes)


def _lengths(shape: int | Sequence[int]) -> tuple[int, ...]:
    try:
        return (operator.index(cast("int", shape)),)  # also numpy's integers
    except TypeError:
        return tuple(operator.index(n) for n in cast("Sequence[int]", shape))


def _shaped(flat: Any, dimensions: tuple[int, ...], region: Region) -> Any:
    """An array or tensor of that many elements in that shape, which may have more dimensions than one can."""
    try:
        return flat.reshape(dimensions)
    except (OverflowError, RuntimeError, TypeError, ValueError) as cause:
        reason = str(cause).splitlines()[0]  # torch tells its stack behind it
        msg = f"shape {dimensions} of {flat.dtype}: {reason}"
        raise InvalidArgument(msg, operation="view", region=region.id, nbytes=region.nbytes) from cause


def _infer(shape: tuple[int, ...], num_elements: int) -> tuple[int, ...]:
    """The shape with the length that -1 stands for, if there is one."""
    known = math.prod(n for n in shape if n != -1)
    if shape.count(-1) != 1 or known <= 0 or num_elements % known:
        return shape
    return tuple(num_elements // known if n == -1 else n for n in shape)
