"""What a call costs besides arithmetic: microseconds of Python, milliseconds of import, bytes of workspace.

python benchmarks/overhead.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from flash_attn import flash_attn_func
from rich.console import Console
from rich.table import Table
from timing import alternate

IMPORT = """
import time
import torch
start = time.perf_counter()
import flash_attn
print(time.perf_counter() - start)
"""

# The peak of resident memory (VmHWM), reset just before the call: what the call adds beyond its inputs and its output.
MEMORY = """
import re, sys
import torch
from flash_attn import flash_attn_func

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))

def peak_of(call):
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = status("VmRSS")
    result = call()
    return status("VmHWM") - before, result

seqlen = int(sys.argv[1])
q, k, v, dout = (torch.randn(1, seqlen, 2, 64).requires_grad_(i < 3) for i in range(4))
# Threads and lazily loaded code come once, not per call.
warm = [torch.randn(1, 64, 2, 64, requires_grad=True) for _ in range(3)]
flash_attn_func(*warm).sum().backward()
forward, out = peak_of(lambda: flash_attn_func(q, k, v))
backward, gradients = peak_of(lambda: torch.autograd.grad(out, (q, k, v), dout))
kib = q.nbytes // 1024
print(forward - kib, backward - 3 * kib)
"""


def run_python(code: str, *args: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True, text=True).stdout


def call_overhead() -> dict[str, float]:
    """Microseconds of a call so small that arithmetic does not count: batch 1, one head, seqlen 16, headdim 64."""
    q, k, v = (torch.randn(1, 16, 1, 64) for _ in range(3))
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    with torch.no_grad():
        ours, sdpa = alternate(
            [
                lambda: flash_attn_func(q, k, v),
                lambda: torch.nn.functional.scaled_dot_product_attention(qt, kt, vt),
            ],
            budget=2.0,
        )
    return {"flash_attn_func_us": ours * 1e6, "sdpa_us": sdpa * 1e6}


def import_time(runs: int = 7) -> float:
    """Milliseconds of `import flash_attn` after `import torch`: the median of fresh processes."""
    return statistics.median(float(run_python(IMPORT)) for _ in range(runs)) * 1e3


def memory() -> list[dict[str, int]]:
    """KiB beyond inputs and results, by sequence length, beside what the matrix of scores would take."""
    rows = []
    for seqlen in (2048, 4096, 8192):
        forward, backward = (int(x) for x in run_python(MEMORY, str(seqlen)).split())
        rows.append(
            {
                "seqlen": seqlen,
                "forward_kib": forward,
                "backward_kib": backward,
                "scores_kib": 2 * 4 * seqlen**2 // 1024,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    console = Console()
    start = time.perf_counter()
    call = call_overhead()
    ours, sdpa = call["flash_attn_func_us"], call["sdpa_us"]
    console.print(f"call (batch 1, 1 head, seqlen 16, headdim 64): {ours:.1f} us; SDPA {sdpa:.1f} us")
    milliseconds = import_time()
    console.print(f"import flash_attn, after torch: {milliseconds:.0f} ms (median of 7 processes)")
    rows = memory()
    table = Table(title="memory beyond inputs and results, KiB (batch 1, 2 heads, headdim 64, fp32)")
    for heading in ("seqlen", "forward", "backward", "the scores would take"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(str(x) for x in row.values()))
    console.print(table)
    console.print(f"in {time.perf_counter() - start:.0f} s")
    if args.json:
        Path(args.json).write_text(json.dumps({**call, "import_ms": milliseconds, "memory": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
