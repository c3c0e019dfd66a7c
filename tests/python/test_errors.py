"""Malformed calls: the error's type, its words (argument, expected, got), and nothing written."""

from __future__ import annotations

import flash_attn
import pytest
import torch
from flash_attn import _C
from flash_attn import flash_attn_interface as interface
from support.groups import groups

Q, K = (2, 8, 4, 16), (2, 12, 2, 16)
PACKED_Q, PACKED_K = (10, 4, 16), (12, 2, 16)


def zeros(shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def cu(*starts, dtype=torch.int32):
    return torch.tensor(starts, dtype=dtype)


# What is wrong -> (arguments to replace, error, words in its message). {q} stands for the name of the query argument.
COMMON = {
    "dropout of 1.5": ({"dropout_p": 1.5}, ValueError, ["dropout_p", "1.5"]),
    "negative dropout": ({"dropout_p": -0.1}, ValueError, ["dropout_p", "-0.1"]),
    "dropout is a word": ({"dropout_p": "x"}, TypeError, ["dropout_p", "number", "str"]),
    "dropout is NaN": ({"dropout_p": float("nan")}, ValueError, ["dropout_p", "nan"]),
    "scale is a word": ({"softmax_scale": "x"}, TypeError, ["softmax_scale", "number", "str"]),
    "scale is NaN": ({"softmax_scale": float("nan")}, ValueError, ["softmax_scale", "nan"]),
    "negative window": ({"window_size": (-2, 0)}, ValueError, ["window_size[0]", "-2"]),
    "negative right window": ({"window_size": (0, -7)}, ValueError, ["window_size[1]", "-7"]),
    "window of fractions": ({"window_size": (1.5, 0)}, TypeError, ["window_size[0]", "integer", "float"]),
    "window too large for 64 bits": ({"window_size": (0, 1 << 70)}, ValueError, ["window_size[1]", "64 bits"]),
    "window is a number": ({"window_size": 3}, ValueError, ["window_size: ", "(left, right)", "3"]),
    "window of three": ({"window_size": (1, 2, 3)}, ValueError, ["window_size: ", "(left, right)", "(1, 2, 3)"]),
    "softcap is NaN": ({"softcap": float("nan")}, ValueError, ["softcap", "nan"]),
    "softcap is a list": ({"softcap": [1.0]}, TypeError, ["softcap", "number", "list"]),
    "slopes of another dtype": ({"alibi_slopes": zeros(4, torch.float64)}, TypeError, ["alibi_slopes", "float64"]),
    "slopes of too few heads": ({"alibi_slopes": zeros(3)}, ValueError, ["alibi_slopes", "4", "3"]),
    "slopes of three dimensions": ({"alibi_slopes": zeros((1, 2, 4))}, ValueError, ["alibi_slopes", "(1, 2, 4)"]),
    "slopes are a list": ({"alibi_slopes": [0.5] * 4}, TypeError, ["alibi_slopes", "tensor", "list"]),
    "sink is a list": ({"learnable_sink": [0.5] * 4}, TypeError, ["learnable_sink: ", "tensor", "list"]),
    "bias is a number": ({"attn_bias": 0.5}, TypeError, ["attn_bias: ", "tensor", "float"]),
    "sink of too many heads": ({"learnable_sink": zeros(5)}, ValueError, ["learnable_sink: ", "4", "5"]),
    "bias is a mask": ({"attn_bias": zeros((2, 4, 8, 12), torch.bool)}, TypeError, ["attn_bias: ", "bool", "where"]),
    "bias of another shape": ({"attn_bias": zeros((3, 4, 8, 12))}, ValueError, ["attn_bias: ", "(3, 4, 8, 12)"]),
}
SEPARATE = {
    "q is None": ({"q": None}, TypeError, ["q", "torch.Tensor", "NoneType"]),
    "v is a list": ({"v": [1.0]}, TypeError, ["v", "torch.Tensor", "list"]),
    "integers": ({"q": zeros(Q, torch.int32)}, TypeError, ["q", "float32", "int32"]),
    "booleans": ({"q": zeros(Q, torch.bool)}, TypeError, ["q", "float32", "bool"]),
    "complex": ({"k": zeros(K, torch.complex64)}, TypeError, ["k", "float32", "complex64"]),
    "dtypes mixed": ({"k": zeros(K, torch.bfloat16)}, TypeError, ["k", "float32", "bfloat16"]),
    "sparse": ({"q": zeros(Q).to_sparse()}, ValueError, ["q", "dense"]),
}
FIXED = {
    "rank of q": ({"q": zeros(Q[1:])}, ValueError, ["q", "4 dimensions", "(8, 4, 16)"]),
    "rank of k": ({"k": zeros((1, *K))}, ValueError, ["k", "4 dimensions"]),
    "no dimensions": ({"v": zeros(())}, ValueError, ["v", "4 dimensions", "()"]),
    "batches differ": ({"k": zeros((3, 12, 2, 16)), "v": zeros((3, 12, 2, 16))}, ValueError, ["k", "batch", "2", "3"]),
    "headdims differ": ({"k": zeros((2, 12, 2, 24))}, ValueError, ["k", "headdim", "16", "24"]),
    "heads do not divide": ({"k": zeros((2, 12, 3, 16)), "v": zeros((2, 12, 3, 16))}, ValueError, ["nheads", "3", "4"]),
    "no heads of keys": ({"k": zeros((2, 12, 0, 16)), "v": zeros((2, 12, 0, 16))}, ValueError, ["nheads"]),
    "lengths of k and v differ": ({"v": zeros((2, 11, 2, 16))}, ValueError, ["v", "12", "11"]),
    "on another device": ({"v": zeros(K, device="meta")}, ValueError, ["v", "meta"]),
}
SEQUENCES = {
    "cu_seqlens is None": ({"cu_seqlens_q": None}, TypeError, ["cu_seqlens_q", "torch.Tensor", "NoneType"]),
    "cu_seqlens is a list": ({"cu_seqlens_k": [0, 12]}, TypeError, ["cu_seqlens_k", "torch.Tensor", "list"]),
    "cu_seqlens of int64": (
        {"cu_seqlens_q": cu(0, 4, 10, dtype=torch.int64)},
        TypeError,
        ["cu_seqlens_q", "int32", "int64"],
    ),
    "cu_seqlens of floats": ({"cu_seqlens_q": zeros(3)}, TypeError, ["cu_seqlens_q", "int32", "float32"]),
    "cu_seqlens of int16": (
        {"cu_seqlens_q": cu(0, 4, 10, dtype=torch.int16)},
        TypeError,
        ["cu_seqlens_q", "int32", "int16"],
    ),
    "cu_seqlens of two dimensions": ({"cu_seqlens_q": cu(0, 4, 10)[None]}, ValueError, ["cu_seqlens_q", "(1, 3)"]),
    "cu_seqlens not from 0": ({"cu_seqlens_q": cu(1, 4, 10)}, ValueError, ["cu_seqlens_q", "0", "1"]),
    "cu_seqlens decreasing": ({"cu_seqlens_k": cu(0, 9, 5)}, ValueError, ["cu_seqlens_k", "9", "5"]),
    "cu_seqlens negative": ({"cu_seqlens_k": cu(0, -9, 5)}, ValueError, ["cu_seqlens_k", "-9"]),
    "cu_seqlens beyond the tensor": ({"cu_seqlens_q": cu(0, 4, 11)}, ValueError, ["cu_seqlens_q", "10", "11"]),
    "cu_seqlens empty": ({"cu_seqlens_q": cu()}, ValueError, ["cu_seqlens_q"]),
    "batches differ": ({"cu_seqlens_k": cu(0, 5, 8, 12)}, ValueError, ["cu_seqlens_k", "3", "4"]),
    "max_seqlen too small": ({"max_seqlen_q": 5}, ValueError, ["max_seqlen_q", "5", "6"]),
    "max_seqlen of keys too small": ({"max_seqlen_k": 3}, ValueError, ["max_seqlen_k", "3", "7"]),
    "max_seqlen is negative": ({"max_seqlen_q": -1}, ValueError, ["max_seqlen_q", "at least 0", "-1"]),
    "max_seqlen is a word": ({"max_seqlen_q": "x"}, TypeError, ["max_seqlen_q", "integer", "str"]),
}
VARLEN = {
    "rank of q": ({"q": zeros(Q)}, ValueError, ["q", "3 dimensions", "(2, 8, 4, 16)"]),
    "headdims differ": ({"k": zeros((12, 2, 8))}, ValueError, ["k", "headdim", "16", "8"]),
    "heads do not divide": ({"k": zeros((12, 3, 16)), "v": zeros((12, 3, 16))}, ValueError, ["nheads", "3", "4"]),
    "lengths of k and v differ": ({"v": zeros((11, 2, 16))}, ValueError, ["v", "12", "11"]),
    "pages out of range": (
        {"k": zeros((3, 4, 2, 16)), "v": zeros((3, 4, 2, 16)), "block_table": torch.full((2, 3), 7, dtype=torch.int32)},
        ValueError, ["block_table", "3", "7"],
    ),
    "table of int64": (
        {"k": zeros((3, 4, 2, 16)), "v": zeros((3, 4, 2, 16)), "block_table": zeros((2, 3), torch.int64)},
        TypeError, ["block_table", "int32", "int64"],
    ),
}  # fmt: skip
PACKED = {
    "is None": ({"{p}": None}, TypeError, ["{p}", "torch.Tensor", "NoneType"]),
    "other parts": ({"{p}": "parts"}, ValueError, ["{p}", "nheads, headdim"]),
    "other rank": ({"{p}": "rank"}, ValueError, ["{p}", "nheads, headdim"]),
    "integers": ({"{p}": "integers"}, TypeError, ["float32", "int32"]),
}

SEPARATE_VARLEN = {
    name: (dict.fromkeys(changed), error, words) for name, (changed, error, words) in SEPARATE.items() if "None" in name
}
LENGTHS = {"cu_seqlens_q": cu(0, 4, 10), "cu_seqlens_k": cu(0, 5, 12), "max_seqlen_q": 6, "max_seqlen_k": 7}
WELL_FORMED = {
    "flash_attn_func": {"q": zeros(Q), "k": zeros(K), "v": zeros(K)},
    "flash_attn_kvpacked_func": {"q": zeros(Q), "kv": zeros((2, 12, 2, 2, 16))},
    "flash_attn_qkvpacked_func": {"qkv": zeros((2, 8, 3, 4, 16))},
    "flash_attn_varlen_func": {"q": zeros(PACKED_Q), "k": zeros(PACKED_K), "v": zeros(PACKED_K), **LENGTHS},
    "flash_attn_varlen_kvpacked_func": {"q": zeros(PACKED_Q), "kv": zeros((12, 2, 2, 16)), **LENGTHS},
    "flash_attn_varlen_qkvpacked_func": {"qkv": zeros((10, 3, 4, 16)), "cu_seqlens": cu(0, 4, 10), "max_seqlen": 6},
}


def packed_table(argument, x):
    shapes = {
        "parts": zeros((*x.shape[:-3], 5, *x.shape[-2:])),
        "rank": zeros(x.shape[1:]),
        "integers": zeros(x.shape, torch.int32),
    }
    for name, (changed, error, words) in PACKED.items():
        value = next(iter(changed.values()))
        yield name, ({argument: shapes.get(value)}, error, [w.format(p=argument) for w in words])


def table():
    for name, arguments in WELL_FORMED.items():
        rows = dict(COMMON)
        if name == "flash_attn_func":
            rows |= SEPARATE | FIXED
        if name == "flash_attn_varlen_func":
            rows |= SEPARATE_VARLEN | VARLEN
        if "varlen" in name and "qkvpacked" not in name:
            rows |= SEQUENCES
        for argument in ("kv", "qkv"):
            if argument in arguments:
                rows |= dict(packed_table(argument, arguments[argument]))
        if "varlen_qkvpacked" in name:
            rows["cu_seqlens decreasing"] = ({"cu_seqlens": cu(0, 9, 5)}, ValueError, ["cu_seqlens", "9", "5"])
            rows["cu_seqlens is None"] = ({"cu_seqlens": None}, TypeError, ["cu_seqlens", "torch.Tensor"])
            rows["max_seqlen too small"] = ({"max_seqlen": 5}, ValueError, ["max_seqlen", "5", "6"])
        for what, (changed, error, words) in rows.items():
            yield pytest.param(name, {**arguments, **changed}, error, words, id=f"{name}-{what}")


@pytest.mark.parametrize("name", WELL_FORMED)
def test_the_well_formed_call_passes(name):
    getattr(flash_attn, name)(**WELL_FORMED[name])


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name, arguments, error, words", list(table()))
def test_malformed_call(name, arguments, error, words, requires_grad):
    if requires_grad:
        arguments = {
            n: x.detach().clone().requires_grad_()
            if n in ("q", "kv", "qkv") and isinstance(x, torch.Tensor) and x.is_floating_point() and not x.is_sparse
            else x
            for n, x in arguments.items()
        }
    with pytest.raises(error) as raised:
        getattr(flash_attn, name)(**arguments)
    message = str(raised.value)
    assert all(w in message for w in words), message
    assert "\n" not in message


def raw(**changed):
    """A call of the compiled forward with everything well-formed but what is given."""
    call = {"q": torch.randn(Q), "k": torch.randn(K), "v": torch.randn(K), "out": torch.full(Q, 7.0)}
    call["lse"] = torch.full((2, 4, 8), 7.0)
    extra = {n: changed.pop(n) for n in list(changed) if n not in call}
    call |= changed
    _C.forward(*call.values(), *groups(**extra))
    return call


MEMORY = {
    "out of another shape": (lambda c: {"out": torch.full(K, 7.0)}, ValueError, ["out"]),
    "out of another dtype": (lambda c: {"out": torch.full(Q, 7.0, dtype=torch.float64)}, TypeError, ["out", "float64"]),
    "lse of another shape": (lambda c: {"lse": torch.full((2, 8, 4), 7.0)}, ValueError, ["lse"]),
    "lse of another dtype": (lambda c: {"lse": torch.full((2, 4, 8), 7.0).half()}, TypeError, ["lse", "float16"]),
    "out overlaps q": (lambda c: {"out": c["q"]}, ValueError, ["out", "q"]),
    "out overlaps itself": (lambda c: {"out": torch.full((1, 8, 4, 16), 7.0).expand(Q)}, ValueError, ["out"]),
    "out absent": (lambda c: {"out": None}, ValueError, ["out"]),
    "a number for q": (lambda c: {"q": 3}, TypeError, ["q", "tensor", "int"]),
}


@pytest.mark.parametrize("what", MEMORY)
def test_malformed_memory(what):
    change, error, words = MEMORY[what]
    call = {"q": torch.randn(Q), "k": torch.randn(K), "v": torch.randn(K), "out": torch.full(Q, 7.0)}
    call |= {"lse": torch.full((2, 4, 8), 7.0)}
    call |= change(call)
    before = {n: x.clone() for n, x in call.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(error) as raised:
        _C.forward(*call.values())
    assert all(w in str(raised.value) for w in words), str(raised.value)
    assert all(torch.equal(call[n], x) for n, x in before.items())


@pytest.mark.parametrize(
    "changed",
    [{"window_size_left": -3}, {"softcap": float("inf")}, {"alibi_slopes": zeros(3)}, {"dropout_p": 2.0}],
    ids=str,
)
def test_nothing_is_written(changed):
    out, lse = torch.full(Q, 7.0), torch.full((2, 4, 8), 7.0)
    with pytest.raises(ValueError):
        raw(out=out, lse=lse, **changed)
    assert (out == 7).all() and (lse == 7).all()
    raw(out=out, lse=lse)
    assert (out != 7).all() and (lse != 7).all()


def test_malformed_backward_writes_nothing():
    q, k, v = torch.randn(Q), torch.randn(K), torch.randn(K)
    out, lse, _, rng_state = interface._flash_attn_forward(q, k, v, 0.0, 0.25, False, -1, -1, 0.0, None, False)
    good = {"dout": torch.randn(Q), "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse}
    good |= {"dq": torch.full(Q, 7.0), "dk": torch.full(K, 7.0), "dv": torch.full(K, 7.0)}
    table = {
        "dout of another shape": ({"dout": torch.randn(K)}, ValueError, "dout"),
        "dout of another dtype": ({"dout": torch.randn(Q).double()}, TypeError, "dout"),
        "dk of another shape": ({"dk": torch.full(Q, 7.0)}, ValueError, "dk"),
        "lse of another shape": ({"softmax_lse": lse[:1]}, ValueError, "lse"),
        "lse of another dtype": ({"softmax_lse": lse.double()}, TypeError, "lse"),
    }
    for what, (changed, error, word) in table.items():
        call = {**good, **changed}
        with pytest.raises(error, match=word):
            interface._flash_attn_backward(*call.values(), 0.0, 0.25, False, -1, -1, 0.0, None, False, rng_state)
        assert all((call[n] == 7).all() for n in ("dq", "dk", "dv")), what


def test_the_dropout_mask_of_pages_is_refused_in_words():
    q, pages, lengths = torch.randn(2, 4, 16), torch.randn(3, 8, 2, 16), torch.tensor([0, 2], dtype=torch.int32)
    table = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="S_dmask is not available with block_table"):
        flash_attn.flash_attn_varlen_func(
            q, pages, pages, lengths, lengths, 2, 2, dropout_p=0.5, return_attn_probs=True, block_table=table
        )
