"""Times several functions in turns, so that a change of the machine's speed meets all of them alike."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import truediv
from typing import Protocol, runtime_checkable

# Shorter calls are timed several at once: else the clock counts too much, and what others left in the cache.
SAMPLE_SECONDS = 3e-3
# Before each sample, because others have had the core and its caches in the meantime.
WARM_UP_SECONDS = 1e-3
# A library's idle threads spin for milliseconds (libgomp: 300 000 pauses, 14 ms on Intel) on the cores that
# the threads of the next one need.
PAUSE = 2e-2
MOST_REPEATS = 201
LEAST_REPEATS = 5

Clock = Callable[[], float]
Sample = Callable[[Callable[[], object], int], float]


@runtime_checkable
class Remote(Protocol):
    """A function that runs in another process, where the clock must be read."""

    def sample(self, calls: int, clock: Clock) -> float:
        """Returns the seconds that ``calls`` calls take."""


@dataclass(frozen=True)
class Stats:
    """Milliseconds of one call, over ``repeats`` samples of ``calls`` calls each."""

    median: float
    minimum: float
    iqr: float
    repeats: int
    calls: int
    # Median over the rounds, of the time over that of the first function in the same round. A machine's speed
    # can jump by half within seconds; that meets both. None of what was not in turns, and in older files.
    ratio: float | None = None


def stats(seconds: Sequence[float], calls: int = 1, ratio: float | None = None) -> Stats:
    """Returns the statistics of samples, each the seconds of one call, the mean of ``calls``."""
    times = [1e3 * s for s in seconds]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Stats(median, min(times), high - low, len(times), calls, ratio)


def plan(round_seconds: float, budget: float) -> int:
    """Returns how many rounds the budget allows; odd, so that the median is a sample, and at least 5."""
    rounds = min(MOST_REPEATS, max(LEAST_REPEATS, int(budget / round_seconds)))
    return rounds - 1 + rounds % 2


def clock_of(threads: int) -> Clock:
    """Returns what to measure with where no library has threads of its own.

    For one thread the time that it had a core, so that others who had it in between do not count.
    """
    return time.process_time if threads == 1 else time.perf_counter


def sample(function: Callable[[], object], calls: int, clock: Clock = time.perf_counter) -> float:
    """Returns the seconds that ``calls`` calls take."""
    if isinstance(function, Remote):
        return function.sample(calls, clock)
    start = clock()
    for _ in range(calls):
        function()
    return clock() - start


def estimate(function: Callable[[], object], sample: Sample) -> float:
    """Returns about how many seconds a call takes: of a short one when it has been called some times."""
    calls, taken = 1, sample(function, 1)
    while taken < WARM_UP_SECONDS:
        calls *= 2
        taken = sample(function, calls)
    return taken / calls


def interleave(
    functions: Sequence[Callable[[], object]],
    budget: float,
    pause: float = 0.0,
    sample: Sample = sample,
) -> list[Stats]:
    """Returns the times of the functions, measured in turns for ``budget`` seconds.

    The order is another one in each round, so that none always finds what the same one has left in the
    caches. One that takes longer than a fifth of the budget is still measured five times. With a ``pause``
    each turn begins with that many idle seconds. Calls that are shorter than that or than ``WARM_UP_SECONDS``
    follow on some that do not count. ``sample`` is the clock: it returns the seconds that a number of calls
    take.
    """
    for function in functions:  # The first call allocates, packs weights and starts threads.
        sample(function, 1)
    calls, estimates, warm_ups = [], [], []
    for function in functions:
        once = min(estimate(function, sample) for _ in range(2))
        calls.append(max(1, math.ceil(max(SAMPLE_SECONDS, pause / 4) / once)))
        warm_ups.append(math.ceil(WARM_UP_SECONDS / once) if once < max(WARM_UP_SECONDS, pause) else 0)
        estimates.append(pause + once * (calls[-1] + warm_ups[-1]))
    samples: list[list[float]] = [[] for _ in functions]
    order, shuffler = list(range(len(functions))), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(plan(sum(estimates), budget)):
            shuffler.shuffle(order)
            for i in order:
                if pause:
                    time.sleep(pause)
                if warm_ups[i]:
                    sample(functions[i], warm_ups[i])
                samples[i].append(sample(functions[i], calls[i]) / calls[i])
    finally:
        gc.enable()
    ratios = [statistics.median(map(truediv, taken, samples[0])) for taken in samples]
    return [stats(*each) for each in zip(samples, calls, ratios, strict=True)]
