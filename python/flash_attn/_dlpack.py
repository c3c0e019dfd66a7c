"""DLPack capsules of NumPy arrays that NumPy itself does not export: bfloat16 (of ml_dtypes), and read-only ones.

The layout is that of python/bindings/dlpack.hpp. A capsule owns nothing: the object that gave it does.
"""

from __future__ import annotations

import ctypes


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),  # in elements
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),  # from here on DLManagedTensor
        ("deleter", ctypes.c_void_p),  # nullptr: there is nothing to free
    )


CODES = {
    "float16": (2, 16),
    "float32": (2, 32),
    "float64": (2, 64),
    "bfloat16": (4, 16),
    "int32": (0, 32),
    "int64": (0, 64),
}
_known: dict = {}  # dtype: (code, bits), or None; names of dtypes are slow to print


def _code(dtype):
    try:
        return _known[dtype]
    except KeyError:
        return _known.setdefault(dtype, CODES.get(str(dtype)))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_CPU = (1, 0)


class Exported:
    """Memory of the CPU with a shape and strides, as a producer of DLPack. It must outlive its capsules' use."""

    def __init__(self, data: int, dtype, shape: tuple, strides: tuple, owner=None):
        """`dtype`: prints as its name; `strides` in elements; `owner`: kept alive."""
        self.dtype = dtype
        self._owner = owner
        code, bits = _code(dtype)
        ndim = len(shape)
        self._numbers = numbers = (ctypes.c_int64 * (2 * ndim))(*shape, *strides)
        at = ctypes.addressof(numbers)
        self._tensor = _Tensor(data, *_CPU, ndim, code, bits, 1, at, at + 8 * ndim)

    def __dlpack__(self, **_):
        return _new_capsule(ctypes.addressof(self._tensor), b"dltensor", None)

    def __dlpack_device__(self):
        return _CPU


def exportable(x):
    """A NumPy array, or what exports its memory where NumPy would refuse to."""
    code = _code(x.dtype)
    if code is None or (code[0] != 4 and x.flags.writeable):
        return x
    size = x.itemsize
    strides = tuple([s // size for s in x.strides])
    if any(s % size for s in x.strides):  # a field of records: refused, as NumPy refuses to export it
        return x
    return Exported(x.__array_interface__["data"][0], x.dtype, x.shape, strides, x)


def stand_in(dtype, shape: tuple, data: int = 0) -> Exported:
    """Shape and dtype without memory, for checks that look at these alone."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.insert(0, step)
        step *= n
    return Exported(data, dtype, shape, tuple(strides))
