"""OPT's weights and configuration for models.gpt (Zhang et al., arXiv 2205.01068)."""

from __future__ import annotations

from torch import Tensor

from flash_attn._errors import NotServed
from flash_attn.models._config import gpt2_config
from flash_attn.models._weights import LAYERS, embed, joined, renamed

__all__ = ["opt_config_to_gpt2_config", "remap_state_dict_hf_opt"]

_POSITIONS = "transformer.embeddings.position_embeddings.weight"


def remap_state_dict_hf_opt(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """transformers' OPTModel (or OPTForCausalLM) names -> those of GPTLMHeadModel(config)."""
    weights = renamed(
        state_dict,
        (r"(?:model\.)?decoder\.", ""),
        (r"embed_tokens\.", "transformer.embeddings.word_embeddings."),
        (r"embed_positions\.", "transformer.embeddings.position_embeddings."),
        (r"project_in\.", "transformer.embeddings.project_in."),
        (r"(?:final_)?layer_norm\.", "transformer.ln_f."),  # 175B: layer_norm
        (r"layers\.(\d+)\.self_attn_layer_norm\.", LAYERS + "norm1."),
        (r"layers\.(\d+)\.final_layer_norm\.", LAYERS + "norm2."),
        (r"layers\.(\d+)\.self_attn\.out_proj\.", LAYERS + "mixer.out_proj."),
        (r"layers\.(\d+)\.(fc\d)\.", LAYERS + r"mlp.\2."),
        (r"layers\.(\d+)\.", LAYERS),
    )
    weights[_POSITIONS] = weights[_POSITIONS][2:]  # position i is row i + 2
    embed(weights, config)
    for i in range(config.n_layer):
        joined(weights, f"transformer.layers.{i}", [f"self_attn.{x}_proj" for x in "qkv"], "mixer.Wqkv")
    return weights


def opt_config_to_gpt2_config(opt_config):
    """-> the GPT2Config of the same model as GPTLMHeadModel. OPT-350m's norms follow its layers (prenorm=False), and
    its embedding is narrower. Where norms come first, the embedding has no dropout, as in transformers."""
    c = opt_config
    for name, expected in (("layerdrop", 0.0), ("layer_norm_elementwise_affine", True),
                           ("_remove_final_layer_norm", False)):  # fmt: skip
        if getattr(c, name, expected) != expected:
            raise NotServed(f"opt_config: {name}: expected {expected}, got {getattr(c, name)}")
    bias, prenorm = getattr(c, "enable_bias", True), c.do_layer_norm_before
    return gpt2_config(
        c,
        n_positions=c.max_position_embeddings,
        n_inner=c.ffn_dim,
        activation_function=c.activation_function,
        resid_pdrop=c.dropout,
        embd_pdrop=0.0 if prenorm else c.dropout,  # the first dropout of the first layer
        attn_pdrop=c.attention_dropout,
        initializer_range=c.init_std,
        prenorm=prenorm,
        word_embed_proj_dim=None if c.word_embed_proj_dim == c.hidden_size else c.word_embed_proj_dim,
        qkv_proj_bias=bias,
        out_proj_bias=bias,
        mlp_fc1_bias=bias,
        mlp_fc2_bias=bias,
    )
