"""Measures tiles of the `triton` backend on this GPU, and writes the best ones to a file that it reads from then on.

python -m flash_attn.tune [--pass P ...] [--headdim D ...] [--dtype T] [--seconds S] [--jobs N] [--out FILE]

A tile is (rows, keys, warps, stages, loops), chosen per pass, headdim and whether there is a mask. Each kernel is timed
alone, on 16384 tokens of hidden size 2048 (few_rows: on a query of each of 128 sequences of 2048 keys; few_programs: of
16 of 8192), and the tile with the least geometric mean of time over the lengths wins. The file goes to
FLASH_ATTENTION_TILES or ~/.config/flash_attn/tiles; entries that were not measured stay. `flash_attn.explain` names the
file that tiles come from.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

try:
    import torch
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    sys.exit("tune: needs PyTorch, which is not installed: pip install 'torch>=2.4'")

LENGTHS = (512, 2048, 8192)
TOKENS, HIDDEN = 16384, 2048
# batch, nheads, nheads_k, seqlen_k: more programs than processors, and fewer; then the same of few keys
DECODE = {"few_rows": (128, 32, 8, 2048), "few_programs": (16, 32, 8, 8192)}
DECODE_SMALL = {"few_rows": (64, 32, 8, 256), "few_programs": (1, 32, 8, 256)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = ("forward", "dq", "dkdv", "dk", "dv", *DECODE)
FORWARD_PASSES = ("forward", *DECODE)
KERNELS = {  # and which of its launches
    **dict.fromkeys(FORWARD_PASSES, ("forward_kernel", 0)), "dq": ("dq_kernel", 0), "dkdv": ("dkdv_kernel", 0),
    "dk": ("dkdv_kernel", 0), "dv": ("dkdv_kernel", 1),
}  # fmt: skip


def passes_of(headdim: int, asked) -> list[str]:
    """dk and dv are computed one after the other where headdim is large."""
    alone = ("dkdv",) if headdim >= 256 else ("dk", "dv")
    return [x for x in asked if x not in alone]


def tiles_of(which: str, columns: int, shared: int) -> list:
    """All tiles that fit the shared memory and, by their accumulators, the registers (255 of 4 bytes a thread)."""
    from flash_attn._engines.triton.configs import Tile, bytes_of

    rows, keys = {
        "forward": ((64, 128), (32, 64, 128)),
        **dict.fromkeys(DECODE, ((16,), (32, 64, 128))),
        "dq": ((64, 128), (32, 64, 128)),
    }.get(which, ((32, 64, 128), (64, 128)))
    loops = (2,) if which in DECODE else (1, 2)
    tiles = []
    for tile in itertools.starmap(Tile, itertools.product(rows, keys, (2, 4, 8), (1, 2, 3, 4), loops)):
        accumulated = {"dkdv": 2 * tile.keys, "dk": tile.keys, "dv": tile.keys}.get(which, tile.rows) * columns
        registers = (accumulated + 2 * tile.rows * tile.keys) / (32 * tile.warps)
        small = tile.warps == 2 and which not in DECODE
        if not small and registers <= 288 and bytes_of(which, tile, columns, 2) <= shared * 1.1:
            tiles.append(tile)
    return tiles


@contextmanager
def forced(which: str, tile):
    """The engine takes this tile for this pass."""
    from flash_attn._engines.triton import configs, forget

    forget()
    configs.forced[which] = tile
    try:
        yield
    finally:
        del configs.forced[which]
        forget()


@contextmanager
def recorded():
    """The launches (kernel, its arguments) made in the block, by the Call that is their first argument: a kernel that
    has yet to be compiled launches by calling itself."""
    from flash_attn._engines.triton.launch import Kernel

    launches, launch = {}, Kernel.__call__

    def note(kernel, call, *rest):
        launches[call] = kernel, (call, *rest)
        launch(kernel, call, *rest)

    Kernel.__call__ = note
    try:
        yield launches
    finally:
        Kernel.__call__ = launch


def inputs(which: str, headdim: int, length: int, dtype, device: str) -> list:
    if which in DECODE:
        batch, nheads, nheads_k, length = (DECODE if length else DECODE_SMALL)[which]
        shapes = [(batch, 1, nheads, headdim)] + [(batch, length, nheads_k, headdim)] * 2
    else:
        batch, length = (max(1, TOKENS // length), length) if length else (1, 256)
        shapes = [(batch, length, max(1, HIDDEN // headdim), headdim)] * 3
    return [torch.randn(s, device=device, dtype=dtype, requires_grad=which not in FORWARD_PASSES) for s in shapes]


def launch_of(which: str, tile, tensors: list, masked: bool):
    """Runs the pass once with this tile -> its launch, as a call without arguments."""
    import flash_attn

    with flash_attn.use_backend("triton"), forced(which, tile), recorded() as launches:
        out = flash_attn.flash_attn_func(*tensors, causal=masked)
        if which not in FORWARD_PASSES:
            launches.clear()
            torch.autograd.grad(out, tensors, torch.randn_like(out))
    name, n = KERNELS[which]
    kernel, arguments = [x for x in launches.values() if x[0].name == name][n]
    return lambda: kernel(*arguments)


def compiles(which: str, tile, headdim: int, masked: bool, dtype, device: str) -> bool:
    """On small tensors: the kernel is then in Triton's cache, also for other processes."""
    try:
        launch_of(which, tile, inputs(which, headdim, 0, dtype, device), masked)
        return True
    except Exception:  # whatever a compiler says: this tile is not to be had
        return False


def seconds_of(call, device: str, least: float = 2e-3) -> float:
    """The least mean of three rounds, each `least` seconds or five calls."""
    module = getattr(torch, torch.device(device).type)
    times, n = [], 5
    for _ in range(4):
        first, last = (module.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(n):
            call()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3 / n)
        n = max(5, min(200, int(least / max(times[-1], 1e-6))))
    return min(times[1:])


def measure(which, headdim, masked, tiles, dtype, device) -> list[tuple[float, object]]:
    """-> (geometric mean of seconds, tile), the best first."""
    lengths = (1,) if which in DECODE else LENGTHS
    logs = dict.fromkeys(tiles, 0.0)
    for length in lengths:
        tensors = inputs(which, headdim, length, dtype, device)
        for tile in tiles:
            seconds = seconds_of(launch_of(which, tile, tensors, masked), device)
            logs[tile] += math.log(seconds) / len(lengths)
    return sorted((math.exp(log), tile) for tile, log in logs.items())


def merged(entries: list[dict]) -> list[dict]:
    """Of entries for the same thing the last; one entry where a mask changes nothing."""
    last = {}
    for entry in entries:
        for masked in (entry["masked"],) if "masked" in entry else (False, True):
            last[PASSES.index(entry["pass"]), entry["columns"], masked] = {**entry, "masked": masked}
    result = []
    for (which, columns, masked), entry in sorted(last.items()):
        other = last.get((which, columns, not masked), {})
        if any(entry.get(name) != other.get(name) for name in ("rows", "keys", "warps", "stages", "loops")):
            result.append(entry)
        elif masked:
            result.append({name: x for name, x in entry.items() if name != "masked"})
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flash_attn.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pass", dest="passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--headdim", nargs="+", type=int, choices=(64, 128, 256), default=(64, 128, 256))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no pass after this time")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16), help="processes that compile")
    parser.add_argument("--out", type=Path, help="file to write (default: where the package looks)")
    args = parser.parse_args(argv)

    try:
        import triton

        from flash_attn._engines.triton import configs
        from flash_attn._engines.triton.device import device_of

        index = torch.empty(0, device=args.device).get_device()
        device = device_of(torch.device(args.device).type, index)
    except Exception as e:  # no triton, no such device, a broken driver
        sys.exit(f"tune: --device {args.device}: {type(e).__name__}: {e}")

    begin, dtype = time.perf_counter(), DTYPES[args.dtype]
    file = args.out or configs.own_folder() / f"{configs.name_of(device.arch, triton.__version__)}.json"
    found = configs.read(file) if file.is_file() else []
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(1, args.jobs), spawn) as pool:
        for headdim, masked in itertools.product(args.headdim, (False, True)):
            for which in passes_of(headdim, args.passes):
                if time.perf_counter() - begin > args.seconds or (which in DECODE and masked):
                    continue
                tiles = tiles_of(which, headdim, device.shared)
                words = f"{which}, headdim {headdim}{', masked' if masked else ''}"
                print(f"{words}: compiling {len(tiles)} tiles", flush=True)
                jobs = [pool.submit(compiles, which, t, headdim, masked, dtype, args.device) for t in tiles]
                tiles = [tile for tile, job in zip(tiles, jobs, strict=True) if job.result()]
                if not tiles:
                    print(f"{words}: none compiles", flush=True)
                    continue
                ranked = measure(which, headdim, masked, tiles, dtype, args.device)
                for seconds, tile in ranked[:4]:
                    print(f"  {seconds * 1e6:8.1f} us  {tuple(tile)}", flush=True)
                entry = {"pass": which, "columns": headdim, "masked": masked, **ranked[0][1]._asdict()}
                lengths = ", ".join(map(str, LENGTHS))
                lengths = f"{DECODE[which][3]} keys" if which in DECODE else f"seqlen {lengths}"
                entry["why"] = f"of {len(tiles)} tiles the least geometric mean of time at {lengths}"
                if which in DECODE:
                    del entry["masked"]
                found.append(entry)
                write(file, merged(found), triton.__version__, args)
    print(f"{file}, in {time.perf_counter() - begin:.0f} s")
    return 0


def write(file: Path, entries: list[dict], version: str, args) -> None:
    """After every pass: what has been measured is not lost."""
    name = getattr(torch, torch.device(args.device).type).get_device_name()
    measured = f"{name}, torch {torch.__version__}, Triton {version}, {args.dtype}, {time.strftime('%Y-%m-%d')}"
    file.parent.mkdir(parents=True, exist_ok=True)
    head, lines = json.dumps(measured), ",\n    ".join(map(json.dumps, entries))
    file.write_text(f'{{\n  "measured": {head},\n  "tiles": [\n    {lines}\n  ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
