"""Times of functions of tensors: forward, backward, both; and their memory. On any device."""

from __future__ import annotations

import torch
import torch.utils.benchmark as benchmark
from torch import Tensor

from flash_attn._errors import InvalidArgument, NotServed

__all__ = [
    "benchmark_all",
    "benchmark_backward",
    "benchmark_combined",
    "benchmark_forward",
    "benchmark_fwd_bwd",
    "benchmark_memory",
    "pytorch_profiler",
]


def _device(inputs) -> torch.device:
    return next((x.device for x in inputs if isinstance(x, Tensor)), torch.device("cpu"))


def _caller(fn, inputs, kwinputs, amp, amp_dtype):
    """-> a function without arguments: fn's first result."""
    device_type = _device(inputs).type

    def call():
        with torch.autocast(device_type=device_type, dtype=amp_dtype, enabled=amp):
            y = fn(*inputs, **kwinputs)
        return y[0] if isinstance(y, tuple) else y

    return call


def _gradient(y: Tensor, grad: Tensor | None) -> Tensor:
    if grad is None:
        return torch.randn_like(y)
    if grad.shape != y.shape:
        raise InvalidArgument(f"grad: expected the shape of the output, {tuple(y.shape)}, got {tuple(grad.shape)}")
    return grad


def _forget_gradients(inputs) -> None:
    for x in inputs:
        if isinstance(x, Tensor):
            x.grad = None


def _timed(run, repeats: int, desc: str, what: str, verbose: bool):
    timer = benchmark.Timer(stmt="run()", globals={"run": run}, num_threads=torch.get_num_threads())
    measurement = timer.timeit(repeats)
    if verbose:
        print(desc, f"- {what} pass")
        print(measurement)
    return timer, measurement


def benchmark_forward(fn, *inputs, repeats=10, desc="", verbose=True, amp=False, amp_dtype=torch.float16, **kwinputs):
    """fn(*inputs, **kwinputs), `repeats` times after a warm-up -> (torch.utils.benchmark's Timer, Measurement).

    amp: under autocast to amp_dtype on the inputs' device.
    """
    return _timed(_caller(fn, inputs, kwinputs, amp, amp_dtype), repeats, desc, "Forward", verbose)


def benchmark_backward(
    fn, *inputs, grad=None, repeats=10, desc="", verbose=True, amp=False, amp_dtype=torch.float16, **kwinputs
):
    """The backward of fn's (first) result; grad: its gradient, default random. See benchmark_forward."""
    y = _caller(fn, inputs, kwinputs, amp, amp_dtype)()
    grad = _gradient(y, grad)

    def run():
        _forget_gradients(inputs)
        y.backward(grad, retain_graph=True)

    return _timed(run, repeats, desc, "Backward", verbose)


def benchmark_combined(
    fn, *inputs, grad=None, repeats=10, desc="", verbose=True, amp=False, amp_dtype=torch.float16, **kwinputs
):
    """Forward and backward together. See benchmark_forward."""
    call = _caller(fn, inputs, kwinputs, amp, amp_dtype)
    grad = _gradient(call(), grad)

    def run():
        _forget_gradients(inputs)
        call().backward(grad)

    return _timed(run, repeats, desc, "Forward + Backward", verbose)


def benchmark_fwd_bwd(
    fn, *inputs, grad=None, repeats=10, desc="", verbose=True, amp=False, amp_dtype=torch.float16, **kwinputs
):
    """-> benchmark_forward's result, benchmark_backward's. Options as there."""
    options = dict(repeats=repeats, desc=desc, verbose=verbose, amp=amp, amp_dtype=amp_dtype, **kwinputs)
    return benchmark_forward(fn, *inputs, **options), benchmark_backward(fn, *inputs, grad=grad, **options)


def benchmark_all(
    fn, *inputs, grad=None, repeats=10, desc="", verbose=True, amp=False, amp_dtype=torch.float16, **kwinputs
):
    """-> the results of benchmark_forward, benchmark_backward and benchmark_combined. Options as there."""
    options = dict(repeats=repeats, desc=desc, verbose=verbose, amp=amp, amp_dtype=amp_dtype, **kwinputs)
    both = benchmark_fwd_bwd(fn, *inputs, grad=grad, **options)
    return (*both, benchmark_combined(fn, *inputs, grad=grad, **options))


def pytorch_profiler(
    fn,
    *inputs,
    trace_filename=None,
    backward=False,
    amp=False,
    amp_dtype=torch.float16,
    cpu=False,
    verbose=True,
    **kwinputs,
) -> None:
    """PyTorch's profile of one call after 30, with its backward if `backward`; printed if verbose, and written to
    trace_filename. cpu: also the host's part, as always where the inputs are on a CPU."""
    call = _caller(fn, inputs, kwinputs, amp, amp_dtype)
    grad = _gradient(call(), None) if backward else None

    def run():
        _forget_gradients(inputs)
        y = call()
        if backward:
            y.backward(grad)

    for _ in range(30):
        run()
    device_type = _device(inputs).type
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU] if cpu or device_type == "cpu" else []
    if device_type != "cpu":
        activities.append(getattr(kinds, device_type.upper(), kinds.CPU))
    with torch.profiler.profile(activities=activities, record_shapes=True, with_stack=True) as profile:
        run()
    if verbose:
        print(profile.key_averages().table(row_limit=50))
    if trace_filename is not None:
        profile.export_chrome_trace(trace_filename)


def benchmark_memory(fn, *inputs, desc="", verbose=True, **kwinputs) -> float:
    """-> the most memory that fn(*inputs, **kwinputs) has at once on the inputs' device, in units of 1000 MiB."""
    device = _device(inputs)
    memory = getattr(torch, device.type, None)
    if not hasattr(memory, "max_memory_allocated"):
        raise NotServed(f"benchmark_memory: torch keeps no peak of memory on {device.type}")
    memory.empty_cache()
    memory.reset_peak_memory_stats(device)
    memory.synchronize(device)
    fn(*inputs, **kwinputs)
    memory.synchronize(device)
    most = memory.max_memory_allocated(device) / (2**20 * 1000)
    if verbose:
        print(f"{desc} max memory: {most}GB")
    memory.empty_cache()
    return most
