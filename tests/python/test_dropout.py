"""Dropout: reproducible, unbiased, the same in backward as in forward, and on every backend."""

from __future__ import annotations

import pytest
import torch
from flash_attn import backend
from flash_attn import flash_attn_interface as interface
from support.device import BACKENDS, flash_attn_func, flash_attn_varlen_func, on_device

pytestmark = pytest.mark.device


@pytest.fixture(autouse=True, params=BACKENDS)
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
    forward = on_device(interface._flash_attn_forward)
    dropped, lse, _, rng_state = forward(q, k, torch.ones_like(v), 0.25, 0.25, False, -1, -1, 0.0, None, False)
    _, lse_of_all, *_ = forward(q, k, v, 0.0, 0.25, False, -1, -1, 0.0, None, False)
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


S_DMASK_CALLS = {
    "plain": {},
    "causal": {"causal": True},
    "window, softcap, slopes": {
        "window_size": (20, 5),
        "softcap": 3.0,
        "alibi_slopes": torch.linspace(0.1, 0.5, 4),
    },
    "sink": {"learnable_sink": torch.linspace(-1, 2, 4)},
}


@pytest.mark.parametrize("call", S_DMASK_CALLS)
@pytest.mark.parametrize("packed", [False, True])
def test_s_dmask_is_what_out_was_made_of(packed, call):
    """out = sum of kept P v / (1 - p), with P and what is kept read off S_dmask and lse."""
    options, dropout_p, lengths = S_DMASK_CALLS[call], 0.25, ([50, 0, 70], [60, 9, 51])
    if packed:
        q, k, v = (
            torch.randn(sum(n) + 2, h, 16) for n, h in zip((lengths[0], *lengths[1:] * 2), (4, 2, 2), strict=True)
        )
        cu = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in lengths]
        out, lse, S = flash_attn_varlen_func(
            q, k, v, *cu, 70, 60, dropout_p=dropout_p, return_attn_probs=True, **options
        )
        sequences = [(slice(*cu[0][b : b + 2].tolist()), slice(*cu[1][b : b + 2].tolist())) for b in range(3)]
        parts = [(out[i], lse[:, i], S[b], q[i], k[j], v[j]) for b, (i, j) in enumerate(sequences)]
        assert S.shape == (3, 4, 128, 128)
    else:
        q, k, v = (torch.randn(2, n, h, 16) for n, h in ((60, 4), (140, 2), (140, 2)))
        out, lse, S = flash_attn_func(q, k, v, dropout_p, return_attn_probs=True, **options)
        assert S.shape == (2, 4, 128, 256)
        parts = list(zip(out, lse, S, q, k, v, strict=True))
    dropped = kept = 0
    for out_, lse_, S_, q_, k_, v_ in parts:
        rows, keys = S_[:, : len(q_), : len(k_)], v_.repeat_interleave(2, 1).transpose(0, 1)
        assert (S_[:, len(q_) :] == 0).all() and (S_[:, :, len(k_) :] == 0).all()
        share = 1.0
        if "learnable_sink" in options:  # which takes its part of every row
            share = 1 - (options["learnable_sink"][:, None, None] - lse_[..., None]).exp()
        total = rows.abs().sum(-1, keepdim=True)
        p = rows / total.clamp_min(1e-30) * share
        want = (torch.where(p > 0, p, 0) @ keys / (1 - dropout_p)).transpose(0, 1)
        torch.testing.assert_close(out_, want, atol=2e-5, rtol=2e-5)
        if len(k_) and len(q_):
            assert ((rows.abs().amax(-1) == 1) | (total[..., 0] == 0)).all()
        dropped, kept = dropped + (rows < 0).sum().item(), kept + (rows > 0).sum().item()
    assert abs(dropped / (dropped + kept) - dropout_p) < 0.02


def test_s_dmask_in_sixteen_bits_and_with_a_gradient():
    q, k, v = (x.bfloat16().requires_grad_() for x in inputs())
    out, _, S = flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
    assert S.dtype == torch.bfloat16 and S.shape == (2, 4, 128, 128)
    out.sum().backward()
    assert v.grad.isfinite().all()


def test_results_are_the_callers_own():
    """S_dmask of a call without dropout too: a mode in which it was made, or what is done with it, is no later call's
    affair."""
    q = torch.randn(1, 4, 2, 16)
    with torch.inference_mode():
        flash_attn_func(q, q, q, return_attn_probs=True)[2].resize_(3)
    S_dmask = flash_attn_func(q.requires_grad_(), q, q, return_attn_probs=True)[2]
    assert S_dmask.shape == (0,) and not S_dmask.is_inference()
    (S_dmask * torch.empty(0, requires_grad=True)).sum().backward()
