"""Writes the measured speeds into README.md and draws them: ``python -m bench report``.

Only the part of README.md between two markers is replaced.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import plots, results
from bench.peers import OURS, PEERS
from bench.results import ALONE, SAME, Contention, Gpu, Memory, Result, Row

WIDTH = 120  # Of the lines in README.md.
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SUITES = {"infer": "inference", "train": "training", "half": "half-precision inference"}
ALL = (*SUITES, "tf", "sweep", "memory", "contention", "gpu")
CELLS = {"lstm": "LSTM", "gru": "GRU"}

Picked = dict[str, tuple[Path, Result]]  # Suite -> the file that it is taken from.


def pick(files: Iterable[Path], *, full: bool, dirty: bool) -> Picked:
    """Returns the newest result of each suite, see ``results.usable``; a full one has all peers."""
    usable = [
        (path, r)
        for path, r in results.usable(files, full=full, dirty=dirty)
        if not full or r.options.get("peers") is None
    ]
    return {suite: (path, r) for suite in ALL for path, r in usable if suite in r.suites}


def rows_of(picked: Picked, suite: str) -> list[Row]:
    """Returns the rows of a suite on all numbers of threads, without other checkouts than this one."""
    if suite not in picked:
        return []
    names = {peer.name for peer in PEERS}
    return [
        dataclasses.replace(row, ratios={name: row.ratios[name] for name in row.ratios if name in names})
        for row in picked[suite][1].rows
        if row.group == suite
    ]


def peer_names(rows: Iterable[Row]) -> list[str]:
    """Returns who has been measured, in the order of ``PEERS``."""
    measured = {name for row in rows for name in row.ratios}
    return [peer.name for peer in PEERS if peer.name in measured]


def markdown(titles: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Returns a table whose first columns are aligned to the left, and the others to the right."""
    rules = ["---" if column < left else "---:" for column in range(len(titles))]
    return [f"| {' | '.join(cells)} |" for cells in (titles, rules, *lines)]


def summary(picked: Picked) -> list[str]:
    """Returns a line per suite and peer: geometric mean, worst and best row of each cell."""
    lines = []
    for suite, title in SUITES.items():
        rows = rows_of(picked, suite)
        for name in peer_names(rows):
            cells = []
            for cell in CELLS:
                part = [row.ratios[name] for row in rows if row.id.startswith(cell) and name in row.ratios]
                mean = f"**{statistics.geometric_mean(part):.2f}**" if part else ""
                cells.append(f"{mean} ({min(part):.2f} to {max(part):.2f})" if part else "")
            ratios = [row.ratios[name] for row in rows if name in row.ratios]
            below = f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}"
            lines.append([title, name, *cells, below])
    return markdown(["", "against", *CELLS.values(), "rows below 1"], lines, left=2)


def table(rows: Sequence[Row]) -> tuple[str, list[str]]:
    """Returns the most threads that there are, in words, and the rows of these."""
    threads = max(row.threads for row in rows)
    rows = [row for row in rows if row.threads == threads]
    names = peer_names(rows)
    lines = [
        [
            row.id,
            f"{row.ours.median:.3g}" if row.ours.median < 100 else f"{row.ours.median:.0f}",
            *(f"{row.ratios[name]:.2f}" if name in row.ratios else "" for name in names),
            f"{row.floor_fraction:.0%}",
        ]
        for row in rows
    ]
    return f"{threads} thread{'s'[: threads > 1]}", markdown(["case", "ms", *names, "of floor"], lines)


def detail(rows: Sequence[Row], title: str) -> list[str]:
    """Returns the rows of the most threads as a table that opens on a click."""
    threads, lines = table(rows)
    head = f"<summary>Each row of {title} on {threads}</summary>"
    return ["", "<details>", head, "", *lines, "", "</details>"]


def tf(rows: Sequence[Row]) -> list[str]:
    """Returns the speed of TensorFlow 1's cells on the most threads."""
    threads, lines = table(rows)
    text = (
        f"TensorFlow 1's cells under `dynamic_rnn` on {threads}: time over that of torchrnn of the generic "
        "loop, which calls the same cell step by step, and of `torchrnn.LSTM` or `GRU` with the same sizes "
        "and without the cell's variations."
    )
    return ["", prose(text), "", *lines]


def memory(rows: Sequence[Memory]) -> list[str]:
    """Returns the peaks of a training step, and the price of recomputation."""
    names = list(dict.fromkeys(name for row in rows for name in row.peaks))
    lines = [
        [
            row.id,
            *(
                f"{row.peaks[name] / 2**20:.0f} MiB, {row.times[name] / row.times[OURS.name]:.2f}"
                if name in row.peaks
                else ""
                for name in names
            ),
        ]
        for row in rows
    ]
    text = "Memory of a training step at its peak, beyond inputs and weights, and time over that of torchrnn:"
    return ["", prose(text), "", *markdown(["case", *names], lines)]


def contention(rows: Sequence[Contention], cores: int) -> list[str]:
    """Returns what a step becomes beside another process."""
    threads = max(row.threads for row in rows)
    found = {(row.id, row.name, row.situation): row for row in rows if row.threads == threads}
    names = list(dict.fromkeys(name for _, name, _ in found))

    def ratios(case: str, name: str) -> str:
        alone, same = (found.get((case, name, situation)) for situation in (ALONE, SAME))
        if not alone or not same:
            return ""
        return f"{same.time.median / alone.time.median:.2f}, {same.maximum / alone.time.median:.1f}"

    cases = dict.fromkeys(case for case, _, situation in found if situation == SAME)
    lines = [[case, *(ratios(case, name) for name in names)] for case in cases]
    text = (
        f"A step while another process runs the same, each on {threads} threads of the same {cores} cores: "
        "its median, and the longest of all, over the median alone:"
    )
    return ["", prose(text), "", *markdown(["case", *names], lines)]


def gpu(measured: Gpu) -> list[str]:
    """Returns what has been reached on a GPU, and each row in a table that opens on a click."""
    bars = [
        [
            f"{bar.name}: {bar.regime}",
            bar.peer,
            bar.verdict,
            f"{bar.must:.2f}",
            f"{bar.worst:.2f}" if bar.worst is not None else "",
            f"{bar.median:.2f}" if bar.median is not None else "",
            f"{bar.measured} of {bar.cases}",
        ]
        for bar in measured.bars
    ]
    names = list(dict.fromkeys(name for row in measured.rows for name in row.ratios))
    rows = [
        [
            row.id,
            f"{row.us[OURS.name]:.2f}" if row.us else "failed",
            *(f"{row.ratios[name]:.2f}" if name in row.ratios else "" for name in names),
            f"{row.floor_fraction:.0%}" if row.floor_fraction is not None else "",
        ]
        for row in measured.rows
    ]
    failed = sum(bool(row.failed) for row in measured.rows)
    name = measured.device["name"]
    text = (
        f"On one {name}: time of a peer over time of torchrnn, and what it must be in every "
        f"row of a kind. Of {len(rows) + len(measured.not_run)} rows {len(rows)} were run; {failed} of them "
        f"failed, and {len(measured.below)} were slower than torch.nn by more than 3 %. The floor comes from "
        "a model of an H200, not from a measurement."
    )
    columns = ["kind", "against", "reached", "must", "worst", "median", "rows"]
    head = f"<summary>Each row on {name}: microseconds per step</summary>"
    titles = ["case", "us", *names, "of floor [model]"]
    return [
        *["", prose(text), "", *markdown(columns, bars, left=3)],
        *["", "<details>", head, "", *markdown(titles, rows), "", "</details>"],
    ]


def sources(picked: Picked) -> list[str]:
    """Returns on what was measured, and the names of the files."""
    by_path: dict[Path, tuple[Result, list[str]]] = {}
    for suite, (path, result) in picked.items():
        by_path.setdefault(path, (result, []))[1].append(suite)
    lines, names = [], {peer.name for peer in PEERS}
    for path, (result, suites) in by_path.items():
        versions = [f"{name} {text}" for name, text in result.versions.items() if name in names]
        on = f"{result.cores} cores of {result.machine}, torch {result.torch}"
        if result.gpu:
            on = "{name}, CUDA {cuda}, cuDNN {cudnn}, ".format_map(result.gpu.device) + on
        lines.append(prose(f"- `{path.name}` ({', '.join(suites)}): {', '.join([on, *versions])}"))
    return lines


def prose(text: str) -> str:
    """Returns a paragraph or a line of a list in lines of README.md's length."""
    indent = "  " if text.startswith("- ") else ""
    lines = textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


def section(picked: Picked, images: Sequence[tuple[str, str]]) -> str:
    """Returns what stands between the markers; ``images`` are pairs of text and path."""
    threads = {row.threads for suite in SUITES for row in rows_of(picked, suite)}
    on = " and ".join(map(str, sorted(threads)))
    text = (
        "Time of a peer over time of torchrnn, so above 1 torchrnn is faster: geometric mean (worst to best "
        f"row), medians of interleaved runs on {on} threads. The floor is the least time that the measured "
        "peak of arithmetic and the measured bandwidths allow."
    )
    parts = [prose(text), "", *summary(picked)] if threads else []
    for label, path in images:
        parts += ["", f"![{label}]({path})"]
    for suite, title in SUITES.items():
        if rows := rows_of(picked, suite):
            parts += detail(rows, title)
    if rows := rows_of(picked, "tf"):
        parts += tf(rows)
    if "memory" in picked:
        parts += memory(picked["memory"][1].memory)
    if "contention" in picked:
        result = picked["contention"][1]
        parts += contention(result.contention, result.cores)
    if "gpu" in picked and (measured := picked["gpu"][1].gpu):
        parts += gpu(measured)
    parts += ["", "Measured in `bench/results`:", "", *sources(picked)]
    return "\n".join(parts).strip() + "\n"


def replace(text: str, part: str) -> str:
    """Returns the text with the part between the markers; raises ValueError if it has none."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{part}{END}{tail}"


def draw(picked: Picked, folder: Path) -> dict[str, Path]:
    """Draws what there is and returns the files by what they show."""
    drawn = {}
    bands = {title: rows for suite, title in SUITES.items() if (rows := rows_of(picked, suite))}
    folder.mkdir(parents=True, exist_ok=True)
    if bands:
        drawn["Ratios to the peers and fractions of the floor"] = plots.speed(bands, folder / "speed.png")
    if rows := rows_of(picked, "sweep"):
        drawn["Speed over length, batch and width, and what bounds it"] = plots.sweep(
            rows, folder / "sweep.png"
        )
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench report", description="Writes the measured speeds into README.md and draws them."
    )
    add = parser.add_argument
    whole = "results [the newest full one of each suite in bench/results]"
    add("files", nargs="*", metavar="FILES", type=Path, help=whole)
    add("--readme", metavar="FILE", type=Path, default=results.ROOT / "README.md", help="[README.md]")
    add("--plots", metavar="DIR", type=Path, default=results.ROOT / "docs", help="folder of the plots [docs]")
    add("--dirty", action="store_true", help="take results of code that was not committed, too")
    args = parser.parse_args(argv)
    picked = pick(args.files or results.FOLDER.glob("*.json"), full=not args.files, dirty=args.dirty)
    if not picked:
        print("bench report: no result of committed code (--dirty takes others, too)", file=sys.stderr)
        return 2
    try:
        replace(args.readme.read_text(), "")
    except ValueError as error:
        print(f"bench report: {args.readme}: {error}", file=sys.stderr)
        return 2
    drawn = draw(picked, args.plots)
    images = [(label, os.path.relpath(path, args.readme.parent)) for label, path in drawn.items()]
    args.readme.write_text(replace(args.readme.read_text(), section(picked, images)))
    for path in (args.readme, *drawn.values()):
        print(f"written to {path}")
    for suite, (path, _) in picked.items():
        print(f"{suite}: {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
