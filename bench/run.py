"""Measures torchrnn against its peers, prints the table and writes it to ``bench/results``.

python -m bench                                   # everything, about ten minutes on two cores
python -m bench --filter 'gru.*train' --threads 1
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # Run as a file: then Python looks for modules beside it, not in the project.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

import torchrnn
from bench import results
from bench.cases import QUICK_SIZES, SIZES, Case, cases
from bench.peers import OURS, PEERS
from bench.results import Result, Row, Run

WIDTH = 120  # Where there is no terminal to ask.
QUIET_LOAD = 0.5


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def threads(text: str) -> list[int]:
        numbers = [int(number) for number in text.split(",")]
        if min(numbers) < 1:
            raise ValueError
        return numbers

    def regex(text: str) -> re.Pattern[str]:
        try:
            return re.compile(text)
        except re.error as error:
            raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from None

    def seconds(text: str) -> float:
        if not 0 < float(text) < math.inf:
            raise ValueError
        return float(text)

    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measures the speed of torchrnn against its peers."
    )
    add = parser.add_argument
    add("--filter", metavar="REGEX", type=regex, default="", help="only cases whose id it is found in")
    add("--threads", metavar="N,N", type=threads, default=[1, 2], help="numbers of threads [1,2]")
    add("--isa", choices=torchrnn.info()["isas"], help="instruction set of our kernels [the best there is]")
    add("--budget", metavar="S", type=seconds, help="seconds per row; slow rows take longer [4]")
    add("--quick", action="store_true", help="tiny cases and few repeats, to see whether the bench works")
    add(
        "--out",
        metavar="DIR",
        type=Path,
        default=results.FOLDER,
        help="folder of the JSON file [bench/results]",
    )
    args = parser.parse_args(argv)
    args.budget = args.budget or (0.02 if args.quick else 4.0)
    return args


def run_worker(options: dict[str, Any], isa: str | None, on_row: Callable[[dict[str, Any]], None]) -> Run:
    """Measures on one number of threads, in a process of its own."""
    threads = str(options["threads"])
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if isa:
        environment["TORCHRNN_ISA"] = isa
    command = [sys.executable, "-m", "bench.worker", json.dumps(options)]
    run = None
    with subprocess.Popen(
        command, cwd=results.ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            run = message.get("run")
            if not run:
                on_row(message)
    if process.returncode or not run:
        raise RuntimeError(f"the process for {threads} threads failed with status {process.returncode}")
    return results.run(run)


def measure(args: argparse.Namespace, chosen: list[Case], console: Console) -> Result:
    """Runs the cases on each number of threads, behind a progress bar; without a terminal, a line per row."""
    options = {"filter": args.filter.pattern, "budget": args.budget, "quick": args.quick, "isa": args.isa}
    result = results.describe(options)
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=len(chosen) * len(args.threads))

        def on_row(row: dict[str, Any]) -> None:
            progress.update(bar, advance=1, description=row["id"])
            if not console.is_terminal:
                ratios = ", ".join(f"{ratio:.2f} of {name}" for name, ratio in row["ratios"].items())
                console.print(f"{row['id']}: {row['ours']:.3f} ms, ratio {ratios}")

        for threads in args.threads:
            if not console.is_terminal:
                console.print(f"threads {threads}")
            worker = {
                "threads": threads,
                "quick": args.quick,
                "budget": args.budget,
                "cases": [dataclasses.asdict(case) for case in chosen],
            }
            result.runs.append(run_worker(worker, args.isa, on_row))
    return result


def report(result: Result, console: Console) -> None:
    """Prints the table, the geometric means of the ratios, and the worst row."""
    console.print(f"{result.machine}; torch {result.torch}, torchrnn {result.torchrnn}")
    if result.load > QUIET_LOAD:
        console.print(
            f"load {result.load:.1f} at the start: other processes disturb these times, and with several "
            "threads the ratios too, because a library that waits for a thread waits for them",
            style="yellow",
        )
    for run in result.runs:
        rates = [f"{run.floors.gflops:.0f} GFLOP/s ({run.floors.peak_source})"]
        rates += [f"{level.name} {level.bandwidth:.0f} GB/s" for level in run.floors.levels]
        console.print(f"threads {run.threads}, kernels {run.isa or 'none'}: {', '.join(rates)}")
    console.print(table(result.rows))
    for peer in PEERS:
        rows = [row for row in result.rows if peer.name in row.ratios]
        parts = {f"threads {run.threads}": run.rows for run in result.runs} | {"together": rows}
        for label, part in parts.items():
            means = results.geometric_means(part, peer.name)
            text = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
            console.print(f"geometric mean of {peer.name} / {OURS.name}, {label}: {text}")
        worst = min(rows, key=lambda row: row.ratios[peer.name])
        console.print(f"worst: {worst.ratios[peer.name]:.2f}, {worst.id}, threads {worst.threads}")


def table(rows: Sequence[Row]) -> Table:
    """Returns the rows as a table, with two columns per peer: its median and the ratio of that to ours."""
    names = [peer.name for peer in PEERS]
    out = Table("case", title="medians in ms; ratio: peer / ours; error: ours, and the largest of a peer")
    per_peer = [title for name in names for title in (name, "ratio")]
    for title in ("thr", OURS.name, *per_peer, "of peak", "of floor", "error", "peer's"):
        out.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        cells = [row.id, str(row.threads), f"{row.ours.median:.3f}"]
        for name in names:
            compared = name in row.peers
            cells += [f"{row.peers[name].median:.3f}", f"{row.ratios[name]:.2f}"] if compared else ["", ""]
        worst = max((row.errors[name] for name in names if name in row.errors), default=math.nan)
        cells += [f"{row.peak_fraction:.0%}", f"{row.floor_fraction:.0%}"]
        out.add_row(*cells, f"{row.errors[OURS.name]:.1e}", f"{worst:.1e}")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the bench and returns its exit status."""
    args, console = parse(argv), Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    chosen = [case for case in cases(QUICK_SIZES if args.quick else SIZES) if args.filter.search(case.id)]
    if not chosen:
        print(f"bench: no case matches {args.filter.pattern!r}", file=sys.stderr)
        return 2
    result = measure(args, chosen, console)
    report(result, console)
    console.print(f"written to {results.save(result, args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
