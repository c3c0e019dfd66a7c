"""Tensors that claim to lie on a device, for a machine that has none: DLPack capsules over the CPU's memory."""

from __future__ import annotations

import ctypes

import torch

CUDA, METAL, ROCM, XPU, HEXAGON = 2, 8, 10, 14, 16  # DLDeviceType
_CODES = {torch.float32: (2, 32), torch.float16: (2, 16), torch.bfloat16: (4, 16), torch.int32: (0, 32),
          torch.int64: (0, 64)}  # fmt: skip


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    ]  # fmt: skip


class OnDevice:
    """`x`, said to lie on a device. Whoever reads it as the device's own memory reads the CPU's: no test does."""

    def __init__(self, x: torch.Tensor, device_type: int = CUDA, index: int = 0):
        self.x, self.dtype = x, x.dtype
        numbers = ctypes.c_int64 * x.dim()
        self._shape, self._strides = numbers(*x.shape), numbers(*x.stride())
        code, bits = _CODES[x.dtype]
        pointers = (ctypes.cast(y, ctypes.POINTER(ctypes.c_int64)) for y in (self._shape, self._strides))
        self._managed = _DLTensor(x.data_ptr(), device_type, index, x.dim(), code, bits, 1, *pointers, 0, None, None)

    def __dlpack__(self):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self._managed), b"dltensor", None)
