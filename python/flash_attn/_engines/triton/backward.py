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
    slots_for,
    strides,
    widths,
    window,
)
from flash_attn._engines.triton.kernels.backward import dkdv_kernel, dq_kernel
from flash_attn._engines.triton.kernels.extra_gradients import dbias_kernel, dsink_kernel
from flash_attn._engines.triton.launch import Call, Calls, Kernel, layout
from flash_attn._engines.triton.recording import record, recordable

DKDV = Kernel(dkdv_kernel, ("q", "k", "v", "dout", "dk", "dv"))
DQ = Kernel(dq_kernel, ("q", "k", "v", "out", "dout", "dq"))
DBIAS = Kernel(dbias_kernel, ("q", "k", "v", "dout"))
DSINK = Kernel(dsink_kernel, ())


_calls = Calls()

_OPTIONAL = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k", "alibi_slopes", "bias", "dropout_state",
)  # fmt: skip


def run_backward(p, t, device, index, version) -> None:
    unused_k = t.seqused_k is not None or t.leftpad_k is not None or p.used_k >= 0  # memory that is not in use
    if unused_k:
        t.dk.zero_()
        t.dv.zero_()
    unused_q = t.cu_seqlens_q is not None and t.seqused_q is not None
    if unused_q:
        t.dq.zero_()
    tensors = (t.q, t.k, t.v, t.out, t.dout, t.dq, t.dk, t.dv)
    optional = (
        t.cu_seqlens_q, t.cu_seqlens_k, t.seqused_q, t.seqused_k, t.leftpad_k, t.alibi_slopes, t.bias, t.dropout_state,
    )  # fmt: skip
    addresses = 0
    for x in tensors:
        addresses |= x.data_ptr()
    known = (
        index, p.dtype, t.q.shape, t.k.shape, t.v.shape, *(x.stride() for x in tensors), t.lse.stride(), addresses & 15,
        p.scale, p.softcap, p.window_left, p.window_right, p.chunk, p.max_seqlen_q, p.max_seqlen_k, p.used_k,
        p.drop_threshold, layout((*optional, t.sink, t.dlse, t.dbias, t.dsink)), precision(p),
        None if not p.drop_threshold or t.dropout_state is not None else (p.seed, p.offset),
    )  # fmt: skip
    calls = _calls.get(known)
    again = calls is not None
    if not again:
        calls = _calls.add(known, prepare(p, t, optional, tensors, addresses, device, version))

    lse2, delta, base = row_statistics_of(p, t.q, t.bias is not None)
    if t.dsink is not None and unused_q:
        lse2.fill_(torch.inf)  # rows beyond those in use may be in no tile
    q, k, v, out, dout, dq, dk, dv = tensors
    dq_call, dkdv_calls, dbias_call, dsink_call = calls
    DQ(dq_call, index, p.stream, (q, k, v, out, dout, dq, lse2, delta, base, t.lse, t.dlse, *optional))
    for call in dkdv_calls:
        DKDV(call, index, p.stream, (q, k, v, dout, dk, dv, lse2, delta, base, *optional))
    if dbias_call is not None:
        DBIAS(dbias_call, index, p.stream, (q, k, v, dout, t.dbias, lse2, delta, base, *optional))
    if dsink_call is not None:
        DSINK(dsink_call, index, p.stream, (t.sink, t.dsink, lse2, delta, base))
    if again and not unused_k and not unused_q and recordable(p):
        hand_over(p, calls, base is not None)


def row_statistics_of(p, like: torch.Tensor, has_base: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Memory of kernels/gradients.py: lse2, delta, and base or None."""
    count = 3 if has_base else 2
    of_rows = like.new_empty((count, max(p.batch_q * p.nheads * p.rows_q, 1)), dtype=torch.float32).unbind(0)
    return of_rows if has_base else (*of_rows, None)


def hand_over(p, calls, has_base: bool) -> None:
    dq_call, dkdv_calls, dbias_call, dsink_call = calls
    size = 4 * max(p.batch_q * p.nheads * p.rows_q, 1)
    statistics = (0, size, 2 * size if has_base else None)  # where lse2, delta and base lie
    launches = [(dq_call, ("q", "k", "v", "out", "dout", "dq", *statistics, "lse", "dlse", *_OPTIONAL))]
    for call in dkdv_calls:
        launches.append((call, ("q", "k", "v", "dout", "dk", "dv", *statistics, *_OPTIONAL)))
    if dbias_call is not None:
        launches.append((dbias_call, ("q", "k", "v", "dout", "dbias", *statistics, *_OPTIONAL)))
    if dsink_call is not None:
        launches.append((dsink_call, ("sink", "dsink", *statistics)))
    record(p, launches, (3 if has_base else 2) * size)


def prepare(p, t, optional, tensors, addresses, device, version) -> tuple:
    """-> the launches: of dq, of dk and dv (a list), of dbias and of dsink (or None)."""
    packed_q, packed_k = t.cu_seqlens_q is not None, t.cu_seqlens_k is not None
    unit = 4 if p.dtype == "float32" else 8
    layouts = [strides(x, packed_k if i in (1, 2, 6, 7) else packed_q) for i, x in enumerate(tensors)]
    bits = p.headdim | p.headdim_v
    wide = False
    for b, r, h, c in layouts:
        bits |= b | r | h
        wide = wide or max(r, c) >= 1 << 22
    aligned = all(x[3] == 1 for x in layouts) and not bits % unit and not addresses & 15
    if not aligned:
        unit = 1
    layouts = [(b // unit, r // unit, h // unit, None if c == 1 else c) for b, r, h, c in layouts]
    q, k, v, out, dout, dq, dk, dv = layouts
    lse_b, lse_h, lse_r = (0, *t.lse.stride()) if packed_q else t.lse.stride()
    dlse_b, dlse_h, dlse_r = 0, 0, None
    if t.dlse is not None:
        dlse_b, dlse_h, dlse_r = (0, *t.dlse.stride()) if packed_q else t.dlse.stride()

    columns, columns_v = power_of_two(p.headdim), power_of_two(p.headdim_v)
    widest = max(columns, columns_v)
    itemsize = 4 if p.dtype == "float32" else 2
    mask, left, right, chunk = window(p)
    alibi, bias = alibi_arguments(t.alibi_slopes), bias_arguments(t.bias)
    plain = not p.softcap and t.alibi_slopes is None and t.bias is None
    even = p.headdim == columns and p.headdim_v == columns_v
    threshold = p.drop_threshold or None
    seed = offset = 0
    if threshold and t.dropout_state is None:
        seed, offset = signed(p.seed), signed(p.offset)
    used = p.used_k if p.used_k >= 0 else None
    tail = (
        *alibi, *bias, threshold, seed, offset, p.scale * LOG2E if plain else LOG2E, p.scale, p.softcap or None,
        p.drop_scale if threshold else None,
    )  # fmt: skip
    exact = precision(p)
    key = (
        p.dtype, presence(optional), used is None, plain, p.softcap != 0, threshold is None,
        None if t.bias is None else t.bias.dtype, presence(x[3] for x in layouts), t.dlse is None,
        widths((*alibi, *bias, *(x[3] for x in layouts), lse_r, dlse_r)),
    )  # fmt: skip
    sizes = (p.rows_q, p.rows_k, p.seqlen_k, p.headdim // unit, p.headdim_v // unit, used, left, right, chunk)

    def tile_of(which):
        choice = configs.Choice(which, device.arch, version, widest, mask > 0, itemsize, device.shared)
        return choice, configs.tile_for(*choice)

    def constants_of(tile):
        return tile.rows, tile.keys, columns, columns_v, even, unit, wide, mask

    def grid_of(is_packed, rows, longest, heads, size, streamed, group):
        """-> tiles, heads that are taken together, (programs, slots) of a packed call, programs in all."""
        tiles = -(-(longest if is_packed else rows) // size)
        slots = slots_for(rows, p.batch, tiles, size) if is_packed else 0
        programs = (slots or p.batch * tiles) * heads
        block = block_of(heads if slots else p.batch * heads, streamed, group)
        more = -(-rows // size) if is_packed else 0
        return tiles, block, (programs, slots) if is_packed else (None, None), programs + more

    def block_of(heads, rows, group):
        """Heads whose streamed tensors stay in the cache together: only under a mask, as in the forward."""
        if not mask:
            return 1
        size = max(1, rows * (p.headdim + p.headdim_v) * itemsize)
        return max(1, min(heads, device.cache // 2 // size * group or 1))

    choice, tile = tile_of("dq")
    tiles, block, packed, grid = grid_of(
        packed_q, p.rows_q, p.max_seqlen_q, p.nheads, tile.rows, p.max_seqlen_k, p.group
    )
    numbers = (
        *q[:3], *k[:3], *v[:3], *out[:3], *dout[:3], *dq[:3], lse_b, lse_h, dlse_b, dlse_h,
        q[3], k[3], v[3], out[3], dout[3], dq[3], lse_r, dlse_r,
        p.batch * p.nheads, p.nheads, p.group, tiles, block, *sizes, *packed, *tail,
    )  # fmt: skip
    dq_call = Call(grid, numbers, (*constants_of(tile), exact, 4 - 2 * tile.loops), key, aligned, tile[2:4], choice)

    dkdv_calls = []
    for which, name in ((1, "dk"), (2, "dv")) if widest >= 256 and itemsize == 2 else ((0, "dkdv"),):
        choice, tile = tile_of(name)
        tiles, block, packed, grid = grid_of(
            packed_k, p.rows_k, p.max_seqlen_k, p.nheads_k, tile.keys, p.max_seqlen_q * p.group, 1
        )
        numbers = (
            *q[:3], *k[:3], *v[:3], *dout[:3], *dk[:3], *dv[:3], q[3], k[3], v[3], dout[3], dk[3], dv[3],
            p.batch * p.nheads_k, p.nheads, p.group, tiles, block, *sizes, *packed, *tail,
        )  # fmt: skip
        constants = (*constants_of(tile), exact, 4 - 2 * tile.loops, which)
        dkdv_calls.append(Call(grid, numbers, constants, key, aligned, tile[2:4], choice))

    dbias_call = dsink_call = None
    if t.dbias is not None:
        choice, tile = tile_of("dbias")
        shape = tuple(t.bias.shape)
        alike = shape[2] == 1
        tiles_r, tiles_c = (1 if alike else -(-shape[2] // tile.rows)), -(-shape[3] // tile.keys)
        numbers = (
            *q[:3], *k[:3], *v[:3], *dout[:3], *t.dbias.stride(), q[3], k[3], v[3], dout[3],
            p.batch, p.nheads, p.group, tiles_r, tiles_c, *shape, *sizes, *tail,
        )  # fmt: skip
        grid = tiles_r * tiles_c * shape[0] * shape[1]
        dbias_call = Call(grid, numbers, (*constants_of(tile), alike, exact), key, aligned, tile[2:4], choice)
    if t.dsink is not None:
        numbers = (p.batch_q, p.nheads, p.rows_q, t.sink.stride(0), t.dsink.stride(0))
        dsink_call = Call(p.nheads, numbers, (1024,), (t.sink.dtype, t.bias is None), False, (4, 1))
    return dq_call, dkdv_calls, dbias_call, dsink_call
