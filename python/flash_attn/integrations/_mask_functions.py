"""What a mask function of transformers says, read from the functions it is made of.

transformers composes masks of closures f(batch, head, query, key) -> bool: and_masks(overlay(8), causal).
Calling one costs seqlen_q x seqlen_k; reading which closures it consists of costs nothing. What is not known here
(an or_mask_function, a model's own closure, a future version's) is not guessed at: the answer is None, and the mask
is made dense.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rule(NamedTuple):
    """Query at p sees the keys [p - left, p + right], -1: no limit; sequence (batch, seqlen): of its own sequence."""

    left: int = -1
    right: int = -1
    sequence: Tensor | None = None


def read(function, masking_utils) -> Rule | None:
    """function: a mask function; masking_utils: the module of transformers that makes them."""
    if function is masking_utils.causal_mask_function:
        return Rule(right=0)
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return Rule()
    kind, held = getattr(function, "__qualname__", ""), _held(function)
    if held is None or getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    if kind == "sliding_window_overlay.<locals>.inner_mask" and isinstance(w := held.get("sliding_window"), int):
        return Rule(left=w - 1)
    if kind == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
        return Rule(w, w) if isinstance(w := held.get("sliding_window"), int) else None
    if kind == "packed_sequence_mask_function.<locals>.inner_mask":
        return Rule(sequence=held.get("packed_sequence_mask"))
    if kind == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        # Positions within a sequence: they count as the rows do, so a window means the same.
        return read(held.get("mask_function"), masking_utils)
    if kind == "and_masks.<locals>.and_mask":
        rules = [read(part, masking_utils) for part in held.get("mask_functions", (None,))]
        return None if None in rules else _both(rules)
    return None


def _held(function) -> dict | None:
    """The variables that a closure holds, by name."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None or function.__defaults__:
        return None
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


def _both(rules: list[Rule]) -> Rule | None:
    sequences = [rule.sequence for rule in rules if rule.sequence is not None]
    if len(sequences) > 1:
        return None
    left, right = ([x for x in limits if x >= 0] for limits in zip(*(rule[:2] for rule in rules), strict=True))
    return Rule(min(left, default=-1), min(right, default=-1), sequences[0] if sequences else None)
