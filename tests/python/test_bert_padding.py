"""Padding and unpadding: values, gradients, and attention through them."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from flash_attn import bert_padding, flash_attn_func, flash_attn_varlen_qkvpacked_func
from flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])


@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.int()])
def test_round_trip(mask):
    x = torch.randn(4, 5, 3, 2)
    rows, indices, cu_seqlens, longest, used = unpad_input(x, mask)
    assert torch.equal(rows, x[MASK.bool()]) and indices.tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 15]
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 3, 8, 8, 9]
    assert longest == 5 and type(longest) is int and used.tolist() == [3, 5, 0, 1] and used.dtype == torch.int32
    assert torch.equal(pad_input(rows, indices, 4, 5), x * MASK[..., None, None])


def test_unused_tokens_keep_their_place():
    unused = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
    rows, indices, cu_seqlens, longest, used = unpad_input(torch.randn(4, 5, 2), MASK, unused)
    assert rows.shape == (12, 2) and indices.numel() == 12
    assert cu_seqlens.tolist() == [0, 5, 10, 10, 12] and longest == 5 and used.tolist() == [3, 5, 0, 1]


def test_concatenated_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 2)
    rows, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and cu_seqlens.dtype == torch.int32 and longest == 6
    assert torch.equal(rows, torch.cat([x[0, :5], x[1, :5], x[2]]))
    assert torch.equal(pad_input(rows, indices, 3, 6)[0, :5], x[0, :5])


def test_gradients():
    indices = torch.tensor([3, 0, 4])
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    values = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x, indices), x)
    assert torch.autograd.gradcheck(lambda v: index_put_first_axis(v, indices, 6), values)
    assert torch.autograd.gradcheck(lambda x: index_first_axis_residual(x, indices), x)
    twice = torch.tensor([1, 1, 2])
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x, twice), x)


def test_signatures():
    def names(f):
        return list(inspect.signature(f).parameters)

    assert names(unpad_input) == ["hidden_states", "attention_mask", "unused_mask"]
    assert names(pad_input) == ["hidden_states", "indices", "batch", "seqlen"]
    assert names(bert_padding.unpad_input_for_concatenated_sequences) == ["hidden_states", "attention_mask_in_length"]


def test_attention_without_padding_is_attention_of_each_sequence():
    qkv = torch.randn(4, 5, 3, 2, 8, requires_grad=True)
    rows, indices, cu_seqlens, longest, _ = unpad_input(qkv, MASK)
    out = pad_input(flash_attn_varlen_qkvpacked_func(rows, cu_seqlens, longest, causal=True), indices, 4, 5)
    for b, n in enumerate([3, 5, 0, 1]):
        expected = flash_attn_func(*qkv[b : b + 1, :n].unbind(2), causal=True)
        assert torch.equal(out[b : b + 1, :n], expected) and not out[b, n:].any()
    (dqkv,) = torch.autograd.grad(out.sum(), qkv)
    assert dqkv[1].any() and not dqkv[2].any() and not dqkv[0, 3:].any()


ONES = torch.ones(2, 4, dtype=torch.int64)
HALF = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
PACKED_IDS = torch.tensor([[1, 1, 2, 2], [1, 1, 1, 0]])
VALUES = "expected 1 or True for tokens and 0 or False for others, got other values"
MALFORMED = {
    "additive": ((HALF.float().log(),), f"attention_mask: {VALUES}"),
    "additive, finite": (((1 - HALF) * torch.finfo(torch.float32).min,), f"attention_mask: {VALUES}"),
    "packed ids": ((PACKED_IDS,), f"attention_mask: {VALUES}"),
    "NaN": ((torch.full((2, 4), torch.nan),), f"attention_mask: {VALUES}"),
    "half a token": ((HALF * 0.5,), f"attention_mask: {VALUES}"),
    "unused: packed ids": ((HALF, (1 - HALF) * 2), f"unused_mask: {VALUES}"),
    "unused: negative": ((HALF, -HALF), f"unused_mask: {VALUES}"),
    "unused: in both": ((HALF, HALF), "unused_mask: expected no token that attention_mask has, got one in both"),
    "unused: in both, bool": ((ONES.bool(), HALF.bool()), "unused_mask: expected no token that attention_mask has"),
    "shape": ((ONES[:, :3],), "attention_mask: expected shape (batch, seqlen) = (2, 4), got (2, 3)"),
    "four dimensions": (
        (ONES[:, None, None],),
        "attention_mask: expected shape (batch, seqlen) = (2, 4), got (2, 1, 1",
    ),
    "unused: shape": ((ONES, ONES[:1]), "unused_mask: expected shape (batch, seqlen) = (2, 4), got (1, 4)"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_masks_that_are_none(case):
    masks, message = MALFORMED[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        unpad_input(torch.randn(2, 4, 3), *masks)


LENGTHS = "attention_mask_in_length: expected"
MALFORMED_LENGTHS = {
    "negative": ([[2, -1, 0, 0], [4, 0, 0, 0]], f"{LENGTHS} lengths of sequences, 0 or more, got other values"),
    "negative that sums to 0": ([[2, -2, 0, 0], [4, 0, 0, 0]], f"{LENGTHS} lengths of sequences, 0 or more"),
    "too many": ([[2, 3, 0, 0], [4, 0, 0, 0]], f"{LENGTHS} at most seqlen = 4 tokens in a row, got more"),
    "too long": ([[5, 0, 0, 0], [4, 0, 0, 0]], f"{LENGTHS} at most seqlen = 4 tokens"),
    "half a token": ([[1.5, 0, 0, 0], [4, 0, 0, 0]], f"{LENGTHS} lengths of sequences"),
    "NaN": ([[torch.nan, 0, 0, 0], [4, 0, 0, 0]], f"{LENGTHS} lengths of sequences"),
    "a mask": ([[True, True, False, False]] * 2, f"{LENGTHS} lengths of sequences, got a bool mask"),
    "shape": ([[2, 0, 0], [3, 0, 0]], f"{LENGTHS} shape (batch, seqlen) = (2, 4), got (2, 3)"),
}


@pytest.mark.parametrize("case", MALFORMED_LENGTHS)
def test_lengths_that_are_none(case):
    lengths, message = MALFORMED_LENGTHS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        unpad_input_for_concatenated_sequences(torch.randn(2, 4, 3), torch.tensor(lengths))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16])
def test_every_dtype_of_ones_and_zeros(dtype):
    x = torch.randn(4, 5, 2)
    expected = unpad_input(x, MASK)
    for got in (unpad_input(x, MASK.to(dtype)), unpad_input(x, MASK.to(dtype), torch.zeros(4, 5).to(dtype))):
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float32])
def test_every_dtype_of_lengths(dtype):
    lengths, x = torch.tensor([[1, 2, 0, 0], [4, 0, 0, 0]]), torch.randn(2, 4, 3)
    got, expected = (unpad_input_for_concatenated_sequences(x, y) for y in (lengths.to(dtype), lengths))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(got, expected, strict=True))


def test_empty_batches():
    rows, _, cu_seqlens, longest, _ = unpad_input(torch.randn(0, 5, 2), torch.ones(0, 5))
    assert rows.shape == (0, 2) and cu_seqlens.tolist() == [0] and longest == 0
    rows, _, cu_seqlens, longest = unpad_input_for_concatenated_sequences(torch.randn(2, 5, 2), torch.zeros(2, 5).int())
    assert rows.shape == (0, 2) and cu_seqlens.tolist() == [0] and longest == 0


GOOD = {
    unpad_input: (HALF, 1 - HALF),
    unpad_input_for_concatenated_sequences: (torch.tensor([[1, 2, 0, 0], [4, 0, 0, 0]]),),
}
BAD = {
    unpad_input: (PACKED_IDS, HALF),
    unpad_input_for_concatenated_sequences: (torch.tensor([[3, 2, 0, 0], [4, 0, 0, 0]]),),
}


@pytest.mark.parametrize("function", GOOD)
def test_compiled_in_one_graph_with_its_checks(function):
    """One graph, where torch is told to keep what depends on data."""
    torch.compiler.reset()
    x = torch.randn(2, 4, 3)
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        for a, b in zip(compiled(x, *GOOD[function]), function(x, *GOOD[function]), strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        with pytest.raises(RuntimeError, match="attention_mask.*: expected"):
            compiled(x, *BAD[function])
