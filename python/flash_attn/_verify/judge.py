"""verify's judgement: the results of a backend beside the oracle's, and beside those of plain arithmetic.

The oracle computes in fp64 on the same numbers. The bound of each result x is

    16-bit:      plain + u max|x|           + 2^-24 (largest term + max|lse| max|x|)
    fp32, fp64:  2 * max(plain, u max|x|)   + 2^-24 (largest term + max|lse| max|x|)

plain:   the error of plain.py's arithmetic; the larger one of its two ways to the probabilities of the backward.
u:       the unit roundoff of the result's dtype: the error of writing the exact value down, which each of the two draws
         for itself.
2:       both are sums in different orders, two draws from one distribution, and the larger of two such draws is ours
         half of the time.
term:    one fp32 rounding of the largest term that the sums can have, for results whose exact value cancels to 0.
lse:     scores and lse are rounded to fp32, which moves the probabilities of a row by a factor of 1 + 2^-24 |score|. In
         the plain arithmetic the two may cancel.

The forward of fp64 has 2^-53 instead; its backward starts from an lse that is stored in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flash_attn._errors import NotServed
from flash_attn._verify.cases import Case
from flash_attn._verify.instance import Instance, draw
from flash_attn._verify.plain import Plain

ORACLE = "reference"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass
class Judged:
    error: float
    plain: float
    bound: float


@dataclass
class Outcome:
    """Of one pass of one case on one backend."""

    feature: str
    backend: str
    dtype: str
    direction: str  # "forward" or "backward"
    refused: str = ""
    failed: str = ""
    judged: dict[str, Judged] = field(default_factory=dict)

    def worst(self) -> tuple[float, str]:
        """The largest error as a part of its bound, and whose it is."""
        parts = [(j.error / j.bound if j.bound else 0.0, name) for name, j in self.judged.items()]
        return max(parts, default=(0.0, ""))


def error(x: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite unless infinities agree. NaN is never right: no case has a NaN."""
    if x.shape != exact.shape:
        return torch.inf
    x = x.double()
    difference = torch.where(x == exact, torch.zeros_like(exact), (x - exact).abs()).nan_to_num(torch.inf, torch.inf)
    return float(difference.max()) if difference.numel() else 0.0


def largest(x: Tensor) -> float:
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0


def largest_terms(case: Case, values: dict[str, Tensor]) -> dict[str, float]:
    """Of each result's sums: |score| and |dP| are at most the products of the largest norms."""

    def norm(name: str) -> float:
        return largest(values[name].double().norm(dim=-1)) if name in values else 0.0

    k, v = max(norm("k"), norm("new_k")), max(norm("v"), norm("new_v"))
    dp = 2 * norm("dout") * v  # two terms of that size, dP and its row sum, are subtracted
    return {
        "out": v, "lse": case.scale * norm("q") * k, "dq": case.scale * dp * largest(values["k"]),
        "dk": case.scale * dp * largest(values["q"]), "dv": largest(values["dout"]), "dbias": dp, "dsink": dp,
        "k_cache": k, "v_cache": 0.0,
    }  # fmt: skip


class Judge:
    """One draw of one case in one dtype: the truth and the yardstick are computed once, for all backends."""

    def __init__(self, case: Case, dtype: str, seed: int):
        self.case, self.name, self.dtype = case, dtype, DTYPES[dtype]
        self.values = draw(case, self.dtype, seed)
        self.terms = largest_terms(case, self.values)
        exact, plain = Instance(case, self.values, torch.float64, "cpu"), Plain(case, self.values, self.dtype)
        self.truth = {"forward": exact.forward(ORACLE)}
        self.plain = {"forward": [plain.forward()]}
        if case.differentiable:
            self.truth["backward"] = exact.backward(ORACLE)
            self.plain["backward"] = [plain.backward(recomputed) for recomputed in (False, True)]
        self.truth = {d: {n: x.double() for n, x in results.items()} for d, results in self.truth.items()}

    def take(self, backend: str, device: str) -> list[Outcome]:
        instance, outcomes = Instance(self.case, self.values, self.dtype, device), []
        for direction in self.truth:
            outcome = Outcome(self.case.name, backend, self.name, direction)
            outcomes.append(outcome)
            try:
                results = getattr(instance, direction)(backend)
                self._compare(outcome, {n: x.cpu() for n, x in results.items()})
            except NotServed as e:
                outcome.refused = str(e)
            except Exception as e:  # whatever a driver or a compiler says: a failure of this case, not of verify
                outcome.failed = f"{type(e).__name__}: {e}"
            if "forward" == direction and not outcome.judged:
                break  # its gradient would need the forward's results
        return outcomes

    def _compare(self, outcome: Outcome, results: dict[str, Tensor]) -> None:
        wrong, score = [], largest(self.truth["forward"]["lse"])
        for name, truth in self.truth[outcome.direction].items():
            x = results[name]
            u = torch.finfo(x.dtype).eps / 2
            written = u * largest(truth)
            rounding = 2**-53 if x.dtype == torch.float64 and outcome.direction == "forward" else 2**-24
            rounding *= self.terms[name] + score * largest(truth)
            plain = max(error(p[name], truth) for p in self.plain[outcome.direction])
            is_half = x.dtype in (torch.float16, torch.bfloat16)
            bound = (plain + written if is_half else 2 * max(plain, written)) + rounding
            ours = error(x, truth)
            outcome.judged[name] = Judged(ours, plain, bound)
            if not ours <= bound:
                wrong.append(f"{name}: error {ours:.2e} above {bound:.2e} (plain: {plain:.2e})")
        outcome.failed = "; ".join(wrong)
