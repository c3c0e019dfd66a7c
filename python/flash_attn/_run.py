"""The one place where calls meet the core, and where those of hosted backends are run."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from flash_attn import _C, _engines
from flash_attn._call import NewKeys, Rotary, Run, Sequences
from flash_attn._engines import Tensors
from flash_attn._errors import InvalidArgument

_checks = os.environ.get("FLASH_ATTENTION_CHECK", "0").lower() not in ("", "0", "false", "off", "no")


def check_tables(on: bool = True) -> None:
    """Whether tables on a device (cu_seqlens, seqused, block_table, ...) are copied to the CPU and checked there.

    Off by default (FLASH_ATTENTION_CHECK=1 turns it on): the copy waits for the device. Unchecked tables may hold
    anything; kernels stay inside the tensors and return unspecified values.
    """
    global _checks
    _checks = on


_TABLES = {*Sequences._fields, "cu_seqlens", "positions"}  # of NewKeys and Rotary too: the rest is no table


def _on_cpu(group):
    """The group with its tables copied to the CPU, whatever their dtype: the check has words for a wrong one."""
    if group is None:
        return None
    named = zip(group._fields, group, strict=True)
    return type(group)(*(x.cpu() if isinstance(x, Tensor) and name in _TABLES else x for name, x in named))


def _must_check(q) -> bool:
    if not _checks or not isinstance(q, Tensor) or q.device.type == "cpu":
        return False
    if q.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise InvalidArgument("FLASH_ATTENTION_CHECK: tables cannot be read while a CUDA graph is captured")
    return True


def _answer(served: tuple, again):
    """Asks the chosen engine, then those after it: -> (name, None, None), or (name, engine, Problem)."""
    vetoes = []
    while type(served) is tuple:
        name, problem = served
        engine = _engines.get(name)
        if engine is not None:
            refuses = getattr(engine, "refuses", None)
            why_not = refuses(problem) if refuses else ""
            if not why_not:
                return name, engine, problem
            vetoes.append((name, why_not))
        served = again(vetoes)
    return served, None, None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    sequences: Sequences | None,
    scores,
    dropout,
    run: Run | None,
    new_keys: NewKeys | None = None,
    rotary: Rotary | None = None,
    cache: bool = False,
    mods=None,
) -> str:
    """Writes out and lse (and where keys join, k and v); -> the name of the backend that did. `cache`: messages call k
    and v k_cache and v_cache. `mods`: see _modified.py; they name the backend that runs them."""
    if _checks and _must_check(q):
        groups = (_on_cpu(sequences), scores, dropout, run, _on_cpu(new_keys), _on_cpu(rotary))
        _C.check_forward(q, k, v, out, lse, *groups, cache)
    served = _C.forward(q, k, v, out, lse, sequences, scores, dropout, run, new_keys, rotary, None, cache)
    if type(served) is str:
        return served
    call = (q, k, v, out, lse, sequences, scores, dropout, run, new_keys, rotary)
    name, engine, problem = _answer(served, lambda vetoes: _C.forward(*call, vetoes, cache))
    if engine is not None and mods is not None:
        name, engine = mods.backend, _engines.get(mods.backend)
    if engine is not None:
        t = Tensors(q, k, v, out, lse, sequences, scores, dropout, new_keys, rotary, mods=mods)
        engine.forward(problem, t)
    return name


def backward(
    dout, q, k, v, out, lse, dq, dk, dv, dlse, dbias, dsink, sequences, scores, dropout, run, mods=None
) -> str:
    """Writes dq, dk, dv, and dbias and dsink unless they are None; -> the name of the backend that did."""
    call = (dout, q, k, v, out, lse, dq, dk, dv, dlse, dbias, dsink, sequences, scores, dropout, run)
    if _checks and _must_check(q):
        _C.check_backward(*call[:12], _on_cpu(sequences), scores, dropout, run)
    served = _C.backward(*call)
    if type(served) is str:
        return served
    name, engine, problem = _answer(served, lambda vetoes: _C.backward(*call, vetoes))
    if engine is not None and mods is not None:
        name, engine = mods.backend, _engines.get(mods.backend)
    if engine is not None:
        gradients = (dout, dq, dk, dv, dlse, dbias, dsink)
        t = Tensors(q, k, v, out, lse, sequences, scores, dropout, gradients=gradients, mods=mods)
        engine.backward(problem, t)
    return name


def explain(answer, *call):
    """`answer`: _C.explain_forward or _C.explain_backward. -> problem, [(backend, chosen, why_not)], plan, work."""
    vetoes = []
    while True:
        problem, candidates, plan, p, work = answer(*call, veto=vetoes)
        chosen = next((name for name, is_chosen, _ in candidates if is_chosen), None)
        if chosen is None or not _engines.hosts(chosen):
            return problem, candidates, plan, work
        engine = _engines.get(chosen)
        if engine is not None:
            why_not = engine.refuses(p) if hasattr(engine, "refuses") else ""
            if not why_not:
                return problem, candidates, engine.plan(p) if hasattr(engine, "plan") else "", work
            vetoes.append((chosen, why_not))
