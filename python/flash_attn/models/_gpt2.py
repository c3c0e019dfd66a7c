"""GPT-2's weights for models.gpt: transformers' and Megatron-LM's."""

from __future__ import annotations

from torch import Tensor

from flash_attn.models._weights import LAYERS, embed, renamed, split_groups, without

_TRANSPOSED = ("fc1.weight", "fc2.weight", "Wqkv.weight", "out_proj.weight")


def gpt2_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of GPT-2 and its kin, with or without "transformer." -> ours. Masks are left out."""
    return renamed(
        {name.removeprefix("transformer."): x for name, x in without(state_dict, ".attn.bias", ".masked_bias").items()},
        (r"wte\.", "transformer.embeddings.word_embeddings."),
        (r"wpe\.", "transformer.embeddings.position_embeddings."),
        (r"ln_f\.", "transformer.ln_f."),
        (r"h\.(\d+)\.ln_(\d)\.", LAYERS + r"norm\2."),
        (r"h\.(\d+)\.mlp\.(?:c_fc|fc_in)\.", LAYERS + "mlp.fc1."),
        (r"h\.(\d+)\.mlp\.(?:c_proj|fc_out)\.", LAYERS + "mlp.fc2."),
        (r"h\.(\d+)\.attn\.c_attn\.", LAYERS + "mixer.Wqkv."),
        (r"h\.(\d+)\.attn\.(?:c_proj|out_proj)\.", LAYERS + "mixer.out_proj."),
        (r"h\.(\d+)\.", LAYERS),
    )


def remap_state_dict_hf_gpt2(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """transformers' GPT2Model (or GPT2LMHeadModel) names -> those of GPTLMHeadModel; there weights are transposed."""
    weights = gpt2_names(state_dict)
    weights = {name: x.t() if name.endswith(_TRANSPOSED) else x for name, x in weights.items()}
    embed(weights, config)
    return weights


def remap_state_dict_megatron(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """Megatron-LM's GPT names -> those of GPTLMHeadModel; there each head's q, k and v lie together."""
    weights = renamed(
        state_dict,
        (r"language_model\.(?:encoder\.)?", "transformer."),
        (r"transformer\.embedding\.word_embeddings\.", "transformer.embeddings.word_embeddings."),
        (r"(?:transformer\.embedding\.position_embeddings|wpe)\.", "transformer.embeddings.position_embeddings."),
        (r"transformer\.final_layernorm\.", "transformer.ln_f."),
        (r"transformer\.layers\.(\d+)\.input_layernorm\.", LAYERS + "norm1."),
        (r"transformer\.layers\.(\d+)\.post_attention_layernorm\.", LAYERS + "norm2."),
        (r"transformer\.layers\.(\d+)\.mlp\.dense_h_to_4h\.", LAYERS + "mlp.fc1."),
        (r"transformer\.layers\.(\d+)\.mlp\.dense_4h_to_h\.", LAYERS + "mlp.fc2."),
        (r"transformer\.layers\.(\d+)\.self_attention\.query_key_value\.", LAYERS + "mixer.Wqkv."),
        (r"transformer\.layers\.(\d+)\.self_attention\.dense\.", LAYERS + "mixer.out_proj."),
        (r"transformer\.layers\.(\d+)\.self_attention\.rotary_emb\.", LAYERS + "mixer.rotary_emb."),
    )
    weights = {name: split_groups(x, config) if ".mixer.Wqkv." in name else x for name, x in weights.items()}
    embed(weights, config)
    return weights
