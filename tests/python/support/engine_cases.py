"""Problems for engines: every feature alone, and random mixtures of them."""

from __future__ import annotations

import random

import torch


class Maker:
    """Draws tensors of one dtype on one device."""

    def __init__(self, dtype, device="cpu", seed=0):
        self.dtype, self.device = dtype, device
        self.g = torch.Generator().manual_seed(seed)

    def randn(self, *shape, dtype=None):
        return torch.randn(shape, generator=self.g).to(dtype or self.dtype).to(self.device)

    def ints(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def qkv(self, b=2, sq=33, sk=50, h=4, hk=2, d=32, dv=None):
        return self.randn(b, sq, h, d), self.randn(b, sk, hk, d), self.randn(b, sk, hk, dv or d)

    def packed(self, lengths_q=(5, 0, 33), lengths_k=(17, 9, 40), tail=3, h=4, hk=2, d=32, dv=None):
        cu = [self.ints([0, *torch.tensor(n).cumsum(0).tolist()]) for n in (lengths_q, lengths_k)]
        rows, keys = sum(lengths_q) + tail, sum(lengths_k) + tail
        tensors = self.randn(rows, h, d), self.randn(keys, hk, d), self.randn(keys, hk, dv or d)
        return tensors, {"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1]}

    def paged(self, lengths=(37, 5, 0), page=16, b=None, sq=3, h=4, hk=2, d=32, dv=None, spare=2):
        b = len(lengths)
        most = -(-max(lengths) // page) + 1
        pages = torch.randperm(b * most + spare, generator=self.g)[: b * most].reshape(b, most)
        n = b * most + spare
        tensors = self.randn(b, sq, h, d), self.randn(n, page, hk, d), self.randn(n, page, hk, dv or d)
        return tensors, {"block_table": self.ints(pages.tolist()), "seqused_k": self.ints(lengths)}


def strided(x):
    """The same values, columns two apart."""
    return torch.stack([x, x], -1)[..., 0]


def heads_first(x):
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def rotary(m: Maker, rows: int, pairs: int, dtype=torch.float32):
    angle = m.randn(rows, pairs, dtype=torch.float32) * 3
    return {"rotary_cos": angle.cos().to(dtype), "rotary_sin": angle.sin().to(dtype)}


def single_features(m: Maker):
    """Yields name, (q, k, v), options: each feature alone, of those that a backward has too."""
    qkv, ints, randn = m.qkv, m.ints, m.randn
    yield "plain", qkv(), {}
    yield "one key", qkv(sk=1), {}
    yield "one query", qkv(sq=1), {}
    yield "no keys", qkv(sk=0), {}
    yield "no keys, a sink", qkv(sk=0), {"sink": randn(4)}
    yield "no queries", qkv(sq=0), {}
    yield "batch 0", qkv(b=0), {}
    yield "own headdim_v", qkv(d=32, dv=16), {}
    yield "headdim 40, v 24", qkv(d=40, dv=24), {}
    yield "headdim 33", qkv(d=33), {}
    yield "headdim 1", qkv(d=1), {}
    yield "causal", qkv(), {"causal": True}
    yield "causal, more queries", qkv(sq=50, sk=20), {"causal": True}
    for left, right in ((5, 3), (5, -1), (-1, 3), (0, 0), (7, 0)):
        yield f"window {left} {right}", qkv(), {"window": (left, right)}
        yield f"window {left} {right}, more queries", qkv(sq=70, sk=30), {"window": (left, right)}
    yield "window of the past only", qkv(sq=5, sk=100), {"window": (3, 0)}
    yield "chunk", qkv(sq=50, sk=50), {"chunk": 7}
    yield "chunk, more queries", qkv(sq=50, sk=30), {"chunk": 7, "causal": True}
    yield "softcap", qkv(), {"softcap": 2.0}
    yield "scale 0", qkv(), {"scale": 0.0}
    yield "scale < 0", qkv(), {"scale": -0.7, "causal": True}
    yield "alibi", qkv(), {"alibi_slopes": randn(4, dtype=torch.float32)}
    yield "alibi per sequence", qkv(), {"alibi_slopes": randn(2, 4, dtype=torch.float32), "causal": True}
    yield "bias", qkv(), {"bias": randn(2, 4, 33, 50)}
    yield "bias of all", qkv(), {"bias": randn(1, 1, 33, 50, dtype=torch.float32), "causal": True}
    yield "bias of keys", qkv(), {"bias": randn(2, 1, 1, 50)}
    hiding = randn(2, 4, 33, 50, dtype=torch.float32)
    hiding[:, :, 3] = -torch.inf
    yield "bias that hides", qkv(), {"bias": hiding.masked_fill(hiding < 0.3, -torch.inf)}
    lowest = randn(2, 4, 33, 50, dtype=torch.float32)  # finite numbers hide whole rows: all keys count alike
    lowest[..., 40:], lowest[:, 1:, 5:9], lowest[:, :, 20:22] = -1e30, -1e30, torch.finfo(torch.float32).min
    yield "bias that hides rows", qkv(), {"bias": lowest}
    dropped = {"dropout_p": 0.2, "seed": 3, "offset": 5}
    yield "bias that hides rows, causal", qkv(), {"bias": lowest, "causal": True, **dropped}
    lowest = randn(1, 1, 3, 700, dtype=torch.float32)  # in parts, of which one has fewer keys
    lowest[..., 1, :] = -1e30
    yield "bias that hides a row of many keys", qkv(sq=3, sk=700, h=2, hk=1), {"bias": lowest}
    yield "bias, low", qkv(), {"bias": torch.full((1, 1, 33, 50), -64.0, device=m.device)}
    yield "sink", qkv(), {"sink": randn(4)}
    yield "sink, rows that see nothing", qkv(sq=50, sk=20), {"sink": randn(4, dtype=torch.float32), "causal": True}
    yield "dropout", qkv(), {"dropout_p": 0.3, "seed": 2**63 + 5, "offset": 2**40 + 7}
    state = torch.tensor([123456789012345, 77], dtype=torch.int64, device=m.device)
    yield "dropout, state on the device", qkv(sq=40, sk=70), {"dropout_p": 0.5, "dropout_state": state, "causal": True}
    yield "strided columns", tuple(strided(x) for x in qkv()), {"causal": True}
    yield "heads first", tuple(heads_first(x) for x in qkv(d=40)), {}
    yield "expanded", (qkv()[0], *(x[:1].expand(2, -1, -1, -1) for x in qkv()[1:])), {}
    (q, k, v), cu = m.packed()
    yield "packed", (q, k, v), cu
    yield "packed, causal", (q, k, v), {**cu, "causal": True}
    yield "packed, used", (q, k, v), {**cu, "seqused_q": ints([3, 0, 20]), "seqused_k": ints([17, 2, 31])}
    yield "packed, wild", (q, k, v), {
        "cu_seqlens_q": ints([0, 7, 30, 34]), "cu_seqlens_k": ints([2, 20, 50, 50]), "sink": randn(4), "causal": True,
    }  # fmt: skip
    lengths = [(0, 1, 3)[i % 3] for i in range(140)]
    lengths[77] = 150
    x, cu_many = m.packed(lengths, lengths, h=2, hk=1, d=16)
    yield "packed, wild, one long of many", x, {**{name: x + 2 for name, x in cu_many.items()}, "causal": True}
    yield "packed q", (q, *qkv(b=3)[1:]), {"cu_seqlens_q": cu["cu_seqlens_q"], "window": (20, 2)}
    yield "packed k", (qkv(b=3)[0], k, v), {"cu_seqlens_k": cu["cu_seqlens_k"], "causal": True}
    yield "used", qkv(), {"seqused_q": ints([33, 7]), "seqused_k": ints([0, 41]), "causal": True}
    yield "used, a number", qkv(), {"used_k": 29}
    yield "left padding", qkv(), {"leftpad_k": ints([3, 0]), "seqused_k": ints([40, 50]), "causal": True}


def cache_features(m: Maker):
    """Yields name, (q, k, v), options of what only a cache has."""
    qkv, ints, randn = m.qkv, m.ints, m.randn
    entries = {"cache_batch_idx": ints([4, 1])}
    _, k, v = qkv(b=5)
    yield "entries", (qkv(sq=3)[0], k, v), {**entries, "seqused_k": ints([50, 13]), "causal": True}
    yield "entries, left padding", (qkv()[0], k, v), {**entries, "leftpad_k": ints([4, 50]), "window": (20, -1)}
    for page in (1, 5, 16, 64):
        x, table = m.paged(page=page)
        yield f"pages of {page}", x, {**table, "causal": page > 5}
    x, table = m.paged(page=64, sq=20, h=2)
    yield "pages, more queries", x, {**table, "causal": True, "softcap": 3.0}
    x, table = m.paged(page=16)
    yield "pages, left padding", x, {**table, "leftpad_k": ints([9, 5, 0])}
    cu = {"cu_seqlens_q": ints([0, 3, 4, 9])}
    yield "pages, packed q", (randn(11, 4, 32), *x[1:]), {**table, **cu, "causal": True, "sink": randn(4)}
    few = [(0, 1, 2)[i % 3] for i in range(12)] + [9]
    keys, few_pages = m.paged(lengths=[30] * 13, page=16)
    yield "pages, packed q, one long", (randn(sum(few), 8, 32), *keys[1:]), {
        **few_pages, "cu_seqlens_q": ints([0, *torch.tensor(few).cumsum(0).tolist()]), "causal": True,
    }  # fmt: skip
    lengths = {"cu_seqlens_k": ints([0, 37, 42, 42])}
    yield "pages, packed lengths", x, {"block_table": table["block_table"], **lengths, "causal": True}
    many, pages = m.paged(lengths=(900, 300), page=16, sq=2, h=6, hk=2)
    yield "pages, many keys", many, {**pages, "causal": True, "sink": randn(6)}
    yield (
        "many keys",
        qkv(b=1, sq=1, sk=1100, h=8, hk=2),
        {"sink": randn(8), "alibi_slopes": randn(8, dtype=torch.float32) / 64},
    )
    yield "many keys, window", qkv(b=1, sq=2, sk=1100, h=4, hk=1), {"window": (700, 0), "dropout_p": 0.2}
    yield "many keys, packed", (randn(6, 4, 32), *qkv(b=2, sk=700)[1:]), {
        "cu_seqlens_q": ints([1, 3, 4]), "seqused_k": ints([0, 690]), "sink": randn(4), "causal": True,
    }  # fmt: skip

    new = {"new_k": randn(2, 3, 2, 32), "new_v": randn(2, 3, 2, 32)}
    used = {"seqused_k": ints([7, 46])}
    yield "new keys", qkv(sq=3), {**new, **used, "causal": True}
    yield "new keys, a number", qkv(sq=3), {**new, "used_k": 9}
    yield "new keys, rotary", qkv(sq=3), {**new, **used, "causal": True, **rotary(m, 60, 8)}
    yield "new keys, rotary interleaved", qkv(sq=3), {
        **new, **used, **rotary(m, 60, 16, m.dtype), "rotary_interleaved": True,
    }  # fmt: skip
    yield "new keys, positions", qkv(sq=3), {
        **new, **used, **rotary(m, 60, 12), "causal": True,
        "rotary_positions": ints([30, 2]), "rotary_interleaved": True,
    }  # fmt: skip
    x, table = m.paged(page=5)
    new3 = {"new_k": randn(3, 4, 2, 32), "new_v": randn(3, 4, 2, 32)}
    yield "new keys, pages", x, {**table, **new3, "causal": True, **rotary(m, 60, 8)}
    packed_new = {"new_k": randn(9, 2, 32), "new_v": randn(9, 2, 32), "cu_seqlens_new": ints([0, 2, 2, 8])}
    x, table = m.paged(page=8)
    yield "new keys, packed", x, {**table, **packed_new, "causal": True}
    yield "new keys, entries", (qkv(sq=3)[0], *qkv(b=5)[1:]), {**new, **used, **entries, "leftpad_k": ints([2, 1])}


def random_problem(seed: int, m: Maker, most: int = 200):
    """-> (q, k, v), options of a mixture of features that has a backward, lengths up to `most`."""
    r = random.Random(seed)
    hk, group = r.choice([1, 1, 2, 3]), r.choice([1, 1, 2, 4])
    h, b = hk * group, r.choice([1, 2, 3])
    d = r.choice([8, 16, 32, 40, 64, 64, 80, 96, 128, 128, 192, 256])
    dv = d if r.random() < 0.8 else r.choice([16, 64, 128])
    length = lambda: r.choice([1, r.randrange(0, 40), r.randrange(1, most), 64, 128, most])  # noqa: E731
    options = {}
    if r.random() < 0.35:
        lengths = [[length() for _ in range(b)] for _ in range(2)]
        (q, k, v), options = m.packed(*lengths, tail=r.choice([0, 3]), h=h, hk=hk, d=d, dv=dv)
        rows, keys = max(lengths[0]), max(lengths[1])
    else:
        rows, keys = length(), length()
        q, k, v = m.qkv(b, rows, keys, h, hk, d, dv)
        if r.random() < 0.2:
            options["seqused_k"] = m.ints([r.randrange(0, keys + 1) for _ in range(b)])
            if r.random() < 0.5:
                options["seqused_q"] = m.ints([r.randrange(0, rows + 1) for _ in range(b)])
            if r.random() < 0.5:
                options["leftpad_k"] = m.ints([r.randrange(0, int(n) + 1) for n in options["seqused_k"]])
    mask = r.random()
    if mask < 0.4:
        options["causal"] = True
    elif mask < 0.6:
        options["window"] = (r.choice([-1, 0, r.randrange(0, 100)]), r.choice([-1, 0, r.randrange(0, 100)]))
    elif mask < 0.65:
        options["chunk"] = r.randrange(1, 90)
    if r.random() < 0.15:
        options["softcap"] = r.choice([1.0, 20.0])
    if r.random() < 0.15:
        options["alibi_slopes"] = m.randn(*r.choice([(h,), (b, h)]), dtype=torch.float32)
    if r.random() < 0.2:
        shape = (r.choice([1, b]), r.choice([1, h]), r.choice([1, rows]), keys)
        options["bias"] = m.randn(*shape, dtype=r.choice([None, torch.float32]))
        if r.random() < 0.3:
            options["bias"].masked_fill_(options["bias"] < -0.5, -torch.inf)
    if r.random() < 0.2:
        options["sink"] = m.randn(h)
    if r.random() < 0.2:
        options.update(dropout_p=r.choice([0.1, 0.5]), seed=r.randrange(2**64), offset=r.randrange(2**64))
    if r.random() < 0.15:
        layout = r.choice([strided, heads_first])
        q, k, v = layout(q), layout(k), layout(v)
    if r.random() < 0.1:
        options["scale"] = r.choice([0.05, 1.0, -0.3])
    return (q, k, v), options
