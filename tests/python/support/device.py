"""The device under test (--device) and the backend (--backend), and the public functions that run there.

Most tests make their tensors on the CPU, where the formula and the oracle run too. The functions of this module take
them to the device, memory layout and all, call flash_attn's there, and bring the results back; autograd follows both
ways. Without the options they are flash_attn's own. Tests of some folders (conftest.py) make their tensors on the
device, `default_device`, and compute their formulas there.
"""

from __future__ import annotations

import contextlib
import functools
import inspect

import flash_attn
import pytest
import torch
from flash_attn import _backend

DEVICE = "cpu"
BACKEND: str | None = None  # None: the automatic choice
BACKENDS: list[str | None] = ["cpu", "reference"]  # that a test runs on, one by one


def configure(device: str, backend: str | None) -> None:
    """Before tests are imported."""
    global DEVICE, BACKEND
    DEVICE, BACKEND = device, backend
    if backend is not None or device != "cpu":
        BACKENDS[:] = [backend]


def cpu_only(why: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(DEVICE != "cpu", reason=f"about the CPU: {why}")


def default_device(there: bool) -> contextlib.AbstractContextManager:
    """Tensors whose maker names no device are made on the device under test."""
    return torch.device(DEVICE) if there and DEVICE != "cpu" else contextlib.nullcontext()


def generator(seed: int) -> torch.Generator:
    """Of the device under test, for tensors that are made there."""
    return torch.Generator(DEVICE).manual_seed(seed)


class _Move(torch.autograd.Function):
    """A copy on the device of the memory that a tensor spans: strides, gaps and overlaps stay."""

    @staticmethod
    def forward(ctx, x, device):
        ctx.set_materialize_grads(False)
        span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        memory = x.as_strided((span,), (1,), x.storage_offset()).to(device, copy=True)
        return memory.as_strided(x.shape, x.stride())

    @staticmethod
    def backward(ctx, g):
        return None if g is None else g.cpu(), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.to(DEVICE)


def moved(x, device):
    if not isinstance(x, torch.Tensor):
        return x
    return _Move.apply(x.resolve_neg().resolve_conj(), device)


def _returned(x):
    if isinstance(x, (tuple, list)):
        return type(x)(_returned(y) for y in x)
    return x.cpu() if isinstance(x, torch.Tensor) else x


def _stays() -> bool:
    """The switch names a backend of the CPU: the oracle, for the truth."""
    named, kind = _backend._chosen.get(), torch.device(DEVICE).type
    return named is not None and not any(b.name == named and kind in b.devices for b in flash_attn.backends())


def on_device(function, writes: tuple[str, ...] = ()):
    """`function`, run on the device under test. `writes`: parameters that it writes to."""
    if DEVICE == "cpu":
        return function

    @functools.wraps(function)
    def call(*args, **kwargs):
        if _stays():
            return function(*args, **kwargs)
        names = list(inspect.signature(function).parameters)[: len(args)]
        given = dict(zip(names, args, strict=True)) | kwargs
        there = {name: moved(x, DEVICE) for name, x in given.items()}
        results = _returned(function(*(there[n] for n in names), **{n: there[n] for n in kwargs}))
        with torch.no_grad():
            for name in [n for n in writes if n in given]:
                given[name].copy_(there[name])
        return results

    return call


def __getattr__(name: str):
    """flash_attn's public functions, once the options are known."""
    if not name.startswith("flash_attn_"):
        raise AttributeError(name)
    return on_device(getattr(flash_attn, name), ("k_cache", "v_cache") if name.endswith("kvcache") else ())
