"""The backward: dq and the statistics of rows, then dk and dv; and, where asked for, the gradients of bias and sink."""

from __future__ import annotations

import torch

from flash_attn._engines.triton import configs
from flash_attn._engines.triton.forward import (
    LOG2E,
    alibi_arguments,
    bias_arguments,
    power_of_two,
    precision,
    presence,
    signed,
    strides,
    widths,
    window,
)
from flash_attn._engines.triton.kernels.backward import dkdv_kernel, dq_kernel
from flash_attn._engines.triton.kernels.extra_gradients import dbias_kernel, dsink_kernel
from flash_attn._engines.triton.launch import Kernel

DKDV = Kernel(dkdv_kernel, ("q", "k", "v", "dout", "dk", "dv"))
DQ = Kernel(dq_kernel, ("q", "k", "v", "out", "dout", "dq"))
DBIAS = Kernel(dbias_kernel, ("q", "k", "v", "dout"))
DSINK = Kernel(dsink_kernel, ())


def run_backward(p, t, device, index, version) -> None:
    packed_q, packed_k = t.cu_seqlens_q is not None, t.cu_seqlens_k is not None
    if t.seqused_k is not None or t.leftpad_k is not None or p.used_k >= 0:  # memory that is not in use
        t.dk.zero_()
        t.dv.zero_()
    if packed_q and t.seqused_q is not None:
        t.dq.zero_()

    unit = 4 if p.dtype == "float32" else 8
    tensors = (t.q, t.k, t.v, t.out, t.dout, t.dq, t.dk, t.dv)
    layouts = [strides(x, packed_k if i in (1, 2, 6, 7) else packed_q) for i, x in enumerate(tensors)]
    bits = p.headdim | p.headdim_v
    aligned = True
    wide = False
    for x, (b, r, h, c) in zip(tensors, layouts, strict=True):
        bits |= b | r | h
        aligned = aligned and c == 1 and not x.data_ptr() & 15
        wide = wide or max(r, c) >= 1 << 22
    aligned = aligned and not bits % unit
    if aligned:
        layouts = [(b // unit, r // unit, h // unit, None) for b, r, h, _ in layouts]
    else:
        unit = 1
        layouts = [(b, r, h, None if c == 1 else c) for b, r, h, c in layouts]
    q, k, v, out, dout, dq, dk, dv = layouts
    lse_b, lse_h, lse_r = (0, *t.lse.stride()) if packed_q else t.lse.stride()
    dlse_b, dlse_h, dlse_r = 0, 0, None
    if t.dlse is not None:
        dlse_b, dlse_h, dlse_r = (0, *t.dlse.stride()) if packed_q else t.dlse.stride()

    lse2, delta = t.q.new_empty((2, max(p.batch_q * p.nheads * p.rows_q, 1)), dtype=torch.float32).unbind(0)
    if t.dsink is not None and packed_q and t.seqused_q is not None:
        lse2.fill_(torch.inf)  # rows beyond those in use may be in no tile

    columns, columns_v = power_of_two(p.headdim), power_of_two(p.headdim_v)
    widest = max(columns, columns_v)
    itemsize = 4 if p.dtype == "float32" else 2
    mask, left, right, chunk = window(p)
    alibi, bias = alibi_arguments(t.alibi_slopes), bias_arguments(t.bias)
    plain = not p.softcap and t.alibi_slopes is None and t.bias is None
    even = p.headdim == columns and p.headdim_v == columns_v
    state = threshold = None
    seed = offset = 0
    if p.drop_threshold:
        threshold, state = p.drop_threshold, t.dropout_state
        if state is None:
            seed, offset = signed(p.seed), signed(p.offset)
    used = p.used_k if p.used_k >= 0 else None
    optional = (
        t.cu_seqlens_q, t.cu_seqlens_k, t.seqused_q, t.seqused_k, t.leftpad_k, t.alibi_slopes, t.bias, state,
    )  # fmt: skip
    tail = (
        *alibi, *bias, threshold, seed, offset, p.scale * LOG2E if plain else LOG2E, p.scale, p.softcap or None,
        p.drop_scale if threshold else None,
    )  # fmt: skip
    exact = precision(p)
    base_key = (
        p.dtype, aligned, presence(optional), used is None, p.softcap != 0, threshold is None,
        None if t.bias is None else t.bias.dtype, widths((*alibi, *bias, *(x[3] for x in layouts), lse_r, dlse_r)),
        tuple(x[3] is None for x in layouts),
    )  # fmt: skip
    sizes = (p.rows_q, p.rows_k, p.seqlen_k, p.headdim // unit, p.headdim_v // unit, used, left, right, chunk)

    def choice_of(which):
        return configs.Choice(which, device.arch, version, widest, mask > 0, itemsize, device.shared)

    def block_of(heads, rows, group):
        """Heads whose streamed tensors stay in the cache together: only under a mask, as in the forward."""
        if not mask:
            return 1
        size = max(1, rows * (p.headdim + p.headdim_v) * itemsize)
        return max(1, min(heads, device.cache // 2 // size * group or 1))

    choice = choice_of("dq")
    tile = configs.tile_for(*choice)
    rows = p.max_seqlen_q if packed_q else p.rows_q
    heads, tiles = p.batch * p.nheads, -(-rows // tile.rows)
    programs = heads * tiles
    grid = programs + (-(-p.rows_q // tile.rows) if packed_q else 0)
    constants = (tile.rows, tile.keys, columns, columns_v, even, unit, wide, mask, exact)
    if grid:
        arguments = (
            t.q, t.k, t.v, t.out, t.dout, t.dq, lse2, delta, t.lse, t.dlse, *optional,
            *q[:3], *k[:3], *v[:3], *out[:3], *dout[:3], *dq[:3], lse_b, lse_h, dlse_b, dlse_h,
            q[3], k[3], v[3], out[3], dout[3], dq[3], lse_r, dlse_r,
            heads, p.nheads, p.group, tiles, block_of(heads, p.max_seqlen_k, p.group), *sizes,
            programs if packed_q else None, *tail,
        )  # fmt: skip
        key = (base_key, constants, tile, t.dlse is None)
        DQ(key, aligned, grid, index, p.stream, arguments, constants, tile.warps, tile.stages, choice)

    for which, name in ((1, "dk"), (2, "dv")) if widest >= 256 and itemsize == 2 else ((0, "dkdv"),):
        choice = choice_of(name)
        tile = configs.tile_for(*choice)
        keys = p.max_seqlen_k if packed_k else p.rows_k
        heads, tiles = p.batch * p.nheads_k, -(-keys // tile.keys)
        programs = heads * tiles
        grid = programs + (-(-p.rows_k // tile.keys) if packed_k else 0)
        constants = (tile.rows, tile.keys, columns, columns_v, even, unit, wide, mask, exact, which)
        if grid:
            arguments = (
                t.q, t.k, t.v, t.dout, t.dk, t.dv, lse2, delta, *optional,
                *q[:3], *k[:3], *v[:3], *dout[:3], *dk[:3], *dv[:3], q[3], k[3], v[3], dout[3], dk[3], dv[3],
                heads, p.nheads, p.group, tiles, block_of(heads, p.max_seqlen_q * p.group, 1), *sizes,
                programs if packed_k else None, *tail,
            )  # fmt: skip
            key = (base_key, constants, tile)
            DKDV(key, aligned, grid, index, p.stream, arguments, constants, tile.warps, tile.stages, choice)

    if t.dbias is not None and t.dbias.numel():
        choice = choice_of("dbias")
        tile = configs.tile_for(*choice)
        shape = tuple(t.bias.shape)
        alike = shape[2] == 1
        tiles_r, tiles_c = (1 if alike else -(-shape[2] // tile.rows)), -(-shape[3] // tile.keys)
        constants = (tile.rows, tile.keys, columns, columns_v, even, unit, wide, mask, alike, exact)
        arguments = (
            t.q, t.k, t.v, t.dout, t.dbias, lse2, delta, *optional,
            *q[:3], *k[:3], *v[:3], *dout[:3], *t.dbias.stride(), q[3], k[3], v[3], dout[3],
            p.batch, p.nheads, p.group, tiles_r, tiles_c, *shape, *sizes, *tail,
        )  # fmt: skip
        grid = tiles_r * tiles_c * shape[0] * shape[1]
        DBIAS((base_key, constants, tile), aligned, grid, index, p.stream, arguments, constants, tile.warps, tile.stages, choice)

    if t.dsink is not None:
        sink = (t.sink.stride(0), t.dsink.stride(0))
        arguments = (t.sink, t.dsink, lse2, delta, p.batch_q, p.nheads, p.rows_q, *sink)
        DSINK((t.sink.dtype,), False, p.nheads, index, p.stream, arguments, (1024,), 4, 1)

