"""Padding and unpadding: values, gradients, and attention through them."""

from __future__ import annotations

import inspect

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
