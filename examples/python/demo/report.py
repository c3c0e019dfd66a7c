"""Plots and one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt
from compare import Result
from gpt import Step
from matplotlib.axes import Axes

OURS, THEIRS, GREY = "#d9480f", "#4c6ef5", "#868e96"

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  body {{ font: 16px/1.55 system-ui, sans-serif; color: #212529; max-width: 62rem;
          margin: 2.5rem auto; padding: 0 1rem; }}
  h1 {{ font-size: 1.8rem; margin-bottom: 0; }}
  h2 {{ margin-top: 2.6rem; border-bottom: 1px solid #dee2e6; padding-bottom: .2rem; }}
  table {{ border-collapse: collapse; width: 100%; font-size: .92rem; }}
  th, td {{ text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e9ecef; vertical-align: top; }}
  td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
  pre {{ background: #f8f9fa; border-left: 4px solid #d9480f; padding: .8rem 1rem; white-space: pre-wrap;
         font-size: .82rem; line-height: 1.4; }}
  pre b {{ color: #d9480f; }}
  img {{ width: 100%; }}
  .lead {{ color: #495057; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


class Report:
    """Collects pieces in order; `write` puts them on one page."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.pieces: list[str] = []

    def heading(self, text: str) -> None:
        self.pieces.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        self.pieces.append(f'<p class="lead">{html.escape(text)}</p>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> None:
        """The columns from `numbers_from` on are numbers."""

        def row(cells: Sequence[str], tag: str) -> str:
            kinds = ("" if index < numbers_from else ' class="number"' for index in range(len(cells)))
            parts = (f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
            return f"<tr>{''.join(parts)}</tr>"

        lines = [row(header, "th")] if header else []
        lines += [row(cells, "td") for cells in rows]
        self.pieces.append(f"<table>{''.join(lines)}</table>")

    def sample(self, prompt: str, continuation: str) -> None:
        self.pieces.append(f"<pre><b>{html.escape(prompt)}</b>{html.escape(continuation)}</pre>")

    def plot(self, figure: plt.Figure, description: str) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight")
        plt.close(figure)
        data = base64.b64encode(buffer.getvalue()).decode()
        self.pieces.append(f'<img alt="{html.escape(description)}" src="data:image/svg+xml;base64,{data}">')

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        page = PAGE.format(title=html.escape(self.title), body="\n".join(self.pieces))
        path.write_text(page, encoding="utf-8")


def plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e9ecef")
    axes.set_axisbelow(True)


def comparison(results: Sequence[Result]) -> plt.Figure:
    """Speed on the left, error on the right, one row for each case."""
    figure, (speed, error) = plt.subplots(1, 2, sharey=True, figsize=(11, 0.9 + 0.42 * len(results)))
    rows = range(len(results))
    speed.barh(rows, [r.speedup for r in results], color=OURS, height=0.6)
    speed.axvline(1, color=GREY, linestyle="--", linewidth=1)
    for row, result in zip(rows, results, strict=True):
        speed.annotate(f" {result.speedup:.2f}", (result.speedup, row), va="center", fontsize=9)
    speed.set_yticks(rows, [r.case.name for r in results], fontsize=9)
    speed.invert_yaxis()
    speed.set_xlabel("speed, in times PyTorch's (dashed)")
    error.scatter([r.error_sdpa for r in results], rows, color=THEIRS, label="PyTorch", marker="D", s=28)
    error.scatter([r.error for r in results], rows, color=OURS, label="flash_attn", s=42)
    error.set_xscale("log")
    error.set_xlabel("largest error against float64")
    error.legend(frameon=False, fontsize=9)
    for axes in (speed, error):
        plain(axes)
    return figure


def losses(steps: Sequence[Step]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(11, 4))
    axes.plot([s.number for s in steps], [s.train for s in steps], color=OURS, alpha=0.35, linewidth=1, label="train")
    held_out = [(s.number, s.held_out) for s in steps if s.held_out is not None]
    axes.plot(*zip(*held_out, strict=True), color=THEIRS, marker="o", markersize=3, label="held-out documents")
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    plain(axes)
    axes.grid(axis="y", color="#e9ecef")
    return figure
