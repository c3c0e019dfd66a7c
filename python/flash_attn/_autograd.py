"""The autograd classes, one per public function, under upstream's names and with upstream's positional arguments.

All six are `_attend` and `_differentiate` over views: the packed ones read strided slices of qkv (kv), and their
gradients are written into strided slices of dqkv (dkv), or stacked where somebody traces: Inductor (torch 2.13) may
forget where slices begin that an operator writes to. softmax_lse is differentiable, once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flash_attn import _ops
from flash_attn._backend import current

_flash_attn_ops = torch.ops.flash_attn


def _attend(
    ctx, inputs, q, k, v, varlen, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
    return_softmax, is_grad_enabled, learnable_sink, attn_bias,
):  # fmt: skip
    """-> out, or (out, softmax_lse, S_dmask). `inputs`: what autograd knows of q, k and v.

    `varlen`: None, or (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table).
    """
    differentiable = [*inputs, learnable_sink, attn_bias]
    needs_grad = is_grad_enabled and any(isinstance(x, Tensor) and x.requires_grad for x in differentiable)
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table = varlen or (None,) * 5
    if needs_grad and block_table is not None:
        raise NotImplementedError("block_table: pages of keys and values are not differentiable")

    left, right = _ops.window(window_size)
    scores = (softmax_scale, causal, left, right, softcap, alibi_slopes)
    plain = _ops.is_plain(q, k, v)
    if plain:
        sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, None, block_table)
        out, lse, S_dmask, rng_state = _ops._run_forward(
            q, k, v, dropout_p, return_softmax, (*scores, attn_bias, learnable_sink), sequences
        )
    else:
        scale = _ops.default_scale(q) if softmax_scale is None else softmax_scale
        scores = (scale, *scores[1:])
        rng_state = _ops.draw_rng_state(q) if dropout_p > 0 else None
        extensions = {"attn_bias": attn_bias, "learnable_sink": learnable_sink, "rng_state": rng_state}
        if varlen is None:
            out, lse, S_dmask, rng_state = _flash_attn_ops._flash_attn_forward(
                q, k, v, dropout_p, *scores, return_softmax, **extensions
            )
        else:
            out, lse, S_dmask, rng_state = _flash_attn_ops._flash_attn_varlen_forward(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, *scores, return_softmax,
                block_table, **extensions,
            )  # fmt: skip

    if needs_grad:
        ctx.save_for_backward(
            q, k, v, out, lse, rng_state, alibi_slopes, cu_seqlens_q, cu_seqlens_k, learnable_sink, attn_bias
        )
        ctx.settings = (dropout_p, *scores[:5], deterministic, max_seqlen_q, max_seqlen_k)
        ctx.backend = current() if plain else None
        if return_softmax:
            ctx.mark_non_differentiable(S_dmask)
    return (out, lse, S_dmask) if return_softmax else out


def _differentiate(ctx, saved: tuple, dout: Tensor, dlse: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor):
    """Writes dq, dk and dv; -> (dsink, dbias). `saved`: ctx.saved_tensors, which checkpointing lets one read once."""
    q, k, v, out, lse, rng_state, alibi_slopes, cu_seqlens_q, cu_seqlens_k, sink, bias = saved
    dropout_p, *scores, deterministic, max_seqlen_q, max_seqlen_k = ctx.settings
    dsink = None if sink is None else torch.empty_like(sink, dtype=torch.float32)
    dbias = None if bias is None else torch.empty_like(bias, dtype=torch.float32)
    tensors = (dout, q, k, v, out, lse, dq, dk, dv, dlse, dbias, dsink)
    scores = (*scores, alibi_slopes, bias, sink)
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    dropout = (dropout_p, rng_state, deterministic)
    if _is_plain(saved, dout):
        _ops._run_backward(tensors, scores, (*sequences, None, None, None), *dropout, ctx.backend)
    else:
        _flash_attn_ops._flash_attn_gradients(*tensors, *scores, *sequences, *dropout)
    return (
        None if sink is None else dsink.to(sink.dtype),
        None if bias is None else dbias.to(bias.dtype),
    )


def _dlse(grads: tuple) -> Tensor | None:
    """The gradient of softmax_lse among those that follow dout; None if only out was returned."""
    return grads[0] if grads else None


def _is_plain(saved: tuple, dout: Tensor) -> bool:
    return _ops.is_plain(*saved[:3]) and type(dout) is Tensor


def _separate_gradients(ctx, saved, dout, grads):
    """-> dq, dk, dv, dsink, dbias."""
    dq, dk, dv = (torch.empty_like(x) for x in saved[:3])
    return dq, dk, dv, *_differentiate(ctx, saved, dout, _dlse(grads), dq, dk, dv)


def _packed_gradients(ctx, saved, dout, grads, first: int):
    """The same with one tensor (..., 3 - first, nheads, headdim) for q, k and v from `first` on."""
    if not _is_plain(saved, dout):
        *each, dsink, dbias = _separate_gradients(ctx, saved, dout, grads)
        return *each[:first], torch.stack(each[first:], -3), dsink, dbias
    x = saved[first]
    packed = x.new_empty((*x.shape[:-2], 3 - first, *x.shape[-2:]))
    alone = [torch.empty_like(y) for y in saved[:first]]
    return *alone, packed, *_differentiate(ctx, saved, dout, _dlse(grads), *alone, *packed.unbind(-3))


class FlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_softmax, is_grad_enabled, learnable_sink=None, attn_bias=None,
    ):  # fmt: skip
        return _attend(
            ctx, (q, k, v), q, k, v, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_softmax, is_grad_enabled, learnable_sink, attn_bias,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *grads):
        dq, dk, dv, dsink, dbias = _separate_gradients(ctx, ctx.saved_tensors, dout, grads)
        return dq, dk, dv, *(None,) * 9, dsink, dbias


class FlashAttnKVPackedFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, kv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_softmax, is_grad_enabled, learnable_sink=None, attn_bias=None,
    ):  # fmt: skip
        return _attend(
            ctx, (q, kv), q, *kv.unbind(-3), None, dropout_p, softmax_scale, causal, window_size, softcap,
            alibi_slopes, deterministic, return_softmax, is_grad_enabled, learnable_sink, attn_bias,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *grads):
        dq, dkv, dsink, dbias = _packed_gradients(ctx, ctx.saved_tensors, dout, grads, 1)
        return dq, dkv, *(None,) * 9, dsink, dbias


class FlashAttnQKVPackedFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, qkv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_softmax, is_grad_enabled, learnable_sink=None, attn_bias=None,
    ):  # fmt: skip
        return _attend(
            ctx, (qkv,), *qkv.unbind(-3), None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_softmax, is_grad_enabled, learnable_sink, attn_bias,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *grads):
        dqkv, dsink, dbias = _packed_gradients(ctx, ctx.saved_tensors, dout, grads, 0)
        return dqkv, *(None,) * 9, dsink, dbias


class FlashAttnVarlenFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_softmax, block_table, is_grad_enabled,
        learnable_sink=None, attn_bias=None,
    ):  # fmt: skip
        varlen = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
        return _attend(
            ctx, (q, k, v), q, k, v, varlen, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
            deterministic, return_softmax, is_grad_enabled, learnable_sink, attn_bias,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *grads):
        dq, dk, dv, dsink, dbias = _separate_gradients(ctx, ctx.saved_tensors, dout, grads)
        return dq, dk, dv, *(None,) * 14, dsink, dbias


class FlashAttnVarlenKVPackedFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_softmax, is_grad_enabled,
        learnable_sink=None, attn_bias=None,
    ):  # fmt: skip
        varlen = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None)
        return _attend(
            ctx, (q, kv), q, *kv.unbind(-3), varlen, dropout_p, softmax_scale, causal, window_size, softcap,
            alibi_slopes, deterministic, return_softmax, is_grad_enabled, learnable_sink, attn_bias,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *grads):
        dq, dkv, dsink, dbias = _packed_gradients(ctx, ctx.saved_tensors, dout, grads, 1)
        return dq, dkv, *(None,) * 13, dsink, dbias


class FlashAttnVarlenQKVPackedFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_softmax, is_grad_enabled, learnable_sink=None, attn_bias=None,
    ):  # fmt: skip
        varlen = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, None)
        return _attend(
            ctx, (qkv,), *qkv.unbind(-3), varlen, dropout_p, softmax_scale, causal, window_size, softcap,
            alibi_slopes, deterministic, return_softmax, is_grad_enabled, learnable_sink, attn_bias,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *grads):
        dqkv, dsink, dbias = _packed_gradients(ctx, ctx.saved_tensors, dout, grads, 0)
        return dqkv, *(None,) * 11, dsink, dbias
