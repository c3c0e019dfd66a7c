"""Runs engine_cases in Triton's interpreter, on the CPU: started by test_triton_interpreted.py as a process of its own,
since an access out of bounds is a crash there. Prints what is wrong; its exit code says whether anything was.

    python interpreted.py forward|backward|cache|nan|seam|mods float32|float16 PART PARTS
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import flash_attn
import torch
import triton.runtime.interpreter as interpreter

sys.path.insert(0, str(Path(__file__).parents[1]))

from flash_attn._engines.triton import TritonEngine  # noqa: E402
from support import engine_cases, engine_problem, exact  # noqa: E402

warnings.filterwarnings("ignore")  # of 0 / 0 and log(0) in numpy, where the kernels mean them
ENGINE = TritonEngine()
# Errors allowed, as a part of the largest value: a few roundings of sums of 50 terms.
ALLOWED = {torch.float32: 1e-5, torch.float16: 4e-3}


def bear_new_numpy() -> None:
    """numpy >= 2.4 makes no int of an array of one element, which Triton's interpreter (3.6) asks of it in range()."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patched


def difference(x, ref) -> float:
    """Of x from ref (float64), as a part of the largest value; infinities must agree. NaN is never right."""
    if not ref.numel():
        return 0.0
    x = x.double()
    d = torch.where(x == ref, 0.0, (x - ref).abs())
    largest = ref[torch.isfinite(ref)].abs().max() if torch.isfinite(ref).any() else torch.tensor(0.0)
    return float(d.max() / max(1.0, float(largest)))


def forward(x, options, report):
    p, t = engine_problem.make(*x, **options)
    if t.new_k is not None:
        other = copy.copy(t)
        other.k, other.v = t.k.clone(), t.v.clone()
        exact.append(p, other)
        ENGINE.forward(p, t)
        report("k", t.k, other.k.double())
        report("v", t.v, other.v.double())
    else:
        ENGINE.forward(p, t)
    out, lse = exact.forward(p, t)
    report("out", t.out, out)
    report("lse", t.lse, lse)
    return p, t


def backward(x, options, report):
    p, t = forward(x, options, report)
    g = torch.Generator().manual_seed(5)
    dout = torch.randn(t.out.shape, generator=g).to(t.out.dtype)
    dlse = torch.randn(t.lse.shape, generator=g)
    p, t = engine_problem.make_backward(p, t, dout, dlse)
    ENGINE.backward(p, t)
    for name, gradient in exact.backward(p, t, dout, dlse).items():
        report("d" + name, getattr(t, "d" + name), gradient)


def nan(m, report):
    """A NaN in one key, value or gradient reaches the rows that see it, and no others."""
    for headdim, options in ((72, {"causal": True}), (16, {"window": (3, 2)})):
        for what in ("k", "v", "dout"):
            q, k, v = m.qkv(1, 24, 24, 2, 1, headdim)
            dout = m.randn(*q.shape)
            clean = run_all(q, k, v, dout, options)
            {"k": k, "v": v, "dout": dout}[what][0, 13] = float("nan")
            p, t = engine_problem.make(q, k, v, **options)
            i, j = torch.arange(24)[:, None], torch.arange(24)[None]
            lo, hi = torch.zeros_like(i), torch.full_like(i, 24)
            if p.window_left >= 0:
                lo = i - p.window_left
            if p.window_right >= 0:
                hi = i + p.window_right + 1
            if p.chunk:
                lo, hi = i // p.chunk * p.chunk, (i // p.chunk + 1) * p.chunk
            visible = (j >= lo) & (j < hi)
            rows = visible[:, 13] if what != "dout" else torch.arange(24) == 13
            keys = visible[rows].any(0)
            out, dq, dk, dv = run_all(q, k, v, dout, options)
            if what == "dout":
                expect(report, "out", out, clean[0], torch.zeros(24, dtype=torch.bool))
            else:
                expect(report, "out", out, clean[0], rows)
            expect(report, "dq", dq, clean[1], rows)
            expect(report, "dk", dk, clean[2], keys)
            if what != "v":  # probabilities know nothing of v
                expect(report, "dv", dv, clean[3], keys)


def nan_in_a_page(m, report):
    """The same from pages, which the careful pass looks up key by key, as from rows in order."""
    q, k, v = m.qkv(1, 9, 128, 2, 1, 16)
    v[0, 125] = float("nan")  # seen by the last three rows
    p, t = engine_problem.make(q, k, v, causal=True)
    ENGINE.forward(p, t)
    for page in (16, 64, 5):
        order = torch.randperm(-(-128 // page), generator=m.g)
        pools = []
        for x in (k, v):
            rows = torch.nn.functional.pad(x[0], (0, 0, 0, 0, 0, len(order) * page - 128)).unflatten(0, (-1, page))
            pool = torch.empty_like(rows)
            pool[order] = rows
            pools.append(pool)
        table = {"block_table": order.int()[None], "seqused_k": m.ints([128])}
        p, paged = engine_problem.make(q, *pools, causal=True, **table)
        ENGINE.forward(p, paged)
        expect(report, f"pages of {page}", paged.out[0, :, 0], t.out[0, :, 0], torch.arange(9) >= 6)


def run_all(q, k, v, dout, options):
    p, t = engine_problem.make(q, k, v, **options)
    ENGINE.forward(p, t)
    p, t = engine_problem.make_backward(p, t, dout)
    ENGINE.backward(p, t)
    return [x[0, :, 0].clone() for x in (t.out, t.dq, t.dk, t.dv)]


def expect(report, name, x, clean, nan_rows):
    is_nan = x.isnan().any(-1)
    report(name + " rows with NaN", is_nan.double(), nan_rows.double())
    report(name + " elsewhere", x[~nan_rows], clean[~nan_rows].double())


def huge(m, report):
    """Scores of 1e30, and of one row alone: the largest takes all, and nothing overflows."""
    q, k, v = m.qkv(1, 20, 30, 1, 1, 16)
    for scale in (1e30, 1e15, 3e7):
        p, t = engine_problem.make(q, k, v, causal=True, scale=scale)
        ENGINE.forward(p, t)
        out, lse = exact.forward(p, t)
        report(f"scale {scale} out", t.out, out)
        report(f"scale {scale} lse", t.lse / scale, lse / scale)
    bias = torch.full((1, 1, 20, 30), torch.finfo(torch.float32).min)
    bias[..., 10:, :] = 0
    p, t = engine_problem.make(q, k, v, bias=bias)
    ENGINE.forward(p, t)
    report("lowest bias hides nothing", t.out.isfinite().double(), torch.ones_like(t.out, dtype=torch.float64))
    report("lowest bias weighs alike", t.out[0, :10, 0], v[0, :, 0].double().mean(0).expand(10, -1))
    backward((q, k, v), {"bias": bias}, report)


def seam(report):
    """Public functions, through the core, against the oracle: the same mask of dropout, the same cache."""
    names = flash_attn.features()
    flash_attn.register_backend(
        "interpreted", ENGINE, devices=("cpu",), dtypes=("float32",), serves=names, backward=names
    )
    m = engine_cases.Maker(torch.float32)

    def differentiated(function, leaves, *rest, **options):
        torch.manual_seed(1)
        leaves = [x.clone().requires_grad_() for x in leaves]
        out = function(*leaves, *rest, **options)
        torch.manual_seed(2)
        return [out, *torch.autograd.grad(out, leaves, torch.randn_like(out))]

    def cached():
        g = engine_cases.Maker(torch.float32)
        (q, k, v), new = g.qkv(sq=2), {"k": g.randn(2, 2, 2, 32), "v": g.randn(2, 2, 2, 32)}
        turn = engine_cases.rotary(g, 60, 8)
        lengths = g.ints([11, 40])
        out, lse = flash_attn.flash_attn_with_kvcache(
            q, k, v, **new, **turn, cache_seqlens=lengths, causal=True, return_softmax_lse=True
        )
        return [out, lse, k, v]

    packed, cu = m.packed()
    calls = {
        "dropout": lambda: differentiated(flash_attn.flash_attn_func, m_qkv, causal=True, dropout_p=0.3),
        "packed": lambda: differentiated(
            flash_attn.flash_attn_varlen_func, packed, *cu.values(), 33, 40, causal=True, softcap=3.0
        ),
        "cache": cached,
    }
    m_qkv = m.qkv()
    for name, call in calls.items():
        with flash_attn.backend("interpreted"):
            ours = call()
        with flash_attn.backend("reference"):
            theirs = call()
        for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
            report(f"{name} {i}", x.detach(), y.detach().double())
        if not torch.isfinite(ours[0]).all():
            report(f"{name} is finite", torch.zeros(1), torch.ones(1, dtype=torch.float64))


def operations() -> dict:
    """Functions of scores that, together, use every operation that traced.py has, by name."""
    table = torch.randn(4, 120, generator=torch.Generator().manual_seed(1))
    flags, whole = table > 0.3, (table * 10).long()
    gain = torch.tensor(0.75)
    where = torch.where
    return {
        "exponentials": lambda s, b, h, i, j: torch.exp(-s.abs()) + torch.exp2(s * 0.1) - torch.rsqrt(1 + s * s),
        "logarithms": lambda s, b, h, i, j: torch.log(s.abs() + 1) - (s * s + 1).log2() * (s * s + 2).sqrt(),
        "waves": lambda s, b, h, i, j: torch.sin(s) * torch.cos(s) + torch.erf(s) - torch.reciprocal(2 + s * s),
        "sigmoid, tanh": lambda s, b, h, i, j: torch.sigmoid(s) * 3 + torch.tanh(s * 0.5) + torch.relu(s - 0.2),
        "powers": lambda s, b, h, i, j: (
            2.0 ** -(h + 1) * (i - j).abs() + 0.7**s + s**2 - 0.1 * s**3 + (s.abs() + 0.1) ** 0.5
        ),
        "more powers": lambda s, b, h, i, j: 0.002 * s**5 + (s.abs() + 1) ** -6,
        "limits": lambda s, b, h, i, j: s.clamp(-1, 2) + s.clamp(min=0) + s.clamp(max=0.5) + torch.maximum(s, -s),
        "divisions": lambda s, b, h, i, j: (
            s + (i - j) // 7 * 0.1 + (j - i) % 5 * 0.1 + s / 3 + 1 / (i + 1) - s.floor() * 0
        ),
        "whole quotients": lambda s, b, h, i, j: (
            s + (j // 0.1) * 0.1 - (i - j) % -0.3 + torch.div(i - j, 0.7, rounding_mode="trunc") * 0.1
        ),
        "signs": lambda s, b, h, i, j: s * torch.sign(i - j) + torch.minimum(s, s * 0.5) - torch.ceil(s) * 0 - (-s),
        "logic": lambda s, b, h, i, j: (
            where(((i < j) | (h == 1)) & ~(b == 1), s, s * 0.5) + where((i ^ j) & 1 > 0, 0.1, 0.0)
        ),
        "more logic": lambda s, b, h, i, j: where(torch.logical_or(i != j, h >= 2).logical_not(), s, 2.0 - s),
        "large numbers": lambda s, b, h, i, j: s + ((i ^ 0x9E3779B9) & 3) * 0.1 + ((i + 2147483647) // 2 % 3) * 0.1,
        "products": lambda s, b, h, i, j: s + (i * j % 11).float() * 0.05 - torch.add(s, j, alpha=0.01) * 0.5 + (1 - s),
        "tables": lambda s, b, h, i, j: (
            s * gain + table[h, i - j + 55] + where(flags[h, j], 0.3, -0.3) + whole[b, i] * 0.02
        ),
        "from the end": lambda s, b, h, i, j: s + table[-1, -1 - j] + table[h % 2, 0],
        "numbers that are none": lambda s, b, h, i, j: (
            where(torch.maximum(s / 0 * 0, s).clamp(min=0) != s, s, 7.0)
            + where(torch.sign(s / 0 * 0) == 0, 5.0, s)
            + torch.remainder(s * 3, -0.7)
            + torch.remainder(s, 0.3) * 0.5
        ),
        "sums of bools": lambda s, b, h, i, j: where((i < j) + (h == 1), s, s * 0.5),
        "no number at 0": lambda s, b, h, i, j: (1 / s).clamp(-9, 9),  # the score of rows that are not there
        "constant": lambda s, b, h, i, j: torch.zeros_like(s) + 0.5,
    }


def mods(report):
    """score_mod, mask_mod and lists of blocks, forward and backward."""
    from flash_attn.cute.compute_block_sparsity import compute_block_sparsity
    from flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func
    from support import cute

    def both(name, call, leaves):
        results = {}
        for backend in ("triton", "torch"):
            x = [y.detach().to(torch.float64 if backend == "torch" else y.dtype).requires_grad_() for y in leaves]
            with flash_attn.use_backend(backend):
                out, lse = call(*x)
                loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
                results[backend] = [
                    out,
                    lse,
                    *torch.autograd.grad(loss + lse[lse.isfinite()].clamp(-50, 50).sin().sum(), x),
                ]
        for what, x, y in zip(("out", "lse", "dq", "dk", "dv"), *results.values(), strict=True):
            report(f"{name}: {what}", x.detach(), y.detach().double())

    q, k, v = cute.operands(cute.BASE, torch.float32)
    small = cute.operands((2, 20, 24, 4, 2, 16, 16), torch.float32)
    for name, mod in operations().items():
        both(name, lambda *x, mod=mod: flash_attn_func(*x, score_mod=mod, return_lse=True), small)
    for name, options in cute.MODS.items():
        both(name, lambda *x, options=options: flash_attn_func(*x, **options, return_lse=True), (q, k, v))
    for always in (True, False):
        both(f"always {always}", lambda *x, mask=always: flash_attn_func(
            *x, mask_mod=lambda b, h, i, j: mask, return_lse=True), small)  # fmt: skip
    sink = torch.randn(4)
    both("sink, causal", lambda *x: flash_attn_func(
        *x, score_mod=lambda s, b, h, i, j: s * 0.5, causal=True, learnable_sink=sink.to(x[0].dtype), return_lse=True),
        (q, k, v))  # fmt: skip
    by_hand = {"score_mod": lambda s, b, h, i, j: s * s, "score_mod_bwd": lambda g, s, b, h, i, j: 2 * s * g}
    both("by hand", lambda *x: flash_attn_func(*x, **by_hand, return_lse=True), (q, k, v))

    tensors, cu_q, cu_k = cute.packed(torch.float32)
    label = torch.randint(0, 3, (sum(cute.LENGTHS_K),), generator=torch.Generator().manual_seed(4))

    def of_sequence(b, h, i, j, info, aux):
        return (j <= i) & (label[info.offset_k + j] < 2) & (j < info.seqlen_k)

    both("packed", lambda *x: flash_attn_varlen_func(
        *x, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, mask_mod=of_sequence, return_lse=True), tensors)  # fmt: skip
    shape = {"batch_size": 2, "num_heads": 4, "seqlen_q": 37, "seqlen_k": 53}
    mask = cute.MODS["some heads"]["mask_mod"]
    lists = compute_block_sparsity(16, 16, **shape, mask_mod=mask, aux_tensors=None, device="cpu")
    both("lists of each head", lambda *x: flash_attn_func(
        *x, mask_mod=mask, block_sparse_tensors=lists, return_lse=True), (q, k, v))  # fmt: skip
    window = lambda b, h, i, j: (i - j).abs() < 9  # noqa: E731
    shape["num_heads"] = shape["batch_size"] = 1
    lists = compute_block_sparsity(32, 16, **shape, mask_mod=window, aux_tensors=None, device="cpu")
    both("lists of all", lambda *x: flash_attn_func(
        *x, mask_mod=window, block_sparse_tensors=lists, return_lse=True), (q, k, v))  # fmt: skip
    hidden = [x.clone() for x in (q, k, v)]
    hidden[1][:, 40:], hidden[2][:, 40:] = torch.nan, torch.inf
    seen = lambda b, h, i, j: (j <= i) & (j < 40)  # noqa: E731
    both("hidden NaN", lambda *x: flash_attn_func(*x, mask_mod=seen, return_lse=True), hidden)


def main(which: str, dtype: str, part: int, parts: int) -> int:
    bear_new_numpy()
    m = engine_cases.Maker(getattr(torch, dtype))
    wrong = ran = 0

    def reporter(name):
        def report(what, x, ref):
            nonlocal wrong
            d = difference(x, ref)
            if not d <= ALLOWED[m.dtype]:
                wrong += 1
                print(f"{name}: {what} differs by {d:.1e}")

        return report

    if which in ("seam", "mods"):
        {"seam": seam, "mods": mods}[which](reporter(which))
        ran = 1
    elif which == "nan":
        nan(m, reporter("nan"))
        nan_in_a_page(m, reporter("nan in a page"))
        huge(m, reporter("huge"))
        ran = 1
    else:
        cases = engine_cases.cache_features(m) if which == "cache" else engine_cases.single_features(m)
        for i, (name, x, options) in enumerate(cases):
            if i % parts == part:
                (backward if which == "backward" else forward)(x, options, reporter(name))
                ran += 1
    print(f"{ran} problems, {wrong} wrong")
    return int(wrong > 0 or ran == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
