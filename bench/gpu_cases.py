"""What is measured on a GPU, in which order, and which rows must reach what."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.cases import GATES, Case
from bench.results import GpuBar, GpuRow

STEPS = 512
HIDDEN = (64, 128, 192, 256, 384, 512, 768, 1024)
BATCHES = (1, 8, 16, 32, 64, 128, 256)
DTYPES = ("bfloat16", "float16", "float32")
MODES = ("infer", "train")
# One direction and one layer, both directions, two layers, and rows of several lengths.
PLAIN: dict[str, Any] = {}
VARIANTS: tuple[dict[str, Any], ...] = (PLAIN, {"directions": 2}, {"layers": 2}, {"ragged": True})

PERSISTENT, SMALL, STANDARD = "PERSIST_STATIC", "PERSIST_STATIC_SMALL_H", "STANDARD"

LEAST = 0.97  # No row may be slower than torch.nn by more than this.
EAGER, GRAPHED = "torch.nn", "torch.nn graph"


def algorithm(case: Case) -> str:
    """Returns what torch 2.11 asks of cuDNN on sm_80 and later, read in its ``get_algo``."""
    plain = case.layers == 1 and case.directions == 1
    wide = case.hidden <= 1024 and case.hidden % 128 == 0 and case.inputs % 128 == 0
    rows = case.batch % 8 == 0 and case.batch <= 128
    # Packed rows have no persistent kernel, nor has bfloat16.
    if case.ragged or case.dtype == "bfloat16":
        return STANDARD
    if case.dtype == "float16" and case.cell == "lstm" and plain and wide and rows:
        return PERSISTENT
    return SMALL if case.hidden <= (192 if case.mode == "infer" else 128) else STANDARD


@dataclass(frozen=True)
class Bar:
    """A set of rows, and the least ratio to eager ``torch.nn`` of the same dtype that each must reach.

    Under CUDA graphs, which take the cost of launches from ``torch.nn``, half of it.
    """

    name: str
    regime: str
    must: float
    covers: Callable[[Case], bool]


def plain(case: Case) -> bool:
    return case.directions == case.layers == 1 and not case.ragged


def r1(case: Case) -> bool:
    small = case.dtype == "bfloat16" and case.batch <= 8 and case.hidden <= 256
    return plain(case) and case.mode == "infer" and (small or (case.hidden == 256 and case.batch == 1))


def r1_small(case: Case) -> bool:
    sizes = case.batch <= 8 and case.hidden <= 128
    return plain(case) and case.mode == "infer" and sizes and case.dtype != "bfloat16"


def r3(case: Case) -> bool:
    sizes = 16 <= case.batch <= 64 and 128 <= case.hidden <= 512
    return plain(case) and case.mode == "train" and sizes and case.dtype != "float16"


def r6(case: Case) -> bool:
    several = case.directions == 2 or case.layers > 1
    return several and not case.ragged and case.hidden <= 512 and algorithm(case) == STANDARD


def r7(case: Case) -> bool:
    return plain(case) and case.cell == "gru" and 192 < case.hidden <= 512


def r8(case: Case) -> bool:
    return case.ragged and case.hidden <= 512


def r9(case: Case) -> bool:
    return plain(case) and case.mode == "infer" and 128 < case.hidden <= 192 and case.dtype != "bfloat16"


BARS = (
    Bar("R1", "inference B<=8 H<=256 bf16; fp16, fp32 at H=256 B=1", 5.0, r1),
    Bar("R1'", "inference B<=8 H<=128 fp16, fp32", 1.5, r1_small),
    Bar("R3", "training B 16-64 H 128-512 bf16, fp32", 4.0, r3),
    Bar("R6", "bidirectional or 2 layers, H<=512, cuDNN STANDARD", 4.0, r6),
    Bar("R7", "GRU H 193-512", 4.0, r7),
    Bar("R8", "rows of several lengths, H<=512", 3.0, r8),
    Bar("R9", "inference H 129-192 fp16, fp32", 5.0, r9),
)


def decides(case: Case) -> bool:
    """Whether a row is one of those that the table of paths is to be read from."""
    return plain(case) and case.batch in (8, 64) and case.hidden <= 512


def grid() -> list[Case]:
    """Returns all rows, the most important ones first."""
    axes = itertools.product(GATES, MODES, BATCHES, HIDDEN, DTYPES, VARIANTS)
    return ordered(
        Case(cell, mode, STEPS, batch, hidden, hidden, dtype=dtype, **variant)
        for cell, mode, batch, hidden, dtype, variant in axes
    )


def ordered(cases: Iterable[Case]) -> list[Case]:
    """Returns the cases such that a run which stops early has rows from all over each bar.

    Those that decide the table of paths take turns with those of the bars, and the bars with each other; the
    rows of each, and after them the rest, come in no order but always the same one.
    """
    shuffled = list(cases)
    random.Random(0).shuffle(shuffled)
    bars = turns([case for case in shuffled if bar.covers(case)] for bar in BARS)
    first = turns([[case for case in shuffled if decides(case)], bars])
    rest = sorted(shuffled, key=lambda case: case.hidden > 512)
    return list(dict.fromkeys([*first, *rest]))


def turns(lists: Iterable[list[Case]]) -> list[Case]:
    """Returns the first case of each list, then the second of each, and so on until all are empty."""
    rounds = itertools.zip_longest(*lists)
    return [case for one in rounds for case in one if case is not None]


def quick() -> list[Case]:
    """Returns tiny cases of every kind."""
    tiny = Case("lstm", "infer", 4, 2, 8, 8, dtype="bfloat16")
    kinds = [*VARIANTS, {"dtype": "float16"}, {"dtype": "float32"}]
    return ordered(
        dataclasses.replace(tiny, cell=cell, mode=mode, **kind)
        for cell, mode, kind in itertools.product(GATES, MODES, kinds)
    )


def check_bars(rows: Sequence[GpuRow], cases: Sequence[Case]) -> list[GpuBar]:
    """Returns each bar against eager ``torch.nn`` and against ``torch.nn`` under CUDA graphs.

    A row of ours that failed does not reach its bar. ``cases`` are all that there are, run or not, but under
    graphs without the packed ones, because packing copies to the device, which no graph may.
    """
    found = []
    for bar, (peer, share) in itertools.product(BARS, ((EAGER, 1.0), (GRAPHED, 0.5))):
        count = sum(bar.covers(case) and not (peer == GRAPHED and case.ragged) for case in cases)
        if not count:
            continue
        covered = [row for row in rows if bar.name in row.bars]
        failed = [row.id for row in covered if row.failed]
        ratios = {row.id: row.ratios[peer] for row in covered if peer in row.ratios}
        worst = min(ratios, key=lambda name: ratios[name]) if ratios else None
        must, met = share * bar.must, None
        if failed or worst:
            met = not failed and all(ratio >= must for ratio in ratios.values())
        found.append(
            GpuBar(
                name=bar.name,
                regime=bar.regime,
                peer=peer,
                must=must,
                measured=len(ratios),
                cases=count,
                failed=failed,
                worst=ratios[worst] if worst else None,
                worst_id=worst,
                median=statistics.median(ratios.values()) if ratios else None,
                met=met,
            )
        )
    return found


def below(rows: Iterable[GpuRow]) -> list[str]:
    """Returns the rows that are slower than eager ``torch.nn`` by more than is allowed."""
    return [row.id for row in rows if row.ratios.get(EAGER, LEAST) < LEAST]
