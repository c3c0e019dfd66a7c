"""Dropout, scales, residual sum and LayerNorm: the functions of upstream's older extension `dropout_layer_norm`.

    h = dropout(x0 * rowscale) * layerscale + residual,  z = norm(h)

They are `ops.triton.layer_norm` with two scales more, and with the rows that drop path leaves out. `ops.rms_norm` has
the same functions for RMSNorm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._errors import InvalidArgument
from flash_attn.ops.triton.layer_norm import norm_fn

__all__ = [
    "DropoutAddLayerNorm",
    "DropoutAddLayerNormFn",
    "DropoutAddLayerNormParallelResidualFn",
    "DropoutAddLayerNormSubsetFn",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_parallel_residual",
    "dropout_add_layer_norm_subset",
    "layer_norm",
]


def _scaled(x0: Tensor, colscale: Tensor | None) -> Tensor:
    """x0 * colscale, not rounded to 16 bits."""
    return x0 if colscale is None else x0.to(torch.promote_types(x0.dtype, torch.float32)) * colscale


def _mask(keep: Tensor | None, like: Tensor) -> Tensor:
    """The dropout mask as upstream returns it: uint8, ones without dropout."""
    return torch.ones_like(like, dtype=torch.uint8) if keep is None else keep.to(torch.uint8)


def _stream_dtype(x0: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    return residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x0.dtype


class DropoutAddLayerNormFn:
    """`apply` as of upstream's autograd function."""

    @staticmethod
    def apply(
        x0, residual, gamma, beta, rowscale, colscale, dropout_p, epsilon, residual_in_fp32=False, prenorm=False,
        is_rms_norm=False, return_dmask=False,
    ):  # fmt: skip
        """-> z [, h if prenorm] [, mask uint8 if return_dmask]."""
        kept = _stream_dtype(x0, residual, residual_in_fp32)
        z, h, keep, _ = norm_fn(
            _scaled(x0, colscale), gamma, beta, residual, None, None, None, epsilon, dropout_p, rowscale, True,
            residual_in_fp32, False, is_rms_norm, True, x0.dtype, None, None,
        )  # fmt: skip
        results = (z, h.to(kept)) if prenorm else (z,)
        results += (_mask(keep, x0),) if return_dmask else ()
        return results if len(results) > 1 else z


def _rows_of_subset(subset: Tensor, count: int) -> Tensor:
    """subset (rows), 1-based places or 0 for none -> (count): the row at each place."""
    rows = torch.zeros(count + 1, dtype=torch.int64, device=subset.device)
    return rows.scatter_(0, subset, torch.arange(subset.numel(), device=subset.device))[1:]


class DropoutAddLayerNormSubsetFn:
    """`apply` as of upstream's autograd function."""

    @staticmethod
    def apply(
        x0, residual, gamma, beta, colscale, x0_subset, out_subset, dropout_p, epsilon, rowscale_const, out_numrows,
        residual_in_fp32=False, prenorm=False, is_rms_norm=False, return_dmask=False,
    ):  # fmt: skip
        """-> z of the chosen rows [, h of all rows if prenorm] [, mask of x0 uint8 if return_dmask]."""
        columns, tail = x0.shape[-1], x0.shape[1:]
        x, count = x0.reshape(-1, columns), x0.shape[:-1].numel()
        rowscale = None
        if x0_subset is not None:
            places = x0_subset.reshape(-1).long()
            present = places > 0
            if not count:
                x = x.new_zeros((1, columns))
            x = x.index_select(0, (places - 1).clamp(min=0))
            rowscale = present.to(torch.promote_types(x0.dtype, torch.float32)) * rowscale_const
        elif rowscale_const != 1.0:
            rowscale = torch.full((count,), rowscale_const, dtype=torch.float32, device=x0.device)
        rows = x.shape[0]
        if residual is not None:
            residual = residual.reshape(-1, columns)
            if residual.shape[0] != rows:
                raise InvalidArgument(f"residual: expected {rows} rows, as x0_subset, got {residual.shape[0]}")
        z, h, mask = DropoutAddLayerNormFn.apply(
            x, residual, gamma, beta, rowscale, colscale, dropout_p, epsilon, residual_in_fp32, True, is_rms_norm, True
        )
        if out_subset is not None:
            z = z.index_select(0, _rows_of_subset(out_subset.reshape(-1).long(), out_numrows))
        if x0_subset is not None:
            mask = mask.index_select(0, _rows_of_subset(places, count))
        results = (z.reshape(-1, *tail),)
        results += (h.reshape(-1, *tail),) if prenorm else ()
        results += (mask.reshape(x0.shape),) if return_dmask else ()
        return results if len(results) > 1 else results[0]


class DropoutAddLayerNormParallelResidualFn:
    """`apply` as of upstream's autograd function."""

    @staticmethod
    def apply(
        x0, x1, residual, gamma0, beta0, gamma1, beta1, dropout_p, epsilon, residual_in_fp32=False, prenorm=False,
        is_rms_norm=False, return_dmask=False,
    ):  # fmt: skip
        """-> z0, z1 (None without gamma1) [, h if prenorm] [, masks of x0 and x1 uint8 if return_dmask]."""
        *zs, h, keep, keep1 = norm_fn(
            x0, gamma0, beta0, residual, x1, gamma1, beta1, epsilon, dropout_p, None, True, residual_in_fp32, False,
            is_rms_norm, True, None, None, None,
        )  # fmt: skip
        results = (*zs, None) if gamma1 is None else tuple(zs)
        results += (h,) if prenorm else ()
        return results + ((_mask(keep, x0), _mask(keep1, x0)) if return_dmask else ())


def layer_norm(x, weight, bias, epsilon):
    """LayerNorm of x (..., columns) with weight and bias (columns)."""
    return DropoutAddLayerNormFn.apply(x, None, weight, bias, None, None, 0.0, epsilon)


def dropout_add_layer_norm(
    x0,
    residual,
    weight,
    bias,
    dropout_p,
    epsilon,
    rowscale=None,
    layerscale=None,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """x0, residual (..., columns); weight, bias, layerscale (columns); rowscale (...), without gradient.

    -> z in x0's dtype [, h if prenorm] [, the mask, uint8, if return_dropout_mask]. h has the residual's dtype; without
    a residual that is fp32 if residual_in_fp32.
    """
    return DropoutAddLayerNormFn.apply(
        x0, residual, weight, bias, rowscale, layerscale, dropout_p, epsilon, residual_in_fp32, prenorm, False,
        return_dropout_mask,
    )  # fmt: skip


def dropout_add_layer_norm_subset(
    x0,
    residual,
    weight,
    bias,
    dropout_p,
    epsilon,
    layerscale=None,
    x0_subset=None,
    out_subset=None,
    rowscale_const=1.0,
    out_numrows=0,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """dropout_add_layer_norm where some rows have no x0, and some results are not wanted (drop path).

    x0_subset (rows): the row's place in x0, counted from 1, or 0 for none; out_subset (rows): its place in z, or 0, of
    out_numrows places. rowscale_const multiplies x0. residual and h have all rows.
    """
    return DropoutAddLayerNormSubsetFn.apply(
        x0, residual, weight, bias, layerscale, x0_subset, out_subset, dropout_p, epsilon, rowscale_const, out_numrows,
        residual_in_fp32, prenorm, False, return_dropout_mask,
    )  # fmt: skip


def dropout_add_layer_norm_parallel_residual(
    x0,
    x1,
    residual,
    weight0,
    bias0,
    weight1,
    bias1,
    dropout_p,
    epsilon,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """h = dropout(x0) + dropout(x1) + residual -> z0, z1 by two weights [, h if prenorm] [, two masks]."""
    return DropoutAddLayerNormParallelResidualFn.apply(
        x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, residual_in_fp32, prenorm, False,
        return_dropout_mask,
    )  # fmt: skip


class DropoutAddLayerNorm(torch.nn.Module):
    """dropout_add_layer_norm with its weight and bias (hidden_size); dropout `p` in training."""

    def __init__(self, hidden_size, prenorm=False, p=0.0, eps=1e-5, residual_in_fp32=False, device=None, dtype=None):
        super().__init__()
        self.prenorm, self.p, self.epsilon, self.residual_in_fp32 = prenorm, p, eps, residual_in_fp32
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        torch.nn.init.ones_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x0, residual=None):
        return dropout_add_layer_norm(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.epsilon,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )
