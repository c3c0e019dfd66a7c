"""A Problem and its tensors for engines written in Python, made without the core: p and t of their interface."""

from __future__ import annotations

from types import SimpleNamespace

import torch

TENSORS = (
    "q", "k", "v", "out", "lse", "new_k", "new_v", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
    "leftpad_k", "cache_batch_idx", "block_table", "cu_seqlens_new", "alibi_slopes", "bias", "sink", "rotary_cos",
    "rotary_sin", "rotary_positions", "dropout_state", "mods", "dout", "dq", "dk", "dv", "dlse", "dbias", "dsink",
)  # fmt: skip


def make(
    q, k, v, *, causal=False, window=(-1, -1), chunk=0, scale=None, softcap=0.0, dropout_p=0.0, seed=0, offset=0,
    used_k=-1, max_seqlen_q=None, max_seqlen_k=None, rotary_interleaved=False, deterministic=False,
    empty_lse=float("inf"), want_lse=True, poison=True, **tensors,
):  # fmt: skip
    """-> p, t of a forward. Outputs are made here, full of NaN, which an engine must overwrite.

    The words are those of the interface; `tensors` are any of TENSORS but q, k, v, out and lse.
    """
    t = SimpleNamespace(**dict.fromkeys(TENSORS))
    t.q, t.k, t.v = q, k, v
    for name, x in tensors.items():
        assert name in TENSORS, name
        setattr(t, name, x)
    packed_q, paged = t.cu_seqlens_q is not None, t.block_table is not None
    packed_k = t.cu_seqlens_k is not None and not paged
    batch = t.cu_seqlens_q.numel() - 1 if packed_q else q.shape[0]
    batch_q, rows_q = (1, q.shape[0]) if packed_q else q.shape[:2]
    batch_k, rows_k = (1, k.shape[0]) if packed_k else k.shape[:2]
    seqlen_k = t.block_table.shape[1] * rows_k if paged else rows_k
    if t.out is None:
        t.out = (
            q.new_full((*q.shape[:-1], v.shape[-1]), float("nan"))
            if poison
            else q.new_empty((*q.shape[:-1], v.shape[-1]))
        )
    if t.lse is None and want_lse:
        shape = (q.shape[1], q.shape[0]) if packed_q else (q.shape[0], q.shape[2], q.shape[1])
        t.lse = torch.full(shape, float("nan"), dtype=torch.float32, device=q.device)
    if packed_q and max_seqlen_q is None:
        max_seqlen_q = int(t.cu_seqlens_q.diff().max()) if batch else 0
    if packed_k and max_seqlen_k is None:
        max_seqlen_k = int(t.cu_seqlens_k.diff().max()) if batch else 0
    threshold = round(dropout_p * 65536)
    new, packed_new = t.new_k is not None, t.cu_seqlens_new is not None
    rows_new = t.new_k.shape[-3] if new else 0
    p = SimpleNamespace(
        is_backward=False,
        dtype=str(q.dtype).removeprefix("torch."),
        batch=batch,
        nheads=q.shape[-2],
        nheads_k=k.shape[-2],
        group=q.shape[-2] // k.shape[-2],
        headdim=q.shape[-1],
        headdim_v=v.shape[-1],
        max_seqlen_q=min(rows_q if max_seqlen_q is None else max_seqlen_q, rows_q),
        max_seqlen_k=min(seqlen_k if max_seqlen_k is None else max_seqlen_k, seqlen_k),
        batch_q=batch_q,
        rows_q=rows_q,
        batch_k=batch_k,
        rows_k=rows_k,
        seqlen_q=rows_q,
        seqlen_k=seqlen_k,
        page_size=rows_k if paged else 0,
        used_k=used_k,
        seqlen_new=0 if packed_new else rows_new,
        rows_new=rows_new,
        max_new=rows_new,
        scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
        softcap=float(softcap),
        window_left=window[0],
        window_right=0 if causal else window[1],
        chunk=chunk,
        dropout_p=dropout_p,
        drop_threshold=threshold,
        drop_scale=65536 / (65536 - threshold) if threshold < 65536 else 0.0,
        seed=seed,
        offset=offset,
        rotary_dim=2 * t.rotary_cos.shape[1] if t.rotary_cos is not None else 0,
        rotary_interleaved=rotary_interleaved,
        deterministic=deterministic,
        empty_lse=empty_lse,
        recordable=False,
        stream=torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0,
    )
    return p, t


def make_backward(p, t, dout, dlse=None):
    """-> p, t of the backward of a forward that has run."""
    p = SimpleNamespace(**{**vars(p), "is_backward": True})
    t = SimpleNamespace(**{**vars(t), "dout": dout, "dlse": dlse})
    for name in "qkv":
        x = getattr(t, name)
        setattr(t, "d" + name, x.new_full(x.shape, float("nan")))
    for name in ("bias", "sink"):
        x = getattr(t, name)
        if x is not None:
            setattr(t, "d" + name, torch.full(x.shape, float("nan"), dtype=torch.float32, device=x.device))
    return p, t
