"""The `triton` backend: our own Triton kernels on any device that Triton serves.

`TritonEngine` receives a checked Problem `p` and the caller's tensors `t`, makes arguments of them and launches. It
reads no tensor's contents, waits for nothing, and allocates by torch only: calls can be captured in a graph.
"""

from __future__ import annotations

import functools
import os

import torch
import triton

from flash_attn import _C
from flash_attn._engines.triton import backward, configs, forward, modified
from flash_attn._engines.triton.backward import run_backward
from flash_attn._engines.triton.device import device_of
from flash_attn._engines.triton.forward import Plan, run_forward
from flash_attn._engines.triton.launch import Again

_CUDA, _XPU = 2, 14  # DLDeviceType
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def forget() -> None:
    """All prepared launches: tiles have changed."""
    forward._calls.clear()
    backward._calls.clear()
    _C.forget_recordings()


class TritonEngine:
    name = "triton"

    def forward(self, p, t) -> None:
        with _on(t.q) as index:
            _run(run_forward if t.mods is None else modified.run_forward, p, t, index)

    def backward(self, p, t) -> None:
        with _on(t.q) as index:
            _run(run_backward if t.mods is None else modified.run_backward, p, t, index)

    def refuses(self, p) -> str:
        if _INTERPRETED and p.dtype == "bfloat16":
            return "q: Triton's interpreter has no right products of bfloat16"
        return "" if _INTERPRETED or p.device_type != _CUDA else _too_old(p.device_index)

    def plan(self, p) -> str:
        if _INTERPRETED:
            device = device_of("cpu", 0)
        else:
            kind = "xpu" if p.device_type == _XPU else "cuda"
            with _current(kind, p.device_index):
                device = device_of(kind, p.device_index)
        if p.is_backward:
            return configs.source(device.arch, triton.__version__)
        plan = Plan(p, device, triton.__version__)
        tile = plan.tile
        parts = f", keys in {plan.parts} parts" if plan.parts > 1 else ""
        packed = ", a group's heads in one tile" if plan.pack else ""
        return (
            f"tiles of {tile.rows} rows x {tile.keys} keys, {tile.warps} warps, {tile.stages} stages{packed}{parts}; "
            f"{configs.source(device.arch, triton.__version__)}"
        )


def _current(kind: str, index: int):
    """The block in which a device is current."""
    return getattr(torch, kind).device(index)


@functools.cache
def _too_old(index: int) -> str:
    """Before compute capability 8.0 Triton multiplies without tensor cores, and compiles for most of a minute."""
    capability = torch.cuda.get_device_capability(index)
    return (
        "" if capability >= (8, 0) else f"device: compute capability {capability[0]}.{capability[1]}, 8.0 is the oldest"
    )


def _run(function, p, t, index: int) -> None:
    device = device_of(t.q.device.type, index)
    while True:
        try:
            return function(p, t, device, index, triton.__version__)
        except Again:  # nothing is lost: what has been written is written again
            forget()


class _on:
    """Makes the device of a tensor current, if it is not: -> its index."""

    __slots__ = ("_guard", "_index", "_torch")

    def __init__(self, x: torch.Tensor):
        self._index = x.get_device()
        self._torch = torch.cuda if x.is_cuda else torch.xpu if x.is_xpu else None
        self._guard = None

    def __enter__(self) -> int:
        if self._index >= 0 and self._torch.current_device() != self._index:
            self._guard = self._torch.device(self._index)
            self._guard.__enter__()
        return self._index

    def __exit__(self, *error) -> None:
        if self._guard is not None:
            self._guard.__exit__(*error)
