"""Prints the table of docs/names.md, from the installed package; --write puts it there.

data/upstream_names.json says what there is upstream: a module's names with their parameters (null: no function with
parameters of its own, or they are not known), and why some are refused. Whether a name is here is found by import.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch

PAGE = Path(__file__).with_name("names.md")
DATA = Path(__file__).parent / "data" / "upstream_names.json"
BEGIN, END = "<!-- names: begin -->\n", "<!-- names: end -->\n"
NONE = inspect.Parameter.empty
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class State(NamedTuple):
    module: str
    name: str  # "": the module as a whole
    state: str  # same, extended, differs, refused, missing
    said: str  # what there is more, or what differs
    reason: str = ""  # why it is refused, or differs


def states(data: dict | None = None) -> list[State]:
    data = data or json.loads(DATA.read_text(encoding="utf-8"))
    found = []
    for module, names in data["modules"].items():
        for name, signature in (names or {"": None}).items():
            place = f"{module}.{name}".rstrip(".")
            state, said = state_of(_find(module, name), signature)
            reason = ""
            if state in ("missing", "differs"):
                reason = next((why for pattern, why in data["refused"].items() if fnmatchcase(place, pattern)), "")
            if state == "missing" and reason:
                state = "refused"
            found.append(State(module, name, state, said, reason))
    return found


def _find(module: str, name: str):
    """The object, or None where there is none."""
    try:
        if module.startswith("torch.ops."):
            holder = getattr(torch.ops, module.removeprefix("torch.ops."))
        else:
            holder = importlib.import_module(module)
        return getattr(holder, name) if name else holder
    except ModuleNotFoundError as error:
        if error.name and not f"{module}.".startswith(f"{error.name}."):
            raise  # ours, but it needs what is not installed
    except ImportError as error:
        if "is not served" not in str(error):  # a module that refuses itself, in words
            raise
    except AttributeError:
        pass
    return None


def state_of(ours, upstream: str | None) -> tuple[str, str]:
    """-> state, what is said of it. upstream: "(q, k, causal=False)", or None where there is nothing to compare."""
    if ours is None:
        return "missing", ""
    if upstream is None:
        return "same", ""
    mine = list(_signature(ours).parameters.values())
    theirs = list(_parsed(upstream).parameters.values())
    at = {p.name: (i, p) for i, p in enumerate(mine)}
    for i, p in enumerate(theirs):
        if p.kind in OPEN:
            if not any(q.kind is p.kind for q in mine):
                return "differs", f"no {p}"
            continue
        if p.name not in at:
            return "differs", f"no `{p.name}`"
        place, own = at.pop(p.name)
        if p.kind in POSITIONAL and (own.kind not in POSITIONAL or place != i):
            return "differs", f"`{p.name}` stands elsewhere"
        if not _same_default(own.default, p.default):
            return "differs", f"`{p.name}` has another default"
    more = [p for _, p in at.values() if p.kind not in OPEN]
    if needed := [p.name for p in more if p.default is NONE]:
        return "differs", f"needs `{'`, `'.join(needed)}`"
    names = [f"`{p.name}`" for p in more]
    return ("extended", ", ".join(names)) if names else ("same", "")


def _signature(x) -> inspect.Signature:
    return inspect.signature(getattr(x, "_init_fn", x))  # of a torch.library.custom_op


def _parsed(text: str) -> inspect.Signature:
    """A signature whose defaults are texts."""
    arguments = ast.parse(f"lambda {text[1:-1]}: 0", mode="eval").body.args
    parameters = []
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
    kinds = inspect.Parameter
    for x, default in zip(arguments.args, defaults, strict=True):
        parameters.append((x.arg, kinds.POSITIONAL_OR_KEYWORD, default))
    if arguments.vararg:
        parameters.append((arguments.vararg.arg, kinds.VAR_POSITIONAL, None))
    for x, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append((x.arg, kinds.KEYWORD_ONLY, default))
    if arguments.kwarg:
        parameters.append((arguments.kwarg.arg, kinds.VAR_KEYWORD, None))
    return inspect.Signature(
        [kinds(name, kind, default=NONE if d is None else ast.unparse(d)) for name, kind, d in parameters]
    )


def _same_default(ours, theirs) -> bool:
    if ours is NONE or theirs is NONE:
        return ours is theirs
    if theirs == "...":  # made anew for each object
        return True
    try:
        value = eval(theirs, {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "__builtins__": {}})
    except NameError:  # something of the package
        return getattr(ours, "__name__", None) == theirs
    return ours is value or (type(ours) is type(value) and ours == value)


def table() -> str:
    data = json.loads(DATA.read_text(encoding="utf-8"))
    every = states(data)
    order = ("same", "extended", "differs", "refused", "missing")
    counts = {state: sum(x.state == state for x in every) for state in order}
    lines = ["; ".join(f"{state}: {n}" for state, n in counts.items() if n) + ".\n"]
    for module, names in data["modules"].items():
        mine = [x for x in every if x.module == module]
        lines.append(f"\n### `{module}`\n\n")
        if len({x[2:] for x in mine}) == 1 and mine[0].state in ("refused", "missing"):
            listed = ", ".join(f"`{name}`" for name in names) or "the module as a whole"
            why = f": {mine[0].reason}" if mine[0].reason else ""
            lines += [f"{mine[0].state}{why}\n\n| |\n|---|\n| {listed} |\n"]
            continue
        lines.append("| name | state | |\n|---|---|---|\n")
        lines += [f"| `{x.name}` | {x.state} | {': '.join(filter(None, x[3:]))} |\n" for x in mine]
    return "".join(lines)


def page_with(text: str) -> str:
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    return head + BEGIN + text + END + rest.split(END)[1]


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page_with(table()), encoding="utf-8")
    else:
        print(table(), end="")
