"""Names of older versions: flash_attn_triton with a bias and its gradient, version 1's functions and layers."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from flash_attn import flash_attn_interface as interface
from flash_attn import flash_attn_triton, flash_attn_varlen_func
from flash_attn.flash_attention import FlashAttention, FlashMHA
from flash_attn.flash_attn_triton_og import attention as attention_og
from support.formula import attention

from modules.formula import close

pytestmark = pytest.mark.device


def exact(q, k, v, bias, causal, scale):
    s = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        s = s + bias
    if causal:
        s = s.masked_fill(~torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(), -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(7, 7), (5, 9), (9, 5)])
@pytest.mark.parametrize("bias_shape", [None, (1, 4, 1, "k"), (2, 1, "q", "k"), (2, 4, "q", "k")])
def test_bias_and_its_gradient(bias_shape, seqlen_q, seqlen_k, causal):
    q = torch.randn(2, seqlen_q, 4, 16, requires_grad=True)
    k, v = (torch.randn(2, seqlen_k, 4, 16, requires_grad=True) for _ in range(2))
    inputs, bias = [q, k, v], None
    if bias_shape is not None:
        bias = torch.randn([{"q": seqlen_q, "k": seqlen_k}.get(n, n) for n in bias_shape], requires_grad=True)
        inputs.append(bias)
    out = flash_attn_triton.flash_attn_func(q, k, v, bias, causal, 0.3)
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    reference = exact(*leaves, *[None] * (4 - len(leaves)), causal, 0.3)
    close(out, reference)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(reference, leaves, dout.double())
    for a, b in zip(torch.autograd.grad(out, inputs, dout), expected, strict=True):
        close(a, b, bound=1e-5)
    # The two functions that the classes were made of.
    o, lse, scale = flash_attn_triton._flash_attn_forward(q, k, v, bias, causal, 0.3)
    gradients = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    flash_attn_triton._flash_attn_backward(dout, q, k, v, o, lse, *gradients, bias, causal, scale)
    assert lse.shape == (2, 4, 128) and scale == 0.3
    for a, b in zip((o, *gradients), (reference, *expected[:3]), strict=True):
        close(a, b, bound=1e-5)


def test_packed_and_classes():
    qkv, bias = torch.randn(2, 7, 3, 4, 16), torch.randn(1, 4, 7, 7)
    q, k, v = qkv.unbind(2)
    expected = exact(q.double(), k.double(), v.double(), bias, True, None)
    for out in (
        flash_attn_triton.flash_attn_qkvpacked_func(qkv, bias, True),
        flash_attn_triton.flash_attn_kvpacked_func(q, qkv[:, :, 1:], bias, True),
        flash_attn_triton.FlashAttnFunc.apply(q, k, v, bias, True),
        flash_attn_triton.FlashAttnKVPackedFunc.apply(q, qkv[:, :, 1:], bias, True),
        flash_attn_triton.FlashAttnQKVPackedFunc.apply(qkv, bias, True),
    ):
        close(out, expected)
    out = attention_og(*(x.transpose(1, 2) for x in (q, k, v)), 0.2)
    close(out, exact(q.double(), k.double(), v.double(), None, True, 0.2).transpose(1, 2))


@pytest.mark.parametrize("name", ["flash_blocksparse_attention", "flash_blocksparse_attn_interface"])
def test_block_sparse_is_refused_in_words(name):
    with pytest.raises(ImportError, match="not served.*Use flash_attn_func"):
        importlib.import_module(f"flash_attn.{name}")


LENGTHS = [5, 0, 7, 2]


def packed():
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return torch.randn(sum(LENGTHS), 3, 4, 16), cu_seqlens, max(LENGTHS)


@pytest.mark.parametrize("causal", [False, True])
def test_unpadded_functions(causal):
    qkv, cu, longest = packed()
    q, k, v = qkv.unbind(1)
    expected, lse, _ = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=causal, return_attn_probs=True)
    tail = (0.0, None, causal)
    assert interface.flash_attn_unpadded_func(q, k, v, cu, cu, longest, longest, *tail).equal(expected)
    assert interface.flash_attn_unpadded_kvpacked_func(q, qkv[:, 1:], cu, cu, longest, longest, *tail).equal(expected)
    assert interface.flash_attn_unpadded_qkvpacked_split_func(qkv, cu, 5, 7, 1, *tail).equal(expected)
    out, padded, _ = interface.flash_attn_unpadded_qkvpacked_func(qkv, cu, longest, *tail, True)
    assert out.equal(expected) and padded.shape == (4, 4, longest)
    for b, n in enumerate(LENGTHS):
        assert padded[b, :, :n].equal(lse[:, cu[b] : cu[b] + n]) and padded[b, :, n:].eq(torch.inf).all()


def test_version_1_aligned_top_left():
    q, k = torch.randn(5, 2, 8), torch.randn(9, 2, 8)
    cu, cu_k = torch.tensor([0, 5]).int(), torch.tensor([0, 9]).int()
    with pytest.raises(NotImplementedError, match="aligns top-left"):
        interface.flash_attn_unpadded_func(q, k, k, cu, cu_k, 5, 9, 0.0, causal=True)
    assert interface.flash_attn_unpadded_func(q, k, k, cu, cu_k, 5, 9, 0.0).shape == q.shape


def test_version_1_layers():
    layer = FlashMHA(32, 4, causal=True)
    x, lengths = torch.randn(3, 8, 32), torch.tensor([8, 3, 1])
    mask = torch.arange(8) < lengths[:, None]
    out, weights = layer(x)
    qkv = layer.Wqkv(x).double().unflatten(-1, (3, 4, 8))
    context, _ = attention(*qkv.unbind(2), torch.float64, causal=True)
    close(out, context.flatten(-2) @ layer.out_proj.weight.double().T + layer.out_proj.bias.double())
    masked, _ = layer(x, key_padding_mask=mask)
    assert weights is None
    for row, n in enumerate(lengths.tolist()):
        close(masked[row, :n], out[row, :n].double(), bound=1e-6)  # causal: what follows was not seen before, either
    qkv, cu, longest = packed()
    alone, _ = FlashAttention()(qkv[:5][None])
    close(FlashAttention()(qkv, cu_seqlens=cu, max_s=longest)[0][:5], alone[0].double(), bound=1e-6)
    with pytest.raises(NotImplementedError, match="need_weights"):
        layer(x, need_weights=True)
    with pytest.raises(ValueError, match="expected max_s"):
        FlashAttention()(qkv, cu_seqlens=cu)


@pytest.mark.parametrize("name", ["_flash_attn_forward", "_flash_attn_varlen_forward", "_flash_attn_backward",
                                  "_flash_attn_varlen_backward"])  # fmt: skip
def test_fakes_have_the_shapes_of_the_functions(name):
    function, fake = getattr(interface, name), getattr(interface, f"{name}_fake")
    assert inspect.signature(fake) == inspect.signature(function)
    varlen, backward = "varlen" in name, "backward" in name
    cu = torch.tensor([0, 3, 7]).int()
    q = torch.randn(*([7] if varlen else [2, 7]), 4, 16)
    where = [cu, cu, 4, 4] if varlen else []
    if backward:
        out, lse, _, _ = getattr(interface, name.replace("backward", "forward"))(
            q, q, q, *where, 0.0, 0.25, False, -1, -1, 0.0, None, False
        )
        call = [q, q, q, q, out, lse, *(torch.empty_like(q) for _ in range(3)), *where, 0.0, 0.25, False, -1, -1, 0.0]
        call += [None, False]
    else:
        call = [q, q, q, *where, 0.1, 0.25, False, -1, -1, 0.0, None, True]
    real, shapes = function(*call), fake(*call)
    real, shapes = ((real,), (shapes,)) if backward else (real, shapes)
    assert [(x.shape, x.dtype) for x in real] == [(x.shape, x.dtype) for x in shapes]
