"""Backends written in Python. The core checks a call, chooses, and hands the Problem over; an engine runs it.

    class Engine:
        def forward(self, p, t): ...   # writes t.out, t.lse (unless None), and where keys join a cache t.k and t.v
        def backward(self, p, t): ...  # writes t.dq, t.dk, t.dv, and t.dbias, t.dsink unless None
        def refuses(self, p): ...      # optional: "", or why not, for what capability data cannot say
        def plan(self, p): ...         # optional: words for flash_attn.explain

`p` is the checked Problem (read-only numbers):

    is_backward, dtype ("bfloat16"), features (bits), uses("softcap")
    batch, nheads, nheads_k, group     query head h reads key head h // group
    headdim, headdim_v                 columns of q and k; of v and out
    max_seqlen_q, max_seqlen_k         exact on the CPU; elsewhere bounds, within the memory there is
    batch_q, rows_q, batch_k, rows_k   entries and rows of the memory of q (packed: 1, total_q) and k (pages: their
                                       number and size)
    seqlen_q, seqlen_k                 of a sequence without tables; seqlen_k of pages: all that a table can reach
    page_size                          0: no pages
    used_k                             keys in use of every sequence, instead of t.seqused_k; -1: not given
    seqlen_new, rows_new, max_new      new keys of each sequence (0 where t.cu_seqlens_new tells), rows of t.new_k per
                                       entry, and the bound of one sequence's
    scale, softcap (0: off), causal, window_left, window_right (-1: no limit), chunk (0: off)
    dropout_p, drop_threshold, drop_scale, seed, offset   an entry stays if its 16 bits reach the threshold; seed and
                                       offset count if t.dropout_state is None
    rotary_dim (0: none), rotary_interleaved, deterministic, empty_lse
    device_type, device_index          DLPack's: 1 CPU, 2 CUDA, 10 ROCm, 14 XPU
    stream                             of q's device, as an integer
    recordable, record(launches, workspace_bytes=0)
                                       what was launched may be handed over, where it is a function of p and the layout
                                       of t alone: the core launches it again for every call of the same key (see
                                       src/core/recordings.hpp), without the engine. A launch is (function, programs,
                                       threads, shared_bytes, parameters): of CUDA's driver; a parameter is a tensor by
                                       its name in `Tensors`, an offset in the workspace (int), or a number (bytes)

An engine computes without autograd of its own: where a dispatch mode watches, autograd is off in its backward.

`t` holds the caller's own tensors by the names of `Tensors`. Tables on a device have not been read by anybody: engines
clamp what they say (`clamped` in src/core/sequences.hpp).
"""

from __future__ import annotations

import importlib
import os
import threading

from flash_attn import _C
from flash_attn._call import Dropout, NewKeys, Rotary, Scores, Sequences

_NOTHING = {Group: Group() for Group in (Sequences, Scores, Dropout, NewKeys, Rotary)}


class Tensors:
    """The tensors of one call; None where absent. Layouts are those of include/flash_attn/flash_attn.hpp."""

    __slots__ = (
        "q", "k", "v", "out", "lse", "dout", "dq", "dk", "dv", "dlse", "dbias", "dsink",
        "_sequences", "_scores", "_dropout", "_new_keys", "_rotary", "mods",
    )  # fmt: skip

    def __init__(
        self, q, k, v, out, lse, sequences, scores, dropout, new_keys=None, rotary=None, gradients=None, mods=None
    ):
        self.q, self.k, self.v, self.out, self.lse = q, k, v, out, lse
        self.mods = mods  # of the torch engine: _engines/torch/mods.py
        self.dout, self.dq, self.dk, self.dv, self.dlse, self.dbias, self.dsink = gradients or (None,) * 7
        self._sequences = sequences or _NOTHING[Sequences]
        self._scores = scores or _NOTHING[Scores]
        self._dropout = dropout or _NOTHING[Dropout]
        self._new_keys = new_keys or _NOTHING[NewKeys]
        self._rotary = rotary or _NOTHING[Rotary]

    cu_seqlens_q = property(lambda self: self._sequences.cu_seqlens_q)
    cu_seqlens_k = property(lambda self: self._sequences.cu_seqlens_k)
    seqused_q = property(lambda self: self._sequences.seqused_q)
    seqused_k = property(lambda self: self._sequences.seqused_k)
    leftpad_k = property(lambda self: self._sequences.leftpad_k)
    cache_batch_idx = property(lambda self: self._sequences.cache_batch_idx)
    block_table = property(lambda self: self._sequences.block_table)
    alibi_slopes = property(lambda self: self._scores.alibi_slopes)
    sink = property(lambda self: self._scores.learnable_sink)
    bias = property(lambda self: self._scores.attn_bias)
    dropout_state = property(lambda self: self._dropout.rng_state)
    new_k = property(lambda self: self._new_keys.k)
    new_v = property(lambda self: self._new_keys.v)
    cu_seqlens_new = property(lambda self: self._new_keys.cu_seqlens)
    rotary_cos = property(lambda self: self._rotary.cos)
    rotary_sin = property(lambda self: self._rotary.sin)
    rotary_positions = property(lambda self: self._rotary.positions)


_registered: dict[str, tuple] = {}  # name: (engine or "module:attribute", what _C.register_hosted was told)
_ready: dict[str, object] = {}
# The core's list and ours change together: whoever is sent here by the core finds the engine, or that it is gone.
_lock = threading.RLock()


def _renew_lock() -> None:
    """A child must not find the lock held by a thread that it does not have."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


def add(name: str, engine, settings: tuple, unavailable: str, before: str) -> None:
    with _lock:
        _C.register_hosted(*settings, unavailable, before)
        _registered[name] = (engine, settings)
        _ready.pop(name, None)


def remove(name: str) -> None:
    with _lock:
        _C.unregister_backend(name)
        _registered.pop(name, None)
        _ready.pop(name, None)


def hosts(name: str) -> bool:
    return name in _registered


def get(name: str) -> object | None:
    """The engine of this name, made on first use. None if it cannot be: then it is unavailable from now on; or if it
    was taken out since it was chosen. Either way the core will choose another."""
    if (engine := _ready.get(name)) is not None:
        return engine
    with _lock:
        entry = _registered.get(name)
    if entry is None:
        return None
    engine, settings = entry
    why_not = ""
    if isinstance(engine, str):  # imported without the lock: modules have their own, and may register backends
        module, attribute = engine.split(":")
        try:
            engine = getattr(importlib.import_module(module), attribute)()
        except Exception as e:  # whatever a driver or a package says while it loads
            engine, why_not = None, f"{type(e).__name__}: {e}"
    with _lock:
        if _registered.get(name) is not entry:  # another thread has put another in its place, or none
            return engine
        if engine is None:
            _C.register_hosted(*settings, why_not, "")
            return None
        return _ready.setdefault(name, engine)
