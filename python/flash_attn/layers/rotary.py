"""Rotary embedding as layers use it: differentiable, in place where upstream is, and with its cache of angles.

In place means: the memory of x holds the result, and the returned tensor carries the gradient. The gradient itself is
never overwritten: autograd may have handed the same tensor to somebody else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _autograd
from torch.autograd.function import once_differentiable

from flash_attn._errors import InvalidArgument, NotServed
from flash_attn._refusal import refuse_gradient
from flash_attn.ops._rotary import Angles, angles_of, angles_of_heads, applied, rotate, rotated
from flash_attn.ops.triton.rotary import apply_rotary

__all__ = [
    "ApplyRotaryEmb",
    "ApplyRotaryEmbKV_",
    "ApplyRotaryEmbQKV_",
    "RotaryEmbedding",
    "apply_rotary",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """x (..., dim): each pair (a, b) becomes (-b, a). Pairs are neighbours if `interleaved`, else half a row apart."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The formula in plain operations of x's dtype: a reference to compare with.

    x (batch, seqlen, nheads, headdim), cos and sin (seqlen, rotary_dim / 2) or (batch, seqlen, rotary_dim / 2).
    """
    columns = 2 * cos.shape[-1]
    if columns > x.shape[-1]:
        raise InvalidArgument(f"cos: expected rotary_dim <= headdim = {x.shape[-1]}, got {columns}")
    if interleaved:
        cos, sin = (t.repeat_interleave(2, dim=-1)[..., None, :] for t in (cos, sin))
    else:
        cos, sin = (torch.cat((t, t), dim=-1)[..., None, :] for t in (cos, sin))
    turned = x[..., :columns] * cos + rotate_half(x[..., :columns], interleaved) * sin
    return torch.cat((turned, x[..., columns:]), dim=-1)


def _save(ctx, tensors: tuple, seqlen_offsets: int | Tensor) -> None:
    several = isinstance(seqlen_offsets, Tensor)
    ctx.offset = None if several else seqlen_offsets
    ctx.save_for_backward(*tensors, seqlen_offsets if several else None)


def _saved(ctx) -> tuple:
    *tensors, offsets = ctx.saved_tensors
    return *tensors, ctx.offset if offsets is None else offsets


def _mark_written(ctx, x: Tensor) -> None:
    """Tells autograd that x itself is turned, so that who goes on with x instead of the result has its gradient, too.

    Autograd takes no such word of a leaf or its views, nor of a view that has siblings (of unbind, split, chunk): of
    these the result alone has the gradient.
    """
    of_leaf = x.is_leaf or (x._base is not None and x._base.is_leaf)
    alone = x._base is None or _autograd._get_creation_meta(x) == _autograd.CreationMeta.DEFAULT
    if x.requires_grad and alone and not of_leaf:
        ctx.mark_dirty(x)


def _without_gradient_of_tables(y: Tensor, *tables: Tensor | None) -> Tensor:
    words = "rotary embedding has no gradient with respect to cos and sin"
    return refuse_gradient(words, y, [t for t in tables if t is not None]) if torch.is_grad_enabled() else y


class ApplyRotaryEmb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        cos,
        sin,
        interleaved=False,
        inplace=False,
        seqlen_offsets: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ):
        _save(ctx, (cos, sin, cu_seqlens), seqlen_offsets)
        ctx.interleaved, ctx.max_seqlen = interleaved, max_seqlen
        if inplace:
            _mark_written(ctx, x)
        return applied(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        cos, sin, cu_seqlens, offsets = _saved(ctx)
        dx = applied(do, cos, sin, offsets, cu_seqlens, ctx.max_seqlen, ctx.interleaved, conjugate=True)
        return dx, None, None, None, None, None, None, None


def _written_back(x: Tensor, y: Tensor) -> Tensor:
    """What a compiled graph does in place of writing to x: where nobody reads it, the compiler leaves it out."""
    with torch.no_grad():
        x.detach().copy_(y)
    return y


def apply_rotary_emb(
    x,
    cos,
    sin,
    interleaved=False,
    inplace=False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
):
    """x (batch, seqlen, nheads, headdim), or (total, nheads, headdim) packed by cu_seqlens (batch + 1), rotated.

    cos, sin (seqlen_rotary, rotary_dim / 2), in any floating dtype: row t is for position t. The first rotary_dim
    columns turn, as pairs (0, 1), (2, 3), ... if `interleaved` (GPT-J), else as halves (GPT-NeoX, Llama). inplace: x's
    memory holds the result. seqlen_offsets: position of each sequence's first row, a number or (batch). max_seqlen:
    goes with cu_seqlens. Arithmetic in fp32, rounded once. Errors as in ops.triton.rotary.apply_rotary.
    """
    if torch.compiler.is_compiling():
        y = rotated(x, angles_of_heads(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen), interleaved)
        return _written_back(x, y) if inplace else y
    y = ApplyRotaryEmb.apply(x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen)
    return _without_gradient_of_tables(y, cos, sin)


apply_rotary_emb_func = apply_rotary_emb  # its name before 2.1


def _part(x: Tensor, part: slice, cos: Tensor, sin: Tensor, seqlen_offsets) -> tuple[slice, Angles]:
    """A part of x along dimension 2 and its angles."""
    return part, angles_of(x, cos, sin, seqlen_offsets, None, None)


def _parts_of_qkv(qkv, cos, sin, cos_k, sin_k, seqlen_offsets, num_heads_q):
    """qkv (batch, seqlen, 3, nheads, headdim), or (batch, seqlen, num_heads_q + 2 * num_heads_k, headdim)."""
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        ends = 1, 2
    elif qkv.dim() == 4:
        heads_k = (qkv.shape[2] - (num_heads_q or 0)) // 2
        if num_heads_q is None or heads_k < 0 or num_heads_q + 2 * heads_k != qkv.shape[2]:
            expected = "num_heads_q such that qkv has num_heads_q + 2 * num_heads_k heads"
            raise InvalidArgument(f"num_heads_q: expected {expected}, got {num_heads_q} for {qkv.shape[2]} heads")
        ends = num_heads_q, num_heads_q + heads_k
    else:
        expected = "(batch, seqlen, 3, nheads, headdim) or (batch, seqlen, num_heads_q + 2 * num_heads_k, headdim)"
        raise InvalidArgument(f"qkv: expected shape {expected}, got {tuple(qkv.shape)}")
    v = slice(ends[1], qkv.shape[2]), None
    if cos_k is None and sin_k is None:  # one rotation for both
        return [_part(qkv, slice(0, ends[1]), cos, sin, seqlen_offsets), v]
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    q = _part(qkv, slice(0, ends[0]), cos, sin, seqlen_offsets)
    return [q, _part(qkv, slice(*ends), cos_k, sin_k, seqlen_offsets), v]


def _parts_of_kv(kv, cos, sin, seqlen_offsets):
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise InvalidArgument(f"kv: expected shape (batch, seqlen, 2, nheads, headdim), got {tuple(kv.shape)}")
    return [_part(kv, slice(0, 1), cos, sin, seqlen_offsets), (slice(1, 2), None)]


def _turn(x: Tensor, parts, interleaved: bool, conjugate: bool = False, inplace: bool = False) -> Tensor:
    """The parts of x that have angles, turned."""
    if torch.compiler.is_compiling():
        pieces = [x[:, :, p] if angles is None else rotated(x[:, :, p], angles, interleaved) for p, angles in parts]
        return torch.cat(pieces, dim=2)
    out = x if inplace else torch.empty_like(x)
    for p, angles in parts:
        part = x[:, :, p]
        if angles is not None:
            rotate(part if inplace else out[:, :, p], part, angles, interleaved, conjugate)
        elif not inplace:
            out[:, :, p].copy_(part)
    return out


class ApplyRotaryEmbQKV_(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        qkv,
        cos,
        sin,
        cos_k=None,
        sin_k=None,
        interleaved=False,
        seqlen_offsets: int | Tensor = 0,
        num_heads_q: int | None = None,
    ):
        _save(ctx, (cos, sin, cos_k, sin_k), seqlen_offsets)
        ctx.interleaved, ctx.num_heads_q = interleaved, num_heads_q
        parts = _parts_of_qkv(qkv, cos, sin, cos_k, sin_k, seqlen_offsets, num_heads_q)
        _mark_written(ctx, qkv)
        return _turn(qkv, parts, interleaved, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, dqkv):
        cos, sin, cos_k, sin_k, offsets = _saved(ctx)
        parts = _parts_of_qkv(dqkv, cos, sin, cos_k, sin_k, offsets, ctx.num_heads_q)
        return _turn(dqkv, parts, ctx.interleaved, conjugate=True), None, None, None, None, None, None, None


def apply_rotary_emb_qkv_(
    qkv,
    cos,
    sin,
    cos_k=None,
    sin_k=None,
    interleaved=False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
):
    """Turns q and k of packed qkv, in place: see apply_rotary_emb.

    qkv (batch, seqlen, 3, nheads, headdim), or (batch, seqlen, num_heads_q + 2 * num_heads_k, headdim) with
    num_heads_q. cos_k, sin_k: k's own tables, for XPos; default: those of q.
    """
    if torch.compiler.is_compiling():
        parts = _parts_of_qkv(qkv, cos, sin, cos_k, sin_k, seqlen_offsets, num_heads_q)
        return _written_back(qkv, _turn(qkv, parts, interleaved))
    y = ApplyRotaryEmbQKV_.apply(qkv, cos, sin, cos_k, sin_k, interleaved, seqlen_offsets, num_heads_q)
    return _without_gradient_of_tables(y, cos, sin, cos_k, sin_k)


class ApplyRotaryEmbKV_(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv, cos, sin, interleaved=False, seqlen_offsets: int | Tensor = 0):
        _save(ctx, (cos, sin), seqlen_offsets)
        ctx.interleaved = interleaved
        _mark_written(ctx, kv)
        return _turn(kv, _parts_of_kv(kv, cos, sin, seqlen_offsets), interleaved, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, dkv):
        cos, sin, offsets = _saved(ctx)
        parts = _parts_of_kv(dkv, cos, sin, offsets)
        return _turn(dkv, parts, ctx.interleaved, conjugate=True), None, None, None, None


def apply_rotary_emb_kv_(kv, cos, sin, interleaved=False, seqlen_offsets: int | Tensor = 0):
    """Turns k of packed kv (batch, seqlen, 2, nheads, headdim), in place: see apply_rotary_emb."""
    if torch.compiler.is_compiling():
        return _written_back(kv, _turn(kv, _parts_of_kv(kv, cos, sin, seqlen_offsets), interleaved))
    y = ApplyRotaryEmbKV_.apply(kv, cos, sin, interleaved, seqlen_offsets)
    return _without_gradient_of_tables(y, cos, sin)


class RotaryEmbedding(torch.nn.Module):
    """Angles position / base^(2 i / dim) for pairs i of the first `dim` columns, kept for the longest sequence seen.

    scale_base: XPos (Sun et al., arXiv 2212.10554): q also grows and k shrinks with the position, so that scores decay
    with the distance; 512 is usual. Keyword `pos_idx_in_fp32`: accepted as True, as older callers pass it.
    """

    def __init__(
        self, dim: int, base=10000.0, interleaved=False, scale_base=None, device=None, *, pos_idx_in_fp32: bool = True
    ):
        super().__init__()
        if not pos_idx_in_fp32:
            raise NotServed("RotaryEmbedding: positions are always in fp32 (pos_idx_in_fp32=True)")
        self.dim, self.base = dim, float(base)
        self.interleaved, self.scale_base = interleaved, scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.register_buffer("scale", None if scale_base is None else self._compute_scale(device), persistent=False)
        self._seq_len_cached = 0
        self._cos_cached = None
        self._sin_cached = None
        self._cos_k_cached = None
        self._sin_k_cached = None

    def _compute_inv_freq(self, device=None) -> Tensor:
        columns = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return 1.0 / self.base ** (columns / self.dim)

    def _compute_scale(self, device=None) -> Tensor:
        columns = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return (columns + 0.4 * self.dim) / (1.4 * self.dim)

    def _update_cos_sin_cache(self, seqlen: int, device=None, dtype=None) -> None:
        """Tables for positions 0 to seqlen - 1, made anew where those at hand are too short or of another kind."""
        kept = self._cos_cached
        if (
            kept is not None
            and seqlen <= self._seq_len_cached
            and kept.device == device
            and kept.dtype == dtype
            and (torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not kept.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        # A model cast to 16 bits has cast its buffers, too: those are not used then. Positions need fp32.
        exact = self.inv_freq.dtype == torch.float32
        inv_freq = self.inv_freq.to(device) if exact else self._compute_inv_freq(device)
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = positions[:, None] * inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        scale = self.scale.to(device) if self.scale.dtype == torch.float32 else self._compute_scale(device)
        scale = scale ** ((positions - seqlen // 2) / self.scale_base)[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turns q and k in place -> qkv, or (q, kv).

        qkv (batch, seqlen, 3, nheads, headdim), or (batch, seqlen, num_heads_q + 2 * num_heads_k, headdim) with
        num_heads_q; or q (batch, seqlen, nheads, headdim) where kv (batch, seqlen, 2, nheads_k, headdim) is given.
        seqlen_offset: the first row's position, a number or (batch); with a tensor, max_seqlen says how far it reaches.
        """
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        elif not isinstance(seqlen_offset, Tensor):
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, device=qkv.device, dtype=qkv.dtype)
        elif self._cos_cached is None:
            raise InvalidArgument("max_seqlen: expected the largest position + 1 beside a tensor of offsets, got None")
        q_tables = self._cos_cached, self._sin_cached
        k_tables = (None, None) if self.scale is None else (self._cos_k_cached, self._sin_k_cached)
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, *q_tables, *k_tables, interleaved=self.interleaved, seqlen_offsets=seqlen_offset,
                num_heads_q=num_heads_q,
            )  # fmt: skip
        q = apply_rotary_emb(qkv, *q_tables, interleaved=self.interleaved, inplace=True, seqlen_offsets=seqlen_offset)
        k_tables = q_tables if self.scale is None else k_tables
        return q, apply_rotary_emb_kv_(kv, *k_tables, interleaved=self.interleaved, seqlen_offsets=seqlen_offset)
