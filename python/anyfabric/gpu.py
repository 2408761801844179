"""GPUs, and GPU memory of other libraries.

A library shows its GPU arrays by `__cuda_array_interface__` (torch, CuPy, Numba, JAX) or by DLPack. Both say
where the bytes are; neither is asked to wait for a stream: `Engine.register` says who has to.
"""

from __future__ import annotations

import ctypes
import json
import math
from dataclasses import dataclass
from typing import Any

from anyfabric import _core
from anyfabric.errors import InvalidArgument, Unsupported

__all__ = ["CUDA_DEVICES", "DriverGpu", "GpuBytes", "bytes_of_dlpack", "bytes_of_interface", "driver_gpus"]

CUDA_DEVICES = {2, 13}
"""Of DLPack: kDLCUDA, and kDLCUDAManaged, which the driver then refuses by its name."""

_NO_SYNCHRONISATION = -1
"""Stream that DLPack's consumer passes in order to see to it itself."""


@dataclass(frozen=True, slots=True)
class DriverGpu:
    """One GPU, as its driver describes it.

    Attributes:
        device: `"cuda:0"`, as CUDA numbers it in this process.
        name: Name of the product.
        uuid: `"GPU-..."`, the same in every process.
        pci: PCI address.
        rdma: Whether the driver lets NICs reach its memory.
        dmabuf: Whether its memory can be exported as a dmabuf.
        writes: What makes a NIC's writes visible to later GPU work: `"ordered"` by the GPU itself,
            `"flushed"` by the driver before each count, or `"never"`.
    """

    device: str
    name: str
    uuid: str
    pci: str
    rdma: bool
    dmabuf: bool
    writes: str


def driver_gpus(library: str | None = None) -> tuple[DriverGpu, ...]:
    """Ask the driver for the GPUs of this process; initialises CUDA.

    Raises:
        Unsupported: There is no driver that can be used; the message says why.
    """
    return tuple(DriverGpu(**gpu) for gpu in json.loads(_core.gpus_json(library)))


@dataclass(frozen=True, slots=True)
class GpuBytes:
    """Where bytes lie on a GPU, and what must live for them to stay there."""

    address: int
    nbytes: int
    owner: object


def bytes_of_interface(exporter: Any, *, writable: bool) -> GpuBytes:
    """Find the bytes of what has `__cuda_array_interface__`.

    Raises:
        InvalidArgument: Not contiguous, masked, or read-only although `writable`.
    """
    kind = type(exporter).__name__
    try:
        interface: dict[str, Any] = exporter.__cuda_array_interface__
        shape = tuple(int(length) for length in interface["shape"])
        typestr, (address, read_only) = str(interface["typestr"]), interface["data"]
        itemsize, strides = int(typestr[2:]), interface.get("strides")
        steps = None if strides is None else [int(stride) // itemsize for stride in strides]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as cause:
        msg = f"the `__cuda_array_interface__` of this {kind} is not what it should be: {cause!r}"
        raise InvalidArgument(msg, operation="register") from cause
    if typestr[1] == "O" or interface.get("mask") is not None:
        msg = f"cannot register a {kind} of {typestr}: it is masked, or holds Python objects"
        raise InvalidArgument(msg, operation="register")
    _check_contiguous(kind, shape, steps)
    if writable and read_only:
        msg = (
            f"this {kind} is read-only, but peers are to write into it; pass "
            "`writable=False` to only send from it, or register a writable copy"
        )
        raise InvalidArgument(msg, operation="register")
    return GpuBytes(int(address), math.prod(shape) * itemsize, exporter)


def bytes_of_dlpack(exporter: Any) -> GpuBytes:
    """Find the bytes of what speaks DLPack alone.

    Raises:
        InvalidArgument: Not contiguous.
        Unsupported: It does not export them.
    """
    kind = type(exporter).__name__
    try:
        capsule = exporter.__dlpack__(stream=_NO_SYNCHRONISATION)
        pointer = _capsule_pointer(capsule, b"dltensor")
    except (BufferError, RuntimeError, TypeError, ValueError) as cause:
        msg = f"this {kind} does not export its memory through DLPack: {cause}"
        raise Unsupported(msg, operation="register") from cause
    tensor = _Tensor.from_address(pointer)
    shape = tuple(tensor.shape[idx] for idx in range(tensor.ndim))
    steps = [tensor.strides[idx] for idx in range(tensor.ndim)] if tensor.strides else None
    _check_contiguous(kind, shape, steps)
    nbytes = math.prod(shape) * -(-tensor.bits * tensor.lanes // 8)
    # Not consumed: it gives the memory back when it goes.
    return GpuBytes((tensor.data or 0) + tensor.byte_offset, nbytes, capsule)


class _Tensor(ctypes.Structure):
    """`DLTensor` of dlpack.h; a capsule that is called "dltensor" begins with one."""

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
    )


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _check_contiguous(kind: str, shape: tuple[int, ...], strides: list[int] | None) -> None:
    """Strides count elements; those of dimensions with one element or none mean nothing."""
    if strides is None or 0 in shape:
        return
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            msg = (
                f"cannot register a {kind} of shape {shape} and strides {tuple(strides)}: it is not "
                "C-contiguous; copy it into one that is"
            )
            raise InvalidArgument(msg, operation="register")
        expected *= length
