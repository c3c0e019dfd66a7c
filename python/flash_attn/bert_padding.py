"""Padded batches (batch, seqlen, ...) to packed rows (total, ...) and back, differentiably. Pure PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn._errors import InvalidArgument


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


def _check_shape(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    if mask.dim() != 2 or mask.shape != hidden_states.shape[:2]:
        expected = tuple(hidden_states.shape[:2])
        raise InvalidArgument(f"{name}: expected shape (batch, seqlen) = {expected}, got {tuple(mask.shape)}")


def _longest(lengths: Tensor, checks: list[tuple[Tensor, str]]) -> int:
    """lengths (...) -> the largest, if all checks hold: each is a tensor () bool, and what is wrong if it is False.

    The caller waits for one number as it is, so the checks ride on it: -1 says that one has failed. A compiled graph
    goes on without looking, and asserts in its place.
    """
    longest = lengths.max() if lengths.numel() else lengths.new_zeros(())
    if torch.compiler.is_compiling():
        for holds, message in checks:
            torch._assert_async(holds, message)
        return int(longest)
    longest = longest.long()
    for holds, _ in checks:
        longest = longest.masked_fill(~holds, -1)
    if (longest := int(longest)) == -1:
        raise InvalidArgument(next(message for holds, message in checks if not holds))
    return longest


def _ones_and_zeros(name: str, mask: Tensor) -> list[tuple[Tensor, str]]:
    """An additive mask (0 and -inf) or the ids of packed sequences (1, 2, ...) would give lengths, and wrong ones."""
    if mask.dtype == torch.bool:
        return []
    holds = ((mask == 0) | (mask == 1)).all()
    return [(holds, f"{name}: expected 1 or True for tokens and 0 or False for others, got other values")]


def unpad_input(hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None):
    """Drops the padding.

    hidden_states (batch, seqlen, ...), attention_mask (batch, seqlen), 1 or True for tokens and 0 or False for padding;
    unused_mask: the same, of other tokens, that keep their place in the packed rows and take no part.
    -> the rows (total, ...), their indices in the flattened batch, cu_seqlens (batch + 1) int32, the longest sequence's
    length, and each sequence's number of tokens in attention_mask (batch) int32. The lengths count unused tokens.
    """
    _check_shape("attention_mask", attention_mask, hidden_states)
    checks = _ones_and_zeros("attention_mask", attention_mask)
    kept = attention_mask
    if unused_mask is not None:
        _check_shape("unused_mask", unused_mask, hidden_states)
        checks += _ones_and_zeros("unused_mask", unused_mask)
        twice = ((attention_mask != 0) & (unused_mask != 0)).any()
        checks.append((~twice, "unused_mask: expected no token that attention_mask has, got one in both"))
        kept = attention_mask + unused_mask
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    longest = _longest(lengths, checks)
    indices = kept.flatten().nonzero().flatten()
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _starts(lengths), longest, used


def unpad_input_for_concatenated_sequences(hidden_states: Tensor, attention_mask_in_length: Tensor):
    """The same for several sequences in one row of the batch.

    attention_mask_in_length (batch, seqlen): each row begins with the lengths of its sequences, then zeros.
    -> the rows, their indices, cu_seqlens of all sequences, the longest sequence's length.
    """
    name, seqlen = "attention_mask_in_length", attention_mask_in_length.shape[-1]
    _check_shape(name, attention_mask_in_length, hidden_states)
    if attention_mask_in_length.dtype == torch.bool:
        raise InvalidArgument(f"{name}: expected lengths of sequences, got a bool mask: that is what unpad_input takes")
    whole = (attention_mask_in_length >= 0) & (attention_mask_in_length == attention_mask_in_length.round())
    tokens = attention_mask_in_length.sum(dim=-1)
    checks = [
        (whole.all(), f"{name}: expected lengths of sequences, 0 or more, got other values"),
        ((tokens <= seqlen).all(), f"{name}: expected at most seqlen = {seqlen} tokens in a row, got more"),
    ]
    kept = torch.arange(seqlen, device=tokens.device)[None, :] < tokens[:, None]
    longest = _longest(attention_mask_in_length, checks)
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    indices = kept.flatten().nonzero().flatten()
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _starts(lengths), longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The way back: rows (total, ...) -> (batch, seqlen, ...), zero where there was padding."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.view(batch, seqlen, *rows.shape[1:])
