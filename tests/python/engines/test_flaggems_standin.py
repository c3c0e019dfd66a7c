"""The flaggems engine on a stand-in with FlagGems' signature: what it serves, refuses, passes on and finds wrong.

Simulated: no kernel of FlagGems runs here.
"""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import zipfile

import flash_attn
import pytest
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn._engines import flaggems
from flash_attn._engines.builtin import BUILT_IN
from flash_attn._engines.flaggems import adapter, verification
from flash_attn._engines.flaggems.capabilities import MEASURED, is_measured, release
from flash_attn._engines.flaggems.verification import Signature
from support import flag_gems_standin as gems

BF16 = torch.bfloat16


@pytest.fixture
def stand_in(monkeypatch):
    """Believed without verification. -> the calls that reach it."""
    monkeypatch.setattr(flaggems, "is_measured", lambda *_: True)
    with gems.installed():
        yield gems.calls


@pytest.fixture
def few_heads(monkeypatch):
    """A stand-in has no tiles."""
    monkeypatch.setattr(verification, "_HEADS_K", (2,))


def random(*shape, dtype=BF16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def table(*values):
    return torch.tensor(values, dtype=torch.int32)


def slopes(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(9)) / 2


def fixed(seqlen_q, seqlen_k, nheads=4, nheads_k=2, headdim=64, batch=2, dtype=BF16):
    shapes = ((batch, seqlen_q, nheads, headdim), *[(batch, seqlen_k, nheads_k, headdim)] * 2)
    return [random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def on(backend, call):
    with flash_attn.use_backend(backend):
        return call()


def assert_agree(call):
    """`call` -> out, or (out, lse, ...). The stand-in rounds out once, as the oracle does."""
    ours, true = (on(name, call) for name in ("flaggems", "reference"))
    if isinstance(ours, torch.Tensor):
        ours, true = (ours,), (true,)
    torch.testing.assert_close(ours[0], true[0], atol=1e-6, rtol=torch.finfo(ours[0].dtype).eps)
    if len(ours) > 1:
        torch.testing.assert_close(ours[1], true[1], atol=2e-5, rtol=1e-5)


def why_not(*tensors, **call):
    return {c.backend: c.why_not for c in flash_attn.explain(*tensors, **call).candidates}["flaggems"]


def refusal(call):
    with pytest.raises(flash_attn.NotServed) as raised:
        on("flaggems", call)
    return str(raised.value)


# ---- What is served --------------------------------------------------------------------------------------------------

MASKS = {
    "none": {},
    "causal": {"causal": True},
    "two sides": {"window_size": (3, 2)},
    "causal and left": {"causal": True, "window_size": (4, -1)},
    "left": {"window_size": (4, -1)},
    "right": {"window_size": (-1, 2)},
    "wider than the keys": {"window_size": (30, 2)},
    "wider on the right": {"window_size": (2, 30)},
    "wider than all": {"window_size": (300, 400)},
}
SCORES = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": slopes(4)},
    "alibi of sequences": {"alibi_slopes": slopes(2, 4)},
    "scale": {"softmax_scale": 0.3},
    "softcap and alibi": {"softcap": 1.5, "alibi_slopes": slopes(4), "deterministic": True},
}


@pytest.mark.parametrize("lengths", [(1, 20), (17, 17), (9, 25), (25, 9)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(stand_in, mask, lengths):
    q, k, v = fixed(*lengths)
    assert_agree(lambda: flash_attn_func(q, k, v, **MASKS[mask]))
    assert_agree(lambda: flash_attn_func(q, k, v, **MASKS[mask], return_attn_probs=True))


@pytest.mark.parametrize("mask", ["none", "causal", "left"])
@pytest.mark.parametrize("scores", SCORES)
def test_scores(stand_in, scores, mask):
    q, k, v = fixed(9, 21)
    assert_agree(lambda: flash_attn_func(q, k, v, **SCORES[scores], **MASKS[mask]))
    assert_agree(lambda: flash_attn_func(q, k, v, **SCORES[scores], **MASKS[mask], return_attn_probs=True))


@pytest.mark.parametrize("headdim", [8, 80, 256])
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (3, 1)], ids=str)
def test_heads_headdims_and_dtypes(stand_in, heads, dtype, headdim):
    for seqlen_q in (1, 7):
        q, k, v = fixed(seqlen_q, 12, *heads, headdim, batch=3, dtype=dtype)
        assert_agree(lambda: flash_attn_func(q, k, v, causal=True, return_attn_probs=True))  # noqa: B023
        assert_agree(lambda: flash_attn_func(q, k, v))  # noqa: B023


@pytest.mark.parametrize("mask", MASKS)
def test_packed(stand_in, mask):
    """Sequences of no queries, of no keys, blind rows, and rows of no sequence."""
    cu_q, cu_k = table(0, 5, 5, 14, 15, 18), table(0, 9, 12, 16, 16, 19)
    q, k, v = random(20, 4, 64), random(21, 2, 64, seed=1), random(21, 2, 64, seed=2)
    call = (q, k, v, cu_q, cu_k, 9, 9)
    assert_agree(lambda: flash_attn_varlen_func(*call, **MASKS[mask]))
    assert_agree(
        lambda: flash_attn_varlen_func(*call, **MASKS[mask], alibi_slopes=slopes(5, 4), return_attn_probs=True)
    )
    one = (q, k, v, table(0, 1, 2, 2, 3, 4), cu_k, 1, 9)  # one query: FlagGems must not take row b for sequence b
    assert_agree(lambda: flash_attn_varlen_func(*one, **MASKS[mask], return_attn_probs=True))
    assert_agree(lambda: flash_attn_varlen_func(*one, **MASKS[mask]))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "two sides", "left"])
def test_pages(stand_in, mask, interleaved):
    """Pages that lie back to back, or take turns with those of v."""
    size, blocks = 16, table([3, 1], [0, 5], [4, 2])
    memory = random(6, 2, size, 2, 64) if interleaved else random(2, 6, size, 2, 64)
    k, v = memory.unbind(1 if interleaved else 0)
    q = random(3, 5, 4, 64, seed=3)
    cache = {"cache_seqlens": table(20, 0, 32), "block_table": blocks}
    assert_agree(lambda: flash_attn_with_kvcache(q, k, v, **cache, **MASKS[mask], return_softmax_lse=True))
    assert_agree(lambda: flash_attn_with_kvcache(q[:, :1], k, v, **cache, **MASKS[mask], return_softmax_lse=True))
    packed = (q.flatten(0, 1), k, v, table(0, 3, 9, 14), table(0, 20, 29, 61), 6, 32)
    assert_agree(lambda: flash_attn_varlen_func(*packed, block_table=blocks, **MASKS[mask], return_attn_probs=True))


@pytest.mark.parametrize("used", [table(20, 0, 7), 11], ids=["a table", "a number"])
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_caches_without_pages(stand_in, seqlen_q, used):
    q, k, v = fixed(seqlen_q, 24, batch=3)
    assert_agree(lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=used, causal=True, return_softmax_lse=True))
    assert_agree(lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=used))


def test_any_layout(stand_in):
    """Heads before rows, k and v of different strides, one head, an entry cut out of longer ones."""
    q, k, v = fixed(9, 12)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert_agree(lambda: flash_attn_func(*heads_first, causal=True, return_attn_probs=True))
    assert_agree(lambda: flash_attn_func(q, k, heads_first[2]))
    assert_agree(lambda: flash_attn_func(q[:, :7], k[:, 2:], v[:, 2:]))
    qkv = random(2, 9, 3, 4, 64)
    assert_agree(lambda: flash_attn.flash_attn_qkvpacked_func(qkv, causal=True))
    assert_agree(lambda: flash_attn_func(q, k[:, :, :1], v[:, :, :1].contiguous()))


def test_no_keys(stand_in):
    """Not a call of FlagGems: it would be given a null pointer."""
    q, k, v = fixed(9, 0)
    assert_agree(lambda: flash_attn_func(q, k, v, return_attn_probs=True))
    assert not stand_in


def test_strides_of_a_single_head_are_nobodys(stand_in):
    k, v = random(2, 2, 12, 1, 64)
    call = {"cache_seqlens": table(4, 12)}
    odd = v.as_strided(v.shape, (768, 64, 7, 1), v.storage_offset())
    assert_agree(lambda: flash_attn_with_kvcache(random(2, 5, 3, 64), k, odd, **call))
    assert stand_in[-1]["v"].data_ptr() == v.data_ptr()


def test_results_made_in_inference_mode(stand_in):
    from support.problem import make_problem

    q, k, v = fixed(9, 12)
    p, t = make_problem(q=q, k=k, v=v)
    with torch.inference_mode():
        t.out, t.lse = torch.empty_like(t.out), torch.empty_like(t.lse)
    flash_attn._engines.get("flaggems").forward(p, t)
    assert t.out.isfinite().all() and t.lse.isfinite().all()


def test_an_odd_alibi_layout(stand_in):
    q, k, v = fixed(9, 12)
    assert_agree(lambda: flash_attn_func(q, k, v, alibi_slopes=slopes(4, 2).t()))


def test_empty_lse_of_either_sign(stand_in):
    """The public functions say +inf; torch's own operator says -inf."""
    from support.problem import make_problem

    q, k, v = fixed(9, 4)
    engine = flash_attn._engines.get("flaggems")
    for positive in (True, False):
        p, t = make_problem(q=q, k=k, v=v, window_size=(-1, 0), causal=True, positive_empty_lse=positive)
        engine.forward(p, t)
        assert (t.lse[:, :, :5] == p.empty_lse).all() and p.empty_lse == (torch.inf if positive else -torch.inf)
        assert (t.out[:, :5] == 0).all() and t.lse[:, :, 5:].isfinite().all()


def test_tables_on_a_device_may_hold_anything(stand_in):
    """Nobody has read them: what reaches FlagGems leads nowhere outside the tensors."""
    from support.problem import make_problem

    engine, garbage = flash_attn._engines.get("flaggems"), table(5, -7, 2**30)
    q, k = random(10, 2, 64), random(12, 2, 64)
    p, t = make_problem(q=q, k=k, v=k, cu_seqlens_q=table(0, 4, 10), cu_seqlens_k=table(0, 4, 12), max_seqlen_q=10,
                        max_seqlen_k=12, on_device=True)  # fmt: skip
    t.cu_seqlens_q = t.cu_seqlens_k = garbage
    engine.forward(p, t)
    assert gems.calls[-1]["cu_seqlens_q"].tolist() == [5, 0, 10]
    assert gems.calls[-1]["cu_seqlens_k"].tolist() == [5, 0, 12]
    pages = random(3, 16, 2, 64)
    p, t = make_problem(q=random(2, 4, 2, 64), k=pages, v=pages, block_table=table([0, 1], [1, 2]),
                        seqused_k=table(3, 9), on_device=True)  # fmt: skip
    t.block_table, t.seqused_k = table([7, -1], [2**30, 0]), table(-3, 1000)
    engine.forward(p, t)
    assert gems.calls[-1]["block_table"].tolist() == [[2, 0], [2, 0]]
    assert gems.calls[-1]["seqused_k"].tolist() == [0, 32]


# ---- What reaches FlagGems -------------------------------------------------------------------------------------------


def test_the_arguments_of_a_fixed_call(stand_in):
    q, k, v = fixed(9, 12)
    out = on("flaggems", lambda: flash_attn_func(q, k, v, causal=True, softcap=2.0))
    call = stand_in[-1]
    assert call["q"].data_ptr() == q.data_ptr() and call["q"].shape == (18, 4, 64)
    assert call["k"].data_ptr() == k.data_ptr() and call["v"].data_ptr() == v.data_ptr()
    assert call["out"].data_ptr() == out.data_ptr()
    assert call["cu_seqlens_q"].tolist() == [0, 9, 18] and call["cu_seqlens_k"].tolist() == [0, 12, 24]
    assert (call["max_seqlen_q"], call["max_seqlen_k"]) == (9, 12)
    assert call["causal"] and call["window_size"] == (-1, -1)
    assert (call["softmax_scale"], call["softcap"], call["block_table"], call["seqused_k"]) == (0.125, 2.0, None, None)


@pytest.mark.parametrize(
    "window, alibi, lse, expected",
    [
        ((-1, -1), False, False, (False, (-1, -1), 12)),
        ((3, 2), False, False, (False, (3, 2), 12)),
        ((-1, 0), False, True, (True, (-1, -1), 12)),
        ((-1, 0), True, False, (True, (-1, -1), 12)),
        ((-1, 0), True, True, (False, (16, 0), 17)),  # the causal form of ALiBi has another lse
        ((3, -1), False, False, (False, (3, 16), 17)),  # no limit is a limit out of reach, below max_seqlen_k
        ((-1, 3), False, False, (False, (16, 3), 17)),
        ((11, 3), False, False, (False, (11, 3), 12)),
        ((12, 3), False, False, (False, (16, 3), 17)),
        ((3, 500), False, False, (False, (3, 16), 17)),
        ((500, 500), False, False, (False, (-1, -1), 12)),
    ],
    ids=str,
)
def test_windows_have_two_sides(stand_in, window, alibi, lse, expected):
    q, k, v = fixed(9, 12)
    call = {"window_size": window, "alibi_slopes": slopes(4) if alibi else None, "return_attn_probs": lse}
    on("flaggems", lambda: flash_attn_func(q, k, v, **call))
    got = stand_in[-1]
    assert (got["causal"], got["window_size"], got["max_seqlen_k"]) == expected


def test_the_arguments_of_pages(stand_in):
    k, v = random(2, 6, 16, 2, 64)
    q, blocks = random(3, 1, 4, 64), table([3, 1], [0, 5], [4, 2])
    on("flaggems", lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=table(20, 1, 32), block_table=blocks))
    call = stand_in[-1]
    assert call["k"] is k and call["v"] is v and call["cu_seqlens_k"] is None
    assert call["block_table"].tolist() == blocks.tolist() and call["seqused_k"].tolist() == [20, 1, 32]
    assert call["max_seqlen_q"] == 1  # FlagGems packs the heads of a group


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, words",
    [
        ({"dropout_p": 0.5}, "dropout_p: FlagGems drops other entries"),
        ({"attn_bias": torch.zeros(1, 1, 1, 12)}, "attn_bias: not supported by FlagGems"),
        ({"learnable_sink": torch.zeros(4)}, "learnable_sink: FlagGems accepts sinks and ignores them"),
        ({"attention_chunk": 4}, "attention_chunk: not supported by FlagGems"),
        ({"softmax_scale": 0.0}, "softmax_scale: 0 is not served by FlagGems"),
        ({"softmax_scale": -1.0}, "softmax_scale: -1 is not served by FlagGems"),
    ],
    ids=str,
)
def test_refused_scores(stand_in, call, words):
    q, k, v = fixed(9, 12)
    assert words in refusal(lambda: flash_attn_func(q, k, v, **call))
    assert not stand_in


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": torch.float32}, "dtype: float32 is not served"),
        ({"dtype": torch.float64}, "dtype: float64 is not served"),
        ({"headdim": 264}, "headdim: 264 is not served (multiples of 8 up to 256 are)"),
        ({"headdim": 60}, "headdim: 60 is not served"),
    ],
    ids=str,
)
def test_refused_tensors(stand_in, change, words):
    q, k, v = fixed(9, 12, **change)
    assert words in refusal(lambda: flash_attn_func(q, k, v))


def test_refused_layouts(stand_in):
    q, k, v = fixed(9, 12)
    assert "v: FlagGems needs the headdim of q" in refusal(lambda: flash_attn_func(q, k, v[..., :32]))
    columns = random(2, 9, 4, 128)[..., ::2]
    assert "FlagGems needs the elements of a row side by side" in refusal(lambda: flash_attn_func(columns, k, v))


def test_refused_caches(stand_in):
    q, k, v = fixed(2, 12)
    used = table(4, 5)

    def refused(**call):
        return refusal(lambda: flash_attn_with_kvcache(q, call.pop("k_cache", k), v, cache_seqlens=used, **call))

    assert "FlagGems appends no keys to a cache" in refused(k=k[:, :2].clone(), v=v[:, :2].clone())
    assert "cache_batch_idx: FlagGems reads entry b" in refused(cache_batch_idx=table(1, 0))
    assert "cache_leftpad: not supported by FlagGems" in refused(cache_leftpad=table(1, 0))
    other = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert "v: FlagGems reads a cache whose k and v have the same strides" in refused(k_cache=other)
    part_k, part_v = (random(2, 20, 2, 64)[:, :12] for _ in range(2))
    words = refusal(lambda: flash_attn_with_kvcache(q, part_k, part_v, cache_seqlens=used))
    assert "k: FlagGems reads pages (or entries of a cache) that lie a multiple of their own size apart" in words
    packed = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), table(0, 2, 4), table(0, 12, 24), 2, 12)
    with flash_attn.use_backend("flaggems"):
        assert why_not(*packed, seqused_k=used) == "seqused_k: FlagGems takes either cu_seqlens_k or seqused_k"


def test_offsets_have_32_bits(stand_in):
    """2**18 pages of 8192 elements, all in one place: memory that is claimed and never read."""
    q, page = random(1, 1, 4, 64), random(1, 64, 2, 64)
    call = {"cache_seqlens": table(3), "block_table": table([2])}
    k = page.expand(2**18, -1, -1, -1)
    words = refusal(lambda: flash_attn_with_kvcache(q, k, k, **call))
    assert "k_cache: spans 2147483648 elements; FlagGems counts them in 32 bits" in words
    far = torch.empty_strided((2, 64, 2, 64), (2**31, 128, 64, 1), device="meta")
    with pytest.raises(flash_attn.NotServed, match="k: spans 2147491840 elements"):
        adapter._check_offsets("k", far)


def test_a_version_that_triton_cannot_compile():
    q, k, v = fixed(9, 12)
    with gems.installed(triton="3.9.0"):
        words = refusal(lambda: flash_attn_func(q, k, v))
        assert "flag_gems 5.0.2 needs triton < 3.9, which removed block pointers; 3.9.0 is installed" in words
        assert "needs triton < 3.9" in {b.name: b.unavailable for b in flash_attn.backends()}["flaggems"]
    with gems.installed(triton="3.10.1+vendor"):
        assert "needs triton < 3.9" in refusal(lambda: flash_attn_func(q, k, v))


# ---- Verification ----------------------------------------------------------------------------------------------------


def changed(**changes):
    """The stand-in with some arguments changed on their way: {name: what becomes of it}."""

    def function(**call):
        for name, change in changes.items():
            if call.get(name) is not None:
                call[name] = change(call[name])
        return gems.flash_attn_varlen_func(**call)

    return function


def with_results(change):
    def function(**call):
        out, lse = gems.flash_attn_varlen_func(**call)
        return change(out, lse)

    return function


def as_causal_where_alibi(**call):
    if call["alibi_slopes"] is not None:
        call |= {"causal": True, "window_size": (-1, -1)}
    return gems.flash_attn_varlen_func(**call)


FULL = {"return_attn_probs": True}
MASKS_OF_SIGNATURES = ("none", "causal", "window", "left window", "right window")
DEFECTS = {
    "softcap": (changed(softcap=lambda x: 0.0), {"softcap": 2.0}, "out is off"),
    "alibi": (changed(alibi_slopes=torch.zeros_like), {"alibi_slopes": slopes(4)}, "out is off"),
    "causal": (changed(causal=lambda x: False), {"causal": True}, "out is off"),
    "window": (changed(window_size=lambda w: (w[0], w[1] + 1)), {"window_size": (3, 2)}, "out is off"),
    "left window": (changed(window_size=lambda w: (w[0], -1)), {"window_size": (3, -1)}, "out is off"),
    "right window": (changed(window_size=lambda w: (-1, w[1])), {"window_size": (-1, 3)}, "out is off"),
    "scale": (changed(softmax_scale=lambda x: 1.1 * x), {}, "out is off"),
    "log2": (with_results(lambda out, lse: (out, lse / 0.6931)), FULL, "lse is off"),
    "one head's lse": (with_results(lambda out, lse: (out, lse.roll(1, 0))), FULL, "lse is off"),
    "alibi's lse": (as_causal_where_alibi,
                    {"causal": True, "alibi_slopes": slopes(4), **FULL}, "lse is off"),
    "NaN": (with_results(lambda out, lse: (out.fill_(torch.nan), lse)), {}, "out is off by nan"),
    "a fault": (with_results(lambda out, lse: 1 // 0), {}, "ZeroDivisionError: "),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found_at_first_use(defect, few_heads):
    function, call, words = DEFECTS[defect]
    q, k, v = fixed(9, 12)
    with gems.installed(function, version="5.1"):
        refused = refusal(lambda: flash_attn_func(q, k, v, **call))
        assert "FlagGems 5.1: wrong here at first use: " in refused and words in refused
        assert "(bfloat16, headdim 64, group 2)" in refused
        spent = len(gems.calls)
        assert refusal(lambda: flash_attn_func(q, k, v, **call)) == refused and len(gems.calls) == spent
        if call and call is not FULL:  # what does not use it is served
            assert_agree(lambda: flash_attn_func(q, k, v))


@pytest.mark.parametrize("name, wrong", [
    ("block_table", lambda x: x.sort().values), ("seqused_k", lambda x: (x - 1).clamp(0)),
])  # fmt: skip
def test_a_defect_of_pages_is_found(name, wrong, few_heads):
    (k, v), q = random(2, 6, 16, 2, 64), random(3, 5, 4, 64)
    call = {"cache_seqlens": table(20, 1, 32), "block_table": table([3, 1], [0, 5], [4, 2])}
    with gems.installed(changed(**{name: wrong}), version="5.1"):
        words = refusal(lambda: flash_attn_with_kvcache(q, k, v, **call))
        assert "pages of 16" in words and "wrong here at first use: out is off" in words
        assert_agree(lambda: flash_attn_func(q, q, q))


def test_a_defect_of_packed_sequences_is_found(few_heads):
    q, cu = random(20, 4, 64), table(0, 5, 20)
    with gems.installed(changed(cu_seqlens_k=lambda x: torch.cat([x[:1], x[1:] - 1])), version="5.1"):
        assert "packed keys" in refusal(lambda: flash_attn_varlen_func(q, q, q, cu, cu, 15, 15))


@pytest.mark.parametrize("fill", [None, 1.0], ids=["left as they were", "of ones"])
def test_blind_rows_that_are_wrong_leave_the_others(fill, few_heads):
    """Served where seqlen_q <= seqlen_k, refused where rows may see nothing."""

    def blind_rows(**call):
        before = torch.full_like(call["out"], fill) if fill else call["out"].clone()
        out, lse = gems.flash_attn_varlen_func(**call)
        return out.copy_(torch.where((lse == torch.inf).t()[..., None], before, out)), lse

    with gems.installed(blind_rows):
        (q, k, v), (q2, k2, v2) = fixed(9, 12), fixed(12, 9)
        assert_agree(lambda: flash_attn_func(q, k, v, causal=True))
        assert "blind" in refusal(lambda: flash_attn_func(q2, k2, v2, causal=True))
        assert_agree(lambda: flash_attn_func(q2, k2, v2))


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("one_query", [False, True])
@pytest.mark.parametrize("packed_q, keys", [
    (False, "fixed"), (False, "cache"), (False, "pages"), (True, "packed"), (True, "pages"),
])  # fmt: skip
def test_a_right_one_passes(packed_q, keys, one_query, lse, few_heads):
    """No check fails for itself: every mask, with and without what changes the path of a call."""
    size = 16 if keys == "pages" else 0
    for i, mask in enumerate(MASKS_OF_SIGNATURES):
        for blind in {False, mask != "none"}:
            odd = bool(i % 2)
            s = Signature("float16", 32, 2, packed_q, one_query, keys, size, mask, odd, not odd, lse, blind)
            assert verification.check(gems.flash_attn_varlen_func, s, torch.device("cpu")) == "", s


def test_a_defect_of_one_tile_is_found():
    """FlagGems takes other tiles where there are many heads."""

    def many_heads(**call):
        out, lse = gems.flash_attn_varlen_func(**call)
        return (out.zero_() if out.shape[1] >= 32 else out), lse

    q, k, v = fixed(9, 12)
    with gems.installed(many_heads, version="5.1"):
        assert "wrong here at first use" in refusal(lambda: flash_attn_func(q, k, v))


def test_what_was_measured_is_not_verified_again(few_heads):
    q, k, v = fixed(9, 12)
    with gems.installed():
        on("flaggems", lambda: flash_attn_func(q, k, v, causal=True))
        assert len(gems.calls) == 1
        on("flaggems", lambda: flash_attn_func(q, k, v, causal=True, return_attn_probs=True))
        assert len(gems.calls) > 2  # lse is verified
        spent = len(gems.calls)
        on("flaggems", lambda: flash_attn_func(q, k, v, causal=True, return_attn_probs=True))
        assert len(gems.calls) == spent + 1
    for other in ({"version": "5.0.3"}, {"triton": "3.5.1"}, {"vendor": "metax"}):
        with gems.installed(**other):
            on("flaggems", lambda: flash_attn_func(q, k, v, causal=True))
            assert len(gems.calls) > 1


def test_the_data_of_what_was_measured():
    plain = Signature("bfloat16", 64, 2, False, False, "fixed", 0, "none", False, False, False, False)
    assert ("5.0.2", "3.6", "nvidia") in MEASURED and release("3.6.0+metax4") == (3, 6) and release("3") == (3, 0)

    def measured(**change):
        return is_measured("5.0.2", "3.6.0", "nvidia", plain._replace(**change))

    assert measured() and measured(mask="window") and measured(softcap=True) and measured(keys="pages", page_size=16)
    for change in (
        {"dtype": "float16"}, {"headdim": 96}, {"mask": "left window"}, {"keys": "pages", "page_size": 64},
        {"keys": "cache"}, {"lse": True}, {"blind": True}, {"softcap": True, "alibi": True},
        {"mask": "causal", "alibi": True},
    ):  # fmt: skip
        assert not measured(**change), change


def test_running_out_of_memory_is_not_remembered(few_heads):
    full = [True]

    def short_of_memory(**call):
        if full:
            full.clear()
            raise torch.cuda.OutOfMemoryError("no memory")
        return gems.flash_attn_varlen_func(**call)

    q, k, v = fixed(9, 12)
    with gems.installed(short_of_memory, version="5.1"):
        with pytest.raises(torch.cuda.OutOfMemoryError):
            on("flaggems", lambda: flash_attn_func(q, k, v))
        assert_agree(lambda: flash_attn_func(q, k, v))


# ---- Choice ----------------------------------------------------------------------------------------------------------


def test_is_used_only_where_it_is_asked_for(stand_in):
    q, k, v = fixed(9, 12)
    flash_attn_func(q, k, v)
    assert not stand_in
    with flash_attn.use_backend("flaggems"):
        explanation = flash_attn.explain(q, k, v, causal=True)
    assert [c.backend for c in explanation.candidates if c.chosen] == ["flaggems"]
    assert "flash_attn_varlen_func of FlagGems 5.0.2 (nvidia) on packed rows" in explanation.plan


def test_named_it_refuses_gradients(stand_in):
    q, k, v = (x.requires_grad_() for x in fixed(9, 12))
    assert "its backward is not served" in refusal(lambda: flash_attn_func(q, k, v))
    with torch.no_grad():
        on("flaggems", lambda: flash_attn_func(q, k, v))
    assert len(stand_in) == 1


def test_preferred_it_trains_with_anothers_backward(few_heads):
    q, k, v = (x.requires_grad_() for x in fixed(9, 12))
    with gems.installed(automatic=True, before="cpu"):
        out = flash_attn_func(q, k, v, causal=True)
        gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        assert gems.calls
        spent = len(gems.calls)
        flash_attn_func(q.detach(), k.detach(), v.detach(), attention_chunk=4)  # refused: another serves it
        assert len(gems.calls) == spent
    with flash_attn.use_backend("reference"):
        true = torch.autograd.grad(flash_attn_func(q, k, v, causal=True).float().square().sum(), (q, k, v))
    for ours, exact in zip(gradients, true, strict=True):
        torch.testing.assert_close(ours, exact, atol=0.1, rtol=0.02)


def test_in_inference_mode(stand_in):
    with torch.inference_mode():
        q, k, v = fixed(9, 12)
        assert_agree(lambda: flash_attn_func(q, k, v, return_attn_probs=True))


ASKING = """
import flash_attn, torch
from flash_attn._engines.builtin import BUILT_IN
from support import flag_gems_standin as gems
q = torch.ones(1, 4, 2, 64, dtype=torch.bfloat16)
with gems.installed():
    print(flash_attn.flash_attn_func(q, q, q).sum().item(), len(gems.calls))
    with flash_attn.use_backend("cpu"):
        print(flash_attn.flash_attn_func(q, q, q).sum().item(), len(gems.calls))
"""


@pytest.mark.parametrize("variable, value, calls", [
    ("FLASH_ATTENTION_USE_FLAGGEMS", "TRUE", 1), ("FLASH_ATTENTION_BACKEND", "flaggems", 1),
    ("FLASH_ATTENTION_USE_FLAGGEMS", "FALSE", 0),
])  # fmt: skip
def test_the_environment_asks_for_it(variable, value, calls):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), variable: value}
    ran = subprocess.run([sys.executable, "-c", ASKING], capture_output=True, text=True, env=env)
    assert ran.stdout == f"512.0 {calls}\n512.0 {calls}\n", ran.stderr


# ---- The stand-in itself ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.environ.get("FLAG_GEMS_WHEEL"), reason="FLAG_GEMS_WHEEL names no wheel of flag_gems 5.0.2")
def test_the_stand_in_has_flag_gems_signature():
    """pip download --no-deps flag_gems==5.0.2; the package itself cannot be imported without a device."""
    with zipfile.ZipFile(os.environ["FLAG_GEMS_WHEEL"]) as wheel:
        assert '__version__ = "5.0.2"' in wheel.read("flag_gems/__init__.py").decode()
        source = wheel.read("flag_gems/ops/attention.py").decode()
    (function,) = (
        n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "flash_attn_varlen_func"
    )
    stand_in = ast.parse(inspect.getsource(gems.flash_attn_varlen_func)).body[0]
    assert ast.dump(function.args) == ast.dump(stand_in.args)


def test_the_registered_data():
    (backend,) = (b for b in flash_attn.backends() if b.name == "flaggems")
    assert backend.backward is None and set(backend.forward.features) == set(BUILT_IN["flaggems"]["serves"])
    lacking = set(flash_attn.features()) - set(backend.forward.features) - {"dlse", "dbias", "dsink"}
    assert lacking == set(BUILT_IN["flaggems"]["words"])  # every refusal has its reason
