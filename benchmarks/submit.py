"""All benchmarks of this machine, as files of benchmarks/results/NAME, for a pull request.

python benchmarks/submit.py NAME [--quick] [--gpu]

NAME says what the machine is: intel-xeon-amx-2vcpu, nvidia-h200. Beside the records lies machine.json: processor,
commit, the compiler and torch, and how loaded the machine was before and after, in processes that wanted a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "build/release/bin/flash-attn"
RESULTS = ROOT / "benchmarks/results"


def programs(quick: bool, gpu: bool) -> dict[str, list]:
    """File name without its ending -> the program that writes it, but for --json FILE."""
    here, shorter = ROOT / "benchmarks", ["--quick"] if quick else []
    if gpu:
        return {"gpu": [sys.executable, here / "gpu", *shorter]}
    return {
        "limit": [TOOL, "bench", "limit", *shorter],
        "peers": [sys.executable, here / "peers.py", *shorter],
        "peers-backward": [sys.executable, here / "peers.py", "--backward", *shorter],
        "overhead": [sys.executable, here / "overhead.py"],
        "rows": [sys.executable, here / "rows.py", *shorter],
    }


def output(*command) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def machine() -> dict:
    import torch

    cache = (ROOT / "build/release/CMakeCache.txt").read_text(encoding="utf-8")
    compiler = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", cache, re.M)[1]
    return {
        "info": json.loads(output(TOOL, "info", "--json")),
        "commit": output("git", "describe", "--always", "--dirty", "--abbrev=12").strip(),
        "compiler": output(compiler, "--version").splitlines()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the folder, and so of the machine: letters, digits and hyphens")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter samples: minutes")
    parser.add_argument("--gpu", action="store_true", help="the accelerator instead of the CPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of all machines")
    args = parser.parse_args()
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", args.name):
        parser.error(f"name: expected small letters, digits and hyphens, as amd-epyc-zen4-2vcpu, got {args.name!r}")
    folder = args.results / args.name
    if folder.exists():
        parser.error(f"name: {folder} is there already")

    about = {"quick": args.quick, "load_before": os.getloadavg()[0], **machine()}
    begin = time.monotonic()
    folder.mkdir(parents=True)
    for name, program in programs(args.quick, args.gpu).items():
        subprocess.run([*program, "--json", folder / f"{name}.json"], check=True)
    about |= {"load_after": os.getloadavg()[0], "seconds": round(time.monotonic() - begin)}
    (folder / "machine.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(
        f"\nWrote {folder}. Now describe the machine in a row of benchmarks/results/README.md and open a pull request."
    )
    if about["commit"].endswith("-dirty"):
        print("The working tree has changes that no commit has: nobody can repeat this run.")


if __name__ == "__main__":
    main()
