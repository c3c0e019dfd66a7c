"""flash_attn on an accelerator against PyTorch's FlashAttention-2 and cuDNN, FlexAttention, FlagGems, FlashAttention-4.

python benchmarks/gpu [--quick] [--seconds S] [--backends NAME ...] [--peers NAME ...] [--filter WORDS] [--json FILE]

Beside a matrix product of 8192^3 and, for decoding, a copy of device memory: the ceilings. `of_ceiling` is a fraction
of what was measured in the same seconds. The file is written after every cell: nothing is lost when time runs out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from cells import CELLS, DTYPES, TINY, Cell, Inputs
from clock import Clock, Runner, alternate, captured, words
from peers import OPTION, PEERS, UNPAGED, Unserved, absent, chosen, ours, versions

try:
    from tqdm import tqdm
except ImportError:  # a bare machine: lines without a bar
    tqdm = None

GRAPH = 300e-6  # seconds of kernels in a graph, at least
TOLERANCE = {"bf16": 0.04, "fp16": 0.01}  # how far two right answers may be apart, of the largest entry


def commit() -> str:
    call = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: str) -> str:
    if device == "cpu":
        return platform.processor() or platform.machine()
    return getattr(torch, torch.device(device).type).get_device_name()


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args, self.device, self.clock = args, args.device, Clock(args.device)
        self.dtype = DTYPES[args.dtype]
        self.on_cpu = self.device == "cpu"
        self.has_graphs = torch.device(self.device).type == "cuda"
        self.stream = None
        self.cache_of_device = 1 << 16
        if self.has_graphs:
            # Autograd runs a backward on the stream of its forward: capture needs all of it on one of our own.
            self.stream = torch.cuda.Stream()
            torch.cuda.set_stream(self.stream)
            self.cache_of_device = torch.cuda.get_device_properties(self.device).L2_cache_size
        n = 64 if self.on_cpu else 8192
        a, b = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in "ab")
        self.product, self.product_flops = (lambda: a @ b), 2.0 * n**3
        source = torch.empty(1 << (16 if self.on_cpu else 30), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.copy, self.copy_bytes = (lambda: target.copy_(source)), 2.0 * source.numel()
        self.contenders = [ours(None if name == "auto" else name) for name in args.backends] + [UNPAGED, OPTION]
        self.missing = {}
        for peer in PEERS:
            if peer.name in args.peers:
                self.missing[peer.name] = absent(peer.name, self.device)
                if not self.missing[peer.name]:
                    self.contenders.append(peer)

    def header(self) -> dict:
        return {
            "name": "header", "device": device_name(self.device), "commit": self.args.commit or commit(),
            "versions": versions(), "dtype": self.args.dtype, "rounds": self.args.rounds,
            "absent": {name: why for name, why in self.missing.items() if why}, "skipped": [],
        }  # fmt: skip

    def call_of(self, make, context, cell: Cell, x: Inputs):
        """-> a call without arguments, and its first answer. Each call of a decode step takes the next set of keys."""
        with context():
            forward = make(cell, x)
            if cell.name != "backward":
                sets = itertools.cycle(x.sets)
                with torch.no_grad():
                    answer = forward(x.q, x.k, x.v)
                return (lambda: forward(x.q, *next(sets))), answer
            out, leaves = forward(x.q, x.k, x.v), (x.q, x.k, x.v)
            call = lambda: torch.autograd.grad(out, leaves, x.dout, retain_graph=True)  # noqa: E731
            return call, torch.cat([g.flatten() for g in call()])

    def measure(self, cell: Cell) -> list[dict]:
        x = Inputs(cell, self.dtype, self.device, self.cache_of_device)
        is_decode = cell.name == "decode"
        ceiling = Runner("ceiling", self.copy if is_decode else self.product)
        runners, answers = [], []
        for contender in self.contenders:
            if not contender.serves(cell):
                continue
            runner = Runner(contender.name, None, context=contender.context)
            runners.append(runner)
            try:
                runner.call, answer = self.call_of(contender.make, contender.context, cell, x)
                answers.append((runner, answer.detach()))
            except Unserved as e:
                runner.error = str(e)
            except Exception as e:  # whatever a peer says
                runner.error = words(e)
        self.compare(answers)
        del answers
        with torch.set_grad_enabled(cell.name == "backward"):
            runners += self.graphs(runners, len(x.sets))
            alternate([ceiling, *runners], self.clock, self.args.rounds)
        amount = cell.cache_bytes if is_decode else cell.flops
        limit = (self.copy_bytes if is_decode else self.product_flops) / ceiling.seconds
        backend = chosen(cell, x)
        return [self.record(cell, runner, amount, limit, backend) for runner in runners]

    def compare(self, answers: list) -> None:
        """A wrong answer must not win a race: each is compared with the median of all, or with the one other."""
        if len(answers) < 2:
            return
        middle = torch.stack([a for _, a in answers]).float().median(0).values if len(answers) > 2 else answers[-1][1]
        scale = float(middle.float().abs().max()) or 1.0
        for runner, a in answers:
            difference = float((a.float() - middle.float()).abs().max()) / scale
            if not difference <= TOLERANCE[self.args.dtype]:
                runner.error = f"wrong answer: {difference:.1e} of the largest entry from the others'"

    def graphs(self, runners: list[Runner], sets: int) -> list[Runner]:
        """For each that runs, the same in a CUDA graph."""
        found = []
        for runner in runners if self.has_graphs and self.args.graph else ():
            if runner.error:
                continue
            runner.warm_up(self.clock)
            if runner.error:
                continue
            replay = Runner(runner.name, None, graph=True)
            found.append(replay)
            calls = max(1, min(32, round(GRAPH / runner.estimate)))
            replay.per_call = -(-calls // sets) * sets
            try:
                replay.call = captured(runner.call, runner.context, replay.per_call, self.stream)
            except Exception as e:
                replay.error = words(e)
        return found

    def record(self, cell: Cell, runner: Runner, amount: float, limit: float, backend: str) -> dict:
        ran = not runner.error and bool(runner.samples)
        rate = amount / runner.seconds if ran else None
        is_decode = cell.name == "decode"
        is_ours = runner.name.startswith("plus") and runner.name != OPTION.name
        return {
            "name": cell.name,
            "impl": runner.name,
            "backend": runner.name.partition(":")[2] or backend if is_ours else None,
            "dtype": self.args.dtype,
            "batch": cell.batch,
            "nheads_q": cell.nheads,
            "nheads_k": cell.nheads_k,
            "seqlen_q": cell.seqlen_q,
            "seqlen": cell.seqlen,
            "headdim": cell.headdim,
            "causal": cell.causal,
            "varlen": bool(cell.lengths),
            "tokens": sum(cell.lengths) or cell.batch * cell.seqlen_q,
            "page_size": cell.page_size,
            "mod": cell.mod,
            "graph": runner.graph,
            "tbs" if is_decode else "tflops": rate and rate * 1e-12,
            "of_ceiling": rate and rate / limit,
            "ceiling": limit * 1e-12,
            "us": runner.seconds * 1e6 if ran else None,
            "host_us": runner.host * 1e6 if ran and not runner.graph else None,
            "device": device_name(self.device),
            "error": runner.error or None,
        }


def line(cell: Cell, records: list[dict]) -> str:
    """One line for a cell: each contender's rate as called, and after a slash that of its graph."""
    parts = []
    for name in dict.fromkeys(r["impl"] for r in records):
        mine = [r for r in records if r["impl"] == name]
        if mine[0]["error"]:
            parts.append(f"{name} -")
            continue
        rates = [r.get("tbs", r.get("tflops")) for r in mine]
        digits = 2 if cell.name == "decode" else 0
        parts.append(f"{name} " + "/".join("-" if x is None else f"{x:.{digits}f}" for x in rates))
    return f"{cell}: {', '.join(parts)} of {records[0]['ceiling']:.{2 if cell.name == 'decode' else 0}f}"


def write(path: str, records: list[dict]) -> None:
    Path(path).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", default=["auto"], help="ours; auto: what the package chooses itself")
    names = [p.name for p in PEERS]
    parser.add_argument("--peers", nargs="*", choices=names, default=names, help="default: all that are installed")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--quick", action="store_true", help="a part of the cells, fewer rounds")
    parser.add_argument("--filter", default="", help='only cells whose words contain this, as in "headdim 128 causal"')
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after this time")
    parser.add_argument("--rounds", type=int, help="turns of each contender in a cell (default 7; quick 5)")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="calls only, no replays of CUDA graphs")
    parser.add_argument("--commit", help="for the header, where the sources are no git checkout")
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    args = parser.parse_args()
    args.rounds = args.rounds or (5 if args.quick else 7)

    begin = time.perf_counter()
    every = TINY if args.device == "cpu" else CELLS
    cells = [c for c in every if args.filter in str(c) and (c.is_quick or not args.quick)]
    cells.sort(key=lambda c: not c.is_quick)  # if time runs out, a part of each kind is there
    if not cells:
        sys.exit(f"benchmarks/gpu: --filter: no cell contains {args.filter!r}")
    bench = Bench(args)
    header, records = bench.header(), []
    print(f"{header['device']}, {args.dtype}: TFLOP/s (decode: TB/s) as called / in a graph")
    for name, why in header["absent"].items():
        print(f"{name}: {why}")
    say = tqdm.write if tqdm else print
    progress = tqdm(cells, file=sys.stderr, dynamic_ncols=True) if tqdm else cells
    for cell in progress:
        if time.perf_counter() - begin > args.seconds:
            header["skipped"].append(f"{cell}: out of time")
            continue
        if tqdm:
            progress.set_description(str(cell))
        try:
            found = bench.measure(cell)
        except Exception as e:  # no memory for its tensors, or a device that a kernel has broken: what is there stays
            header["skipped"].append(f"{cell}: {words(e)}")
            continue
        records += found
        say(line(cell, found))
        if args.json:
            write(args.json, [header, *records])
    for cell in header["skipped"]:
        print(f"skipped {cell}")
    for error in dict.fromkeys(f"{r['impl']}: {r['error']}" for r in records if r["error"]):
        print(error)
    if args.json:
        write(args.json, [header, *records])
    return 0 if any(not r["error"] for r in records if r["impl"].startswith("plus")) else 1


if __name__ == "__main__":
    sys.exit(main())
