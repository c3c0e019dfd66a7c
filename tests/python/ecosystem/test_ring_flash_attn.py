"""ring-flash-attn from PyPI on our functions: two processes on the CPU, over Gloo. ring.py says what is compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ecosystem import ring


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[dict]:
    file = tmp_path_factory.mktemp("ring") / "records.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    process = subprocess.run(
        [*launch, str(Path(ring.__file__)), "--backend", "gloo", "--json", str(file)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert file.exists(), process.stdout + process.stderr
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", ring.CASES)
def test_every_part_is_as_exact_as_one_process(case, records):
    mine = [record for record in records if record["case"] == case]
    assert sorted(record["rank"] for record in mine) == [0, 1]
    for record in mine:
        for what in ("out", "softmax_lse", "dq", "dk", "dv"):
            error, allowed = record[what]
            assert error <= allowed, f"{what} of rank {record['rank']}"
