"""Linear layers, MLPs, activations and patches against their formulas in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from flash_attn.layers.patch_embed import PatchEmbed
from flash_attn.ops import activations
from flash_attn.ops.fused_dense import (
    FusedDense,
    FusedDenseFunc,
    FusedMLP,
    FusedMLPFunc,
    fused_dense_func,
    fused_mlp_func,
)
from flash_attn.ops.triton import k_activations
from flash_attn.ops.triton.linear import triton_dgrad_act, triton_linear_act
from flash_attn.ops.triton.mlp import FusedDenseSqreluDense, FusedDenseSqreluDenseFunc
from support import device
from torch.autograd.graph import saved_tensors_hooks

from layers.judge import DTYPES, judge


def gelu_approx(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def squared_relu(x):
    return x.clamp(min=0) ** 2


pytestmark = pytest.mark.device

FORMULAS = {"gelu_approx": gelu_approx, "relu": lambda x: x.clamp(min=0), "sqrelu": squared_relu}


def tensor(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype):
    columns = 64
    x, y, bias = tensor(9, columns, dtype=dtype), tensor(9, columns, dtype=dtype), tensor(columns, dtype=dtype)
    judge(lambda x, y: activations.swiglu(x, y), lambda x, y: x / (1 + torch.exp(-x)) * y, {"x": x, "y": y}, terms=2)
    with pytest.raises(ValueError, match="y: expected x's shape"):
        activations.swiglu(x, y[:3])
    judge(lambda x, y: activations.bias_gelu_impl(x, y), lambda x, y: gelu_approx(x + y), {"x": x, "y": bias}, terms=4)
    judge(lambda x: activations.fast_gelu_impl(x), gelu_approx, {"x": x}, terms=4)
    judge(activations.sqrelu_fwd, squared_relu, {"x": x}, terms=1)


def test_second_derivatives_of_activations():
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(activations.bias_gelu_impl, (x, bias))
    (dx,) = torch.autograd.grad(activations.swiglu(x, y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):  # right or not at all
        dx.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_activations(dtype):
    """The functions g, x -> dx against the derivative in float64."""
    g, x = torch.randn(500).to(dtype), (2 * torch.randn(500)).to(dtype)
    for backward, formula in (
        (activations.gelu_bwd, gelu_approx),
        (activations.relu_bwd, FORMULAS["relu"]),
        (activations.sqrelu_bwd, squared_relu),
    ):
        wide = x.double().requires_grad_()
        (exact,) = torch.autograd.grad(formula(wide), wide, g.double())
        got = backward(g, x)
        assert got.dtype == dtype
        assert float((got - exact).abs().max()) <= torch.finfo(dtype).eps * 4 * float(exact.abs().max())


@pytest.mark.parametrize("activation", list(k_activations.Activation))
def test_derivatives_by_name(activation):
    formulas = {
        "squared_relu": squared_relu,
        "gelu": gelu,
        "gelu_approx": gelu_approx,
        "leaky_relu": lambda x: torch.where(x >= 0, x, 0.01 * x),
        "relu": FORMULAS["relu"],
    }
    x = (2 * torch.randn(200, dtype=torch.float64)).requires_grad_()
    y = formulas[activation.value](x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(k_activations.get_triton_activation_kernel(activation)(x), y, rtol=0, atol=1e-12)
    assert torch.allclose(
        k_activations.get_triton_activation_bwd_kernel(activation.value)(x), slope, rtol=0, atol=1e-12
    )
    assert (
        k_activations.get_triton_activation_kernel(None) is k_activations.get_triton_activation_bwd_kernel(None) is None
    )


@pytest.mark.parametrize("activation", ["id", "gelu", "gelu_approx", "squared_relu"])
def test_linear_with_an_activation(activation):
    formula = {"id": lambda x: x, "gelu": gelu, "gelu_approx": gelu_approx, "squared_relu": squared_relu}[activation]
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 8), (5, 8), (5,)))
    pre = x @ weight.t() + bias
    out, act_input = triton_linear_act(x, weight, bias, activation, save_act_input=True)
    assert torch.allclose(act_input, pre) and torch.allclose(out, formula(pre))
    assert torch.allclose(triton_linear_act(x, weight, activation=activation), formula(x @ weight.t()))
    before = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad((F.linear(formula(before), weight) * pre).sum(), before)
    assert torch.allclose(triton_dgrad_act(pre, weight, activation, before.detach()), exact)
    with pytest.raises(ValueError, match="activation: expected one of"):
        triton_linear_act(x, weight, activation="relu")
    if activation != "id":
        with pytest.raises(ValueError, match="act_input: expected"):
            triton_dgrad_act(pre, weight, activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense(dtype):
    for bias in (False, True):
        given = {"x": tensor(2, 5, 32, dtype=dtype), "weight": tensor(16, 32, dtype=dtype)}
        given["bias"] = tensor(16, dtype=dtype) if bias else None
        judge(
            lambda **t: fused_dense_func(**t, return_residual=True),
            lambda x, weight, bias: (F.linear(x, weight, bias), x),
            given,
            terms=1,
        )
    module = FusedDense(32, 16, return_residual=True, dtype=dtype)
    out, x = module(given["x"])
    assert x is given["x"] and torch.equal(out, F.linear(x, module.weight, module.bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", FORMULAS)
def test_mlp(dtype, activation):
    for level, bias in itertools.product((0, 1, 2), (False, True)):
        given = {"x": tensor(7, 16, dtype=dtype), "weight1": tensor(32, 16, dtype=dtype)}
        given |= {"weight2": tensor(8, 32, dtype=dtype)}
        given |= {f"bias{i}": tensor(n, dtype=dtype) if bias else None for i, n in ((1, 32), (2, 8))}
        judge(
            lambda lvl=level, **t: fused_mlp_func(**t, activation=activation, checkpoint_lvl=lvl),
            lambda x, weight1, weight2, bias1, bias2: F.linear(
                FORMULAS[activation](F.linear(x, weight1, bias1)), weight2, bias2
            ),
            given,
            terms=2,
            luck=2,  # the same products, and roundings of the activation elsewhere
        )


def test_what_an_mlp_keeps():
    """Levels 1 and 2 keep fewer tensors of the hidden size."""
    sizes = {}
    for level, save in ((0, True), (1, True), (2, True), (0, False)):
        x, w1, w2 = tensor(6, 8), tensor(50, 8), tensor(4, 50)
        kept = []
        with saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.shape), t)[1], lambda t: t):
            fused_mlp_func(x, w1, w2, checkpoint_lvl=level, save_pre_act=save)
        sizes[level, save] = kept.count(torch.Size([6, 50]))
    assert sizes == {(0, True): 2, (1, True): 1, (2, True): 0, (0, False): 0}


def test_mlp_modules():
    mlp = FusedMLP(8, 24, activation="sqrelu", return_residual=True, bias2=False)
    x = torch.randn(3, 8)
    out, same = mlp(x)
    assert same is x and mlp.fc2.bias is None
    assert torch.allclose(out, mlp.fc2(squared_relu(mlp.fc1(x))), atol=1e-6)
    given = x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, None
    assert torch.equal(FusedMLPFunc.apply(*given, "sqrelu"), out)
    assert torch.equal(FusedDenseSqreluDenseFunc.apply(*given), out)
    assert torch.equal(FusedDenseFunc.apply(x, mlp.fc1.weight, mlp.fc1.bias), mlp.fc1(x))
    assert FusedMLP(8).fc1.weight.shape == (32, 8) and FusedMLP(8, out_features=5).fc2.weight.shape == (5, 32)
    old = FusedDenseSqreluDense(8)
    assert torch.allclose(old(x), old.fc2(squared_relu(old.fc1(x))), atol=1e-6)
    with pytest.raises(NotImplementedError, match="both biases"):
        FusedDenseSqreluDense(8, bias1=False)
    for wrong, words in (
        (dict(activation="tanh"), "activation"),
        (dict(checkpoint_lvl=3), "checkpoint_lvl"),
        (dict(heuristic=7), "heuristic"),
    ):
        with pytest.raises(ValueError, match=f"{words}: expected"):
            FusedMLP(8, **wrong)


def test_autocast():
    mlp, x = FusedMLP(8), torch.randn(3, 8)
    with torch.autocast(torch.device(device.DEVICE).type, torch.bfloat16):
        assert mlp(x).dtype == torch.bfloat16 and FusedDense(8, 8)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("flatten", [True, False])
def test_patches_are_a_convolution(flatten):
    embed = PatchEmbed((12, 8), (4, 2), in_chans=3, embed_dim=5, flatten=flatten, fused_bias_fc=flatten).double()
    assert embed.grid_size == (3, 4) and embed.num_patches == 12
    x = torch.randn(2, 3, 12, 8, dtype=torch.float64)
    expected = F.conv2d(x, embed.proj.weight.view(5, 3, 4, 2), embed.proj.bias, stride=(4, 2)).permute(0, 2, 3, 1)
    assert torch.allclose(embed(x), expected.flatten(1, 2) if flatten else expected)
    assert isinstance(PatchEmbed(8, 4, norm_layer=torch.nn.LayerNorm).norm, torch.nn.LayerNorm)
    with pytest.raises(ValueError, match=r"x: expected images of \(12, 8\)"):
        embed(x[:, :, :8])
    with pytest.raises(ValueError, match="img_size: expected a multiple"):
        PatchEmbed(10, 4)
