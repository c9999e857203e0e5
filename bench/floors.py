"""What the machine can do at most, measured in the process of the layers, and the least time of a case."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import torchrnn
from bench.cases import Case
from torchrnn._native import ISAS

CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
MATMUL_SIZE = 1536
MOST_READ = 1 << 30
WINDOW = 5e-3  # Seconds of one measurement; a processor is seldom shared within so few.


@dataclass(frozen=True)
class Level:
    """A cache or the memory."""

    name: str
    size: int | None  # Bytes, of one core unless it is shared; None for the memory.
    shared: bool
    bandwidth: float  # GB/s, all threads reading.
    measured: int | None = None  # Bytes that were read to measure it, as ``size``; older files lack it.


@dataclass(frozen=True)
class Floors:
    """The rates that bound a case. ``levels`` is empty where they could not be measured."""

    gflops: float  # float32, all threads.
    peak_source: str
    levels: list[Level]

    def milliseconds(self, case: Case, threads: int) -> float:
        """Returns the least time of a case.

        That of the recurrence, arithmetic or reading the recurrent weight in every step, whichever takes
        longer, plus that of the other products, whose weights are read at least once. Half precision is
        computed in float32, so its arithmetic has the same peak, but its weights have half the bytes.
        """
        scan = case.scan_flops / self.gflops / 1e9
        rest = (case.flops - case.scan_flops) / self.gflops / 1e9
        if self.levels:
            scan = max(scan, case.recurrent_reads * self.reading(case.recurrent_bytes, threads))
            rest = max(rest, self.reading(case.input_bytes, threads))
        return 1e3 * (scan + rest)

    def reading(self, size: int, threads: int) -> float:
        """Returns the seconds of reading a weight once.

        The threads divide it among them, and each slice stays in the fastest cache that holds it.
        """
        part = size / threads
        level = next(v for v in self.levels if v.size is None or (size if v.shared else part) <= v.size)
        return size / level.bandwidth / 1e9


def multiply_add_rate(threads: int) -> float:
    """Returns the machine's float32 GFLOP/s within a window, also when weaker kernels are measured."""
    isa = ISAS.index(torchrnn.info()["isas"][-1])
    rate: float = torch.ops.torchrnn.fma_peak(isa, WINDOW, threads)
    return rate


def measure(threads: int, seconds: float = 0.3, most: int = MOST_READ) -> Floors:
    """Measures for ``seconds`` per rate, with the kernels' own loops if they are there.

    Reads at most ``most`` bytes again and again for a bandwidth.
    """
    if torchrnn.info()["why_not"] is not None:
        return Floors(highest(matmul_gflops, seconds), "torch.mm", [])
    isa = torchrnn.info()["isas"][-1]
    gflops = highest(partial(multiply_add_rate, threads), seconds)
    levels: list[Level] = []
    for name, size, shared in cache_sizes():
        total = min(most, read_size(size, shared, levels, threads))
        read = partial(torch.ops.torchrnn.read_bandwidth, total // threads if shared else total)
        read(1e-9, threads)  # The first call allocates.
        levels.append(Level(name, size, shared, highest(partial(read, WINDOW, threads), seconds), total))
    return Floors(gflops, f"fma loop, {isa}", levels)


def read_size(size: int | None, shared: bool, faster: list[Level], threads: int) -> int:
    """Returns the bytes to read to measure a level: of one core, or of all if it is shared.

    Half of a cache, because other data is in it too. Of a shared one at most eight times the caches below:
    where it is shared with other machines, half of what the system names would lie in memory. For the memory,
    four times the last cache.
    """
    if size is None:
        last = faster[-1].size if faster else None
        return min(4 * (last or MOST_READ), MOST_READ)
    private = [threads * level.size for level in faster if level.size and not level.shared]
    return min([size // 2, *(8 * total for total in private[-1:])]) if shared else size // 2


def highest(rate: Callable[[], float], seconds: float) -> float:
    """Returns the best of many short measurements: in some of them no other process has disturbed."""
    best, end = rate(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = max(best, rate())
    return best


def merged(a: Floors, b: Floors) -> Floors:
    """Returns the higher one of each rate of two measurements."""
    levels = [max(pair, key=lambda level: level.bandwidth) for pair in zip(a.levels, b.levels, strict=True)]
    return Floors(max(a.gflops, b.gflops), a.peak_source, levels)


def cache_sizes() -> list[tuple[str, int | None, bool]]:
    """Returns name, bytes and whether cores share it of each data cache, fastest first, and of the memory."""
    caches = []
    for index in sorted(CACHE.glob("index*")):
        kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction":
            caches.append((f"L{level}", 1024 * int(size.removesuffix("K")), int(level) > 2))
    # Where the system does not tell: sizes that fit most machines of these years.
    caches = caches or [("L1", 32 << 10, False), ("L2", 1 << 20, False), ("L3", 32 << 20, True)]
    return [*caches, ("memory", None, True)]


def matmul_gflops() -> float:
    """Returns the rate of torch's own matrix product, on some machines far below the peak."""
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE)
    start = time.perf_counter()
    a @ b
    return 2 * MATMUL_SIZE**3 / (time.perf_counter() - start) / 1e9
