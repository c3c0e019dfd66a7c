"""GPT-NeoX's and Pythia's weights and configuration for models.gpt (Black et al., arXiv 2204.06745)."""

from __future__ import annotations

from torch import Tensor

from flash_attn.models._config import gpt2_config, rotary_base, rotary_fraction
from flash_attn.models._weights import LAYERS, embed, renamed, split_groups, without

__all__ = ["gpt_neox_config_to_gpt2_config", "remap_state_dict_hf_gpt_neox"]

_BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def remap_state_dict_hf_gpt_neox(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """transformers' GPTNeoXForCausalLM names, of today or with embed_out -> those of GPTLMHeadModel(config)."""
    weights = renamed(
        without(state_dict, *_BUFFERS),
        (r"gpt_neox\.", ""),
        (r"embed_in\.", "transformer.embeddings.word_embeddings."),
        (r"embed_out\.", "lm_head."),
        (r"final_layer_norm\.", "transformer.ln_f."),
        (r"layers\.(\d+)\.input_layernorm\.", LAYERS + "norm1."),
        (r"layers\.(\d+)\.post_attention_layernorm\.", LAYERS + "norm2."),
        (r"layers\.(\d+)\.mlp\.dense_h_to_4h\.", LAYERS + "mlp.fc1."),
        (r"layers\.(\d+)\.mlp\.dense_4h_to_h\.", LAYERS + "mlp.fc2."),
        (r"layers\.(\d+)\.attention\.query_key_value\.", LAYERS + "mixer.Wqkv."),
        (r"layers\.(\d+)\.attention\.dense\.", LAYERS + "mixer.out_proj."),
    )
    weights = {name: split_groups(x, config) if ".mixer.Wqkv." in name else x for name, x in weights.items()}
    embed(weights, config)
    return weights


def gpt_neox_config_to_gpt2_config(gpt_neox_config):
    """-> the GPT2Config of the same model as GPTLMHeadModel: rotary embedding of some columns, and attention and
    feed-forward layer side by side unless use_parallel_residual is False."""
    c = gpt_neox_config
    bias = getattr(c, "attention_bias", True)
    return gpt2_config(
        c,
        n_inner=c.intermediate_size,
        activation_function=c.hidden_act,
        resid_pdrop=c.hidden_dropout,
        embd_pdrop=c.hidden_dropout,
        attn_pdrop=c.attention_dropout,
        layer_norm_epsilon=c.layer_norm_eps,
        initializer_range=c.initializer_range,
        parallel_block=c.use_parallel_residual,
        parallel_block_tied_norm=False,
        rotary_emb_fraction=rotary_fraction(c, "gpt_neox_config"),
        rotary_emb_base=rotary_base(c, "gpt_neox_config"),
        qkv_proj_bias=bias,
        out_proj_bias=bias,
    )
