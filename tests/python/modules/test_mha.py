"""MHA against its definition in float64, values and gradients; packed, padded, and from a KV cache."""

from __future__ import annotations

import math

import pytest
import torch
from flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    LinearResidual,
    SelfAttention,
    get_alibi_slopes,
)
from flash_attn.utils.generation import InferenceParams

from modules.formula import close, mha

pytestmark = pytest.mark.device

ROTARY = dict(rotary_emb_dim=8, rotary_emb_base=100.0)
CASES = {
    "plain": {},
    "flash": dict(use_flash_attn=True),
    "causal": dict(causal=True),
    "no bias, scale": dict(qkv_proj_bias=False, out_proj_bias=False, softmax_scale=0.5),
    "gqa": dict(num_heads_kv=2, causal=True, use_flash_attn=True),
    "mqa": dict(num_heads_kv=1),
    "rotary": dict(**ROTARY, causal=True, use_flash_attn=True),
    "rotary pairs": dict(**ROTARY, rotary_emb_interleaved=True),
    "rotary gqa": dict(rotary_emb_dim=4, num_heads_kv=2, causal=True),
    "alibi": dict(use_alibi=True, causal=True, use_flash_attn=True),
    "window": dict(window_size=(3, 2), use_flash_attn=True),
    "causal window gqa": dict(window_size=(3, 0), causal=True, num_heads_kv=2, use_flash_attn=True),
    "dwconv": dict(dwconv=True, causal=True),
    "dwconv gqa": dict(dwconv=True, num_heads_kv=2, use_flash_attn=True),
    "residual": dict(return_residual=True),
    "fused residual": dict(return_residual=True, fused_bias_fc=True, use_flash_attn=True),
    "checkpointing": dict(checkpointing=True, use_flash_attn=True, **ROTARY),
    "cross": dict(cross_attn=True),
    "cross causal gqa": dict(cross_attn=True, causal=True, num_heads_kv=2, use_flash_attn=True),
    "cross residual": dict(cross_attn=True, return_residual=True),
}


def exact(layer, x, x_kv=None, **options):
    """-> the result and the gradients of x, x_kv and the weights, in float64."""
    weights = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    inputs = [t.detach().double().requires_grad_() for t in (x, x_kv) if t is not None]
    out = mha(layer, weights, *inputs, **options)
    return out, inputs + list(weights.values())


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    options = CASES[case]
    layer = MHA(32, 4, **options)
    x = torch.randn(2, 9, 32, requires_grad=True)
    x_kv = torch.randn(2, 13, 32, requires_grad=True) if layer.cross_attn else None
    inputs = [t for t in (x, x_kv) if t is not None]
    slopes = torch.tensor(get_alibi_slopes(4)) if options.get("use_alibi") else None
    reference, leaves = exact(layer, x, x_kv, slopes=slopes, softmax_scale=options.get("softmax_scale"),
                              window_size=options.get("window_size", (-1, -1)))  # fmt: skip
    out = layer(x, x_kv) if layer.cross_attn else layer(x)
    if layer.return_residual:
        out, residual = out
        assert residual is x
    close(out, reference)
    dout = torch.randn_like(out)
    names = ["x", "x_kv"][: len(inputs)] + [n for n, _ in layer.named_parameters()]
    ours = torch.autograd.grad(out, [*inputs, *layer.parameters()], dout)
    for name, a, b in zip(names, ours, torch.autograd.grad(reference, leaves, dout.double()), strict=True):
        close(a, b, name, 8e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    layer = MHA(64, 4, num_heads_kv=2, causal=True, use_flash_attn=True, use_alibi=True, dtype=dtype, **ROTARY)
    x = torch.randn(2, 20, 64, dtype=dtype)
    reference, _ = exact(layer, x, slopes=torch.tensor(get_alibi_slopes(4)))
    close(layer(x), reference, bound=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("options", [{}, dict(num_heads_kv=2), ROTARY, dict(**ROTARY, rotary_emb_scale_base=32),
                                     dict(num_heads_kv=2, rotary_emb_interleaved=True, **ROTARY),
                                     dict(use_alibi=True, window_size=(2, 0))])  # fmt: skip
def test_packed_sequences_are_their_own(options):
    layer = MHA(32, 4, causal=True, use_flash_attn=True, **options)
    lengths = [5, 1, 0, 7]
    x = torch.randn(sum(lengths), 32, requires_grad=True)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    out = layer(x, cu_seqlens=cu_seqlens, max_seqlen=max(lengths))
    alone = torch.cat([layer(part[None])[0] for part in x.split(lengths) if len(part)])
    close(out, alone.double(), bound=2e-6)
    dout = torch.randn_like(out)
    wanted = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, wanted, dout) for y in (out, alone)), strict=True):
        close(a, b.double(), bound=4e-6)


def test_packed_cross_attention():
    layer = MHA(32, 4, cross_attn=True, use_flash_attn=True)
    x, x_kv = torch.randn(7, 32), torch.randn(11, 32)
    cu, cu_k = torch.tensor([0, 3, 7]).int(), torch.tensor([0, 9, 11]).int()
    out = layer(x, x_kv, cu_seqlens=cu, max_seqlen=4, cu_seqlens_k=cu_k, max_seqlen_k=9)
    alone = [layer(a[None], b[None])[0] for a, b in zip(x.split([3, 4]), x_kv.split([9, 2]), strict=True)]
    close(out, torch.cat(alone).double(), bound=2e-6)


@pytest.mark.parametrize("num_heads_kv", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_mask_drops_keys(causal, num_heads_kv):
    layer = MHA(32, 4, num_heads_kv=num_heads_kv, causal=causal)
    x, lengths = torch.randn(3, 8, 32), [8, 3, 1]
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    out = layer(x, key_padding_mask=mask)
    for row, n in enumerate(lengths):
        if causal and num_heads_kv == 2:  # as CrossAttention: the last of 8 queries stands at the last of n keys
            queries = out[row, 8 - n :]
            q_layer = layer.inner_cross_attn
            qkv = layer.Wqkv(x[row : row + 1]).unflatten(-1, (8, 8))
            q, kv = qkv[:, 8 - n :, :4], qkv[:, :n, 4:].unflatten(-2, (2, 2))
            expected = layer.out_proj(q_layer(q, kv).flatten(-2))[0]
        else:
            queries, expected = out[row, :n], layer(x[row : row + 1, :n])[0]
        close(queries, expected.double(), bound=2e-6)


def test_mixer_subset_asks_from_some_positions():
    layer = MHA(32, 4, cross_attn=True)
    x = torch.randn(2, 9, 32)
    close(layer(x, mixer_subset=slice(0, 2)), layer(x)[:, :2].double(), bound=2e-6)


CACHED = {
    "plain": {},
    "flash": dict(use_flash_attn=True),
    "rotary": dict(**ROTARY, use_flash_attn=True),
    "xpos": dict(**ROTARY, rotary_emb_scale_base=32, use_flash_attn=True),
    "rotary gqa pairs": dict(**ROTARY, num_heads_kv=2, rotary_emb_interleaved=True),
    "alibi": dict(use_alibi=True, use_flash_attn=True),
    "window gqa": dict(window_size=(4, 0), num_heads_kv=2, use_flash_attn=True),
}


@pytest.mark.parametrize("steps", [[1] * 12, [5, 1, 1, 3, 1, 1]], ids=["one by one", "prompt, then some"])
@pytest.mark.parametrize("case", CACHED)
def test_decoding_is_the_full_forward(case, steps):
    layer = MHA(32, 4, causal=True, layer_idx=3, **CACHED[case]).eval()
    x = torch.randn(2, 12, 32)
    params = InferenceParams(max_seqlen=14, max_batch_size=3, batch_size_offset=1)
    outs = []
    with torch.no_grad():
        for part in x.split(steps, dim=1):
            outs.append(layer(part, inference_params=params))
            params.seqlen_offset += part.shape[1]
        full = layer(x)
    assert params.key_value_memory_dict[3].shape == layer.allocate_inference_cache(3, 14).shape
    close(torch.cat(outs, dim=1), full.double(), bound=4e-6)


def test_each_row_at_its_own_position():
    layer = MHA(32, 4, causal=True, layer_idx=0, use_flash_attn=True, **ROTARY).eval()
    lengths = [7, 3]
    x = torch.randn(2, 8, 32)
    cache = layer.allocate_inference_cache(2, 10)
    with torch.no_grad():
        for row, n in enumerate(lengths):  # each prompt on its own, into its row
            params = InferenceParams(10, 2, batch_size_offset=row, key_value_memory_dict={0: cache})
            layer(x[row : row + 1, :n], inference_params=params)
        params = InferenceParams(10, 2, seqlen_offset=1, key_value_memory_dict={0: cache})
        params.lengths_per_sample = torch.tensor(lengths, dtype=torch.int32)
        new = torch.stack([x[row, n] for row, n in enumerate(lengths)])[:, None]
        out = layer(new, inference_params=params)
        for row, n in enumerate(lengths):
            close(out[row], layer(x[row : row + 1, : n + 1])[0, -1:].double(), bound=4e-6)


def test_dropout_is_in_training_only():
    for layer in (MHA(32, 4, dropout=0.5), MHA(32, 4, dropout=0.5, use_flash_attn=True, checkpointing=True)):
        x = torch.randn(2, 9, 32, requires_grad=True)
        assert not layer(x).equal(layer(x))
        state = torch.get_rng_state()
        torch.manual_seed(7)
        out = layer(x)
        (g,) = torch.autograd.grad(out, x, torch.ones_like(out))
        torch.manual_seed(7)
        again = layer(x)
        assert again.equal(out) and torch.autograd.grad(again, x, torch.ones_like(out))[0].equal(g)
        torch.set_rng_state(state)
        layer.eval()
        assert layer(x).equal(layer(x))


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 5),
    reason="Dynamo of torch 2.4 cannot ask what a layer computed for requires_grad",
)
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_whole(packed):
    layer = MHA(32, 4, num_heads_kv=2, causal=True, use_flash_attn=True, use_alibi=True, **ROTARY)
    x = torch.randn(9, 32, requires_grad=True)
    where = dict(cu_seqlens=torch.tensor([0, 4, 9]).int(), max_seqlen=5) if packed else {}
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    outs = [f(x if packed else x[None], **where) for f in (compiled, layer)]
    close(outs[0], outs[1].double(), bound=1e-6)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
    close(grads[0], grads[1].double(), bound=4e-6)


def test_inner_attention():
    qkv = torch.randn(2, 6, 3, 4, 8)
    q, kv = qkv[:, :, 0], qkv[:, :, 1:]
    one = FlashSelfAttention(causal=True)(qkv)
    for other in (SelfAttention(causal=True)(qkv), FlashCrossAttention()(q, kv, causal=True),
                  CrossAttention(causal=True)(q, kv)):  # fmt: skip
        close(other, one.double(), bound=1e-6)
    nothing = torch.zeros(2, 6, dtype=torch.bool)
    assert SelfAttention()(qkv, key_padding_mask=nothing).eq(0).all()
    y, x = LinearResidual(8, 3)(q)
    assert x is q and y.shape == (2, 6, 4, 3)


def test_alibi_slopes_are_those_of_the_paper():
    assert get_alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert get_alibi_slopes(1) == [2.0**-8]
    more = get_alibi_slopes(12)
    assert more[:8] == get_alibi_slopes(8) and more[8:] == [2.0 ** -(i + 0.5) for i in range(4)]
    assert all(0 < s < 1 and math.isfinite(s) for n in range(1, 40) for s in get_alibi_slopes(n))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: MHA(33, 4), "embed_dim: expected a multiple of num_heads = 4, got 33"),
        (lambda: MHA(32, 4, num_heads_kv=3), "num_heads: expected a multiple of num_heads_kv = 3"),
        (lambda: MHA(32, 4, use_alibi=True), "use_flash_attn: expected True"),
        (lambda: MHA(32, 4, cross_attn=True, rotary_emb_dim=8), "rotary_emb_dim: positions"),
        (lambda: MHA(32, 4)(torch.randn(3, 32), cu_seqlens=torch.tensor([0, 3])), "max_seqlen: expected"),
        (lambda: MHA(32, 4)(torch.randn(3, 32), cu_seqlens=torch.tensor([0, 3]), max_seqlen=3), "use_flash_attn=True"),
        (
            lambda: MHA(32, 4, use_flash_attn=True)(torch.randn(1, 3, 32), key_padding_mask=torch.ones(1, 3).bool()),
            "bert_padding.unpad_input",
        ),
        (lambda: MHA(32, 4)(torch.randn(1, 3, 32), key_padding_mask=torch.ones(1, 3)), "key_padding_mask: expected"),
        (lambda: MHA(32, 4)(torch.randn(1, 3, 32), x_kv=torch.randn(1, 3, 32)), "need cross_attn=True"),
        (lambda: MHA(32, 4)(torch.randn(1, 3, 32), inference_params=InferenceParams(4, 1)), "layer_idx: expected"),
        (
            lambda: MHA(32, 4, layer_idx=0)(torch.randn(2, 3, 32), inference_params=InferenceParams(3, 1)),
            r"room for \(1, 3\) .* at least \(2, 3\)",
        ),
        (
            lambda: MHA(32, 4, layer_idx=0)(torch.randn(1, 3, 32), inference_params=InferenceParams(2, 1)),
            r"room for \(1, 2\) .* at least \(1, 3\)",
        ),
    ],
)
def test_refuses_in_words(make, words):
    with pytest.raises((ValueError, NotImplementedError), match=words):
        make()
