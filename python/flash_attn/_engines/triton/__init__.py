"""The `triton` backend: our own Triton kernels on any device that Triton serves.

`TritonEngine` receives a checked Problem `p` and the caller's tensors `t`, makes arguments of them and launches. It
reads no tensor's contents, waits for nothing, and allocates by torch only: calls can be captured in a graph.
"""

from __future__ import annotations

import os

import torch
import triton

from flash_attn._engines.triton import backward, configs, forward
from flash_attn._engines.triton.backward import run_backward
from flash_attn._engines.triton.device import device_of
from flash_attn._engines.triton.forward import Plan, run_forward
from flash_attn._engines.triton.launch import Again

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def forget() -> None:
    """All prepared launches: tiles have changed."""
    forward._calls.clear()
    backward._calls.clear()


class TritonEngine:
    name = "triton"

    def forward(self, p, t) -> None:
        with _on(t.q) as index:
            _run(run_forward, p, t, index)

    def backward(self, p, t) -> None:
        with _on(t.q) as index:
            _run(run_backward, p, t, index)

    def refuses(self, p) -> str:
        if _INTERPRETED and p.dtype == "bfloat16":
            return "q: Triton's interpreter has no right products of bfloat16"
        return ""

    def plan(self, p) -> str:
        if _INTERPRETED:
            device = device_of("cpu", 0)
        elif torch.cuda.is_available():
            device = device_of("cuda", torch.cuda.current_device())
        else:
            return ""
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


def _run(function, p, t, index: int) -> None:
    device = device_of(t.q.device.type, index)
    while True:
        try:
            return function(p, t, device, index, triton.__version__)
        except Again:  # nothing is lost: what has been written is written again
            forget()


class _on:
    """Makes the device of a tensor current, if it is not: -> its index."""

    __slots__ = ("_guard", "_index")

    def __init__(self, x: torch.Tensor):
        self._index = x.get_device()
        self._guard = None

    def __enter__(self) -> int:
        if self._index >= 0 and torch.cuda.current_device() != self._index:
            self._guard = torch.cuda.device(self._index)
            self._guard.__enter__()
        return self._index

    def __exit__(self, *error) -> None:
        if self._guard is not None:
            self._guard.__exit__(*error)
