"""Random problems on a device against the oracle, forward and backward, in processes side by side.

python tests/device/random_problems.py [--device cuda] [--backend NAME] [--examples 5000] [--jobs 16] [--classes 6]
                                       [--json FILE]

They are those of tests/python/test_property.py. What decides a kernel's code (dtype, headdim, kinds of mask, bias, ...)
is drawn `classes` times in each process; lengths, heads, windows, scales and values are drawn anew for each problem.
Otherwise nearly all of the time would go into compilers.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import flash_attn
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from support import device as under_test

CODE = ("packed", "headdim", "dtype", "layouts", "causal", "softcap", "alibi", "sink", "bias", "dropout_p")


def of_class(p, fixed: dict):
    """The problem with the fields that decide code replaced."""
    lengths_q, lengths_k = p.lengths_q or (5,), p.lengths_k or (7,)
    if not fixed["packed"]:
        lengths_q, lengths_k = ((x[0],) * len(x) for x in (lengths_q, lengths_k))
    tail = p.tail if fixed["packed"] else 0
    return dataclasses.replace(p, **fixed, lengths_q=lengths_q, lengths_k=lengths_k, tail=tail)


def run(rank: int, examples: int, classes: int, device: str, backend: str | None) -> dict:
    """-> counts of what came out, and the words of the first failures."""
    under_test.configure(device, backend)
    from test_property import problems, test_agrees_with_the_oracle  # once the device is known

    agrees = test_agrees_with_the_oracle.hypothesis.inner_test
    torch.set_num_threads(1)
    draw = flash_attn._attention.draw_rng_state  # masks of the CPU's generator, as on the oracle
    flash_attn._attention.draw_rng_state = lambda q: draw(q.new_empty(0, device="cpu")).to(q.device)
    fixed, counts, words = [], collections.Counter(), []

    @seed(rank)
    @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(problems())
    def check(p):
        counts["problems"] += 1
        if len(fixed) < classes:
            fixed.append({name: getattr(p, name) for name in CODE})
        p = of_class(p, fixed[p.seed % len(fixed)])
        try:
            with flash_attn.use_backend(backend):
                agrees(p)
            counts["agree"] += 1
        except flash_attn.NotServed:
            counts["refused"] += 1
        except Exception as e:
            counts["failed"] += 1
            words.append(f"{type(e).__name__}: {str(e)[:500]}: {p}")

    check()
    return {"counts": dict(counts), "words": words[:3]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend")
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    begin, total, words = time.perf_counter(), collections.Counter(), []
    each = -(-args.examples // args.jobs)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, spawn) as pool:
        jobs = [pool.submit(run, n, each, args.classes, args.device, args.backend) for n in range(args.jobs)]
        for job in concurrent.futures.as_completed(jobs):
            total.update(job.result()["counts"])
            words += job.result()["words"]
            print(dict(total), flush=True)
    print("\n".join(words))
    if args.json:
        record = {"name": "random problems", "device": args.device, "backend": args.backend or "automatic", **total}
        record["classes"], record["seconds"] = args.classes * args.jobs, round(time.perf_counter() - begin)
        args.json.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return 1 if total["failed"] or not total["agree"] else 0


if __name__ == "__main__":
    sys.exit(main())
