"""FlashAttention-3's functions and operators inside PyTorch: torch.compile, opcheck, the counter of flops."""

from __future__ import annotations

import flash_attn_interface as fa3
import pytest
import torch
from test_kvcache import i32
from torch.utils.flop_counter import FlopCounterMode

ops = torch.ops.flash_attn_3
CU = i32([0, 5, 5, 12])
FP8 = torch.float8_e4m3fn


def fixed(*shapes, seed=2):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g) for s in shapes]


Q, K, V, QV = fixed((2, 9, 4, 16), (2, 11, 2, 16), (2, 11, 2, 24), (2, 9, 4, 24))
PACKED = fixed((12, 4, 16), (12, 2, 16), (12, 2, 24), (12, 4, 24))
CALLS = {
    "fixed": ([Q, K, V], lambda q, k, v: fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)),
    "hints, chunk": (
        [Q, K, V],
        lambda q, k, v: fa3.flash_attn_func(
            q, k, v, attention_chunk=4, num_splits=2, pack_gqa=True, sm_margin=1, return_attn_probs=True
        ),
    ),
    "qv": ([Q, K, V, QV], lambda q, k, v, x: fa3.flash_attn_func(q, k, v, qv=x, return_attn_probs=True)),
    "packed": (
        PACKED[:3],
        lambda q, k, v: fa3.flash_attn_varlen_func(q, k, v, CU, CU, 7, 7, None, i32([4, 0, 7]), return_attn_probs=True),
    ),
    "packed, qv": (
        PACKED,
        lambda q, k, v, x: fa3.flash_attn_varlen_func(q, k, v, CU, CU, 7, 7, qv=x, return_attn_probs=True),
    ),
    "qkv": (
        fixed((2, 9, 8, 16)),
        lambda x: fa3.flash_attn_qkvpacked_func(x, causal=True, num_heads_q=4, return_attn_probs=True),
    ),
    "private": ([Q, K, V], lambda q, k, v: fa3._flash_attn_forward(q, k, v, causal=True)[:2]),
    "combine": (
        fixed((3, 2, 9, 4, 8), (3, 2, 9, 4)),
        fa3.flash_attn_combine,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_compiles_in_one_graph(name):
    """Forward and backward, out and lse, equal to eager bit for bit; also without gradient."""
    inputs, call = CALLS[name]

    def run(f):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, lse = f(*leaves)
        finite = torch.where(torch.isinf(lse), 0, lse)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out.sum() + (finite * finite).sum(), leaves)]

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled), run(call), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for a, b in zip(compiled(*inputs), call(*inputs), strict=True):
            assert torch.equal(a, b)


def test_compiles_fp8():
    q, k, v = (x.to(FP8) for x in (Q, K, V))
    descales = {f"{n}_descale": torch.rand(2, 2) + 0.5 for n in "qkv"}

    def step(q, k, v):
        return fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True, **descales)

    torch.compiler.reset()
    for a, b in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v), step(q, k, v), strict=True):
        assert torch.equal(a, b)


def test_compiles_mla_without_a_copy_of_the_cache():
    """A decoding step over latent pages: the operator sees the cache's own memory."""
    pool, queries = fixed((6, 4, 1, 40), (2, 1, 4, 40))
    table, used = i32([[4, 0], [2, 1]]), i32([7, 3])

    def step(pool, queries):
        return fa3.flash_attn_with_kvcache(
            queries[..., 32:], pool[..., 32:], pool[..., :32], qv=queries[..., :32], cache_seqlens=used,
            page_table=table, causal=True, return_softmax_lse=True,
        )[:2]  # fmt: skip

    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    torch.compiler.reset()
    for a, b in zip(
        torch.compile(step, fullgraph=True, backend=backend)(pool, queries), step(pool, queries), strict=True
    ):
        assert torch.equal(a, b)
    assert "flash_attn_3._fwd" in graphs[0] and "cat" not in graphs[0]


@pytest.mark.parametrize("with_qv", [False, True])
def test_compiles_with_keys_that_join(with_qv):
    q, k, v, qv, *caches = fixed(
        (2, 1, 4, 16), (2, 1, 2, 16), (2, 1, 2, 24), (2, 1, 4, 24), (2, 9, 2, 16), (2, 9, 2, 24)
    )
    qv = qv if with_qv else None

    def step(q, k, v, k_cache, v_cache, used):
        return fa3.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, qv, cache_seqlens=used, causal=True, return_softmax_lse=True
        )[:2]

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    theirs, ours = ([x.clone() for x in caches] for _ in range(2))
    for used in (i32([0, 3]), i32([1, 4])):
        for a, b in zip(compiled(q, k, v, *theirs, used), step(q, k, v, *ours, used), strict=True):
            assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True)) and ours[0][0, 1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_forward(dtype):
    q, k, v, qv = (x.to(dtype) for x in (Q, K, V, QV))
    torch.library.opcheck(ops._fwd.default, (q, k, v), {"is_causal": True})
    torch.library.opcheck(ops._fwd.default, (q, k, v, None, None, qv))
    torch.library.opcheck(ops._fwd.default, (*(x.to(dtype) for x in PACKED[:3]),), {
        "cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 7, "max_seqlen_k": 7})  # fmt: skip
    low = tuple(x.to(FP8) for x in (Q, K, V))  # opcheck's other utilities multiply their arguments
    torch.library.opcheck(ops._fwd.default, low, test_utils="test_faketensor")


def test_opcheck_others():
    out, lse, *_ = ops.fwd(Q, K, V, is_causal=True)
    grads = [torch.zeros_like(x) for x in (Q, K, V)]
    torch.library.opcheck(ops.bwd.default, (torch.ones_like(out), Q, K, V, out, lse, *grads), {"is_causal": True})
    lengths = (None,) * 6
    torch.library.opcheck(ops._flash_attn_backward.default, (torch.ones_like(out), Q, K, V, out, lse, *lengths, *grads))
    torch.library.opcheck(ops._flash_attn_forward.default, (Q, K, V, None, None, QV))
    torch.library.opcheck(ops.fwd_combine.default, (torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 5, 4)))
    torch.library.opcheck(ops.get_scheduler_metadata.default, (2, 1, 8, 4, 2, 64, 64, torch.bfloat16, i32([1, 2])))


def test_operators_equal_the_functions():
    q, k, v = (x.clone().requires_grad_() for x in (Q, K, V))
    out, lse = fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    got = ops.fwd(Q, K, V, is_causal=True)
    assert torch.equal(got[0], out) and torch.equal(got[1], lse) and [x.numel() for x in got[2:]] == [0, 0]
    want = torch.autograd.grad(out.sum(), (q, k, v))
    grads = [torch.zeros_like(x) for x in (Q, K, V)]
    versions = [x._version for x in grads]
    ops.bwd(torch.ones_like(out), Q, K, V, got[0], got[1], *grads, is_causal=True)
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))
    assert all(x._version > n for x, n in zip(grads, versions, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ops._flash_attn_forward(Q, K, V, causal=True), got, strict=True))
    again = [torch.zeros_like(x) for x in (Q, K, V)]
    softmax_d = ops._flash_attn_backward(
        torch.ones_like(out), Q, K, V, got[0], got[1], dq=again[0], dk=again[1], dv=again[2], is_causal=True
    )
    assert softmax_d.shape == (2, 4, 128) and all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))
    cache = [torch.zeros(1, 4, 2, 8) for _ in "kv"]
    new = torch.ones(1, 1, 2, 8)
    ops.fwd(new, *cache, new, new, seqused_k=i32([2]))
    assert all(torch.equal(x[:, 2:3], new) and x.sum() == 16 and x._version > 0 for x in cache)


def test_what_cannot_be_traced_is_refused():
    def joins(q, k_cache, v_cache, k):
        return ops._fwd(q, k_cache, v_cache, k, k, seqused_k=i32([2]))[0]

    def into(q, out):
        return ops._fwd(q, q, q, out=out)[0]

    x, cache = torch.ones(1, 1, 2, 8), torch.zeros(1, 4, 2, 8)
    for function, arguments, words in ((joins, (x, cache, cache.clone(), x), "k_new"), (into, (x, x.clone()), "out")):
        torch.compiler.reset()
        with pytest.raises(Exception, match=f"flash_attn_3::fwd: {words}"):
            torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    q = x.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="flash_attn_3::fwd has no derivative"):
        ops.fwd(q, x, x)[0].sum().backward()


def test_flops():
    """2 for each product: of q and k, of p and v, and of qv and v."""

    def count(function, *arguments, **options):
        with FlopCounterMode(display=False) as counter:
            function(*arguments, **options)
        return counter.get_total_flops()

    pairs = 2 * 4 * 9 * 11
    assert count(fa3.flash_attn_func, Q, K, V) == 2 * pairs * (16 + 24)
    assert count(fa3.flash_attn_func, Q, K, V, qv=QV) == 2 * pairs * (16 + 24 + 24)
    assert count(ops.fwd, *PACKED[:3], cu_seqlens_q=CU, cu_seqlens_k=CU) == 2 * 4 * (25 + 49) * (16 + 24)
