"""The forward: arguments from a Problem, one launch; two where keys are split, one more where new keys join."""

from __future__ import annotations

import torch

from flash_attn._engines.triton import configs
from flash_attn._engines.triton.kernels.append import append_kernel
from flash_attn._engines.triton.kernels.combine import combine_kernel
from flash_attn._engines.triton.kernels.forward import forward_kernel
from flash_attn._engines.triton.launch import Call, Calls, Kernel, layout
from flash_attn._engines.triton.recording import record, recordable

FORWARD = Kernel(forward_kernel, ("q", "k", "v", "out"))
COMBINE = Kernel(combine_kernel, ())
APPEND = Kernel(append_kernel, ())

LOG2E = 1.4426950408889634
MOST_PARTS = 64  # that keys are split in
FAR = 1 << 30  # a side of a window without limit
SHORT = 256  # rows of packed sequences on average, below which the heads of a group share tiles


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 15).bit_length()


def precision(p) -> str:
    """Of products in fp32: exact, unless the user asks torch for TF32."""
    if p.dtype == "float32" and (
        torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    ):
        return "tf32"
    return "ieee"


def window(p) -> tuple:
    """-> MASK, left, right, chunk (mask.py), None where the kernel does not look."""
    if p.chunk:
        mask, chunk = 2, min(p.chunk, FAR)
    elif p.window_left >= 0 or p.window_right >= 0:
        mask, chunk = 1, None
    else:
        return 0, None, None, None
    left = min(p.window_left, FAR) if p.window_left >= 0 else FAR
    right = min(p.window_right, FAR) if p.window_right >= 0 else FAR
    return mask, left, right, chunk


def strides(x, packed: bool) -> tuple[int, int, int, int]:
    """Of (batch, row, head, col)."""
    return (0, *x.stride()) if packed else x.stride()


def scaling(p, plain: bool) -> tuple[float, float, int]:
    """-> factor, scale, SIGN of the kernels."""
    if not plain:
        return LOG2E, p.scale, 1
    size = abs(p.scale)
    if size == 0.0:
        return LOG2E, 1.0, 0
    return size * LOG2E, size, 1 if p.scale > 0 else -1


def bias_arguments(bias) -> tuple:
    """-> four strides (0 where broadcast), rows and keys that there are."""
    if bias is None:
        return (None,) * 6
    shape = bias.shape
    b, h, r, c = (s if n > 1 else 0 for s, n in zip(bias.stride(), shape, strict=True))
    return b, h, r, c, shape[2] if shape[2] > 1 else FAR, shape[3]


def alibi_arguments(alibi) -> tuple:
    if alibi is None:
        return None, None
    return (0, alibi.stride(0)) if alibi.dim() == 1 else alibi.stride()


def widths(numbers) -> tuple:
    """For the key: which of the optional numbers need 64 bits. Almost always ()."""
    for x in numbers:
        if x is not None and x.__class__ is int and x > 2147483647:
            return tuple(x is not None and x > 2147483647 for x in numbers)
    return ()


def presence(tensors) -> int:
    """For the key: which of the optional tensors are there, as bits."""
    bits = 1
    for x in tensors:
        bits = bits << 1 | (x is not None)
    return bits


def slots_for(rows: int, batch: int, tiles: int, size: int) -> int:
    """Room for tiles of `size` of packed rows, of whose sequences the longest has `tiles`; 0 where as many tiles for
    each of them are no more. See place_of in kernels/sequences.py."""
    slots = rows // size + batch
    return slots if slots < batch * tiles else 0


def is_one_wave(programs: int, processors: int) -> bool:
    """Whether programs that split their keys are a processor's only one: not where one part would leave a good half of
    the processors at work, but not nearly all."""
    return programs * 2 <= processors or processors * 9 <= programs * 10 <= processors * 10


class Plan:
    """How a Problem is computed: a pure function of it and the device."""

    __slots__ = (
        "block", "choice", "columns", "columns_v", "heads", "pack", "parts", "programs", "slots", "tile", "tiles",
    )  # fmt: skip

    def __init__(self, p, device, version):
        itemsize = 4 if p.dtype == "float32" else 2
        self.columns, self.columns_v = power_of_two(p.headdim), power_of_two(p.headdim_v)
        widest = max(self.columns, self.columns_v)
        masked = p.window_left >= 0 or p.window_right >= 0 or p.chunk > 0
        # Few rows: those of a whole group of heads share their keys, and are one tile.
        rows = p.rows_q if p.batch_q == p.batch and p.max_seqlen_q < p.rows_q else p.max_seqlen_q
        packed = p.batch_q != p.batch
        is_few = rows * p.group <= 64
        self.pack = p.group > 1 and (is_few or (packed and p.rows_q < SHORT * p.batch))
        heads = p.nheads_k if self.pack else p.nheads
        self.heads = p.batch * heads
        rows *= p.group if self.pack else 1
        which, most = "forward", 128
        if is_few and self.pack or rows <= 16:
            most = 16 if rows <= 16 else 32 if rows <= 32 else 64
            which = "few_programs" if is_one_wave(-(-rows // most) * self.heads, device.processors) else "few_rows"
        most = min(most, 32) if itemsize == 4 and which != "forward" else most
        self.choice = configs.Choice(which, device.arch, version, widest, masked, itemsize, device.shared, most)
        self.tile = configs.tile_for(*self.choice)
        self.tiles = -(-rows // self.tile.rows)
        self.slots = 0
        if packed:
            all_rows = p.rows_q * (p.group if self.pack else 1)
            self.slots = slots_for(all_rows, p.batch, self.tiles, self.tile.rows)
        self.programs = programs = (self.slots or p.batch * self.tiles) * heads
        self.parts = 1
        # Long prefixes only: sequences that attend to themselves have one form, whatever their length.
        long = p.max_seqlen_k >= max(256, 4 * p.max_seqlen_q)
        if programs and long and programs * 2 <= device.processors * (4 if self.pack else 1):
            # Of 128 keys at least. H200, 16 sequences, 8 key heads: 128 programs read at 1.00 of the copy's rate, 256
            # at 0.92.
            wanted = device.processors * (1 if is_one_wave(programs, device.processors) else 2)
            self.parts = max(1, min(wanted // programs, p.max_seqlen_k // 128, MOST_PARTS))
        # Under a mask rows differ in work, and tiles are taken across heads: as many as leave their keys in the cache.
        keys = max(1, p.max_seqlen_k * (p.headdim + p.headdim_v) * itemsize)
        self.block = 1
        if masked:
            group = 1 if self.pack else p.group
            self.block = max(1, min(self.heads, device.cache // 2 // keys)) * group
            self.block = min(self.block, max(heads if self.slots else self.heads, 1))


_calls = Calls()

_OPTIONAL = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k", "cache_batch_idx", "block_table",
    "cu_seqlens_new", "alibi_slopes", "bias", "sink", "rotary_cos", "rotary_sin", "rotary_positions", "dropout_state",
)  # fmt: skip


def run_forward(p, t, device, index, version) -> None:
    q, k, v, out, lse = t.q, t.k, t.v, t.out, t.lse
    fills = t.cu_seqlens_q is not None and t.seqused_q is not None
    if fills:  # rows of a sequence that are not in use may be more than max_seqlen_q
        out.zero_()
        if lse is not None:
            lse.fill_(p.empty_lse)
    optional = (
        t.cu_seqlens_q, t.cu_seqlens_k, t.seqused_q, t.seqused_k, t.leftpad_k, t.cache_batch_idx, t.block_table,
        t.cu_seqlens_new, t.alibi_slopes, t.bias, t.sink, t.rotary_cos, t.rotary_sin, t.rotary_positions,
        t.dropout_state,
    )  # fmt: skip
    known = (
        index, p.dtype, q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), out.stride(),
        lse is not None and lse.stride(), (q.data_ptr() | k.data_ptr() | v.data_ptr() | out.data_ptr()) & 15,
        p.scale, p.softcap, p.window_left, p.window_right, p.chunk, p.max_seqlen_q, p.max_seqlen_k, p.empty_lse,
        p.used_k, p.drop_threshold, None if optional == _NOTHING else (layout(optional), p.rotary_interleaved),
        None if t.new_k is None else (p.seqlen_new, p.rows_new, p.max_new, layout((t.new_k, t.new_v))),
        precision(p), None if not p.drop_threshold or t.dropout_state is not None else (p.seed, p.offset),
    )  # fmt: skip
    calls = _calls.get(known)
    again = calls is not None
    if not again:
        calls = _calls.add(known, prepare(p, t, optional, device, version))
    joins, call, parts, joining = calls
    if joins is not None:
        APPEND(joins, index, p.stream, (k, v, t.new_k, t.new_v, *(getattr(t, name) for name in _OF_APPEND)))
    if parts == 1:
        FORWARD(call, index, p.stream, (q, k, v, out, lse, None, None, None, *optional))
    else:
        memory = p.batch_q * p.rows_q * p.nheads
        out_parts = q.new_empty((parts, memory, p.headdim_v), dtype=torch.float32)
        lse_parts = q.new_empty((parts, memory), dtype=torch.float32)
        sums = None if t.bias is None else torch.empty_like(lse_parts)
        FORWARD(call, index, p.stream, (q, k, v, out, None, out_parts, lse_parts, sums, *optional))
        COMBINE(joining, index, p.stream, (out_parts, lse_parts, sums, out, lse, t.sink))
    if again and not fills and recordable(p):
        hand_over(p, calls, t.bias is not None)


def hand_over(p, calls, has_bias: bool) -> None:
    joins, call, parts, joining = calls
    launches = [] if joins is None else [(joins, ("k", "v", "new_k", "new_v", *_OF_APPEND))]
    if parts == 1:
        launches.append((call, ("q", "k", "v", "out", "lse", None, None, None, *_OPTIONAL)))
        record(p, launches)
        return
    lse_parts = 4 * parts * p.batch_q * p.rows_q * p.nheads * p.headdim_v  # bytes of out_parts, which lies in front
    size = 4 * parts * p.batch_q * p.rows_q * p.nheads  # of lse_parts
    sums = lse_parts + size if has_bias else None
    launches.append((call, ("q", "k", "v", "out", None, 0, lse_parts, sums, *_OPTIONAL)))
    launches.append((joining, (0, lse_parts, sums, "out", "lse", "sink")))
    record(p, launches, lse_parts + (2 if has_bias else 1) * size)


_NOTHING = (None,) * 15


def prepare(p, t, optional, device, version) -> tuple[Call | None, Call, int, Call | None]:
    """-> the launch that appends new keys, that of the forward, in how many parts keys are taken, and the launch that
    joins these."""
    joins = prepare_append(p, t)
    plan = Plan(p, device, version)
    tile = plan.tile
    packed_q = t.cu_seqlens_q is not None
    packed_k = t.cu_seqlens_k is not None and not p.page_size
    programs = plan.programs * plan.parts
    grid = programs + (-(-p.rows_q // tile.rows) if packed_q else 0)

    q, k, v, out, lse = t.q, t.k, t.v, t.out, t.lse
    q_b, q_r, q_h, q_c = strides(q, packed_q)
    k_b, k_r, k_h, k_c = strides(k, packed_k)
    v_b, v_r, v_h, v_c = strides(v, packed_k)
    o_b, o_r, o_h, o_c = strides(out, packed_q)
    unit = 4 if p.dtype == "float32" else 8
    bits = q_b | q_r | q_h | k_b | k_r | k_h | v_b | v_r | v_h | o_b | o_r | o_h | p.headdim | p.headdim_v
    addresses = q.data_ptr() | k.data_ptr() | v.data_ptr() | out.data_ptr()
    aligned = q_c == k_c == v_c == o_c == 1 and not bits % unit and not addresses & 15
    if not aligned:
        unit = 1
    cols = [None if c == 1 else c for c in (q_c, k_c, v_c, o_c)]
    wide = max(k_r, v_r, k_c, v_c) >= 1 << 22

    lse_b = lse_h = 0
    lse_r = None
    if lse is not None:
        lse_b, lse_h, lse_r = (0, *lse.stride()) if packed_q else lse.stride()
    plain = not p.softcap and t.alibi_slopes is None and t.bias is None
    factor, scale, sign = scaling(p, plain)
    mask, left, right, chunk = window(p)
    paged = 0  # see pages_at in kernels/sequences.py
    if p.page_size:
        paged = 1
        if t.leftpad_k is None:
            paged = 3 if p.page_size % tile.keys == 0 else 2 if tile.keys % p.page_size == 0 else 1
    even = p.headdim == plan.columns and p.headdim_v == plan.columns_v
    split = plan.parts > 1
    bias = bias_arguments(t.bias)
    alibi = alibi_arguments(t.alibi_slopes)
    sink_h = t.sink.stride(0) if t.sink is not None else None
    rotary = (None,) * 7
    if p.rotary_dim:
        advance = int(mask > 0)
        rotary = (*t.rotary_cos.stride(), *t.rotary_sin.stride(), t.rotary_cos.shape[0], p.rotary_dim // 2, advance)
    threshold = p.drop_threshold or None
    seed = offset = 0
    if threshold and t.dropout_state is None:
        seed, offset = signed(p.seed), signed(p.offset)
    new = (None,) * 3
    if p.seqlen_new or t.cu_seqlens_new is not None:
        new = (p.seqlen_new or None, p.rows_new, p.max_new)
    used = p.used_k if p.used_k >= 0 else None
    constants = (
        tile.rows, tile.keys, plan.columns, plan.columns_v, even, unit, wide, mask, paged, plan.pack, split,
        p.rotary_interleaved if p.rotary_dim else False, sign, precision(p), 4 - 2 * tile.loops,
    )  # fmt: skip
    key = (
        p.dtype, presence(optional), split or lse is None, used is None, new[0] is None, plain, p.softcap != 0,
        threshold is None, None if t.bias is None else t.bias.dtype, None if t.sink is None else t.sink.dtype,
        None if t.rotary_cos is None else (t.rotary_cos.dtype, t.rotary_sin.dtype), presence(cols), lse_r is None,
        widths((*alibi, *bias, sink_h, *rotary[:4], *cols, lse_r)),
    )  # fmt: skip
    numbers = (
        *(x // unit for x in (q_b, q_r, q_h, k_b, k_r, k_h, v_b, v_r, v_h, o_b, o_r, o_h)), lse_b, lse_h, *cols, lse_r,
        plan.heads, p.nheads, p.group, plan.tiles, plan.block, p.rows_q, p.rows_k, p.seqlen_k,
        p.headdim // unit, p.headdim_v // unit, p.batch_k, used, *new, p.page_size or None,
        t.block_table.stride(0) if paged else None, left, right, chunk, plan.parts if split else None,
        *((programs, plan.slots) if packed_q else (None, None)), *alibi, *bias, sink_h, *rotary,
        threshold, seed, offset, factor, scale, p.softcap or None, p.drop_scale if threshold else None, p.empty_lse,
    )  # fmt: skip
    call = Call(grid, numbers, constants, key, aligned, tile[2:4], plan.choice)
    if not split:
        return joins, call, 1, None
    memory = p.batch_q * p.rows_q * p.nheads
    numbers = (
        o_b, o_r, o_h, lse_b, lse_h, cols[3], lse_r, memory, p.rows_q, p.nheads, p.headdim_v, plan.parts, sink_h,
        p.empty_lse,
    )  # fmt: skip
    constants = (plan.columns_v, MOST_PARTS)
    key = (
        p.dtype, lse is None, t.bias is None, None if t.sink is None else t.sink.dtype, cols[3] is None, lse_r is None,
        widths((cols[3], lse_r, sink_h)),
    )  # fmt: skip
    joining = Call(memory, numbers, constants, key, False, (4 if plan.columns_v <= 128 else 8, 1))
    return joins, call, plan.parts, joining


def signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


_OF_APPEND = (
    "seqused_k", "cache_batch_idx", "block_table", "cu_seqlens_new", "rotary_cos", "rotary_sin", "rotary_positions",
)  # fmt: skip


def prepare_append(p, t) -> Call | None:
    new = p.max_new or p.seqlen_new
    if not (new and p.batch and p.rows_new):
        return None
    rows = min(32, 1 << (new - 1).bit_length())
    tiles = -(-new // rows)
    packed = t.cu_seqlens_new is not None
    *k, k_c = t.k.stride()
    *v, v_c = t.v.stride()
    *nk, nk_c = strides(t.new_k, packed)
    *nv, nv_c = strides(t.new_v, packed)
    cols = [None if c == 1 else c for c in (k_c, v_c, nk_c, nv_c)]
    rotary = (None,) * 6
    if p.rotary_dim:
        rotary = (*t.rotary_cos.stride(), *t.rotary_sin.stride(), t.rotary_cos.shape[0], p.rotary_dim // 2)
    used = p.used_k if p.used_k >= 0 else None
    optional = [getattr(t, name) for name in _OF_APPEND]
    constants = (
        rows, power_of_two(p.headdim), power_of_two(p.headdim_v), p.page_size > 0,
        p.rotary_interleaved if p.rotary_dim else False,
    )  # fmt: skip
    rotary_types = (t.rotary_cos.dtype, t.rotary_sin.dtype) if p.rotary_dim else None
    key = (p.dtype, presence(optional), presence(cols), used is None, rotary_types, widths((*cols, *rotary[:4])))
    numbers = (
        *k, *v, *nk, *nv, *cols,
        p.nheads_k, tiles, p.headdim, p.headdim_v, p.batch_k, p.seqlen_k, used,
        None if packed else p.seqlen_new, p.rows_new, new, p.page_size or None,
        t.block_table.stride(0) if p.page_size else None, *rotary,
    )  # fmt: skip
    return Call(p.batch * tiles * p.nheads_k, numbers, constants, key, False, (4, 1))
