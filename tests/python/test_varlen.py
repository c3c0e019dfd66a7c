"""Forward and backward of the varlen functions against the formula, one sequence at a time."""

from __future__ import annotations

import pytest
import torch
from flash_attn import backend
from support.compare import assert_as_exact, cancelling_terms, largest
from support.device import (
    BACKENDS,
    cpu_only,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from support.formula import attention_varlen
from test_attention import DTYPES, gradient_of_out, results

pytestmark = pytest.mark.device

# lengths of the queries, of the keys, rows after the last sequence
LENGTHS = {
    "equal": ([17, 17, 17], [17, 17, 17], 0),
    "ragged": ([1, 40, 13, 64], [70, 3, 13, 29], 0),
    "empty sequences": ([0, 5, 0, 7, 3], [4, 0, 0, 9, 3], 0),
    "one query each": ([1, 1, 1, 1], [9, 1, 33, 0], 0),
    "rows of no sequence": ([6, 11], [12, 5], 4),
    "one sequence": ([50], [90], 0),
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (5, 3)},
    "softcap, alibi, causal": {"softcap": 4.0, "alibi": True, "causal": True},
}


def starts(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def varlen_inputs(lengths, dtype, nheads=4, nheads_k=2, headdim=24):
    of_q, of_k, tail = lengths
    g = torch.Generator().manual_seed(sum(of_q) * 1000 + sum(of_k))
    q = torch.randn(sum(of_q) + tail, nheads, headdim, generator=g).to(dtype)
    k = torch.randn(sum(of_k) + tail, nheads_k, headdim, generator=g).to(dtype)
    v = torch.randn(sum(of_k) + tail, nheads_k, headdim, generator=g).to(dtype)
    return [q, k, v], (starts(of_q), starts(of_k)), (max(of_q), max(of_k))


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_against_the_formula(lengths, options, dtype, engine):
    tensors, cu, longest = varlen_inputs(LENGTHS[lengths], dtype)
    options = dict(OPTIONS[options])
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.linspace(0.1, 1.0, 4 * (cu[0].numel() - 1)).reshape(-1, 4)

    def ours(q, k, v):
        out, lse, S_dmask = flash_attn_varlen_func(q, k, v, *cu, *longest, return_attn_probs=True, **options)
        assert S_dmask.shape == (0,)
        return out, lse

    def formula(dtype):
        return lambda q, k, v: attention_varlen(q, k, v, *cu, dtype, **options)

    with backend(engine):
        got = results(ours, tensors, {}, with_lse_gradient=True)
    exact = results(formula(torch.float64), [x.double() for x in tensors], {}, with_lse_gradient=True)
    plain = results(formula(dtype), tensors, {}, with_lse_gradient=True)
    terms = cancelling_terms(*tensors, gradient_of_out(exact[0]))
    for name, a, b, c in zip(["out", "softmax_lse", "dq", "dk", "dv"], got, exact, plain, strict=True):
        assert_as_exact(a, b, c, name, largest(exact[1]), terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_lengths_are_the_fixed_length_function(dtype):
    q, k, v = torch.randn(3, 2, 33, 4, 16).to(dtype)
    cu = starts([33, 33])
    fixed, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    packed, packed_lse, _ = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), cu, cu, 33, 33, causal=True, return_attn_probs=True
    )
    assert torch.equal(fixed.flatten(0, 1), packed)
    assert torch.equal(lse.transpose(0, 1).flatten(1), packed_lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_functions_equal_the_separate_one(dtype):
    cu = starts([9, 0, 30, 1])
    qkv = torch.randn(40, 3, 4, 24).to(dtype).requires_grad_()
    q, k, v = (x.detach().clone().requires_grad_() for x in qkv.unbind(1))
    kv = torch.stack([k.detach(), v.detach()], 1).requires_grad_()
    q2 = q.detach().clone().requires_grad_()
    dout = torch.randn(40, 4, 24).to(dtype)

    out = flash_attn_varlen_func(q, k, v, cu, cu, 30, 30, causal=True)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    out_qkv = flash_attn_varlen_qkvpacked_func(qkv, cu, 30, causal=True)
    (dqkv,) = torch.autograd.grad(out_qkv, qkv, dout)
    out_kv = flash_attn_varlen_kvpacked_func(q2, kv, cu, cu, 30, 30, causal=True)
    dq2, dkv = torch.autograd.grad(out_kv, (q2, kv), dout)

    assert torch.equal(out, out_qkv) and torch.equal(out, out_kv)
    assert torch.equal(torch.stack([dq, dk, dv], 1), dqkv)
    assert torch.equal(dq, dq2) and torch.equal(torch.stack([dk, dv], 1), dkv)
    with torch.no_grad():
        assert torch.equal(out, flash_attn_varlen_qkvpacked_func(qkv, cu, 30, causal=True))
        assert torch.equal(out, flash_attn_varlen_kvpacked_func(q2, kv, cu, cu, 30, 30, causal=True))


def test_no_sequences_at_all():
    q, cu = torch.randn(0, 4, 16), torch.zeros(1, dtype=torch.int32)
    out, lse, _ = flash_attn_varlen_func(q, q, q, cu, cu, 0, 0, return_attn_probs=True)
    assert out.shape == (0, 4, 16) and lse.shape == (4, 0)


@cpu_only("the oracle")
def test_pages_on_the_oracle_equal_a_run_of_keys():
    """block_table: page t // page_size of each sequence, in any order."""
    page_size, of_q, of_k = 4, [3, 5], [10, 7]
    table = torch.tensor([[3, 0, 5], [1, 4, 2]], dtype=torch.int32)
    pages = torch.randn(2, 6, page_size, 2, 16)
    runs = [[pages[i, table[b].long()].flatten(0, 1)[:n] for b, n in enumerate(of_k)] for i in range(2)]
    q = torch.randn(sum(of_q), 4, 16)
    call = (starts(of_q), starts(of_k), max(of_q), max(of_k))
    with backend("reference"):
        paged = flash_attn_varlen_func(q, *pages, *call, causal=True, block_table=table)
        assert torch.equal(paged, flash_attn_varlen_func(q, *(torch.cat(r) for r in runs), *call, causal=True))
    out = flash_attn_varlen_func(q.requires_grad_(), *pages, *call, block_table=table)
    assert torch.equal(out, flash_attn_varlen_func(q.detach(), *pages, *call, block_table=table))
    with pytest.raises(NotImplementedError, match="block_table"):
        out.sum().backward()
