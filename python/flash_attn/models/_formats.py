"""Whose weights a checkpoint has, by their names."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flash_attn._errors import NotServed
from flash_attn.models._gpt2 import remap_state_dict_hf_gpt2
from flash_attn.models.baichuan import remap_state_dict_hf_baichuan
from flash_attn.models.bigcode import remap_state_dict_hf_bigcode
from flash_attn.models.btlm import remap_state_dict_hf_btlm
from flash_attn.models.falcon import remap_state_dict_hf_falcon
from flash_attn.models.gpt_neox import remap_state_dict_hf_gpt_neox
from flash_attn.models.gptj import remap_state_dict_hf_gptj
from flash_attn.models.llama import remap_state_dict_hf_llama
from flash_attn.models.opt import remap_state_dict_hf_opt

# A weight that nobody else has, without the prefix of the model with a head; the first that is there counts.
_TELLING = {
    "h.0.mlp.c_fc2.weight": remap_state_dict_hf_btlm,
    "h.0.attn.c_attn.weight": remap_state_dict_hf_gpt2,
    "h.0.mlp.fc_in.weight": remap_state_dict_hf_gptj,
    "h.0.self_attention.query_key_value.weight": remap_state_dict_hf_falcon,
    "layers.0.attention.query_key_value.weight": remap_state_dict_hf_gpt_neox,
    "decoder.layers.0.self_attn.q_proj.weight": remap_state_dict_hf_opt,
    "layers.0.self_attn.W_pack.weight": remap_state_dict_hf_baichuan,
    "layers.0.self_attn.q_proj.weight": remap_state_dict_hf_llama,
}


def remap_of(state_dict: dict[str, Tensor], model_name: str) -> Callable[..., dict[str, Tensor]]:
    """-> the function that renames them, remap(state_dict, config)."""
    bare = {}
    for name, x in state_dict.items():
        for prefix in ("transformer.", "gpt_neox.", "model."):
            name = name.removeprefix(prefix)
        bare[name] = x
    for name, remap in _TELLING.items():
        if name in bare:
            x = bare[name]
            if remap is remap_state_dict_hf_gpt2 and x.shape[0] > x.shape[1]:
                return remap_state_dict_hf_bigcode  # the same names, (out, in) instead of (in, out)
            return remap
    raise NotServed(
        f"model_name: {model_name!r} has no weights of a known model: rename them to this model's state_dict keys, "
        "and use load_state_dict"
    )
