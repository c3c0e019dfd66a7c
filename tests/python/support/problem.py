"""The Problem that the core makes of a call, and the tensors beside it, as engines get them; and an engine run on it.

`on_device` shows the Problem as it would be if nobody had read the tables: lengths are bounds, as on a device.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import flash_attn
import torch
from flash_attn import _C
from flash_attn._call import Dropout, NewKeys, Rotary, Run, Scores, Sequences
from flash_attn._engines import Tensors

NAME = "under test"
TENSORS = (
    "q k v out lse dout dq dk dv dlse dbias dsink cu_seqlens_q cu_seqlens_k seqused_q seqused_k leftpad_k "
    "cache_batch_idx block_table new_k new_v cu_seqlens_new alibi_slopes bias sink rotary_cos rotary_sin "
    "rotary_positions dropout_state mods"
).split()
# Names of fields that engines and the core know by others.
GROUPS = {
    Sequences: {},
    Scores: {"bias": "attn_bias", "sink": "learnable_sink", "chunk": "attention_chunk"},
    Dropout: {"dropout_state": "rng_state"},
    NewKeys: {"new_k": "k", "new_v": "v", "cu_seqlens_new": "cu_seqlens"},
    Rotary: {"rotary_" + name: name for name in Rotary._fields},
}


@contextlib.contextmanager
def registered():
    """The core can choose NAME, which serves everything: calls are checked for it, and handed to whoever asks."""
    every = flash_attn.features()
    dtypes = ("float16", "bfloat16", "float32", "float64")
    flash_attn.register_backend(NAME, object(), devices=("cpu",), dtypes=dtypes, serves=every, backward=every)
    try:
        yield
    finally:
        flash_attn.unregister_backend(NAME)


class Unread:
    """A Problem whose tables nobody has read."""

    def __init__(self, p, t, max_seqlen_q, max_seqlen_k):
        self._p = p
        bias = None if t.bias is None else t.bias.shape  # packed: its rows and keys are the bounds that were given
        bounds_q = (max_seqlen_q, bias[2] if bias and bias[2] > 1 else None, p.rows_q if p.batch_q else 0)
        bounds_k = (max_seqlen_k, bias[3] if bias else None, p.rows_k if t.block_table is None else p.seqlen_k)
        self.max_seqlen_q, self.max_seqlen_k = (min(n for n in x if n is not None) for x in (bounds_q, bounds_k))
        self.max_new = p.rows_new
        if p.used_k >= 0:
            self.max_seqlen_k = min(self.max_seqlen_k, p.used_k + self.max_new)

    def __getattr__(self, name):
        return getattr(self._p, name)


def make_problem(
    *, q, k, v, window_size=(-1, -1), is_backward=False, on_device=False, deterministic=False,
    positive_empty_lse=True, out=None, lse=None, dout=None, dlse=None, **fields,
):  # fmt: skip
    """-> p, t. Results that are not given get memory, of which nothing is zero."""
    fields |= {"window_size_left": window_size[0], "window_size_right": window_size[1]}
    groups = []
    for Group, names in GROUPS.items():
        mine = {names.get(n, n): fields.pop(n) for n in list(fields) if names.get(n, n) in Group._fields}
        groups.append(Group(**mine))
    assert not fields, f"no group has {list(fields)}"
    sequences, scores, dropout, new_keys, rotary = groups
    run = Run(backend=NAME, deterministic=deterministic, positive_empty_lse=positive_empty_lse)
    gradients = None
    if is_backward:
        dq, dk, dv = (torch.full_like(x, 7.0, memory_format=torch.contiguous_format) for x in (q, k, v))
        dbias, dsink = (
            None if x is None else torch.full(x.shape, 7.0) for x in (scores.attn_bias, scores.learnable_sink)
        )
        call = (dout, q, k, v, out, lse, dq, dk, dv, dlse, dbias, dsink)
        with registered():
            served = _C.backward(*call, sequences, scores, dropout, run)
        gradients = (dout, *call[6:])
    else:
        out = torch.full((*q.shape[:-1], v.shape[-1]), 7.0, dtype=q.dtype)
        heads_first = (1, 0) if q.dim() == 3 else (0, 2, 1)
        lse = torch.full([q.shape[d] for d in heads_first], 7.0)
        with registered():
            served = _C.forward(q, k, v, out, lse, sequences, scores, dropout, run, new_keys, rotary, None, False)
    t = Tensors(q, k, v, out, lse, sequences, scores, dropout, new_keys, rotary, gradients)
    t = SimpleNamespace(**{name: getattr(t, name) for name in TENSORS})
    if isinstance(served, str):  # a call that writes nothing
        return None, t
    p = served[1]
    return Unread(p, t, sequences.max_seqlen_q, sequences.max_seqlen_k) if on_device else p, t


def run_engine(engine, dout=None, dlse=None, change=lambda t: None, **call) -> dict[str, torch.Tensor]:
    """-> out, lse and, given dout, the gradients by name. `change`: of the tensors, once the core has seen them."""
    p, t = make_problem(**call)
    change(t)
    if p is not None:
        engine.forward(p, t)
    results = {"out": t.out, "lse": t.lse}
    if dout is not None:
        p, t = make_problem(**call, is_backward=True, dout=dout, dlse=dlse, **results)
        change(t)
        if p is not None:
            engine.backward(p, t)
        results |= {name: getattr(t, name) for name in ("dq", "dk", "dv", "dbias", "dsink")}
    return results
