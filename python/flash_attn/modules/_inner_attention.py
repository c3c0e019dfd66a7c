"""Attention between projections, as modules: what MHA has as inner_attn and inner_cross_attn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_attn._errors import InvalidArgument
from flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.integrations._attend import as_bias


class InnerAttention(nn.Module):
    """softmax_scale: default headdim ** -0.5. attention_dropout: in training. alibi_slopes: (nheads)."""

    def __init__(
        self,
        causal=False,
        softmax_scale=None,
        attention_dropout=0.0,
        window_size=(-1, -1),
        alibi_slopes=None,
        deterministic=False,
    ):
        super().__init__()
        self.causal, self.softmax_scale = causal, softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size, self.deterministic = window_size, deterministic

    def scores(self) -> dict:
        """The arguments of flash_attn's functions that say what a score is, causal aside."""
        slopes = self.alibi_slopes
        if slopes is not None and slopes.dtype != torch.float32:  # a model was cast to 16 bits
            slopes = slopes.float()
        return dict(softmax_scale=self.softmax_scale, window_size=self.window_size, alibi_slopes=slopes)

    def _options(self, causal: bool | None) -> dict:
        causal = self.causal if causal is None else causal
        dropout_p = self.drop.p if self.training else 0.0
        more = dict(causal=causal, dropout_p=dropout_p, deterministic=self.deterministic)
        return {**self.scores(), **more}


def _required(**values) -> None:
    for name, x in values.items():
        if x is None:
            raise InvalidArgument(f"{name}: expected one beside cu_seqlens, got None")


def _check_mask(mask: Tensor, x: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        expected = tuple(x.shape[:2])
        raise InvalidArgument(
            f"key_padding_mask: expected bool (batch, seqlen_k) = {expected}, got {mask.dtype} {tuple(mask.shape)}"
        )


class FlashSelfAttention(InnerAttention):
    """flash_attn_qkvpacked_func, or with cu_seqlens flash_attn_varlen_qkvpacked_func."""

    def forward(self, qkv, causal=None, cu_seqlens=None, max_seqlen=None):
        """qkv (batch, seqlen, 3, nheads, headdim) -> (batch, seqlen, nheads, headdim).

        With cu_seqlens (batch + 1) int32 and max_seqlen: (total, 3, nheads, headdim) -> (total, nheads, headdim).
        causal: instead of the module's own.
        """
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **self._options(causal))
        _required(max_seqlen=max_seqlen)
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **self._options(causal))


class FlashCrossAttention(InnerAttention):
    """flash_attn_kvpacked_func, or with cu_seqlens flash_attn_varlen_kvpacked_func."""

    def __init__(
        self,
        causal=False,
        softmax_scale=None,
        attention_dropout=0.0,
        alibi_slopes=None,
        window_size=(-1, -1),
        deterministic=False,
    ):
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        q,
        kv,
        causal=None,
        cu_seqlens=None,
        max_seqlen=None,
        cu_seqlens_k=None,
        max_seqlen_k=None,
    ):
        """q (batch, seqlen_q, nheads, headdim), kv (batch, seqlen_k, 2, nheads_k, headdim) -> like q.

        With cu_seqlens, max_seqlen of q and cu_seqlens_k, max_seqlen_k of kv: q (total_q, nheads, headdim),
        kv (total_k, 2, nheads_k, headdim). causal: instead of the module's own; aligned bottom-right.
        """
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **self._options(causal))
        _required(max_seqlen=max_seqlen, cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k)
        return flash_attn_varlen_kvpacked_func(
            q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, **self._options(causal)
        )


class SelfAttention(InnerAttention):
    """The same kernels for padded batches with a mask, in any dtype."""

    def __init__(self, causal=False, softmax_scale=None, attention_dropout=0.0):
        super().__init__(causal, softmax_scale, attention_dropout)

    def forward(self, qkv, causal=None, key_padding_mask=None):
        """qkv (batch, seqlen, 3, nheads, headdim) -> (batch, seqlen, nheads, headdim).

        key_padding_mask (batch, seqlen): bool, True for the keys that are seen. Rows that see none give 0.
        """
        if key_padding_mask is None:
            return flash_attn_qkvpacked_func(qkv, **self._options(causal))
        _check_mask(key_padding_mask, qkv)
        bias = as_bias(key_padding_mask, qkv.dtype)[:, None, None, :]
        return flash_attn_qkvpacked_func(qkv, attn_bias=bias, **self._options(causal))


class CrossAttention(InnerAttention):
    """The same kernels for padded batches with a mask, in any dtype."""

    def __init__(self, causal=False, softmax_scale=None, attention_dropout=0.0):
        super().__init__(causal, softmax_scale, attention_dropout)

    def forward(self, q, kv, causal=None, key_padding_mask=None):
        """q (batch, seqlen_q, nheads, headdim), kv (batch, seqlen_k, 2, nheads_k, headdim) -> like q.

        key_padding_mask (batch, seqlen_k): bool, True for the keys that are seen. Causal then puts the last query at
        the last of as many keys as are seen: padding lies at the end. Rows that see no key give 0.
        """
        options = self._options(causal)
        if key_padding_mask is None:
            return flash_attn_kvpacked_func(q, kv, **options)
        _check_mask(key_padding_mask, kv)
        seen = key_padding_mask[:, None, None, :]
        if options.pop("causal"):
            rows = torch.arange(q.shape[1], device=q.device)[:, None] - q.shape[1]
            keys = torch.arange(kv.shape[1], device=q.device)
            seen = seen & (keys <= rows + seen.sum(-1, keepdim=True))
        return flash_attn_kvpacked_func(q, kv, attn_bias=as_bias(seen, q.dtype), **options)
