"""FlashAttention-3's functions against the formula: values and gradients, feature by feature."""

from __future__ import annotations

import flash_attn_interface as fa3
import pytest
import torch
from flash_attn._fa3.merge import adjacent, merge
from support import fa3 as formula
from support.compare import assert_as_exact, cancelling_terms, largest
from support.device import cpu_only, on_device
from test_attention import DTYPES, gradient_of_out, results

pytestmark = pytest.mark.device
attend = on_device(fa3.flash_attn_func)
attend_varlen = on_device(fa3.flash_attn_varlen_func)

BASE = (2, 37, 53, 4, 2, 40, 40)  # batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, headdim_v
BLIND = (2, 53, 37, 4, 2, 40, 40)
CASES = {
    "plain": (BASE, {}),
    "causal, rows that see nothing": (BLIND, {"causal": True}),
    "window, scale": (BASE, {"window_size": (9, 4), "softmax_scale": 0.3}),
    "softcap": (BASE, {"softcap": 2.0, "causal": True}),
    "headdim of v smaller": ((2, 37, 53, 4, 2, 48, 24), {"causal": True}),
    "headdim of v larger": ((2, 37, 53, 4, 2, 16, 72), {}),
    "chunk": (BASE, {"attention_chunk": 16}),
    "chunk, causal, window": (BLIND, {"attention_chunk": 8, "causal": True, "window_size": (5, 0)}),
    "qv": ((2, 37, 53, 4, 2, 24, 48), {"qv": True}),
    "qv, causal, softcap": ((2, 53, 37, 4, 1, 16, 64), {"qv": True, "causal": True, "softcap": 5.0}),
    "qv, chunk, scale": ((2, 37, 53, 4, 4, 24, 24), {"qv": True, "attention_chunk": 16, "softmax_scale": 0.2}),
    "sink": (BLIND, {"learnable_sink": True, "causal": True}),
    "hints": (BASE, {"num_splits": 7, "pack_gqa": True, "sm_margin": 8, "deterministic": True}),
}
HINTS = ("num_splits", "pack_gqa", "sm_margin", "deterministic")


def inputs(shape, options, dtype):
    """-> q, k, v, further differentiable inputs by name, other options."""
    batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, headdim_v = shape
    g = torch.Generator().manual_seed(5)
    shapes = ((seqlen_q, nheads, headdim), (seqlen_k, nheads_k, headdim), (seqlen_k, nheads_k, headdim_v))
    tensors = [torch.randn(batch, *s, generator=g).to(dtype) for s in shapes]
    options, extra = dict(options), {}
    if options.pop("qv", False):
        extra["qv"] = torch.randn(batch, seqlen_q, nheads, headdim_v, generator=g).to(dtype)
    if options.pop("learnable_sink", False):
        extra["learnable_sink"] = torch.randn(nheads, generator=g).to(dtype)
    return tensors, extra, options


def check(function, reference, tensors, extra, scale=None):
    """`function` and reference(dtype) -> out, lse, of q, k, v and what extra names; all gradients."""
    dtype = tensors[0].dtype
    ours = results(function, tensors, extra, True)
    doubles = [x.double() for x in tensors], {n: x.double() for n, x in extra.items()}
    exact = results(reference(torch.float64), *doubles, True)
    plain = results(reference(dtype), tensors, extra, True)
    q, k, v = tensors
    if "qv" in extra:
        q, k = torch.cat([q, extra["qv"]], -1), torch.cat([k, v], -1)
    terms = cancelling_terms(q, k, v, gradient_of_out(exact[0]), scale)
    for name, a, b, c in zip(["out", "softmax_lse", "dq", "dk", "dv", *("d" + n for n in extra)], ours, exact, plain,
                             strict=True):  # fmt: skip
        assert a.dtype == (torch.float32 if name == "softmax_lse" else dtype), name
        cancels = name in ("dq", "dk", "dqv") or (name == "dv" and "qv" in extra)
        luck = 2 if name == "dv" and "qv" in extra else 1  # a sum of two gradients, each rounded to the dtype
        assert_as_exact(a, b, c, name, largest(exact[1]), terms if cancels else 0, luck)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_fixed(name, dtype):
    tensors, extra, options = inputs(*CASES[name], dtype)
    meaning = {n: x for n, x in options.items() if n not in HINTS}

    def reference(dtype):
        return lambda q, k, v, **e: formula.attention(q, k, v, dtype, **meaning, **e)

    check(
        lambda *x, **e: attend(*x, return_attn_probs=True, **options, **e),
        reference,
        tensors,
        extra,
        options.get("softmax_scale"),
    )
    with torch.no_grad():
        out, lse = attend(*tensors, return_attn_probs=True, **extra, **options)
        assert torch.equal(attend(*tensors, **extra, **options), out)
    assert lse.shape == (out.shape[0], out.shape[2], out.shape[1])


CU_Q, CU_K = [0, 9, 9, 30, 37], [0, 12, 20, 20, 53]
USED_Q, USED_K = [7, 0, 21, 3], [12, 5, 0, 30]
LENGTHS = {
    "whole": ({}, [9, 0, 21, 7], [12, 8, 0, 33]),
    "used": ({"seqused_q": USED_Q, "seqused_k": USED_K}, USED_Q, USED_K),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "qv", "chunk, causal, window"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_varlen(lengths, name, dtype):
    tables, used_q, used_k = LENGTHS[lengths]
    shape, options = CASES[name]
    (q, k, v), extra, options = inputs((1, 37, 53, *shape[3:]), options, dtype)
    tensors, extra = [x[0] for x in (q, k, v)], {n: x[0] for n, x in extra.items()}
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in (CU_Q, CU_K))
    tables = {n: torch.tensor(x, dtype=torch.int32) for n, x in tables.items()}

    def reference(dtype):
        return lambda q, k, v, **e: formula.varlen(q, k, v, dtype, CU_Q, CU_K, used_q, used_k, **options, **e)

    def ours(q, k, v, **e):
        return attend_varlen(q, k, v, cu_q, cu_k, 21, 33, return_attn_probs=True, **tables, **options, **e)

    check(ours, reference, tensors, extra)


def test_lse_of_rows_that_see_nothing():
    """-inf; but +inf if there is no key in the whole call, as upstream has it."""
    q, k, v = (torch.randn(2, n, 2, 8) for n in (5, 3, 3))
    out, lse = attend(q, k, v, causal=True, return_attn_probs=True)
    assert (lse[:, :, :2] == -torch.inf).all() and lse[:, :, 2:].isfinite().all() and (out[:, :2] == 0).all()
    out, lse = attend(q, k[:, :0], v[:, :0], return_attn_probs=True)
    assert (lse == torch.inf).all() and (out == 0).all()
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    none = torch.zeros(3, dtype=torch.int32)
    for keys, sign in ((k[0], -1), (k[0, :0], 1)):
        out, lse = attend_varlen(q[0], keys, keys, cu, none, 3, 0, return_attn_probs=True)
        assert lse.shape == (2, 5) and (lse == sign * torch.inf).all() and (out == 0).all()
    used = torch.tensor([0, 1], dtype=torch.int32)
    _, lse = attend_varlen(q[0], k[0], v[0], cu, torch.tensor([0, 2, 3], dtype=torch.int32), 3, 2, None, used,
                           return_attn_probs=True)  # fmt: skip
    assert (lse[:, :2] == -torch.inf).all() and lse[:, 2:].isfinite().all()


def test_scores_of_qv_are_a_sum_of_products():
    q, k, v, qv = (torch.randn(1, n, 1, d, dtype=torch.float64) for n, d in ((4, 8), (6, 8), (6, 16), (4, 16)))
    scores = (torch.einsum("bihd,bjhd->bij", q, k) + torch.einsum("bihd,bjhd->bij", qv, v)) * 24**-0.5
    want = torch.einsum("bij,bjhd->bihd", scores.softmax(-1), v)
    got = formula.attention(q, k, v, torch.float64, qv=qv)[0]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(attend(*(x.float() for x in (q, k, v)), qv=qv.float()), want.float())


@pytest.mark.parametrize("v_first", [False, True])
def test_keys_of_mla_are_read_in_place(v_first):
    """headdim 64 of the rotary part, 512 of the latent part, side by side in one cache; also in part of a row."""
    rows = torch.randn(2, 40, 1, 600).bfloat16()[..., 3:579]
    queries = torch.randn(2, 3, 8, 576).bfloat16()
    parts = [512, 64] if v_first else [64, 512]
    (k, v), (q, qv) = rows.split(parts, -1), queries.split(parts, -1)
    if v_first:
        (k, v), (q, qv) = (v, k), (qv, q)
    a, b = merge(q, k, v, qv, in_place=True)
    assert b.data_ptr() == rows.data_ptr() and a.data_ptr() == queries.data_ptr() and b.shape == rows.shape
    assert merge(q, k, v, qv, in_place=False)[1].data_ptr() != rows.data_ptr()
    assert torch.equal(b, rows) and b.stride() == rows.stride()
    with torch.no_grad():
        out, lse = attend(q, k, v, qv=qv, causal=True, return_attn_probs=True)
        assert torch.equal(attend(q.clone(), k, v, qv=qv.clone(), causal=True), out)  # queries that are not adjacent
    exact = formula.attention(q.double(), k.double(), v.double(), torch.float64, qv=qv.double(), causal=True)
    plain = formula.attention(q, k, v, torch.bfloat16, qv=qv, causal=True)
    for name, x, y, z in zip(("out", "softmax_lse"), (out, lse), exact, plain, strict=True):
        assert_as_exact(x, y, z, name, largest(exact[1]), 0)


def test_rows_that_are_not_adjacent():
    x = torch.randn(2, 5, 2, 30)
    a, b = x[..., :10], x[..., 10:]
    assert torch.equal(adjacent(a, b), x)
    assert adjacent(b, a) is None
    assert adjacent(a, x[..., 11:]) is None and adjacent(a, b.clone()) is None
    assert adjacent(a, b[:, :, :1]) is None and adjacent(a, b.transpose(0, 1)) is None
    assert adjacent(a, x[..., 10:20].double()) is None
    assert torch.equal(adjacent(x[:1, :, :1, :10], x[:1, :, :1, 10:]), x[:1, :, :1])


@pytest.mark.parametrize("heads", [None, 4])
def test_qkvpacked(heads):
    function = on_device(fa3.flash_attn_qkvpacked_func)
    shape = (2, 11, 3, 4, 16) if heads is None else (2, 11, 4 + 2 * 2, 16)
    qkv = torch.randn(shape, requires_grad=True)
    q, k, v = qkv.unbind(2) if heads is None else qkv.split([4, 2, 2], 2)
    options = {"causal": True, "attention_chunk": 4, "return_attn_probs": True}
    got = function(qkv, num_heads_q=heads, **options)
    want = attend(q, k, v, **options)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    grads = [torch.autograd.grad((out.sum() + lse.sum()), qkv, retain_graph=True)[0] for out, lse in (got, want)]
    assert torch.equal(*grads)


def test_sink_has_two_names():
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in "qkv")
    sink = torch.randn(2)
    assert torch.equal(attend(q, k, v, s_aux=sink), attend(q, k, v, learnable_sink=sink))
    with pytest.raises(ValueError, match="s_aux: is learnable_sink under another name"):
        attend(q, k, v, s_aux=sink, learnable_sink=sink)


def test_dropout_alibi_and_bias_as_flash_attention_2_has_them():
    from flash_attn import flash_attn_func

    q, k, v = (torch.randn(1, 20, 2, 8) for _ in "qkv")
    options = {
        "dropout_p": 0.3, "alibi_slopes": torch.rand(2), "attn_bias": torch.randn(1, 2, 20, 20), "causal": True
    }  # fmt: skip
    torch.manual_seed(3)
    want = on_device(flash_attn_func)(q, k, v, **options)
    torch.manual_seed(3)
    assert torch.equal(attend(q, k, v, **options), want)


def test_autograd_classes():
    q, k, v = (torch.randn(1, 5, 2, 8, requires_grad=True) for _ in "qkv")
    want = fa3.flash_attn_func(q, k, v, 0.3, True, None, None, None, None, (2, 0), return_attn_probs=True)
    got = fa3.FlashAttnFunc.apply(
        q, k, v, 0.3, True, None, None, None, None, (2, 0), 0, 0.0, 1, None, False, 0, True
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(fa3.FlashAttnFunc.apply(q, k, v, 0.3, True), fa3.flash_attn_func(q, k, v, 0.3, True))
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    used = torch.tensor([1, 3], dtype=torch.int32)
    rows = [x[0] for x in (q, k, v)]
    got = fa3.FlashAttnVarlenFunc.apply(*rows, cu, cu, used, None, 3, 3, None, True)
    assert torch.equal(got, fa3.flash_attn_varlen_func(*rows, cu, cu, 3, 3, used, None, None, True))
    qkv = torch.stack((q, k, v), 2)
    assert torch.equal(fa3.FlashAttnQKVPackedFunc.apply(qkv, None, True), fa3.flash_attn_func(q, k, v, causal=True))
    with pytest.raises(TypeError, match="FlashAttnFunc.apply: expected 17 arguments"):
        fa3.FlashAttnFunc.apply(q, k, v)


class TestPrivate:
    pytestmark = cpu_only("the same path as the public functions")

    def inputs(self):
        return [torch.randn(2, n, h, 16, requires_grad=True) for n, h in ((7, 4), (9, 2), (9, 2))]

    def test_forward_is_differentiable(self):
        q, k, v = self.inputs()
        out, lse, *rest = fa3._flash_attn_forward(q, k, v, softmax_scale=0.2, causal=True, window_size_left=3)
        want = fa3.flash_attn_func(q, k, v, 0.2, True, window_size=(3, -1), return_attn_probs=True)
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1]) and [x.shape for x in rest] == [(0,), (0,)]
        for a, b in zip(*(torch.autograd.grad(o.sum(), (q, k, v)) for o in (out, want[0])), strict=True):
            assert torch.equal(a, b)

    def test_backward(self):
        q, k, v = self.inputs()
        out, lse = fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        dout = torch.randn_like(out)
        want = torch.autograd.grad(out, (q, k, v), dout)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        with torch.no_grad():
            softmax_d = fa3._flash_attn_backward(
                dout, q, k, v, out, lse, None, None, None, None, None, None, *grads, is_causal=True
            )
        assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))
        assert softmax_d.shape == (2, 4, 128)
        torch.testing.assert_close(softmax_d[..., :7], (dout * out).sum(-1).transpose(1, 2))
        with pytest.raises(ValueError, match="dk: required: the gradient is written there"):
            fa3._flash_attn_backward(dout, q, k, v, out, lse, dq=grads[0])

    def test_backward_of_packed_sequences_in_use(self):
        cu, used = torch.tensor([0, 3, 7], dtype=torch.int32), torch.tensor([2, 4], dtype=torch.int32)
        q, k, v = (x[0, :7].detach().requires_grad_() for x in self.inputs())
        out, lse = fa3.flash_attn_varlen_func(q, k, v, cu, cu, 4, 4, used, used, causal=True, return_attn_probs=True)
        want = torch.autograd.grad(out.sum(), (q, k, v))
        grads = [torch.empty_like(x) for x in (q, k, v)]
        with torch.no_grad():
            fa3._flash_attn_backward(
                torch.ones_like(out), q, k, v, out, lse, cu, cu, used, used, 4, 4, *grads, is_causal=True
            )
        assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))

    def test_out_is_written(self):
        q, k, v = (x.detach() for x in self.inputs())
        memory = torch.full_like(q, 7.0)
        out, *_ = fa3._flash_attn_forward(q, k, v, out_=memory)
        assert out is memory and torch.equal(out, fa3.flash_attn_func(q, k, v))
        with pytest.raises(ValueError, match="out: expected torch.float32 of shape"):
            fa3._flash_attn_forward(q, k, v, out_=memory.half())


def test_scheduler_metadata():
    lengths = torch.tensor([3, 4], dtype=torch.int32)
    got = fa3.get_scheduler_metadata(2, 1, 8, 4, 2, 64, lengths)
    assert got.dtype == torch.int32 and got.tolist() == [0]
    with pytest.raises(TypeError, match="cache_seqlens: expected torch.int32"):
        fa3.get_scheduler_metadata(2, 1, 8, 4, 2, 64, lengths.long())
    with pytest.raises(ValueError, match="headdim: expected at least 1"):
        fa3.get_scheduler_metadata(2, 1, 8, 4, 2, 0, lengths)


Q = torch.zeros(2, 5, 4, 16)
BAD = {
    "num_splits negative": ({"num_splits": -1}, ValueError, "num_splits: expected at least 0, at most 256, got -1"),
    "num_splits large": ({"num_splits": 257}, ValueError, "num_splits: .*got 257"),
    "num_splits a word": ({"num_splits": "x"}, TypeError, "num_splits: expected an integer, got str"),
    "sm_margin": ({"sm_margin": -3}, ValueError, "sm_margin: expected at least 0, got -3"),
    "pack_gqa": ({"pack_gqa": "yes"}, TypeError, "pack_gqa: expected a bool or None, got str"),
    "chunk": ({"attention_chunk": -1}, ValueError, "attention_chunk"),
    "window": ({"window_size": 3}, ValueError, "window_size: expected two integers"),
    "qv of another shape": (
        {"qv": torch.zeros(2, 5, 4, 8)},
        ValueError,
        "qv: expected the shape of q with the headdim",
    ),
    "qv of another dtype": ({"qv": Q.half()}, TypeError, "qv: expected the dtype of q"),
    "qv a list": ({"qv": [1.0]}, TypeError, "qv: expected a torch.Tensor"),
    "descale without fp8": (
        {"k_descale": torch.ones(2, 4)},
        ValueError,
        "k_descale: only for inputs of .*float8_e4m3fn",
    ),
    "unknown keyword": ({"block_table": None}, TypeError, "unexpected keyword argument 'block_table'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, error, words = BAD[name]
    with pytest.raises(error, match=words):
        fa3.flash_attn_func(Q, Q, Q, **options)


def test_bad_qkv():
    for shape, options, words in [
        ((2, 5, 12, 8), {}, "num_heads_q: required where qkv has 4 dimensions"),
        ((2, 5, 12, 8), {"num_heads_q": 7}, "num_heads_q: expected qkv.shape"),
        ((2, 5, 12, 8), {"num_heads_q": 12}, "num_heads_q: expected qkv.shape"),
        ((2, 5, 2, 4, 8), {}, "qkv: expected shape"),
        ((2, 5, 3, 4, 8), {"num_heads_q": 3}, "num_heads_q: expected the 4 heads"),
    ]:
        with pytest.raises(ValueError, match=words):
            fa3.flash_attn_qkvpacked_func(torch.zeros(shape), **options)
