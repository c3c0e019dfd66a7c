"""diffusers' attention dispatcher on this library: its own native attention in float64 is the measure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, WanTransformer3DModel
from diffusers.models import attention_dispatch as dispatch
from flash_attn.integrations import diffusers as plus
from integrations import test_diffusers as quick

KINDS = ("none", "first", "holes", "full", "added")
TOLERANCE = quick.TOLERANCE


@pytest.fixture(autouse=True)
def enabled():
    plus.enable()
    yield
    plus.disable()


def mask_of(kind: str) -> torch.Tensor | None:
    return None if kind == "none" else quick.masks()[kind]


def native(q, k, v, mask, **options):
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    tensors = [x.detach().double().requires_grad_() for x in (q, k, v)]
    return tensors, dispatch.dispatch_attention_fn(*tensors, mask, backend="native", **options)


def assert_close(got, expected, eps: float = TOLERANCE):
    assert (got.double() - expected).abs().max() <= eps * expected.abs().max()


@pytest.mark.parametrize("backend", plus.BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_mask(kind, backend):
    q, k, v = quick.tensors()
    mask = mask_of(kind)
    out = dispatch.dispatch_attention_fn(q, k, v, mask, scale=0.3, backend=backend)
    tensors, expected = native(q, k, v, mask, scale=0.3)
    dout = torch.randn_like(out)
    assert_close(out, expected)
    truth = torch.autograd.grad(expected, tensors, dout.double())
    for x, y in zip(torch.autograd.grad(out, (q, k, v), dout), truth, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["none", "first", "added"])
def test_16_bits(kind, dtype):
    q, k, v = (x.to(dtype) for x in quick.tensors())
    mask = mask_of(kind)
    mask = mask.to(dtype) if kind == "added" else mask
    out = dispatch.dispatch_attention_fn(q, k, v, mask, backend="flash")
    assert out.dtype == dtype
    assert_close(out, native(q, k, v, mask)[1], 2 * torch.finfo(dtype).eps)


def test_groups_and_lse():
    q, k, v = quick.tensors(nheads_k=2)
    expected = native(q, k, v, mask_of("first"), enable_gqa=True)[1]
    lse = {}
    for backend in plus.BACKENDS:
        options = dict(attention_kwargs=dict(return_lse=True), enable_gqa=True, backend=backend)
        out, lse[backend] = dispatch.dispatch_attention_fn(q, k, v, mask_of("first"), **options)
        assert_close(out, expected)
    assert lse["flash"].shape == (quick.BATCH, quick.NHEADS, quick.SEQLEN_Q)
    assert torch.equal(lse["_flash_3"], lse["flash"].transpose(1, 2))  # as diffusers has it of FlashAttention-3
    got = dispatch.dispatch_attention_fn(q, k, v, attention_kwargs=dict(window_size=(3, 0)), backend="flash")
    assert torch.equal(got, plus.attention(q, k, v, window_size=(3, 0)))


def flux():
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model, dict(
        hidden_states=torch.randn(2, 16, 4), encoder_hidden_states=torch.randn(2, 8, 32),
        pooled_projections=torch.randn(2, 32), img_ids=torch.randn(16, 3), txt_ids=torch.randn(8, 3),
        timestep=torch.tensor([1.0, 0.5]),
    )  # fmt: skip


def qwen_image():
    """Texts of several lengths: a mask of keys, with a hole between the texts and the image."""
    model = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    return model, dict(
        hidden_states=torch.randn(2, 16, 16), encoder_hidden_states=torch.randn(2, 7, 16),
        encoder_hidden_states_mask=mask, timestep=torch.tensor([1.0, 0.5]), img_shapes=[[(1, 4, 4)]] * 2,
    )  # fmt: skip


def wan():
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=64, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    return model, dict(
        hidden_states=torch.randn(2, 4, 2, 8, 8), encoder_hidden_states=torch.randn(2, 6, 16),
        timestep=torch.tensor([1.0, 0.5]),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["flash", "flash_varlen"])
@pytest.mark.parametrize("make", [flux, qwen_image, wan])
def test_models(make, backend, monkeypatch):
    model, arguments = make()
    called = []
    own = plus.attention
    monkeypatch.setattr(plus, "attention", lambda *a, **k: called.append(1) or own(*a, **k))
    results = []
    for name in ("native", backend):
        model.set_attention_backend(name)
        model.zero_grad()
        out = model(**arguments, return_dict=False)[0]
        out.square().mean().backward()
        results.append([out.detach()] + [x.grad for x in model.parameters() if x.grad is not None])
        assert bool(called) == (name == backend)
    scale = max(x.abs().max() for x in results[0][1:])
    assert len(results[0]) == len(results[1]) > 10
    for i, (x, y) in enumerate(zip(*results, strict=True)):
        assert (x - y).abs().max() <= TOLERANCE * (scale if i else x.abs().max())


def test_a_context_compiled():
    def step(q, k, v, mask):
        return dispatch.dispatch_attention_fn(q, k, v, mask, backend=dispatch.AttentionBackendName.FLASH)

    q, k, v = quick.tensors()
    torch.compiler.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for kind in ("none", "first"):
        assert_close(compiled(q, k, v, mask_of(kind)), native(q, k, v, mask_of(kind))[1])
    with dispatch.attention_backend("flash"):
        assert_close(dispatch.dispatch_attention_fn(q, k, v), native(q, k, v, None)[1])


def test_masks_that_do_not_fit():
    q, k, v = quick.tensors()
    with pytest.raises(ValueError, match=r"attn_mask: expected what broadcasts to \(2, 4, 7, 9\), got \(3, 1, 7, 9\)"):
        dispatch.dispatch_attention_fn(q, k, v, torch.ones(3, 7, 9, dtype=torch.bool), backend="flash")


def test_disable_leaves_nothing():
    registry = dispatch._AttentionBackendRegistry
    flash = dispatch.AttentionBackendName.FLASH
    ours = registry._backends[flash]
    assert plus.enable() == plus.BACKENDS and registry._backends[flash] is ours  # twice is once
    plus.disable()
    assert registry._backends[flash] is dispatch._flash_attention
    assert registry._supported_arg_names[flash] >= {"query", "return_lse"} and len(registry._constraints[flash]) == 3
    plus.disable()
    assert not plus._own


def test_over_two_processes():
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).with_name("context_parallel.py")
    subprocess.run([*launch, str(script)], env=dict(os.environ, OMP_NUM_THREADS="1"), check=True, timeout=120)
