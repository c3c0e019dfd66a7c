"""The meaning of a Problem (p, t) in float64, sequence by sequence: tensors as engines get them, on any device.

As plain as can be: gathers each sequence's rows, computes all scores, lets autograd differentiate. The same meaning as
src/reference, which tests compare it with, but it also runs on a GPU and for whatever the Python API cannot say yet.
"""

from __future__ import annotations

import torch


def philox(c: list, k: list) -> list:
    """Four int64 tensors of 32 bits each."""
    low = 0xFFFFFFFF
    for _ in range(10):
        a, b = mul(0xD2511F53, c[0]), mul(0xCD9E8D57, c[2])
        c = [b[0] ^ c[1] ^ k[0], b[1], a[0] ^ c[3] ^ k[1], a[1]]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def mul(a: int, x: torch.Tensor):
    """High and low words of a * x, by halves of 16 bits: int64 has no room for 64 bits unsigned."""
    low = 0xFFFF
    a1, a0, x1, x0 = a >> 16, a & low, x >> 16, x & low
    middle = a1 * x0 + (a0 * x0 >> 16)
    middle2 = a0 * x1 + (middle & low)
    return a1 * x1 + (middle >> 16) + (middle2 >> 16), ((middle2 & low) << 16) | (a0 * x0 & low)


def kept(p, t, b: int, rows: int, keys: int, device) -> torch.Tensor:
    """(nheads, rows, keys) bool."""
    seed, offset = (p.seed, p.offset) if t.dropout_state is None else t.dropout_state.tolist()
    word = 0xFFFFFFFF
    k = [seed & word, (seed >> 32 & word) ^ (offset >> 32 & word)]
    shape = (p.nheads, rows, -(-keys // 8))
    j8 = torch.arange(shape[2], device=device).expand(shape)
    i = torch.arange(rows, device=device)[:, None].expand(shape)
    bh = (b * p.nheads + torch.arange(p.nheads, device=device))[:, None, None].expand(shape)
    words = torch.stack(philox([j8, i, bh, torch.full_like(i, offset & word)], k), -1)
    draws = torch.stack([words & 0xFFFF, words >> 16], -1).flatten(-3)
    return draws[..., :keys] >= p.drop_threshold


def sequence(p, t, b: int):
    """-> slices of q's memory and index tensors of k's: (q_batch, first, rows, used), (batch, row) of each key."""

    def at(x, i=b):
        return int(x[i])

    def clamp(x, lo, hi):
        return max(lo, min(x, hi))

    if t.cu_seqlens_q is None:
        q = (b, 0, p.seqlen_q)
    else:
        first = clamp(at(t.cu_seqlens_q), 0, p.rows_q)
        q = (0, first, clamp(at(t.cu_seqlens_q, b + 1), first, p.rows_q) - first)
    used_q = q[2] if t.seqused_q is None else clamp(at(t.seqused_q), 0, q[2])
    batch, row, n = b, 0, p.seqlen_k
    if t.cu_seqlens_k is not None:
        if p.page_size:
            n = clamp(at(t.cu_seqlens_k, b + 1) - at(t.cu_seqlens_k), 0, p.seqlen_k)
        else:
            batch, row = 0, clamp(at(t.cu_seqlens_k), 0, p.rows_k)
            n = clamp(at(t.cu_seqlens_k, b + 1), row, p.rows_k) - row
    new = p.seqlen_new
    if t.cu_seqlens_new is not None:
        new = clamp(at(t.cu_seqlens_new, b + 1) - at(t.cu_seqlens_new), 0, p.max_new)
    used = None
    if t.seqused_k is not None:
        used = clamp(at(t.seqused_k), 0, n - new)
    elif p.used_k >= 0:
        used = clamp(p.used_k, 0, n - new)
    if used is not None:
        n = used + new
    if t.leftpad_k is not None:
        pad = clamp(at(t.leftpad_k), 0, n)
        row, n = row + pad, n - pad
    if t.cache_batch_idx is not None:
        batch = clamp(at(t.cache_batch_idx), 0, p.batch_k - 1)
    rows = torch.arange(row, row + n, device=t.q.device)
    return (*q, used_q), (batch, rows), (used, new)


def places(p, t, b, batch, rows):
    """Entry (or page) and row of each key."""
    if not p.page_size:
        return torch.full_like(rows, batch), rows
    pages = t.block_table[b].long()[rows // p.page_size].clamp(0, p.batch_k - 1)
    return pages, rows % p.page_size


def rotated(x, first: int, advance: bool, p, t):
    """x (rows, heads, headdim), rounded to its dtype."""
    positions = first + torch.arange(x.shape[0], device=x.device) * int(advance)
    positions = positions.clamp(0, t.rotary_cos.shape[0] - 1)
    cos, sin = (table[positions].float()[:, None] for table in (t.rotary_cos, t.rotary_sin))
    d, half = p.rotary_dim, p.rotary_dim // 2
    y = x.float().clone()
    a, b = (slice(0, d, 2), slice(1, d, 2)) if p.rotary_interleaved else (slice(0, half), slice(half, d))
    y[..., a], y[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., a] * sin + x[..., b] * cos
    return y.to(x.dtype)


def append(p, t) -> None:
    """Writes new keys into t.k and t.v."""
    for b in range(p.batch):
        _, (batch, _), (used, new) = sequence(p, t, b)
        start, entry = (int(t.cu_seqlens_new[b]), None) if t.cu_seqlens_new is not None else (0, b)
        first = used
        for x, source, turn in ((t.k, t.new_k, p.rotary_dim > 0), (t.v, t.new_v, False)):
            rows = (source if entry is None else source[entry])[start : start + new]
            if turn:
                rows = rotated(rows, position(p, t, b), True, p, t)
            x[places(p, t, b, batch, torch.arange(first, first + new, device=x.device))] = rows


def position(p, t, b: int) -> int:
    if t.rotary_positions is not None:
        return int(t.rotary_positions[b])
    return int(t.seqused_k[b]) if t.seqused_k is not None else p.used_k


def attention(p, t, q, k, v, bias, sink):
    """-> out of q's shape, lse, all float64 and differentiable in the given tensors (float64 copies of those in t)."""
    device = q.device
    packed = t.cu_seqlens_q is not None
    out = torch.zeros((*q.shape[:-1], p.headdim_v), dtype=torch.float64, device=device)
    lse = torch.full(q.shape[:-1], p.empty_lse, dtype=torch.float64, device=device)
    k4, v4 = (x[None] if x.dim() == 3 else x for x in (k, v))
    outs, lses = [], []
    for b in range(p.batch):
        (q_batch, first, _, rows), (batch, key_rows), _ = sequence(p, t, b)
        n = key_rows.numel()
        at = places(p, t, b, batch, key_rows)
        mine = (q if packed else q[q_batch])[first : first + rows]
        if p.rotary_dim:
            low = mine.to(t.q.dtype)
            masked = p.window_left >= 0 or p.window_right >= 0 or p.chunk > 0
            mine = rotated(low, position(p, t, b), masked, p, t).double()
        keys = k4[at].repeat_interleave(p.group, 1)
        values = v4[at].repeat_interleave(p.group, 1)
        s = torch.einsum("ihd,jhd->hij", mine, keys) * p.scale
        i = torch.arange(rows, device=device)[:, None]
        j = torch.arange(n, device=device)[None, :]
        stands = i + n - rows
        if p.softcap:
            s = p.softcap * torch.tanh(s / p.softcap)
        if t.alibi_slopes is not None:
            slopes = t.alibi_slopes.double()
            slopes = slopes[b] if slopes.dim() == 2 else slopes
            s = s - slopes[:, None, None] * (stands - j).abs()
        if bias is not None:
            mine_b = bias[b if bias.shape[0] > 1 else 0]
            s = s + (mine_b[:, :rows] if mine_b.shape[1] > 1 else mine_b)[..., :n]
        lo, hi = torch.zeros_like(stands), torch.full_like(stands, n)
        if p.window_left >= 0:
            lo = torch.maximum(lo, stands - p.window_left)
        if p.window_right >= 0:
            hi = torch.minimum(hi, stands + p.window_right + 1)
        if p.chunk:
            start = torch.div(stands, p.chunk, rounding_mode="floor") * p.chunk
            lo, hi = torch.maximum(lo, start), torch.minimum(hi, start + p.chunk)
        visible = (j >= lo) & (j < hi)
        s = s.masked_fill(~visible, -torch.inf)
        logits = s
        if sink is not None:
            logits = torch.cat([s, sink[:, None, None].expand(-1, rows, 1)], -1)
        if logits.shape[-1] == 0:
            continue
        top = logits.detach().amax(-1, keepdim=True)
        empty = top == -torch.inf
        e = torch.exp(torch.where(logits == -torch.inf, -torch.inf, logits - top.masked_fill(empty, 0)))
        total = e.sum(-1, keepdim=True)
        w = e[..., :n] / total.masked_fill(empty, 1)
        row_lse = (top + torch.log(total.masked_fill(empty, 1))).masked_fill(empty, p.empty_lse)[..., 0]
        if p.drop_threshold:
            w = w * kept(p, t, b, rows, n, device) * p.drop_scale
        # a value that a row does not see does not reach it, whatever it is
        strange = ~torch.isfinite(values)
        if bool(strange.any()):
            pieces = w[..., None] * values.transpose(0, 1)[:, None]
            o = pieces.masked_fill(~visible[None, ..., None], 0).sum(2).transpose(0, 1)
        else:
            o = torch.einsum("hij,jhd->ihd", w, values)
        outs.append((q_batch, first, rows, o))
        lses.append(row_lse.transpose(0, 1))
    for (q_batch, first, rows, o), row_lse in zip(outs, lses, strict=True):
        index = slice(first, first + rows) if packed else (q_batch, slice(first, first + rows))
        out = place(out, index, o)
        lse = place(lse, index, row_lse)
    return out, lse.transpose(-1, -2)


def place(x, index, rows):
    x = x.clone()
    x[index] = rows
    return x


def forward(p, t):
    """-> out, lse in float64. New keys must have joined (append)."""
    with torch.no_grad():
        doubles = [None if x is None else x.double() for x in (t.q, t.k, t.v, t.bias, t.sink)]
        return attention(p, t, *doubles)


def backward(p, t, dout, dlse=None):
    """-> {name: gradient} of q, k, v, bias, sink in float64."""
    names = [n for n in ("q", "k", "v", "bias", "sink") if getattr(t, n) is not None]
    leaves = {n: getattr(t, n).detach().double().requires_grad_() for n in names}
    out, lse = attention(p, t, *(leaves.get(n) for n in ("q", "k", "v", "bias", "sink")))
    total = (out * dout.double()).sum()
    if dlse is not None:
        total = total + torch.where(torch.isfinite(lse), lse * dlse.double(), 0).sum()
    if not total.requires_grad:
        return {n: torch.zeros_like(x) for n, x in leaves.items()}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(names, grads, strict=True)}
