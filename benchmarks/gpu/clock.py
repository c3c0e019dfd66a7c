"""Samples by the device's own clock, in turns: all contenders of a cell back to back, several rounds, the median.

A device's clock moves with its load and its neighbours. Contenders therefore take turns, and so does the ceiling: the
fraction compares two medians of the same seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

SAMPLE = 20e-3  # seconds of a sample, at least one call


class Clock:
    def __init__(self, device: str):
        self.on_cpu = device == "cpu"
        if not self.on_cpu:
            self.module = getattr(torch, torch.device(device).type)

    def sync(self) -> None:
        if not self.on_cpu:
            self.module.synchronize()

    def sample(self, call: Callable, n: int) -> tuple[float, float]:
        """-> seconds per call on the device, and of the host alone."""
        self.sync()
        if self.on_cpu:
            begin = time.perf_counter()
            for _ in range(n):
                call()
            seconds = (time.perf_counter() - begin) / n
            return seconds, seconds
        start, end = (self.module.Event(enable_timing=True) for _ in range(2))
        start.record()
        begin = time.perf_counter()
        for _ in range(n):
            call()
        host = (time.perf_counter() - begin) / n
        end.record()
        self.sync()
        return start.elapsed_time(end) * 1e-3 / n, host


class Runner:
    """One contender of a cell: its call, the calls in a sample, and the samples so far."""

    def __init__(self, name: str, call: Callable, per_call: int = 1, context: Callable = nullcontext, graph=False):
        self.name, self.call, self.per_call, self.context, self.graph = name, call, per_call, context, graph
        self.n, self.samples, self.error = 1, [], ""
        self.estimate = 1.0  # seconds of a call

    def warm_up(self, clock: Clock) -> None:
        with self._guarded():
            self.call()  # compiles
            self.estimate = max(1e-7, min(clock.sample(self.call, 1)[0] for _ in range(2)))
            self.n = max(1, min(200, round(SAMPLE / self.estimate)))

    def take(self, clock: Clock) -> None:
        with self._guarded():
            self.samples.append(clock.sample(self.call, self.n))

    def _guarded(self) -> AbstractContextManager:
        return _Guard(self)

    @property
    def seconds(self) -> float:
        return statistics.median(s for s, _ in self.samples) / self.per_call

    @property
    def host(self) -> float:
        return statistics.median(h for _, h in self.samples) / self.per_call


class _Guard:
    """A contender's context around its calls; what it raises becomes its error."""

    def __init__(self, runner: Runner):
        self.runner = runner

    def __enter__(self):
        self.inner = self.runner.context()
        return self.inner.__enter__()

    def __exit__(self, kind, error, trace) -> bool:
        self.inner.__exit__(kind, error, trace)
        if error is not None and isinstance(error, Exception):
            self.runner.error = words(error)
            return True
        return False


def words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def alternate(runners: list[Runner], clock: Clock, rounds: int) -> None:
    """Fills `samples`. A contender that fails takes no further turns."""
    for runner in runners:
        if not runner.error:
            runner.warm_up(clock)
    for _ in range(rounds):
        for runner in runners:
            if not runner.error:
                runner.take(clock)


def captured(call: Callable, context: Callable, per_graph: int, stream) -> Callable:
    """A CUDA graph of so many calls: the kernels alone, without the host's time. -> what replays it."""
    graph = torch.cuda.CUDAGraph()
    with context():
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(per_graph):
                call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay
