"""Rotary embedding (Su et al., arXiv 2104.09864): pairs of columns turned by the angle of a position.

Arithmetic in fp32 (fp64 where an input is), one rounding. What upstream refuses is served: headdim above 256, any
strides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._errors import InvalidArgument, InvalidType
from flash_attn._tensors import is_plain


def _pairs(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """x (..., headdim) -> the first and the second column of each pair, two views (..., half)."""
    if interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def rotate(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool = False) -> Tensor:
    """out := x with its first rotary_dim columns turned. `out` may be x itself.

    x, out (..., headdim); cos, sin (..., rotary_dim / 2) broadcast against x, in the dtype of the arithmetic.
    conjugate: by the opposite angle, which is the inverse and the gradient.
    """
    half, dtype, sign = cos.shape[-1], cos.dtype, -1 if conjugate else 1
    if out is not x and 2 * half < x.shape[-1]:
        out[..., 2 * half :].copy_(x[..., 2 * half :])
    if interleaved and x.device.type in ("cpu", "cuda"):
        # Neighbouring columns are complex numbers already: a quarter of the time of strided halves on a CPU.
        z = torch.view_as_complex(x[..., : 2 * half].to(dtype).contiguous().unflatten(-1, (half, 2)))
        z = z * torch.complex(cos, sign * sin)
        out[..., : 2 * half].copy_(torch.view_as_real(z).flatten(-2))
        return out
    (a, b), (first, second) = (_pairs(t, half, interleaved) for t in (x, out))
    if out is not x and x.dtype == out.dtype == dtype:
        torch.mul(a, cos, out=first).addcmul_(b, sin, value=-sign)
        torch.mul(b, cos, out=second).addcmul_(a, sin, value=sign)
        return out
    a, b = a.to(dtype), b.to(dtype)
    turned = (a * cos).addcmul_(b, sin, value=-sign), (b * cos).addcmul_(a, sin, value=sign)
    first.copy_(turned[0])
    second.copy_(turned[1])
    return out


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The same for a compiled graph, which differentiates and fuses it: operations that write to nothing."""
    half = cos.shape[-1]
    a, b = (t.to(cos.dtype) for t in _pairs(x, half, interleaved))
    turned = a * cos - b * sin, a * sin + b * cos
    y = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((y.to(x.dtype), x[..., 2 * half :]), dim=-1)


def _check(name: str, holds: bool, expected: str, got) -> None:
    if not holds:
        raise InvalidArgument(f"{name}: expected {expected}, got {got}")


def _check_tables(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    for name, t in (("x", x), ("cos", cos), ("sin", sin)):
        if not t.is_floating_point():
            raise InvalidType(f"{name}: expected floating point numbers, got {t.dtype}")
    _check("cos", cos.dim() == 2, "2 dimensions (seqlen_rotary, rotary_dim / 2)", tuple(cos.shape))
    _check("sin", sin.shape == cos.shape, f"the shape of cos, {tuple(cos.shape)}", tuple(sin.shape))
    _check("cos", 2 * cos.shape[1] <= x.shape[-1], f"rotary_dim <= headdim = {x.shape[-1]}", 2 * cos.shape[1])


def _check_offsets(offsets: Tensor, batch: int) -> None:
    if offsets.dtype not in (torch.int32, torch.int64):
        raise InvalidType(f"seqlen_offsets: expected int32 or int64, got {offsets.dtype}")
    _check("seqlen_offsets", offsets.shape == (batch,), f"shape (batch,) = ({batch},)", tuple(offsets.shape))


def _look_up(tables: tuple[Tensor, Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
    """tables (seqlen_rotary, half), positions (...) -> rows (..., half). No rotation where there is no such row."""
    length = tables[0].shape[0]
    known = ((positions >= 0) & (positions < length))[..., None]
    at = positions.clamp(0, max(length - 1, 0))
    return torch.where(known, tables[0][at], 1.0), torch.where(known, tables[1][at], 0.0)


def _check_reach(last: Tensor, length: int) -> None:
    """Positions in tensors are looked at where that costs nothing: on the CPU, outside of a graph."""
    if last.device.type == "cpu" and last.numel() and is_plain(last):
        low, high = (int(t) for t in torch.aminmax(last))
        _check("seqlen_offsets", low >= 0, "0 or more", low)
        _check("cos", high <= length, f"a row for each of {high} positions", f"{length} rows")


def rows_of(
    x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> tuple[Tensor, Tensor]:
    """cos, sin (seqlen_rotary, half) at the positions of x's rows, in the dtype of the arithmetic.

    x (batch, seqlen, ..., headdim) -> (seqlen, half), or (batch, seqlen, half) if the offsets are a tensor.
    x (total, ..., headdim), packed by cu_seqlens (batch + 1) -> (total, half); rows outside of it do not turn.
    """
    _check_tables(x, cos, sin)
    dtype = torch.promote_types(torch.promote_types(x.dtype, torch.promote_types(cos.dtype, sin.dtype)), torch.float32)
    tables, length = (cos.to(dtype), sin.to(dtype)), cos.shape[0]
    several = isinstance(seqlen_offsets, Tensor)
    if not several:
        _check("seqlen_offsets", seqlen_offsets >= 0, "0 or more", seqlen_offsets)
    if cu_seqlens is None:
        batch, seqlen = x.shape[:2]
        if not several:
            last = seqlen_offsets + seqlen
            _check("cos", last <= length, f"a row for each of {last} positions", f"{length} rows")
            return tables[0][seqlen_offsets:last], tables[1][seqlen_offsets:last]
        _check_offsets(seqlen_offsets, batch)
        _check_reach(seqlen_offsets, length)
        _check_reach(seqlen_offsets + seqlen, length)
        return _look_up(tables, seqlen_offsets[:, None] + torch.arange(seqlen, device=x.device))
    _check("max_seqlen", max_seqlen is not None, "the longest sequence's length beside cu_seqlens", None)
    batch = cu_seqlens.shape[0] - 1
    if several:
        _check_offsets(seqlen_offsets, batch)
        _check_reach(seqlen_offsets + cu_seqlens.diff(), length)
    else:
        last = seqlen_offsets + max_seqlen
        _check("cos", last <= length, f"a row for each of {last} positions", f"{length} rows")
    row = torch.arange(x.shape[0], device=x.device, dtype=cu_seqlens.dtype)
    starts, ends = cu_seqlens[:-1].contiguous(), cu_seqlens[1:].contiguous()
    sequence = torch.bucketize(row, ends, right=True)
    inside = sequence < batch
    sequence = sequence.clamp(max=max(batch - 1, 0))
    shift = starts - seqlen_offsets
    positions = row - shift[sequence] if batch else row
    return _look_up(tables, torch.where(inside, positions, -1))


def rows_of_heads(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen) -> tuple[Tensor, Tensor]:
    """rows_of, to broadcast against x (batch, seqlen, nheads, headdim) or (total, nheads, headdim)."""
    expected = 4 if cu_seqlens is None else 3
    names = "(batch, seqlen, nheads, headdim)" if cu_seqlens is None else "(total, nheads, headdim)"
    _check("x", x.dim() == expected, f"{expected} dimensions {names}", tuple(x.shape))
    cos, sin = rows_of(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    return cos[..., None, :], sin[..., None, :]


def applied(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """x (batch, seqlen, nheads, headdim), or packed (total, nheads, headdim), turned; x itself if `inplace`."""
    cos, sin = rows_of_heads(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    return rotate(x if inplace else torch.empty_like(x), x, cos, sin, interleaved, conjugate)
