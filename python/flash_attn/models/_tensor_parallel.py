"""The weights of models.gpt, cut for the processes of a group and put together again."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._errors import InvalidArgument
from flash_attn.models._weights import padded_size
from flash_attn.utils.distributed import get_dim_for_local_rank

_GATED = ("glu", "swiglu", "geglu")


def _shares(n: int, world_size: int, multiple_of: int = 1) -> list[int]:
    return [get_dim_for_local_rank(n, world_size, rank, multiple_of) for rank in range(world_size)]


def _cut(name: str, config, world_size: int):
    """How a weight is cut: None, or its dimension and for each part along it (q's heads, k's, v's; values, gates) the
    ranks' sizes."""
    hidden, n_head = config.hidden_size, config.n_head
    n_head_kv = getattr(config, "n_head_kv", None) or n_head
    head_dim, group = hidden // n_head, n_head // n_head_kv
    inner = config.n_inner if config.n_inner is not None else 4 * hidden
    if name.endswith(("word_embeddings.weight", "lm_head.weight", "lm_head.bias")):
        return 0, [_shares(padded_size(config.vocab_size, config), world_size)]
    if name.endswith("position_embeddings.weight"):
        return -1, [_shares(hidden, world_size)]
    if ".mixer.Wqkv." in name:
        kv = _shares(n_head_kv * head_dim, world_size, head_dim)
        return 0, [[n * group for n in kv], kv, kv]
    if name.endswith(".mixer.out_proj.weight"):
        return -1, [_shares(hidden, world_size, head_dim * group)]
    if ".mlp.fc1." in name:
        gated = config.activation_function in _GATED
        return 0, [_shares(inner, world_size)] * (2 if gated else 1)
    if name.endswith(".mlp.fc2.weight"):
        return -1, [_shares(inner, world_size)]
    return None


def _check(config, world_size: int) -> None:
    sizes = {"vocab_size": padded_size(config.vocab_size, config), "hidden_size": config.hidden_size}
    sizes["n_inner"] = config.n_inner if config.n_inner is not None else 4 * config.hidden_size
    for name, n in sizes.items():
        if n % world_size:
            raise InvalidArgument(f"{name}: expected a multiple of world_size = {world_size}, got {n}")


def shard_state_dict_tp(state_dict: dict[str, Tensor], config, world_size: int, rank: int) -> dict[str, Tensor]:
    """The whole model's weights -> those of one process. The vocabulary, hidden_size and n_inner divide evenly; heads
    may not, keys' heads go with their queries'."""
    _check(config, world_size)
    weights = {}
    for name, x in state_dict.items():
        cut = _cut(name, config, world_size)
        if cut is not None:
            dim, parts = cut
            pieces = x.split([n for sizes in parts for n in sizes], dim=dim)
            weights[name] = torch.cat(pieces[rank::world_size], dim=dim)
        elif rank == 0 or not name.endswith((".mixer.out_proj.bias", ".mlp.fc2.bias")):
            weights[name] = x
    return weights


def combine_state_dicts_tp(state_dicts: list[dict[str, Tensor]], config) -> dict[str, Tensor]:
    """The weights of all processes, in the order of ranks -> the whole model's."""
    world_size = len(state_dicts)
    _check(config, world_size)
    weights = {}
    for name, x in state_dicts[0].items():  # rank 0 has all names
        cut = _cut(name, config, world_size)
        if cut is None:
            weights[name] = x
            continue
        dim, parts = cut
        pieces = [s[name].split([sizes[rank] for sizes in parts], dim=dim) for rank, s in enumerate(state_dicts)]
        weights[name] = torch.cat([pieces[r][i] for i in range(len(parts)) for r in range(world_size)], dim=dim)
    return weights
