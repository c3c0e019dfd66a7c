"""What the package raises. The original raises RuntimeError for everything: all of these are caught as such, too."""

from __future__ import annotations

from flash_attn._C import DeviceFailure, InternalError, InvalidArgument, InvalidType, NotServed, OutOfMemory

__all__ = ["DeviceFailure", "InternalError", "InvalidArgument", "InvalidType", "NotServed", "OutOfMemory"]
