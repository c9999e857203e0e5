"""The process that measures: one per number of threads, because thread pools are made once.

Called by ``bench.run`` with its options as JSON; prints lines of JSON: the times of each row once they are
known, and at the end the whole run. A row is asked for by its suite, its case and the names of the peers.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import torchrnn
from bench import floors, peers
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
    times: Times
    peak: float | None
    errors: dict[str, float]


def measure(case: Case, others: Sequence[peers.Peer], budget: float) -> tuple[Times, float | None]:
    """Returns the times of ours and of the others, and the machine's peak in GFLOP/s, all taken in turns.

    The peak is a median like the times: on a machine shared with others it is what there was to be had while
    the case ran, not what there is at best. It is None without the kernels' loop of multiply-adds.
    """
    problem = peers.make_problem(case)
    able = [peers.ours(case), *others]
    threads, rates = torch.get_num_threads(), list[float]()

    def probe() -> None:
        rates.append(floors.multiply_add_rate(threads))

    clash = threads > 1 and any(peer.own_threads for peer in able)
    probes = [probe] if torchrnn.info()["why_not"] is None else []
    functions = [*(peer.prepare(problem) for peer in able), *probes]
    times = interleave(functions, budget, PAUSE if clash else 0.0)
    by_name = {peer.name: time for peer, time in zip(able, times, strict=False)}
    return by_name, statistics.median(rates) if rates else None


def make_row(measured: Measured, threads: int, limits: floors.Floors) -> Row:
    """Returns the row of a case: its times beside what the machine can do."""
    suite, case, times, peak, errors = measured
    limits = limits if peak is None else dataclasses.replace(limits, gflops=peak)
    ours = times[peers.OURS.name]
    others = {name: time for name, time in times.items() if time is not ours}
    gflops = case.flops / ours.median / 1e6
    floor = limits.milliseconds(case, threads)
    return Row(
        id=case.id,
        threads=threads,
        ours=ours,
        peers=others,
        ratios={name: time.median / ours.median for name, time in others.items()},
        gflops=gflops,
        peak=limits.gflops,
        peak_fraction=gflops / limits.gflops,
        floor=floor,
        floor_fraction=floor / ours.median,
        errors=errors,
        suite=suite,
        case=dataclasses.asdict(case),
    )


def main(options: dict[str, Any]) -> None:
    threads, effort = options["threads"], QUICK_EFFORT if options["quick"] else EFFORT
    torch.set_num_threads(threads)
    limits = floors.measure(threads, **effort)
    measured = []
    for asked in options["rows"]:
        case = Case(**asked["case"])
        others = peers.select(case, asked["peers"])
        times, peak = measure(case, others, options["budget"])
        ours = times[peers.OURS.name].median
        ratios = {name: time.median / ours for name, time in times.items() if name != peers.OURS.name}
        print(json.dumps({"id": case.id, "ours": ours, "ratios": ratios}), flush=True)
        errors = peers.errors(case, [peers.ours(case), *others])
        measured.append(Measured(asked["suite"], case, times, peak, errors))
    # Once more, at another time: a disturbed measurement would put the rows above what is possible.
    limits = floors.merged(limits, floors.measure(threads, **effort))
    rows = [make_row(values, threads, limits) for values in measured]
    print(
        json.dumps({"run": dataclasses.asdict(Run(threads, torchrnn.info()["isa"], limits, rows))}),
        flush=True,
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
