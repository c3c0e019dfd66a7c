"""Rotary embedding (Su et al., arXiv 2104.09864): pairs of columns turned by the angle of a position.

Arithmetic in fp32 (fp64 where an input is), one rounding. What upstream refuses is served: headdim above 256, any
strides. Tensors of the CPU are turned by the compiled core (src/cpu/rotary.cpp), others by PyTorch's operations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn import _C
from flash_attn._errors import InvalidArgument, InvalidType
from flash_attn._tensors import core_reads, is_plain


class Angles(NamedTuple):
    """Tables, and where rows find theirs: checked, as `angles_of` says."""

    cos: Tensor
    sin: Tensor
    seqlen_offsets: int | Tensor
    cu_seqlens: Tensor | None


def _pairs(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """x (..., headdim) -> the first and the second column of each pair, two views (..., half)."""
    if interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def core_serves(out: Tensor, x: Tensor, angles: Angles) -> bool:
    """Whether the compiled core turns it: rows in one piece. What torch would not write to stays torch's."""
    tables = [t for t in angles[2:] if isinstance(t, Tensor)]
    if not (
        x.stride(-1) == out.stride(-1) == 1
        and core_reads(x, angles.cos, angles.sin)
        and all(t.is_cpu and t.dim() == 1 and t.dtype in (torch.int32, torch.int64) for t in tables)
        and (not tables or is_plain(*tables))
    ):
        return False
    return out is not x or (0 not in x.stride() and (torch.is_inference_mode_enabled() or not x.is_inference()))


def rotate(out: Tensor, x: Tensor, angles: Angles, interleaved: bool, conjugate: bool = False) -> Tensor:
    """out := x (..., headdim) with its first rotary_dim columns turned. `out` may be x itself.

    conjugate: by the opposite angle, which is the inverse and the gradient.
    """
    if core_serves(out, x, angles):
        _C.rotate(out, x, *angles, interleaved, conjugate)
        if out is x and not x.is_inference():
            torch.autograd.graph.increment_version(x)
        return out
    return _rotate(out, x, *rows_of(x, angles), interleaved, conjugate)


def _rotate(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool) -> Tensor:
    """The same in PyTorch's operations; cos, sin (..., rotary_dim / 2) as rows_of has them."""
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


def rotated(x: Tensor, angles: Angles, interleaved: bool) -> Tensor:
    """The same for a compiled graph, which differentiates and fuses it: operations that write to nothing."""
    cos, sin = rows_of(x, angles)
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


def angles_of(
    x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> Angles:
    """Checks that all rows of x (batch, seqlen, ..., headdim), or packed (total, ..., headdim), find their angles."""
    _check_tables(x, cos, sin)
    length, several = cos.shape[0], isinstance(seqlen_offsets, Tensor)
    if not several:
        _check("seqlen_offsets", seqlen_offsets >= 0, "0 or more", seqlen_offsets)
        last = seqlen_offsets
    if cu_seqlens is None:
        batch, seqlen = x.shape[:2]
        if several:
            _check_offsets(seqlen_offsets, batch)
            _check_reach(seqlen_offsets, length)
            _check_reach(seqlen_offsets + seqlen, length)
        else:
            last = seqlen_offsets + seqlen
    else:
        _check("max_seqlen", max_seqlen is not None, "the longest sequence's length beside cu_seqlens", None)
        if several:
            _check_offsets(seqlen_offsets, cu_seqlens.shape[0] - 1)
            _check_reach(seqlen_offsets + cu_seqlens.diff(), length)
        else:
            last = seqlen_offsets + max_seqlen
    if not several:
        _check("cos", last <= length, f"a row for each of {last} positions", f"{length} rows")
    return Angles(cos, sin, seqlen_offsets, cu_seqlens)


def rows_of(x: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
    """cos, sin at the positions of x's rows, to broadcast against x, in the dtype of the arithmetic.

    Rows outside of cu_seqlens do not turn.
    """
    cos, sin, seqlen_offsets, cu_seqlens = angles
    dtype = torch.promote_types(torch.promote_types(x.dtype, torch.promote_types(cos.dtype, sin.dtype)), torch.float32)
    tables = cos.to(dtype), sin.to(dtype)
    beside = (None,) * (x.dim() - (3 if cu_seqlens is None else 2))  # the dimensions between rows and columns
    if cu_seqlens is None and not isinstance(seqlen_offsets, Tensor):
        rows = tuple(t[seqlen_offsets : seqlen_offsets + x.shape[1]] for t in tables)
    else:
        rows = _look_up(tables, _positions(x, seqlen_offsets, cu_seqlens))
    return tuple(t[(..., *beside, slice(None))] for t in rows)


def _positions(x: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(batch, seqlen), or (total): -1 outside of cu_seqlens."""
    if cu_seqlens is None:
        return seqlen_offsets[:, None] + torch.arange(x.shape[1], device=x.device)
    batch = cu_seqlens.shape[0] - 1
    row = torch.arange(x.shape[0], device=x.device, dtype=cu_seqlens.dtype)
    starts, ends = cu_seqlens[:-1].contiguous(), cu_seqlens[1:].contiguous()
    sequence = torch.bucketize(row, ends, right=True)
    inside = sequence < batch
    sequence = sequence.clamp(max=max(batch - 1, 0))
    shift = starts - seqlen_offsets
    positions = row - shift[sequence] if batch else row
    return torch.where(inside, positions, -1)


def angles_of_heads(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen) -> Angles:
    """angles_of, for x (batch, seqlen, nheads, headdim) or (total, nheads, headdim)."""
    expected = 4 if cu_seqlens is None else 3
    names = "(batch, seqlen, nheads, headdim)" if cu_seqlens is None else "(total, nheads, headdim)"
    _check("x", x.dim() == expected, f"{expected} dimensions {names}", tuple(x.shape))
    return angles_of(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)


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
    angles = angles_of_heads(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    return rotate(x if inplace else torch.empty_like(x), x, angles, interleaved, conjugate)
