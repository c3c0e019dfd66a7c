"""The mechanism behind --device: tensors go as they lie, and results, gradients and writes come back."""

from __future__ import annotations

import flash_attn
import pytest
import torch
from support import device

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "columns strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "a slice": lambda x: x[1:, 2:, :3],
    "expanded": lambda x: x[:1].expand(5, -1, -1),
    "empty": lambda x: x[:0],
    "one number": lambda x: x[0, 0, 0],
    "negated": lambda x: torch.view_as_complex(x[..., :2].contiguous()).conj().imag,
}


@pytest.fixture
def elsewhere(monkeypatch):
    """A device of another name, which every machine has."""
    monkeypatch.setattr(device, "DEVICE", "cpu:0")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moves_memory_as_it_lies(layout):
    x = LAYOUTS[layout](torch.randn(4, 6, 8))
    y = device.moved(x, "cpu:0")
    assert torch.equal(x, y) and (layout == "negated" or x.stride() == y.stride())
    assert not x.numel() or x.data_ptr() != y.data_ptr()


def test_gradients_come_back(elsewhere):
    q, k, v = (torch.randn(2, 9, 2, 16, requires_grad=True) for _ in range(3))
    dout = torch.randn(2, 9, 2, 16)
    calls = (device.flash_attn_func, flash_attn.flash_attn_func)
    assert calls[0] is not calls[1]
    there, here = (torch.autograd.grad(f(q, k, v, causal=True), (q, k, v), dout) for f in calls)
    assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))


def test_writes_come_back(elsewhere):
    new = [torch.randn(1, 2, 2, 16) for _ in "kv"]
    caches = [torch.zeros(1, 8, 2, 16) for _ in "kv"]
    device.flash_attn_with_kvcache(torch.randn(1, 2, 2, 16), *caches, *new, cache_seqlens=3)
    for cache, rows in zip(caches, new, strict=True):
        assert torch.equal(cache[:, 3:5], rows) and not cache[:, :3].any()


def test_the_oracle_stays_on_the_cpu(monkeypatch):
    monkeypatch.setattr(device, "DEVICE", "meta")  # where nothing can run
    q = torch.randn(1, 4, 2, 16)
    with flash_attn.use_backend("reference"):
        assert device.flash_attn_func(q, q, q).device.type == "cpu"


def test_without_the_option_functions_are_flash_attns_own():
    if device.DEVICE == "cpu":
        assert device.flash_attn_func is flash_attn.flash_attn_func
    with pytest.raises(AttributeError):
        device.flash_attention  # noqa: B018
