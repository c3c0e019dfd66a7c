"""The records of benchmarks/results, as the plots and tables of the site read them."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@cache
def records(name: str) -> list[dict]:
    """Of a file, without its ending: "nvidia-h200/triton"."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def choose(file: str, /, **wanted) -> list[dict]:
    """The records with these values."""
    return [r for r in records(file) if r.get("name") != "header" and all(r[k] == value for k, value in wanted.items())]


def only(file: str, /, **wanted) -> dict:
    found = choose(file, **wanted)
    assert len(found) == 1, f"{file}: {len(found)} records with {wanted}"
    return found[0]


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


_SHAPE = ("batch", "nheads_q", "nheads_k", "seqlen_q", "seqlen", "headdim", "causal")


def ratios(file: str, of: str, to: str, /, **wanted) -> list[float]:
    """tflops of one implementation over another's, shape by shape."""
    shape = lambda r: tuple(r[key] for key in _SHAPE)  # noqa: E731
    other = {shape(r): r["tflops"] for r in choose(file, impl=to, **wanted)}
    return [r["tflops"] / other[shape(r)] for r in choose(file, impl=of, **wanted) if other.get(shape(r))]
