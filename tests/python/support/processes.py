"""Functions that run in several processes at once, which talk over Gloo."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(rank: int, work, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    work(rank)
    done = [Path(folder, f"done-{n}") for n in range(world)]
    done[rank].touch()
    while not all(path.exists() for path in done):  # one that has failed ends them all
        time.sleep(0.01)
    os._exit(0)  # about one time in twenty, torch's threads end the process by SIGABRT while they are taken down


def in_processes(work, world: int, folder: Path) -> None:
    """work(rank) in each of `world` processes; raises what one of them raises."""
    mp.spawn(_enter, (work, world, str(folder)), world)
