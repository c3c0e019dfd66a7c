"""Padded batches (batch, seqlen, ...) to packed rows (total, ...) and back, differentiably. Pure PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


class IndexFirstAxis(torch.autograd.Function):
    """x (rows, ...), indices (n) -> (n, ...): x[indices]."""

    @staticmethod
    def forward(ctx, x: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.rows = x.shape[0]
        return x[indices]

    @staticmethod
    def backward(ctx, dy: Tensor):
        (indices,) = ctx.saved_tensors
        dx = dy.new_zeros((ctx.rows, *dy.shape[1:]))
        return dx.index_add_(0, indices, dy), None


class IndexPutFirstAxis(torch.autograd.Function):
    """values (n, ...), indices (n) -> (rows, ...): zeros, and values where the indices say."""

    @staticmethod
    def forward(ctx, values: Tensor, indices: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(indices)
        y = values.new_zeros((rows, *values.shape[1:]))
        y[indices] = values
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        (indices,) = ctx.saved_tensors
        return dy[indices], None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """-> x[indices], and x itself for a residual branch: both gradients meet in one buffer."""

    @staticmethod
    def forward(ctx, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(indices)
        return x[indices], x.detach()

    @staticmethod
    def backward(ctx, dy: Tensor, dresidual: Tensor):
        (indices,) = ctx.saved_tensors
        return dresidual.index_add(0, indices, dy), None


index_first_axis = IndexFirstAxis.apply
index_put_first_axis = IndexPutFirstAxis.apply
index_first_axis_residual = IndexFirstAxisResidual.apply


def _starts(lengths: Tensor) -> Tensor:
    """(n) -> (n + 1) int32: where each sequence begins."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def unpad_input(hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None):
    """Drops the padding.

    hidden_states (batch, seqlen, ...), attention_mask (batch, seqlen), 1 or True for tokens; unused_mask: the same, of
    tokens that keep their place in the packed rows and take no part.
    -> the rows (total, ...), their indices in the flattened batch, cu_seqlens (batch + 1) int32, the longest sequence's
    length, and each sequence's number of tokens in attention_mask (batch) int32. The lengths count unused tokens.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _starts(lengths), longest, used


def unpad_input_for_concatenated_sequences(hidden_states: Tensor, attention_mask_in_length: Tensor):
    """The same for several sequences in one row of the batch.

    attention_mask_in_length (batch, seqlen): each row begins with the lengths of its sequences, then zeros.
    -> the rows, their indices, cu_seqlens of all sequences, the longest sequence's length.
    """
    seqlen = attention_mask_in_length.shape[-1]
    tokens = attention_mask_in_length.sum(dim=-1)
    kept = torch.arange(seqlen, device=tokens.device)[None, :] < tokens[:, None]
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    indices = kept.flatten().nonzero().flatten()
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _starts(lengths), longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The way back: rows (total, ...) -> (batch, seqlen, ...), zero where there was padding."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
