"""Which path is the fastest where: what a new row of the table of paths has to be read from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from bench.cases import Case
from bench.gpu_cases import EAGER, plain
from bench.peers import OURS
from bench.results import GpuRow

STEP, CLUSTER = f"{OURS.name} step", f"{OURS.name} cluster"


class Line(NamedTuple):
    """The rows of one dtype, cell, pass and H. By batch size, how many times as fast."""

    dtype: str
    cell: str
    mode: str
    hidden: int
    batches: tuple[int, ...]  # That were measured.
    clustered: dict[int, float]  # The cluster path as the step path, where it is faster.
    delegated: dict[int, float]  # Eager torch.nn as the faster one of ours, where it is faster than both.


def lines(rows: Iterable[GpuRow]) -> list[Line]:
    """Returns what the rows of one layer, one direction and full length say, in order."""
    found: dict[tuple[str, str, str, int], dict[int, dict[str, float]]] = {}
    for row in rows:
        case = Case(**row.case)
        if plain(case) and STEP in row.us:
            key = case.dtype, case.cell, case.mode, case.hidden
            found.setdefault(key, {})[case.batch] = row.us
    return [Line(*key, *compare(dict(sorted(found[key].items())))) for key in sorted(found)]


def compare(times: dict[int, dict[str, float]]) -> tuple[tuple[int, ...], dict[int, float], dict[int, float]]:
    """Returns the last three fields of a line, from microseconds by batch size and name."""
    clustered, delegated = {}, {}
    for batch, us in times.items():
        ours = min(us[STEP], us.get(CLUSTER, us[STEP]))
        if ours < us[STEP]:
            clustered[batch] = us[STEP] / ours
        if us.get(EAGER, ours) < ours:
            delegated[batch] = ours / us[EAGER]
    return tuple(times), clustered, delegated


def table(rows: Iterable[GpuRow]) -> list[tuple[str, ...]]:
    """Returns the lines as text in columns, the first one their heads."""

    def words(faster: dict[int, float]) -> str:
        return ", ".join(f"{batch}: {ratio:.2f}" for batch, ratio in faster.items())

    found: list[tuple[str, ...]] = [
        ("dtype", "cell", "pass", "H", "at B", "cluster / step", f"{EAGER} / best of ours")
    ]
    for *names, batches, clustered, delegated in lines(rows):
        at = " ".join(map(str, batches))
        found.append((*map(str, names), at, words(clustered), words(delegated)))
    return found
