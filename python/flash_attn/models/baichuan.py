"""Baichuan's weights and configuration for models.gpt (Yang et al., arXiv 2309.10305)."""

from __future__ import annotations

from torch import Tensor

from flash_attn._errors import NotServed
from flash_attn.models._config import gpt2_config, rotary_base
from flash_attn.models._weights import LAYERS, embed, joined, renamed, without

__all__ = ["baichuan_config_to_gpt2_config", "remap_state_dict_hf_baichuan"]


def remap_state_dict_hf_baichuan(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """BaichuanForCausalLM's names -> those of GPTLMHeadModel(config)."""
    weights = renamed(
        without(state_dict, ".rotary_emb.inv_freq"),
        (r"(?:model\.)?embed_tokens\.", "transformer.embeddings.word_embeddings."),
        (r"(?:model\.)?norm\.", "transformer.ln_f."),
        (r"(?:model\.)?layers\.(\d+)\.input_layernorm\.", LAYERS + "norm1."),
        (r"(?:model\.)?layers\.(\d+)\.post_attention_layernorm\.", LAYERS + "norm2."),
        (r"(?:model\.)?layers\.(\d+)\.mlp\.down_proj\.", LAYERS + "mlp.fc2."),
        (r"(?:model\.)?layers\.(\d+)\.self_attn\.W_pack\.", LAYERS + "mixer.Wqkv."),
        (r"(?:model\.)?layers\.(\d+)\.self_attn\.o_proj\.", LAYERS + "mixer.out_proj."),
        (r"(?:model\.)?layers\.(\d+)\.", LAYERS),
    )
    embed(weights, config)
    for i in range(config.n_layer):
        joined(weights, f"transformer.layers.{i}", ["mlp.up_proj", "mlp.gate_proj"], "mlp.fc1")
    return weights


def baichuan_config_to_gpt2_config(baichuan_config):
    """-> the GPT2Config of the same model as GPTLMHeadModel.

    The configuration does not tell the models apart, their sizes do: 7B (hidden_size below 5000) has rotary embedding
    and 13B ALiBi, which needs use_flash_attn and sets it; version 2 (more than 70000 tokens) normalizes the rows of its
    output's weight. For others set rotary_emb_fraction, use_alibi and norm_head of the result.
    """
    c = baichuan_config
    if c.hidden_act != "silu":
        raise NotServed(f"baichuan_config: hidden_act: expected 'silu', got {c.hidden_act!r}")
    rotary = c.hidden_size < 5000
    return gpt2_config(
        c,
        n_inner=c.intermediate_size,
        activation_function="swiglu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=c.rms_norm_eps,
        initializer_range=c.initializer_range,
        rms_norm=True,
        rotary_emb_fraction=1.0 if rotary else 0.0,
        rotary_emb_base=rotary_base(c, "baichuan_config"),
        use_alibi=not rotary,
        use_flash_attn=not rotary,
        norm_head=c.vocab_size > 70000,
        qkv_proj_bias=False,
        out_proj_bias=False,
        mlp_fc1_bias=False,
        mlp_fc2_bias=False,
        mlp_multiple_of=1,
    )
