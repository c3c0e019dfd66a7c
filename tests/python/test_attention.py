"""Forward and backward of the fixed-length functions against the formula, feature by feature."""

from __future__ import annotations

import flash_attn
import pytest
import torch
from flash_attn import backend
from support import device
from support.compare import assert_as_exact, cancelling_terms, largest
from support.device import BACKENDS, cpu_only, flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from support.formula import attention

pytestmark = pytest.mark.device
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# (batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim), options
BASE = (2, 37, 53, 4, 2, 40)
CASES = {
    "plain": (BASE, {}),
    "causal": (BASE, {"causal": True}),
    "causal, more queries than keys": ((2, 53, 37, 4, 2, 40), {"causal": True}),
    "scale": (BASE, {"softmax_scale": 0.3}),
    "window": (BASE, {"window_size": (7, 5)}),
    "window left": (BASE, {"window_size": (7, -1)}),
    "window right": (BASE, {"window_size": (-1, 3)}),
    "window of one": (BASE, {"window_size": (0, 0)}),
    "causal window": (BASE, {"causal": True, "window_size": (9, 4)}),
    "window, more queries than keys": ((1, 60, 20, 2, 1, 32), {"window_size": (4, 4)}),
    "softcap": (BASE, {"softcap": 2.0}),
    "softcap causal": (BASE, {"softcap": 2.0, "causal": True}),
    "alibi": (BASE, {"alibi": 1}),
    "alibi per batch, causal": (BASE, {"alibi": 2, "causal": True}),
    "softcap, alibi, window": (BASE, {"softcap": 3.0, "alibi": 1, "window_size": (20, 20)}),
    "MHA": ((2, 33, 33, 3, 3, 64), {}),
    "MQA": ((2, 33, 33, 6, 1, 64), {"causal": True}),
    "one query": ((3, 1, 77, 4, 2, 64), {"causal": True}),
    "one key": ((3, 19, 1, 4, 2, 64), {}),
    "one query, one key, one dimension": ((1, 1, 1, 1, 1, 1), {}),
    "batch 0": ((0, 5, 7, 2, 1, 16), {}),
    "no queries": ((2, 0, 7, 2, 1, 16), {}),
    "no keys": ((2, 5, 0, 2, 1, 16), {"causal": True}),
    "many tiles": ((1, 261, 517, 2, 1, 64), {"causal": True}),
    **{f"headdim {d}": ((2, 35, 70, 2, 1, d), {"causal": True}) for d in (1, 3, 8, 59, 80, 96, 111, 128, 200, 256)},
}
EXTENSIONS = {
    "sink": (BASE, {"sink": True}),
    "sink, rows that see nothing": ((2, 53, 37, 4, 2, 40), {"sink": True, "causal": True}),
    "bias": (BASE, {"bias": (2, 4, 37, 53)}),
    "bias of all sequences": (BASE, {"bias": (1, 4, 37, 53), "window_size": (9, 20)}),
    "bias of one row for all": (BASE, {"bias": (1, 1, 1, 53), "causal": True}),
}
ALL = [
    pytest.param(name, dtype, shape, options, id=f"{name}-{str(dtype)[6:]}")
    for name, (shape, options) in CASES.items()
    for dtype in DTYPES
]


def inputs(shape, options, dtype):
    """q, k, v, and what the options ask for as tensors (-> differentiable options, other options)."""
    batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim = shape
    g = torch.Generator().manual_seed(hash((shape, len(options))) % 2**31)
    q = torch.randn(batch, seqlen_q, nheads, headdim, generator=g).to(dtype)
    k = torch.randn(batch, seqlen_k, nheads_k, headdim, generator=g).to(dtype)
    v = torch.randn(batch, seqlen_k, nheads_k, headdim, generator=g).to(dtype)
    options = dict(options)
    if rank := options.pop("alibi", 0):
        options["alibi_slopes"] = torch.rand((nheads,) if rank == 1 else (batch, nheads), generator=g)
    extra = {}
    if options.pop("sink", False):
        extra["learnable_sink"] = torch.randn(nheads, generator=g).to(dtype)
    if (bias_shape := options.pop("bias", None)) is not None:
        extra["attn_bias"] = torch.randn(bias_shape, generator=g).to(dtype)
    return [q, k, v], extra, options


def results(function, tensors, extra, with_lse_gradient):
    """out, lse and the gradients of a fixed random function of both."""
    leaves = [x.detach().clone().requires_grad_() for x in (*tensors, *extra.values())]
    out, lse = function(*leaves[:3], **dict(zip(extra, leaves[3:], strict=True)))
    dout = gradient_of_out(out).to(tensors[0].dtype)
    loss = (out * dout.to(out.dtype)).sum()
    if with_lse_gradient:
        dlse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(9))
        loss = loss + (torch.where(torch.isinf(lse), 0, lse) * dlse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def gradient_of_out(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(7))


def check(function, tensors, extra, options, with_lse_gradient=False):
    def formula(dtype):
        return lambda q, k, v, **e: attention(q, k, v, dtype, **options, **e)

    dtype = tensors[0].dtype
    ours = results(lambda *a, **e: function(*a, **options, **e), tensors, extra, with_lse_gradient)
    doubles = [x.double() for x in tensors], {n: x.double() for n, x in extra.items()}
    exact = results(formula(torch.float64), *doubles, with_lse_gradient)
    plain = results(formula(dtype), tensors, extra, with_lse_gradient)
    names = ["out", "softmax_lse", "dq", "dk", "dv", *("d" + n for n in extra)]
    scores = largest(exact[1])
    terms = cancelling_terms(*tensors, gradient_of_out(exact[0]), options.get("softmax_scale"))
    for name, a, b, c in zip(names, ours, exact, plain, strict=True):
        assert a.dtype == (torch.float32 if name == "softmax_lse" else dtype), name
        assert_as_exact(a, b, c, name, scores, terms if name in ("dq", "dk") else 0)


def with_probs(*args, **kwargs):
    out, lse, S_dmask = flash_attn_func(*args, return_attn_probs=True, **kwargs)
    assert S_dmask.shape == (0,) and S_dmask.dtype == out.dtype
    return out, lse


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("name, dtype, shape, options", ALL)
def test_feature(name, dtype, shape, options, engine):
    with backend(engine):
        check(with_probs, *inputs(shape, options, dtype))


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXTENSIONS)
def test_extension(name, dtype, engine):
    shape, options = EXTENSIONS[name]
    with backend(engine):
        check(with_probs, *inputs(shape, options, dtype), with_lse_gradient=True)


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_gradient_through_lse(dtype, causal, engine):
    with backend(engine):
        check(with_probs, *inputs((2, 41, 29, 4, 2, 24), {"causal": causal}, dtype), with_lse_gradient=True)


@pytest.mark.parametrize("engine", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of -65504, fp16's least, lse holds 1 / 256
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("low", [-1e30, -torch.inf], ids=["1e30", "the least"])
def test_rows_that_a_finite_bias_hides(low, causal, dtype, engine):
    """All their keys count alike, in gradients, too; whoever gets no gradient there hands none on."""
    low = max(low, torch.finfo(dtype).min)
    g = torch.Generator().manual_seed(3)
    tensors, extra, _ = inputs((2, 41, 300, 4, 2, 24), {}, dtype)
    bias = torch.randn(2, 4, 41, 300, generator=g)
    bias[..., 200:], bias[:, 1:, 5:9], bias[:, :, 20:30] = low, low, low
    extra["attn_bias"] = bias.to(dtype)

    def outs(function, dtype=None):
        def gradients(padding):
            leaves = [x.to(dtype or x.dtype).requires_grad_() for x in (*tensors, extra["attn_bias"])]
            out = function(*leaves[:3], attn_bias=leaves[3], causal=causal)
            dout = gradient_of_out(out).to(out.dtype)
            if padding:
                dout[:, 20:30] = 0
            return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

        return [*gradients(False), *gradients(True)]

    with backend(engine):
        ours = outs(flash_attn_func)
    formulas = [outs(lambda *a, d=d, **o: attention(*a, d, **o)[0], d) for d in (torch.float64, dtype)]
    terms = cancelling_terms(*(x.detach() for x in tensors), gradient_of_out(formulas[0][0]))
    for name, a, b, c in zip(["out", "dq", "dk", "dv", "dattn_bias"] * 2, ours, *formulas, strict=True):
        assert_as_exact(a, b, c, name, 20.0, terms if name != "out" else 0)
    assert not ours[9][:, :, 20:30].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_gradient_is_the_same_call(dtype):
    (q, k, v), _, options = inputs(BASE, {"causal": True, "softcap": 5.0, "alibi": 1}, dtype)
    out, lse, _ = flash_attn_func(q.requires_grad_(), k, v, return_attn_probs=True, **options)
    with torch.no_grad():
        out2, lse2, S_dmask = flash_attn_func(q, k, v, return_attn_probs=True, **options)
        assert torch.equal(out, flash_attn_func(q, k, v, **options))
    assert torch.equal(out, out2) and torch.equal(lse, lse2) and S_dmask.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_functions_equal_the_separate_one(dtype):
    g = torch.Generator().manual_seed(3)
    qkv = torch.randn(2, 45, 3, 4, 24, generator=g).to(dtype).requires_grad_()
    dout = torch.randn(2, 45, 4, 24, generator=g).to(dtype)
    q, k, v = (x.detach().clone().requires_grad_() for x in qkv.unbind(2))
    kv = torch.stack([k.detach(), v.detach()], 2).requires_grad_()
    q2 = q.detach().clone().requires_grad_()
    options = {"causal": True, "window_size": (20, 0)}

    out = flash_attn_func(q, k, v, **options)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    out_qkv = flash_attn_qkvpacked_func(qkv, **options)
    (dqkv,) = torch.autograd.grad(out_qkv, qkv, dout)
    out_kv = flash_attn_kvpacked_func(q2, kv, **options)
    dq2, dkv = torch.autograd.grad(out_kv, (q2, kv), dout)

    assert torch.equal(out, out_qkv) and torch.equal(out, out_kv)
    assert torch.equal(torch.stack([dq, dk, dv], 2), dqkv)
    assert torch.equal(dq, dq2) and torch.equal(torch.stack([dk, dv], 2), dkv)
    with torch.no_grad():
        assert torch.equal(out, flash_attn_qkvpacked_func(qkv, **options))
        assert torch.equal(out, flash_attn_kvpacked_func(q2, kv, **options))


STRIDES = {
    "heads before rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dimensions first": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "every second row": lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
    "every third column": lambda x: torch.stack([x, x, x], -1).flatten(-2)[..., ::3],
    "a slice of a larger tensor": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 1, 2, 0))[:, 2:, 1:-1, 3:-2],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", STRIDES)
def test_strides_do_not_matter(layout, dtype):
    """On a CPU to the bit. A GPU compiles other code for rows that are not aligned, which may add in another order."""
    (q, k, v), _, _ = inputs(BASE, {}, dtype)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run(f):
        leaves = [f(x.clone()).requires_grad_() for x in (q, k, v)]
        out = flash_attn_func(*leaves, causal=True)
        return [out.detach(), *torch.autograd.grad(out, leaves, f(dout.clone()))]

    strided = STRIDES[layout]
    assert strided(q).stride() != q.stride() and torch.equal(strided(q), q)
    bits = 0 if device.DEVICE == "cpu" else 4 * torch.finfo(dtype).eps
    for a, b in zip(run(strided), run(lambda x: x), strict=True):
        assert (a - b).abs().max() <= bits * b.abs().max()


def test_broadcast_inputs():
    k = torch.randn(1, 20, 1, 16).expand(3, 20, 2, 16)
    q = torch.randn(3, 9, 4, 16)
    assert torch.equal(flash_attn_func(q, k, k), flash_attn_func(q, k.contiguous(), k.contiguous()))


def test_values_with_their_own_headdim():
    q, k, v = torch.randn(2, 9, 4, 16), torch.randn(2, 11, 2, 16), torch.randn(2, 11, 2, 24)
    check(with_probs, [q, k, v], {}, {"causal": True})


def test_lazily_negated_input():
    q, k, v = torch.randn(3, 2, 9, 4, 16)
    z = torch.view_as_complex(torch.randn(2, 9, 4, 16, 2)).conj().imag
    assert z.is_neg()
    assert torch.equal(flash_attn_func(z, k, v), flash_attn_func(z.resolve_neg(), k, v))


def test_results_are_not_written_to_lazily_negated_views():
    """Their memory would be read with another sign than it was written with."""
    q, k, v = torch.randn(3, 2, 1, 4, 16).unbind(0)
    cache, negated = torch.zeros(2, 9, 4, 16), torch.zeros(2, 9, 4, 16, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    for name, run in {
        "out": lambda: flash_attn.attention(q, k, v, out=negated[:, :1]),
        "k_cache": lambda: flash_attn.flash_attn_with_kvcache(q, negated, cache, k, v, cache_seqlens=2),
        "v_cache": lambda: flash_attn.flash_attn_with_kvcache(q, cache, negated, k, v, cache_seqlens=2),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: expected memory to write to"):
            run()
    flash_attn.flash_attn_with_kvcache(q, negated, negated, cache_seqlens=2)  # reads


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (3, 2)}, {"softcap": 4.0, "causal": True}])
def test_gradcheck(options):
    """Finite differences in fp64, out and lse, with the sink and the bias."""
    g = torch.Generator().manual_seed(5)
    shapes = [(2, 4, 4, 3), (2, 5, 2, 3), (2, 5, 2, 3), (4,), (2, 1, 4, 5)]
    leaves = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]

    def function(q, k, v, sink, bias):
        out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, learnable_sink=sink, attn_bias=bias, **options)
        return out, lse

    with backend("reference"):
        # softmax_lse, dsink and dbias are fp32 whatever the input: differences wide enough to see through that.
        q, k, v, sink, bias = leaves
        assert torch.autograd.gradcheck(lambda *a: function(*a, sink.detach(), bias.detach())[0], (q, k, v))
        assert torch.autograd.gradcheck(
            lambda *a: function(q.detach(), k.detach(), v.detach(), *a)[0], (sink, bias), atol=1e-5, rtol=1e-4
        )
        assert torch.autograd.gradcheck(lambda *a: function(*a)[1].double(), leaves, eps=1e-2, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("engine", BACKENDS)
def test_nan_reaches_what_depends_on_it_and_nothing_else(engine):
    q, k, v = torch.randn(1, 8, 2, 16), torch.randn(1, 8, 2, 16), torch.randn(1, 8, 2, 16)
    k[0, 5, 1, 3] = torch.nan
    with backend(engine):
        out = flash_attn_func(q, k, v, causal=True)
    expected = torch.zeros(8, 2, dtype=torch.bool)
    expected[5:, 1] = True
    assert torch.equal(out[0].isnan().all(-1), expected) and torch.equal(out[0].isnan().any(-1), expected)


@cpu_only("number of threads")
def test_repeats_bit_for_bit_for_any_number_of_threads():
    from flash_attn import num_threads, set_num_threads

    (q, k, v), _, options = inputs((2, 130, 300, 4, 2, 64), {"causal": True}, torch.bfloat16)
    seen = []
    default = num_threads()
    try:
        for threads in (1, 2, 3, 3):
            set_num_threads(threads)
            assert num_threads() == threads
            leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
            out = flash_attn_func(*leaves, **options)
            seen.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)])
    finally:
        set_num_threads(0)
    assert num_threads() == default
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))
