"""BTLM's weights and configuration for models.gpt (Dey et al., arXiv 2309.11568). Jais has the same ones."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._errors import NotServed
from flash_attn.models._config import gpt2_config
from flash_attn.models._gpt2 import remap_state_dict_hf_gpt2
from flash_attn.models._weights import without

__all__ = ["btlm_config_to_gpt2_config", "remap_state_dict_hf_btlm"]


def remap_state_dict_hf_btlm(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """BTLMLMHeadModel's names -> those of GPTLMHeadModel(config): GPT-2's, and the gate of SwiGLU in mlp.c_fc2."""
    weights = without(state_dict, "relative_pe.slopes")
    for name in [name for name in weights if ".mlp.c_fc2." in name]:
        values = name.replace(".c_fc2.", ".c_fc.")
        weights[values] = torch.cat([weights[values], weights.pop(name)], dim=-1)  # weights are transposed there
    return remap_state_dict_hf_gpt2(weights, config)


def btlm_config_to_gpt2_config(btlm_config):
    """-> the GPT2Config of the same model as GPTLMHeadModel: ALiBi or learned positions, and muP's multipliers of the
    embedding, the scores and the logits. ALiBi needs use_flash_attn, which is set."""
    c = btlm_config
    if c.position_embedding_type not in ("alibi", "learned"):
        raise NotServed(
            f"btlm_config: position_embedding_type: expected 'alibi' or 'learned', got {c.position_embedding_type!r}"
        )
    if getattr(c, "alibi_scaling", None) is not None:
        raise NotServed(f"btlm_config: alibi_scaling: expected None, got {c.alibi_scaling}")
    alibi = c.position_embedding_type == "alibi"
    return gpt2_config(
        c,
        n_positions=0 if alibi else c.n_positions,
        n_inner=c.n_inner,
        activation_function=c.activation_function,
        resid_pdrop=c.resid_pdrop,
        embd_pdrop=c.embd_pdrop,
        attn_pdrop=c.attn_pdrop,
        layer_norm_epsilon=c.layer_norm_epsilon,
        initializer_range=c.initializer_range,
        scale_attn_weights=c.scale_attn_weights,
        scale_attn_by_inverse_layer_idx=c.scale_attn_by_inverse_layer_idx,
        tie_word_embeddings=getattr(c, "tie_word_embeddings", True),
        use_alibi=alibi,
        use_flash_attn=alibi,
        mup_width_scale=c.mup_width_scale,
        mup_embeddings_multiplier=c.mup_embeddings_scale,
        mup_output_multiplier=c.mup_output_alpha,
        mup_scale_qk_dot_by_d=c.mup_scale_qk_dot_by_d,
        mlp_multiple_of=1,
    )
