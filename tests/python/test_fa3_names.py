"""What callers of FlashAttention-3 inspect and import: modules, signatures, operators' schemas."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import flash_attn_interface as interface
import pytest
import torch
from flash_attn_config import CONFIG

DESCALES = "q_descale=None, k_descale=None, v_descale=None"
TAIL = (
    f"qv=None, {DESCALES}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, "
    "deterministic=False, sm_margin=0"
)
CACHE_TAIL = "num_splits=0, pack_gqa=None, sm_margin=0"
SIGNATURES = {
    "flash_attn_func": f"(q, k, v, softmax_scale=None, causal=False, {TAIL}, return_attn_probs=False)",
    "flash_attn_varlen_func": (
        "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, "
        f"softmax_scale=None, causal=False, {TAIL}, return_attn_probs=False)"
    ),
    "flash_attn_qkvpacked_func": (
        f"(qkv, softmax_scale=None, causal=False, {DESCALES}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
        "deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False)"
    ),
    "flash_attn_with_kvcache": (
        "(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
        f"max_seqlen_q=None, rotary_seqlens=None, {DESCALES}, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, "
        f"{CACHE_TAIL}, return_softmax_lse=False)"
    ),
    "flash_attn_combine": "(out_partial, lse_partial, out=None, out_dtype=None)",
    "get_scheduler_metadata": (
        "(batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, "
        "qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None, "
        "page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, "
        f"has_softcap=False, {CACHE_TAIL})"
    ),
    "_flash_attn_forward": (
        "(q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, "
        "cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, "
        "page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, "
        f"{DESCALES}, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, "
        "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, "
        "pack_gqa=None, sm_margin=0)"
    ),
    "_flash_attn_backward": (
        "(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None, "
        "max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, "
        "window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0)"
    ),
}
APPLY_TAIL = TAIL.removeprefix("qv=None, ") + ", return_softmax=False)"
APPLY = {
    "FlashAttnFunc": f"(ctx, q, k, v, softmax_scale, causal, qv=None, {APPLY_TAIL}",
    "FlashAttnVarlenFunc": (
        "(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, softmax_scale, "
        f"causal, qv=None, {APPLY_TAIL}"
    ),
    "FlashAttnQKVPackedFunc": (
        f"(ctx, qkv, softmax_scale, causal, {DESCALES}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
        "deterministic=False, num_heads_q=None, sm_margin=0, return_softmax=False)"
    ),
}
# Names and defaults of upstream's, by position.
SCHEMAS = {
    "fwd": (
        "q, k, v, k_new=None, v_new=None, q_v=None, out=None, cu_seqlens_q=None, cu_seqlens_k=None, "
        "cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, "
        "page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, "
        f"{DESCALES}, softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, "
        "attention_chunk=0, softcap=0.0, is_rotary_interleaved=False, scheduler_metadata=None, num_splits=0, "
        "pack_gqa=None, sm_margin=0",
        4,
    ),
    "bwd": (
        "dout, q, k, v, out, softmax_lse, dq=None, dk=None, dv=None, cu_seqlens_q=None, cu_seqlens_k=None, "
        "seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None, is_causal=False, "
        "window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0",
        5,
    ),
    "fwd_combine": ("out_partial, lse_partial, out=None, out_dtype=None", 2),
    "get_scheduler_metadata": (
        "batch_size, max_seqlen_q, max_seqlen_k, num_heads, num_heads_k, headdim, headdim_v, qkv_dtype, seqused_k, "
        "cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, leftpad_k=None, "
        "page_size=None, max_seqlen_k_new=0, is_causal=False, window_size_left=-1, window_size_right=-1, "
        "attention_chunk=0, has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0",
        1,
    ),
}


def plain(function) -> str:
    """The signature without annotations and without the keyword-only extensions."""
    parameters = [
        p.replace(annotation=inspect.Parameter.empty)
        for p in inspect.signature(function).parameters.values()
        if p.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    return str(inspect.Signature(parameters))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    function = getattr(interface, name)
    assert plain(function) == SIGNATURES[name]
    assert inspect.isfunction(function) and inspect.getfullargspec(function).varargs is None


@pytest.mark.parametrize("name", [n for n in SIGNATURES if n.endswith(("_func", "_kvcache"))])
def test_extensions_are_keyword_only(name):
    parameters = inspect.signature(getattr(interface, name)).parameters.values()
    extensions = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    of_scores = {"alibi_slopes": None, "learnable_sink": None, "attn_bias": None, "s_aux": None}
    assert extensions == (of_scores if name.endswith("kvcache") else {"dropout_p": 0.0, **of_scores})


@pytest.mark.parametrize("name", APPLY)
def test_autograd_class(name):
    cls = getattr(interface, name)
    assert issubclass(cls, torch.autograd.Function)
    assert str(inspect.signature(cls.forward)) == APPLY[name]


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    arguments, results = SCHEMAS[name]
    schema = getattr(torch.ops.flash_attn_3, name).default._schema
    ours = [a.name + (f"={a.default_value}" if a.has_default_value() else "") for a in schema.arguments]
    assert ", ".join(ours[: arguments.count(",") + 1]) == arguments
    assert all("=" in a for a in ours[arguments.count(",") + 1 :])
    assert len(schema.returns) == results


def test_modules():
    package = importlib.import_module("flash_attn_3.flash_attn_interface")
    importlib.import_module("flash_attn_3._C")
    for name in interface.__all__:
        assert getattr(package, name) is getattr(interface, name)
    assert interface.flash_attn_3_gpu is torch.ops.flash_attn_3
    assert interface.USE_TRITON_ROCM is False and interface.round_up_headdim(80) == 80
    assert not any(on for name, on in CONFIG["build_flags"].items() if "DISABLE" in name)
    assert all(f"FLASHATTENTION_DISABLE_HDIM{d}" in CONFIG["build_flags"] for d in (64, 96, 128, 192, 256))


@pytest.mark.parametrize("module", ["flash_attn_interface", "flash_attn_3.flash_attn_interface", "flash_attn_3._C"])
def test_may_be_imported_first(module):
    code = f"import {module}, torch; print(torch.ops.flash_attn_3.fwd.default._schema.name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "flash_attn_3::fwd\n", done.stderr


def test_the_shapes_that_fakes_tell():
    q, k = torch.randn(2, 9, 4, 16), torch.randn(2, 12, 2, 16)
    real = interface._flash_attn_forward(q, k, k, causal=True)
    told = interface._flash_attn_forward_fake(q, k, k, causal=True)
    assert [(x.shape, x.dtype) for x in told] == [(x.shape, x.dtype) for x in real]
    gradients = [torch.empty_like(x) for x in (q, k, k)]
    call = (q, q, k, k, *real[:2], None, None, None, None, None, None, *gradients)
    softmax_d = interface._flash_attn_backward_fake(*call)
    assert softmax_d.shape == interface._flash_attn_backward(*call).shape and softmax_d.dtype == torch.float32
