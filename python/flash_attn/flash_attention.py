"""Version 1's layers FlashAttention and FlashMHA, which projects still import."""

from __future__ import annotations

from torch import nn

from flash_attn._errors import InvalidArgument, NotServed
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func

__all__ = ["FlashAttention", "FlashMHA"]


class FlashAttention(nn.Module):
    """Self-attention of qkv. softmax_scale: default headdim ** -0.5; attention_dropout: in training."""

    def __init__(self, softmax_scale=None, attention_dropout=0.0, device=None, dtype=None):
        super().__init__()
        self.softmax_scale, self.dropout_p = softmax_scale, attention_dropout

    def forward(self, qkv, key_padding_mask=None, causal=False, cu_seqlens=None, max_s=None, need_weights=False):
        """qkv (batch, seqlen, 3, nheads, headdim) -> (batch, seqlen, nheads, headdim), None.

        key_padding_mask (batch, seqlen): bool, True for tokens; the others give 0. cu_seqlens (batch + 1) int32, with
        max_s the longest length: qkv (total, 3, nheads, headdim) -> (total, nheads, headdim), None.
        """
        if need_weights:
            raise NotServed("need_weights: probabilities are never whole in memory; expected False")
        options = dict(
            dropout_p=self.dropout_p if self.training else 0.0, softmax_scale=self.softmax_scale, causal=causal
        )
        if cu_seqlens is not None:
            if max_s is None or key_padding_mask is not None:
                raise InvalidArgument("cu_seqlens: expected max_s beside it, and no key_padding_mask")
            return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_s, **options), None
        if key_padding_mask is None:
            return flash_attn_qkvpacked_func(qkv, **options), None
        rows, indices, cu_seqlens, max_s, _ = unpad_input(qkv, key_padding_mask)
        out = flash_attn_varlen_qkvpacked_func(rows, cu_seqlens, max_s, **options)
        return pad_input(out, indices, *qkv.shape[:2]), None


class FlashMHA(nn.Module):
    """FlashAttention between projections Wqkv and out_proj."""

    def __init__(
        self,
        embed_dim,
        num_heads,
        bias=True,
        batch_first=True,
        attention_dropout=0.0,
        causal=False,
        device=None,
        dtype=None,
        **kwargs,
    ) -> None:
        super().__init__()
        if not batch_first:
            raise NotServed("batch_first: expected True")
        if embed_dim % num_heads:
            raise InvalidArgument(f"embed_dim: expected a multiple of num_heads = {num_heads}, got {embed_dim}")
        kind = {"device": device, "dtype": dtype}
        self.embed_dim, self.causal, self.num_heads = embed_dim, causal, num_heads
        self.head_dim = embed_dim // num_heads
        self.Wqkv = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, **kind)
        self.inner_attn = FlashAttention(attention_dropout=attention_dropout, **kind)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **kind)

    def forward(self, x, key_padding_mask=None, need_weights=False):
        """x (batch, seqlen, embed_dim), key_padding_mask as in FlashAttention -> the same shape, None."""
        qkv = self.Wqkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        context, weights = self.inner_attn(
            qkv, key_padding_mask=key_padding_mask, need_weights=need_weights, causal=self.causal
        )
        return self.out_proj(context.flatten(-2)), weights
