"""The Triton kernels against the formula in float64, run by Triton's interpreter: no GPU is needed.

fp32 and fp16 only: the interpreter multiplies bfloat16 as integers. Every feature's forward, every sixth one's
backward; with FLASH_ATTN_FULL=1 all of both, in both dtypes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import flash_attn
import pytest

pytest.importorskip("triton", reason="triton is not installed")

FULL = os.environ.get("FLASH_ATTN_FULL", "0") not in ("", "0")
RUNS = [
    ("forward", "float32", 0, 1),
    ("cache", "float32", 0, 1),
    ("backward", "float32", 1, 6),
    ("nan", "float32", 0, 1),
    ("seam", "float32", 0, 1),
    ("mods", "float32", 0, 1),
]
if FULL:
    RUNS += [("backward", "float32", part, 6) for part in (0, 2, 3, 4, 5)]
    RUNS += [(which, "float16", 0, 1) for which in ("forward", "cache", "backward")]


@pytest.mark.parametrize("run", RUNS, ids=lambda r: f"{r[0]}-{r[1]}-{r[2]}")
def test_interpreted(run):
    package = Path(flash_attn.__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).with_name("interpreted.py")), *map(str, run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
