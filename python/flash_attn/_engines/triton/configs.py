"""Tile sizes: measured ones from configs/*.json, by architecture and Triton version, else a safe choice.

A file holds a list of {"pass", "columns", "masked", "rows", "keys", "warps", "stages", "why"}. What was best on one
version of Triton may be half as fast on the next, so that a version without a file of its own takes the nearest one and
says so.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).with_name("configs")


class Tile(NamedTuple):
    rows: int
    keys: int
    warps: int
    stages: int
    single: int = 0  # 1: no loop of its own for tiles without a mask


@functools.cache
def _table(arch: str, version: str) -> tuple[dict, str]:
    """-> {(pass, columns, masked): Tile}, and where it is from ("": no file)."""
    minor = ".".join(version.split(".")[:2])
    files = sorted(_FOLDER.glob(f"{arch}-triton-*.json"))
    exact = [f for f in files if f.stem.endswith(f"-{minor}")]
    if not files:
        return {}, ""
    file = exact[0] if exact else files[-1]
    table = {}
    for entry in json.loads(file.read_text())["tiles"]:
        tile = Tile(entry["rows"], entry["keys"], entry["warps"], entry["stages"], entry.get("single", 0))
        for masked in (entry["masked"],) if "masked" in entry else (False, True):
            table[entry["pass"], entry["columns"], masked] = tile
    return table, file.stem


def bytes_of(which: str, tile: Tile, columns: int, itemsize: int) -> int:
    """Shared memory of a tile, from above: what is streamed, once per stage, and what stays."""
    stages = max(tile.stages, 1)
    if which == "forward":
        streamed, stays = 2 * tile.keys, tile.rows
    elif which == "dkdv":
        streamed, stays = 2 * tile.rows, 2 * tile.keys
    else:
        streamed, stays = 2 * tile.keys, 2 * tile.rows
    scores = tile.rows * tile.keys * itemsize
    return (stages * streamed + stays) * columns * itemsize + scores + 2048


def safe(which: str, columns: int, itemsize: int, shared: int, most_rows: int = 128) -> Tile:
    """The largest tile of a falling list that fits the shared memory of the device."""
    if itemsize == 4:  # exact products run on the vector units, and keep whole rows in registers
        choices = [Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)]
        if columns <= 64:
            choices.insert(0, Tile(64, 32, 4, 1))
    elif which == "forward":
        choices = [Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 1)]
        if columns <= 64:
            choices.insert(0, Tile(128, 64, 4, 2))
    else:
        choices = [Tile(64, 64, 4, 2), Tile(64, 64, 8, 1)]
    if itemsize == 2 and most_rows < 64:  # few rows: bound by memory, so keys in flight are what counts
        choices = [Tile(most_rows, 64, 4, 3), Tile(most_rows, 64, 4, 2), Tile(most_rows, 32, 4, 2)]
    choices += [Tile(32, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)]
    for tile in choices:
        if tile.rows <= most_rows and bytes_of(which, tile, columns, itemsize) <= shared:
            return tile
    return Tile(16, 16, 4, 1)


@functools.cache
def tile_for(
    which: str, arch: str, version: str, columns: int, masked: bool, itemsize: int, shared: int, most_rows: int = 0
) -> Tile:
    """`which`: forward, few_rows (a decode step), dkdv, dq or dbias. `columns`: headdim, rounded up to a power of two."""
    table, _ = _table(arch, version)
    if which == "few_rows":
        rows = 16 if most_rows <= 16 else 32 if most_rows <= 32 else 64
        tile = table.get((which, columns, masked)) if itemsize == 2 else None
        if tile is None:
            tile = safe("forward", columns, itemsize, shared, rows)
        return tile._replace(rows=min(rows, 32) if itemsize == 4 else rows)
    tile = table.get((which, columns, masked)) if itemsize == 2 else None
    return tile or safe("dq" if which == "dbias" else which, columns, itemsize, shared)


def source(arch: str, version: str) -> str:
    """Words for explain: where tile sizes come from."""
    name = _table(arch, version)[1]
    return f"tiles from {name}.json" if name else f"no tiles were measured for {arch}: safe ones"
