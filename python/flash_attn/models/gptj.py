"""GPT-J's weights and configuration for models.gpt."""

from __future__ import annotations

from torch import Tensor

from flash_attn._errors import InvalidArgument
from flash_attn.models._config import fraction_of, gpt2_config
from flash_attn.models._gpt2 import gpt2_names
from flash_attn.models._weights import embed, joined, padded_rows, padded_size

__all__ = ["gptj_config_to_gpt2_config", "remap_state_dict_hf_gptj"]


def remap_state_dict_hf_gptj(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """transformers' GPTJForCausalLM names -> those of GPTLMHeadModel(config). Tokens of padding have a bias of -100."""
    weights = gpt2_names(state_dict)
    embed(weights, config)
    if "lm_head.bias" in weights:
        bias = weights["lm_head.bias"]
        weights["lm_head.bias"] = padded_rows(bias, padded_size(bias.shape[0], config), value=-100.0)
    for i in range(config.n_layer):
        joined(weights, f"transformer.layers.{i}", [f"attn.{x}_proj" for x in "qkv"], "mixer.Wqkv")
    return weights


def gptj_config_to_gpt2_config(gptj_config):
    """-> the GPT2Config of the same model as GPTLMHeadModel: attention and feed-forward layer side by side after one
    norm, and pairs of the first rotary_dim columns turned."""
    c = gptj_config
    head_dim = c.hidden_size // c.num_attention_heads
    if not c.rotary_dim or not 0 < c.rotary_dim <= head_dim:
        raise InvalidArgument(
            f"gptj_config: rotary_dim: expected 1 to the head's {head_dim} columns, got {c.rotary_dim}"
        )
    return gpt2_config(
        c,
        n_inner=c.n_inner,
        activation_function=c.activation_function,
        resid_pdrop=c.resid_pdrop,
        embd_pdrop=c.embd_pdrop,
        attn_pdrop=c.attn_pdrop,
        layer_norm_epsilon=c.layer_norm_epsilon,
        initializer_range=c.initializer_range,
        parallel_block=True,
        parallel_block_tied_norm=True,
        rotary_emb_fraction=fraction_of(c.rotary_dim, head_dim),
        rotary_emb_interleaved=True,
        qkv_proj_bias=False,
        out_proj_bias=False,
        lm_head_bias=True,
    )
