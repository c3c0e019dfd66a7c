"""From transformers' configurations of other decoders to the GPT2Config of models.gpt."""

from __future__ import annotations

import math

from flash_attn._errors import NotServed


def gpt2_config(c, **own):
    """-> GPT2Config with what configurations name alike, and `own`. No positions of its own unless told: rotary
    embedding or ALiBi instead."""
    from transformers import GPT2Config

    common = dict(
        vocab_size=c.vocab_size,
        n_positions=0,
        n_embd=c.hidden_size,
        n_layer=c.num_hidden_layers,
        n_head=c.num_attention_heads,
        bos_token_id=c.bos_token_id,
        eos_token_id=c.eos_token_id,
        pad_token_id=getattr(c, "pad_token_id", None),
        tie_word_embeddings=getattr(c, "tie_word_embeddings", False),
    )
    return GPT2Config(**{**common, **own})


def _rope(config, name: str) -> dict:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise NotServed(f"{name}: positions scaled by {kind!r} are not served; expected 'default'")
    return rope


def rotary_base(config, name: str) -> float:
    """name: the argument's, for the error."""
    rope = _rope(config, name)
    for base in (getattr(config, "rotary_emb_base", None), rope.get("rope_theta"), getattr(config, "rope_theta", None)):
        if base is not None:
            return float(base)
    return 10000.0


def rotary_fraction(config, name: str) -> float:
    """GPT-NeoX's: of each head's columns."""
    fraction = _rope(config, name).get("partial_rotary_factor")
    return getattr(config, "rotary_pct", 1.0) if fraction is None else fraction


def fraction_of(rotary_dim: int, head_dim: int) -> float:
    """The rotary_emb_fraction whose product with head_dim has the integer part rotary_dim."""
    fraction = rotary_dim / head_dim
    return fraction if int(fraction * head_dim) == rotary_dim else math.nextafter(fraction, 2.0)
