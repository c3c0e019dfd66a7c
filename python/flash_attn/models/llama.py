"""Llama's weights and configuration for models.gpt."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from flash_attn._errors import NotServed
from flash_attn.models._config import gpt2_config, rotary_base
from flash_attn.models._weights import LAYERS, WORDS, embed, heads_kv, joined, renamed

__all__ = [
    "config_from_checkpoint",
    "config_from_hf_checkpoint",
    "config_from_meta_checkpoint",
    "inv_remap_state_dict_hf_llama",
    "llama_config_to_gpt2_config",
    "remap_state_dict_hf_llama",
    "remap_state_dict_meta_llama",
    "state_dicts_from_checkpoint",
]


def remap_state_dict_meta_llama(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """Meta's names -> those of GPTLMHeadModel(config)."""
    weights = renamed(
        state_dict,
        (r"tok_embeddings\.", "transformer.embeddings.word_embeddings."),
        (r"norm\.", "transformer.ln_f."),
        (r"layers\.(\d+)\.attention_norm\.", LAYERS + "norm1."),
        (r"layers\.(\d+)\.ffn_norm\.", LAYERS + "norm2."),
        (r"layers\.(\d+)\.feed_forward\.w2\.", LAYERS + "mlp.fc2."),
        (r"layers\.(\d+)\.attention\.wo\.", LAYERS + "mixer.out_proj."),
        (r"layers\.(\d+)\.", LAYERS),
    )
    embed(weights, config, "output.weight")
    for i in range(config.n_layer):
        layer = f"transformer.layers.{i}"
        joined(weights, layer, ["feed_forward.w3", "feed_forward.w1"], "mlp.fc1")
        joined(weights, layer, ["attention.wq", "attention.wk", "attention.wv"], "mixer.Wqkv")
        weights.pop(f"{layer}.attention.inner_attention.rope.freqs", None)
    weights.pop("rope.freqs", None)
    return weights


def _interleaved(w: Tensor, nheads: int) -> Tensor:
    """Rows of each head from rotary halves (0 and d/2, ...) to pairs (0 and 1, ...)."""
    return w.unflatten(0, (nheads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _halves(w: Tensor, nheads: int) -> Tensor:
    return w.unflatten(0, (nheads, -1, 2)).transpose(1, 2).flatten(0, 2)


_HF_RULES = [
    (r"(?:model\.)?embed_tokens\.", "transformer.embeddings.word_embeddings."),
    (r"(?:model\.)?norm\.", "transformer.ln_f."),
    (r"(?:model\.)?layers\.(\d+)\.input_layernorm\.", LAYERS + "norm1."),
    (r"(?:model\.)?layers\.(\d+)\.post_attention_layernorm\.", LAYERS + "norm2."),
    (r"(?:model\.)?layers\.(\d+)\.mlp\.down_proj\.", LAYERS + "mlp.fc2."),
    (r"(?:model\.)?layers\.(\d+)\.self_attn\.o_proj\.", LAYERS + "mixer.out_proj."),
    (r"(?:model\.)?layers\.(\d+)\.", LAYERS),
]


def remap_state_dict_hf_llama(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """transformers' names -> those of GPTLMHeadModel(config); config.n_head_kv may be less than n_head."""
    weights = renamed(state_dict, *_HF_RULES)
    embed(weights, config)

    def turned(parts):
        q, k, v = parts
        return _interleaved(q, config.n_head), _interleaved(k, heads_kv(config)), v

    for i in range(config.n_layer):
        layer = f"transformer.layers.{i}"
        joined(weights, layer, ["mlp.up_proj", "mlp.gate_proj"], "mlp.fc1")
        joined(weights, layer, [f"self_attn.{x}_proj" for x in "qkv"], "mixer.Wqkv", turned)
        weights.pop(f"{layer}.self_attn.rotary_emb.inv_freq", None)
    return weights


def inv_remap_state_dict_hf_llama(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """The way back; a padded vocabulary stays padded."""
    weights = dict(state_dict)
    head_dim = config.hidden_size // config.n_head
    q_rows, k_rows = config.n_head * head_dim, heads_kv(config) * head_dim
    for i in range(config.n_layer):
        ours, theirs = f"transformer.layers.{i}", f"model.layers.{i}"
        for kind in ("weight", "bias"):
            if f"{ours}.mlp.fc1.{kind}" in weights:
                up, gate = weights.pop(f"{ours}.mlp.fc1.{kind}").chunk(2)
                weights[f"{theirs}.mlp.up_proj.{kind}"], weights[f"{theirs}.mlp.gate_proj.{kind}"] = up, gate
            if f"{ours}.mixer.Wqkv.{kind}" in weights:
                q, k, v = weights.pop(f"{ours}.mixer.Wqkv.{kind}").split([q_rows, k_rows, k_rows])
                weights[f"{theirs}.self_attn.q_proj.{kind}"] = _halves(q, config.n_head)
                weights[f"{theirs}.self_attn.k_proj.{kind}"] = _halves(k, heads_kv(config))
                weights[f"{theirs}.self_attn.v_proj.{kind}"] = v
    if getattr(config, "tie_word_embeddings", False):
        weights["lm_head.weight"] = weights[WORDS]
    return renamed(
        weights,
        (r"transformer\.embeddings\.word_embeddings\.", "model.embed_tokens."),
        (r"transformer\.ln_f\.", "model.norm."),
        (r"transformer\.layers\.(\d+)\.norm1\.", r"model.layers.\1.input_layernorm."),
        (r"transformer\.layers\.(\d+)\.norm2\.", r"model.layers.\1.post_attention_layernorm."),
        (r"transformer\.layers\.(\d+)\.mlp\.fc2\.", r"model.layers.\1.mlp.down_proj."),
        (r"transformer\.layers\.(\d+)\.mixer\.out_proj\.", r"model.layers.\1.self_attn.o_proj."),
    )


def config_from_meta_checkpoint(checkpoint_path: str | os.PathLike, model_name: str):
    """-> transformers' LlamaConfig of Meta's folder checkpoint_path/model_name. Its vocabulary is counted by
    sentencepiece where tokenizer.model lies there, else 32000."""
    from transformers import LlamaConfig

    folder = Path(checkpoint_path) / model_name
    params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
    multiple_of = params.get("multiple_of", 1)
    width = int(8 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    vocab_size = 32000
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        vocab_size = SentencePieceProcessor(str(folder / "tokenizer.model")).vocab_size()
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=params["dim"],
        intermediate_size=-(-width // multiple_of) * multiple_of,
        num_attention_heads=params["n_heads"],
        num_hidden_layers=params["n_layers"],
        rms_norm_eps=params["norm_eps"],
        num_key_value_heads=params.get("n_kv_heads"),
    )
    if "rope_theta" in params:
        config.rotary_emb_base = params["rope_theta"]
    return config


def config_from_hf_checkpoint(checkpoint_path: str | os.PathLike, model_name: str):
    """-> LlamaConfig of checkpoint_path/model_name-hf/config.json."""
    from transformers import LlamaConfig

    return LlamaConfig.from_pretrained(Path(checkpoint_path) / f"{model_name}-hf" / "config.json")


def config_from_checkpoint(checkpoint_path: str | os.PathLike, model_name: str, checkpoint_format="meta"):
    """checkpoint_format: "meta", or else transformers'."""
    read = config_from_meta_checkpoint if checkpoint_format == "meta" else config_from_hf_checkpoint
    return read(checkpoint_path, model_name)


def state_dicts_from_checkpoint(checkpoint_path: str | os.PathLike, model_name: str) -> list[dict]:
    """-> the weights of each of Meta's files, consolidated.00.pth and on."""
    files = sorted((Path(checkpoint_path) / model_name).glob("consolidated.*.pth"))
    return [torch.load(path, map_location="cpu", weights_only=True) for path in files]


def llama_config_to_gpt2_config(llama_config):
    """-> the GPT2Config of the same model as GPTLMHeadModel, with rotary embedding, RMSNorm and SwiGLU.

    From llama_config: also the heads of keys, the base of positions, biases, and whether the embedding is tied.
    """
    c = llama_config
    if getattr(c, "head_dim", None) not in (None, c.hidden_size // c.num_attention_heads):
        raise NotServed(f"llama_config: head_dim: expected hidden_size / num_attention_heads, got {c.head_dim}")
    attention_bias, mlp_bias = getattr(c, "attention_bias", False), getattr(c, "mlp_bias", False)
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
        rotary_emb_fraction=1.0,
        rotary_emb_interleaved=True,
        rotary_emb_base=rotary_base(c, "llama_config"),
        qkv_proj_bias=attention_bias,
        out_proj_bias=attention_bias,
        mlp_fc1_bias=mlp_bias,
        mlp_fc2_bias=mlp_bias,
        mlp_multiple_of=1,
        n_head_kv=c.num_key_value_heads,
    )
