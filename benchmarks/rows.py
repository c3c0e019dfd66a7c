"""Row operations of layers on a CPU: the compiled core against the same functions on PyTorch's operations.

python benchmarks/rows.py [--quick] [--filter WORD] [--dtypes ...] [--threads N] [--json FILE]

The bound is a copy: PyTorch's, of x to fresh memory (of as many tensors as the function returns), or over itself where
it works in place.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from flash_attn import flash_attn_qkvpacked_func
from flash_attn._C import cpu_isa
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flash_attn.ops import _norm, _rotary
from flash_attn.ops.activations import swiglu
from flash_attn.ops.triton.layer_norm import RMSNorm, rms_norm_fn
from peers import DTYPES, cpu_model
from rich.console import Console
from rich.table import Table
from timing import alternate
from torch import Tensor

ROTARY_SHAPES = (1, 2048, 32, 128), (8, 128, 32, 64), (64, 1, 32, 128)  # (batch, seqlen, nheads, headdim)
NORM_SHAPES = (2048, 4096), (1024, 2048), (64, 4096), (4096, 128)  # (rows, columns)


class Cell(NamedTuple):
    name: str
    shape: tuple[int, ...]
    modules: tuple  # whose core_serves decide
    call: Callable[[], object]
    copy: Callable[[], object]


def fresh_copy(x: Tensor, times: int = 1) -> Callable[[], object]:
    return lambda: [torch.empty_like(x).copy_(x) for _ in range(times)]


def rotary_cells(dtype: torch.dtype) -> Iterator[Cell]:
    for shape, interleaved in itertools.product(ROTARY_SHAPES, (False, True)):
        x = torch.randn(shape).to(dtype)
        angle = torch.rand(shape[1], shape[3] // 2) * 6.28
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        kind = "interleaved" if interleaved else "halves"

        def turn(x=x, cos=cos, sin=sin, interleaved=interleaved, inplace=False):
            with torch.no_grad():
                return apply_rotary_emb(x, cos, sin, interleaved, inplace)

        yield Cell(f"rotary, {kind}", shape, (_rotary,), turn, fresh_copy(x))
        in_place = lambda turn=turn: turn(inplace=True)  # noqa: E731
        yield Cell(f"rotary, {kind}, in place", shape, (_rotary,), in_place, lambda x=x: x.mul_(1))
        y, dy = apply_rotary_emb(x.requires_grad_(), cos, sin, interleaved), torch.randn(shape).to(dtype)
        yield Cell(
            f"rotary, {kind}, gradient", shape, (_rotary,),
            lambda y=y, x=x, dy=dy: torch.autograd.grad(y, x, dy, retain_graph=True), fresh_copy(dy),
        )  # fmt: skip


def norm_cells(dtype: torch.dtype) -> Iterator[Cell]:
    for shape, residual in itertools.product(NORM_SHAPES, (False, True)):
        x, dy, before, dstream = (torch.randn(shape).to(dtype) for _ in range(4))
        weight = torch.rand(shape[1]).to(dtype)
        name, results = ("rms_norm of a sum", 2) if residual else ("rms_norm", 1)
        leaves = [t.requires_grad_() for t in ((x, weight, before) if residual else (x, weight))]

        def norm(leaves=leaves, residual=residual):
            x, weight, *before = leaves
            return rms_norm_fn(x, weight, None, *before, prenorm=residual)

        def forward(norm=norm):
            with torch.no_grad():
                return norm()

        y = norm()
        yield Cell(name, shape, (_norm,), forward, fresh_copy(x.detach(), results))
        yield Cell(
            f"{name}, gradient", shape, (_norm,),
            lambda y=y, leaves=leaves, g=[dy, dstream][:results]: torch.autograd.grad(y, leaves, g, retain_graph=True),
            fresh_copy(dy),
        )  # fmt: skip


class Layer(torch.nn.Module):
    """As in Llama: norm, attention with rotary embedding, norm, SwiGLU, each pair around a residual."""

    def __init__(self, width: int, heads: int, inner: int, dtype: torch.dtype):
        super().__init__()
        self.heads = heads
        self.norms = torch.nn.ModuleList(RMSNorm(width, dtype=dtype) for _ in range(2))
        sizes = (width, 3 * width), (width, width), (width, 2 * inner), (inner, width)
        self.qkv, self.out, self.up, self.down = (torch.nn.Linear(*n, bias=False, dtype=dtype) for n in sizes)
        self.rotary = RotaryEmbedding(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        y, residual = self.norms[0](x, prenorm=True)
        qkv = self.rotary(self.qkv(y).unflatten(-1, (3, self.heads, -1)))
        y = self.out(flash_attn_qkvpacked_func(qkv, causal=True).flatten(-2))
        y, residual = self.norms[1](y, residual=residual, prenorm=True)
        return self.down(swiglu(*self.up(y).chunk(2, dim=-1))) + residual


def layer_cells(dtype: torch.dtype) -> Iterator[Cell]:
    layer, x = Layer(512, 8, 1408, dtype), torch.randn(4, 512, 512).to(dtype).requires_grad_()
    dy, leaves = torch.randn(4, 512, 512).to(dtype), [x, *layer.parameters()]
    yield Cell(
        "Llama layer, forward and gradient", (4, 512, 512), (_rotary, _norm),
        lambda: torch.autograd.grad(layer(x), leaves, dy), fresh_copy(dy),
    )  # fmt: skip


def on_torch(cell: Cell) -> Callable[[], object]:
    serves = [m.core_serves for m in cell.modules]

    def call():
        for m in cell.modules:
            m.core_serves = lambda *_: False
        try:
            return cell.call()
        finally:
            for m, s in zip(cell.modules, serves, strict=True):
                m.core_serves = s

    return call


def check(cell: Cell, name: str) -> None:
    """A wrong answer must not win a race."""
    ours, theirs = (r if isinstance(r, Tensor) else r[0] for r in (cell.call(), on_torch(cell)()))
    difference, largest = (float(t.abs().max()) for t in (ours.double() - theirs, theirs))
    if not difference <= 8 * torch.finfo(ours.dtype).eps * largest:
        sys.exit(f"rows.py: {name} {cell.name}: the answers differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter samples")
    parser.add_argument("--filter", default="", help="only what has this in its name")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of both sides")
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table("what", "shape", "dtype", title=f"the core against torch {torch.__version__}, {args.threads} threads")
    for heading in ("us", "of a copy", "speedup"):
        table.add_column(heading, justify="right")
    records = []
    for name in args.dtypes:
        for cell in itertools.chain(*(cells(DTYPES[name]) for cells in (rotary_cells, norm_cells, layer_cells))):
            if args.filter not in cell.name:
                continue
            if "in place" not in cell.name:
                check(cell, name)
            ours, theirs, copy = alternate([cell.call, on_torch(cell), cell.copy], 0.4 if args.quick else 2.0)
            figures = f"{ours * 1e6:.0f}", f"{copy / ours:.2f}", f"{theirs / ours:.2f}"
            table.add_row(cell.name, str(cell.shape), name, *figures)
            records.append(
                {
                    "name": cell.name,
                    "dtype": name,
                    "shape": cell.shape,
                    "threads": args.threads,
                    "device": cpu_model(),
                    "isa": cpu_isa(),
                    "of_copy": copy / ours,
                    "peer": "torch_operations",
                    "speedup": theirs / ours,
                }
            )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
