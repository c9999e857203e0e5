"""The plots of the report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.peers import PEERS
from bench.results import Row

# Okabe & Ito 2008: distinct for the colour-blind too; markers are distinct without any colour.
# The peers after the fifth are in no plot.
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
STYLES = {
    peer.name: {"color": color, "marker": marker}
    for peer, color, marker in zip(PEERS, (BLUE, ORANGE, GREEN, RED, PURPLE), "os^Dv", strict=False)
}
MARKER = {"markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.5}
GREY = "#8a8a8a"
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
CELLS = {"lstm": "LSTM", "gru": "GRU"}
AXES = {"steps": "steps T", "batch": "rows B", "hidden": "width H"}
CENTRE = {"steps": 128, "batch": 32, "hidden": 256}
RC = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.edgecolor": GREY,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
}


def label(row: Row) -> str:
    """Returns the case without cell, mode and fp32: ``B 32  T 128  H 512  bi``."""
    parts = [part for part in row.id.split("-")[1:-1] if part != "fp32"]
    sized = [re.sub(r"^([btihl])(\d+)$", lambda m: f"{m[1].upper()} {m[2]}", part) for part in parts]
    return "  ".join(sized)


def speed(bands: Mapping[str, Sequence[Row]], path: Path) -> Path:
    """Draws the ratios to each peer and the fraction of the floor, on the most threads; returns the path.

    Args:
        bands: Title -> rows of a suite.
        path: Of the PNG file.
    """
    from matplotlib import pyplot as plt

    threads = max(row.threads for rows in bands.values() for row in rows)
    shown = {title: [row for row in rows if row.threads == threads] for title, rows in bands.items()}
    ratios = [ratio for rows in shown.values() for row in rows for ratio in row.ratios.values()]
    limits = min([0.8, *ratios]) / 1.15, max([1.25, *ratios]) * 1.15
    heights = [max(len(part(rows, cell)) for cell in CELLS) + 3 for rows in shown.values()]
    with plt.rc_context(RC):
        figure = plt.figure(figsize=(12, 0.235 * sum(heights) + 0.9), layout="constrained")
        grid = figure.add_gridspec(len(shown), 4, width_ratios=(3, 1, 3, 1), height_ratios=heights)
        for i, (title, rows) in enumerate(shown.items()):
            for j, (cell, name) in enumerate(CELLS.items()):
                left = figure.add_subplot(grid[i, 2 * j])
                right = figure.add_subplot(grid[i, 2 * j + 1], sharey=left)
                draw_band(left, right, part(rows, cell), limits, labels=j == 0)
                left.set_title(f"{name} {title}", loc="left", weight="bold")
        handles = [
            plt.Line2D([], [], linestyle="", label=name, **style)
            for name, style in STYLES.items()
            if any(name in row.ratios for rows in shown.values() for row in rows)
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
        figure.supxlabel(f"{threads} threads; right of 1 torchrnn is faster", color=GREY, fontsize=9)
        figure.savefig(path, dpi=120)
        plt.close(figure)
    return path


def part(rows: Sequence[Row], cell: str) -> list[Row]:
    """Returns the rows of a cell."""
    return [row for row in rows if row.id.startswith(f"{cell}-")]


def draw_band(
    left: Any, right: Any, rows: Sequence[Row], limits: tuple[float, float], *, labels: bool
) -> None:
    """Draws the ratios into the left axes, and the fractions of the floor into the right ones."""
    places = range(len(rows))
    left.axvspan(limits[0], 1, color="#f3f3f3", zorder=0)
    left.axvline(1, color="black", linewidth=1)
    for place, row in zip(places, rows, strict=True):
        for name, ratio in row.ratios.items():
            left.plot([ratio], [place], linestyle="", **MARKER, **STYLES[name])
    left.set_xscale("log")
    left.set_xlim(limits)
    left.set_xticks([tick for tick in TICKS if limits[0] <= tick <= limits[1]])
    left.set_xticks([], minor=True)
    left.xaxis.set_major_formatter("{x:g}")
    left.set_xlabel("time / time of torchrnn")
    left.set_yticks(places, [label(row) for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    right.barh(places, [100 * row.floor_fraction for row in rows], color="#56B4E9", height=0.6)
    for place, row in zip(places, rows, strict=True):
        right.text(3, place, f"{100 * row.floor_fraction:.0f}", va="center", fontsize=7.5)
    right.set_xlim(0, max([100.0, *(100 * row.floor_fraction for row in rows)]))
    right.set_xticks([0, 50, 100])
    right.set_xlabel("floor / time, %")
    right.tick_params(labelleft=False)
    left.tick_params(labelleft=labels, length=0, axis="y")
    right.tick_params(length=0, axis="y")
    for axes in (left, right):
        axes.grid(True)


def sweep(rows: Sequence[Row], path: Path) -> Path:
    """Draws the speed over each axis below the bound that the floor sets, and returns the path."""
    from matplotlib import pyplot as plt

    cases = [(Case(**row.case), row) for row in rows]
    series = list(dict.fromkeys((case.cell, case.mode) for case, _ in cases))
    threads = sorted({row.threads for row in rows})
    with plt.rc_context(RC):
        size = (11, 2.6 * len(series) + 0.8)
        figure, grid = plt.subplots(
            len(series), 3, figsize=size, layout="constrained", squeeze=False, sharex="col", sharey="row"
        )
        for line, (cell, mode) in zip(grid, series, strict=True):
            for axes, axis in zip(line, AXES, strict=True):
                mine = [(c, row) for c, row in cases if (c.cell, c.mode) == (cell, mode) and varies(c, axis)]
                draw_sweep(axes, mine, axis, threads)
            line[0].set_ylabel("GFLOP/s")
            line[0].set_ylim(bottom=0)
            name = {"infer": "inference", "train": "training"}[mode]
            line[0].set_title(f"{CELLS[cell]} {name}", loc="left", weight="bold")
        for axes, (axis, title) in zip(grid[-1], AXES.items(), strict=True):
            rest = ", ".join(f"{k[0].upper().replace('S', 'T')} {v}" for k, v in CENTRE.items() if k != axis)
            axes.set_xlabel(f"{title}  ({rest})")
        handles, names = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=2 * len(threads), frameon=False)
        figure.savefig(path, dpi=120)
        plt.close(figure)
    return path


def varies(case: Case, axis: str) -> bool:
    """Returns whether a case lies on an axis of the sweep."""
    return all(getattr(case, name) == value for name, value in CENTRE.items() if name != axis)


def draw_sweep(axes: Any, cases: Sequence[tuple[Case, Row]], axis: str, threads: Sequence[int]) -> None:
    """Draws the speeds of one cell and mode over one axis, and their bounds dashed."""
    for count, color, marker in zip(threads, (BLUE, RED, GREEN, PURPLE), "os^D", strict=False):
        points = sorted(
            (getattr(case, axis), row.gflops, row.gflops / row.floor_fraction)
            for case, row in cases
            if row.threads == count
        )
        at = [point[0] for point in points]
        name = f"{count} thread{'s'[: count > 1]}"
        style = {"color": color, "marker": marker, "markersize": 4}
        axes.plot(at, [point[1] for point in points], label=name, **style)
        axes.plot(at, [point[2] for point in points], label=f"bound, {name}", color=color, linestyle="--")
    values = sorted({getattr(case, axis) for case, _ in cases})
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.set_xticks([], minor=True)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(True)
