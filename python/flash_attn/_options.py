"""The tuple of options that every entry of the compiled core takes, in its order (bindings: struct Options)."""

from __future__ import annotations

from flash_attn._backend import current


def options(
    softmax_scale=None,
    causal=False,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    attn_bias=None,
    learnable_sink=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    seqused_k=None,
    leftpad_k=None,
    block_table=None,
    dropout_p=0.0,
    seed=0,
    offset=0,
    backend=None,
    deterministic=False,
) -> tuple:
    return (
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        attn_bias,
        learnable_sink,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_k,
        leftpad_k,
        block_table,
        dropout_p,
        seed,
        offset,
        backend or current(),
        deterministic,
    )
