"""Measures torchrnn against its peers, prints the table and writes it to ``bench/results``.

python -m bench                                   # inference and training, half an hour on two cores
python -m bench --filter 'gru.*train' --threads 1
python -m bench --suite sweep                     # or half, small, stream, or tf: TensorFlow 1's cells
python -m bench --suite train --before ../before --peers torch.nn   # and what another checkout does
python -m bench memory | contention | compare | gpu | report   # see their --help
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # Run as a file: then Python looks for modules beside it, not in the project.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.table import Table

import torchrnn
from bench import compare, options, results
from bench.adapters import before
from bench.cases import ALL, QUICK, QUICK_SUITES, SUITES
from bench.peers import OURS, PEERS, skipped
from bench.results import Result, Row, Run

QUIET_LOAD = 0.5


def names(text: str) -> list[str]:
    chosen = [name for name in text.split(",") if name]
    if unknown := set(chosen).difference(peer.name for peer in PEERS):
        raise argparse.ArgumentTypeError(f"no peer: {', '.join(sorted(unknown))}")
    return chosen


def checkout(text: str) -> Path:
    path = Path(text).resolve()
    if not (path / "torchrnn" / "__init__.py").exists():
        raise argparse.ArgumentTypeError(f"no checkout of torchrnn: {text}")
    return path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("", "Measures the speed of torchrnn against its peers.")
    parser.epilog = (
        "Other commands, each with its --help: python -m bench memory, contention, compare, gpu, report."
    )
    add = parser.add_argument
    add("--suite", choices=[*SUITES, "all"], default="all", help="which cases [all: infer and train]")
    add("--threads", metavar="N,N", type=options.counts, default=[1, 2], help="numbers of threads [1,2]")
    add("--isa", choices=torchrnn.info()["isas"], help="instruction set of our kernels [the best there is]")
    add(
        "--budget",
        metavar="S",
        type=options.seconds,
        help="seconds per row, with --before twice [4; small: 0.5]",
    )
    add("--peers", metavar="NAME,NAME", type=names, help="only these of the suite's peers, or none: ''")
    other = "another built checkout, as a rule of the commit before, to take turns with"
    add("--before", metavar="DIR", type=checkout, help=other)
    return parser.parse_args(argv)


def choose(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the rows to measure, as the worker wants them."""
    chosen = ALL if args.suite == "all" else (args.suite,)
    suites = {name: SUITES[name] for name in chosen}
    if args.quick:
        suites = {args.suite: QUICK_SUITES[args.suite]} if args.suite in QUICK_SUITES else {"quick": QUICK}
    return [
        {
            "suite": name,
            "case": dataclasses.asdict(case),
            "peers": [peer for peer in suite.peers if args.peers is None or peer in args.peers],
            "budget": args.budget or (0.02 if args.quick else suite.budget),
        }
        for name, suite in suites.items()
        for case in suite.cases
        if args.filter.search(case.id)
    ]


def run_worker(asked: dict[str, Any], isa: str | None, on_row: Callable[[dict[str, Any]], None]) -> Run:
    """Measures on one number of threads, in a process of its own."""
    run = None
    with options.process("bench.worker", asked, {"TORCHRNN_ISA": isa} if isa else {}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            run = message.get("run")
            if not run:
                on_row(message)
    if process.returncode or not run:
        raise RuntimeError(
            f"the process for {asked['threads']} threads failed with status {process.returncode}"
        )
    return results.run(run)


def measure(
    args: argparse.Namespace, chosen: list[dict[str, Any]], against: dict[str, Any], console: Console
) -> Result:
    """Runs the cases on each number of threads, behind a progress bar; without a terminal, a line per row."""
    asked = {name: getattr(args, name) for name in ("suite", "budget", "quick", "isa", "threads", "peers")}
    result = results.describe(asked | {"filter": args.filter.pattern})
    result.before.update(against)
    if against:
        console.print("against {commit}, torch {torch}, kernels {isa}".format_map(against))
    result.skipped.update(skipped({name for row in chosen for name in row["peers"]}))
    for name, reason in result.skipped.items():
        console.print(f"skipped: {name}, {reason}", style="yellow")
    with options.progress(console) as progress:
        bar = progress.add_task("starting", total=len(chosen) * len(args.threads))

        def on_row(row: dict[str, Any]) -> None:
            progress.update(bar, advance=1, description=row["id"])
            if not console.is_terminal:
                ratios = "".join(f", {name} {ratio:.2f}" for name, ratio in row["ratios"].items())
                console.print(f"{row['id']}: {row['ours']:.3f} ms{ratios}")

        for threads in args.threads:
            if not console.is_terminal:
                console.print(f"threads {threads}")
            worker = {
                "threads": threads,
                "quick": args.quick,
                "before": args.before and str(args.before),
                "rows": chosen,
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
    for peer in peer_names(result.rows):
        rows = [row for row in result.rows if peer in row.ratios]
        parts = {f"threads {run.threads}": run.rows for run in result.runs} | {"together": rows}
        for label, part in parts.items():
            means = results.geometric_means(part, peer)
            text = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
            console.print(f"geometric mean of {peer} / {OURS.name}, {label}: {text}")
        worst = min(rows, key=lambda row: row.ratios[peer])
        console.print(f"worst: {worst.ratios[peer]:.2f}, {worst.id}, threads {worst.threads}")
    if any(verdict.met is not None for verdict in result.verdicts):
        compare.report(result.verdicts, console)


def peer_names(rows: Sequence[Row]) -> list[str]:
    """Returns who has been measured, in the order of ``PEERS``; the commit before comes last."""
    measured = {name for row in rows for name in row.ratios}
    return [name for name in (*(peer.name for peer in PEERS), before.Before.name) if name in measured]


def table(rows: Sequence[Row]) -> Table:
    """Returns the rows as a table, with the ratio of each peer's time to ours."""
    names = peer_names(rows)
    out = Table(title="medians in ms; peers: their time / ours; error: ours, and the largest of a peer")
    out.add_column("case", no_wrap=True)
    for title in ("thr", "ms", *names, "of peak", "of floor", "error", "peers'"):
        out.add_column(title, justify="right", no_wrap=title not in names)
    for row in rows:
        ratios = [f"{row.ratios[name]:.2f}" if name in row.ratios else "" for name in names]
        worst = max((row.errors[name] for name in row.ratios if name in row.errors), default=math.nan)
        cells = [row.id, str(row.threads), f"{row.ours.median:.3f}", *ratios]
        cells += [f"{row.peak_fraction:.0%}", f"{row.floor_fraction:.0%}", f"{row.errors[OURS.name]:.1e}"]
        out.add_row(*cells, "" if math.isnan(worst) else f"{worst:.1e}")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the bench and returns its exit status."""
    args, console = parse(argv), options.console()
    chosen = choose(args)
    if not chosen:
        print(f"bench: no case matches {args.filter.pattern!r}", file=sys.stderr)
        return 2
    try:
        against = before.describe(args.before) if args.before else {}
    except RuntimeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    result = measure(args, chosen, against, console)
    result.verdicts.extend(compare.judge(result))
    report(result, console)
    console.print(f"written to {results.save(result, args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
