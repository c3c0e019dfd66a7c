"""flash_attn.attention and attention_backward: any array in, the same kind out, against the formula in float64."""

from __future__ import annotations

import sys
import types

import flash_attn
import numpy as np
import pytest
import torch
from flash_attn import attention, attention_backward
from support import formula
from support.arrays import numpy_array, tensor
from support.compare import assert_as_exact, cancelling_terms, dot_terms, score_terms
from torch._subclasses import FakeTensorMode

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tensors(dtype=torch.float32, batch=2, seqlen_q=7, seqlen_k=9, headdim=16, headdim_v=16):
    q = torch.randn(batch, seqlen_q, 4, headdim).to(dtype)
    k = torch.randn(batch, seqlen_k, 2, headdim).to(dtype)
    return q, k, torch.randn(batch, seqlen_k, 2, headdim_v).to(dtype)


def arrays(*given: torch.Tensor) -> list[np.ndarray]:
    if any(x.dtype == torch.bfloat16 for x in given):
        pytest.importorskip("ml_dtypes")
    return [numpy_array(x) for x in given]


def gradients(inputs, dout, dlse, dtype, **options):
    """By the formula: of q, k, v and then of attn_bias, learnable_sink where they are given."""
    inputs = [x.detach().to(torch.float64 if dtype == torch.float64 else x.dtype).requires_grad_() for x in inputs]
    extras = {n: options[n].double().requires_grad_() for n in ("attn_bias", "learnable_sink") if n in options}
    out, lse = formula.attention(*inputs, dtype, **(options | extras))
    return torch.autograd.grad((out, lse), (*inputs, *extras.values()), (dout.to(out.dtype), dlse.to(lse.dtype)))


FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1), "softcap": 5.0, "softmax_scale": 0.3},
    "extras": {
        "attn_bias": torch.randn(2, 1, 7, 9, generator=torch.Generator().manual_seed(1)),
        "learnable_sink": torch.randn(4, generator=torch.Generator().manual_seed(2)),
        "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]),
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_numpy_against_the_formula(feature, dtype):
    options = FEATURES[feature]
    x = tensors(dtype, headdim_v=24)
    dout, dlse = torch.randn(2, 7, 4, 24).to(dtype), torch.randn(2, 4, 7)
    names = {"attn_bias": "bias", "learnable_sink": "sink"}
    ours = {names.get(n, n): o.numpy() if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    q, k, v, do = arrays(*x, dout)
    out, lse = attention(q, k, v, **ours, return_lse=True)
    g = attention_backward(do, q, k, v, out, lse, dlse=dlse.numpy(), **ours)

    assert {type(a) for a in (out, lse, *g[:3])} == {np.ndarray}
    assert out.dtype == q.dtype and lse.dtype == np.float32 and [a.dtype for a in g[:3]] == [q.dtype] * 3
    exact, plain = (formula.attention(*x, d, **options) for d in (torch.float64, dtype))
    scores = score_terms(x[0], x[1], options.get("softmax_scale"))
    for i, name in enumerate(("out", "softmax_lse")):
        assert_as_exact(tensor((out, lse)[i]), exact[i], plain[i], name, scores, 0)
    exact, plain = (gradients(x, dout, dlse, d, **options) for d in (torch.float64, dtype))
    terms = cancelling_terms(*x, dout, options.get("softmax_scale")) + scores
    cancelling = {"dq": terms, "dk": terms, "dv": 0, "dbias": dot_terms(x[2], dout), "dsink": dot_terms(x[2], dout)}
    present = [name for name in g._fields if getattr(g, name) is not None]
    assert len(present) == len(exact)
    for name, e, p in zip(present, exact, plain, strict=True):
        assert_as_exact(tensor(getattr(g, name)), e, p, name, scores, cancelling[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numpy_varlen(dtype):
    q, k, v = (torch.randn(12, h, 16).to(dtype) for h in (4, 2, 2))
    dout = torch.randn(12, 4, 16).to(dtype)
    cu = torch.tensor([0, 5, 5, 11], dtype=torch.int32)  # an empty sequence, and a row of none
    tables = {"cu_seqlens_q": cu.numpy(), "cu_seqlens_k": cu.numpy(), "causal": True}
    arguments = arrays(q, k, v)
    out, lse = attention(*arguments, **tables, return_lse=True)
    exact, plain = (formula.attention_varlen(q, k, v, cu, cu, d, causal=True) for d in (torch.float64, dtype))
    assert_as_exact(tensor(out), exact[0], plain[0], "out", score_terms(q, k), 0)
    assert (lse[:, 11] == -np.inf).all() and (out[11] == 0).all()
    expected = exact[1].masked_fill(exact[1] == torch.inf, -torch.inf)
    assert_as_exact(tensor(lse), expected, plain[1].masked_fill(plain[1] == torch.inf, -torch.inf), "softmax_lse",
                    score_terms(q, k), 0)  # fmt: skip

    g = attention_backward(*arrays(dout), *arguments, out, lse, **tables)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(
        formula.attention_varlen(*leaves, cu, cu, torch.float64, causal=True)[0], leaves, dout.double()
    )
    low = [x.clone().requires_grad_() for x in (q, k, v)]
    plain = torch.autograd.grad(formula.attention_varlen(*low, cu, cu, dtype, causal=True)[0], low, dout)
    for name, e, p in zip(("dq", "dk", "dv"), exact, plain, strict=True):
        assert_as_exact(tensor(getattr(g, name)), e, p, name, score_terms(q, k), cancelling_terms(q, k, v, dout))


def test_numpy_pages():
    q, k, v = tensors(seqlen_q=1, seqlen_k=8)
    table = np.array([[3, 1], [0, 2]], dtype=np.int32)
    pages = [np.empty((4, 4, 2, 16), np.float32) for _ in range(2)]
    for page, whole in zip(pages, (k, v), strict=True):
        page[table.ravel()] = whole.reshape(4, 4, 2, 16).numpy()
    out = attention(q.numpy(), *pages, block_table=table, seqused_k=np.array([8, 5], dtype=np.int32))
    assert np.array_equal(out[0], attention(q[:1], k[:1], v[:1])[0].numpy())
    assert np.array_equal(out[1], attention(q[1:], k[1:, :5], v[1:, :5])[0].numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numpy_memory_of_any_kind(dtype):
    q, k, v = arrays(*tensors(dtype))
    expected = attention(q, k, v)
    heads_first = np.ascontiguousarray(q.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    backwards = np.ascontiguousarray(k[:, ::-1])[:, ::-1]
    locked = v.copy()
    locked.flags.writeable = False
    out = np.zeros((2, 4, 7, 16), q.dtype).transpose(0, 2, 1, 3)
    assert attention(heads_first, backwards, locked, out=out) is out
    assert np.array_equal(out, expected)
    shared = np.broadcast_to(k[:1], k.shape)  # read-only, with a stride of 0
    assert np.array_equal(attention(q, shared, v), attention(q, shared.copy(), v))


def test_a_result_is_not_written_where_it_may_not_be():
    q, k, v = arrays(*tensors())
    out = np.zeros_like(q)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected memory that may be written"):
        attention(q, k, v, out=out)
    assert not out.any()


def test_engines_of_pytorch_take_numpy_arrays():
    x = [a.astype(np.float64) for a in arrays(*tensors())]
    named, exact = attention(*x, causal=True, return_lse=True), formula.attention(
        *map(torch.from_numpy, x), torch.float64, causal=True)  # fmt: skip
    assert named[0].dtype == np.float64 and np.abs(named[0] - exact[0].numpy()).max() < 1e-14
    with flash_attn.use_backend("torch"):
        q, k, v = arrays(*tensors(torch.float32))
        sink = np.zeros(4, np.float32)
        out, lse = attention(q, k, v, sink=sink, return_lse=True)
        g = attention_backward(out, q, k, v, out, lse, sink=sink)
    other = attention_backward(out, q, k, v, out, lse, sink=sink)
    assert np.abs(out - attention(q, k, v, sink=sink)).max() < 1e-6
    assert max(np.abs(a - b).max() for a, b in zip(g, other, strict=True) if a is not None) < 1e-5


class Foreign:
    """An array of some package: DLPack and a namespace, and nothing of NumPy's."""

    def __init__(self, data):
        self.data = np.asarray(data)
        self.shape, self.dtype = self.data.shape, self.data.dtype

    def __dlpack__(self, **_):
        return self.data.__dlpack__()

    def __dlpack_device__(self):
        return (1, 0)

    def __array_namespace__(self):
        return Foreign

    float32 = np.float32

    @staticmethod
    def empty(shape, dtype):
        return Foreign(np.empty(shape, dtype))

    @staticmethod
    def astype(x, dtype):
        return Foreign(x.data.astype(dtype))


def test_other_packages():
    q, k, v = arrays(*tensors())
    sink = np.arange(4, dtype=np.float32)
    expected, expected_lse = attention(q, k, v, sink=sink, return_lse=True)
    out, lse = attention(*map(Foreign, (q, k, v)), sink=Foreign(sink), return_lse=True)
    assert np.array_equal(out.data, expected) and np.array_equal(lse.data, expected_lse)
    g = attention_backward(out, *map(Foreign, (q, k, v)), out, lse, sink=Foreign(sink))
    same = attention_backward(expected, q, k, v, expected, expected_lse, sink=sink)
    assert all(np.array_equal(a.data, b) for a, b in zip(g, same, strict=True) if a is not None)


class Borrowed:
    """An array of some package whose memory is a torch tensor's: as CuPy's, on any device."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.shape, self.dtype, self.device = tuple(tensor.shape), tensor.dtype, tensor.device

    def __dlpack__(self, stream=None, **_):
        return self.tensor.__dlpack__() if stream is None else self.tensor.__dlpack__(stream=stream)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __array_namespace__(self):
        return Borrowed

    float32 = torch.float32

    @staticmethod
    def empty(shape, dtype):
        return Borrowed(torch.empty(shape, dtype=dtype))

    @staticmethod
    def from_dlpack(x):
        return Borrowed(torch.from_dlpack(x))

    @staticmethod
    def astype(x, dtype):
        return Borrowed(x.tensor.to(dtype))


@pytest.mark.device
def test_arrays_of_a_device(device):
    q, k, v = (x.to(device) for x in tensors())
    sink, bias = torch.randn(4, device=device), torch.randn(1, 4, 7, 9, device=device)
    options = {"causal": True, "sink": sink, "bias": bias}
    borrowed = {n: Borrowed(x) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    expected, expected_lse = attention(q, k, v, **options, return_lse=True)
    arrays = [Borrowed(x) for x in (q, k, v)]
    out, lse = attention(*arrays, **borrowed, return_lse=True)
    assert torch.equal(out.tensor, expected) and torch.equal(lse.tensor, expected_lse)
    memory = Borrowed(torch.zeros_like(q))
    assert attention(*arrays, **borrowed, out=memory) is memory and torch.equal(memory.tensor, expected)
    g = attention_backward(out, *arrays, out, lse, **borrowed)
    same = attention_backward(expected, q, k, v, expected, expected_lse, **options)
    for name, a, b in zip(g._fields, g, same, strict=True):
        assert isinstance(a, Borrowed), name
        torch.testing.assert_close(a.tensor, b, rtol=0, atol=0 if device == "cpu" else 1e-5)
    with pytest.raises(TypeError, match="^sink: expected an array of the kind of q, got a torch.Tensor"):
        attention(*arrays, sink=sink)


def test_arrays_of_an_unknown_device_become_torchs():
    """What the path of devices does, on the CPU: this memory says that it is a device's, and torch finds the CPU's."""

    class Elsewhere(Borrowed):
        def __dlpack_device__(self):
            return (12, 0)

    q, k, v = tensors()
    expected, expected_lse = attention(q, k, v, return_lse=True)
    arrays = [Elsewhere(x) for x in (q, k, v)]
    out, lse = attention(*arrays, return_lse=True)
    assert torch.equal(out.tensor, expected) and torch.equal(lse.tensor, expected_lse)
    g = attention_backward(*map(Elsewhere, (expected, q, k, v, expected, expected_lse)))
    same = attention_backward(expected, q, k, v, expected, expected_lse)
    assert all(torch.equal(a.tensor, b) for a, b in zip(g[:3], same[:3], strict=True))
    memory = Elsewhere(torch.zeros_like(q))
    assert attention(*arrays, out=memory) is memory and torch.equal(memory.tensor, expected)


def test_a_package_that_is_its_own_namespace(monkeypatch):
    """CuPy's arrays have no __array_namespace__: the functions are those of their package."""

    class Plain(Foreign):
        __array_namespace__ = property()

    package = types.ModuleType("plain")
    package.empty, package.float32 = lambda shape, dtype: Plain(np.empty(shape, dtype)), np.float32
    monkeypatch.setitem(sys.modules, "plain", package)
    Plain.__module__ = "plain.core"
    q, k, v = arrays(*tensors())
    out = attention(*map(Plain, (q, k, v)))
    assert type(out) is Plain and np.array_equal(out.data, attention(q, k, v))


def test_torch_takes_the_ordinary_path():
    q, k, v = tensors()
    q.requires_grad_()
    out, lse = attention(q, k, v, causal=True, window_size=(2, 0), return_lse=True)
    expected, expected_lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(2, 0),
                                                           return_attn_probs=True)  # fmt: skip
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    (dq,) = torch.autograd.grad((out, lse), q, (dout, dlse))
    g = attention_backward(dout, q, k, v, out, lse, dlse=dlse, causal=True, window_size=(2, 0))
    assert torch.equal(dq, g.dq) and not g.dq.requires_grad
    with torch.no_grad():
        memory = torch.empty_like(out)
        assert attention(q, k, v, causal=True, window_size=(2, 0), out=memory) is memory
        assert torch.equal(memory, expected)
    with pytest.raises(ValueError, match="out: memory that is given has no gradient"):
        attention(q, k, v, out=memory)


def test_the_lse_of_a_row_without_keys():
    q, k, v = tensors(seqlen_q=3, seqlen_k=1)
    for recorded in (False, True):  # rows 0 and 1 see nothing
        _, lse = attention(q.requires_grad_(recorded), k, v, causal=True, return_lse=True)
        assert (lse[..., :2] == -torch.inf).all() and lse[..., 2].isfinite().all()
    _, of_numpy = attention(*arrays(q, k, v), causal=True, return_lse=True)
    assert np.array_equal(of_numpy, lse.detach().numpy())


def test_torch_traced():
    q, k, v = tensors()
    compiled = torch.compile(lambda *x: attention(*x, causal=True, return_lse=True), backend="eager", fullgraph=True)
    expected = attention(q, k, v, causal=True, return_lse=True)
    for a, b in zip(compiled(q, k, v), expected, strict=True):
        assert torch.equal(a, b)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        assert attention(*fakes).shape == q.shape
        with pytest.raises(NotImplementedError, match="traced calls take cu_seqlens"):
            attention(*fakes, seqused_k=torch.empty(2, dtype=torch.int32))
        with pytest.raises(NotImplementedError, match="out: traced calls have no memory to write"):
            attention(*fakes, out=torch.empty(q.shape))


Q, K, V = (np.zeros((2, n, h, 16), np.float32) for n, h in ((7, 4), (9, 2), (9, 2)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: attention([1.0], K, V), TypeError, "q: expected an array with __dlpack__, got list"),
        (lambda: attention(Q, [1.0], V), TypeError, "k: expected an array, got list"),
        (lambda: attention(Q, K[0], V), ValueError, "k: expected 4 dimensions"),
        (lambda: attention(Q, K, V.astype(np.int8)), TypeError, "v: expected float32, got int8|v: expected float16"),
        (lambda: attention(Q, K, V, bias=np.zeros((7, 9), np.float32)), ValueError, "^bias: expected 4 dimensions"),
        (lambda: attention(Q, K, V, sink=np.zeros(3, np.float32)), ValueError, "^sink: expected"),
        (lambda: attention(Q, K, V, sink=np.zeros(4, bool)), TypeError, "^sink: expected .*, got bool"),
        (lambda: attention(Q[0], K[0], V[0], cu_seqlens_q=np.array([0, 7]), cu_seqlens_k=np.array([0, 9])),
         TypeError, "cu_seqlens_q: expected int32, got int64"),
        (lambda: attention(np.ma.masked_array(Q), K, V), TypeError, "q: a masked array's mask would be ignored"),
        (lambda: attention(Q, Q, V), ValueError, "k|v"),
        (lambda: attention(Q, K, V, window_size=3), ValueError, "window_size: expected two integers"),
        (lambda: attention(torch.from_numpy(Q), K, V), TypeError, "k: expected a torch.Tensor, got ndarray"),
        (lambda: attention(Q, K, V, bias=torch.zeros(1, 1, 7, 9)), TypeError, "bias: expected an array of the kind"),
        (lambda: attention_backward(Q, Q, K, V, Q, np.zeros((2, 4, 6), np.float32)), ValueError, "^lse: expected"),
    ],
)  # fmt: skip
def test_errors_are_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()
