"""Samples in turns, and the minimum of each: the one way in which the peer benchmarks measure.

A shared machine changes its speed by the second. Contenders therefore take turns, sample by sample, and the minimum of
each is compared: both come from the machine's best moments. Every sample repeats the call until it is long enough for
the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

SHORTEST_SAMPLE = 2e-3  # seconds
FEWEST_ROUNDS = 3


def seconds_of(call: Callable[[], object], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def alternate(calls: Sequence[Callable[[], object]], budget: float) -> list[float]:
    """The minimum seconds per call of each contender, after about `budget` seconds in all."""
    begin = time.perf_counter()
    repeats = []
    for call in calls:
        call()  # the first call builds caches and wakes threads
        repeats.append(max(1, round(SHORTEST_SAMPLE / seconds_of(call))))
    best = [float("inf")] * len(calls)
    rounds = 0
    while rounds < FEWEST_ROUNDS or time.perf_counter() - begin < budget:
        for i, call in enumerate(calls):
            best[i] = min(best[i], seconds_of(call, repeats[i]))
        rounds += 1
    return best
