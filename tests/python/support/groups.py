"""The groups of a call of the compiled module, from keywords by name."""

from __future__ import annotations

from flash_attn._call import Dropout, Run, Scores, Sequences


def groups(**given) -> tuple:
    """-> sequences, scores, dropout, run."""
    made = []
    for Group in (Sequences, Scores, Dropout, Run):
        made.append(Group(**{name: given.pop(name) for name in Group._fields if name in given}))
    assert not given, f"no group has {list(given)}"
    return tuple(made)
