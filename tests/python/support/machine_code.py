"""The loops of a kernel's machine code, as NVIDIA's disassembler, which comes with Triton, prints it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


class Loop(NamedTuple):
    instructions: int
    products: int  # of tensor cores
    spills: int  # reads and writes of registers that lie in memory


def innermost_loops(cubin: bytes, folder: Path) -> list[Loop]:
    """A loop is what lies between a label and a branch back to it."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    text = subprocess.run([DISASSEMBLER, "-c", file], capture_output=True, text=True, check=True).stdout
    lines = [x for x in text.splitlines() if ";" in x or re.match(r"\s*\.L_x_\d+:", x)]
    labels = {m.group(1): n for n, x in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", x))}
    spans = []
    for n, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if target and labels[target.group(1)] < n:
            spans.append((labels[target.group(1)], n + 1))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    found = []
    for begin, end in inner:
        code = [x for x in lines[begin:end] if ";" in x]
        count = lambda word, code=code: sum(bool(re.search(rf"\b{word}\b", x)) for x in code)  # noqa: E731
        found.append(Loop(len(code), count("HGMMA"), count("LDL") + count("STL")))
    return found
