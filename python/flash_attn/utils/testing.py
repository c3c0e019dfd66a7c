"""What tests of attention need: random padding, the same inputs padded and packed, and the formula in PyTorch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flash_attn._errors import InvalidArgument
from flash_attn.bert_padding import pad_input, unpad_input

__all__ = [
    "attention_ref",
    "construct_chunk_mask",
    "construct_local_mask",
    "generate_qkv",
    "generate_random_padding_mask",
    "pad_input",
    "unpad_input",
]


def generate_random_padding_mask(max_seqlen, batch_size, device, mode="random", zero_lengths=False) -> Tensor:
    """-> (batch_size, max_seqlen) bool, True for tokens, which come first.

    mode: "full" is no padding; "random", 20 tokens of it at most; "third", at least a third of tokens. zero_lengths:
    every fifth sequence and the last are empty.
    """
    first = {"full": max_seqlen, "random": max(0 if zero_lengths else 1, max_seqlen - 20), "third": max_seqlen // 3}
    if mode not in first:
        raise InvalidArgument(f"mode: expected one of {sorted(first)}, got {mode!r}")
    lengths = torch.randint(first[mode], max_seqlen + 1, (batch_size, 1), device=device)
    if zero_lengths:
        lengths[::5] = 0
        lengths[-1:] = 0
    return torch.arange(max_seqlen, device=device) < lengths


def _packed(x: Tensor, mask: Tensor | None, unused: Tensor | None):
    """-> rows, cu_seqlens, the longest length, used lengths or None, and a function that pads rows again."""
    batch, seqlen = x.shape[:2]
    if mask is None:
        ends = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * seqlen
        return x.flatten(0, 1), ends, seqlen, None, lambda rows: rows.unflatten(0, (batch, seqlen))
    rows, indices, cu_seqlens, longest, used = unpad_input(x, mask, unused)
    return rows, cu_seqlens, longest, used, partial(pad_input, indices=indices, batch=batch, seqlen=seqlen)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def generate_qkv(
    q,
    k,
    v,
    query_padding_mask=None,
    key_padding_mask=None,
    qv=None,
    kvpacked=False,
    qkvpacked=False,
    query_unused_mask=None,
    key_unused_mask=None,
):
    """The same inputs packed and padded, as leaves that want gradients.

    q (batch, seqlen_q, nheads, headdim), k and v (batch, seqlen_k, nheads_k, ...); the masks (batch, seqlen) bool.

    qkvpacked -> qkv packed, cu_seqlens, max_seqlen, qkv, and functions that pad out and dqkv.
    kvpacked  -> q and kv packed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, kv, and functions that pad
                 out, dq and dkv.
    else      -> q, k, v and qv packed, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
                 q, k, v, qv, and functions that pad out, dq and dk.
    """
    if kvpacked and qkvpacked:
        raise InvalidArgument("kvpacked, qkvpacked: expected one of them at most")
    if (kvpacked or qkvpacked) and (query_unused_mask is not None or key_unused_mask is not None):
        raise InvalidArgument("query_unused_mask, key_unused_mask: not of packed tensors")
    rows_q, cu_q, max_q, used_q, pad_q = _packed(q, query_padding_mask, query_unused_mask)
    rows_k, cu_k, max_k, used_k, pad_k = _packed(k, key_padding_mask, key_unused_mask)
    rows_v = _packed(v, key_padding_mask, key_unused_mask)[0]
    if qkvpacked:
        if q.shape != k.shape or (query_padding_mask is not None and not query_padding_mask.equal(key_padding_mask)):
            raise InvalidArgument("qkvpacked: expected q and k of one shape, with the same mask")
        rows = _leaf(torch.stack([rows_q, rows_k, rows_v], dim=1))
        return rows, cu_q, max_q, _leaf(torch.stack([q, k, v], dim=2)), pad_q, pad_q
    if kvpacked:
        rows, kv = torch.stack([rows_k, rows_v], dim=1), torch.stack([k, v], dim=2)
        lengths = (cu_q, cu_k, max_q, max_k)
        return _leaf(rows_q), _leaf(rows), *lengths, _leaf(q), _leaf(kv), pad_q, pad_q, pad_k
    rows_qv = None if qv is None else _packed(qv, query_padding_mask, query_unused_mask)[0].detach()
    return (
        *(_leaf(x) for x in (rows_q, rows_k, rows_v)), rows_qv, cu_q, cu_k, used_q, used_k, max_q, max_k,
        *(_leaf(x) for x in (q, k, v)), None if qv is None else qv.detach(), pad_q, pad_q, pad_k,
    )  # fmt: skip


def _lengths(seqlen: int, mask: Tensor | None):
    return seqlen if mask is None else mask.sum(-1)[:, None, None, None]


def _places(seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device):
    """-> where queries stand among the keys, (..., seqlen_q, 1), and the keys' places, (..., 1, seqlen_k)."""
    keys = torch.arange(seqlen_k, device=device)
    if key_leftpad is not None:
        leftpad = key_leftpad[:, None, None, None]
        keys = torch.where(keys >= leftpad, keys - leftpad, 2**32)
    shift = _lengths(seqlen_k, key_padding_mask) - _lengths(seqlen_q, query_padding_mask)
    return torch.arange(seqlen_q, device=device)[:, None] + shift, keys


def construct_local_mask(
    seqlen_q,
    seqlen_k,
    window_size=(None, None),
    sink_token_length=0,
    query_padding_mask=None,
    key_padding_mask=None,
    key_leftpad=None,
    device=None,
) -> Tensor:
    """-> bool, True where a key is NOT seen, broadcastable to (batch, nheads, seqlen_q, seqlen_k).

    window_size (left, right) about a query's place, which aligns bottom-right of the tokens; None, -1: no limit. The
    first sink_token_length keys are seen from everywhere on their right. key_leftpad (batch): keys before it count not.
    """
    places, keys = _places(seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device)
    left, right = (-1 if n is None else n for n in window_size)
    hidden = keys >= _lengths(seqlen_k, key_padding_mask)
    hidden = hidden.expand(torch.broadcast_shapes(hidden.shape, places.shape, keys.shape))
    if right >= 0:
        hidden = hidden | (keys > places + right)
    if left >= 0:
        hidden = hidden | ((keys < places - left) & (keys >= sink_token_length))
    return hidden


def construct_chunk_mask(
    seqlen_q,
    seqlen_k,
    attention_chunk,
    query_padding_mask=None,
    key_padding_mask=None,
    key_leftpad=None,
    device=None,
) -> Tensor:
    """-> bool, True where a key is NOT in the query's chunk of attention_chunk places; see construct_local_mask."""
    places, keys = _places(seqlen_q, seqlen_k, query_padding_mask, key_padding_mask, key_leftpad, device)
    first = places - places % attention_chunk
    return (keys < first) | (keys >= first + attention_chunk)


def attention_ref(
    q,
    k,
    v,
    query_padding_mask=None,
    key_padding_mask=None,
    key_leftpad=None,
    attn_bias=None,
    dropout_p=0.0,
    dropout_mask=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(None, None),
    attention_chunk=0,
    sink_token_length=0,
    learnable_sink=None,
    softcap=0.0,
    upcast=True,
    reorder_ops=False,
    intermediate_dtype=None,
):
    """Attention by its formula -> out (batch, seqlen_q, nheads, headdim_v), probabilities (batch, nheads, seqlen_q,
    seqlen_k) before dropout, both in q's dtype. Rows that see no key give 0.

    q (batch, seqlen_q, nheads, headdim), k (batch, seqlen_k, nheads_k, headdim), v (batch, seqlen_k, nheads_k,
    headdim_v), qv (batch, seqlen_q, nheads, headdim_v): scores are scale * (q k' + qv v'). The padding masks (batch,
    seqlen) bool; attn_bias broadcastable to the scores; dropout_mask bool like the scores, True where one stays;
    descales (batch, nheads_k); learnable_sink (nheads): one more logit in the denominator. upcast: computes in fp32
    (fp64 stays), else in the inputs' dtype. reorder_ops: scales k
    instead of q, to estimate rounding. intermediate_dtype: probabilities are rounded to it before they meet v.
    """
    dtype = q.dtype
    wide = torch.promote_types(dtype, torch.float32) if upcast else dtype
    group = q.shape[2] // k.shape[2]

    def prepared(x, descale, repeats, groups):
        if x is None:
            return None
        x = x.to(wide)
        if descale is not None:
            x = (x.float() * descale.repeat_interleave(groups, 1)[:, None, :, None]).to(x.dtype)
        return x.repeat_interleave(repeats, 2)

    q, qv = prepared(q, q_descale, 1, group), prepared(qv, q_descale, 1, group)
    k, v = prepared(k, k_descale, group, 1), prepared(v, v_descale, group, 1)
    scale = (q.shape[-1] + (0 if qv is None else v.shape[-1])) ** -0.5
    scores = torch.einsum("bihd,bjhd->bhij", q if reorder_ops else q * scale, k * scale if reorder_ops else k)
    if qv is not None:
        scores = scores + torch.einsum("bihd,bjhd->bhij", qv * scale, v)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    window_size = (window_size[0], 0) if causal else window_size
    about = (query_padding_mask, key_padding_mask, key_leftpad, q.device)
    seqlens = q.shape[1], k.shape[1]
    hidden = torch.zeros((), dtype=torch.bool, device=q.device)
    if any(n is not None and n >= 0 for n in window_size):
        hidden = hidden | construct_local_mask(*seqlens, window_size, sink_token_length, *about)
    if attention_chunk > 0:
        hidden = hidden | construct_chunk_mask(*seqlens, attention_chunk, *about)
    if key_leftpad is not None:
        hidden = hidden | (torch.arange(seqlens[1], device=q.device) < key_leftpad[:, None, None, None])
    if key_padding_mask is not None:
        hidden = hidden | ~key_padding_mask[:, None, None, :]
    if query_padding_mask is not None:
        hidden = hidden | ~query_padding_mask[:, None, :, None]
    if attn_bias is not None:
        scores = scores + attn_bias
    scores = scores.masked_fill(hidden, -torch.inf)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(nothing, 0.0)
    if learnable_sink is not None:  # one more logit, whose share is dropped
        sink = learnable_sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    attention = torch.softmax(scores, dim=-1)[..., : k.shape[1]].masked_fill(hidden | nothing, 0.0).to(v.dtype)
    kept = attention if dropout_mask is None else attention.masked_fill(~dropout_mask, 0.0)
    if intermediate_dtype is not None:
        kept = kept.to(intermediate_dtype).to(kept.dtype)
    out = torch.einsum("bhij,bjhd->bihd", kept, v / (1.0 - dropout_p))
    return out.to(dtype), attention.to(dtype)
