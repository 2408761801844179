"""GPU memory as other libraries show it, for the tests with a GPU and those with a fake one."""

from __future__ import annotations


class Array:
    """An array of `__cuda_array_interface__`; by default of bytes."""

    def __init__(self, address, shape=(4096,), typestr="|u1", *, read_only=False, **rest):
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (address, read_only),
            "version": 3,
            **rest,
        }
