"""The formula that engines are measured by (support/exact.py) is the oracle's: the same calls, the same numbers."""

from __future__ import annotations

import flash_attn
import pytest
import torch
from support import engine_cases, engine_problem, exact

OPTIONS = {"causal": "causal", "window": "window_size", "softcap": "softcap", "scale": "softmax_scale",
           "alibi_slopes": "alibi_slopes", "bias": "attn_bias", "sink": "learnable_sink"}  # fmt: skip
CASES = {
    name: (x, options)
    for name, x, options in engine_cases.single_features(engine_cases.Maker(torch.float64))
    if set(options) <= {*OPTIONS, "cu_seqlens_q", "cu_seqlens_k"}
    and len({"cu_seqlens_q", "cu_seqlens_k"} & {*options}) != 1
}


@pytest.mark.parametrize("name", [n for n in CASES if "wild" not in n])
def test_oracle(name):
    (q, k, v), options = CASES[name]
    p, t = engine_problem.make(q, k, v, **options)
    kwargs = {OPTIONS[n]: x for n, x in options.items() if n in OPTIONS}
    leaves = {n: getattr(t, n).detach().clone().requires_grad_() for n in "qkv"}
    for n in ("bias", "sink"):
        if getattr(t, n) is not None:
            leaves[n] = getattr(t, n).detach().double().requires_grad_()
            kwargs[OPTIONS[n]] = leaves[n]
    function, rest = flash_attn.flash_attn_func, ()
    if t.cu_seqlens_q is not None:
        function = flash_attn.flash_attn_varlen_func
        rest = (t.cu_seqlens_q, t.cu_seqlens_k, p.max_seqlen_q, p.max_seqlen_k)
    with flash_attn.backend("reference"):
        out, lse, _ = function(leaves["q"], leaves["k"], leaves["v"], *rest, return_attn_probs=True, **kwargs)
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        finite = torch.where(torch.isfinite(lse), lse * dlse, 0).sum()
        grads = torch.autograd.grad((out * dout).sum() + finite, list(leaves.values()), allow_unused=True)
    ours, our_lse = exact.forward(p, t)
    torch.testing.assert_close(ours, out)
    torch.testing.assert_close(our_lse.float(), lse, rtol=1e-6, atol=1e-6)
    for (n, gradient), g in zip(exact.backward(p, t, dout, dlse).items(), grads, strict=True):
        torch.testing.assert_close(
            gradient, torch.zeros_like(gradient) if g is None else g, rtol=1e-6, atol=1e-6, msg=n
        )
