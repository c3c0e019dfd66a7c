"""Names, order and defaults of what other packages import. Ours beyond upstream's are keyword-only."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

NORM = (
    "weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, rowscale=None, "
    "prenorm=False"
)
OLD = "rowscale=None, layerscale=None, prenorm=False, residual_in_fp32=False, return_dropout_mask=False"
SUBSET = (
    "(x0, residual, weight, bias, dropout_p, epsilon, layerscale=None, x0_subset=None, out_subset=None, "
    "rowscale_const=1.0, out_numrows=0, prenorm=False, residual_in_fp32=False, return_dropout_mask=False)"
)
PARALLEL = (
    "(x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, prenorm=False, residual_in_fp32=False, "
    "return_dropout_mask=False)"
)
OLD_MODULE = "(hidden_size, prenorm=False, p=0.0, eps=1e-05, residual_in_fp32=False, device=None, dtype=None)"
SIGNATURES = {
    "layers.rotary.apply_rotary_emb": (
        "(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None)"
    ),
    "layers.rotary.apply_rotary_emb_torch": "(x, cos, sin, interleaved=False)",
    "layers.rotary.apply_rotary_emb_qkv_": (
        "(qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None)"
    ),
    "layers.rotary.apply_rotary_emb_kv_": "(kv, cos, sin, interleaved=False, seqlen_offsets=0)",
    "layers.rotary.rotate_half": "(x, interleaved=False)",
    "layers.rotary.ApplyRotaryEmb.forward": (
        "(ctx, x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None)"
    ),
    "layers.rotary.ApplyRotaryEmbQKV_.forward": (
        "(ctx, qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None)"
    ),
    "layers.rotary.ApplyRotaryEmbKV_.forward": "(ctx, kv, cos, sin, interleaved=False, seqlen_offsets=0)",
    "layers.rotary.RotaryEmbedding": "(dim, base=10000.0, interleaved=False, scale_base=None, device=None)",
    "layers.rotary.RotaryEmbedding.forward": (
        "(self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None)"
    ),
    "layers.rotary.RotaryEmbedding._update_cos_sin_cache": "(self, seqlen, device=None, dtype=None)",
    "layers.rotary.RotaryEmbedding._compute_inv_freq": "(self, device=None)",
    "ops.triton.rotary.apply_rotary": (
        "(x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, interleaved=False, inplace=False, "
        "conjugate=False)"
    ),
    "losses.cross_entropy.CrossEntropyLoss": (
        "(ignore_index=-100, reduction='mean', label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, "
        "inplace_backward=False, process_group=None, return_z_loss=False)"
    ),
    "losses.cross_entropy.CrossEntropyLoss.forward": "(self, input, target, precomputed_lse=None)",
    "ops.triton.cross_entropy.cross_entropy_loss": (
        "(logits, labels, precomputed_lse=None, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, "
        "ignore_index=-100, inplace_backward=False, process_group=None)"
    ),
    "ops.triton.cross_entropy.CrossEntropyLoss.forward": (
        "(ctx, logits, labels, precomputed_lse=None, smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, "
        "ignore_index=-100, inplace_backward=False, process_group=None)"
    ),
    "ops.triton.layer_norm.layer_norm_fn": (
        f"(x, {NORM}, residual_in_fp32=False, zero_centered_weight=False, is_rms_norm=False, "
        "return_dropout_mask=False, out_dtype=None, out=None, residual_out=None)"
    ),
    "ops.triton.layer_norm.rms_norm_fn": (
        f"(x, {NORM}, residual_in_fp32=False, zero_centered_weight=False, return_dropout_mask=False, out_dtype=None, "
        "out=None, residual_out=None)"
    ),
    "ops.triton.layer_norm.LayerNormFn.forward": (
        f"(ctx, x, {NORM}, residual_in_fp32=False, zero_centered_weight=False, is_rms_norm=False, "
        "return_dropout_mask=False, out_dtype=None, out=None, residual_out=None)"
    ),
    "ops.triton.layer_norm.layer_norm_ref": (
        f"(x, {NORM}, zero_centered_weight=False, dropout_mask=None, dropout_mask1=None, upcast=False)"
    ),
    "ops.triton.layer_norm.rms_norm_ref": (
        f"(x, {NORM}, zero_centered_weight=False, dropout_mask=None, dropout_mask1=None, upcast=False)"
    ),
    "ops.triton.layer_norm.layer_norm_linear_fn": (
        "(x, norm_weight, norm_bias, linear_weight, linear_bias, residual=None, eps=1e-06, prenorm=False, "
        "residual_in_fp32=False, is_rms_norm=False)"
    ),
    "ops.triton.layer_norm.RMSNorm": (
        "(hidden_size, eps=1e-05, dropout_p=0.0, zero_centered_weight=False, device=None, dtype=None)"
    ),
    "ops.triton.layer_norm.RMSNorm.forward": "(self, x, residual=None, prenorm=False, residual_in_fp32=False)",
    "ops.layer_norm.layer_norm": "(x, weight, bias, epsilon)",
    "ops.layer_norm.dropout_add_layer_norm": f"(x0, residual, weight, bias, dropout_p, epsilon, {OLD})",
    "ops.layer_norm.dropout_add_layer_norm_subset": SUBSET,
    "ops.layer_norm.dropout_add_layer_norm_parallel_residual": PARALLEL,
    "ops.layer_norm.DropoutAddLayerNorm": OLD_MODULE,
    "ops.layer_norm.DropoutAddLayerNorm.forward": "(self, x0, residual=None)",
    "ops.layer_norm.DropoutAddLayerNormFn.apply": (
        "(x0, residual, gamma, beta, rowscale, colscale, dropout_p, epsilon, residual_in_fp32=False, prenorm=False, "
        "is_rms_norm=False, return_dmask=False)"
    ),
    "ops.rms_norm.rms_norm": "(x, weight, epsilon)",
    "ops.rms_norm.dropout_add_rms_norm": f"(x0, residual, weight, bias, dropout_p, epsilon, {OLD})",
    "ops.rms_norm.dropout_add_rms_norm_subset": SUBSET,
    "ops.rms_norm.dropout_add_rms_norm_parallel_residual": PARALLEL,
    "ops.rms_norm.DropoutAddRMSNorm": OLD_MODULE,
    "ops.rms_norm.RMSNorm": "(hidden_size, eps=1e-05, device=None, dtype=None)",
    "ops.rms_norm.RMSNorm.forward": "(self, x)",
    "ops.activations.bias_gelu": "(y, bias)",
    "ops.activations.bias_gelu_back": "(g, y, bias)",
    "ops.activations.gelu_fwd": "(x)",
    "ops.activations.gelu_bwd": "(g, x)",
    "ops.activations.relu_bwd": "(g, x)",
    "ops.activations.sqrelu_fwd": "(x)",
    "ops.activations.sqrelu_bwd": "(g, x)",
    "ops.activations.swiglu_fwd": "(x, y)",
    "ops.activations.swiglu_bwd": "(x, y, g)",
    "ops.fused_dense.fused_dense_func": (
        "(x, weight, bias=None, return_residual=False, process_group=None, sequence_parallel=True)"
    ),
    "ops.fused_dense.fused_mlp_func": (
        "(x, weight1, weight2, bias1=None, bias2=None, activation='gelu_approx', save_pre_act=True, "
        "return_residual=False, checkpoint_lvl=0, heuristic=0, process_group=None, sequence_parallel=True)"
    ),
    "ops.fused_dense.FusedDense": (
        "(in_features, out_features, bias=True, return_residual=False, device=None, dtype=None)"
    ),
    "ops.fused_dense.FusedDense.forward": "(self, x, process_group=None)",
    "ops.fused_dense.FusedMLP": (
        "(in_features, hidden_features=None, out_features=None, bias1=True, bias2=True, activation='gelu_approx', "
        "return_residual=False, checkpoint_lvl=0, heuristic='auto', device=None, dtype=None)"
    ),
    "ops.fused_dense.ParallelFusedMLP": (
        "(in_features, hidden_features=None, out_features=None, activation='gelu_approx', process_group=None, "
        "bias1=True, bias2=True, sequence_parallel=True, checkpoint_lvl=0, heuristic='auto', device=None, dtype=None)"
    ),
    "ops.fused_dense.ColumnParallelLinear": (
        "(in_features, out_features, process_group, bias=True, sequence_parallel=True, multiple_of=1, device=None, "
        "dtype=None)"
    ),
    "ops.fused_dense.RowParallelLinear": (
        "(in_features, out_features, process_group, bias=True, sequence_parallel=True, multiple_of=1, device=None, "
        "dtype=None)"
    ),
    "ops.triton.linear.triton_linear_act": "(x, weight, bias=None, activation='id', save_act_input=False)",
    "ops.triton.linear.triton_dgrad_act": "(grad_output, weight, activation='id', act_input=None)",
    "ops.triton.mlp.FusedDenseSqreluDense": (
        "(in_features, hidden_features=None, out_features=None, bias1=True, bias2=True, checkpoint_lvl=0, device=None, "
        "dtype=None)"
    ),
    "ops.triton.mlp.fused_dense_sqrelu_dense_function": "(x, weight1, bias1, weight2, bias2, checkpoint_lvl=0)",
    "layers.patch_embed.PatchEmbed": (
        "(img_size=224, patch_size=16, in_chans=3, embed_dim=768, norm_layer=None, flatten=True, bias=True, "
        "fused_bias_fc=False)"
    ),
    "utils.distributed.all_gather_raw": "(input_, process_group, async_op=False)",
    "utils.distributed.reduce_scatter_raw": "(input_, process_group, async_op=False)",
    "utils.distributed.all_reduce_raw": "(input_, process_group, async_op=False)",
    "utils.distributed.sync_shared_params": "(model, process_group)",
    "utils.distributed.allreduce_sequence_parallel_grad": "(model, process_group)",
    "utils.distributed.get_dim_for_local_rank": "(dim, world_size, local_rank, multiple_of=1)",
}
FUNCTIONS = ["layers.rotary.ApplyRotaryEmb", "layers.rotary.ApplyRotaryEmbQKV_", "layers.rotary.ApplyRotaryEmbKV_",
             "ops.triton.layer_norm.LayerNormFn", "ops.triton.layer_norm.LayerNormLinearFn",
             "ops.triton.cross_entropy.CrossEntropyLoss", "ops.activations.SwiGLUFunction",
             "ops.activations.GeLUFunction", "utils.distributed.AllGatherFunc"]  # fmt: skip
CALLABLES = ["layers.rotary.apply_rotary_emb_func", "ops.activations.swiglu", "ops.activations.bias_gelu_impl",
             "ops.activations.fast_gelu_impl", "utils.distributed.all_gather", "utils.distributed.all_reduce",
             "utils.distributed.reduce_scatter", "ops.triton.k_activations.gelu_approx_grad"]  # fmt: skip


def found(name: str):
    """The object of a dotted name below flash_attn."""
    for i in (1, 2):
        module, *path = name.rsplit(".", i)
        try:
            x = importlib.import_module(f"flash_attn.{module}")
        except ModuleNotFoundError:
            continue
        for part in path:
            x = getattr(x, part)
        return x
    raise AssertionError(name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(found(name)).parameters.values()
    positional = [p.replace(annotation=p.empty) for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert str(inspect.Signature(positional)) == SIGNATURES[name]
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in positional)


def test_classes_and_aliases():
    assert all(issubclass(found(name), torch.autograd.Function) for name in FUNCTIONS)
    assert all(callable(found(name)) for name in CALLABLES)
    assert found("layers.rotary.apply_rotary_emb_func") is found("layers.rotary.apply_rotary_emb")
    assert found("layers.rotary.apply_rotary") is found("ops.triton.rotary.apply_rotary")
