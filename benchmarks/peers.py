"""flash_attn against PyTorch's scaled_dot_product_attention: same tensors, same threads, samples in turns.

python benchmarks/peers.py [--shapes mixed|quick|short] [--backward] [--filter WORDS] [--threads N ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from flash_attn import cpu_isa, flash_attn_func, set_num_threads
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timing import alternate
from torch.nn.functional import scaled_dot_product_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest difference that two right answers may show for normal inputs; a wrong one must not win a race.
TOLERANCE = {"fp32": 1e-4, "bf16": 6e-2, "fp16": 1e-2}


@dataclass(frozen=True)
class Shape:
    batch: int
    nheads: int
    nheads_k: int
    seqlen_q: int
    seqlen_k: int
    headdim: int
    causal: bool

    def __str__(self) -> str:
        heads = str(self.nheads) if self.nheads == self.nheads_k else f"{self.nheads}:{self.nheads_k}"
        seqlen = str(self.seqlen_q) if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q} x {self.seqlen_k}"
        mask = "causal" if self.causal else "full"
        return f"batch {self.batch} heads {heads} seqlen {seqlen} headdim {self.headdim} {mask}"

    def flops(self, backward: bool) -> float:
        """Two products forward, five backward; half of them under a causal mask."""
        pairs = self.batch * self.nheads * self.seqlen_q * self.seqlen_k * (0.5 if self.causal else 1.0)
        return (10.0 if backward else 4.0) * pairs * self.headdim


# Causal shapes are square: SDPA aligns its causal mask to the top left, flash_attn to the bottom right.
SHAPES = [
    Shape(8, 8, 8, 128, 128, 32, False),
    Shape(8, 8, 8, 128, 128, 64, True),
    Shape(4, 8, 8, 256, 256, 64, False),
    Shape(4, 8, 8, 256, 256, 128, True),
    Shape(2, 8, 8, 512, 512, 64, False),
    Shape(2, 8, 8, 512, 512, 64, True),
    Shape(2, 8, 2, 512, 512, 128, True),
    Shape(1, 4, 4, 512, 512, 256, False),
    Shape(1, 8, 8, 1024, 1024, 32, True),
    Shape(1, 8, 8, 1024, 1024, 64, False),
    Shape(1, 8, 8, 1024, 1024, 64, True),
    Shape(1, 8, 2, 1024, 1024, 128, False),
    Shape(1, 4, 4, 256, 2048, 64, False),
    Shape(1, 4, 1, 64, 4096, 128, False),
    Shape(1, 4, 4, 2048, 512, 64, False),
    Shape(1, 4, 4, 2048, 2048, 64, True),
    Shape(1, 4, 4, 2048, 2048, 128, True),
    Shape(1, 2, 2, 4096, 4096, 64, True),
    Shape(1, 2, 1, 4096, 4096, 128, False),
    Shape(1, 1, 1, 8192, 8192, 64, True),
]
QUICK = [SHAPES[i] for i in (1, 4, 6, 10, 12, 16)]
# Many short sequences. The heads of a token lie next to each other, so a token's row takes nheads * headdim numbers: in
# fp32 2, 4 and 8 KiB, and tasks of neighbouring heads share every page of memory. Outputs take 8 to 64 MiB in fp32.
SHORT = [
    Shape(8, 8, 8, 256, 256, 64, True),
    Shape(32, 8, 8, 128, 128, 64, False),
    Shape(128, 8, 8, 64, 64, 64, True),
    Shape(64, 4, 4, 128, 128, 128, False),
    Shape(8, 8, 8, 256, 256, 128, False),
    Shape(64, 8, 8, 128, 128, 128, True),
    Shape(32, 16, 16, 128, 128, 64, True),
    Shape(128, 16, 16, 32, 32, 64, False),
    Shape(4, 16, 16, 256, 256, 128, True),
    Shape(16, 16, 16, 128, 128, 128, False),
    Shape(32, 32, 32, 256, 256, 64, True),
    Shape(64, 32, 32, 32, 32, 64, True),
]
SETS = {"mixed": SHAPES, "quick": QUICK, "short": SHORT}


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def contenders(shape: Shape, dtype: torch.dtype, backward: bool) -> tuple[list[Callable[[], object]], float]:
    """[ours, SDPA on views of our layout, SDPA on its own layout], and how far ours is from SDPA's answer."""
    generator = torch.Generator().manual_seed(1)

    def normal(seqlen: int, nheads: int) -> torch.Tensor:
        x = torch.randn(shape.batch, seqlen, nheads, shape.headdim, generator=generator)
        return x.to(dtype).requires_grad_(backward)

    ours = [
        normal(shape.seqlen_q, shape.nheads),
        normal(shape.seqlen_k, shape.nheads_k),
        normal(shape.seqlen_k, shape.nheads_k),
    ]
    own = [x.detach().transpose(1, 2).contiguous().requires_grad_(backward) for x in ours]

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=shape.nheads != shape.nheads_k)

    def run_ours() -> torch.Tensor:
        return flash_attn_func(*ours, causal=shape.causal)

    def run_views() -> torch.Tensor:
        return sdpa(*(x.transpose(1, 2) for x in ours))

    def run_own() -> torch.Tensor:
        return sdpa(*own)

    if not backward:
        with torch.no_grad():
            difference = (run_ours().float() - run_own().transpose(1, 2).float()).abs().max().item()
        return [run_ours, run_views, run_own], difference

    def gradient(run: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> Callable[[], tuple[torch.Tensor, ...]]:
        out = run()
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)

    calls = [gradient(run_ours, ours), gradient(run_views, ours), gradient(run_own, own)]
    out = run_ours()
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    mine = torch.autograd.grad(out, ours, dout)
    theirs = torch.autograd.grad(run_views(), ours, dout.transpose(1, 2))
    difference = max(
        ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1)).item()
        for a, b in zip(mine, theirs, strict=True)
    )
    return calls, difference


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))


def measure(args: argparse.Namespace, console: Console) -> list[dict]:
    name = "backward" if args.backward else "forward"
    shapes = SETS[args.shapes]
    cells = [(s, d) for d in args.dtypes for s in shapes if args.filter in f"{name} {d} {s}"]
    if not cells:
        sys.exit(f"peers.py: --filter: no cell contains {args.filter!r}")
    table = Table("dtype", "shape", title=f"{name}, ours against torch {torch.__version__}")
    for heading in ("threads", "ours ms", "SDPA ms", "GFLOP/s", "speedup"):
        table.add_column(heading, justify="right")
    records = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=len(cells))
        for shape, dtype in cells:
            progress.update(task, description=f"{dtype} {shape}")
            calls, difference = contenders(shape, DTYPES[dtype], args.backward)
            if not difference <= TOLERANCE[dtype]:
                sys.exit(f"peers.py: {dtype} {shape}: the answers differ by {difference:.1e}")
            for threads in args.threads:
                torch.set_num_threads(threads)
                set_num_threads(threads)
                with torch.set_grad_enabled(args.backward):
                    ours, views, own = alternate(calls, args.seconds)
                theirs = min(views, own)
                gflops, speedup = shape.flops(args.backward) / ours * 1e-9, theirs / ours
                colour = "green" if speedup >= 1 else "red"
                table.add_row(
                    dtype, str(shape), str(threads), f"{ours * 1e3:.3f}", f"{theirs * 1e3:.3f}", f"{gflops:.1f}",
                    f"[{colour}]{speedup:.2f}[/{colour}]",
                )  # fmt: skip
                records.append(
                    {
                        "name": name,
                        "dtype": dtype,
                        "batch": shape.batch,
                        "nheads_q": shape.nheads,
                        "nheads_k": shape.nheads_k,
                        "seqlen_q": shape.seqlen_q,
                        "seqlen": shape.seqlen_k,
                        "headdim": shape.headdim,
                        "causal": shape.causal,
                        "threads": threads,
                        "device": cpu_model(),
                        "isa": cpu_isa(),
                        "gflops": gflops,
                        "of_peak": None,
                        "peer": "torch_sdpa",
                        "speedup": speedup,
                    }
                )
            progress.advance(task)
    console.print(table)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backward", action="store_true", help="time the gradient instead of the forward")
    parser.add_argument(
        "--shapes", choices=SETS, default="mixed", help="mixed: 20; quick: 6 of them; short: 12 of many short sequences"
    )
    parser.add_argument("--quick", action="store_true", help="--shapes quick, and shorter samples")
    parser.add_argument("--filter", default="", help='only cells whose words contain this, as in "headdim 128 causal"')
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[len(os.sched_getaffinity(0))], help="of both sides; one or several"
    )
    parser.add_argument("--seconds", type=float, help="for each cell (default 3; quick 0.7)")
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    args = parser.parse_args()
    if args.quick:
        args.shapes = "quick"
    args.seconds = args.seconds or (0.7 if args.quick else 3.0)
    console = Console(width=None if sys.stdout.isatty() else 120)
    records = measure(args, console)
    for dtype, threads in itertools.product(args.dtypes, args.threads):
        speedups = [r["speedup"] for r in records if r["dtype"] == dtype and r["threads"] == threads]
        if speedups:
            mean, least = geometric_mean(speedups), min(speedups)
            console.print(f"{dtype}, {threads} threads: geometric mean {mean:.2f}, minimum {least:.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
