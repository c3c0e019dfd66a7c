"""Dropout: reproducible, unbiased, the same in backward as in forward, and on every backend."""

from __future__ import annotations

import pytest
import torch
from flash_attn import backend, flash_attn_func, flash_attn_varlen_func
from flash_attn import flash_attn_interface as interface


@pytest.fixture(autouse=True, params=["cpu", "reference"])
def _on_each_backend(request):
    with backend(request.param):
        yield


def inputs():
    return [torch.randn(2, 60, h, 16) for h in (4, 2, 2)]


def test_manual_seed_repeats_the_mask():
    q, k, v = inputs()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(flash_attn_func(q, k, v, dropout_p=0.3))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[2], flash_attn_func(q, k, v, dropout_p=0.3))


def test_what_is_kept_is_scaled_and_the_lse_is_not_touched():
    q, k, v = inputs()
    dropped, lse, _, rng_state = interface._flash_attn_forward(
        q, k, torch.ones_like(v), 0.25, 0.25, False, -1, -1, 0.0, None, False
    )
    _, lse_of_all, *_ = interface._flash_attn_forward(q, k, v, 0.0, 0.25, False, -1, -1, 0.0, None, False)
    assert torch.equal(lse, lse_of_all) and rng_state.any()
    assert abs(dropped.mean() - 1) < 0.05  # rows sum to 1 on average, none exactly
    assert (dropped - 1).abs().min() > 0 and dropped.max() < 1 / 0.75 + 1e-6


@pytest.mark.parametrize("packed", [False, True])
def test_backward_drops_what_forward_dropped(packed):
    """out is linear in v: <dout, out> = <dv, v>, with the forward's mask only."""
    q, k, v = (x.requires_grad_() for x in inputs())
    if packed:
        q, k, v = (x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v))
        cu = torch.tensor([0, 50, 120], dtype=torch.int32)
        out = flash_attn_varlen_func(q, k, v, cu, cu, 70, 70, dropout_p=0.4)
    else:
        out = flash_attn_func(q, k, v, dropout_p=0.4)
    dout = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, dout)
    torch.testing.assert_close((dout * out).sum(), (dv * v).sum(), rtol=1e-4, atol=1e-4)


def test_a_seed_drops_the_same_on_every_backend():
    q, k, v = inputs()
    torch.manual_seed(5)
    out = flash_attn_func(q, k, v, dropout_p=0.3, causal=True)
    with backend("reference"):
        torch.manual_seed(5)
        torch.testing.assert_close(flash_attn_func(q, k, v, dropout_p=0.3, causal=True), out)


def test_everything_dropped_needs_p_of_one():
    q, k, v = inputs()
    try:
        assert not flash_attn_func(q, k, v, dropout_p=1.0).any()
    except ValueError as e:
        assert "dropout_p" in str(e)
