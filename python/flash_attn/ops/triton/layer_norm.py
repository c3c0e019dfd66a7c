"""Dropout, residual sum and LayerNorm or RMSNorm in one function, with modules and references."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flash_attn._errors import InvalidArgument
from flash_attn.ops._linear import linear_dtype, parameter_gradients
from flash_attn.ops._norm import PLAIN, Branch, Options, branches, check, composed, norm_backward, norm_forward

__all__ = [
    "LayerNormFn",
    "LayerNormLinearFn",
    "RMSNorm",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "rms_norm_fn",
    "rms_norm_ref",
]


def _written(given: Tensor | None, result: Tensor) -> Tensor:
    return result if given is None else given.copy_(result)


class LayerNormFn(torch.autograd.Function):
    """Both norms: layer_norm_fn says what the arguments are."""

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        residual=None,
        x1=None,
        weight1=None,
        bias1=None,
        eps=1e-6,
        dropout_p=0.0,
        rowscale=None,
        prenorm=False,
        residual_in_fp32=False,
        zero_centered_weight=False,
        is_rms_norm=False,
        return_dropout_mask=False,
        out_dtype=None,
        out=None,
        residual_out=None,
    ):
        options = Options(eps, is_rms_norm, zero_centered_weight, dropout_p)
        check(
            x, options, weight=weight, bias=bias, residual=residual, x1=x1, weight1=weight1, bias1=bias1,
            rowscale=rowscale, out=out, residual_out=residual_out,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        way, way1 = (w.rows() for w in branches(options, x, x1, rowscale))
        stream_dtype = torch.float32 if residual is None and residual_in_fp32 else None
        ys, h, mean, rstd = norm_forward(
            x, (weight, weight1), (bias, bias1), options, residual, x1, way, way1, stream_dtype,
            out_dtype if out is None else out.dtype,
        )  # fmt: skip
        ys[0], h = _written(out, ys[0]), _written(residual_out, h)
        keeps = way.keep, way1.keep
        ctx.save_for_backward(h, weight, bias, weight1, bias1, mean, rstd, way.rowscale, *keeps)
        ctx.options, ctx.prenorm, ctx.outputs = options, prenorm, len(ys)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, x1)]
        results = [*ys, h] if prenorm else ys
        if return_dropout_mask:
            masks = [None if k is None else k.reshape(x.shape) for k in keeps]
            ctx.mark_non_differentiable(*(m for m in masks if m is not None))
            results = [*results, *masks]
        return results[0] if len(results) == 1 else tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        h, weight, bias, weight1, bias1, mean, rstd, rowscale, keep, keep1 = ctx.saved_tensors
        p = ctx.options.dropout_p
        ways = Branch(rowscale, keep, p), PLAIN, Branch(None, keep1, p)
        into = [None if d is None else (d, w) for d, w in zip(ctx.dtypes, ways, strict=True)]
        dstream = grads[ctx.outputs] if ctx.prenorm else None
        (dx, dresidual, dx1), parameters = norm_backward(
            grads[: ctx.outputs], dstream, h, mean, rstd, (weight, weight1), (bias, bias1), ctx.options, into
        )
        dw, db = parameters[0]
        dw1, db1 = parameters[1] if ctx.outputs == 2 else (None, None)
        return dx, dw, db, dresidual, dx1, dw1, db1, *[None] * 11


def norm_fn(
    x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
    zero_centered_weight, is_rms_norm, return_dropout_mask, out_dtype, out, residual_out,
):  # fmt: skip
    """LayerNormFn, or in a compiled graph the operations themselves."""
    if not torch.compiler.is_compiling():
        return LayerNormFn.apply(
            x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
            zero_centered_weight, is_rms_norm, return_dropout_mask, out_dtype, out, residual_out,
        )  # fmt: skip
    options = Options(eps, is_rms_norm, zero_centered_weight, dropout_p)
    check(
        x, options, weight=weight, bias=bias, residual=residual, x1=x1, weight1=weight1, bias1=bias1,
        rowscale=rowscale, out=out, residual_out=residual_out,
    )  # fmt: skip
    way, way1 = branches(options, x, x1, rowscale)
    stream_dtype = torch.float32 if residual is None and residual_in_fp32 else None
    ys, h = composed(
        x, (weight, weight1), (bias, bias1), options, residual, x1, way, way1, stream_dtype,
        out_dtype if out is None else out.dtype,
    )  # fmt: skip
    ys[0], h = _written(out, ys[0]), _written(residual_out, h)
    results = [*ys, h] if prenorm else ys
    results = [*results, way.keep, way1.keep] if return_dropout_mask else results
    return results[0] if len(results) == 1 else tuple(results)


def layer_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    zero_centered_weight=False,
    is_rms_norm=False,
    return_dropout_mask=False,
    out_dtype=None,
    out=None,
    residual_out=None,
):
    """h = dropout(rowscale * x) + dropout(x1) + residual, normalised over the last dimension, times weight, plus bias.

    x, residual, x1 (..., columns); weight, bias, weight1, bias1 (columns); rowscale (...), not beside x1, without
    gradient. -> y [, y1 by weight1 and bias1] [, h if prenorm] [, dropout masks of x and x1, bool, if
    return_dropout_mask: None where nothing was dropped]. A tensor if that is all. y in x's dtype or out_dtype; h in
    residual's dtype, without one in fp32 if residual_in_fp32, else in x's. eps: under the root. zero_centered_weight:
    weight + 1 counts. is_rms_norm: without the mean. out, residual_out: memory for y and h. ValueError for shapes that
    do not fit.
    """
    return norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        zero_centered_weight, is_rms_norm, return_dropout_mask, out_dtype, out, residual_out,
    )  # fmt: skip


def rms_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    zero_centered_weight=False,
    return_dropout_mask=False,
    out_dtype=None,
    out=None,
    residual_out=None,
):
    """layer_norm_fn with is_rms_norm=True."""
    return norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        zero_centered_weight, True, return_dropout_mask, out_dtype, out, residual_out,
    )  # fmt: skip


class RMSNorm(torch.nn.Module):
    """rms_norm_fn with a weight (hidden_size), without bias; dropout in training."""

    def __init__(self, hidden_size, eps=1e-5, dropout_p=0.0, zero_centered_weight=False, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.drop = torch.nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self):
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


class LayerNormLinearFn(torch.autograd.Function):
    """A linear layer of a norm. The norm's output is not kept: the backward makes it again."""

    @staticmethod
    def forward(
        ctx,
        x,
        norm_weight,
        norm_bias,
        linear_weight,
        linear_bias,
        residual=None,
        eps=1e-6,
        prenorm=False,
        residual_in_fp32=False,
        is_rms_norm=False,
    ):
        options = Options(eps, is_rms_norm)
        check(x, options, weight=norm_weight, bias=norm_bias, residual=residual)
        ctx.set_materialize_grads(False)
        out_dtype = linear_dtype(x)
        stream_dtype = torch.float32 if residual is None and residual_in_fp32 else None
        (y,), h, mean, rstd = norm_forward(
            x, (norm_weight,), (norm_bias,), options, residual, stream_dtype=stream_dtype, out_dtype=out_dtype
        )
        ctx.save_for_backward(h, norm_weight, norm_bias, linear_weight, linear_bias, mean, rstd)
        ctx.options, ctx.prenorm, ctx.out_dtype = options, prenorm, out_dtype
        ctx.dtypes = [None if t is None else t.dtype for t in (x, residual)]
        out = F.linear(y, linear_weight.to(out_dtype), None if linear_bias is None else linear_bias.to(out_dtype))
        return (out, h) if prenorm else out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *dstream):
        h, norm_weight, norm_bias, linear_weight, linear_bias, mean, rstd = ctx.saved_tensors
        dy = dlinear_weight = dlinear_bias = None
        if dout is not None:
            dy = dout @ linear_weight.to(dout.dtype)
            (y,), *_ = norm_forward(h, (norm_weight,), (norm_bias,), ctx.options, out_dtype=ctx.out_dtype)
            dlinear_weight, dlinear_bias = parameter_gradients(dout, y, linear_weight, linear_bias)
        into = [None if d is None else (d, PLAIN) for d in ctx.dtypes]
        (dx, dresidual), ((dw, db),) = norm_backward(
            [dy], dstream[0] if ctx.prenorm else None, h, mean, rstd, (norm_weight,), (norm_bias,), ctx.options, into
        )
        return dx, dw, db, dlinear_weight, dlinear_bias, dresidual, None, None, None, None


def layer_norm_linear_fn(
    x,
    norm_weight,
    norm_bias,
    linear_weight,
    linear_bias,
    residual=None,
    eps=1e-6,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
):
    """norm(x + residual) @ linear_weight' + linear_bias -> out (..., out_features) [, x + residual if prenorm].

    x, residual (..., columns), norm_weight, norm_bias (columns), linear_weight (out_features, columns), linear_bias
    (out_features). The linear layer runs in x's dtype, or in autocast's.
    """
    if not torch.compiler.is_compiling():
        return LayerNormLinearFn.apply(
            x, norm_weight, norm_bias, linear_weight, linear_bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm
        )
    y, h = norm_fn(
        x, norm_weight, norm_bias, residual, None, None, None, eps, 0.0, None, True, residual_in_fp32, False,
        is_rms_norm, False, linear_dtype(x), None, None,
    )  # fmt: skip
    bias = None if linear_bias is None else linear_bias.to(y.dtype)
    out = F.linear(y, linear_weight.to(y.dtype), bias)
    return (out, h) if prenorm else out


def _reference(norm, x, weight, bias, residual, x1, weight1, bias1, dropout_p, rowscale, prenorm, zero_centered_weight,
               dropout_mask, dropout_mask1, upcast):  # fmt: skip
    """The formula, operation by operation in the inputs' dtypes, or in fp32 if `upcast`."""
    dtype = x.dtype
    if x1 is not None and rowscale is not None:
        raise InvalidArgument("rowscale: expected none beside x1, got both")
    if upcast:
        x, weight, bias, residual, x1, weight1, bias1 = (
            None if t is None else t.float() for t in (x, weight, bias, residual, x1, weight1, bias1)
        )

    def dropped(t, mask):
        if dropout_p == 0.0:
            return t
        return F.dropout(t, dropout_p) if mask is None else t.masked_fill(~mask, 0.0) / (1.0 - dropout_p)

    h = dropped(x if rowscale is None else x * rowscale[..., None], dropout_mask)
    if x1 is not None:
        h = h + dropped(x1, dropout_mask1)
    if residual is not None:
        h = (h + residual).to(h.dtype)
    shift = 1.0 if zero_centered_weight else 0.0
    ys = [norm(h, w + shift, b).to(dtype) for w, b in ((weight, bias), (weight1, bias1)) if w is not None]
    results = [*ys, h] if prenorm else ys
    return results[0] if len(results) == 1 else tuple(results)


def layer_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    zero_centered_weight=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
):
    """layer_norm_fn in plain operations, to compare with. The masks are bool, True where an element stays."""

    def norm(h, weight, bias):
        return F.layer_norm(h.to(weight.dtype), h.shape[-1:], weight, bias, eps)

    return _reference(norm, x, weight, bias, residual, x1, weight1, bias1, dropout_p, rowscale, prenorm,
                      zero_centered_weight, dropout_mask, dropout_mask1, upcast)  # fmt: skip


def rms_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    zero_centered_weight=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
):
    """rms_norm_fn in plain operations, to compare with. The masks are bool, True where an element stays."""

    def norm(h, weight, bias):
        y = h / torch.sqrt(h.square().mean(dim=-1, keepdim=True) + eps) * weight
        return y if bias is None else y + bias

    return _reference(norm, x, weight, bias, residual, x1, weight1, bias1, dropout_p, rowscale, prenorm,
                      zero_centered_weight, dropout_mask, dropout_mask1, upcast)  # fmt: skip
