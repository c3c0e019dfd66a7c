"""Every backend that serves a device, against the double-precision oracle, over a table of features.

python -m flash_attn.verify [--device D] [--backend NAME] [--filter WORDS] [--dtype T] [--full] [-v] [--json FILE]
                            [--jobs N]

A line for each backend, dtype and pass; a row for each case that fails, or for every case with -v. The exit status is 1
if any fails. flash_attn/_verify/judge.py says what counts as right.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

try:
    import torch
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    sys.exit("verify: needs PyTorch, which is not installed: pip install 'torch>=2.4'")

from flash_attn._backend import backends
from flash_attn._verify.cases import CASES, LARGE
from flash_attn._verify.judge import DTYPES, ORACLE, Judge, Outcome

SEEDS_OF_FULL = 4
_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def default_device() -> str:
    for name in ("cuda", "xpu", "mps", "npu"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            return name
    return "cpu"


def choose(device: str, asked: list[str]) -> list[str]:
    """The backends to be judged; exits in words if there are none."""
    kind = torch.device(device).type
    able = [b.name for b in backends() if kind in b.devices and not b.unavailable]
    words = {b.name: b.unavailable or f"it does not serve {kind}" for b in backends()}
    for name in asked:
        if name not in able:
            sys.exit(f"verify: --backend {name}: {words.get(name, 'expected one of ' + ', '.join(able))}")
    if not able:
        sys.exit(f"verify: no backend serves {kind}")
    return asked or able


def has(dtype: torch.dtype, device: str) -> bool:
    """Whether the device has numbers of this kind: some have no fp64."""
    try:
        return torch.ones(1, dtype=dtype, device=device).dtype == dtype
    except (RuntimeError, TypeError):
        return False


def judge_one(i: int, dtype: str, names: list[str], device: str, seeds: int) -> list[Outcome]:
    """Case i of CASES and LARGE, on each backend that serves the dtype."""
    served = {b.name: set(b.forward.dtypes) for b in backends() if b.forward}
    able = [name for name in names if _NAMES[dtype] in served.get(name, ())]
    outcomes = []
    for seed in range(seeds if able else 0):
        judge = Judge((*CASES, *LARGE)[i], dtype, 1000 * seed + i)
        for name in able:
            outcomes += judge.take(name, device)
    return outcomes


def judge_all(tasks: list[tuple], jobs: int) -> list[Outcome]:
    """`tasks`: arguments of judge_one. In processes of their own if `jobs` > 1: kernels are compiled side by side."""
    pool, show = None, sys.stderr.isatty()
    if jobs > 1:
        spawn = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,))
    outcomes = []
    try:
        every = (pool.map if pool else map)(judge_one, *zip(*tasks, strict=True))
        for n, some in enumerate(every):
            outcomes += some
            if show:
                print(f"\r\033[K{n + 1}/{len(tasks)}", end="", file=sys.stderr, flush=True)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    if show:
        print("\r\033[K", end="", file=sys.stderr)
    return outcomes


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def verdict(o: Outcome) -> str:
    if o.refused:
        return f"refused: {o.refused}"
    return f"FAILED: {o.failed}" if o.failed else f"ok, {o.worst()[0]:.2f} of the bound"


def rows_of(outcomes: list[Outcome]) -> str:
    """Error beside the plain arithmetic's, result by result."""
    rows = [["feature", "dtype", "backend", "pass", "verdict", "error (plain)"]]
    for o in outcomes:
        errors = ", ".join(f"{n} {j.error:.1e} ({j.plain:.1e})" for n, j in o.judged.items())
        rows.append([o.feature, o.dtype, o.backend, o.direction, verdict(o), errors])
    return table(rows)


def summary(outcomes: list[Outcome]) -> str:
    rows = [
        ["backend", "dtype", "pass", "cases", "within", "refused", "FAILED", "largest error", "plain", "of its bound"]
    ]
    for key in dict.fromkeys((o.backend, o.dtype, o.direction) for o in outcomes):
        mine = [o for o in outcomes if (o.backend, o.dtype, o.direction) == key]
        refused, failed = (sum(bool(getattr(o, what)) for o in mine) for what in ("refused", "failed"))
        worst = max(mine, key=lambda o: o.worst()[0])
        part, name = worst.worst()
        where = ["", "", ""]
        if name:
            j = worst.judged[name]
            where = [f"{j.error:.1e}", f"{j.plain:.1e}", f"{part:.2f}: {name} of {worst.feature}"]
        counts = (len(mine), len(mine) - refused - failed, refused, failed)
        rows.append([*key, *(str(n) if n else "-" for n in counts), *where])
    return table(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flash_attn.verify", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--backend", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--filter", default="", help="only features whose name contains this")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this one; may be repeated")
    parser.add_argument("--full", action="store_true", help="larger shapes as well, and several draws of each case")
    parser.add_argument("--jobs", type=int, help="processes; default: 1 on a CPU, elsewhere one per core, 8 at most")
    parser.add_argument("-v", "--verbose", action="store_true", help="a row for every case, not only where one fails")
    parser.add_argument("--json", metavar="FILE", help="write a record of every outcome there")
    args = parser.parse_args(argv)

    begin = time.perf_counter()
    jobs = args.jobs or (1 if args.device == "cpu" else min(os.cpu_count() or 1, 8))
    names = choose(args.device, args.backend)
    dtypes = [d for d in args.dtype or DTYPES if has(DTYPES[d], args.device)]
    cases = [i for i, c in enumerate((*CASES, *(LARGE if args.full else ()))) if args.filter in c.name]
    if not cases:
        sys.exit(f"verify: --filter: no feature contains {args.filter}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the yardstick's operations are tiny: a second team of threads gets in the oracle's way
    try:
        rest = (names, args.device, SEEDS_OF_FULL if args.full else 1)
        outcomes = judge_all([(i, dtype, *rest) for i in cases for dtype in dtypes], jobs)
    finally:
        torch.set_num_threads(threads)
    if args.json:
        records = [asdict(o) | {"device": args.device} for o in outcomes]
        Path(args.json).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")

    failed, refused = (sum(bool(getattr(o, what)) for o in outcomes) for what in ("failed", "refused"))
    if rows := [o for o in outcomes if args.verbose or o.failed]:
        print(rows_of(rows) + "\n")
    if outcomes:
        print(summary(outcomes))
    judged = [j for o in outcomes for j in o.judged.values()]
    print(
        f"\nErrors are against the {ORACLE} backend in fp64 on the same numbers; plain is that of PyTorch's plain\n"
        "arithmetic in the input's dtype, softmax in fp32. The bound is the plain error plus one rounding of a\n"
        "16-bit result, or twice the larger of the two for fp32 and fp64 results; plus the fp32 rounding of terms.\n"
        f"{sum(j.error <= j.plain for j in judged)} of {len(judged)} errors are at most the plain arithmetic's own.\n"
    )
    within = len(outcomes) - refused - failed
    words = f"{failed} of {len(outcomes)} FAILED" if failed else f"{within} of {len(outcomes)} within the bound"
    print(f"{words}, {refused} refused, on {args.device}, in {time.perf_counter() - begin:.0f} s")
    return 1 if failed or not within else 0


if __name__ == "__main__":
    sys.exit(main())
