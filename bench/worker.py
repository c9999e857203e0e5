"""The process that measures: one per number of threads, because thread pools are made once.

Called by ``bench.run`` with its options as JSON; prints lines of JSON: the times of each row once they are
known, and at the end the whole run. A row is asked for by its suite, its case, the names of the peers and
the seconds that it may take.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import torchrnn
from bench import floors, peers, results
from bench.adapters import before
from bench.cases import Case
from bench.results import Row, Run
from bench.timing import PAUSE, Stats, clock_of, interleave, sample

# Of one measurement of a rate: seconds and most bytes.
EFFORT: dict[str, Any] = {"seconds": 0.3, "most": floors.MOST_READ}
QUICK_EFFORT: dict[str, Any] = {"seconds": 0.01, "most": 1 << 22}

PREPARATIONS = 3  # Of what two checkouts measure.
Times = dict[str, Stats]


class Measured(NamedTuple):
    suite: str
    case: Case
    ours: Stats
    others: Times
    peak: float | None
    errors: dict[str, float]


def measure(case: Case, others: Sequence[peers.Peer], budget: float) -> tuple[Times, float | None]:
    """Returns the times of ours and of the others, and the machine's peak in GFLOP/s, all taken in turns.

    The peak is a median like the times: on a machine shared with others it is what there was to be had while
    the case ran, not what there is at best. It is None without the kernels' loop of multiply-adds, and beside
    bare calls, which have little arithmetic and no time for it.
    """
    problem = peers.make_problem(case)
    able = [peers.ours(case), *others]
    threads, rates = torch.get_num_threads(), list[float]()

    def probe() -> None:
        rates.append(floors.multiply_add_rate(threads))

    own_threads = any(peer.own_threads for peer in able)
    pause = PAUSE if threads > 1 and own_threads else 0.0
    clock = time.perf_counter if own_threads else clock_of(threads)
    probes = [probe] if torchrnn.info()["why_not"] is None and not case.bare else []
    functions = [*(peer.prepare(problem) for peer in able), *probes]
    with peers.grad_mode(case):
        times = interleave(functions, budget, pause, partial(sample, clock=clock))
    by_name = {peer.name: time for peer, time in zip(able, times, strict=False)}
    return by_name, statistics.median(rates) if rates else None


def compare(case: Case, checkouts: Sequence[peers.Peer], budget: float) -> Times:
    """Returns the time of another checkout and its ratio to that of this one, taken in turns.

    Where weights come to lie in memory makes a difference, of some percent where they fill a cache. They are
    laid out anew some times, unless that takes too long, and the time with the median of the ratios counts.
    """
    if not checkouts or not checkouts[0].supports(case):
        return {}
    problem, threads = peers.make_problem(case), torch.get_num_threads()
    pause, clock = PAUSE if threads > 1 else 0.0, clock_of(threads)

    def once() -> Stats:
        functions = [peer.prepare(problem) for peer in checkouts]
        return interleave(functions, budget / PREPARATIONS, pause, partial(sample, clock=clock))[1]

    end = time.perf_counter() + budget
    times = [once()]
    while len(times) < PREPARATIONS and time.perf_counter() < end:
        times.append(once())
    return {checkouts[1].name: sorted(times, key=lambda found: found.ratio or 0.0)[len(times) // 2]}


def ratios(others: Times) -> dict[str, float]:
    return {name: time.ratio for name, time in others.items() if time.ratio is not None}


def make_row(measured: Measured, threads: int, limits: floors.Floors) -> Row:
    """Returns the row of a case: its times beside what the machine can do."""
    suite, case, ours, others, peak, errors = measured
    limits = limits if peak is None else dataclasses.replace(limits, gflops=peak)
    gflops = case.flops / ours.median / 1e6
    floor = limits.milliseconds(case, threads)
    return Row(
        id=case.id,
        threads=threads,
        ours=ours,
        peers=others,
        ratios=ratios(others),
        gflops=gflops,
        peak=limits.gflops,
        peak_fraction=gflops / limits.gflops,
        floor=floor,
        floor_fraction=floor / ours.median,
        errors=errors,
        suite=suite,
        case=dataclasses.asdict(case),
    )


@contextlib.contextmanager
def pair(folder: str | None, threads: int) -> Iterator[list[peers.Peer]]:
    """Yields this checkout and another one, each in a process of its own; nothing if there is no other.

    A process that does nothing else finds other caches and another heap than this one does. With one thread
    all are kept on one core, because the speed of cores can differ.
    """
    if folder is None:
        yield []
        return
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with (
        before.start(results.ROOT, threads, sys.executable) as now,
        before.start(Path(folder), threads) as then,
    ):
        yield [now, then]


def main(options: dict[str, Any]) -> None:
    threads, effort = options["threads"], QUICK_EFFORT if options["quick"] else EFFORT
    torch.set_num_threads(threads)
    gc.freeze()  # So that collecting what a case leaves does not look at all modules.
    limits = floors.measure(threads, **effort)
    measured = []
    with pair(options["before"], threads) as checkouts:
        for asked in options["rows"]:
            case = Case(**asked["case"])
            others = peers.select(case, asked["peers"])
            times, peak = measure(case, others, asked["budget"])
            times |= compare(case, checkouts, asked["budget"])
            ours = times.pop(peers.OURS.name)
            print(json.dumps({"id": case.id, "ours": ours.median, "ratios": ratios(times)}), flush=True)
            able = [peer for peer in (peers.ours(case), *others, *checkouts[1:]) if peer.supports(case)]
            errors = peers.errors(case, able)
            measured.append(Measured(asked["suite"], case, ours, times, peak, errors))
    # Once more, at another time: a disturbed measurement would put the rows above what is possible.
    limits = floors.merged(limits, floors.measure(threads, **effort))
    rows = [make_row(values, threads, limits) for values in measured]
    print(
        json.dumps({"run": dataclasses.asdict(Run(threads, torchrnn.info()["isa"], limits, rows))}),
        flush=True,
    )


if __name__ == "__main__":
    main(json.loads(sys.stdin.buffer.readline()))
