"""The process that measures: one per number of threads, because thread pools are made once.

Called by ``bench.run`` with its options as JSON; prints lines of JSON: the times of each row once they are
known, and at the end the whole run.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch

import torchrnn
from bench import floors, peers
from bench.cases import Case
from bench.results import Row, Run
from bench.timing import Stats, interleave

QUICK_SECONDS = 0.01
SECONDS = 0.3

ALL = (peers.OURS, *peers.PEERS)

Times = dict[str, Stats]


def measure(case: Case, budget: float) -> Times:
    """Returns the times of ours and of all peers that can run the case, taken in turns."""
    problem = peers.make_problem(case)
    able = [peer for peer in ALL if peer.supports(case)]
    times = interleave([peer.prepare(problem) for peer in able], budget)
    return {peer.name: time for peer, time in zip(able, times, strict=True)}


def make_row(case: Case, threads: int, times: Times, errors: dict[str, float], limits: floors.Floors) -> Row:
    """Returns the row of a case: its times beside what the machine can do."""
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
        peak_fraction=gflops / limits.gflops,
        floor=floor,
        floor_fraction=floor / ours.median,
        errors=errors,
    )


def main(options: dict[str, Any]) -> None:
    threads, seconds = options["threads"], QUICK_SECONDS if options["quick"] else SECONDS
    torch.set_num_threads(threads)
    limits = floors.measure(threads, seconds)
    measured = []
    for case in (Case(**fields) for fields in options["cases"]):
        times = measure(case, options["budget"])
        ours = times[peers.OURS.name].median
        ratios = {name: time.median / ours for name, time in times.items() if name != peers.OURS.name}
        print(json.dumps({"id": case.id, "ours": ours, "ratios": ratios}), flush=True)
        measured.append((case, times, peers.errors(case, [peer for peer in ALL if peer.name in times])))
    # Once more, at another time: a disturbed measurement would put the rows above what is possible.
    limits = floors.merged(limits, floors.measure(threads, seconds))
    rows = [make_row(case, threads, times, errors, limits) for case, times, errors in measured]
    print(
        json.dumps({"run": dataclasses.asdict(Run(threads, torchrnn.info()["isa"], limits, rows))}),
        flush=True,
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
