"""What the tests of flash_attn.cute share: its functions against the formula, and functions of scores."""

from __future__ import annotations

import torch
from flash_attn.cute.interface import flash_attn_func

from support.compare import assert_as_exact, cancelling_terms, dot_terms, largest
from support.device import generator
from support.formula import attention

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS_Q, LENGTHS_K = [11, 0, 19, 5], [7, 4, 30, 5]


def operands(shape, dtype, seed=0):
    batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, headdim_v = shape
    g = generator(seed)
    sizes = ((seqlen_q, nheads, headdim), (seqlen_k, nheads_k, headdim), (seqlen_k, nheads_k, headdim_v))
    return [torch.randn(batch, *size, generator=g).to(dtype) for size in sizes]


def gradients(function, tensors, extra):
    """-> out, lse, and the gradients of a fixed function of both."""
    leaves = [x.detach().clone().requires_grad_() for x in (*tensors, *extra.values())]
    out, lse = function(*leaves[: len(tensors)], **dict(zip(extra, leaves[len(tensors) :], strict=True)))
    g = generator(5)
    dout = torch.randn(out.shape, generator=g).to(tensors[0].dtype)
    dlse = torch.randn(lse.shape, generator=g)
    loss = (out * dout.to(out.dtype)).sum() + (torch.where(torch.isinf(lse), 0, lse) * dlse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)], dout


def check(ours, formula, tensors, extra=None):
    """`ours(q, k, v, **extra)` and `formula(dtype)(q, k, v, **extra)` -> out, lse; all else is the same."""
    extra, dtype = extra or {}, tensors[0].dtype
    got, dout = gradients(ours, tensors, extra)
    doubles = [x.double() for x in tensors], {n: x.double() for n, x in extra.items()}
    exact, _ = gradients(formula(torch.float64), *doubles)
    plain, _ = gradients(formula(dtype), tensors, extra)
    for of in (exact, plain):
        of[1] = torch.where(of[1] == torch.inf, -torch.inf, of[1])  # the formula's is FlashAttention-2's
    scores, terms = largest(exact[1]), cancelling_terms(*tensors, dout)
    of_name = {"dq": terms, "dk": terms, **{"d" + n: dot_terms(tensors[2], dout) for n in extra}}
    for name, a, b, c in zip(["out", "softmax_lse", "dq", "dk", "dv", *("d" + n for n in extra)], got, exact, plain,
                             strict=True):  # fmt: skip
        assert a.dtype == (torch.float32 if name == "softmax_lse" else dtype), name
        assert_as_exact(a, b, c, name, scores, of_name.get(name, 0))


BASE = (2, 37, 53, 4, 2, 40, 24)
MORE_QUERIES = (2, 53, 37, 4, 2, 40, 24)


def with_lse(function=flash_attn_func, **options):
    return lambda *a, **e: function(*a, **options, **e, return_lse=True)


def by_formula(**options):
    return lambda dtype: lambda *a, **e: attention(*a, dtype, **options, **e)


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(dtype):
    q, k, v = operands((1, sum(LENGTHS_Q), sum(LENGTHS_K), 4, 2, 16, 24), dtype)
    return [q[0], k[0], v[0]], cumulative(LENGTHS_Q), cumulative(LENGTHS_K)


def causal_mask(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx + 16


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
DOCUMENTS = torch.tensor([[0] * 20 + [1] * 33, [0] * 5 + [1] * 9 + [2] * 39])  # of 53 positions, two sequences
PREFIX = torch.tensor([10, 30])


def alibi(score, b, h, q_idx, kv_idx):
    return score - SLOPES[h] * (q_idx + 16 - kv_idx).abs()


MODS = {
    "causal": {"mask_mod": causal_mask},
    "nothing": {"mask_mod": lambda b, h, i, j: i < 0},
    "a head": {"mask_mod": lambda b, h, i, j: h == 1},
    "some heads": {"mask_mod": lambda b, h, i, j: (h != 1) & ((i + j) % 3 > 0)},
    "documents": {"mask_mod": lambda b, h, i, j: DOCUMENTS[b, i] == DOCUMENTS[b, j]},
    "prefix": {"mask_mod": lambda b, h, i, j: (j < PREFIX[b]) | (j <= i + 16)},
    "alibi": {"score_mod": alibi},
    "softcap": {"score_mod": lambda s, b, h, i, j: 2 * torch.tanh(s / 2)},
    "-inf": {"score_mod": lambda s, b, h, i, j: torch.where(j <= i + 3, s, -torch.inf)},
    "finite": {"score_mod": lambda s, b, h, i, j: torch.where((i < 5) | (j > 40) | (h == 1), -1e30, s)},
    "both": {"score_mod": alibi, "mask_mod": lambda b, h, i, j: (j - i).abs() < 20},
}
THE_SAME = {"causal": {"causal": True}, "softcap": {"softcap": 2.0}}
