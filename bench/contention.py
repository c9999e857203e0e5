"""How a step slows down when another process runs the same: ``python -m bench contention``.

With as many threads in each as there are cores, two processes want twice what there is. Where the threads of
a step wait for each other, it can take far longer than twice its time.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from bench import options, peers, results, timing
from bench.cases import Case
from bench.results import Contention

SIZES = ((128, 8, 256, 256), (128, 32, 256, 256))
QUICK_SIZES = ((4, 2, 8, 8),)
COMPARED = ("torchrnn", "torch.nn")
WARM_UP = 3


def samples(asked: dict[str, Any]) -> list[float]:
    """Returns the seconds of each step; says when it is ready and then waits for a line."""
    case = Case(**asked["case"])
    peer = next(p for p in (peers.OURS, *peers.PEERS) if p.name == asked["name"])
    step = peer.prepare(peers.make_problem(case))
    for _ in range(WARM_UP):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    taken: list[float] = []
    end = time.perf_counter() + asked["budget"]
    while time.perf_counter() < end or len(taken) < timing.LEAST_REPEATS:
        taken.append(timing.sample(step, 1))
    return taken


def run(asked: dict[str, Any], processes: int) -> list[float]:
    """Returns the seconds of each step of all processes, which begin at the same time."""
    children = [options.process("bench.contention", asked) for _ in range(processes)]
    for child in children:
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            raise RuntimeError(f"a measuring process failed with status {child.wait()}")
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    return [second for child in children for second in options.answer(child)]


def measure(case: Case, name: str, threads: int, budget: float) -> Contention:
    """Measures one process, then two."""
    asked = {"case": dataclasses.asdict(case), "name": name, "threads": threads, "budget": budget}
    alone, together = run(asked, 1), run(asked, 2)
    return Contention(
        id=case.id,
        name=name,
        threads=threads,
        alone=timing.stats(alone, 1),
        together=timing.stats(together, 1),
        alone_maximum=1e3 * max(alone),
        together_maximum=1e3 * max(together),
    )


def table(rows: Sequence[Contention], cores: int) -> Table:
    """Returns the times, and how much longer a step takes beside another process."""
    threads = statistics.mode(row.threads for row in rows)
    out = Table(title=f"ms of a step: one process, and two of {threads} threads each on {cores} cores")
    out.add_column("case", no_wrap=True)
    for title in ("layer", "alone", "longest", "two", "longest", "median ratio", "longest / median alone"):
        out.add_column(title, justify="left" if title == "layer" else "right")
    for row in rows:
        numbers = (row.alone.median, row.alone_maximum, row.together.median, row.together_maximum)
        ratios = (f"{row.median_ratio:.2f}", f"{row.maximum_ratio:.2f}")
        out.add_row(row.id, row.name, *(f"{number:.3f}" for number in numbers), *ratios)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = options.parser("contention", "Measures a step beside another process that runs the same.")
    add = parser.add_argument
    add("--threads", metavar="N", type=options.count, default=2, help="number of threads of each process [2]")
    add("--budget", metavar="S", type=options.seconds, help="seconds of each measurement [3]")
    args, console = parser.parse_args(argv), options.console()
    sizes = QUICK_SIZES if args.quick else SIZES
    chosen = [Case("lstm", mode, *size) for mode in ("infer", "train") for size in sizes]
    chosen = [case for case in chosen if args.filter.search(case.id)]
    if not chosen:
        print(f"bench contention: no case matches {args.filter.pattern!r}", file=sys.stderr)
        return 2
    asked = {"suite": "contention", "quick": args.quick, "filter": args.filter.pattern}
    result = results.describe(asked | {"threads": args.threads})
    budget = args.budget or (0.02 if args.quick else 3.0)
    todo = [(case, name) for case in chosen for name in COMPARED]
    for case, name in track(
        todo, "contention", console=console, transient=True, disable=not console.is_terminal
    ):
        result.contention.append(measure(case, name, args.threads, budget))
    console.print(table(result.contention, result.cores))
    console.print(f"written to {results.save(result, args.out)}")
    return 0


def child(asked: dict[str, Any]) -> None:
    torch.set_num_threads(asked["threads"])
    print(json.dumps(samples(asked)))


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
