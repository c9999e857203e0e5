"""What is measured: a new line in a table is a new row of the results."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

GATES = {"lstm": 4, "gru": 3}
# The classes that run one step; several steps are a loop in Python.
STEP_GATES = {"lstmcell": 4, "grucell": 3, "rnncell": 1}
# Columns of the products with the input and with the state, both over H, of the cells of torchrnn.rnn_cell.
TF_PRODUCTS = {
    "peephole-lstm": (4, 4),
    "reset-before-gru": (3, 3),
    "normalised-lstm": (4, 4),
    "coupled-lstm": (3, 3),
    "projected-lstm": (4, 5),
    "indrnn": (1, 0),
    "sru": (4, 0),
}
SMALL_GATES = {**GATES, "rnn": 1, **STEP_GATES}
PRODUCTS = {cell: (gates, gates) for cell, gates in SMALL_GATES.items()} | TF_PRODUCTS
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Case:
    """Layers of one cell.

    ``infer`` is the forward pass in inference mode; ``train`` is the forward pass and the gradients of the
    input, the weights and the biases. In both, what a user writes around a call is measured too. ``nograd``
    and ``grad`` are nothing but calls of the forward pass, without gradients and recorded for them.
    ``streaming`` passes the state of the call before. The rows of a ``ragged`` batch have the lengths of
    ``lengths``. Cells of ``TF_PRODUCTS`` keep numbers of the input, the output and the state of each layer
    with the probability ``keep`` in training.
    """

    cell: str
    mode: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    directions: int = 1
    layers: int = 1
    ragged: bool = False
    dtype: str = "float32"
    streaming: bool = False
    keep: float = 1.0

    @property
    def id(self) -> str:
        parts = (
            self.cell,
            f"b{self.batch}-t{self.steps}",
            "" if self.inputs == self.hidden else f"i{self.inputs}",
            f"h{self.hidden}",
            "bi" if self.directions == 2 else "",
            "" if self.layers == 1 else f"l{self.layers}",
            "" if self.keep == 1 else f"keep{self.keep:g}",
            "ragged" if self.ragged else "",
            "stream" if self.streaming else "",
            SHORT[self.dtype],
            self.mode,
        )
        return "-".join(part for part in parts if part)

    @property
    def bare(self) -> bool:
        """Returns whether the call alone is measured."""
        return self.mode in ("nograd", "grad")

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Returns the steps of each row: all, or from 1 to all in equal distances and no order."""
        if not self.ragged:
            return (self.steps,) * self.batch
        spread = torch.linspace(self.steps, 1, self.batch).round().int()
        order = torch.randperm(self.batch, generator=torch.Generator().manual_seed(0))
        return tuple(int(length) for length in spread[order])

    @property
    def projection_flops(self) -> int:
        """Returns the operations of the forward products with the inputs of the layers."""
        inputs = self.inputs + (self.layers - 1) * self.directions * self.hidden
        return 2 * sum(self.lengths) * self.directions * PRODUCTS[self.cell][0] * self.hidden * inputs

    @property
    def recurrent_flops(self) -> int:
        """Returns the operations of the forward products with the states."""
        columns = PRODUCTS[self.cell][1] * self.hidden
        return 2 * sum(self.lengths) * self.directions * self.layers * columns * self.hidden

    @property
    def flops(self) -> int:
        """Returns the operations of all matrix products; those of the activations are few beside them."""
        forward = self.projection_flops + self.recurrent_flops
        return 3 * forward if self.mode == "train" else forward

    @property
    def scan_flops(self) -> int:
        """Returns the part of ``flops`` in which one step waits for another."""
        return 2 * self.recurrent_flops if self.mode == "train" else self.recurrent_flops

    @property
    def recurrent_bytes(self) -> int:
        """Returns the size of the recurrent weight of one direction, which every step reads."""
        return PRODUCTS[self.cell][1] * self.hidden * self.hidden * BYTES[self.dtype]

    @property
    def input_bytes(self) -> int:
        """Returns the size of the input weight of the first layer and one direction."""
        return PRODUCTS[self.cell][0] * self.hidden * self.inputs * BYTES[self.dtype]

    @property
    def recurrent_reads(self) -> int:
        """Returns how often a weight of that size is read: once per step, and once more on the way back."""
        passes = 2 if self.mode == "train" else 1
        return passes * self.directions * self.layers * max(self.lengths)


@dataclass(frozen=True)
class Suite:
    """Cases, the names of the peers that they are compared with, and the seconds for each case."""

    cases: tuple[Case, ...]
    peers: tuple[str, ...]
    budget: float = 4.0


# (T, B, I, H): from what bandwidth bounds to what arithmetic bounds. 28 steps of 28: digits, row by row.
SIZES = (
    (128, 1, 128, 128),
    (128, 1, 512, 512),
    (128, 1, 1024, 1024),
    (128, 8, 256, 256),
    (128, 32, 128, 128),
    (128, 32, 256, 256),
    (128, 32, 512, 512),
    (64, 64, 512, 512),
    (64, 128, 1024, 1024),
    (28, 150, 28, 150),
)
STEP = (1, 1, 256, 256)
BIDIRECTIONAL_SIZES = ((128, 1, 256, 256), (128, 16, 256, 256))
LAYERS_SIZE = (128, 8, 256, 256)
RAGGED_SIZE = (128, 32, 256, 256)
HALF_SIZES = ((128, 32, 256, 256), (128, 32, 512, 512), (64, 128, 1024, 1024), (128, 1, 512, 512))
TF_SIZE = (128, 32, 256, 256)
QUICK_SIZES = ((1, 1, 16, 16), (4, 2, 8, 16))

# (T, B, H) of small calls, whose time is more in Python and in the start of kernels than in arithmetic.
SMALL = tuple(itertools.product((1, 4, 16), (1, 8, 32, 128), (16, 64, 256, 512)))
QUICK_SMALL_SIZES = ((1, 1, 8), (4, 2, 8))
STREAM_CELLS = ("lstm", "gru", "rnn")
STREAM_WIDTHS = (16, 32, 64, 128, 256, 512, 1024)

# (T, B, H) around (128, 32, 256), one axis at a time; the input is as wide as the layer.
SWEEP = (
    *((steps, 32, 256) for steps in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)),
    *((128, batch, 256) for batch in (1, 2, 4, 8, 16, 64, 128, 256)),
    *((128, 32, hidden) for hidden in (32, 64, 128, 512, 1024, 2048)),
)
SWEPT = (("lstm", "infer"), ("gru", "infer"), ("lstm", "train"))


def grid(mode: str) -> Iterable[Case]:
    """Yields the rows that inference and training share."""
    for cell in GATES:
        for size in SIZES:
            yield Case(cell, mode, *size)
        yield Case(cell, mode, *STEP, streaming=mode == "infer")
        for size in BIDIRECTIONAL_SIZES:
            yield Case(cell, mode, *size, directions=2)
        yield Case(cell, mode, *LAYERS_SIZE, layers=3)
        yield Case(cell, mode, *RAGGED_SIZE, ragged=True)


def half() -> Iterable[Case]:
    """Yields the rows of two bytes a number."""
    for cell in GATES:
        for dtype in ("bfloat16", "float16"):
            for size in HALF_SIZES:
                yield Case(cell, "infer", *size, dtype=dtype)


def sweep() -> Iterable[Case]:
    """Yields the points of the axes."""
    for cell, mode in SWEPT:
        for steps, batch, hidden in SWEEP:
            yield Case(cell, mode, steps, batch, hidden, hidden)


def small(sizes: Iterable[tuple[int, int, int]], mode: str = "nograd") -> Iterable[Case]:
    """Yields calls of every class, without a state and with one."""
    for cell, (steps, batch, hidden) in itertools.product(SMALL_GATES, sizes):
        for streaming in (False, True):
            yield Case(cell, mode, steps, batch, hidden, hidden, streaming=streaming)


def stream(widths: Iterable[int]) -> Iterable[Case]:
    """Yields steps of one row, each from the state of the one before."""
    for cell, hidden in itertools.product(STREAM_CELLS, widths):
        yield Case(cell, "nograd", 1, 1, hidden, hidden, streaming=True)


def tf(size: tuple[int, int, int, int]) -> Iterable[Case]:
    """Yields the rows of TensorFlow 1's cells: a stack with dropout and without, and each cell alone."""
    stack = Case("peephole-lstm", "train", *size, layers=2)
    yield dataclasses.replace(stack, keep=0.8)
    yield stack
    yield dataclasses.replace(stack, mode="infer")
    for cell in TF_PRODUCTS:
        if cell != stack.cell:
            yield Case(cell, "train", *size)
    for cell in ("reset-before-gru", "normalised-lstm"):
        yield Case(cell, "infer", *size)


def quick() -> Iterable[Case]:
    """Yields tiny cases of every kind that the adapters know."""
    for cell in GATES:
        for mode in ("infer", "train"):
            for size in QUICK_SIZES:
                yield Case(cell, mode, *size)
        small = Case(cell, "infer", *QUICK_SIZES[1])
        yield dataclasses.replace(small, directions=2, layers=2, ragged=True)
        yield dataclasses.replace(small, streaming=True)
        yield dataclasses.replace(small, dtype="bfloat16")


TRAINERS = ("torch.nn", "compiled loop")
PREPACKED = "torchrnn prepacked"
TF_PEERS = ("generic loop", "torchrnn plain")
SUITES = {
    "infer": Suite(tuple(grid("infer")), (*TRAINERS, PREPACKED, "onnxruntime", "openvino")),
    "train": Suite(tuple(grid("train")), TRAINERS),
    "half": Suite(tuple(half()), ("torch.nn", "torchrnn fp32")),
    "sweep": Suite(tuple(sweep()), ()),
    "tf": Suite(tuple(tf(TF_SIZE)), TF_PEERS),
    "small": Suite(tuple(small(SMALL)), ("torch.nn",), 0.5),
    "small-grad": Suite(tuple(small(SMALL, "grad")), ("torch.nn",), 0.5),
    "stream": Suite(tuple(stream(STREAM_WIDTHS)), ("torch.nn", PREPACKED)),
}
ALL = ("infer", "train")
QUICK = Suite(tuple(quick()), (*TRAINERS, PREPACKED, "onnxruntime", "openvino", "torchrnn fp32"))
# In the place of a suite; of one that is not here, QUICK.
QUICK_SUITES = {
    "tf": Suite(tuple(tf(QUICK_SIZES[1])), TF_PEERS),
    "small": Suite(tuple(small(QUICK_SMALL_SIZES)), ("torch.nn",)),
    "small-grad": Suite(tuple(small(QUICK_SMALL_SIZES, "grad")), ("torch.nn",)),
    "stream": Suite(tuple(stream((8,))), ("torch.nn", PREPACKED)),
}
