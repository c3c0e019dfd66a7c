"""The attention that diffusers' dispatcher is given, without diffusers: PyTorch's own in float64 is the measure.

tests/python/ecosystem/test_diffusers.py has the dispatcher and models.
"""

from __future__ import annotations

import builtins

import pytest
import torch
from flash_attn.integrations import diffusers as plus
from support import device

pytestmark = pytest.mark.device

BATCH, SEQLEN_Q, SEQLEN_K, NHEADS, HEADDIM = 2, 7, 9, 4, 16
TOLERANCE = 32 * torch.finfo(torch.float32).eps  # of the largest element


def masks() -> dict[str, torch.Tensor]:
    """-> what is given; PyTorch takes the same, with four dimensions."""
    generator = device.generator(2)
    some = torch.rand((BATCH, NHEADS, SEQLEN_Q, SEQLEN_K), generator=generator) < 0.6
    some[..., 0] = True  # a row that sees nothing is 0 here and NaN there
    j = torch.arange(SEQLEN_K)
    return {
        "first": j < torch.tensor([[5], [9]]),
        "last": j >= torch.tensor([[4], [0]]),
        "middle": (j >= torch.tensor([[2], [0]])) & (j < torch.tensor([[6], [4]])),
        "holes": some[:, 0, 0],
        "one": some[0, 0, 0],
        "matrix": some[0, 0],
        "matrices": some[:, 0],
        "full": some,
        "added": torch.randn(some.shape, generator=generator),
        "added-to-keys": torch.randn((BATCH, SEQLEN_K), generator=generator),
    }


def four_dimensions(mask):
    if mask.shape == (BATCH, SEQLEN_K):
        return mask[:, None, None]
    if mask.dim() == 1:
        return mask[None]
    return mask[:, None] if mask.dim() == 3 else mask


def tensors(nheads_k: int = NHEADS):
    shapes = (SEQLEN_Q, NHEADS), (SEQLEN_K, nheads_k), (SEQLEN_K, nheads_k)
    return [torch.randn(BATCH, s, h, HEADDIM, requires_grad=True) for s, h in shapes]


@pytest.mark.parametrize("kind", masks())
def test_every_mask(kind):
    q, k, v = tensors()
    mask = masks()[kind]
    out = plus.attention(q, k, v, mask, scale=0.3)
    exact = [x.detach().double().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    wide = four_dimensions(mask.double() if mask.is_floating_point() else mask)
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, wide, scale=0.3).transpose(1, 2)
    dout = torch.randn_like(out)
    truth = [x.transpose(1, 2) for x in torch.autograd.grad(expected, exact, dout.double())]
    for got, x in zip((out, *torch.autograd.grad(out, (q, k, v), dout)), (expected, *truth), strict=True):
        assert (got.double() - x).abs().max() <= TOLERANCE * x.abs().max()


@pytest.mark.parametrize("kind", ["first", "holes"])
def test_masks_of_keys_join_windows_and_lse(kind):
    q, k, v = (x.detach() for x in tensors(nheads_k=2))
    mask = masks()[kind]
    window = dict(window_size=(4, 1), is_causal=False)
    p = torch.arange(SEQLEN_Q)[:, None] + SEQLEN_K - SEQLEN_Q
    j = torch.arange(SEQLEN_K)
    seen = mask[:, None, None] & (j >= p - 4) & (j <= p + 1)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(2, 2)) * HEADDIM**-0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    rows = seen.expand(-1, NHEADS, -1, -1).any(-1)
    out, lse = plus.attention(q, k, v, mask, return_lse=True, **window)
    assert (lse - scores.logsumexp(-1))[rows].abs().max() <= 1e-6
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).nan_to_num(0), v.double().repeat_interleave(2, 2))
    assert (out - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert torch.equal(out, plus.attention(q, k, v, mask, **window))


def test_a_mask_that_does_not_fit():
    with pytest.raises(ValueError, match=r"attn_mask: expected what broadcasts to \(2, 4, 7, 9\), got \(3, 1, 7, 9\)"):
        plus.attention(*tensors(), torch.ones(3, 7, 9, dtype=torch.bool))


def test_enable_says_what_it_needs(monkeypatch):
    own = builtins.__import__

    def without(name, *arguments):
        if name.startswith("diffusers"):
            raise ImportError(name)
        return own(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="needs diffusers 0.35 or newer"):
        plus.enable()
    assert not plus._own
    plus.disable()
