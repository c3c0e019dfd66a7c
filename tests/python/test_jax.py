"""flash_attn.jax: inside XLA's programs, with gradient, under jit and vmap, against the formula in float64."""

from __future__ import annotations

import flash_attn
import numpy as np
import pytest
import torch
from support import formula
from support.arrays import numpy_array, tensor
from support.compare import assert_as_exact, cancelling_terms, dot_terms, score_terms

jax = pytest.importorskip("jax")
from flash_attn import _arrays_jax  # noqa: E402  # needs JAX

jnp = jax.numpy
attention = flash_attn.attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tensors(dtype=torch.float32, headdim_v=16):
    shapes = ((2, 7, 4, 16), (2, 9, 2, 16), (2, 9, 2, headdim_v))
    return [torch.randn(*shape).to(dtype) for shape in shapes]


def jax_arrays(*given):
    return [jnp.asarray(numpy_array(x)) for x in given]


def loss(dout, dlse=None, **options):
    """A function of q, k, v whose gradient is that of attention by dout and dlse."""

    def function(q, k, v, **more):
        result = attention(q, k, v, return_lse=dlse is not None, **options, **more)
        out, lse = result if dlse is not None else (result, None)
        total = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum()
        return total if dlse is None else total + (lse * dlse).sum()

    return function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype):
    x = tensors(dtype, headdim_v=24)
    dout, dlse = torch.randn(2, 7, 4, 24).to(dtype), torch.randn(2, 4, 7)
    bias, sink, slopes = torch.randn(1, 4, 7, 9), torch.randn(4), torch.tensor([0.1, 0.2, 0.3, 0.4])
    options = {"causal": True, "softcap": 6.0, "alibi_slopes": slopes, "attn_bias": bias, "learnable_sink": sink}
    ours = {"causal": True, "softcap": 6.0, "alibi_slopes": jnp.asarray(slopes.numpy())}
    q, k, v, jbias, jsink, jdout, jdlse = jax_arrays(*x, bias, sink, dout, dlse)

    forward = jax.jit(lambda q, k, v, bias, sink: attention(q, k, v, bias=bias, sink=sink, return_lse=True, **ours))
    out, lse = forward(q, k, v, jbias, jsink)
    assert isinstance(out, jax.Array) and out.dtype == q.dtype and lse.dtype == jnp.float32
    exact, plain = (formula.attention(*x, d, **options) for d in (torch.float64, dtype))
    scores = score_terms(x[0], x[1])
    assert_as_exact(tensor(out), exact[0], plain[0], "out", scores, 0)
    assert_as_exact(tensor(lse), exact[1], plain[1], "softmax_lse", scores, 0)

    def by_all(q, k, v, bias, sink):
        return loss(jdout, jdlse, **ours)(q, k, v, bias=bias, sink=sink)

    got = jax.jit(jax.grad(by_all, argnums=range(5)))(q, k, v, jbias, jsink)
    assert [g.dtype for g in got] == [q.dtype] * 3 + [jnp.float32] * 2

    def expected(d):
        leaves = [y.detach().to(torch.float64 if d == torch.float64 else y.dtype).requires_grad_() for y in x]
        extras = [y.double().requires_grad_() for y in (bias, sink)]
        more = {**options, "attn_bias": extras[0], "learnable_sink": extras[1]}
        results = formula.attention(*leaves, d, **more)
        cotangents = (dout.to(results[0].dtype), dlse.to(results[1].dtype))
        return torch.autograd.grad(results, (*leaves, *extras), cotangents)

    terms = cancelling_terms(*x, dout) + scores
    sums = dot_terms(x[2], dout)
    for name, g, e, p, t in zip(("dq", "dk", "dv", "dbias", "dsink"), got, expected(torch.float64), expected(dtype),
                                (terms, terms, 0, sums, sums), strict=True):  # fmt: skip
        assert_as_exact(tensor(g), e, p, name, scores, t)


def test_eager_jit_and_torch_give_the_same_bits():
    x = tensors()
    expected = attention(*x, causal=True, window_size=(4, 0)).numpy()
    arrays = jax_arrays(*x)
    for run in (lambda f: f, jax.jit, jax.checkpoint):
        assert np.array_equal(run(lambda *a: attention(*a, causal=True, window_size=(4, 0)))(*arrays), expected)
    mine = flash_attn.jax.attention(*(a.numpy() for a in x), causal=True, window_size=(4, 0))
    assert isinstance(mine, jax.Array) and np.array_equal(mine, expected)


def test_varlen_under_jit():
    q, k, v = (torch.randn(11, h, 16) for h in (4, 2, 2))
    dout = torch.randn(11, 4, 16)
    jq, jk, jv, jdout = jax_arrays(q, k, v, dout)
    run = jax.jit(jax.value_and_grad(lambda q, k, v, cu: loss(jdout, cu_seqlens_q=cu, cu_seqlens_k=cu)(q, k, v),
                                     argnums=(0, 1, 2)))  # fmt: skip
    for starts in ([0, 5, 5, 11], [0, 1, 10, 11]):  # one program, two contents of the table
        cu = torch.tensor(starts, dtype=torch.int32)
        value, got = run(jq, jk, jv, jnp.asarray(cu.numpy()))
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        out = formula.attention_varlen(*leaves, cu, cu, torch.float64)[0]
        exact = torch.autograd.grad(out, leaves, dout.double())
        low = [x.clone().requires_grad_() for x in (q, k, v)]
        plain = torch.autograd.grad(formula.attention_varlen(*low, cu, cu, torch.float32)[0], low, dout)
        assert abs(float(value) - float((out.detach() * dout).sum())) < 1e-4
        for name, g, e, p in zip(("dq", "dk", "dv"), got, exact, plain, strict=True):
            assert_as_exact(tensor(g), e, p, name, score_terms(q, k), cancelling_terms(q, k, v, dout))


@pytest.mark.parametrize("joins", [True, False], ids=["joined", "one after the other"])
def test_vmap(joins):
    """q is mapped over its second axis, v over its first, k not at all; per-call biases keep calls apart."""
    q, k, v = jax_arrays(*tensors())
    q = jnp.stack([q, 2 * q, q - 1], axis=1)
    v = jnp.stack([v, v + 1, v - 1])
    bias = jax_arrays(torch.randn(3, 1, 4, 7, 9))[0]
    more, axes = ((), ()) if joins else ((bias,), (0,))

    def one(q, k, v, *bias):
        return attention(q, k, v, causal=True, bias=bias[0] if bias else None, return_lse=True)

    def gradient(*x):
        return jax.grad(lambda *y: (one(*y)[0] ** 2).sum() + one(*y)[1].sum(), argnums=tuple(range(len(x))))(*x)

    for function in (one, gradient):
        mapped = jax.vmap(function, (1, None, 0, *axes))
        singly = [function(q[:, i], k, v[i], *(b[i] for b in more)) for i in range(3)]
        for result in (mapped(q, k, v, *more), jax.jit(mapped)(q, k, v, *more)):
            for a, *b in zip(result, *singly, strict=True):
                assert np.array_equal(a, np.stack(b))
    text = str(jax.make_jaxpr(jax.vmap(one, (1, None, 0, *axes)))(q, k, v, *more))
    assert ("scan" in text or "while" in text) is not joins


def test_nested_vmap():
    q, k, v = jax_arrays(*tensors())
    q = jnp.stack([jnp.stack([q, 2 * q]), jnp.stack([q + 1, q - 1]), jnp.stack([-q, q * q])])
    twice = jax.vmap(jax.vmap(attention, (0, None, None)), (0, None, None))(q, k, v)
    assert all(np.array_equal(twice[i, j], attention(q[i, j], k, v)) for i in range(3) for j in range(2))


def test_a_bias_that_nobody_differentiates_has_no_gradient_made():
    q, k, v = jax_arrays(*tensors())
    bias = jnp.zeros((1, 1, 7, 9))
    text = str(jax.make_jaxpr(jax.grad(lambda q: attention(q, k, v, bias=bias).sum()))(q))
    assert "dq dk dv" in text and "dbias" not in text


def test_backward_function():
    q, k, v = jax_arrays(*tensors())
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    g = flash_attn.attention_backward(out, q, k, v, out, lse, causal=True)
    same = jax.grad(loss(out, causal=True), argnums=(0, 1, 2))(q, k, v)
    assert all(isinstance(a, jax.Array) and np.array_equal(a, b) for a, b in zip(g[:3], same, strict=True))
    assert g.dbias is None and g.dsink is None


def test_nothing_is_copied():
    """Buffers of a program are where its operands are: the handler's view of q lies in q's own memory."""
    q, k, v = jax_arrays(*tensors())
    text = jax.jit(lambda *x: attention(*x, causal=True)).lower(q, k, v).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert entry.count("custom-call(") == 1 and "copy(" not in entry and "transpose(" not in entry


Q, K, V = (np.zeros((2, n, h, 16), np.float32) for n, h in ((7, 4), (9, 2), (9, 2)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda q, k, v: attention(q, k, v[:, :3]), ValueError, "v: expected the shape of k"),
        (lambda q, k, v: jax.jit(attention)(q, k[0], v), ValueError, "k: expected 4 dimensions"),
        (lambda q, k, v: attention(q.astype(int), k, v), TypeError, "q: expected float16.*, got int32"),
        (lambda q, k, v: attention(q, k, v.astype(jnp.float16)), TypeError, "v: expected float32, got float16"),
        (lambda q, k, v: attention(q, k, v, sink=jnp.zeros(3)), ValueError, "^sink: expected"),
        (lambda q, k, v: attention(q, k, v, out=q), ValueError, "out: JAX arrays cannot be written"),
        (lambda q, k, v: flash_attn.jax.attention(q, k, v, out=q), TypeError, "out: JAX arrays cannot be written"),
        (lambda q, k, v: attention(q, torch.from_numpy(K), v), TypeError, "k: expected|q: expected a torch.Tensor"),
        (lambda q, k, v: attention(q[0], k[0], v[0], cu_seqlens_q=np.array([0, 8], np.int32),
                                   cu_seqlens_k=np.array([0, 9], np.int32)),
         RuntimeError, r"cu_seqlens_q\[1\]: expected at most the rows there are, 7, got 8"),
        (lambda q, k, v: jax.grad(lambda s: attention(q, k, v, alibi_slopes=s).sum())(jnp.ones(4)),
         ValueError, "alibi_slopes: has no gradient"),
        (lambda q, k, v: jax.hessian(lambda q: attention(q, k, v).sum())(q), ValueError, "cannot be differentiated"),
        (lambda q, k, v: jax.jvp(lambda q: attention(q, k, v), (q,), (q,)), TypeError, "forward-mode"),
    ],
)  # fmt: skip
def test_errors_are_in_words(call, error, words):
    with pytest.raises(error, match=words):
        jax.block_until_ready(call(*(jnp.asarray(x) for x in (Q, K, V))))


def test_arrays_of_a_device_are_not_traced(monkeypatch):
    """k is a device's, and a constant of a function that is differentiated."""
    q, k, v = jax_arrays(*tensors())
    monkeypatch.setattr(_arrays_jax, "is_on_a_device", lambda x: x is k)
    with pytest.raises(NotImplementedError, match="^k: a JAX array of a device is served in calls that nobody traces"):
        jax.grad(lambda q: attention(q, k, v).sum())(q)


def test_the_backend_is_chosen_while_tracing():
    q, k, v = jax_arrays(*tensors())
    expected = attention(q, k, v)
    with flash_attn.use_backend("reference"):
        exact = attention(q, k, v)
    assert np.abs(exact - expected).max() < 1e-6 and not np.array_equal(exact, expected)
    with flash_attn.use_backend("torch"), pytest.raises(RuntimeError, match="runs in Python, not within a program"):
        jax.block_until_ready(attention(q, k, v))
