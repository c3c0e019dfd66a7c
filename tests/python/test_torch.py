"""The package inside PyTorch: operators, torch.compile, fake tensors, autograd's corners."""

from __future__ import annotations

import flash_attn
import pytest
import torch
from flash_attn import flash_attn_interface as interface
from flash_attn._call import Dropout, Scores, Sequences
from torch._subclasses.fake_tensor import FakeTensorMode

CU = torch.tensor([0, 5, 5, 12], dtype=torch.int32)


def fixed_inputs(dtype=torch.float32, requires_grad=False):
    g = torch.Generator().manual_seed(2)
    shapes = [(2, 9, 4, 16), (2, 11, 2, 16), (2, 11, 2, 16)]
    return [torch.randn(s, generator=g).to(dtype).requires_grad_(requires_grad) for s in shapes]


def packed_inputs(dtype=torch.float32, requires_grad=False):
    g = torch.Generator().manual_seed(4)
    shapes = [(12, 4, 16), (12, 2, 16), (12, 2, 16)]
    return [torch.randn(s, generator=g).to(dtype).requires_grad_(requires_grad) for s in shapes]


def packing(name):
    """-> the differentiable inputs of a public function, and a call of it on them."""
    g = torch.Generator().manual_seed(6)
    causal = {"causal": True, "window_size": (6, 0)}
    function = getattr(flash_attn, name)
    varlen = "varlen" in name
    if "qkvpacked" in name:
        x = torch.randn((12, 3, 2, 16) if varlen else (2, 9, 3, 2, 16), generator=g)
        return [x], lambda x, **o: function(x, *((CU, 7) if varlen else ()), **causal, **o)
    q, k, v = packed_inputs() if varlen else fixed_inputs()
    rest = (CU, CU, 7, 7) if varlen else ()
    if "kvpacked" in name:
        kv = torch.stack([k, v], -3)
        return [q, kv], lambda q, kv, **o: function(q, kv, *rest, **causal, **o)
    return [q, k, v], lambda q, k, v, **o: function(q, k, v, *rest, **causal, **o)


NAMES = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_in_one_graph(name, dynamic):
    """Forward and backward, out and lse, equal to eager bit for bit."""
    inputs, call = packing(name)

    def step(*xs):
        out, lse, _ = call(*[x * 1.0 for x in xs], return_attn_probs=True)
        return out * 2.0, lse

    def run(f):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, lse = f(*leaves)
        finite = torch.where(torch.isinf(lse), 0, lse)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out.sum() + (finite * finite).sum(), leaves)]

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for a, b in zip(run(compiled), run(step), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs)[0], step(*inputs)[0])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiles_with_one_tensor_in_several_places(requires_grad):
    """Keys that are values, and queries too."""
    x = fixed_inputs()[1].requires_grad_(requires_grad)

    def step(x):
        return flash_attn.flash_attn_func(x, x, x, causal=True)

    torch.compiler.reset()
    compiled, eager = torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x)
    assert torch.equal(compiled, eager)
    if requires_grad:  # dq + dk + dv, in an order of each one's own
        torch.testing.assert_close(torch.autograd.grad(compiled.sum(), x), torch.autograd.grad(eager.sum(), x))


def test_compiles_with_sink_and_bias():
    def step(q, k, v, sink, bias):
        return flash_attn.flash_attn_func(q, k, v, learnable_sink=sink, attn_bias=bias)

    g = torch.Generator().manual_seed(8)
    leaves = [*fixed_inputs(), torch.randn(4, generator=g), torch.randn(1, 4, 9, 11, generator=g)]
    leaves = [x.requires_grad_() for x in leaves]
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    eager = step(*leaves)
    assert torch.equal(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True):
        assert torch.equal(a, b)


def forward_arguments(q, k, v):
    return (q, k, v, 0.0, 0.25, True, -1, 0, 0.0, None, False)


def varlen_arguments(q, k, v):
    return (q, k, v, CU, CU, 7, 7, 0.0, 0.25, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_forward(dtype):
    ops = torch.ops.flash_attn
    torch.library.opcheck(ops._flash_attn_forward.default, forward_arguments(*fixed_inputs(dtype)))
    torch.library.opcheck(ops._flash_attn_varlen_forward.default, varlen_arguments(*packed_inputs(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_backward(dtype):
    ops = torch.ops.flash_attn
    q, k, v = fixed_inputs(dtype)
    out, lse, _, rng_state = ops._flash_attn_forward(*forward_arguments(q, k, v))
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    torch.library.opcheck(
        ops._flash_attn_backward.default,
        (torch.ones_like(out), q, k, v, out, lse, *grads, 0.0, 0.25, True, -1, 0, 0.0, None, False, rng_state),
    )
    q, k, v = packed_inputs(dtype)
    out, lse, _, rng_state = ops._flash_attn_varlen_forward(*varlen_arguments(q, k, v))
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    torch.library.opcheck(
        ops._flash_attn_varlen_backward.default,
        (
            torch.ones_like(out), q, k, v, out, lse, *grads, CU, CU, 7, 7, 0.0, 0.25, True, -1, 0, 0.0, None, False,
            rng_state,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("extended", [False, True])
def test_opcheck_gradients(extended):
    ops = torch.ops.flash_attn
    q, k, v = packed_inputs()
    bias, sink = (torch.randn(3, 4, 7, 7), torch.randn(4)) if extended else (None, None)
    out, lse, *_ = ops._flash_attn_varlen_forward(*varlen_arguments(q, k, v), attn_bias=bias, learnable_sink=sink)
    dlse = torch.ones_like(lse) if extended else None
    sequences = Sequences(CU, CU, 7, 7)
    scores = Scores(0.25, True, learnable_sink=sink, attn_bias=bias)
    rest = (*sequences, *scores, *Dropout(), False, extended, extended)
    torch.library.opcheck(ops._flash_attn_gradients.default, (torch.ones_like(out), q, k, v, out, lse, dlse, 0, *rest))


def test_private_functions_round_trip():
    """As context-parallel trainers use them: forward, then backward into their own buffers."""
    q, k, v = fixed_inputs(requires_grad=True)
    expected = flash_attn.flash_attn_func(q, k, v, softmax_scale=0.25, causal=True)
    dout = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (q, k, v), dout)
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse, S_dmask, rng_state = interface._flash_attn_forward(*forward_arguments(q, k, v))
    assert torch.equal(out, expected) and lse.shape == (2, 4, 9) and S_dmask.shape == (0,)
    assert rng_state.shape == (2,) and rng_state.dtype == torch.int64
    grads = [torch.empty_like(x) for x in (q, k, v)]
    softmax_d = interface._flash_attn_backward(
        dout, q, k, v, out, lse, *grads, 0.0, 0.25, True, -1, -1, 0.0, None, False, rng_state
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    assert softmax_d.shape == (2, 4, 128)
    torch.testing.assert_close(softmax_d[..., :9], (dout * out).sum(-1).transpose(1, 2))
    assert not softmax_d[..., 9:].any()


def test_private_varlen_functions_round_trip():
    q, k, v = packed_inputs(requires_grad=True)
    expected = flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 7, 7, softmax_scale=0.25, causal=True)
    dout = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (q, k, v), dout)
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse, _, rng_state = interface._flash_attn_varlen_forward(*varlen_arguments(q, k, v))
    grads = [torch.empty_like(x) for x in (q, k, v)]
    softmax_d = interface._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *grads, CU, CU, 7, 7, 0.0, 0.25, True, -1, -1, 0.0, None, False, rng_state
    )
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    assert softmax_d.shape == (4, 12 + 3 * 128)
    d = (dout * out).sum(-1).transpose(0, 1)
    torch.testing.assert_close(softmax_d[:, :5], d[:, :5])  # the first sequence; the second is empty
    torch.testing.assert_close(softmax_d[:, 256 + 5 : 256 + 12], d[:, 5:])


def test_seqused_and_leftpad_of_the_private_function_on_the_oracle():
    q, k, v = packed_inputs()
    used, pad = torch.tensor([4, 0, 6], dtype=torch.int32), torch.tensor([1, 0, 2], dtype=torch.int32)
    with flash_attn.backend("reference"):
        out, *_ = interface._flash_attn_varlen_forward(
            *varlen_arguments(q, k, v), -1, -1, 0.0, None, False, None, pad, used
        )
        for start, stop, first, last in ((0, 5, 1, 4), (5, 12, 7, 11)):
            one = flash_attn.flash_attn_func(
                *(x[None] for x in (q[start:stop], k[first:last], v[first:last])), softmax_scale=0.25, causal=True
            )
            assert torch.equal(out[start:stop], one[0])


@pytest.mark.parametrize("name", NAMES)
def test_shapes_without_memory(name):
    """Fake and meta tensors have the shapes, dtypes and strides that real ones get."""
    inputs, call = packing(name)
    real = call(*inputs, return_attn_probs=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(*[mode.from_tensor(x) for x in inputs], return_attn_probs=True)
    meta = call(*[x.to("meta") for x in inputs], return_attn_probs=True) if "varlen" not in name else fake
    for a, b, c in zip(real, fake, meta, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert (a.shape, a.dtype, a.stride()) == (c.shape, c.dtype, c.stride())


def test_apply_with_upstreams_positional_arguments():
    q, k, v = fixed_inputs(requires_grad=True)
    out = interface.FlashAttnFunc.apply(q, k, v, 0.0, None, True, (-1, -1), 0.0, None, False, False, True)
    assert torch.equal(out, flash_attn.flash_attn_func(q, k, v, causal=True))
    for x, g in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert x.shape == g.shape
    assert not interface.FlashAttnFunc.apply(
        q.detach(), k.detach(), v.detach(), 0.0, None, True, (-1, -1), 0.0, None, False, False, True
    ).requires_grad


def test_gradients_only_where_asked_for():
    q, k, v = fixed_inputs()
    out = flash_attn.flash_attn_func(q, k.requires_grad_(), v)
    out.sum().backward()
    assert q.grad is None and v.grad is None and k.grad.shape == k.shape


def test_parameters_and_checkpointing():
    q, k, v = fixed_inputs()
    weight = torch.nn.Parameter(q)
    out = flash_attn.flash_attn_func(weight, k, v)
    (g,) = torch.autograd.grad(out.sum(), weight)
    again = torch.utils.checkpoint.checkpoint(flash_attn.flash_attn_func, weight, k, v, use_reentrant=False)
    (g2,) = torch.autograd.grad(again.sum(), weight)
    assert torch.equal(out, again) and torch.equal(g, g2)


def test_window_of_tensors():
    q, k, v = fixed_inputs()
    expected = flash_attn.flash_attn_func(q, k, v, window_size=(3, 2))
    assert torch.equal(expected, flash_attn.flash_attn_func(q, k, v, window_size=torch.tensor([3, 2])))
    q.requires_grad_()
    assert torch.equal(expected, flash_attn.flash_attn_func(q, k, v, window_size=torch.tensor([3, 2])))


def test_second_derivatives_are_refused():
    q, k, v = fixed_inputs(requires_grad=True)
    (g,) = torch.autograd.grad(flash_attn.flash_attn_func(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        (g.norm() + q.norm()).backward()  # q.norm() alone could be differentiated


def test_forward_mode_is_refused():
    q, k, v = fixed_inputs()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(RuntimeError, match="forward mode AD"):
            flash_attn.flash_attn_func(dual, k, v)


def dropped_probabilities(q):
    """out is the dropped matrix of probabilities itself: v is the identity."""
    v = torch.eye(q.shape[1])[None, :, None].expand(*q.shape[:3], -1)
    return flash_attn.flash_attn_func(q, q, v, 0.5)


def test_compiled_calls_have_masks_of_their_own():
    torch.compiler.reset()
    compiled = torch.compile(lambda q: dropped_probabilities(q) - dropped_probabilities(q), backend="aot_eager")
    q = torch.randn(1, 20, 2, 8, requires_grad=True)
    assert (compiled(q) != 0).any()


@pytest.mark.parametrize("compiler", [lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")])
def test_checkpoints_repeat_the_mask(compiler):
    torch.compiler.reset()
    q = torch.randn(1, 20, 2, 8)
    v = torch.eye(20)[None, :, None].repeat(1, 1, 2, 1).requires_grad_()

    def step(q, v):
        return torch.utils.checkpoint.checkpoint(
            lambda q, v: flash_attn.flash_attn_func(q, q, v, 0.5), q, v, use_reentrant=False
        )

    p = compiler(step)(q, v)
    dout = torch.randn_like(p)
    (dv,) = torch.autograd.grad(p, v, dout)
    torch.testing.assert_close(dv, torch.einsum("bihj,bihd->bjhd", p.detach(), dout))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_inductor_compiles_gradients(name, dynamic):
    """Gradients are results of their operator: Inductor merges and misplaces what operators write to."""
    torch.compiler.reset()
    inputs, call = packing(name)

    def gradients(call):
        xs = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(call(*xs).square().sum(), xs)

    for got, want in zip(gradients(torch.compile(call, dynamic=dynamic)), gradients(call), strict=True):
        assert torch.equal(got, want)


def test_compiles_with_the_dropout_mask():
    def step(q, k, v):
        return flash_attn.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)

    torch.compiler.reset()
    out, _, S = torch.compile(step, fullgraph=True, backend="aot_eager")(*fixed_inputs())
    assert S.shape == (2, 4, 128, 128) and (S < 0).any() and out.shape == (2, 9, 4, 16)
    out, _, S = flash_attn.flash_attn_func(*fixed_inputs(requires_grad=True), 0.5, return_attn_probs=True)
    assert out.requires_grad and not S.requires_grad
