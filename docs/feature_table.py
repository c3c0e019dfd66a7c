"""Prints the table of docs/backends.md, from what the backends say of themselves; --write puts it there, and into
docs/backends.zh.md."""

from __future__ import annotations

import sys
from pathlib import Path

import flash_attn

PAGES = [Path(__file__).with_name(name) for name in ("backends.md", "backends.zh.md")]
BEGIN, END = "<!-- features: begin -->\n", "<!-- features: end -->\n"


def table() -> str:
    backends = flash_attn.backends()

    def row(name: str, cells: list[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |\n"

    def marks(serves) -> list[str]:
        cells = []
        for b in backends:
            passes = (("F", b.forward), ("B", b.backward))
            cells.append(" ".join(letter for letter, c in passes if c is not None and serves(c)))
        return cells

    lines = [row("", [f"`{b.name}`" for b in backends]), "|---" * (len(backends) + 1) + "|\n"]
    lines.append(row("devices", [", ".join(b.devices) for b in backends]))
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        lines.append(row(dtype, marks(lambda c, dtype=dtype: dtype in c.dtypes)))
    limits = [c.max_headdim or "any" for c in (b.forward or b.backward for b in backends)]
    lines.append(row("headdim up to", [str(x) for x in limits]))
    for feature in flash_attn.features():
        lines.append(row(f"`{feature}`", marks(lambda c, feature=feature: feature in c.features)))
    return "".join(lines)


def page_with(page: Path, text: str) -> str:
    head, rest = page.read_text(encoding="utf-8").split(BEGIN)
    return head + BEGIN + text + END + rest.split(END)[1]


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        for page in PAGES:
            page.write_text(page_with(page, table()), encoding="utf-8")
    else:
        print(table(), end="")
