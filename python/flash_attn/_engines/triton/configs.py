"""Tile sizes: measured ones from configs/*.json, by architecture and Triton version, else a safe choice.

A file holds a list of {"pass", "columns", "masked", "rows", "keys", "warps", "stages", "why"}; flash_attn.tune writes
one. What was best on one version of Triton may be half as fast on the next, so that a version without a file of its own
takes the nearest one and says so. Sizes know nothing of lengths or batch: other lengths compile nothing.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).with_name("configs")
FEW = ("few_rows", "few_programs")  # decode steps; the second: with no more programs than processors


class Tile(NamedTuple):
    rows: int
    keys: int
    warps: int
    stages: int
    loops: int = 2  # 2: one without a mask and one for the edges; 1: one for all tiles, quicker where there are few


class Choice(NamedTuple):
    """What decides a tile."""

    which: str  # forward, one of FEW, dq, dkdv, or where headdim is large dk and dv; dbias
    arch: str
    version: str  # of Triton
    columns: int  # the larger headdim, rounded up to a power of two
    masked: bool
    itemsize: int
    shared: int  # bytes of shared memory that the device has for one program
    most_rows: int = 128


# How often the compiler has found a choice too large (a tile of many features may take more registers than there are).
_failures: dict[Choice, int] = {}


forced: dict[str, Tile] = {}  # by pass, while flash_attn.tune measures


def tile_for(*choice) -> Tile:
    """`choice`: the fields of a Choice."""
    choice = Choice(*choice)
    if (tile := forced.get(choice.which)) is not None:
        return tile
    return _candidates(choice)[_failures.get(choice, 0)]


def try_smaller(choice: Choice) -> bool:
    """After a failure to compile: whether there is a smaller tile, which is taken from now on."""
    if choice.which in forced:
        return False
    _failures[choice] = _failures.get(choice, 0) + 1
    return _failures[choice] < len(_candidates(choice))


def own_folder() -> Path:
    """Where flash_attn.tune writes."""
    if named := os.environ.get("FLASH_ATTENTION_TILES"):
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "flash_attn" / "tiles"


def name_of(arch: str, version: str) -> str:
    return f"{arch}-triton-{'.'.join(version.split('.')[:2])}"


def read(file: Path) -> list[dict]:
    return json.loads(file.read_text(encoding="utf-8"))["tiles"]


@functools.cache
def _table(arch: str, version: str) -> tuple[dict, str]:
    """-> {(pass, columns, masked): Tile}, and the files that it is from ("": none): the one that came with the package
    (of the nearest version), and over it the one that was measured here."""
    files = sorted(_FOLDER.glob(f"{arch}-triton-*.json"))
    name = f"{name_of(arch, version)}.json"
    files = [f for f in files if f.name == name] or files[-1:]
    if (own := own_folder() / name).is_file():
        files.append(own)
    table = {}
    for entry in (entry for file in files for entry in read(file)):
        tile = Tile(entry["rows"], entry["keys"], entry["warps"], entry["stages"], entry.get("loops", 2))
        for masked in (entry["masked"],) if "masked" in entry else (False, True):
            table[entry["pass"], entry["columns"], masked] = tile
    return table, " and ".join(f.name if f.parent == _FOLDER else str(f) for f in files)


def bytes_of(which: str, tile: Tile, columns: int, itemsize: int) -> int:
    """Shared memory of a tile, from above: what is streamed, once per stage; what stays; one tile of scores."""
    if which in ("forward", *FEW):
        streamed, stays = 2 * tile.keys, tile.rows
    elif which in ("dkdv", "dk", "dv"):
        streamed, stays = 2 * tile.rows, (1 if which == "dv" else 2) * tile.keys
    else:
        streamed, stays = 2 * tile.keys, 2 * tile.rows
    return (max(tile.stages, 1) * streamed + stays) * columns * itemsize + tile.rows * tile.keys * itemsize + 2048


@functools.cache
def _candidates(choice: Choice) -> list[Tile]:
    """Tiles to try, the best first: a measured one, then a falling list of those that fit the shared memory."""
    which, arch, version, columns, masked, itemsize, shared, most_rows = choice
    small = [Tile(32, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)]
    if itemsize == 4:  # exact products run on the vector units, and keep whole rows in registers
        tiles = [Tile(64, 32, 4, 1)] if columns <= 64 and which == "forward" else []
        tiles += [Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)]
    elif which in FEW:  # bound by memory: keys in flight are what counts
        tiles = [Tile(most_rows, 64, 4, 3), Tile(most_rows, 64, 4, 2), Tile(most_rows, 32, 4, 2), *small]
    elif which == "forward":
        tiles = [Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), *small]
        if columns <= 64:
            tiles.insert(0, Tile(128, 64, 4, 2))
    elif which in ("dk", "dv"):
        tiles = [Tile(32, 64, 4, 2), Tile(32, 64, 4, 1), *small]
    else:
        tiles = [Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1), *small]
    if which in FEW:
        tiles = [t._replace(rows=min(t.rows, most_rows)) for t in tiles]
    tiles = [t for t in tiles if bytes_of(which, t, columns, itemsize) <= shared] or [Tile(16, 16, 4, 1)]
    table = _table(arch, version)[0] if itemsize == 2 else {}
    measured = table.get((which, columns, masked))
    if measured is None and which == "few_programs":
        measured = table.get(("few_rows", columns, masked))
    if measured:
        tiles.insert(0, measured._replace(rows=most_rows) if which in FEW else measured)
    return tiles


def source(arch: str, version: str) -> str:
    """Words for explain: where tile sizes come from."""
    name = _table(arch, version)[1]
    return f"tiles from {name}" if name else f"no tiles were measured for {arch}: safe ones"
