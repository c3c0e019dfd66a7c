"""Renaming and joining of weights."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS, LAYERS = "transformer.embeddings.word_embeddings.weight", r"transformer.layers.\1."


def renamed(state_dict: dict[str, Tensor], *rules: tuple[str, str]) -> dict[str, Tensor]:
    """The same weights; each rule (pattern, replacement) applies to names from their beginning."""
    result = {}
    for name, x in state_dict.items():
        for pattern, replacement in rules:
            name = re.sub("^" + pattern, replacement, name)
        result[name] = x
    return result


def without(state_dict: dict[str, Tensor], *endings: str) -> dict[str, Tensor]:
    """The weights whose names do not end so."""
    return {name: x for name, x in state_dict.items() if not name.endswith(endings)}


def joined(weights: dict[str, Tensor], layer: str, names: list[str], into: str, turn=None) -> None:
    """Stacks weights (and biases, where there are) of a layer, in place."""
    for kind in ("weight", "bias"):
        parts = [weights.pop(f"{layer}.{name}.{kind}", None) for name in names]
        if parts[0] is not None:
            weights[f"{layer}.{into}.{kind}"] = torch.cat(parts if turn is None else turn(parts))


def padded_size(n: int, config) -> int:
    """n, rounded up to config.pad_vocab_size_multiple (default 1)."""
    multiple = getattr(config, "pad_vocab_size_multiple", 1)
    return -(-n // multiple) * multiple


def padded_rows(x: Tensor, rows: int, value: float = 0.0) -> Tensor:
    """x (n, ...) -> (rows, ...)."""
    return F.pad(x, [0, 0] * (x.dim() - 1) + [0, rows - x.shape[0]], value=value)


def embed(weights: dict[str, Tensor], config, head: str = "lm_head.weight") -> None:
    """Pads the vocabulary, in place; `head`: the name of the output's weight, if it has its own."""
    weights[WORDS] = padded_rows(weights[WORDS], padded_size(weights[WORDS].shape[0], config))
    own = weights.pop(head, None)
    tied = getattr(config, "tie_word_embeddings", False) or own is None
    weights["lm_head.weight"] = weights[WORDS] if tied else padded_rows(own, padded_size(own.shape[0], config))


def heads_kv(config) -> int:
    return getattr(config, "n_head_kv", None) or config.n_head


def split_groups(x: Tensor, config) -> Tensor:
    """x: for each head of keys its queries' heads, k and v, as rows -> Wqkv's order: all of q, all of k, all of v."""
    nheads_k = heads_kv(config)
    group = config.n_head // nheads_k
    parts = x.unflatten(0, (nheads_k, group + 2, -1)).split([group, 1, 1], dim=1)
    return torch.cat([part.flatten(0, 2) for part in parts])


def join_groups(x: Tensor, config) -> Tensor:
    """split_groups' inverse."""
    nheads_k = heads_kv(config)
    group = config.n_head // nheads_k
    q, k, v = x.unflatten(0, (config.n_head + 2 * nheads_k, -1)).split([config.n_head, nheads_k, nheads_k])
    q = q.unflatten(0, (nheads_k, group))
    return torch.cat([q, k[:, None], v[:, None]], dim=1).flatten(0, 2)
