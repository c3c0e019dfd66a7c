"""What flash_attn.tune tries, writes and makes the engine take; its timings need a GPU."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from flash_attn import tune
from flash_attn._engines.triton import configs, launch

ARCH, VERSION, SHARED = "cuda-90", "3.6.0", 232448


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_TILES", str(tmp_path))
    clear()
    yield tmp_path / f"{configs.name_of(ARCH, VERSION)}.json"
    clear()


def clear():
    configs._table.cache_clear()
    configs._candidates.cache_clear()


def entry(which="dq", columns=128, rows=64, **more):
    return {"pass": which, "columns": columns, "rows": rows, "keys": 32, "warps": 4, "stages": 2, **more}


def choice(which="dq", columns=128, masked=False, arch=ARCH):
    return configs.Choice(which, arch, VERSION, columns, masked, 2, SHARED)


@pytest.mark.parametrize("headdim", [64, 128, 256])
@pytest.mark.parametrize("which", tune.PASSES)
def test_tiles_that_are_tried(which, headdim):
    """Some, none twice, the one that ships among them, and none that could not fit."""
    if which not in tune.passes_of(headdim, tune.PASSES):
        return
    tiles = tune.tiles_of(which, headdim, SHARED)
    assert 5 < len(tiles) == len(set(tiles)) < 150
    shipped = {configs.tile_for(*choice(which, headdim, masked)) for masked in (False, True)}
    if which not in tune.DECODE:  # whose rows follow the call
        assert shipped <= set(tiles)
    assert all(configs.bytes_of(which, t, headdim, 2) <= 1.1 * SHARED for t in tiles)


def test_a_file_of_ones_own_counts_before_the_one_that_ships(own):
    before = configs.tile_for(*choice()), configs.tile_for(*choice(columns=64))
    own.write_text(json.dumps({"tiles": [entry(loops=1)]}))
    clear()
    assert configs.tile_for(*choice()) == configs.Tile(64, 32, 4, 2, 1) != before[0]
    assert configs.tile_for(*choice(columns=64)) == before[1]
    words = configs.source(ARCH, VERSION)
    assert "cuda-90-triton-3.6.json and" in words and str(own) in words


def test_a_gpu_without_a_file(own):
    assert "no tiles were measured" in configs.source("cuda-70", VERSION)
    own.with_name("cuda-70-triton-3.6.json").write_text(json.dumps({"tiles": [entry()]}))
    clear()
    assert configs.tile_for(*choice(arch="cuda-70")) == configs.Tile(64, 32, 4, 2, 2)


def test_what_is_written():
    """The last entry for a thing, and one for both kinds of mask where they agree."""
    same = [entry(masked=False), entry(masked=True)]
    assert tune.merged(same) == [entry()]
    assert tune.merged([*same, entry(masked=True, rows=128)]) == [entry(masked=False), entry(masked=True, rows=128)]
    assert tune.merged([entry(rows=128), entry(masked=False)]) == [entry(masked=False), entry(masked=True, rows=128)]
    assert tune.merged([entry("dv"), entry("forward")]) == [entry("forward"), entry("dv")]


def test_a_forced_tile_is_taken_and_given_back():
    before, tile = configs.tile_for(*choice()), configs.Tile(16, 16, 4, 1)
    with tune.forced("dq", tile):
        assert configs.tile_for(*choice()) == tile
        assert not configs.try_smaller(choice())
    assert configs.tile_for(*choice()) == before


def test_a_device_that_is_not_there():
    with pytest.raises(SystemExit, match="tune: --device nowhere"):
        tune.main(["--device", "nowhere"])


def test_a_first_launch_is_recorded_once():
    runs = []
    kernel = object.__new__(launch.Kernel)
    call = launch.Call(1, (), (), "key", False, (4, 1))
    compiled = SimpleNamespace(run=lambda *a: runs.append(a), function=0, packed_metadata=None)
    kernel._compiled = {("key", (), 4, 1, False, 0): compiled}
    with tune.recorded() as launches:
        kernel(call, 0, 0, ())
        kernel(call, 0, 0, ())
    assert list(launches.values()) == [(kernel, (call, 0, 0, ()))] and len(runs) == 2


def test_a_compiler_that_fails_is_asked_for_a_smaller_tile():
    """Whatever pass of it failed; other errors are the caller's."""

    def fails(words):
        kernel, call = object.__new__(launch.Kernel), launch.Call(1, (), (), "key", False, (4, 1), choice("dkdv", 512))
        kernel._compiled, kernel.jit = {}, lambda aligned: {(1,): lambda *a, **kw: raise_(RuntimeError(words))}
        return lambda: kernel(call, 0, 0, ())

    def raise_(error):
        raise error

    before = configs.tile_for(*choice("dkdv", 512))
    try:
        with pytest.raises(launch.Again):
            fails("PassManager::run failed")()
        assert configs.tile_for(*choice("dkdv", 512)) != before
        with pytest.raises(RuntimeError, match="no driver"):
            fails("no driver")()
    finally:
        configs._failures.clear()
