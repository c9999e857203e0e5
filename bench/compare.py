"""Says whether the speeds are what they must be: ``python -m bench compare``.

A ratio is our time over another's, so below 1 we are faster.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import options, results
from bench.adapters.before import Before
from bench.peers import OURS, PEERS
from bench.results import Contention, Result, Verdict

TORCH = PEERS[0].name
# Of contention: what need not be shared among threads, against one thread; what must be, against torch.nn.
ONE_THREAD, ONE_THREAD_P99, TORCH_MEDIAN = "1 thread, median", "1 thread, p99", "torch.nn, median"
SMALL_STEP, LARGE_STEP = "-b1-t1-h256-", "-b8-t128-h256-"


@dataclass(frozen=True)
class Bar:
    """The most that our time may be of another's: in the geometric mean of the rows, and in each row."""

    mean: float | None = None
    row: float | None = None


# By suite and by what it is compared with.
BARS = {
    ("infer", Before.name): Bar(mean=1.05, row=1.15),
    ("train", Before.name): Bar(mean=1.03),
    ("stream", Before.name): Bar(row=1.15),
    ("small", Before.name): Bar(mean=1.3),
    ("small", TORCH): Bar(row=1.0),
    ("contention", ONE_THREAD): Bar(row=2.0),
    ("contention", ONE_THREAD_P99): Bar(row=4.0),
    ("contention", TORCH_MEDIAN): Bar(row=1.0),
}

LISTED = 5  # Rows in a line of the report; the file has all.
Ratios = dict[tuple[str, int, str], dict[str, float]]  # Suite, threads, against what -> row -> ratio.


def judge(result: Result) -> list[Verdict]:
    """Returns what the rows of each suite have reached against the commit before and against torch.nn."""
    found = row_ratios(result) | step_ratios(result.contention)
    return [verdict(*key, ratios, BARS.get((key[0], key[2]), Bar())) for key, ratios in found.items()]


def verdict(suite: str, threads: int, against: str, ratios: Mapping[str, float], bar: Bar) -> Verdict:
    mean, worst = statistics.geometric_mean(ratios.values()), max(ratios.values())
    reached = [value <= most for value, most in ((mean, bar.mean), (worst, bar.row)) if most is not None]
    ordered = sorted(ratios.items(), key=lambda item: -item[1])
    return Verdict(
        suite=suite,
        threads=threads,
        against=against,
        rows=len(ratios),
        mean=mean,
        most_mean=bar.mean,
        worst=worst,
        most=bar.row,
        above={name: ratio for name, ratio in ordered if ratio > (bar.row or 1.0)},
        met=all(reached) if reached else None,
    )


def row_ratios(result: Result) -> Ratios:
    found: Ratios = {}
    for against in (Before.name, TORCH):
        for row in result.rows:
            if against in row.ratios:
                found.setdefault((row.group, row.threads, against), {})[row.id] = 1 / row.ratios[against]
    return found


def step_ratios(steps: Iterable[Contention]) -> Ratios:
    """Returns the ratios of the steps of ours on several threads, in each situation."""
    by_key = {(step.id, step.situation, step.name, step.threads): step for step in steps}
    found: Ratios = {}
    for (case, situation, name, threads), ours in by_key.items():
        if name != OURS.name or threads == 1:
            continue
        one = by_key.get((case, situation, OURS.name, 1))
        torchs = by_key.get((case, situation, TORCH, threads))
        ratios = {}
        if one and ours.p99 and one.p99 and SMALL_STEP in case:
            ratios[ONE_THREAD] = ours.time.median / one.time.median
            ratios[ONE_THREAD_P99] = ours.p99 / one.p99
        if torchs and LARGE_STEP in case:
            ratios[TORCH_MEDIAN] = ours.time.median / torchs.time.median
        for against, ratio in ratios.items():
            found.setdefault(("contention", threads, against), {})[f"{case}, {situation}"] = ratio
    return found


def table(verdicts: Sequence[Verdict]) -> Table:
    """Returns a line per suite, number of threads and what it is compared with."""
    out = Table(title="our time / another's: geometric mean and worst row, and what they may be at most")
    for title in ("suite", "thr", "against", "rows", "mean", "at most", "worst", "at most", "above", "holds"):
        left = title in ("suite", "against", "holds")
        out.add_column(title, justify="left" if left else "right", no_wrap=True)
    for v in verdicts:
        numbers = [f"{x:.2f}" if x is not None else "" for x in (v.mean, v.most_mean, v.worst, v.most)]
        holds = {True: "yes", False: "NO", None: ""}[v.met]
        out.add_row(v.suite, str(v.threads), v.against, str(v.rows), *numbers, str(len(v.above)), holds)
    return out


def report(verdicts: Sequence[Verdict], console: Console) -> None:
    """Prints the table, and the worst rows of each line that are above what they may be."""
    console.print(table(verdicts))
    for v in verdicts:
        if v.above:
            worst = [f"{ratio:.2f} {name}" for name, ratio in list(v.above.items())[:LISTED]]
            more = [f"and {len(v.above) - LISTED} more"] if len(v.above) > LISTED else []
            label = f"{v.suite}, {v.threads} thread{'s'[: v.threads > 1]}, {v.against}"
            console.print(f"{label}: {'; '.join(worst + more)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 1 if something is not what it must be."""
    parser = argparse.ArgumentParser(
        prog="python -m bench compare",
        description="Says whether the speeds are what they must be, against the commit before and torch.nn.",
    )
    add = parser.add_argument
    newest = "results [the newest full one of each suite in bench/results]"
    add("files", nargs="*", metavar="FILES", type=Path, help=newest)
    add("--dirty", action="store_true", help="take results of code that was not committed, too")
    args, console = parser.parse_args(argv), options.console()
    files = args.files or results.FOLDER.glob("*.json")
    verdicts: dict[tuple[str, int, str], tuple[Verdict, Path]] = {}
    for path, result in results.usable(files, full=not args.files, dirty=args.dirty):
        for v in judge(result):
            verdicts[v.suite, v.threads, v.against] = v, path
    if not verdicts:
        print("bench compare: no result of committed code (--dirty takes others, too)", file=sys.stderr)
        return 2
    found = [v for v, _ in verdicts.values()]
    report(found, console)
    for path in dict.fromkeys(path for _, path in verdicts.values()):
        console.print(f"taken from {path.name}")
    return 1 if any(v.met is False for v in found) else 0


if __name__ == "__main__":
    sys.exit(main())
