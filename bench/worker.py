"""The process that measures: one per number of threads, because thread pools are made once.

Called by ``bench.run`` with its options as JSON; prints lines of JSON: the times of each row once they are
known, and at the end the whole run. A row is asked for by its suite, its case, the names of the peers and
the seconds that it may take.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import torchrnn
from bench import floors, peers
from bench.adapters import before
from bench.cases import Case
from bench.results import Row, Run
from bench.timing import PAUSE, Stats, interleave

# Of one measurement of a rate: seconds and most bytes.
EFFORT: dict[str, Any] = {"seconds": 0.3, "most": floors.MOST_READ}
QUICK_EFFORT: dict[str, Any] = {"seconds": 0.01, "most": 1 << 22}

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

    clash = threads > 1 and any(peer.own_threads for peer in able)
    probes = [probe] if torchrnn.info()["why_not"] is None and not case.bare else []
    functions = [*(peer.prepare(problem) for peer in able), *probes]
    with peers.grad_mode(case):
        times = interleave(functions, budget, PAUSE if clash else 0.0)
    by_name = {peer.name: time for peer, time in zip(able, times, strict=False)}
    return by_name, statistics.median(rates) if rates else None


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
def checkouts(folder: str | None, threads: int) -> Iterator[list[peers.Peer]]:
    """Yields the peer that is another checkout, if there is one.

    With one thread its process and this one are kept on one core, because the speed of cores can differ.
    """
    if folder is None:
        yield []
        return
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with before.start(Path(folder), threads) as peer:
        yield [peer]


def main(options: dict[str, Any]) -> None:
    threads, effort = options["threads"], QUICK_EFFORT if options["quick"] else EFFORT
    torch.set_num_threads(threads)
    limits = floors.measure(threads, **effort)
    measured = []
    with checkouts(options["before"], threads) as further:
        for asked in options["rows"]:
            case = Case(**asked["case"])
            others = peers.select(case, asked["peers"]) + [peer for peer in further if peer.supports(case)]
            times, peak = measure(case, others, asked["budget"])
            ours = times.pop(peers.OURS.name)
            print(json.dumps({"id": case.id, "ours": ours.median, "ratios": ratios(times)}), flush=True)
            errors = peers.errors(case, [peers.ours(case), *others])
            measured.append(Measured(asked["suite"], case, ours, times, peak, errors))
    # Once more, at another time: a disturbed measurement would put the rows above what is possible.
    limits = floors.merged(limits, floors.measure(threads, **effort))
    rows = [make_row(values, threads, limits) for values in measured]
    print(
        json.dumps({"run": dataclasses.asdict(Run(threads, torchrnn.info()["isa"], limits, rows))}),
        flush=True,
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
