"""The yardstick: the plain PyTorch arithmetic in the input's dtype, as a user would write it, on the CPU.

Products are rounded to the input's dtype (they are summed in fp32, as hardware does), the softmax is in fp32, and its
result is rounded before it is multiplied by v; the backward likewise rounds dP and dS. For fp64 all of it is fp64.

There are two ways to the probabilities of the backward, and verify counts the worse: autograd keeps those of the
forward; whoever saves memory, as FlashAttention does, makes them again from an lse in fp32, and takes
sum_j P dP as dout . out from the out that was rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._verify.cases import Case
from flash_attn._verify.definition import Places, kept, product, rotate, visible


class Plain:
    """One case: forward() and backward() as Instance has them."""

    def __init__(self, case: Case, values: dict[str, Tensor], dtype: torch.dtype):
        self.case, self.dtype, self.soft = case, dtype, torch.promote_types(dtype, torch.float32)
        wide = {n: x for n, x in values.items() if n in ("dlse", "alibi", "cos", "sin")}
        x = {n: x.to(dtype) for n, x in values.items()} | wide
        packed = {"q": case.lengths_q, "dout": case.lengths_q, "k": case.lengths_k, "v": case.lengths_k,
                  "new_k": case.lengths_new, "new_v": case.lengths_new}  # fmt: skip
        self.shapes = {n: t.shape for n, t in x.items()}
        self.x = {n: t[None] if packed.get(n) else t for n, t in x.items()}
        self.places = [Places(case, b) for b in range(case.sequences)]
        self.group = case.nheads // case.nheads_k
        self.lse_rows = (lambda lse: lse[None]) if case.lengths_q else (lambda lse: lse)  # (entry, nheads, rows)
        if case.dropout:
            rows = max(p.rows.stop - p.rows.start for p in self.places)
            self.kept = kept(case, rows, max(len(p.keys[0]) for p in self.places)).to(self.soft)
        if case.appends:
            self._append()

    def _append(self) -> None:
        case, x = self.case, self.x
        x["k"], x["v"], x["q"] = x["k"].clone(), x["v"].clone(), x["q"].clone()
        for b, p in enumerate(self.places):
            new_k, new_v = x["new_k"][p.new_entry, p.new], x["new_v"][p.new_entry, p.new]
            if case.rotary_dim:
                first = case.rotary_positions[b] if case.rotary_positions else p.used
                new_k = rotate(case, new_k, first + torch.arange(len(new_k)), x["cos"], x["sin"])
                q = x["q"][p.entry, p.rows]
                advances = case.causal or case.window != (-1, -1) or case.chunk > 0
                position = torch.arange(len(q)) if advances else torch.zeros(len(q), dtype=torch.int64)
                x["q"][p.entry, p.rows] = rotate(case, q, first + position, x["cos"], x["sin"])
            x["k"][p.appended], x["v"][p.appended] = new_k, new_v

    def _heads(self, x: Tensor) -> Tensor:
        """(rows, heads, d) -> (nheads, rows, d): key heads are repeated for their group."""
        x = x.transpose(0, 1)
        return x if x.shape[0] == self.case.nheads else x.repeat_interleave(self.group, 0)

    def _sum_of_group(self, a: Tensor, b: Tensor) -> Tensor:
        """a (nheads, rows, keys), b (nheads, rows, d) -> the sum over rows and heads of a group, (keys, heads, d)."""
        a, b = (x.unflatten(0, (self.case.nheads_k, self.group)).flatten(1, 2) for x in (a, b))
        return product(a.transpose(1, 2), b, self.dtype).transpose(0, 1)

    def _bias(self, b: int, n: int, m: int) -> tuple:
        """The index of sequence b's part of the bias."""
        shape = self.shapes["bias"]
        rows = slice(0, n) if shape[2] > 1 or n == 0 else slice(None)
        return slice(b, b + 1) if shape[0] > 1 else slice(None), slice(None), rows, slice(0, m)

    def _scores(self, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> (nheads, n, m) scores in fp32, -inf where masked; the tanh of the softcap; the mask."""
        case, x, p = self.case, self.x, self.places[b]
        q, k = self._heads(x["q"][p.entry, p.rows]), self._heads(x["k"][p.keys])
        n, m = q.shape[1], k.shape[1]
        s = product(q, k.transpose(1, 2), self.dtype).to(self.soft) * case.scale
        capped = torch.tanh(s / case.softcap) if case.softcap else s
        if case.softcap:
            s = case.softcap * capped
        mask, distance = visible(case, n, m)
        if case.alibi:
            slopes = x["alibi"][b] if case.alibi == 2 else x["alibi"]
            s = s - slopes.to(self.soft)[:, None, None] * distance
        if case.bias:
            s = s + x["bias"][self._bias(b, n, m)].squeeze(0).to(self.soft)
        return s.masked_fill(~mask, -torch.inf), capped, mask

    def forward(self) -> dict[str, Tensor]:
        case, x = self.case, self.x
        empty = torch.inf if case.positive_empty_lse else -torch.inf
        out = torch.zeros(*x["q"].shape[:-1], case.dim_v, dtype=self.dtype)
        lse = torch.full((out.shape[0], case.nheads, out.shape[1]), empty, dtype=self.soft)
        self.lse = torch.full_like(lse, torch.inf)  # exp(s - inf) = 0: what the backward of an empty row needs
        for b, p in enumerate(self.places):
            s, _, _ = self._scores(b)
            if case.sink:
                sink = x["sink"].to(self.soft)[:, None, None].expand(-1, s.shape[1], 1)
                s = torch.cat([s, sink], -1)
            row = torch.logsumexp(s, -1) if s.shape[-1] else s.new_full(s.shape[:-1], -torch.inf)
            seen = row > -torch.inf
            lse[p.entry, :, p.rows] = torch.where(seen, row, empty)
            self.lse[p.entry, :, p.rows] = torch.where(seen, row, torch.inf)
            probability = self._probabilities(b, self.lse)
            if case.dropout:
                probability = probability * self.kept[b, :, : s.shape[1], : probability.shape[2]]
            v = self._heads(x["v"][p.keys])
            out[p.entry, p.rows] = product(probability.to(self.dtype), v, self.dtype).transpose(0, 1)
        self.out = out
        packed = bool(case.lengths_q)
        results = {"out": out[0] if packed else out, "lse": (lse[0] if packed else lse).float()}
        return results | ({"k_cache": x["k"], "v_cache": x["v"]} if case.appends else {})

    def _probabilities(self, b: int, lse: Tensor) -> Tensor:
        p = self.places[b]
        return torch.exp(self._scores(b)[0] - lse[p.entry, :, p.rows, None])

    def backward(self, recomputed: bool) -> dict[str, Tensor]:
        """After forward."""
        case, x, dtype = self.case, self.x, self.dtype
        dq, dk, dv = (torch.zeros_like(x[n]) for n in "qkv")
        dbias = torch.zeros(self.shapes["bias"], dtype=torch.float32) if case.bias else None
        dsink = torch.zeros(case.nheads, dtype=torch.float32) if case.sink else None
        lse = self.lse.float().to(self.soft) if recomputed else self.lse
        for b, p in enumerate(self.places):
            probability = self._probabilities(b, lse)
            _, capped, _ = self._scores(b)
            n, m = probability.shape[1:]
            q, dout, out = (self._heads(t[p.entry, p.rows]) for t in (x["q"], x["dout"], self.out))
            k, v = self._heads(x["k"][p.keys]), self._heads(x["v"][p.keys])
            factor = self.kept[b, :, :n, :m] if case.dropout else 1.0
            dp = product(dout, v.transpose(1, 2), dtype).to(self.soft) * factor
            if recomputed:
                delta = (dout.to(self.soft) * out.to(self.soft)).sum(-1)
            else:
                delta = (probability * dp).sum(-1)
            if case.dlse:
                delta = delta - self.lse_rows(x["dlse"])[p.entry, :, p.rows]
            ds = probability * (dp - delta[..., None])
            if case.bias:
                at = self._bias(b, n, m)
                dbias[at] += ds[None].sum_to_size(dbias[at].shape).float()
            if case.sink:
                sink = torch.exp(x["sink"].to(self.soft)[:, None] - lse[p.entry, :, p.rows])
                dsink -= (sink * delta).sum(-1).float()
            if case.softcap:
                ds = ds * (1 - capped * capped)
            ds = (ds * case.scale).to(dtype)
            dq[p.entry, p.rows] = product(ds, k, dtype).transpose(0, 1)
            dk[p.keys] = self._sum_of_group(ds, q)
            dv[p.keys] = self._sum_of_group((probability * factor).to(dtype), dout)
        results = {n: g.view(self.shapes[n[1:]]) for n, g in (("dq", dq), ("dk", dk), ("dv", dv))}
        return results | ({"dbias": dbias} if case.bias else {}) | ({"dsink": dsink} if case.sink else {})
