"""flash_attn_combine: attention of parts of the keys, put together, is attention of them all."""

from __future__ import annotations

import math

import flash_attn_interface as fa3
import pytest
import torch
from support import fa3 as formula
from support.compare import error
from support.device import on_device

pytestmark = pytest.mark.device
combine = on_device(fa3.flash_attn_combine, ("out",))


def parts(splits=3):
    """-> out_partial, lse_partial, and out and lse (heads last) of all keys; the first rows see none."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, n, 4, 16, generator=g, dtype=torch.float64) for n in (9, 7, 7))
    hidden = torch.zeros(1, 1, 9, 7, dtype=torch.float64)
    hidden[:, :, :2] = -torch.inf
    hidden[:, :, 5, :4] = -torch.inf
    outs, lses = [], []
    for s in torch.arange(7).tensor_split(splits):
        out, lse = formula.attention(q, k[:, s], v[:, s], torch.float64, attn_bias=hidden[..., s])
        outs.append(out)
        lses.append(lse.transpose(1, 2))
    want, want_lse = formula.attention(q, k, v, torch.float64, attn_bias=hidden)
    return torch.stack(outs), torch.stack(lses), want, want_lse.transpose(1, 2)


@pytest.mark.parametrize("splits", [1, 3, 7])
@pytest.mark.parametrize("packed", [False, True])
def test_is_attention_of_all_keys(packed, splits):
    out_partial, lse_partial, want, want_lse = parts(splits)
    if packed:
        out_partial, lse_partial, want, want_lse = (
            out_partial.flatten(1, 2), lse_partial.flatten(1, 2), want.flatten(0, 1), want_lse.flatten(0, 1)
        )  # fmt: skip
    out, lse = combine(out_partial.float(), lse_partial.float())
    assert out.dtype == lse.dtype == torch.float32 and lse.shape == out.shape[:-1]
    assert error(out, want) <= 2e-6 and error(lse, want_lse) <= 2e-6


def test_parts_without_keys_are_not_looked_at():
    """Their lse is -inf, or +inf as FlashAttention-2 and empty calls have it; their out may be anything."""
    out_partial, lse_partial, want, want_lse = parts()
    out_partial = torch.where(torch.isinf(lse_partial)[..., None], torch.nan, out_partial).float()
    lse_partial = lse_partial.float()
    for lse_of_nothing in (-torch.inf, torch.inf):
        out, lse = combine(out_partial, torch.where(torch.isinf(lse_partial), lse_of_nothing, lse_partial))
        assert error(out, want) <= 2e-6 and error(lse, want_lse) <= 2e-6
        assert (out[:, :2] == 0).all() and (lse[:, :2] == -torch.inf).all()


def test_memory_and_dtype_of_the_result():
    out_partial, lse_partial, want, _ = parts()
    partials = out_partial.float(), lse_partial.float()
    out, _ = combine(*partials, out_dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16 and error(out, want) <= 2**-8 * float(want.abs().max())
    memory = torch.full(want.shape, 7.0, dtype=torch.float16)
    got, _ = fa3.flash_attn_combine(*partials, out=memory)
    assert got is memory and error(memory, want) <= 2**-11 * float(want.abs().max())
    here, _ = fa3.flash_attn_combine(*partials, out_dtype=torch.bfloat16)
    assert torch.equal(torch.ops.flash_attn_3.fwd_combine(*partials, None, torch.bfloat16)[0], here)
    large = torch.tensor([[[[[300.0]]]], [[[[1.0]]]]]), torch.tensor([[[[900.0]]], [[[898.0]]]])
    out, lse = combine(*large)  # no overflow of exp
    small = math.exp(-2)
    assert lse.item() == pytest.approx(900 + math.log1p(small)) and out.item() == pytest.approx(1 + 299 / (1 + small))


def test_gradients():
    out_partial, lse_partial, *_ = parts()
    leaves = [
        x.clone().requires_grad_()
        for x in (out_partial[:, :, 2:], torch.nan_to_num(lse_partial[:, :, 2:], neginf=-3.0))
    ]
    assert torch.autograd.gradcheck(lambda *x: fa3.flash_attn_combine(*x)[0], leaves)
    with_nothing = [x.clone().requires_grad_() for x in (out_partial, lse_partial)]
    out, lse = fa3.flash_attn_combine(*with_nothing)
    grads = torch.autograd.grad(out.sum() + lse[:, 2:].sum(), with_nothing)
    assert all(g.isfinite().all() for g in grads)


BAD = {
    "dtype": (
        (torch.zeros(2, 1, 3, 4, 8).half(), torch.zeros(2, 1, 3, 4)),
        {},
        TypeError,
        "out_partial: expected torch",
    ),
    "rank": ((torch.zeros(2, 3, 4), torch.zeros(2, 3)), {}, ValueError, "out_partial: expected shape"),
    "lse": (
        (torch.zeros(2, 1, 3, 4, 8), torch.zeros(2, 1, 4, 3)),
        {},
        ValueError,
        r"lse_partial: expected shape \(2, 1",
    ),
    "no part": ((torch.zeros(0, 1, 3, 4, 8), torch.zeros(0, 1, 3, 4)), {}, ValueError, "at least one part"),
    "out": (
        (torch.zeros(2, 1, 3, 4, 8), torch.zeros(2, 1, 3, 4)),
        {"out": torch.zeros(1, 3, 4, 9)},
        ValueError,
        r"out: expected shape \(1, 3, 4, 8\)",
    ),
    "two dtypes": (
        (torch.zeros(2, 1, 3, 4, 8), torch.zeros(2, 1, 3, 4)),
        {"out": torch.zeros(1, 3, 4, 8), "out_dtype": torch.float16},
        TypeError,
        "out_dtype: expected the dtype of out",
    ),
    "list": (([1.0], torch.zeros(2)), {}, TypeError, "out_partial: expected a torch.Tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    arguments, options, kind, words = BAD[name]
    with pytest.raises(kind, match=words):
        fa3.flash_attn_combine(*arguments, **options)
