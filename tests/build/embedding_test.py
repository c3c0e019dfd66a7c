"""Inside another project, ours compiles quietly and leaves the parent alone.

usage: embedding_test.py CMAKE GENERATOR CXX

By default the parent is configured, and of ours a few files are compiled. FLASH_ATTN_FULL=1 builds and runs all.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from exports_test import exported, keeps_to

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FULL = os.environ.get("FLASH_ATTN_FULL", "0") not in ("", "0")
# One file of each kind: the core, the drivers, the C ABI.
FEW = ("src/core/problem.cpp", "src/cpu/forward.cpp", "src/capi/capi.cpp")


def run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def words_of_failure(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    return "" if done.returncode == 0 else " ".join((done.stdout + done.stderr).split())


def cache(build: Path) -> set[str]:
    return set(re.findall(r"^([^#/\n][^:\n]*):(?!INTERNAL|STATIC)", (build / "CMakeCache.txt").read_text(), re.M))


def main(cmake: str, generator: str, cxx: str, folder: Path) -> list[str]:
    def configure(build: Path, *more: str) -> str:
        return run(cmake, "-S", HERE / "embedding", "-B", build, "-G", generator, f"-DCMAKE_CXX_COMPILER={cxx}",
                   "-DCMAKE_BUILD_TYPE=Release", *more)  # fmt: skip

    alone, whole = folder / "alone", folder / "whole"
    configure(alone)
    configure(whole, f"-DFLASH_ATTENTION_PLUS={ROOT}")
    faults = []

    ours = {name for name in cache(whole) - cache(alone) if not name.startswith(("FLASH_ATTN_", "FLASH_ATTENTION_"))}
    faults += [f"a cache variable in the parent: {name}" for name in sorted(ours)]

    script = (whole / "flash-attention-plus/cmake_install.cmake").read_text()
    faults += [f"an install rule: {line.strip()}" for line in script.splitlines() if "file(INSTALL" in line]

    commands = json.loads((whole / "compile_commands.json").read_text())
    commands = [c for c in commands if Path(c["file"]).is_relative_to(ROOT / "src")]
    if len(commands) < 20:
        faults.append(f"only {len(commands)} files of ours are compiled")
    for command in commands:
        words = command["command"].split()
        if "-w" not in words[words.index("-Werror") :]:
            faults.append(f"warnings of the parent reach {command['file']}")

    lone = words_of_failure(cmake, "-S", HERE / "embedding", "-B", folder / "lone", "-G", generator,
                            "-DPARENT_LANGUAGES=C", f"-DFLASH_ATTENTION_PLUS={ROOT}")  # fmt: skip
    if "enable_language(CXX)" not in lone:
        faults.append("a parent without C++ is not told what to do")

    if FULL:
        printed = run(cmake, "--build", whole, "--parallel", str(os.cpu_count()))
        print(run(whole / "parent").strip())
        faults += keeps_to(exported(str(whole / "libengine.so"), "nm"), "engine_check")
    else:
        printed = "".join(
            run("sh", "-c", f"cd '{c['directory']}' && {c['command']}")
            for c in commands
            if c["file"].endswith(FEW)
        )  # fmt: skip
        include = f"-I{ROOT / 'include'}"
        strict = "-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Werror -fsyntax-only".split()
        printed += run(cxx, "-std=c++20", include, *strict, HERE / "embedding/engine.cpp")
        printed += run("cc", "-std=c99", include, *strict, HERE / "embedding/main.c")
    faults += [f"said: {line}" for line in printed.splitlines() if "warning" in line]
    return faults


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = main(*sys.argv[1:4], Path(scratch))
    print(*found, f"{len(found)} faults", sep="\n")
    sys.exit(bool(found))
