"""What torch.utils.flop_counter counts for the operators.

As torch counts its own attention, every query meets every key of its sequence, whatever a mask leaves of them: 2 flops
for each product of an element of a query and a key, 2 for each of a probability and an element of a value. The backward
has five products where the forward has two. Lengths of packed sequences are read if the CPU has them; else the longest
counts for all.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys

from torch import Tensor

from flash_attn._errors import InvalidArgument


def _pairs(q: Tensor, k: Tensor, call: dict) -> int:
    """Pairs of a query and a key, of all sequences."""
    cu_q, cu_k = call.get("cu_seqlens_q"), call.get("cu_seqlens_k")
    if cu_q is None:
        return q.shape[0] * q.shape[1] * k.shape[1]
    if type(cu_q) is Tensor and type(cu_k) is Tensor and cu_q.device.type == cu_k.device.type == "cpu":
        return int((cu_q.diff().long() * cu_k.diff().long()).sum())
    longest = [call.get(name) or 0 for name in ("max_seqlen_q", "max_seqlen_k")]
    if min(longest) <= 0:
        raise InvalidArgument("max_seqlen_q, max_seqlen_k: required to count the flops of packed sequences on a device")
    return (cu_q.numel() - 1) * longest[0] * longest[1]


def forward_flops(call: dict) -> int:
    q, k, v = (call[name] for name in "qkv")
    return 2 * q.shape[-2] * _pairs(q, k, call) * (q.shape[-1] + v.shape[-1])


def backward_flops(call: dict) -> int:
    """Scores again, dV and dP over headdim_v, dQ and dK over headdim."""
    q, k, v = (call[name] for name in "qkv")
    return 2 * q.shape[-2] * _pairs(q, k, call) * (3 * q.shape[-1] + 2 * v.shape[-1])


def cache_flops(call: dict) -> int:
    """Of all rows that the cache can hold for a sequence: how many are in use may be known to a device only."""
    q, cache, v = call["q"], call["k_cache"], call["v_cache"]
    rows, table, used = cache.shape[1], call.get("block_table"), call.get("used_k")
    keys = rows if table is None else rows * table.shape[1]
    keys = keys if used is None else used
    queries = q.shape[0] * q.shape[1] if q.dim() == 4 else q.shape[0]
    return 2 * queries * q.shape[-2] * keys * (q.shape[-1] + v.shape[-1])


_COUNTER = "torch.utils.flop_counter"
_formulas: dict = {}  # by operator: those that the counter does not know yet


class _WhenCounterComes(importlib.abc.MetaPathFinder):
    """Hands our formulas to the counter when somebody imports it: it brings Triton along, where that is installed."""

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_register(module) -> None:
            run(module)
            module.flop_registry.update(_formulas)  # by packet, which is what counters look up in every torch

        spec.loader.exec_module = run_and_register
        return spec


def register(operator, names: list[str], count) -> None:
    """`count` gets a dict of the arguments that a call gave."""

    def formula(*values, out_val=None, **keywords) -> int:
        return count({**dict(zip(names, values, strict=False)), **keywords})

    if _COUNTER in sys.modules:
        sys.modules[_COUNTER].flop_registry[operator] = formula
    else:
        if not _formulas:
            sys.meta_path.insert(0, _WhenCounterComes())
        _formulas[operator] = formula
