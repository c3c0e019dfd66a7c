"""FlashAttention-3's flash_attn_with_kvcache against caches written, and rotations done, by hand."""

from __future__ import annotations

import flash_attn_interface as fa3
import pytest
import torch
from flash_attn import flash_attn_with_kvcache as flash_attention_2
from support import fa3 as formula
from support.compare import error
from support.device import cpu_only, on_device
from test_attention import DTYPES
from test_kvcache import BATCH, HEADDIM, LAYOUTS, NHEADS, NHEADS_K, Cache, i32, rotate, tables

pytestmark = pytest.mark.device
with_cache = on_device(fa3.flash_attn_with_kvcache, ("k_cache", "v_cache"))
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "chunk": {"attention_chunk": 8, "causal": True},
    "window, softcap, sink": {
        "window_size": (9, 2),
        "softcap": 4.0,
        "learnable_sink": torch.linspace(-1, 1, NHEADS),
        "num_splits": 3,
        "pack_gqa": False,
        "sm_margin": 2,
    },
}
HINTS = ("num_splits", "pack_gqa", "sm_margin")


def arguments(cache):
    given = dict(cache.arguments)
    if "block_table" in given:
        given["page_table"] = given.pop("block_table")
    return given


def check_rows(out, lse, q, cache, want, lengths, dtype, options, qv=None):
    """out and lse of each sequence, against the formula on the rows of its cache."""
    meaning = {n: x for n, x in options.items() if n not in HINTS}
    for b, n in enumerate(lengths):
        more = {} if qv is None else {"qv": qv[b : b + 1]}
        parts = q[b : b + 1], *(cache.rows(x, b, n)[None] for x in want)
        exact, exact_lse = formula.attention(*parts, torch.float64, **meaning, **more)
        plain, _ = formula.attention(*parts, dtype, **meaning, **more)
        allowed = 2 * error(plain.to(dtype), exact) + torch.finfo(dtype).eps * float(exact.abs().max())
        assert error(out[b : b + 1], exact) <= allowed
        assert error(lse[b : b + 1], exact_lse) <= 1e-5


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seqlen_new", [0, 3])
@pytest.mark.parametrize("with_qv", [False, True])
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "pages of 16"])
def test_against_a_cache_written_by_hand(layout, with_qv, seqlen_new, options):
    for dtype in DTYPES[:2]:
        cache = Cache(layout, dtype)
        q = cache.normal((BATCH, 3, NHEADS, HEADDIM))
        qv = cache.normal((BATCH, 3, NHEADS, HEADDIM)) if with_qv else None
        new = [cache.normal((BATCH, seqlen_new, NHEADS_K, HEADDIM)) for _ in "kv"] if seqlen_new else []
        want = [cache.k.clone(), cache.v.clone()]
        for b in range(BATCH):
            for x, rows in zip(want, new, strict=False):
                cache.write(x, b, int(cache.used[b]), rows[b])
        out, lse, *partials = with_cache(
            q, cache.k, cache.v, *new, qv=qv, cache_seqlens=cache.used, return_softmax_lse=True, **arguments(cache),
            **OPTIONS[options],
        )  # fmt: skip
        assert torch.equal(cache.k, want[0]) and torch.equal(cache.v, want[1]), "the cache"
        assert [(x.shape, x.dtype) for x in partials] == [((0,), torch.float32)] * 2
        lengths = (cache.used + seqlen_new).tolist()
        check_rows(out, lse, q, cache, want, lengths, dtype, OPTIONS[options], qv)


@pytest.mark.parametrize("with_qv", [False, True])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (30, 0)}, {"attention_chunk": 50}])
def test_rotary_from_positions_of_its_own(mask, with_qv):
    cache = Cache("pages of 7", torch.float32, seed=3)
    q, qv, k, v = (cache.normal((BATCH, 4, heads, HEADDIM)) for heads in (NHEADS, NHEADS, NHEADS_K, NHEADS_K))
    cos, sin = tables(torch.float32, 16)
    starts = i32([3, 40, 0])
    want, turned = [cache.k.clone(), cache.v.clone()], q.clone()
    for b in range(BATCH):
        at = torch.arange(4) + int(starts[b])
        cache.write(want[0], b, int(cache.used[b]), rotate(k[b], cos[at], sin[at], True))
        cache.write(want[1], b, int(cache.used[b]), v[b])
        turned[b] = rotate(q[b], *(x[at if mask else at[:1].expand(4)] for x in (cos, sin)), True)
    qv = qv if with_qv else None
    out, lse, *_ = with_cache(
        q, cache.k, cache.v, k, v, qv, cos, sin, cache.used, page_table=cache.table, rotary_seqlens=starts,
        return_softmax_lse=True, **mask,
    )  # fmt: skip
    torch.testing.assert_close(cache.k, want[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(cache.v, want[1])
    check_rows(out, lse, turned, cache, want, (cache.used + 4).tolist(), torch.float32, mask, qv)


def test_ragged_queries_and_new_keys():
    caches = [Cache("fixed", torch.float32, seed=5) for _ in range(2)]
    lengths_q, lengths_new = [3, 0, 1], [2, 4, 1]
    q = caches[0].normal((sum(lengths_q), NHEADS, HEADDIM))
    k, v = (caches[0].normal((sum(lengths_new), NHEADS_K, HEADDIM)) for _ in "kv")
    cu_q, cu_new = (i32([0, *n]).cumsum(0, dtype=torch.int32) for n in (lengths_q, lengths_new))
    out, lse, *_ = with_cache(
        q, caches[0].k, caches[0].v, k, v, cache_seqlens=caches[0].used, causal=True, cu_seqlens_q=cu_q, max_seqlen_q=3,
        cu_seqlens_k_new=cu_new, return_softmax_lse=True,
    )  # fmt: skip
    assert out.shape == q.shape and lse.shape == (NHEADS, 4)
    for b in range(BATCH):
        rows, keys = slice(int(cu_q[b]), int(cu_q[b + 1])), slice(int(cu_new[b]), int(cu_new[b + 1]))
        want = [x[b : b + 1] for x in (caches[1].k, caches[1].v)]
        at = slice(int(caches[1].used[b]), int(caches[1].used[b]) + lengths_new[b])
        for x, new in zip(want, (k, v), strict=True):
            x[0, at] = new[keys]
        exact, exact_lse = formula.attention(
            q[None, rows].double(), *(x[:, : at.stop].double() for x in want), torch.float64, causal=True
        )
        assert error(out[None, rows], exact) <= 1e-5 and error(lse[None, :, rows], exact_lse) <= 1e-5
    assert torch.equal(caches[0].k, caches[1].k) and torch.equal(caches[0].v, caches[1].v)


def test_leftpad_of_pages_and_rows_of_a_larger_table():
    """cache_batch_idx of a cache in pages: which row of page_table is whose."""
    cache = Cache("pages of 7", torch.float32)
    pad, index = i32([7, 0, 60]), i32([2, 0, 1])
    q = cache.normal((BATCH, 2, NHEADS, HEADDIM))
    table = torch.empty_like(cache.table)
    table[index.long()] = cache.table
    used = i32([20, 1, 65])
    out, lse, *_ = with_cache(
        q, cache.k, cache.v, cache_seqlens=used, cache_leftpad=pad, page_table=table, cache_batch_idx=index,
        causal=True, return_softmax_lse=True,
    )  # fmt: skip
    for b in range(BATCH):
        keys = [cache.rows(x, b, int(used[b]))[None, int(pad[b]) :].double() for x in (cache.k, cache.v)]
        exact, exact_lse = formula.attention(q[b : b + 1].double(), *keys, torch.float64, causal=True)
        assert error(out[b : b + 1], exact) <= 1e-5 and error(lse[b : b + 1], exact_lse) <= 1e-5


@cpu_only("a table on a device is not read, its entries are clamped")
def test_rows_that_a_page_table_lacks():
    cache = Cache("pages of 7", torch.float32)
    q = cache.normal((BATCH, 2, NHEADS, HEADDIM))
    with pytest.raises(ValueError, match="cache_batch_idx: expected rows of page_table, 0 to 2"):
        with_cache(q, cache.k, cache.v, page_table=cache.table, cache_batch_idx=i32([0, 1, 3]))


def test_causal_and_empty_caches():
    """Masks align at the end of the keys in use; lse is -inf without any, where FlashAttention-2's is +inf."""
    q, cache = torch.randn(2, 3, 2, 16), torch.randn(2, 8, 2, 16)
    used = i32([2, 0])
    out, lse, *_ = with_cache(q, cache, cache.clone(), cache_seqlens=used, causal=True, return_softmax_lse=True)
    assert (lse[0, :, 0] == -torch.inf).all() and lse[0, :, 1:].isfinite().all() and (lse[1] == -torch.inf).all()
    assert torch.allclose(out[0, 1], cache[0, 0]) and (out[1] == 0).all()
    _, lse2 = flash_attention_2(q, cache, cache.clone(), cache_seqlens=used, causal=True, return_softmax_lse=True)
    assert torch.allclose(lse2[lse2 != torch.inf], lse[lse != -torch.inf], rtol=1e-6)
    new = torch.randn(2, 1, 2, 16)
    for rows in (cache, cache[:, :1]):  # one key joins an empty cache: two of three rows see none
        joined = rows.clone(), rows.clone()
        _, lse, *_ = with_cache(q, *joined, new, new, cache_seqlens=0, causal=True, return_softmax_lse=True)
        assert (lse[:, :, :2] == -torch.inf).all() and lse[:, :, 2].isfinite().all()
    _, lse, *_ = with_cache(q, cache[:, :0], cache[:, :0], return_softmax_lse=True)
    assert (lse == torch.inf).all()


def test_latent_cache_is_read_in_place(monkeypatch):
    """The decoding step of MLA: pages of 64 rows of 576, of which no copy is made."""
    pool = torch.randn(5, 64, 1, 576).bfloat16()
    queries = torch.randn(2, 1, 16, 576).bfloat16()
    table, used = i32([[4, 0], [2, 1]]), i32([100, 3])
    made = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors, *rest: made.append(tensors) or cat(tensors, *rest))
    out, lse, *_ = fa3.flash_attn_with_kvcache(
        queries[..., 512:], pool[..., 512:], pool[..., :512], qv=queries[..., :512], cache_seqlens=used,
        page_table=table, softmax_scale=0.07, causal=True, return_softmax_lse=True,
    )  # fmt: skip
    assert not made
    monkeypatch.undo()
    for b, n in enumerate(used.tolist()):
        rows = pool[table[b].long()].flatten(0, 1)[None, :n]
        x = queries[b : b + 1]
        parts = x[..., 512:], rows[..., 512:], rows[..., :512]
        exact, exact_lse = formula.attention(
            *(y.double() for y in parts), torch.float64, qv=x[..., :512].double(), softmax_scale=0.07
        )
        plain, _ = formula.attention(*parts, torch.bfloat16, qv=x[..., :512], softmax_scale=0.07)
        assert error(out[b : b + 1], exact) <= error(plain, exact) + 2**-8 * float(exact.abs().max())
        assert error(lse[b : b + 1], exact_lse) <= 1e-4


class TestPrivate:
    pytestmark = cpu_only("the same path as the public function")

    def test_forward_with_a_cache(self):
        caches = [Cache("pages of 7", torch.float32, seed=5) for _ in range(2)]
        q = caches[0].normal((4, NHEADS, HEADDIM))
        k, v = (caches[0].normal((BATCH, 2, NHEADS_K, HEADDIM)) for _ in "kv")
        cu = i32([0, 3, 3, 4])
        options = {"causal": True, "cu_seqlens_q": cu, "max_seqlen_q": 3}
        got = fa3._flash_attn_forward(
            q, caches[0].k, caches[0].v, k, v, seqused_k=caches[0].used, page_table=caches[0].table, **options
        )
        want = fa3.flash_attn_with_kvcache(
            q, caches[1].k, caches[1].v, k, v, cache_seqlens=caches[1].used, page_table=caches[1].table,
            return_softmax_lse=True, **options,
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(caches[0].k, caches[1].k)

    def test_lengths_in_use_of_batches(self):
        q, k, v = (torch.randn(2, 6, h, 16) for h in (4, 2, 2))
        used = i32([2, 5])
        out, lse, *_ = fa3._flash_attn_forward(q, k, v, seqused_q=i32([6, 3]), seqused_k=used)
        want, _, *_ = fa3._flash_attn_forward(q[:1], k[:1, :2], v[:1, :2])
        assert torch.allclose(out[:1], want) and (out[1, 3:] == 0).all() and (lse[1, :, 3:] == -torch.inf).all()

    def test_gradients_are_refused(self):
        q = torch.randn(1, 2, 2, 16, requires_grad=True)
        cache = torch.randn(1, 8, 2, 16)
        for options in ({}, {"qv": torch.randn(1, 2, 2, 16)}):
            out = fa3.flash_attn_with_kvcache(q, cache, cache.clone(), cache_seqlens=3, **options)
            with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache has no derivative"):
                out.sum().backward()


BAD = {
    "rotary wider than k": (
        {"rotary_cos": torch.zeros(9, 16), "rotary_sin": torch.zeros(9, 16), "qv": torch.zeros(1, 2, 2, 16)},
        ValueError,
        "rotary_cos: expected at most headdim / 2 = 8 columns, got 16",
    ),
    "k without v": ({"v": None}, ValueError, "v: required where k is given"),
    "k without v, qv": ({"v": None, "qv": torch.zeros(1, 2, 2, 16)}, ValueError, "v: required where k is given"),
    "no lengths": ({"cache_seqlens": None}, ValueError, "cache_seqlens: required where k and v are given"),
    "scheduler_metadata": (
        {"scheduler_metadata": torch.zeros(3)},
        TypeError,
        "scheduler_metadata: expected torch.int32",
    ),
    "dropout": ({"dropout_p": 0.1}, TypeError, "unexpected keyword argument 'dropout_p'"),
    "table": (
        {"page_table": torch.zeros(1, 2), "cache_batch_idx": i32([0])},
        ValueError,
        "cache_batch_idx, page_table: expected int32",
    ),
    "dtype of k": ({"k": torch.zeros(1, 2, 2, 16).half()}, TypeError, "k: expected float32, got float16"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_writes_nothing(name):
    options, error, words = BAD[name]
    x, k_cache, v_cache = torch.ones(1, 2, 2, 16), torch.zeros(1, 8, 2, 16), torch.zeros(1, 8, 2, 16)
    call = {"k": x, "v": x, "cache_seqlens": 3} | options
    with pytest.raises(error, match=words):
        fa3.flash_attn_with_kvcache(x, k_cache, v_cache, **call)
    assert not k_cache.any() and not v_cache.any()
