"""Times several functions in turns, so that a change of the machine's speed meets all of them alike."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Shorter calls are timed several at once: else the clock counts too much, and what others left in the cache.
SAMPLE_SECONDS = 3e-3
# A library's idle threads spin for milliseconds (libgomp: 300 000 pauses, 14 ms on Intel) on the cores that
# the threads of the next one need.
PAUSE = 2e-2
MOST_REPEATS = 201
LEAST_REPEATS = 5

Sample = Callable[[Callable[[], object], int], float]


@dataclass(frozen=True)
class Stats:
    """Milliseconds of one call, over ``repeats`` samples of ``calls`` calls each."""

    median: float
    minimum: float
    iqr: float
    repeats: int
    calls: int


def stats(seconds: Sequence[float], calls: int) -> Stats:
    """Returns the statistics of the samples, each the seconds of ``calls`` calls."""
    times = [1e3 * s / calls for s in seconds]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Stats(median, min(times), high - low, len(times), calls)


def plan(round_seconds: float, budget: float) -> int:
    """Returns how many rounds the budget allows; odd, so that the median is a sample, and at least 5."""
    rounds = min(MOST_REPEATS, max(LEAST_REPEATS, int(budget / round_seconds)))
    return rounds - 1 + rounds % 2


def sample(function: Callable[[], object], calls: int) -> float:
    """Returns the seconds that ``calls`` calls take."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - start


def interleave(
    functions: Sequence[Callable[[], object]],
    budget: float,
    pause: float = 0.0,
    sample: Sample = sample,
) -> list[Stats]:
    """Returns the times of the functions, measured in turns and in alternating order for ``budget`` seconds.

    One that takes longer than a fifth of the budget is still measured five times. With a ``pause`` each turn
    begins with that many idle seconds, and where a call is shorter than that, with one that does not count.
    ``sample`` is the clock: it returns the seconds that a number of calls take.
    """
    for function in functions:  # The first call allocates, packs weights and starts threads.
        function()
    calls, estimates, warm_ups = [], [], []
    for function in functions:
        once = min(sample(function, 1) for _ in range(2))
        calls.append(max(1, math.ceil(max(SAMPLE_SECONDS, pause / 4) / once)))
        warm_ups.append(once < pause)
        estimates.append(pause + once * (calls[-1] + warm_ups[-1]))
    samples: list[list[float]] = [[] for _ in functions]
    order = list(range(len(functions)))
    gc.collect()
    gc.disable()
    try:
        for _ in range(plan(sum(estimates), budget)):
            for i in order:
                if pause:
                    time.sleep(pause)
                if warm_ups[i]:
                    functions[i]()
                samples[i].append(sample(functions[i], calls[i]))
            order.reverse()
    finally:
        gc.enable()
    return [stats(s, n) for s, n in zip(samples, calls, strict=True)]
