"""LayerNorm (Ba et al., arXiv 1607.06450) and RMSNorm (Zhang and Sennrich, arXiv 1910.07467), with what comes before.

    h = dropout(rowscale * x) + dropout(x1) + residual          the residual stream
    y = h_hat * weight + bias,  y1 = h_hat * weight1 + bias1    h_hat: h normalised over its last dimension

Arithmetic in fp32 (fp64 where an input is), in blocks of rows, each result rounded once. What is kept for the gradient:
h in the dtype of the residual (x itself where nothing precedes), a mean and a 1 / deviation per row, and a byte per
element under dropout. RMSNorm of a CPU's tensors, with no more before it than a residual, is computed by the compiled
core (src/cpu/rms_norm.cpp).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn import _C
from flash_attn._errors import InvalidArgument, NotServed
from flash_attn._tensors import CORE_DTYPES, core_reads
from flash_attn.ops._blocks import row_blocks


class Options(NamedTuple):
    eps: float
    is_rms_norm: bool
    zero_centered_weight: bool = False
    dropout_p: float = 0.0


def arithmetic(*tensors: Tensor | None) -> torch.dtype:
    dtype = torch.float32
    for t in tensors:
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def check(x: Tensor, options: Options, **tensors: Tensor | None) -> None:
    """`tensors`, by name: those of x's shape, rowscale, and parameters."""
    expected = dict.fromkeys(("residual", "x1", "out", "residual_out"), x.shape) | {"rowscale": x.shape[:-1]}
    if tensors["weight"] is None:
        raise InvalidArgument(f"weight: expected shape {tuple(x.shape[-1:])}, got None")
    for name, t in tensors.items():
        shape = tuple(expected.get(name, x.shape[-1:]))
        if t is not None and tuple(t.shape) != shape:
            raise InvalidArgument(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
    if not 0 <= options.dropout_p <= 1:
        raise InvalidArgument(f"dropout_p: expected a probability, got {options.dropout_p}")
    rowscale = tensors.get("rowscale")
    if rowscale is not None and tensors["x1"] is not None:
        raise InvalidArgument("rowscale: expected none beside x1, got both")
    if rowscale is not None and rowscale.requires_grad:
        raise NotServed("rowscale has no gradient here; multiply x by it where it is learned")


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1, x.shape[-1])


def _at(block: slice, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t[block] for t in tensors)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class Branch(NamedTuple):
    """What x or x1 goes through on its way into the stream: shapes that broadcast against it."""

    rowscale: Tensor | None  # (..., 1)
    keep: Tensor | None  # bool (..., columns)
    dropout_p: float

    def rows(self) -> Branch:
        return Branch(_rows(self.rowscale), _rows(self.keep), self.dropout_p)

    def at(self, block: slice) -> Branch:
        return Branch(*_at(block, self.rowscale, self.keep), self.dropout_p)

    @property
    def is_plain(self) -> bool:
        return self.rowscale is None and self.keep is None


PLAIN = Branch(None, None, 0.0)


def passed(way: Branch, x: Tensor) -> Tensor:
    """Also the gradient's way back: all of it is multiplication."""
    if way.rowscale is not None:
        x = x * way.rowscale
    if way.keep is not None:
        x = torch.where(way.keep, x * (1 / (1 - way.dropout_p) if way.dropout_p < 1 else 0.0), 0.0)
    return x


def branches(options: Options, x: Tensor, x1: Tensor | None, rowscale: Tensor | None) -> tuple[Branch, Branch]:
    """Draws the dropout masks."""

    def keep(t: Tensor | None) -> Tensor | None:
        if t is None or options.dropout_p == 0:
            return None
        return torch.empty(t.shape, dtype=torch.bool, device=t.device).bernoulli_(1 - options.dropout_p)

    scale = None if rowscale is None else rowscale.detach()[..., None]
    return Branch(scale, keep(x), options.dropout_p), Branch(None, keep(x1), options.dropout_p)


def _affine(weights, biases, options: Options, dtype: torch.dtype) -> list[tuple[Tensor, Tensor | None]]:
    """(weight, bias) pairs in the dtype of the arithmetic."""
    shift = 1 if options.zero_centered_weight else 0
    pairs = zip(weights, biases, strict=True)
    return [(w.to(dtype) + shift, None if b is None else b.to(dtype)) for w, b in pairs if w is not None]


def _rstd(h: Tensor, eps: float) -> Tensor:
    """h (..., columns) -> 1 / root mean square (..., 1)."""
    return (torch.linalg.vector_norm(h, dim=-1, keepdim=True).square() / h.shape[-1] + eps).rsqrt()


def _normalised(h: Tensor, weight: Tensor, bias: Tensor | None, options: Options):
    """h (rows, columns) -> y, mean (rows, 1) or None, 1 / deviation (rows, 1). All in one dtype."""
    if not options.is_rms_norm:
        return torch.native_layer_norm(h, h.shape[-1:], weight, bias, options.eps)
    rstd = _rstd(h, options.eps)
    y = (h * rstd).mul_(weight)
    return y if bias is None else y.add_(bias), None, rstd


def composed(x, weights, biases, options: Options, residual, x1, way: Branch, way1: Branch, stream_dtype, out_dtype):
    """-> [y, ...], h, by operations that a compiled graph differentiates and fuses."""
    dtype = arithmetic(x, residual, x1, *weights)
    h = passed(way, x.to(dtype))
    if x1 is not None:
        h = h + passed(way1, x1.to(dtype))
    if residual is not None:
        h = h + residual
    ys = []
    for w, b in _affine(weights, biases, options, dtype):
        if options.is_rms_norm:
            y = h * _rstd(h, options.eps) * w
            y = y if b is None else y + b
        else:
            y = torch.nn.functional.layer_norm(h, h.shape[-1:], w, b, options.eps)
        ys.append(y.to(out_dtype or x.dtype))
    return ys, h.to(stream_dtype or (x.dtype if residual is None else residual.dtype))


def _gradients(dy: Tensor, h: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor, bias: Tensor | None):
    """-> dh (rows, columns), dweight (columns), dbias (columns) or None.

    RMSNorm: with t = dy * h, dweight = t' rstd, and dh = rstd * (dy * weight - h * rstd^2 * (t weight) / columns).
    """
    if mean is not None:
        wanted = [True, True, bias is not None]
        return torch.ops.aten.native_layer_norm_backward(dy, h, h.shape[-1:], mean, rstd, weight, bias, wanted)
    t = dy * h
    dweight = torch.mv(t.t(), rstd[:, 0])
    projection = torch.mv(t, weight)[:, None] * rstd.square() / h.shape[-1]
    dh = (dy * weight).addcmul_(h, projection, value=-1).mul_(rstd)
    return dh, dweight, None if bias is None else dy.sum(0)


def core_serves(options: Options, weights, biases, rows, dtypes) -> bool:
    """Whether the compiled core computes it: RMSNorm with one weight, of plain rows of the CPU in up to 32 bits.

    rows: those that are read, (rows, columns); dtypes: of what is written.
    """
    weight, *others = weights
    return (
        options.is_rms_norm
        and biases[0] is None
        and all(w is None for w in others)
        and all(t in CORE_DTYPES for t in dtypes)
        and rows[0].numel() > 0
        and all(t.stride(-1) == 1 for t in (*rows, weight))
        and core_reads(*rows, weight)
    )


def norm_forward(
    x,
    weights,
    biases,
    options: Options,
    residual=None,
    x1=None,
    way: Branch = PLAIN,
    way1: Branch = PLAIN,
    stream_dtype=None,
    out_dtype=None,
):
    """-> [y, ...], h, mean, rstd. x, residual, x1, y, h (..., columns); mean and rstd (rows, 1), mean None of RMSNorm.

    h is x itself where nothing comes before the norm and its dtype is that of the stream. The ways are in rows.
    """
    dtype = arithmetic(x, residual, x1, *weights)
    stream_dtype = stream_dtype or (x.dtype if residual is None else residual.dtype)
    out_dtype = out_dtype or x.dtype
    given = [_rows(t) for t in (x, x1, residual)]
    alone = residual is None and x1 is None and way.is_plain
    rows = given[0].shape[0]
    h_out = None if alone and stream_dtype == x.dtype else x.new_empty(given[0].shape, dtype=stream_dtype)
    ys_out = [x.new_empty(given[0].shape, dtype=out_dtype) for w in weights if w is not None]
    mean = None if options.is_rms_norm else x.new_empty((rows, 1), dtype=dtype)
    rstd = x.new_empty((rows, 1), dtype=dtype)
    read = [t for t in given if t is not None]
    if x1 is None and way.is_plain and core_serves(options, weights, biases, read, (stream_dtype, out_dtype)):
        _C.rms_norm(ys_out[0], h_out, rstd, given[0], given[2], weights[0], options.eps, options.zero_centered_weight)
    else:
        _forward_in_blocks(given, weights, biases, options, way, way1, ys_out, h_out, mean, rstd)
    return [y.reshape(x.shape) for y in ys_out], x if h_out is None else h_out.reshape(x.shape), mean, rstd


def _forward_in_blocks(given, weights, biases, options: Options, way, way1, ys_out, h_out, mean, rstd) -> None:
    """In PyTorch's operations. given: rows of x, x1 and the residual."""
    dtype = rstd.dtype
    pairs = _affine(weights, biases, options, dtype)
    for block in row_blocks(*given[0].shape, rstd.device):
        a, a1, r = _at(block, *given)
        h = passed(way.at(block), a.to(dtype))
        if a1 is not None:
            h = h + passed(way1.at(block), a1.to(dtype))
        if r is not None:
            h = h + r
        if h_out is not None:
            h_out[block] = h
        for (w, b), y_out in zip(pairs, ys_out, strict=True):
            y_out[block], m, rstd[block] = _normalised(h, w, b, options)
        if mean is not None:
            mean[block] = m


def norm_backward(dys, dstream, h, mean, rstd, weights, biases, options: Options, into):
    """-> gradients of the stream's inputs, and of [(weight, bias), ...] in their dtypes; None where nothing was asked.

    dys, dstream: gradients of the ys and of h, or None. into: for each input its dtype and its Branch, or None if there
    is no such input. Inputs of one dtype on the same way get one tensor.
    """
    given = [(w, b) for w, b in zip(weights, biases, strict=True) if w is not None]
    if dstream is None and all(dy is None for dy in dys):
        return [None] * len(into), [(None, None)] * len(given)
    h_rows, dstream, dys = _rows(h), _rows(dstream), [_rows(t) for t in dys]
    results, which = [], []
    for want in into:
        plain = want is not None and want[1].is_plain
        same = [i for i, (t, w) in enumerate(results) if plain and w is None and t.dtype == want[0]]
        which.append(None if want is None else same[0] if same else len(results))
        if want is not None and not same:
            results.append((h.new_empty(h_rows.shape, dtype=want[0]), None if plain else want[1]))
    read = [t for t in (h_rows, dys[0], dstream) if t is not None]
    served = dys[0] is not None and rstd.dtype == torch.float32 and all(way is None for _, way in results)
    if served and core_serves(options, weights, biases, read, [t.dtype for t, _ in results]):
        dresidual = results[1][0] if len(results) == 2 else None
        dweight = torch.empty_like(weights[0])
        _C.rms_norm_backward(
            results[0][0], dresidual, dweight, dys[0], dstream, h_rows, rstd, weights[0], options.zero_centered_weight
        )
        parameters = [(dweight, None)]
    else:
        sums = _backward_in_blocks(dys, dstream, h_rows, mean, rstd, weights, biases, options, results)
        parameters = [
            tuple(None if g is None else g.to(p.dtype) for g, p in zip(pair, own, strict=True))
            for pair, own in zip(sums, given, strict=True)
        ]
    # One tensor for all who share it: autograd makes two gradients of two leaves only of what it sees twice.
    gradients = [out.reshape(h.shape) for out, _ in results]
    return [None if i is None else gradients[i] for i in which], parameters


def _backward_in_blocks(dys, dstream, h, mean, rstd, weights, biases, options: Options, results) -> list:
    """In PyTorch's operations: writes the results, -> gradients of [(weight, bias), ...] in their dtype."""
    dtype = rstd.dtype
    pairs = _affine(weights, biases, options, dtype)
    sums = [(None, None)] * len(pairs)
    for block in row_blocks(*h.shape, h.device):
        x, (m, r) = h[block].to(dtype), _at(block, mean, rstd)
        dh = None if dstream is None else dstream[block].to(dtype)
        for i, ((w, b), dy) in enumerate(zip(pairs, dys, strict=True)):
            if dy is not None:
                part, dw, db = _gradients(dy[block].to(dtype), x, m, r, w, b)
                dh, sums[i] = _add(dh, part), (_add(sums[i][0], dw), _add(sums[i][1], db))
        for out, way in results:
            out[block] = dh if way is None else passed(way.at(block), dh)
    return sums
