"""utils.testing, benchmark, library, torch: they are what tests and benchmarks of others are made of."""

import pytest
import torch
from flash_attn import flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func
from flash_attn.utils import benchmark, testing
from flash_attn.utils.library import triton_op
from flash_attn.utils.torch import custom_bwd, custom_fwd
from support import device
from support.formula import attention

from modules.formula import close

pytestmark = pytest.mark.device


@pytest.mark.parametrize(
    "options",
    [{}, dict(causal=True), dict(window_size=(2, 1)), dict(window_size=(-1, 2)), dict(window_size=(3, -1)),
     dict(softcap=2.0), dict(causal=True, window_size=(3, 0), softcap=5.0)],
)  # fmt: skip
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(7, 7), (5, 9), (9, 5)])
def test_attention_ref_is_the_formula(seqlen_q, seqlen_k, options):
    q, k, v = (torch.randn(2, n, h, 16).double() for n, h in ((seqlen_q, 4), (seqlen_k, 2), (seqlen_k, 2)))
    bias = torch.randn(2, 1, seqlen_q, seqlen_k).double()
    out, probabilities = testing.attention_ref(q, k, v, attn_bias=bias, **options)
    exact, _ = attention(q, k, v, torch.float64, attn_bias=bias, **options)
    assert torch.allclose(out, exact, atol=1e-13) and out.dtype == torch.float64
    sums = probabilities.sum(-1)
    assert torch.allclose(sums[sums > 0], torch.ones(1, dtype=torch.float64))
    low, _ = testing.attention_ref(q.bfloat16(), k.bfloat16(), v.bfloat16(), upcast=False, reorder_ops=True, **options)
    assert low.dtype == torch.bfloat16


def test_attention_ref_with_all_the_rest():
    q, k, v = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 12)
    qv, descale = torch.randn(2, 6, 4, 12), torch.rand(2, 2) + 0.5
    out, _ = testing.attention_ref(q, k, v, qv=qv, q_descale=descale, k_descale=descale, v_descale=descale)
    by_q, by_k = descale.repeat_interleave(2, 1)[:, None, :, None], descale[:, None, :, None]
    both = torch.cat([q * by_q, qv * by_q], -1), torch.cat([k * by_k, v * by_k], -1), v * by_k
    exact, _ = attention(*both, torch.float64)
    close(out, exact)
    sink = torch.randn(4)
    close(testing.attention_ref(q, k, v, learnable_sink=sink)[0],
          attention(q, k, v, torch.float64, learnable_sink=sink)[0])  # fmt: skip
    chunked, _ = testing.attention_ref(q, k, v, attention_chunk=3)
    close(chunked[:, :3], attention(q[:, :3], k[:, :3], v[:, :3], torch.float64)[0])
    leftpad = torch.tensor([0, 2])
    padded, _ = testing.attention_ref(q[1:], k[1:], v[1:], key_leftpad=leftpad[1:])
    close(padded, attention(q[1:], k[1:, 2:], v[1:, 2:], torch.float64)[0])
    kept = torch.rand(2, 4, 6, 6) > 0.3
    dropped, p = testing.attention_ref(q, k, v, dropout_p=0.3, dropout_mask=kept)
    close(dropped, torch.einsum("bhij,bjhd->bihd", (p * kept).double(), v.double().repeat_interleave(2, 2)) / 0.7)


@pytest.mark.parametrize("mode", ["full", "random", "third"])
def test_padding_masks(mode):
    mask = testing.generate_random_padding_mask(30, 11, device.DEVICE, mode)
    lengths = mask.sum(-1)
    assert mask.equal(torch.arange(30) < lengths[:, None])
    assert lengths.min() >= {"full": 30, "random": 10, "third": 10}[mode]
    lengths = testing.generate_random_padding_mask(30, 11, device.DEVICE, mode, zero_lengths=True).sum(-1)
    assert lengths[[0, 5, 10]].eq(0).all() and lengths.sum() > 0


@pytest.mark.parametrize("padded", [False, True])
def test_generate_qkv(padded):
    q, k, v = torch.randn(3, 8, 4, 16), torch.randn(3, 11, 2, 16), torch.randn(3, 11, 2, 16)
    masks = [testing.generate_random_padding_mask(n, 3, device.DEVICE) if padded else None for n in (8, 11)]
    result = testing.generate_qkv(q, k, v, *masks, qv=q)
    rows, lengths, leaves, pads = result[:4], result[4:10], result[10:14], result[14:]
    cu_q, cu_k, used_q, used_k, max_q, max_k = lengths
    out = pads[0](flash_attn_varlen_func(*rows[:3], cu_q, cu_k, max_q, max_k, causal=True))
    expected, _ = testing.attention_ref(*leaves[:3], *masks, causal=True)
    close(out, expected.double())
    ours = torch.autograd.grad(out.square().sum(), rows[:3])
    theirs = torch.autograd.grad(expected.square().sum(), leaves[:3])
    for pad, a, b in zip((pads[1], pads[2], pads[2]), ours, theirs, strict=True):
        close(pad(a), b.double(), bound=2e-5)
    assert (used_q is None) == (not padded) and rows[3].shape == rows[0].shape
    cu_q, cu_k, max_q, max_k, q2, kv, *pads = testing.generate_qkv(q, k, v, *masks, kvpacked=True)[2:]
    assert kv.shape == (3, 11, 2, 2, 16) and len(pads) == 3
    both = testing.generate_qkv(q, q, q, masks[0], masks[0], qkvpacked=True)
    out = both[4](flash_attn_varlen_qkvpacked_func(*both[:3]))
    close(out, testing.attention_ref(*both[3].unbind(2), masks[0], masks[0])[0].double())


def test_benchmarks_time_what_they_say(capsys, tmp_path):
    x = torch.randn(4, 4, requires_grad=True)
    calls = []

    def f(x, scale=1.0):
        calls.append(scale)
        return (x * scale).exp(), None

    timer, measurement = benchmark.benchmark_forward(f, x, repeats=3, scale=2.0, desc="f")
    assert measurement.median > 0 and len(calls) >= 3 and set(calls) == {2.0}
    results = benchmark.benchmark_all(f, x, repeats=2, verbose=False)
    assert len(results) == 3 and all(m.median > 0 for _, m in results)
    assert x.grad is not None
    assert len(benchmark.benchmark_fwd_bwd(f, x, repeats=2, amp=True, amp_dtype=torch.bfloat16)) == 2
    benchmark.pytorch_profiler(lambda x: x.exp(), x, backward=True, trace_filename=str(tmp_path / "trace.json"))
    trace = (tmp_path / "trace.json").read_text()
    traced = ("aten::exp", "ExpBackward0") if device.DEVICE == "cpu" else ("exp_kernel", "elementwise_kernel")
    assert all(name in trace for name in traced)
    printed = capsys.readouterr().out
    assert "f - Forward pass" in printed and "Backward pass" in printed and "CPU time" in printed
    if device.DEVICE == "cpu":
        with pytest.raises(NotImplementedError, match="no peak of memory on cpu"):
            benchmark.benchmark_memory(f, x)
    with pytest.raises(ValueError, match=r"grad: expected the shape of the output, \(4, 4\), got \(4,\)"):
        benchmark.benchmark_backward(f, x, grad=torch.ones(4))


@pytest.mark.parametrize("schema", [None, "(Tensor x, float a) -> Tensor"])
@pytest.mark.parametrize("decompose", [False, True])
def test_triton_op(decompose, schema):
    name = f"flash_attn_test::scaled_{decompose}_{schema is None}"

    @triton_op(name, mutates_args=(), schema=schema, allow_decomposition=decompose)
    def scaled(x: torch.Tensor, a: float) -> torch.Tensor:
        return x * a

    x = torch.randn(3)
    assert scaled(x, 2.0).equal(2 * x)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert scaled(torch.empty(5), 2.0).shape == (5,)


def test_amp_decorators():
    class Double(torch.autograd.Function):
        @staticmethod
        @custom_fwd
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @custom_bwd
        def backward(ctx, dy):
            return 2 * dy

    x = torch.ones(2, requires_grad=True)
    assert torch.autograd.grad(Double.apply(x).sum(), x)[0].eq(2).all()
