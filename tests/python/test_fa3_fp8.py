"""fp8 inputs: within the stated bound of exact attention of the dequantised inputs."""

from __future__ import annotations

import math

import flash_attn_interface as fa3
import pytest
import torch
from support import fa3 as formula
from support.compare import error
from support.device import on_device
from test_kvcache import i32

pytestmark = pytest.mark.device
FP8, U = torch.float8_e4m3fn, 2.0**-8
BATCH, NHEADS, NHEADS_K, HEADDIM = 2, 4, 2, 32
SHAPES = {"q": NHEADS, "k": NHEADS_K, "v": NHEADS_K}
KINDS = ["none", "powers of two", "any"]


def quantised(kind, seqlen_q=19, seqlen_k=23, seed=0):
    """-> q, k, v in fp8, descales by name, and the inputs dequantised in float64."""
    g = torch.Generator().manual_seed(seed)
    low, descales, exact = [], {}, []
    for name, heads in SHAPES.items():
        x = torch.randn(BATCH, seqlen_q if name == "q" else seqlen_k, heads, HEADDIM, generator=g) * 2
        low.append(x.to(FP8))
        factor = torch.ones(BATCH, NHEADS_K)
        if kind != "none":
            factor = torch.rand(BATCH, NHEADS_K, generator=g) + 0.25
            if kind == "powers of two":
                factor = 2.0 ** torch.randint(-2, 2, (BATCH, NHEADS_K), generator=g)
            descales[f"{name}_descale"] = factor
        wide = factor.double().repeat_interleave(heads // NHEADS_K, 1)[:, None, :, None]
        exact.append(low[-1].double() * wide)
    return low, descales, exact


def bound(q, k, v, kind, scale=HEADDIM**-0.5):
    """Of out and of lse, as fp8.py states it; and a rounding of lse to fp32."""
    largest = float(v.abs().max())
    s = scale * float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    shift = s * U if kind == "any" else 0.0
    return (math.exp(2 * shift) - 1) * largest + 3 * U * largest, shift + 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 3.0}, {"attention_chunk": 8}])
def test_fixed(options, kind):
    low, descales, exact = quantised(kind)
    out, lse = on_device(fa3.flash_attn_func)(*low, return_attn_probs=True, **descales, **options)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    want, want_lse = formula.attention(*exact, torch.float64, **options)
    of_out, of_lse = bound(*exact, kind)
    assert error(out, want) <= of_out and error(lse, want_lse) <= of_lse
    # far closer than inputs whose descales were left out
    if kind == "any":
        without, _ = formula.attention(*(x.double() for x in low), torch.float64, **options)
        assert error(out, want) < 0.05 * error(without, want)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind):
    (q, k, v), descales, exact = quantised(kind)
    lengths_q, lengths_k = (19, 5), (11, 23)
    q, k, v = (
        torch.cat([x[b, : n[b]] for b in range(BATCH)]) for x, n in ((q, lengths_q), (k, lengths_k), (v, lengths_k))
    )
    cu_q, cu_k = i32([0, 19, 24]), i32([0, 11, 34])
    out, lse = on_device(fa3.flash_attn_varlen_func)(
        q, k, v, cu_q, cu_k, 19, 23, causal=True, return_attn_probs=True, **descales
    )
    of_out, of_lse = bound(*exact, kind)
    for b in range(BATCH):
        parts = [x[b : b + 1, :n] for x, n in zip(exact, (lengths_q[b], lengths_k[b], lengths_k[b]), strict=True)]
        want, want_lse = formula.attention(*parts, torch.float64, causal=True)
        rows = slice(int(cu_q[b]), int(cu_q[b + 1]))
        assert error(out[None, rows], want) <= of_out and error(lse[None, :, rows], want_lse) <= of_lse


def test_qkvpacked():
    g = torch.Generator().manual_seed(2)
    qkv = torch.randn(1, 9, 3, 2, 16, generator=g).to(FP8)
    out = fa3.flash_attn_qkvpacked_func(qkv, causal=True)
    want, _ = formula.attention(*qkv.double().unbind(2), torch.float64, causal=True)
    assert error(out, want) <= bound(*qkv.double().unbind(2), "none", 0.25)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pages", [0, 8, 200])
@pytest.mark.parametrize("seqlen_new", [0, 2])
def test_cache(seqlen_new, pages, kind):
    """In one piece; in few pages of 4, of which all are converted; and in many, of which those in the table are."""
    (q, k, v), descales, exact = quantised(kind, 3, 16)
    new_k, new_v = (x[:, 12 : 12 + seqlen_new] for x in quantised(kind, 3, 16, seed=5)[0][1:])
    used = i32([12, 7])
    caches, table, where = [k.clone(), v.clone()], None, [(b, slice(None)) for b in range(BATCH)]
    if pages:
        table = torch.randperm(pages)[:8].view(2, 4).to(torch.int32)
        where = [table[b].long() for b in range(BATCH)]
        caches = [torch.zeros(pages, 4, NHEADS_K, HEADDIM).to(FP8) for _ in "kv"]
        for cache, x in zip(caches, (k, v), strict=True):
            for b in range(BATCH):
                cache.view(torch.uint8)[where[b]] = x[b].view(torch.uint8).view(4, 4, NHEADS_K, HEADDIM)
    elsewhere = [x.clone() for x in caches]
    new = (new_k, new_v) if seqlen_new else ()
    run = on_device(fa3.flash_attn_with_kvcache, ("k_cache", "v_cache"))
    out, lse, *_ = run(
        q, *caches, *new, cache_seqlens=used, page_table=table, causal=True, return_softmax_lse=True, **descales
    )
    assert out.dtype == torch.bfloat16 and all(x.dtype == FP8 for x in caches)
    of_out, of_lse = bound(*exact, kind)
    for b, n in enumerate((used + seqlen_new).tolist()):
        keys = []
        for cache, x, joined, name in zip(caches, (k, v), (new_k, new_v), "kv", strict=True):
            rows = cache.view(torch.uint8)[where[b]].reshape(16, NHEADS_K, HEADDIM).view(FP8)
            want = x[b].clone().view(torch.uint8)
            want[n - seqlen_new : n] = joined[b].view(torch.uint8)
            assert torch.equal(rows.view(torch.uint8), want), "the cache"
            factor = descales.get(f"{name}_descale", torch.ones(BATCH, NHEADS_K))[b]
            keys.append(rows[None, :n].double() * factor.double()[:, None])
        want, want_lse = formula.attention(exact[0][b : b + 1], *keys, torch.float64, causal=True)
        assert error(out[b : b + 1], want) <= of_out and error(lse[b : b + 1], want_lse) <= of_lse
    if not seqlen_new:
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(caches, elsewhere, strict=True)
        )


def test_tables_are_checked_before_pages_are_looked_up():
    q, cache = torch.zeros(1, 1, 2, 16).to(FP8), torch.zeros(50, 4, 2, 16).to(FP8)
    beyond = i32([[3, 50]])
    fa3.flash_attn_with_kvcache(q, cache, cache.clone(), cache_seqlens=4, page_table=beyond)  # is not in use
    with pytest.raises(ValueError, match="block_table|page_table"):
        fa3.flash_attn_with_kvcache(q, cache, cache.clone(), cache_seqlens=5, page_table=beyond)


X = torch.zeros(2, 5, 2, 16).to(FP8)
BAD = {
    "k of another dtype": ({"k": X.bfloat16()}, TypeError, "k: expected the dtype of q, torch.float8_e4m3fn"),
    "q of another dtype": ({"q": X.bfloat16()}, TypeError, "k: expected the dtype of q, torch.bfloat16"),
    "qv": ({"qv": X}, NotImplementedError, "qv: not with inputs of torch.float8_e4m3fn"),
    "descale of a head": ({"k_descale": torch.ones(2)}, ValueError, r"k_descale: expected shape \(batch, nheads_k\)"),
    "descale of another dtype": ({"v_descale": torch.ones(2, 2).half()}, TypeError, "v_descale: expected a tensor of"),
    "descale a number": ({"q_descale": 2.0}, TypeError, "q_descale: expected a tensor of torch.float32, got float"),
    "gradient": ({"q": X.clone().requires_grad_()}, NotImplementedError, "gradients .* are not served"),
    "e5m2": ({n: X.to(torch.float8_e5m2) for n in "qkv"}, TypeError, "q"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, error, words = BAD[name]
    with pytest.raises(error, match=words):
        fa3.flash_attn_func(**({"q": X, "k": X, "v": X} | options))


def test_rotation_is_refused():
    table = torch.zeros(9, 4)
    with pytest.raises(NotImplementedError, match="rotate q and k before they are quantised"):
        fa3.flash_attn_with_kvcache(X, X, X, X, X, None, table, table, cache_seqlens=0)
