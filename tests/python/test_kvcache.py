"""flash_attn_with_kvcache against the cache written, and the rotation done, by hand in PyTorch."""

from __future__ import annotations

import flash_attn
import pytest
import torch
from flash_attn import backend
from flash_attn._call import Scores, Sequences
from support.compare import error
from support.device import BACKENDS, DEVICE, cpu_only, flash_attn_func, flash_attn_with_kvcache
from support.formula import attention
from test_attention import DTYPES

pytestmark = pytest.mark.device
BATCH, NHEADS, NHEADS_K, HEADDIM, CAPACITY = 3, 4, 2, 32, 75


def rotate(x, cos, sin, interleaved):
    """x (seqlen, nheads, headdim), cos and sin (seqlen, rotary_dim / 2): in fp32 (fp64), rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    pairs = cos.shape[-1]
    y = x.to(wide).clone()
    if interleaved:
        a, b = y[..., 0 : 2 * pairs : 2].clone(), y[..., 1 : 2 * pairs : 2].clone()
        y[..., 0 : 2 * pairs : 2], y[..., 1 : 2 * pairs : 2] = a * cos - b * sin, a * sin + b * cos
    else:
        a, b = y[..., :pairs].clone(), y[..., pairs : 2 * pairs].clone()
        y[..., :pairs], y[..., pairs : 2 * pairs] = a * cos - b * sin, a * sin + b * cos
    return y.to(x.dtype)


class Cache:
    """A cache in one of three layouts, and each sequence's keys as rows of their own."""

    def __init__(self, layout, dtype, seed=0):
        self.g = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.used = torch.tensor([20, 0, 65], dtype=torch.int32)
        self.arguments = {}
        if layout.startswith("pages"):
            page_size = int(layout.split()[-1])
            each = -(-CAPACITY // page_size)
            pages = BATCH * each + 2
            self.table = torch.randperm(pages, generator=self.g)[: BATCH * each].view(BATCH, each).to(torch.int32)
            self.arguments["block_table"] = self.table
            shape = (pages, page_size, NHEADS_K, HEADDIM)
        else:
            entries = BATCH + 2 if layout == "entries" else BATCH
            self.index = torch.arange(BATCH)
            if layout == "entries":
                self.index = torch.tensor([4, 0, 2])
                self.arguments["cache_batch_idx"] = self.index.to(torch.int32)
            shape = (entries, CAPACITY, NHEADS_K, HEADDIM)
        self.k, self.v = self.normal(shape), self.normal(shape)
        if layout == "strided":  # K and V share memory, heads before rows
            both = self.normal((BATCH, NHEADS_K, 2, CAPACITY, HEADDIM))
            self.k, self.v = both.unbind(2)
            self.k, self.v = self.k.transpose(1, 2), self.v.transpose(1, 2)
        self.paged = layout.startswith("pages")

    def normal(self, shape):
        return torch.randn(shape, generator=self.g).to(self.dtype)

    def rows(self, cache, b, n):
        """Copies of the first n rows of sequence b, (n, nheads_k, headdim)."""
        if not self.paged:
            return cache[self.index[b], :n].clone()
        return cache[self.table[b].long()].flatten(0, 1)[:n].clone()

    def write(self, cache, b, first, rows):
        """`cache` with rows written at [first, first + n) of sequence b."""
        for t, row in enumerate(rows, start=first):
            if self.paged:
                page_size = cache.shape[1]
                cache[self.table[b, t // page_size], t % page_size] = row
            else:
                cache[self.index[b], t] = row


LAYOUTS = ["fixed", "entries", "strided", "pages of 1", "pages of 7", "pages of 16", "pages of 256"]
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (9, 2)},
    "softcap, slopes, sink": {
        "causal": True,
        "softcap": 4.0,
        "alibi_slopes": torch.linspace(0.1, 0.6, NHEADS),
        "learnable_sink": torch.linspace(-1, 1, NHEADS),
    },
}


def tables(dtype, rotary_dim, seqlen=120):
    angle = torch.arange(seqlen)[:, None] / 100.0 ** (torch.arange(rotary_dim // 2) / (rotary_dim // 2))
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seqlen_new", [0, 1, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_a_cache_written_by_hand(layout, seqlen_new, options, engine):
    for dtype in DTYPES:
        cache = Cache(layout, dtype)
        options_ = OPTIONS[options]
        q = cache.normal((BATCH, max(seqlen_new, 2), NHEADS, HEADDIM))
        new = [cache.normal((BATCH, seqlen_new, NHEADS_K, HEADDIM)) for _ in "kv"] if seqlen_new else []
        want = [cache.k.clone(), cache.v.clone()]
        for b in range(BATCH):
            for x, rows in zip(want, new, strict=False):
                cache.write(x, b, int(cache.used[b]), rows[b])
        before = cache.used.clone()
        with backend(engine):
            out, lse = flash_attn_with_kvcache(
                q, cache.k, cache.v, *new, cache_seqlens=cache.used, return_softmax_lse=True, **cache.arguments,
                **options_,
            )  # fmt: skip
        assert torch.equal(cache.k, want[0]) and torch.equal(cache.v, want[1]), "the cache"
        assert torch.equal(cache.used, before)
        for b in range(BATCH):
            n = int(cache.used[b]) + seqlen_new
            parts = q[b : b + 1], *(cache.rows(x, b, n)[None] for x in want)
            exact, exact_lse = attention(*parts, torch.float64, **options_)
            plain, _ = attention(*parts, dtype, **options_)
            allowed = 2 * error(plain.to(dtype), exact) + torch.finfo(dtype).eps * float(exact.abs().max())
            assert error(out[b : b + 1], exact) <= allowed
            assert error(lse[b : b + 1], exact_lse) <= 1e-5


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 16, HEADDIM])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (30, 0)}])
def test_rotary(rotary_dim, interleaved, mask):
    for dtype, table_dtype, starts in [
        (torch.float32, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, None),
        (torch.float16, torch.float32, torch.tensor([3, 40, 0], dtype=torch.int32)),
    ]:
        cache = Cache("pages of 7", dtype, seed=3)
        q, k, v = (cache.normal((BATCH, 4, heads, HEADDIM)) for heads in (NHEADS, NHEADS_K, NHEADS_K))
        cos, sin = tables(table_dtype, rotary_dim)
        want_k, want_v, want_q = cache.k.clone(), cache.v.clone(), q.clone()
        for b in range(BATCH):
            first = int(cache.used[b] if starts is None else starts[b])
            at = torch.arange(first, first + 4)
            cache.write(want_k, b, int(cache.used[b]), rotate(k[b], cos[at], sin[at], interleaved))
            cache.write(want_v, b, int(cache.used[b]), v[b])
            at = at if mask else torch.full((4,), first)
            want_q[b] = rotate(q[b], cos[at], sin[at], interleaved)
        caller_q = q.clone()
        out = flash_attn_with_kvcache(
            q, cache.k, cache.v, k, v, cos, sin, cache.used, block_table=cache.table, rotary_interleaved=interleaved,
            rotary_positions=starts, **mask,
        )  # fmt: skip
        assert torch.equal(q, caller_q) and torch.equal(cache.v, want_v)
        torch.testing.assert_close(cache.k, want_k, rtol=torch.finfo(dtype).eps, atol=1e-6)  # products may be fused
        want = flash_attn_with_kvcache(
            want_q, want_k, want_v, cache_seqlens=cache.used + 4, block_table=cache.table, **mask
        )
        torch.testing.assert_close(out, want, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_rotary_is_interleaved_unless_said_otherwise():
    cache = torch.zeros(1, 1, 1, 4)
    k = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    quarter = torch.zeros(1, 2), torch.ones(1, 2)
    flash_attn_with_kvcache(k, cache, cache.clone(), k, k, *quarter, cache_seqlens=0)
    assert cache.flatten().tolist() == [-2, 1, -4, 3]
    flash_attn_with_kvcache(k, cache, cache.clone(), k, k, *quarter, cache_seqlens=0, rotary_interleaved=False)
    assert cache.flatten().tolist() == [-3, -4, 1, 2]


def test_ragged_queries_and_new_keys():
    cache, plain = Cache("fixed", torch.float32, seed=5), Cache("fixed", torch.float32, seed=5)
    lengths_q, lengths_new = [3, 0, 1], [2, 4, 1]
    q = cache.normal((sum(lengths_q), NHEADS, HEADDIM))
    k, v = (cache.normal((sum(lengths_new) + 1, NHEADS_K, HEADDIM)) for _ in "kv")
    cu_q, cu_new = (
        torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32) for n in (lengths_q, lengths_new)
    )
    out, lse = flash_attn_with_kvcache(
        q, cache.k, cache.v, k, v, cache_seqlens=cache.used, causal=True, cu_seqlens_q=cu_q, max_seqlen_q=3,
        cu_seqlens_k_new=cu_new, return_softmax_lse=True,
    )  # fmt: skip
    assert lse.shape == (NHEADS, sum(lengths_q))
    for b in range(BATCH):
        one = [x[None, cu_new[b] : cu_new[b + 1]] for x in (k, v)]
        rows = slice(int(cu_q[b]), int(cu_q[b + 1]))
        want, want_lse = flash_attn_with_kvcache(
            q[None, rows], plain.k[b : b + 1], plain.v[b : b + 1], *one, cache_seqlens=int(plain.used[b]),
            causal=True, return_softmax_lse=True,
        )  # fmt: skip
        assert torch.allclose(out[rows], want[0], atol=1e-6) and torch.allclose(lse[:, rows], want_lse[0], atol=1e-6)
    assert torch.equal(cache.k, plain.k) and torch.equal(cache.v, plain.v)


def test_leftpad():
    cache = Cache("fixed", torch.float32)
    pad = torch.tensor([7, 0, 64], dtype=torch.int32)
    q = cache.normal((BATCH, 1, NHEADS, HEADDIM))
    k, v = (cache.normal((BATCH, 1, NHEADS_K, HEADDIM)) for _ in "kv")
    out = flash_attn_with_kvcache(q, cache.k, cache.v, k, v, cache_seqlens=cache.used, cache_leftpad=pad)
    for b in range(BATCH):
        rows = slice(int(pad[b]), int(cache.used[b]) + 1)
        want = flash_attn_func(q[b : b + 1], cache.k[b : b + 1, rows], cache.v[b : b + 1, rows])
        assert torch.allclose(out[b : b + 1], want, atol=1e-6)


def test_step_by_step_is_causal_attention():
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 90, heads, 64, generator=g) for heads in (4, 2, 2))
    whole = flash_attn_func(q, k, v, causal=True)
    cache = [torch.full((2, 100, 2, 64), float("nan")) for _ in "kv"]
    steps = [(0, 80), *((i, i + 1) for i in range(80, 90))]
    outs = [
        flash_attn_with_kvcache(q[:, a:b], *cache, k[:, a:b], v[:, a:b], cache_seqlens=a, causal=True) for a, b in steps
    ]
    assert torch.allclose(torch.cat(outs, 1), whole, atol=2e-6)
    assert torch.equal(cache[0][:, :90], k) and cache[1][:, 90:].isnan().all()


def test_the_whole_cache_without_lengths():
    cache = Cache("fixed", torch.float32)
    q = cache.normal((BATCH, 2, NHEADS, HEADDIM))
    assert torch.equal(flash_attn_with_kvcache(q, cache.k, cache.v), flash_attn_func(q, cache.k, cache.v))


def test_empty_rows_have_upstreams_lse():
    q, cache = torch.randn(1, 2, 2, 16), torch.randn(1, 8, 2, 16)
    out, lse = flash_attn_with_kvcache(q, cache, cache.clone(), cache_seqlens=0, return_softmax_lse=True)
    assert (out == 0).all() and (lse == float("inf")).all()


def test_gradients_are_refused_and_writes_recorded():
    cache = Cache("fixed", torch.float32)
    q = cache.normal((BATCH, 1, NHEADS, HEADDIM)).requires_grad_()
    k, v = (cache.normal((BATCH, 1, NHEADS_K, HEADDIM)).requires_grad_() for _ in "kv")
    loss = (cache.k * cache.k.clone().requires_grad_()).sum()  # saves the cache
    out = flash_attn_with_kvcache(q, cache.k, cache.v, k, v, cache_seqlens=3)
    with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache has no derivative"):
        out.sum().backward()
    out.mul_(2)  # its memory is its own
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        inputs = [x.clone() for x in (q, cache.k, cache.v, k, v)]
        flash_attn_with_kvcache(*inputs, cache_seqlens=3)


# ---- Errors ---------------------------------------------------------------------------------------------------------

NEW, CACHE = (BATCH, 2, NHEADS_K, HEADDIM), (BATCH, CAPACITY, NHEADS_K, HEADDIM)


def i32(numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def angles(rows, pairs, dtype=torch.float32):
    return dict.fromkeys(("rotary_cos", "rotary_sin"), torch.zeros(rows, pairs, dtype=dtype))


MALFORMED = {
    "q is None": ({"q": None}, TypeError, ["q: expected a torch.Tensor, got NoneType"]),
    "cache is a list": ({"k_cache": [1.0]}, TypeError, ["k_cache: expected a torch.Tensor, got list"]),
    "k is a list": ({"k": [1.0]}, TypeError, ["k: expected a tensor, got list"]),
    "k without v": ({"v": None}, ValueError, ["v: required where k is given"]),
    "v without k": ({"k": None}, ValueError, ["k: required where v is given"]),
    "k without cache_seqlens": (
        {"cache_seqlens": None},
        ValueError,
        ["cache_seqlens: required where k and v are given"],
    ),
    "lengths of int64": (
        {"cache_seqlens": torch.zeros(BATCH, dtype=torch.int64)},
        TypeError,
        ["cache_seqlens", "int32"],
    ),
    "length is a word": (
        {"cache_seqlens": "x"},
        TypeError,
        ["cache_seqlens: expected an int or a torch.Tensor, got str"],
    ),
    "lengths of another batch": ({"cache_seqlens": i32([0] * 2)}, ValueError, ["cache_seqlens", "3"]),
    "cu_seqlens is a list": ({"cache_seqlens": 5, "cu_seqlens_q": [0, 1]}, TypeError, ["cu_seqlens_q", "list"]),
    "no room": ({"cache_seqlens": 74}, ValueError, ["cache_seqlens: expected at most the rows", "73, got 74"]),
    "length beyond 64 bits": ({"cache_seqlens": 2**64}, ValueError, ["cache_seqlens", "64 bits", str(2**64)]),
    "negative length": ({"cache_seqlens": -1}, ValueError, ["cache_seqlens: expected at least 0", "-1"]),
    "dtype of the cache": (
        {"k_cache": torch.zeros(CACHE, dtype=torch.float16)},
        TypeError,
        ["k_cache: expected float32, got float16"],
    ),
    "shape of the caches": (
        {"v_cache": torch.zeros(BATCH, 9, NHEADS_K, HEADDIM)},
        ValueError,
        ["v_cache: expected the shape of k_cache"],
    ),
    "expanded cache": (
        {"k_cache": torch.zeros(1).expand(CACHE)},
        ValueError,
        ["k_cache: an output needs every element"],
    ),
    "heads of k": ({"k": torch.zeros(BATCH, 2, 4, HEADDIM)}, ValueError, ["k: expected nheads_k = 2"]),
    "entries that meet": (
        {"cache_batch_idx": i32([1, 0, 1])},
        ValueError,
        ["cache_batch_idx: sequences 0 and 2 would write the same row"],
    ),
    "entry beyond": ({"cache_batch_idx": i32([1, 0, 3])}, ValueError, ["cache_batch_idx[2]", "got 3"]),
    "leftpad beyond": ({"cache_leftpad": i32([0, 6, 0])}, ValueError, ["cache_leftpad[1]", "5, got 6"]),
    "cos without sin": (
        {"rotary_cos": torch.zeros(99, 4)},
        ValueError,
        ["rotary_sin: required where rotary_cos is given"],
    ),
    "rotary without k": ({"k": None, "v": None, **angles(99, 4)}, ValueError, ["rotary_cos: given without k and v"]),
    "rotary too short": ({**angles(6, 4)}, ValueError, ["rotary_cos: expected at least 7 rows"]),
    "rotary of another dtype": (
        {**angles(99, 4, torch.float16)},
        TypeError,
        ["rotary_cos: expected float32, got float16"],
    ),
    "rotary too wide": ({**angles(99, 17)}, ValueError, ["rotary_cos", "headdim / 2 = 16"]),
    "cu_seqlens_k_new alone": (
        {"k": None, "v": None, "cu_seqlens_k_new": i32([0] * 4)},
        ValueError,
        ["cu_seqlens_k_new: given without k"],
    ),
    "negative window": ({"window_size": (-2, 0)}, ValueError, ["window_size[0]", "-2"]),
}


@pytest.fixture
def checked():
    """Tables on a device are read on request only."""
    flash_attn.check_tables(DEVICE != "cpu")
    yield
    flash_attn.check_tables(False)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name, checked):
    replaced, kind, words = MALFORMED[name]
    caches = [torch.ones(BATCH, CAPACITY, NHEADS_K, HEADDIM) for _ in "kv"]
    arguments = {
        "q": torch.zeros(BATCH, 2, NHEADS, HEADDIM), "k_cache": caches[0], "v_cache": caches[1],
        "k": torch.zeros(NEW), "v": torch.zeros(NEW), "cache_seqlens": 5, **replaced,
    }  # fmt: skip
    with pytest.raises(kind) as caught:
        flash_attn_with_kvcache(**arguments)
    for word in words:
        assert word in str(caught.value)
    assert all((x == 1).all() for x in caches)


# ---- torch.compile --------------------------------------------------------------------------------------------------


def arguments_of_a_step(dtype=torch.float32):
    cache = Cache("pages of 16", dtype)
    q, k, v = (cache.normal((BATCH, 1, heads, HEADDIM)) for heads in (NHEADS, NHEADS_K, NHEADS_K))
    return cache, q, k, v, *tables(dtype, 16)


@cpu_only("compiled graphs")
def test_compiles():
    def step(q, k_cache, v_cache, k, v, cos, sin, used, table):
        out, lse = flash_attn_with_kvcache(
            q * 1.0, k_cache, v_cache, k, v, cos, sin, used, block_table=table, causal=True, return_softmax_lse=True
        )
        again = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=used + 1, block_table=table)
        return out * 2.0, lse, again

    cache, q, k, v, cos, sin = arguments_of_a_step()
    copies = [cache.k.clone(), cache.v.clone()]
    want = step(q, *copies, k, v, cos, sin, cache.used, cache.table)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = compiled(q, cache.k, cache.v, k, v, cos, sin, cache.used, cache.table)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(cache.k, copies[0]) and torch.equal(cache.v, copies[1])


@cpu_only("compiled graphs")
def test_compiles_several_steps_over_views_of_one_tensor():
    """K and V in one tensor, written to again and again within one graph: nothing may be lost."""

    def steps(q, cache, k, v):
        k_cache, v_cache = cache.unbind(2)
        for t in range(3):
            row = slice(t, t + 1)
            out = flash_attn_with_kvcache(q[:, row], k_cache, v_cache, k[:, row], v[:, row], cache_seqlens=t)
        return out, cache

    q, k, v = (torch.randn(2, 3, heads, 16) for heads in (4, 2, 2))
    torch.compiler.reset()
    compiled = torch.compile(steps, fullgraph=True, backend="inductor")
    for requires_grad in (False, True):
        cache = torch.zeros(2, 8, 2, 2, 16, requires_grad=requires_grad)
        got, want = compiled(q, cache.clone(), k, v), steps(q, cache.clone(), k, v)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@cpu_only("operators")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    cache, q, k, v, cos, sin = arguments_of_a_step(dtype)
    ops = torch.ops.flash_attn
    groups = (*Sequences(seqused_k=cache.used, block_table=cache.table), *Scores(causal=True))
    torch.library.opcheck(ops._flash_attn_kvcache_forward.default, (q, cache.k, cache.v, *groups))
    joining = (k, v, None, cos, sin, True, None)
    torch.library.opcheck(ops._flash_attn_kvcache_append.default, (q, cache.k, cache.v, *joining, *groups))


def test_the_writing_operator_says_so():
    schema = torch.ops.flash_attn._flash_attn_kvcache_append.default._schema
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["k_cache", "v_cache"]
