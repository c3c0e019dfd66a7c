"""The weights and configuration of StarCoder and SantaCoder for models.gpt (Li et al., arXiv 2305.06161)."""

from __future__ import annotations

from torch import Tensor

from flash_attn._errors import NotServed
from flash_attn.models._config import gpt2_config
from flash_attn.models._gpt2 import gpt2_names
from flash_attn.models._weights import embed, heads_kv, join_groups, renamed, split_groups

__all__ = ["bigcode_config_to_gpt2_config", "inv_remap_state_dict_hf_bigcode", "remap_state_dict_hf_bigcode"]


def _turned(weights: dict[str, Tensor], config, turn) -> dict[str, Tensor]:
    """With one head of keys both have all of q, k, v."""
    if heads_kv(config) == 1:
        return weights
    return {name: turn(x, config) if ".mixer.Wqkv." in name else x for name, x in weights.items()}


def remap_state_dict_hf_bigcode(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """transformers' GPTBigCodeForCausalLM names -> those of GPTLMHeadModel(config). One head of keys stays one."""
    weights = _turned(gpt2_names(state_dict), config, split_groups)
    embed(weights, config)
    return weights


def inv_remap_state_dict_hf_bigcode(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """The way back; a padded vocabulary stays padded."""
    return renamed(
        _turned(state_dict, config, join_groups),
        (r"transformer\.embeddings\.word_embeddings\.", "transformer.wte."),
        (r"transformer\.embeddings\.position_embeddings\.", "transformer.wpe."),
        (r"transformer\.layers\.(\d+)\.norm(\d)\.", r"transformer.h.\1.ln_\2."),
        (r"transformer\.layers\.(\d+)\.mlp\.fc1\.", r"transformer.h.\1.mlp.c_fc."),
        (r"transformer\.layers\.(\d+)\.mlp\.fc2\.", r"transformer.h.\1.mlp.c_proj."),
        (r"transformer\.layers\.(\d+)\.mixer\.Wqkv\.", r"transformer.h.\1.attn.c_attn."),
        (r"transformer\.layers\.(\d+)\.mixer\.out_proj\.", r"transformer.h.\1.attn.c_proj."),
    )


def bigcode_config_to_gpt2_config(bigcode_config):
    """-> the GPT2Config of the same model as GPTLMHeadModel: GPT-2 with one head of keys, if multi_query."""
    c = bigcode_config
    if getattr(c, "add_cross_attention", False):
        raise NotServed("bigcode_config: add_cross_attention: GPTLMHeadModel has no cross-attention; expected False")
    return gpt2_config(
        c,
        n_positions=c.n_positions,
        n_inner=c.n_inner,
        activation_function=c.activation_function,
        resid_pdrop=c.resid_pdrop,
        embd_pdrop=c.embd_pdrop,
        attn_pdrop=c.attn_pdrop,
        layer_norm_epsilon=c.layer_norm_epsilon,
        initializer_range=c.initializer_range,
        scale_attn_weights=c.scale_attn_weights,
        n_head_kv=1 if c.multi_query else c.num_attention_heads,
    )
