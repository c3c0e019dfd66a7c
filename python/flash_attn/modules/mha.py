"""Multi-head attention: projections, rotary embedding, KV cache; also split over the processes of a group."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_attn._errors import InvalidArgument, NotServed
from flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flash_attn.modules._inner_attention import CrossAttention, FlashCrossAttention, FlashSelfAttention, SelfAttention
from flash_attn.ops.fused_dense import ColumnParallelLinear, FusedDense, RowParallelLinear
from flash_attn.utils.distributed import get_dim_for_local_rank

__all__ = [
    "ColumnParallelLinear",
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "FusedDense",
    "LinearResidual",
    "MHA",
    "ParallelMHA",
    "RotaryEmbedding",
    "RowParallelLinear",
    "SelfAttention",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_alibi_slopes",
    "get_dim_for_local_rank",
]


def get_alibi_slopes(nheads: int) -> list[float]:
    """ALiBi's slopes (Press et al., arXiv 2108.12409): a geometric sequence down to 2^-8 for a power of two of heads;
    heads beyond it take every other slope of twice as many."""
    n = 2 ** int(math.log2(nheads))
    slopes = [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]
    return slopes + [2.0 ** (-4.0 * i / n) for i in range(1, 2 * (nheads - n), 2)]


class LinearResidual(nn.Linear):
    """A linear layer that also returns its input."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(input), input


def _rows(inference_params, batch: int) -> slice:
    return slice(inference_params.batch_size_offset, inference_params.batch_size_offset + batch)


def _update_kv_cache(kv: Tensor, inference_params, layer_idx: int) -> Tensor:
    """Writes kv (batch, seqlen, 2, nheads_k, headdim) behind the seqlen_offset rows of the layer's cache, which is made
    where there is none yet; -> all rows so far, a view (batch, seqlen_offset + seqlen, 2, nheads_k, headdim)."""
    caches = inference_params.key_value_memory_dict
    if layer_idx not in caches:
        shape = (inference_params.max_batch_size, inference_params.max_seqlen, *kv.shape[2:])
        caches[layer_idx] = torch.empty(shape, dtype=kv.dtype, device=kv.device)
    cache = caches[layer_idx]
    rows, end = _rows(inference_params, kv.shape[0]), inference_params.seqlen_offset + kv.shape[1]
    if rows.stop > cache.shape[0] or end > cache.shape[1]:
        raise InvalidArgument(
            f"inference_params: the cache has room for {tuple(cache.shape[:2])} (batch, seqlen), "
            f"expected at least {(rows.stop, end)}"
        )
    cache[rows, inference_params.seqlen_offset : end] = kv
    return cache[rows, :end]


class _Heads(nn.Module):
    """What MHA and ParallelMHA share between their projections."""

    def _make_rotary(self, base, scale_base, interleaved, device) -> None:
        if self.rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                self.rotary_emb_dim, base=base, scale_base=scale_base, interleaved=interleaved, device=device
            )

    def _make_inner(self, dropout, softmax_scale, alibi_slopes, window_size) -> None:
        if self.use_flash_attn:
            options = dict(window_size=window_size, alibi_slopes=alibi_slopes)
            of_self, of_cross = partial(FlashSelfAttention, **options), partial(FlashCrossAttention, **options)
        elif alibi_slopes is not None or tuple(window_size) != (-1, -1):
            raise InvalidArgument("use_flash_attn: expected True with use_alibi or window_size, got False")
        else:
            of_self, of_cross = SelfAttention, CrossAttention
        common = dict(causal=self.causal, softmax_scale=softmax_scale, attention_dropout=dropout)
        self.inner_attn, self.inner_cross_attn = of_self(**common), of_cross(**common)

    def _make_cache(self, batch_size, max_seqlen, nheads_k, dtype) -> Tensor:
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, nheads_k, self.head_dim)
        return torch.empty(shape, dtype=weight.dtype if dtype is None else dtype, device=weight.device)

    def _rotate(self, qkv: Tensor, nheads: int, nheads_k: int, inference_params, cu_seqlens, max_seqlen) -> Tensor:
        """qkv (..., nheads + 2 * nheads_k, headdim) with q and k turned; in place unless packed."""
        rotary = self.rotary_emb
        if cu_seqlens is None:
            offset, reach = 0, None
            if inference_params is not None:
                offset, reach = inference_params.seqlen_offset, inference_params.max_seqlen
                if inference_params.lengths_per_sample is not None:
                    offset = inference_params.lengths_per_sample[_rows(inference_params, qkv.shape[0])]
            return rotary(qkv, seqlen_offset=offset, max_seqlen=reach, num_heads_q=nheads)
        rotary._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        where = dict(interleaved=rotary.interleaved, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        q, k, v = qkv.split([nheads, nheads_k, nheads_k], dim=1)
        q = apply_rotary_emb(q, rotary._cos_cached, rotary._sin_cached, **where)
        if rotary.scale is None:
            k = apply_rotary_emb(k, rotary._cos_cached, rotary._sin_cached, **where)
        else:
            k = apply_rotary_emb(k, rotary._cos_k_cached, rotary._sin_k_cached, **where)
        return torch.cat([q, k, v], dim=1)

    def _update_kv_cache(self, kv: Tensor, inference_params) -> Tensor:
        if self.layer_idx is None:
            raise InvalidArgument("layer_idx: expected the layer's number to use a KV cache, got None")
        return _update_kv_cache(kv, inference_params, self.layer_idx)

    def _attend_with_cache(self, q: Tensor, kv: Tensor, inference_params) -> Tensor:
        """The first call of a sequence fills the cache; later ones append to it and read all of it."""
        if inference_params.seqlen_offset == 0 or self.layer_idx not in inference_params.key_value_memory_dict:
            return self.inner_cross_attn(q, self._update_kv_cache(kv, inference_params))
        rows = _rows(inference_params, q.shape[0])
        lengths = inference_params.lengths_per_sample
        k_cache, v_cache = inference_params.key_value_memory_dict[self.layer_idx][rows].unbind(2)
        return flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            kv[:, :, 0],
            kv[:, :, 1],
            cache_seqlens=inference_params.seqlen_offset if lengths is None else lengths[rows],
            causal=self.inner_cross_attn.causal,
            **self.inner_cross_attn.scores(),
        )

    def _attend(self, qkv: Tensor, nheads: int, nheads_k: int, inference_params, cu_seqlens, max_seqlen, options: dict):
        """Self-attention of qkv (..., (nheads + 2 * nheads_k) * headdim): q's heads, then k's, then v's."""
        # The function, here and below: torch.compile of PyTorch 2.11 cannot trace the method under a default device.
        qkv = torch.unflatten(qkv, -1, (nheads + 2 * nheads_k, self.head_dim))
        if self.rotary_emb_dim > 0:
            qkv = self._rotate(qkv, nheads, nheads_k, inference_params, cu_seqlens, max_seqlen)
        if inference_params is None and nheads == nheads_k:
            return self._run(self.inner_attn, torch.unflatten(qkv, -2, (3, nheads)), **options)
        q, kv = qkv[..., :nheads, :], torch.unflatten(qkv[..., nheads:, :], -2, (2, nheads_k))
        if inference_params is not None:
            return self._attend_with_cache(q, kv, inference_params)
        if cu_seqlens is not None:
            options = {**options, "cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen}
        return self._run(self.inner_cross_attn, q, kv, **options)

    def _run(self, attention: nn.Module, *inputs: Tensor, **options) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(attention, *inputs, use_reentrant=False, **options)
        return attention(*inputs, **options)


def _check_heads(embed_dim: int, num_heads: int, num_heads_kv: int) -> None:
    if embed_dim % num_heads:
        raise InvalidArgument(f"embed_dim: expected a multiple of num_heads = {num_heads}, got {embed_dim}")
    if num_heads % num_heads_kv:
        raise InvalidArgument(f"num_heads: expected a multiple of num_heads_kv = {num_heads_kv}, got {num_heads}")


def _convolved(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """x (batch, seqlen, channels); each position and the two before it."""
    return conv(x.transpose(1, 2))[..., :-2].transpose(1, 2).contiguous()


class MHA(_Heads):
    """Self-attention, or with cross_attn attention of x to x_kv.

    num_heads_kv: fewer heads of keys and values (GQA, MQA). use_flash_attn: serves packed sequences, ALiBi and windows;
    without it, key_padding_mask; where both serve, both give the same. dwconv: a causal depthwise convolution of three
    positions after the projection. return_residual: forward also returns its input. checkpointing: the backward
    computes the attention again. fused_bias_fc: accepted; linear layers are the same. layer_idx: the key of this
    layer's KV cache.
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        num_heads_kv=None,
        cross_attn=False,
        qkv_proj_bias=True,
        out_proj_bias=True,
        dropout=0.0,
        softmax_scale=None,
        causal=False,
        layer_idx=None,
        dwconv=False,
        rotary_emb_dim=0,
        rotary_emb_base=10000.0,
        rotary_emb_scale_base=None,
        rotary_emb_interleaved=False,
        use_alibi=False,
        window_size=(-1, -1),
        fused_bias_fc=False,
        use_flash_attn=False,
        return_residual=False,
        checkpointing=False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.embed_dim, self.cross_attn, self.causal = embed_dim, cross_attn, causal
        self.layer_idx, self.dwconv, self.rotary_emb_dim = layer_idx, dwconv, rotary_emb_dim
        self.use_flash_attn, self.return_residual, self.checkpointing = use_flash_attn, return_residual, checkpointing
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        _check_heads(embed_dim, num_heads, self.num_heads_kv)
        self.head_dim = embed_dim // num_heads
        if cross_attn and rotary_emb_dim > 0:
            raise NotServed("rotary_emb_dim: positions of two different sequences are not defined; expected 0")
        kv_dim = 2 * self.head_dim * self.num_heads_kv
        qkv_dim = embed_dim + kv_dim

        self._make_rotary(rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved, device)
        linear = FusedDense if fused_bias_fc else nn.Linear
        with_residual = linear
        if return_residual:
            with_residual = partial(FusedDense, return_residual=True) if fused_bias_fc else LinearResidual
        if cross_attn:
            self.Wq = linear(embed_dim, embed_dim, bias=qkv_proj_bias, **kind)
            self.Wkv = with_residual(embed_dim, kv_dim, bias=qkv_proj_bias, **kind)
        else:
            self.Wqkv = with_residual(embed_dim, qkv_dim, bias=qkv_proj_bias, **kind)
        if dwconv and self.num_heads_kv == num_heads:
            self.dwconv_qkv = nn.Conv1d(qkv_dim, qkv_dim, kernel_size=3, padding=2, groups=qkv_dim, **kind)
        elif dwconv:
            self.dwconv_q = nn.Conv1d(embed_dim, embed_dim, kernel_size=3, padding=2, groups=embed_dim, **kind)
            self.dwconv_kv = nn.Conv1d(kv_dim, kv_dim, kernel_size=3, padding=2, groups=kv_dim, **kind)
        if dwconv and cross_attn and self.num_heads_kv == num_heads:
            raise NotServed("dwconv: not with cross_attn unless num_heads_kv < num_heads, as in the original")
        slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
        self._make_inner(dropout, softmax_scale, slopes, window_size)
        self.out_proj = linear(embed_dim, embed_dim, bias=out_proj_bias, **kind)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None) -> Tensor:
        """-> (batch_size, max_seqlen, 2, num_heads_kv, headdim), for InferenceParams.key_value_memory_dict."""
        return self._make_cache(batch_size, max_seqlen, self.num_heads_kv, dtype)

    def _check(self, x_kv, key_padding_mask, cu_seqlens, max_seqlen, mixer_subset, inference_params) -> None:
        if cu_seqlens is not None:
            if max_seqlen is None:
                raise InvalidArgument("max_seqlen: expected the longest sequence's length beside cu_seqlens, got None")
            if not self.use_flash_attn or key_padding_mask is not None:
                raise InvalidArgument("cu_seqlens: need use_flash_attn=True, and no key_padding_mask")
            if self.dwconv:
                raise NotServed("dwconv: not for packed sequences; expected cu_seqlens=None")
        if key_padding_mask is not None and self.use_flash_attn:
            raise InvalidArgument(
                "key_padding_mask: needs use_flash_attn=False; or drop the padding (bert_padding.unpad_input) and pass "
                "cu_seqlens and max_seqlen"
            )
        if inference_params is not None:
            if key_padding_mask is not None or cu_seqlens is not None:
                raise InvalidArgument("inference_params: expected neither key_padding_mask nor cu_seqlens beside them")
            if self.dwconv:
                raise NotServed("dwconv: keeps no state between calls; expected inference_params=None")
        if not self.cross_attn and (x_kv is not None or mixer_subset is not None):
            raise InvalidArgument("x_kv, mixer_subset: need cross_attn=True")

    def forward(
        self,
        x,
        x_kv=None,
        key_padding_mask=None,
        cu_seqlens=None,
        max_seqlen=None,
        mixer_subset=None,
        inference_params=None,
        **kwargs,
    ):
        """x (batch, seqlen, embed_dim) -> the same shape [, the input if return_residual].

        x_kv               (batch, seqlen_k, embed_dim): where keys and values come from, with cross_attn; default x
        key_padding_mask   (batch, seqlen_k) bool: True for the keys that are seen
        cu_seqlens         (batch + 1) int32, with max_seqlen: x is packed, (total, embed_dim); rotary embedding counts
                           within sequences. With x_kv: its own cu_seqlens_k and max_seqlen_k as keywords
        mixer_subset       the positions of x that ask, with cross_attn: slice(0, 1) is a class token alone
        inference_params   utils.generation.InferenceParams: x continues after seqlen_offset cached positions (or
                           lengths_per_sample (batch) int32). No gradient
        """
        self._check(x_kv, key_padding_mask, cu_seqlens, max_seqlen, mixer_subset, inference_params)
        if self.use_flash_attn:
            options = dict(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **kwargs)
        else:
            options = dict(key_padding_mask=key_padding_mask, **kwargs)
        if not self.cross_attn:
            qkv, x = self._projected(self.Wqkv, x)
            if self.dwconv:
                qkv = self._mixed(qkv)
            context = self._attend(
                qkv, self.num_heads, self.num_heads_kv, inference_params, cu_seqlens, max_seqlen, options
            )
        else:
            kv, source = self._projected(self.Wkv, x if x_kv is None else x_kv)
            x = source if x_kv is None else x
            q = self.Wq(x if mixer_subset is None else x[:, mixer_subset])
            if self.dwconv:
                q, kv = _convolved(self.dwconv_q, q), _convolved(self.dwconv_kv, kv)
            q = torch.unflatten(q, -1, (self.num_heads, self.head_dim))
            kv = torch.unflatten(kv, -1, (2, self.num_heads_kv, self.head_dim))
            if inference_params is None:
                context = self._run(self.inner_cross_attn, q, kv, **options)
            else:
                context = self._attend_with_cache(q, kv, inference_params)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _projected(self, linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        return linear(x) if self.return_residual else (linear(x), x)

    def _mixed(self, qkv: Tensor) -> Tensor:
        if self.num_heads_kv == self.num_heads:
            return _convolved(self.dwconv_qkv, qkv)
        q, kv = qkv[..., : self.embed_dim], qkv[..., self.embed_dim :]
        return torch.cat([_convolved(self.dwconv_q, q), _convolved(self.dwconv_kv, kv)], dim=-1)


class ParallelMHA(_Heads):
    """Self-attention whose heads are split over the processes of a group, keys' and values' with their queries'.

    sequence_parallel: x and the result are this process's part of the tokens; else all of them. See MHA.
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        process_group,
        num_heads_kv=None,
        qkv_proj_bias=True,
        out_proj_bias=True,
        dropout=0.0,
        softmax_scale=None,
        causal=False,
        layer_idx=None,
        rotary_emb_dim=0,
        rotary_emb_base=10000.0,
        rotary_emb_scale_base=None,
        rotary_emb_interleaved=False,
        use_alibi=False,
        window_size=(-1, -1),
        use_flash_attn=False,
        checkpointing=False,
        sequence_parallel=True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.causal, self.layer_idx = embed_dim, causal, layer_idx
        self.rotary_emb_dim, self.use_flash_attn, self.checkpointing = rotary_emb_dim, use_flash_attn, checkpointing
        self.process_group = process_group
        self.world_size = torch.distributed.get_world_size(process_group)
        self.local_rank = torch.distributed.get_rank(process_group)
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        _check_heads(embed_dim, num_heads, self.num_heads_kv)
        self.head_dim = embed_dim // num_heads
        group = num_heads // self.num_heads_kv
        shares = [get_dim_for_local_rank(self.num_heads_kv, self.world_size, r) for r in range(self.local_rank + 1)]
        self.num_heads_kv_per_rank, self.num_heads_per_rank = shares[-1], shares[-1] * group

        slopes = None
        if use_alibi:
            first = sum(shares[:-1]) * group
            slopes = get_alibi_slopes(num_heads)[first : first + self.num_heads_per_rank]
            slopes = torch.tensor(slopes, device=device)
        self._make_rotary(rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved, device)
        common = dict(sequence_parallel=sequence_parallel, device=device, dtype=dtype)
        qkv_dim = self.head_dim * (num_heads + 2 * self.num_heads_kv)
        self.Wqkv = ColumnParallelLinear(
            embed_dim, qkv_dim, process_group, bias=qkv_proj_bias, multiple_of=self.head_dim * (group + 2), **common
        )
        self._make_inner(dropout, softmax_scale, slopes, window_size)
        self.out_proj = RowParallelLinear(
            embed_dim, embed_dim, process_group, bias=out_proj_bias, multiple_of=self.head_dim * group, **common
        )

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None) -> Tensor:
        """-> (batch_size, max_seqlen, 2, this process's heads, headdim)."""
        return self._make_cache(batch_size, max_seqlen, self.num_heads_kv_per_rank, dtype)

    def forward(self, x, seqlen=None, inference_params=None, cu_seqlens=None, max_seqlen=None, **kwargs):
        """x (batch, seqlen, embed_dim) -> the same shape.

        seqlen: x is (batch * seqlen, embed_dim), so that sequence parallelism can split both dimensions as one.
        cu_seqlens, max_seqlen: x is packed, (total, embed_dim). inference_params: see MHA.
        """
        if cu_seqlens is not None:
            if not self.use_flash_attn or max_seqlen is None or seqlen is not None or inference_params is not None:
                raise InvalidArgument(
                    "cu_seqlens: need use_flash_attn=True and max_seqlen, and neither seqlen nor inference_params"
                )
            kwargs = dict(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **kwargs)
        qkv = self.Wqkv(x)
        if seqlen is not None:
            qkv = torch.unflatten(qkv, 0, (-1, seqlen))
        context = self._attend(
            qkv, self.num_heads_per_rank, self.num_heads_kv_per_rank, inference_params, cu_seqlens, max_seqlen, kwargs
        ).flatten(-2)
        return self.out_proj(context if seqlen is None else context.flatten(0, 1))
