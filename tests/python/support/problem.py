"""A stand-in for the checked Problem that the core hands to engines: `p`, plain numbers, and `t`, tensors by name.

Contents are taken as they come. With `on_device` the tables count as unread: lengths are bounds, as on a device.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

INPUTS = (
    "q k v new_k new_v cu_seqlens_q cu_seqlens_k seqused_q seqused_k leftpad_k cache_batch_idx block_table "
    "cu_seqlens_new alibi_slopes bias sink rotary_cos rotary_sin rotary_positions dropout_state dout out lse dlse"
).split()


def _lengths(cu, used, fixed, batch):
    lengths = (cu[1:] - cu[:-1]) if cu is not None else torch.full((min(batch, 1),), fixed)
    return lengths if used is None else used


def make_problem(
    *, softmax_scale=None, softcap=0.0, causal=False, window_size=(-1, -1), chunk=0, dropout_p=0.0, seed=0, offset=0,
    used_k=-1, max_seqlen_q=None, max_seqlen_k=None, rotary_interleaved=True, deterministic=False,
    empty_lse=torch.inf, on_device=False, is_backward=False, **tensors,
):  # fmt: skip
    """-> p, t with memory for the results, of which nothing is zero."""
    assert not (unknown := set(tensors) - set(INPUTS)), unknown
    t = SimpleNamespace(**{name: tensors.get(name) for name in INPUTS})
    q, k, v = t.q, t.k, t.v
    packed_q, paged = q.dim() == 3, t.block_table is not None
    packed_k = k.dim() == 3
    batch = t.cu_seqlens_q.numel() - 1 if packed_q else q.shape[0]
    rows_q, rows_k = q.shape[-3], k.shape[-3]
    seqlen_k = t.block_table.shape[1] * rows_k if paged else rows_k
    threshold = round(dropout_p * 65536)
    packed_new = t.cu_seqlens_new is not None
    rows_new = 0 if t.new_k is None else t.new_k.shape[-3]
    new = 0
    if t.new_k is not None:
        new = (t.cu_seqlens_new[1:] - t.cu_seqlens_new[:-1]) if packed_new else rows_new
    if on_device:
        most_q = rows_q if max_seqlen_q is None else min(max_seqlen_q, rows_q)
        most_k = seqlen_k if max_seqlen_k is None else min(max_seqlen_k, seqlen_k)
        max_new = rows_new
    else:
        used = t.seqused_k if used_k < 0 else torch.full((batch,), used_k)
        lengths = _lengths(t.cu_seqlens_k, None if used is None else used + new, seqlen_k, batch)
        lengths = lengths if t.leftpad_k is None else lengths - t.leftpad_k
        most_k = max(lengths.tolist(), default=0)
        most_q = max(_lengths(t.cu_seqlens_q, t.seqused_q, rows_q, batch).tolist(), default=0)
        max_new = max(new.tolist(), default=0) if packed_new else new
    p = SimpleNamespace(
        is_backward=is_backward, dtype=str(q.dtype).removeprefix("torch."), batch=batch, nheads=q.shape[-2],
        nheads_k=k.shape[-2], group=q.shape[-2] // k.shape[-2], headdim=q.shape[-1], headdim_v=v.shape[-1],
        max_seqlen_q=most_q, max_seqlen_k=most_k, batch_q=1 if packed_q else batch, rows_q=rows_q,
        batch_k=1 if packed_k else k.shape[0], rows_k=rows_k, seqlen_q=rows_q, seqlen_k=seqlen_k,
        page_size=rows_k if paged else 0, used_k=used_k, seqlen_new=0 if packed_new else rows_new, rows_new=rows_new,
        max_new=max_new, scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, softcap=softcap,
        window_left=window_size[0], window_right=0 if causal else window_size[1], chunk=chunk, dropout_p=dropout_p,
        drop_threshold=threshold, drop_scale=65536 / (65536 - threshold) if threshold < 65536 else 0.0, seed=seed,
        offset=offset, rotary_dim=0 if t.rotary_cos is None else 2 * t.rotary_cos.shape[1],
        rotary_interleaved=rotary_interleaved, deterministic=deterministic, empty_lse=empty_lse, stream=0,
    )  # fmt: skip
    if is_backward:
        t.dq, t.dk, t.dv = (torch.full_like(x, 7.0, memory_format=torch.contiguous_format) for x in (q, k, v))
        t.dbias = None if t.bias is None else torch.full(t.bias.shape, 7.0)
        t.dsink = None if t.sink is None else torch.full(t.sink.shape, 7.0)
    else:
        t.out = torch.full((*q.shape[:-1], v.shape[-1]), 7.0, dtype=q.dtype)
        t.lse = torch.full((q.shape[1], q.shape[0]) if packed_q else (batch, q.shape[2], q.shape[1]), 7.0)
    return p, t


def run_engine(engine, dout=None, dlse=None, **arguments) -> dict[str, torch.Tensor]:
    """-> out, lse and, given dout, the gradients by name."""
    p, t = make_problem(**arguments)
    engine.forward(p, t)
    results = {"out": t.out, "lse": t.lse}
    if dout is not None:
        p, t = make_problem(**arguments, is_backward=True, dout=dout, dlse=dlse, **results)
        engine.backward(p, t)
        results |= {name: getattr(t, name) for name in ("dq", "dk", "dv", "dbias", "dsink")}
    return results
