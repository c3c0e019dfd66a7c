"""The table of features that verify walks through: each case is one small call that leans on one of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    name: str
    batch: int = 2
    nheads: int = 2
    nheads_k: int = 2
    seqlen_q: int = 100
    seqlen_k: int = 100  # of a cache: its rows, used or not
    headdim: int = 64
    headdim_v: int = 0  # 0: headdim

    # Sequences; empty: absent. With lengths_q, q is packed; with lengths_k, k and v are.
    lengths_q: tuple[int, ...] = ()
    lengths_k: tuple[int, ...] = ()
    seqused_q: tuple[int, ...] = ()
    seqused_k: tuple[int, ...] = ()
    used_k: int = -1  # one number instead of seqused_k
    leftpad_k: tuple[int, ...] = ()
    cache_batch_idx: tuple[int, ...] = ()
    spare_rows: int = 0  # packed rows that belong to no sequence
    page_size: int = 0
    cache_batch: int = 0  # entries of k and v, with cache_batch_idx

    # Scores
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    chunk: int = 0
    softmax_scale: float = 0
    softcap: float = 0
    alibi: int = 0  # 1: slopes (nheads), 2: (batch, nheads)
    sink: bool = False
    bias: str = ""  # "full": (b, h, i, j), "heads": (1, h, i, j), "keys": (b, 1, 1, j)
    dropout: float = 0

    # Keys that join a cache, after the ones in use
    seqlen_new: int = 0
    lengths_new: tuple[int, ...] = ()  # packed
    rotary_dim: int = 0
    interleaved: bool = False
    rotary_fp32: bool = False  # the dtype of cos and sin, else that of q
    rotary_positions: tuple[int, ...] = ()

    # Around the call
    layout: str = ""  # "heads first": memory is (batch, head, row, col); "columns strided": every second is used
    deterministic: bool = False
    dlse: bool = False  # a gradient through lse as well
    positive_empty_lse: bool = False

    @property
    def dim_v(self) -> int:
        return self.headdim_v or self.headdim

    @property
    def sequences(self) -> int:
        return len(self.lengths_q) or self.batch

    @property
    def appends(self) -> bool:
        return self.seqlen_new > 0 or bool(self.lengths_new)

    @property
    def differentiable(self) -> bool:
        """Keys that live in a cache have no gradient."""
        return not (self.page_size or self.cache_batch_idx or self.appends)

    @property
    def scale(self) -> float:
        return self.softmax_scale or self.headdim**-0.5


_GQA = {"nheads": 4, "nheads_k": 2}
_CACHE = {"batch": 3, **_GQA, "seqlen_q": 4, "seqlen_k": 75, "headdim": 32, "seqlen_new": 4, "seqused_k": (20, 0, 65)}

CASES = (
    Case("headdim 1", headdim=1),
    Case("headdim 16", headdim=16),
    Case("headdim 32 causal", headdim=32, causal=True),
    Case("headdim 40", headdim=40),
    Case("headdim 64"),
    Case("headdim 64 causal", causal=True),
    Case("headdim 80 causal", headdim=80, causal=True),
    Case("headdim 97", headdim=97),
    Case("headdim 128 causal", headdim=128, causal=True),
    Case("headdim 192", batch=1, headdim=192),
    Case("headdim 256 causal", batch=1, headdim=256, causal=True),
    Case("headdim 320", batch=1, headdim=320),
    Case("headdim_v 128", headdim_v=128),
    Case("headdim_v 24 causal", headdim_v=24, causal=True),
    Case("headdim 192 headdim_v 128 causal", batch=1, headdim=192, headdim_v=128, causal=True),
    Case("softmax_scale 0.5", softmax_scale=0.5),
    Case("GQA 6:2 causal", nheads=6, causal=True),
    Case("MQA 5:1", nheads=5, nheads_k=1),
    Case("decode 1 x 777 GQA", batch=4, nheads=8, seqlen_q=1, seqlen_k=777, causal=True),
    Case("5 x 300 causal", nheads=4, nheads_k=1, seqlen_q=5, seqlen_k=300, causal=True),
    Case("150 x 60 causal: empty rows", seqlen_q=150, seqlen_k=60, causal=True),
    Case("150 x 60 causal: lse +inf", seqlen_q=150, seqlen_k=60, causal=True, positive_empty_lse=True),
    Case("1 x 1", batch=16, nheads=8, nheads_k=8, seqlen_q=1, seqlen_k=1),
    Case("no keys", seqlen_q=7, seqlen_k=0),
    Case("batch 0", batch=0),
    Case("900 x 900", batch=1, nheads=1, nheads_k=1, seqlen_q=900, seqlen_k=900),
    Case("800 x 1000 causal", batch=1, nheads=1, nheads_k=1, seqlen_q=800, seqlen_k=1000, causal=True),
    Case("headdim 128 600 x 700 causal GQA", batch=1, **_GQA, headdim=128, seqlen_q=600, seqlen_k=700, causal=True),
    Case("heads before rows", **_GQA, causal=True, layout="heads first"),
    Case("strided columns", **_GQA, causal=True, layout="columns strided"),
    Case("deterministic", **_GQA, seqlen_q=300, seqlen_k=300, causal=True, deterministic=True),
    Case("varlen", lengths_q=(60, 1, 130), lengths_k=(60, 1, 130)),
    Case("varlen causal GQA", nheads=4, lengths_q=(60, 0, 1, 90), lengths_k=(80, 30, 200, 90), causal=True),
    Case("varlen with an empty side", lengths_q=(20, 33, 0), lengths_k=(20, 0, 17)),
    Case("varlen with spare rows", lengths_q=(40, 50), lengths_k=(40, 50), spare_rows=9, causal=True),
    Case("varlen of 50 sequences", lengths_q=(1, 2, 3, 0, 5) * 10, lengths_k=(7, 2, 40, 3, 0) * 10, causal=True),
    Case("seqused_k", seqused_k=(100, 13), causal=True),
    Case("varlen seqused_q, seqused_k", lengths_q=(64, 70), lengths_k=(90, 50), seqused_q=(64, 11), seqused_k=(37, 50)),
    Case("leftpad_k", leftpad_k=(0, 21), causal=True),
    Case("window 20,20", window=(20, 20)),
    Case("window 64,0", seqlen_q=300, seqlen_k=300, window=(64, 0)),
    Case("window -1,9 of 40 x 120", seqlen_q=40, seqlen_k=120, window=(-1, 9)),
    Case("window 0,0", window=(0, 0)),
    Case("chunk 32 causal", causal=True, chunk=32),
    Case("softcap 5 causal", causal=True, softcap=5),
    Case("softcap 30 window 50,0", window=(50, 0), softcap=30),
    Case("ALiBi causal", nheads=4, nheads_k=4, causal=True, alibi=1),
    Case("ALiBi per batch GQA", **_GQA, alibi=2),
    Case("ALiBi softcap window varlen", lengths_q=(60, 80), lengths_k=(90, 80), window=(30, 5), softcap=10, alibi=1),
    Case("sink", **_GQA, causal=True, sink=True),
    Case("bias (b, h, i, j)", bias="full"),
    Case("bias (1, h, i, j) GQA", **_GQA, seqlen_k=600, bias="heads"),
    Case("bias (b, 1, 1, j) causal", causal=True, bias="keys"),
    Case(
        "bias ALiBi softcap varlen", lengths_q=(60, 0, 80), lengths_k=(90, 7, 80), causal=True, softcap=10, alibi=1,
        bias="full",
    ),
    Case("dropout 0.1", dropout=0.1),
    Case("dropout 0.5 causal varlen", lengths_q=(60, 80), lengths_k=(60, 80), causal=True, dropout=0.5),
    Case(
        "dropout 0.2 GQA window softcap", **_GQA, seqlen_q=70, seqlen_k=600, window=(300, 10), softcap=10, dropout=0.2
    ),
    Case("dropout 0.1 sink, gradient through lse", causal=True, sink=True, dropout=0.1, dlse=True),
    Case("gradient through lse", causal=True, dlse=True),
    Case("gradient through lse, GQA window", **_GQA, window=(30, 0), dlse=True),
    Case("pages of 16", **_GQA, seqlen_q=3, seqlen_k=160, seqused_k=(160, 77), page_size=16, causal=True),
    Case("pages of 5, varlen", seqlen_k=90, lengths_q=(30, 2), seqused_k=(90, 33), page_size=5, causal=True),
    Case("pages of 256", **_GQA, seqlen_q=1, seqlen_k=600, seqused_k=(600, 257), page_size=256, causal=True),
    Case(
        "cache_batch_idx", seqlen_q=4, seqlen_k=120, seqused_k=(120, 50), cache_batch_idx=(3, 1), cache_batch=4,
        causal=True,
    ),
    Case(
        "everything", **_GQA, seqlen_q=70, seqlen_k=110, headdim=48, headdim_v=72, seqused_k=(110, 90),
        leftpad_k=(3, 0), window=(60, 4), softcap=8, alibi=1, sink=True, bias="full", dropout=0.2, dlse=True,
    ),
    Case("cache: new keys", **_CACHE),
    Case("cache: new keys causal", **_CACHE, causal=True),
    Case("cache: one used_k", **{**_CACHE, "seqused_k": (), "used_k": 33}, causal=True),
    Case("cache: one token", **{**_CACHE, "seqlen_q": 1, "seqlen_new": 1}, causal=True),
    Case("cache: pages of 7", **_CACHE, page_size=7, causal=True),
    Case("cache: pages of 16, rotary", **_CACHE, page_size=16, causal=True, rotary_dim=16),
    Case("cache: cache_batch_idx", **_CACHE, cache_batch_idx=(4, 0, 2), cache_batch=5, layout="heads first"),
    Case("cache: leftpad_k", **_CACHE, leftpad_k=(7, 0, 64), causal=True),
    Case("cache: packed", **{**_CACHE, "seqlen_new": 0}, lengths_q=(3, 0, 1), lengths_new=(2, 4, 1), causal=True),
    Case("cache: rotary, no mask", **_CACHE, rotary_dim=32),
    Case("cache: rotary interleaved causal", **_CACHE, rotary_dim=32, interleaved=True, causal=True),
    Case("cache: rotary window, fp32 tables", **_CACHE, rotary_dim=2, rotary_fp32=True, window=(30, 0)),
    Case("cache: rotary_positions", **_CACHE, rotary_dim=16, rotary_positions=(3, 40, 0), causal=True),
    Case("cache: softcap ALiBi sink", **_CACHE, causal=True, softcap=4, alibi=1, sink=True),
)  # fmt: skip

# --full: many tiles of every common head dimension, where pipelines of loads and split keys show their mistakes.
LARGE = (
    *(
        Case(
            f"headdim {d} {n} x {m}{' causal' if causal else ''}", batch=1, nheads=2, nheads_k=1, headdim=d, seqlen_q=n,
            seqlen_k=m, causal=causal,
        )
        for d in (64, 96, 128, 256)
        for n, m in ((1024, 1024), (513, 1500), (700, 257))
        for causal in (False, True)
    ),
    Case("decode 1 x 9000 GQA", batch=1, nheads=8, seqlen_q=1, seqlen_k=9000, headdim=128),
    Case("decode of pages, 1 x 5000", batch=2, nheads=8, seqlen_q=1, seqlen_k=5000, seqused_k=(5000, 4097),
         page_size=64, headdim=128),
    Case("varlen, long beside short", nheads=4, lengths_q=(1, 1500, 3, 200), lengths_k=(1, 1500, 900, 200),
         headdim=128, causal=True),
    Case("window 256,0 of 1500", batch=1, seqlen_q=1500, seqlen_k=1500, headdim=128, window=(256, 0)),
)  # fmt: skip
