"""Tensors that claim to lie on a device, for a machine that has none: DLPack capsules over the CPU's memory."""

from __future__ import annotations

import ctypes
from typing import ClassVar

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


def _capsule(address: int, name: bytes):
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(address, name, None)


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
        return _capsule(ctypes.addressof(self._managed), b"dltensor")


class _Managed(ctypes.Structure):
    """DLManagedTensorVersioned; of the tensor within, only the first fields are its own."""

    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", _DLTensor),
    ]  # fmt: skip


_SIZE_OF_TENSOR = _DLTensor.context.offset
_ALLOCATE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(_DLTensor), ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_void_p
)
_DELETE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_FROM_OBJECT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)
_STREAM = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))


class _Exchange(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", ctypes.c_void_p),
        ("allocate", _ALLOCATE), ("managed_from_object", ctypes.c_void_p), ("managed_to_object", ctypes.c_void_p),
        ("tensor_from_object", _FROM_OBJECT), ("current_work_stream", _STREAM),
    ]  # fmt: skip


class OfFramework(OnDevice):
    """The same, of a framework with a stream of its own (`stream`) and an allocator (`live`: what is out)."""

    stream = 4096
    live: ClassVar[dict[int, tuple]] = {}
    allocated: ClassVar[list[tuple[int, int]]] = []  # (address, bytes), since the list was cleared

    @staticmethod
    def _allocate(prototype, out, _context, _set_error):
        size = prototype[0].shape[0]
        memory = torch.empty(size + 16, dtype=torch.uint8)
        address = memory.data_ptr() + -memory.data_ptr() % 16
        tensor = _DLTensor(address, prototype[0].device_type, prototype[0].device_id, 1, 1, 8, 1)
        managed = _Managed(1, 1, None, ctypes.cast(_delete, ctypes.c_void_p), 0, tensor)
        OfFramework.live[ctypes.addressof(managed)] = managed, memory
        OfFramework.allocated.append((address, size))
        out[0] = ctypes.addressof(managed)
        return 0

    @staticmethod
    def _from_object(x, out):
        ctypes.memmove(out, ctypes.addressof(x._managed), _SIZE_OF_TENSOR)
        return 0

    @staticmethod
    def _current_stream(_type, _index, out):
        out[0] = OfFramework.stream
        return 0


_delete = _DELETE(lambda managed: OfFramework.live.pop(managed) and None)
_exchange = _Exchange(
    1, 3, None, _ALLOCATE(OfFramework._allocate), None, None, _FROM_OBJECT(OfFramework._from_object),
    _STREAM(OfFramework._current_stream),
)  # fmt: skip
_NAME = b"dlpack_exchange_api"  # which the capsule does not copy
OfFramework.__dlpack_c_exchange_api__ = _capsule(ctypes.addressof(_exchange), _NAME)
