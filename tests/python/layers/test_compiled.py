"""In one graph of torch.compile, forward and backward: the results of eager mode."""

from __future__ import annotations

import pytest
import torch
from flash_attn import bert_padding
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb, apply_rotary_emb_kv_, apply_rotary_emb_qkv_
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.activations import bias_gelu_impl, fast_gelu_impl, swiglu
from flash_attn.ops.fused_dense import FusedMLP
from flash_attn.ops.layer_norm import dropout_add_layer_norm
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn, layer_norm_linear_fn, rms_norm_fn

from layers.judge import run

pytestmark = pytest.mark.device

COS, SIN = (torch.rand(9, 4) for _ in range(2))
OFFSETS = torch.tensor([0, 2, 1])
CU_SEQLENS = torch.tensor([0, 5, 12], dtype=torch.int32)
LABELS = torch.tensor([0, -100, 3, 1])
W, B, W1 = torch.rand(3, 8).unbind()
ROTARY, NORM, MLP = RotaryEmbedding(8), RMSNorm(8), FusedMLP(8, checkpoint_lvl=1)
CASES = {
    "rotary": (lambda x: apply_rotary_emb(x * 1, COS, SIN, seqlen_offsets=2), (3, 5, 2, 8)),
    "rotary, interleaved": (lambda x: apply_rotary_emb(x * 1, COS, SIN, True), (3, 5, 2, 8)),
    "rotary, in place": (lambda x: apply_rotary_emb(x * 1, COS, SIN, inplace=True), (3, 5, 2, 8)),
    "rotary, offsets": (lambda x: apply_rotary_emb(x * 1, COS, SIN, seqlen_offsets=OFFSETS), (3, 5, 2, 8)),
    "rotary, packed": (
        lambda x: apply_rotary_emb(x * 1, COS, SIN, cu_seqlens=CU_SEQLENS, max_seqlen=7),
        (12, 2, 8),
    ),
    "qkv": (lambda x: apply_rotary_emb_qkv_(x * 1, COS, SIN), (3, 5, 3, 2, 8)),
    "qkv, grouped": (lambda x: apply_rotary_emb_qkv_(x * 1, COS, SIN, num_heads_q=4), (3, 5, 8, 8)),
    "kv": (lambda x: apply_rotary_emb_kv_(x * 1, COS, SIN, True), (3, 5, 2, 2, 8)),
    "rotary module": (lambda x: ROTARY(x * 1), (3, 5, 3, 2, 8)),
    "cross entropy": (
        lambda x: CrossEntropyLoss(label_smoothing=0.1, lse_square_scale=0.1, inplace_backward=True)(x * 1, LABELS),
        (4, 7),
    ),
    "rms norm": (lambda x: rms_norm_fn(x, W, None, residual=x * 2, prenorm=True), (3, 5, 8)),
    "layer norm": (lambda x: layer_norm_fn(x, W, B, x1=x * 2, weight1=W1), (3, 5, 8)),
    "norm module": (lambda x: NORM(x), (3, 5, 8)),
    "linear of a norm": (lambda x: layer_norm_linear_fn(x, W, B, W[None], None), (3, 5, 8)),
    "dropout_add": (lambda x: dropout_add_layer_norm(x, x, W, B, 0.0, 1e-5, layerscale=W1, prenorm=True), (3, 5, 8)),
    "swiglu": (lambda x: swiglu(x, x + 1), (3, 8)),
    "bias gelu": (lambda x: bias_gelu_impl(x, B), (3, 8)),
    "fast gelu": (lambda x: fast_gelu_impl(x * 1), (3, 8)),
    "mlp": (lambda x: MLP(x.float()), (3, 8)),
    "rows of": (lambda x: bert_padding.index_first_axis(x * 1, LABELS.clamp(0)), (4, 7)),
    "rows put": (lambda x: bert_padding.index_put_first_axis(x * 1, OFFSETS, 4), (3, 7)),
    "rows of, residual": (lambda x: bert_padding.index_first_axis_residual(x * 1, OFFSETS), (3, 7)),
    "padded": (lambda x: bert_padding.pad_input(x * 1, OFFSETS, 2, 3), (3, 7)),
}


BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_one_graph(case, dtype):
    function, shape = CASES[case]
    torch.compiler.reset()
    given = {"x": torch.randn(shape, requires_grad=True, dtype=dtype)}
    douts = [torch.randn_like(y) for y in run(function, given)[0]]
    outs, grads = run(function, given, douts)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for a, b in zip(outs + [grads["x"]], [*(got := run(compiled, given, douts))[0], got[1]["x"]], strict=True):
        torch.testing.assert_close(a, b, rtol=BOUND[dtype], atol=BOUND[dtype])


def test_in_place_writes_back():
    """The argument's own memory, where the caller looks at it."""
    torch.compiler.reset()
    x = torch.randn(3, 5, 2, 8)
    expected = apply_rotary_emb(x, COS, SIN)
    compiled = torch.compile(lambda x: apply_rotary_emb(x, COS, SIN, inplace=True), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-6) and torch.allclose(x, expected, atol=1e-6)


def test_dropout():
    torch.compiler.reset()
    ones = torch.ones(8)
    compiled = torch.compile(
        lambda x: rms_norm_fn(x, ones, None, dropout_p=0.3, prenorm=True, return_dropout_mask=True),
        backend="aot_eager",
        fullgraph=True,
    )
    x = torch.ones(100, 8, requires_grad=True)
    _, h, mask, mask1 = compiled(x)
    assert mask1 is None and torch.allclose(h, mask / 0.7) and 0.55 < float(mask.float().mean()) < 0.85
    (g,) = torch.autograd.grad(h.sum(), x)
    assert torch.allclose(g, mask / 0.7)
