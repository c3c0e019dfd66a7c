"""What a launch needs to know of a device, read once."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton


class Device(NamedTuple):
    arch: str  # "cuda-90", "hip-gfx942", "interpreted"
    shared: int  # bytes of shared memory that one program may have
    processors: int
    cache: int  # bytes of L2


@functools.cache
def device_of(kind: str, index: int) -> Device:
    if kind == "cpu":
        return Device("interpreted", 99 * 1024, 4, 1 << 20)
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    found = driver.utils.get_device_properties(index)
    cache = 0
    if kind == "cuda":
        cache = getattr(torch.cuda.get_device_properties(index), "L2_cache_size", 0)
    arch = f"{target.backend}-{target.arch}"
    return Device(arch, found["max_shared_mem"], found.get("multiprocessor_count", 64), cache or (4 << 20))
