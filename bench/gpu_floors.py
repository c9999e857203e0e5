"""The least time of a case on an H200, from a model: nothing here has been measured on the layers.

A step of a kernel that keeps the recurrent weight on the chip is a chain: wait for the state of the step
before, receive it, multiply, and compute the cell. Source: the project's notes on CUDA kernels, "Physics and
floors on H200"; the inputs are published latencies and rates of H100, H200 and H800. The least is taken over
the layouts that fit: clusters of thread blocks that exchange the state through distributed shared memory, and
grids that exchange it through the L2 cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from bench.cases import BYTES, GATES, Case

SOURCE = "[model, H200]"

CLOCK = 1900.0  # Cycles per microsecond.
PROCESSORS = 132
CLUSTER_HOP, GRID_HOP = 280, 700  # Cycles from a write to its being seen, in a cluster and through L2.
CLUSTER_RATE, GRID_RATE = 16, 26  # Bytes per cycle that a processor receives.
PRODUCTS = {2: 1270, 4: 635}  # Multiply-adds per cycle and processor, by the bytes of a number; 4 is TF32.
CELL, CELL_ROW = 220, 70  # Cycles of the cell, and of each element that a thread computes.
THREADS = 256
RESIDENT = 288 << 10  # Bytes of weights that registers and shared memory of one block hold.
MATRIX_RATE = {2: 650e6, 4: 325e6}  # Operations per microsecond of the large matrix products.
LAUNCH = 7.0  # Microseconds of a launch and of loading the weights.

# Thread blocks of a cluster, and how many such clusters run at once.
CLUSTERS = {1: 132, 2: 66, 4: 33, 8: 15, 16: 7}
CLUSTER_ROWS = (8, 16, 32, 48)
GRID_UNITS = (8, 16, 24, 32, 48)
GRID_ROWS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Layout:
    """Blocks of ``units`` hidden units and ``rows`` batch rows each, ``blocks`` of them for each row."""

    clustered: bool
    blocks: int
    units: int
    rows: int


def layouts(case: Case) -> Iterator[Layout]:
    """Yields the ways to lay out the recurrence of a case, all directions in one launch."""
    weight, hidden = case.recurrent_bytes, case.hidden
    for blocks, most in CLUSTERS.items():
        for rows in CLUSTER_ROWS:
            clusters = math.ceil(case.batch / rows) * case.directions
            if hidden % (8 * blocks) == 0 and clusters <= most and weight <= blocks * RESIDENT:
                yield Layout(True, blocks, hidden // blocks, rows)
    for units in GRID_UNITS:
        for rows in GRID_ROWS:
            blocks = hidden // units
            slices = math.ceil(case.batch / rows) * case.directions
            if hidden % units == 0 and blocks * slices <= PROCESSORS and weight <= blocks * RESIDENT:
                yield Layout(False, blocks, units, rows)


def step(case: Case, layout: Layout, backward: bool) -> float:
    """Returns the microseconds of one step.

    In a cluster the state goes to all, and on the way back float32 parts of its gradient go to the owner of
    each unit. In a grid the state goes to all, and on the way back the gradients of all gates.
    """
    gates, size = GATES[case.cell], BYTES[case.dtype]
    state = case.hidden * layout.rows
    if layout.clustered:
        received = state * (4 if backward else size) * (layout.blocks - 1) / layout.blocks
        exchange = CLUSTER_HOP + received / CLUSTER_RATE
    else:
        exchange = GRID_HOP + state * size * (gates if backward else 1) / GRID_RATE
    products = gates * case.hidden * layout.units * layout.rows / PRODUCTS[size]
    elements = math.ceil(layout.units * layout.rows / THREADS)
    return (exchange + products + CELL + CELL_ROW * elements) / CLOCK


def recurrence(case: Case, backward: bool) -> float:
    """Returns the microseconds of one step of one layer; ValueError where no layout fits."""
    return min(step(case, layout, backward) for layout in layouts(case))


def microseconds(case: Case) -> float:
    """Returns the least microseconds of a case over its steps, with one layer after the other.

    Forward, the products with the inputs come before the recurrence; the way back ends with those for the
    gradients of the inputs and of both weights.
    """
    steps, size = max(case.lengths), BYTES[case.dtype]
    passes = recurrence(case, backward=False) * steps + LAUNCH
    products = float(case.projection_flops)
    if case.mode == "train":
        passes += recurrence(case, backward=True) * steps + LAUNCH
        products += 2 * case.projection_flops + case.recurrent_flops
    return (case.layers * passes + products / MATRIX_RATE[size]) / steps
