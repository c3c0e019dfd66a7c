"""The table of upstream's names in docs/names.md, and the script that makes it."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
import names_table


@pytest.fixture
def states() -> list[names_table.State]:
    try:
        return names_table.states()
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed, and a module of ours needs it")


def test_the_table_is_current(states) -> None:
    page = names_table.PAGE.read_text(encoding="utf-8")
    assert page == names_table.page_with(names_table.table()), "python docs/names_table.py --write"


def test_nothing_differs_for_no_reason(states) -> None:
    assert not [x for x in states if x.state == "differs" and not x.reason]


def test_every_reason_is_needed(states) -> None:
    """What is refused is not here, or differs. Whoever makes a name that was refused takes the reason out."""
    data = names_table.json.loads(names_table.DATA.read_text(encoding="utf-8"))
    refused = [f"{x.module}.{x.name}".rstrip(".") for x in states if x.reason]
    assert not [p for p in data["refused"] if not any(fnmatchcase(name, p) for name in refused)]


def two(q, k, causal=False, *, sink=None):
    pass


@pytest.mark.parametrize(
    ("upstream", "state", "said"),
    [
        (None, "same", ""),
        ("(q, k, causal=False, *, sink=None)", "same", ""),
        ("(q, k, causal=False)", "extended", "`sink`"),
        ("(q, k)", "extended", "`causal`, `sink`"),
        ("(q, causal=False)", "differs", "`causal` stands elsewhere"),
        ("(q, k, causal=True)", "differs", "`causal` has another default"),
        ("(q, k, causal=0)", "differs", "`causal` has another default"),
        ("(q, k, causal)", "differs", "`causal` has another default"),
        ("(q, k, causal=False, window=None)", "differs", "no `window`"),
        ("(q, k, causal=False, sink=None)", "differs", "`sink` stands elsewhere"),
        ("(q, k, **rest)", "differs", "no **rest"),
        ("(q)", "differs", "needs `k`"),
    ],
)
def test_states(upstream, state, said) -> None:
    assert names_table.state_of(two, upstream) == (state, said)


def test_states_of_classes_and_operators() -> None:
    assert names_table.state_of(None, "(q)") == ("missing", "")
    assert names_table.state_of(torch.nn.Identity, "(*args, **kwargs)") == ("same", "")
    assert names_table._find("flash_attn", "flash_attn_func") is not None
    assert names_table._find("torch.ops.flash_attn", "_flash_attn_forward") is not None
    for module, name in (("flash_attn", "no"), ("flash_attn.no.such", "x"), ("torch.ops.flash_attn", "no"), ("no", "")):
        assert names_table._find(module, name) is None
