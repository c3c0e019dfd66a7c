"""What callers inspect, import and gate on: names, signatures, versions."""

from __future__ import annotations

import inspect

import flash_attn
import pytest
import torch
from flash_attn import flash_attn_interface as interface

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
PUBLIC = {
    "flash_attn_func": f"(q, k, v, {TAIL})",
    "flash_attn_kvpacked_func": f"(q, kv, {TAIL})",
    "flash_attn_qkvpacked_func": f"(qkv, {TAIL})",
    "flash_attn_varlen_func": (
        f"(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {TAIL}, block_table=None)"
    ),
    "flash_attn_varlen_kvpacked_func": (f"(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {TAIL})"),
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {TAIL})",
}
PRIVATE = {
    "_flash_attn_forward": (
        "(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, "
        "return_softmax)"
    ),
    "_flash_attn_varlen_forward": (
        "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, "
        "window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, "
        "block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False, num_splits=0)"
    ),
    "_flash_attn_backward": (
        "(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, "
        "window_size_right, softcap, alibi_slopes, deterministic, rng_state=None)"
    ),
    "_flash_attn_varlen_backward": (
        "(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
        "dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, "
        "deterministic, rng_state=None, zero_tensors=False)"
    ),
}
APPLY = {
    "FlashAttnFunc": (
        "(ctx, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, "
        "return_softmax, is_grad_enabled"
    ),
    "FlashAttnKVPackedFunc": (
        "(ctx, q, kv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, "
        "return_softmax, is_grad_enabled"
    ),
    "FlashAttnQKVPackedFunc": (
        "(ctx, qkv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, "
        "return_softmax, is_grad_enabled"
    ),
    "FlashAttnVarlenFunc": (
        "(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, "
        "window_size, softcap, alibi_slopes, deterministic, return_softmax, block_table, is_grad_enabled"
    ),
    "FlashAttnVarlenKVPackedFunc": (
        "(ctx, q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, "
        "window_size, softcap, alibi_slopes, deterministic, return_softmax, is_grad_enabled"
    ),
    "FlashAttnVarlenQKVPackedFunc": (
        "(ctx, qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, "
        "deterministic, return_softmax, is_grad_enabled"
    ),
}


def plain(signature: inspect.Signature) -> str:
    """The signature without annotations and without the keyword-only extensions."""
    parameters = [
        p.replace(annotation=inspect.Parameter.empty)
        for p in signature.parameters.values()
        if p.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    return str(inspect.Signature(parameters))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_signature(name):
    function = getattr(flash_attn, name)
    assert function is getattr(interface, name)
    signature = inspect.signature(function)
    assert plain(signature) == PUBLIC[name]
    extensions = [n for n, p in signature.parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert [(n, signature.parameters[n].default) for n in extensions] == [
        ("learnable_sink", None), ("attn_bias", None), ("attention_chunk", 0),
    ]  # fmt: skip


def test_kvcache_signature():
    signature = inspect.signature(flash_attn.flash_attn_with_kvcache)
    assert plain(signature) == (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False)"
    )
    assert interface.flash_attn_with_kvcache is flash_attn.flash_attn_with_kvcache


@pytest.mark.parametrize("name", PRIVATE)
def test_private_signature(name):
    function = getattr(interface, name)
    assert str(inspect.signature(function)).split(" ->")[0] != ""
    assert plain(inspect.signature(function)).split(" ->")[0] == PRIVATE[name]
    assert inspect.getfullargspec(function).varargs is None
    # The operator of that name takes the same arguments first, with the same defaults; ours follow.
    schema = getattr(torch.ops.flash_attn, name).default._schema
    names = list(inspect.signature(function).parameters)
    assert [a.name for a in schema.arguments][: len(names)] == names
    for argument, p in zip(schema.arguments, inspect.signature(function).parameters.values(), strict=False):
        assert argument.has_default_value() == (p.default is not inspect.Parameter.empty)
        if argument.has_default_value():
            assert argument.default_value == p.default
    assert getattr(interface, "_wrapped" + name) is getattr(torch.ops.flash_attn, name)


@pytest.mark.parametrize("name", APPLY)
def test_autograd_class_takes_upstreams_arguments(name):
    cls = getattr(interface, name)
    assert issubclass(cls, torch.autograd.Function)
    assert str(inspect.signature(cls.forward)).startswith(APPLY[name])


@pytest.mark.parametrize(
    "name, names",
    [
        ("_flash_attn_backward", ["dq", "dk", "dv"]),
        ("_flash_attn_varlen_backward", ["dq", "dk", "dv"]),
        ("_flash_attn_gradients", []),
    ],
)
def test_operators_say_what_they_write(name, names):
    schema = getattr(torch.ops.flash_attn, name).default._schema
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert [a.name for a in written] == names
    assert not any(a.has_default_value() for a in written)


def test_small_names():
    assert interface.round_multiple(1, 128) == 128 and interface.round_multiple(128, 128) == 128
    assert interface.maybe_contiguous(None) is None
    x = torch.randn(3, 4).t()
    assert interface.maybe_contiguous(x).is_contiguous() and torch.equal(interface.maybe_contiguous(x), x)
    y = torch.randn(6, 4)[::2]
    assert interface.maybe_contiguous(y) is y
    assert interface._get_block_size_n(torch.device("cpu"), 64, False, False) > 0
    assert interface.USE_TRITON_ROCM is False


def test_versions():
    assert flash_attn.__version__ == flash_attn.__upstream_version__ == "2.8.3"
    assert flash_attn.__plus_version__.count(".") == 2
    assert set(flash_attn.__all__) <= set(dir(flash_attn))


def test_other_distributions_can_add_submodules(tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    (tmp_path / "flash_attn" / "cute.py").write_text("answer = 42\n")
    import subprocess
    import sys

    path = [str(next(iter(flash_attn.__path__)).rsplit("/", 1)[0]), str(tmp_path)]
    code = f"import sys; sys.path[:0] = {path!r}; import flash_attn.cute; print(flash_attn.cute.answer)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "42\n"
