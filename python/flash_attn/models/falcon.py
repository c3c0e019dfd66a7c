"""Falcon's weights and configuration for models.gpt (Almazrouei et al., arXiv 2311.16867)."""

from __future__ import annotations

from torch import Tensor

from flash_attn._errors import NotServed
from flash_attn.models._config import gpt2_config, rotary_base
from flash_attn.models._weights import LAYERS, embed, renamed, split_groups

__all__ = ["falcon_config_to_gpt2_config", "remap_state_dict_hf_falcon"]


def remap_state_dict_hf_falcon(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """transformers' FalconForCausalLM names -> those of GPTLMHeadModel(config)."""
    weights = renamed(
        {name.removeprefix("transformer."): x for name, x in state_dict.items()},
        (r"word_embeddings\.", "transformer.embeddings.word_embeddings."),
        (r"ln_f\.", "transformer.ln_f."),
        (r"h\.(\d+)\.(?:ln_attn|input_layernorm)\.", LAYERS + "norm1."),
        (r"h\.(\d+)\.(?:ln_mlp|post_attention_layernorm)\.", LAYERS + "norm2."),
        (r"h\.(\d+)\.mlp\.dense_h_to_4h\.", LAYERS + "mlp.fc1."),
        (r"h\.(\d+)\.mlp\.dense_4h_to_h\.", LAYERS + "mlp.fc2."),
        (r"h\.(\d+)\.self_attention\.query_key_value\.", LAYERS + "mixer.Wqkv."),
        (r"h\.(\d+)\.self_attention\.dense\.", LAYERS + "mixer.out_proj."),
    )
    weights = {name: split_groups(x, config) if ".mixer.Wqkv." in name else x for name, x in weights.items()}
    embed(weights, config)
    return weights


def falcon_config_to_gpt2_config(falcon_config):
    """-> the GPT2Config of the same model as GPTLMHeadModel: 7B has one head of keys and one norm a block, 40B
    groups of heads and two norms, 11B groups and one. Falcon-RW's ALiBi is not served: it is
    scaled with the scores."""
    c = falcon_config
    if c.alibi:
        raise NotServed(
            "falcon_config: alibi: Falcon scales ALiBi with the scores, which is not served; expected False"
        )
    grouped = c.new_decoder_architecture
    parallel = grouped or c.parallel_attn
    two_norms = grouped and getattr(c, "num_ln_in_parallel_attn", None) in (None, 2)
    return gpt2_config(
        c,
        n_inner=getattr(c, "ffn_hidden_size", None),
        activation_function=getattr(c, "activation", "gelu"),
        resid_pdrop=c.hidden_dropout,
        embd_pdrop=0.0,
        attn_pdrop=c.attention_dropout,
        layer_norm_epsilon=c.layer_norm_epsilon,
        initializer_range=c.initializer_range,
        parallel_block=parallel,
        parallel_block_tied_norm=not two_norms,
        rotary_emb_fraction=1.0,
        rotary_emb_base=rotary_base(c, "falcon_config"),
        n_head_kv=c.num_kv_heads if grouped else 1 if c.multi_query else c.num_attention_heads,
        qkv_proj_bias=c.bias,
        out_proj_bias=c.bias,
        mlp_fc1_bias=c.bias,
        mlp_fc2_bias=c.bias,
    )
