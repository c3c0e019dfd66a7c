"""score_mod, mask_mod and lists of blocks in Triton kernels: what of a call can be lowered, and its launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flash_attn._engines.torch.mods import BlockLists, Mods
from flash_attn._engines.triton import configs
from flash_attn._engines.triton.backward import DSINK, row_statistics_of
from flash_attn._engines.triton.forward import power_of_two, precision, presence, slots_for, strides, widths, window
from flash_attn._engines.triton.kernels.modified import (
    modified_dkdv_kernel,
    modified_dq_kernel,
    modified_forward_kernel,
)
from flash_attn._engines.triton.launch import Call, Kernel
from flash_attn._engines.triton.traced import MOST_DIMENSIONS, MOST_TABLES, Traced, Untraceable, trace

FORWARD = Kernel(modified_forward_kernel, ("q", "k", "v", "out"))
DQ = Kernel(modified_dq_kernel, ("q", "k", "v", "out", "dout", "dq"))
DKDV = Kernel(modified_dkdv_kernel, ("q", "k", "v", "dout", "dk", "dv"))

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_COLUMNS = 512
SMALLEST_TILE = 16


@dataclass
class Lowered:
    """What Tensors.mods is for this engine. `tables` are of all functions, numbered as their sources have it."""

    backend: ClassVar[str] = "triton"

    score: Traced | None
    pull: Traced | None  # the gradient of score
    mask: Traced | None
    tables: tuple[Tensor, ...]
    blocks: BlockLists | None

    def functions(self) -> tuple:
        return tuple(None if x is None else x.function for x in (self.score, self.pull, self.mask))


def lower(mods: Mods, q: Tensor, v: Tensor, gradient: bool) -> Lowered:
    """Raises Untraceable, in words."""
    if q.dtype not in DTYPES:
        raise Untraceable(f"q is {str(q.dtype)[6:]}")
    if max(q.shape[-1], v.shape[-1]) > MOST_COLUMNS:
        raise Untraceable(f"headdim is above {MOST_COLUMNS}")
    if mods.blocks is not None and any(size % SMALLEST_TILE for size in mods.blocks.size):
        raise Untraceable(f"block_size: {mods.blocks.size} are no multiples of {SMALLEST_TILE}")
    score = pull = mask = None
    first = 0
    if mods.score_mod is not None:
        score = _trace("score_mod", mods.score_mod, q.device)
        first = len(score.tables)
        if torch.is_grad_enabled() and any(x.requires_grad for x in score.tables):
            raise Untraceable("score_mod: a gradient of a tensor that it reads is asked for")
        if gradient and mods.score_mod_bwd is None:
            pull = _trace("score_mod", mods.score_mod, q.device, True)
    tables = score.tables if score else ()
    if gradient and mods.score_mod_bwd is not None:
        pull = _trace("score_mod_bwd", mods.score_mod_bwd, q.device, first=first)
        tables += pull.tables
    asked = mods.blocks is None or bool((mods.blocks.kinds == BlockLists.PARTIAL).any())
    if mods.mask_mod is not None and asked:
        mask = _trace("mask_mod", mods.mask_mod, q.device, first=len(tables))
        tables += mask.tables
    return Lowered(score, pull, mask, tables, mods.blocks)


def _trace(name: str, function: Callable, device: torch.device, gradient: bool = False, first: int = 0) -> Traced:
    try:
        return trace(name, function, device, gradient, first)
    except Untraceable as e:
        raise Untraceable(f"{name}: {e}") from None


def _on_device(tables, device) -> list[Tensor | None]:
    found = [x.detach().to(device).contiguous() for x in tables]
    found = [x.view(torch.uint8) if x.dtype == torch.bool else x for x in found]
    return found + [None] * (MOST_TABLES - len(found))


def _sizes(tables) -> list[int]:
    """MOST_DIMENSIONS numbers of each table."""
    shapes = [tuple(x.shape) if x is not None else () for x in tables]
    return [n for shape in shapes for n in (*shape, *(1,) * (MOST_DIMENSIONS - len(shape)))]


def _tile(which: str, p, columns: int, device, version: str, blocks: BlockLists | None):
    """-> choice, tile: no larger than the blocks that are listed."""
    itemsize = 4 if p.dtype == "float32" else 2
    choice = configs.Choice(which, device.arch, version, columns, True, itemsize, device.shared)
    tile = configs.tile_for(*choice)
    if blocks is None:
        return choice, tile
    rows, keys = tile.rows, tile.keys
    while blocks.size[0] % rows:
        rows //= 2
    while blocks.size[1] % keys:
        keys //= 2
    return choice, tile._replace(rows=rows, keys=keys)


def _lists(blocks: BlockLists | None, tile, by_keys: bool, device) -> tuple:
    """-> counts (batch | 1, nheads | 1, tiles), entries (..., tiles, most) on the device, and their strides: of a batch
    entry, a head (0: the same for all) and a tile's entries. Of tiles of rows; `by_keys`: of keys."""
    if blocks is None:
        return None, None, None, None, None
    key = tile.rows, tile.keys, by_keys, device
    if key not in blocks.made:
        blocks.made[key] = _listed(blocks, tile, by_keys, device)
    made = blocks.made[key]
    if device.type == "cuda":  # made on one stream, read on another
        for x in made[:2]:
            x.record_stream(torch.cuda.current_stream(device))
    return made


def _listed(blocks: BlockLists, tile, by_keys: bool, device) -> tuple:
    kinds = blocks.kinds.repeat_interleave(blocks.size[0] // tile.rows, -2)
    kinds = kinds.repeat_interleave(blocks.size[1] // tile.keys, -1)
    kinds = kinds.mT if by_keys else kinds
    is_there = kinds != BlockLists.SKIPPED
    order = torch.argsort(is_there.to(torch.uint8), dim=-1, descending=True, stable=True)
    entries = order * 2 + (kinds.gather(-1, order) == BlockLists.FULL)
    counts = is_there.sum(-1, dtype=torch.int32)
    heads, tiles = kinds.shape[1], kinds.shape[2]
    b = heads * tiles if kinds.shape[0] > 1 else 0
    h = tiles if heads > 1 else 0
    return counts.to(device), entries.to(torch.int32).contiguous().to(device), b, h, kinds.shape[-1]


class _Layout:
    """Of the tensors of a call: strides in units of alignment, and what decides the machine code."""

    def __init__(self, p, tensors, packed):
        self.unit = 4 if p.dtype == "float32" else 8
        layouts = [strides(x, is_packed) for x, is_packed in zip(tensors, packed, strict=True)]
        bits, addresses = p.headdim | p.headdim_v, 0
        for x, (b, r, h, _) in zip(tensors, layouts, strict=True):
            bits |= b | r | h
            addresses |= x.data_ptr()
        self.aligned = all(x[3] == 1 for x in layouts) and not bits % self.unit and not addresses & 15
        if not self.aligned:
            self.unit = 1
        self.wide = any(max(r, c) >= 1 << 22 for _, r, _, c in layouts)
        self.strides = [x // self.unit for b, r, h, _ in layouts for x in (b, r, h)]
        self.cols = [None if c == 1 else c for *_, c in layouts]
        self.columns, self.columns_v = power_of_two(p.headdim), power_of_two(p.headdim_v)
        self.even = p.headdim == self.columns and p.headdim_v == self.columns_v
        self.widest = max(self.columns, self.columns_v)

    def constants(self, tile) -> tuple:
        return tile.rows, tile.keys, self.columns, self.columns_v, self.even, self.unit, self.wide


def _grid(p, is_packed: bool, rows: int, longest: int, heads: int, size: int) -> tuple:
    """-> tiles of a sequence, programs and slots (None unless packed), programs in all."""
    tiles = -(-(longest if is_packed else rows) // size)
    if not is_packed:
        return tiles, None, None, p.batch * tiles * heads
    slots = slots_for(rows, p.batch, tiles, size)
    programs = (slots or p.batch * tiles) * heads
    return tiles, programs, slots, programs + -(-rows // size)


def _key(p, optional, tables, *more) -> tuple:
    return p.dtype, presence(optional), tuple(None if x is None else x.dtype for x in tables), p.used_k < 0, *more


def run_forward(p, t, device, index, version) -> None:
    mods: Lowered = t.mods
    packed_q = t.cu_seqlens_q is not None
    packed_k = t.cu_seqlens_k is not None and not p.page_size
    if packed_q and t.seqused_q is not None:  # rows beyond those in use may be in no tile
        t.out.zero_()
        if t.lse is not None:
            t.lse.fill_(p.empty_lse)
    x = _Layout(p, (t.q, t.k, t.v, t.out), (packed_q, packed_k, packed_k, packed_q))
    choice, tile = _tile("forward", p, x.widest, device, version, mods.blocks)
    counts, entries, *of_lists = _lists(mods.blocks, tile, False, t.q.device)
    tables = _on_device(mods.tables, t.q.device)
    optional = (t.cu_seqlens_q, t.cu_seqlens_k, t.seqused_q, t.seqused_k, t.block_table, t.sink, counts, entries)
    lse_b, lse_h, lse_r = (0, 0, None) if t.lse is None else (0, *t.lse.stride()) if packed_q else t.lse.stride()
    tiles, programs, slots, grid = _grid(p, packed_q, p.rows_q, p.max_seqlen_q, p.nheads, tile.rows)
    is_windowed, left, right, _ = window(p)
    paged = 0
    if p.page_size:
        paged = 3 if p.page_size % tile.keys == 0 else 2 if tile.keys % p.page_size == 0 else 1
    sink_h = None if t.sink is None else t.sink.stride(0)
    numbers = (
        *x.strides, lse_b, lse_h, *x.cols, lse_r, sink_h, *of_lists,
        p.batch * p.nheads, p.nheads, p.group, tiles, 1, p.rows_q, p.rows_k, p.seqlen_k,
        p.headdim // x.unit, p.headdim_v // x.unit, p.used_k if p.used_k >= 0 else None, p.batch_k,
        p.page_size or None, t.block_table.stride(0) if paged else None, left, right, programs, slots,
        *_sizes(tables), p.scale, p.empty_lse,
    )  # fmt: skip
    score, _, mask = mods.functions()
    constants = (*x.constants(tile), is_windowed, paged, counts is not None, precision(p), score, mask)
    key = _key(p, (*optional, t.lse), tables, presence(x.cols), lse_r is None,
               None if t.sink is None else t.sink.dtype, widths((*x.cols, lse_r, sink_h)))  # fmt: skip
    call = Call(grid, numbers, constants, key, x.aligned, (tile.warps, min(tile.stages, 2)), choice)
    FORWARD(call, index, p.stream, (t.q, t.k, t.v, t.out, t.lse, *optional, *tables))


def run_backward(p, t, device, index, version) -> None:
    mods: Lowered = t.mods
    packed_q, packed_k = t.cu_seqlens_q is not None, t.cu_seqlens_k is not None
    if t.seqused_k is not None or p.used_k >= 0:  # memory that is not in use
        t.dk.zero_()
        t.dv.zero_()
    unused_q = packed_q and t.seqused_q is not None
    if unused_q:
        t.dq.zero_()
    lse2, delta, base = row_statistics_of(p, t.q, mods.score is not None)
    if t.dsink is not None and unused_q:
        lse2.fill_(torch.inf)
    tables = _on_device(mods.tables, t.q.device)
    lengths = (t.cu_seqlens_q, t.cu_seqlens_k, t.seqused_q, t.seqused_k)
    is_windowed, left, right, _ = window(p)
    functions, used = mods.functions(), p.used_k if p.used_k >= 0 else None
    lse_b, lse_h, lse_r = (0, *t.lse.stride()) if packed_q else t.lse.stride()
    dlse_b, dlse_h, dlse_r = (0, 0, None) if t.dlse is None else (
        (0, *t.dlse.stride()) if packed_q else t.dlse.stride())  # fmt: skip

    def launch(kernel, which, tensors, packed, rest, of_rest, is_packed, rows, longest, heads):
        """`rest`: tensors behind these; `of_rest`: their strides, before and behind those of columns."""
        by_keys = which == "dkdv"
        x = _Layout(p, tensors, packed)
        choice, tile = _tile(which, p, x.widest, device, version, mods.blocks)
        counts, entries, *of_lists = _lists(mods.blocks, tile, by_keys, t.q.device)
        size = tile.keys if by_keys else tile.rows
        tiles, programs, slots, grid = _grid(p, is_packed, rows, longest, heads, size)
        before, behind = of_rest
        numbers = (
            *x.strides, *before, *x.cols, *behind, *of_lists,
            p.batch * heads, p.nheads, p.group, tiles, 1, p.rows_q, p.rows_k, p.seqlen_k,
            p.headdim // x.unit, p.headdim_v // x.unit, used, left, right, programs, slots, *_sizes(tables), p.scale,
        )  # fmt: skip
        constants = (*x.constants(tile), is_windowed, counts is not None, precision(p), *functions)
        optional = (*lengths, counts, entries)
        key = _key(p, (*optional, *rest), tables, presence(x.cols), widths((*x.cols, *behind)))
        call = Call(grid, numbers, constants, key, x.aligned, (tile.warps, min(tile.stages, 2)), choice)
        kernel(call, index, p.stream, (*tensors, *rest, *optional, *tables))

    launch(
        DQ, "dq", (t.q, t.k, t.v, t.out, t.dout, t.dq), (packed_q, packed_k, packed_k, packed_q, packed_q, packed_q),
        (lse2, delta, base, t.lse, t.dlse), ((lse_b, lse_h, dlse_b, dlse_h), (lse_r, dlse_r)),
        packed_q, p.rows_q, p.max_seqlen_q, p.nheads,
    )  # fmt: skip
    launch(
        DKDV, "dkdv", (t.q, t.k, t.v, t.dout, t.dk, t.dv),
        (packed_q, packed_k, packed_k, packed_q, packed_k, packed_k), (lse2, delta, base), ((), ()),
        packed_k, p.rows_k, p.max_seqlen_k, p.nheads_k,
    )  # fmt: skip
    if t.dsink is not None:
        numbers = (p.batch_q, p.nheads, p.rows_q, t.sink.stride(0), t.dsink.stride(0))
        DSINK(
            Call(p.nheads, numbers, (1024,), (t.sink.dtype, base is None), False, (4, 1)), index, p.stream,
            (t.sink, t.dsink, lse2, delta, base),
        )  # fmt: skip
