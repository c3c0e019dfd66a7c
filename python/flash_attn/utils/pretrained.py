"""Weights of Hugging Face checkpoints, from a folder or the hub."""

from __future__ import annotations

import json
import os

import torch
from torch import Tensor

__all__ = ["state_dict_from_pretrained"]

_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def _find(model_name: str, name: str) -> str | None:
    if os.path.isdir(model_name):
        path = os.path.join(model_name, name)
        return path if os.path.isfile(path) else None
    from transformers.utils.hub import cached_file

    return cached_file(model_name, name, _raise_exceptions_for_missing_entries=False)


def _load(path: str, device) -> dict[str, Tensor]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path, device=str(device))
    return torch.load(path, map_location=device, weights_only=True)


def state_dict_from_pretrained(model_name, device=None, dtype=None) -> dict[str, Tensor]:
    """model_name: a folder, or a name on the hub (downloaded by transformers). -> the weights as they are named there.

    dtype: converts on the CPU, then moves to device. Files: safetensors first, then PyTorch's (weights only), each
    whole or in shards. OSError where there is none.
    """
    model_name = os.fspath(model_name)
    for name in _FILES:
        path = _find(model_name, name)
        if path is not None:
            break
    else:
        raise OSError(f"model_name: {model_name!r} has none of {', '.join(_FILES)}")
    paths = [path]
    if name.endswith(".index.json"):
        with open(path, encoding="utf-8") as file:
            shards = sorted(set(json.load(file)["weight_map"].values()))
        paths = [_find(model_name, shard) for shard in shards]
        if None in paths:
            raise OSError(f"model_name: {model_name!r} lacks {shards[paths.index(None)]}, which {name} names")
    first = "cpu" if dtype not in (None, torch.float32) or device is None else device
    weights = {}
    for path in paths:
        weights.update(_load(path, first))
    return {name: x.to(dtype=dtype).to(device=device) for name, x in weights.items()}
