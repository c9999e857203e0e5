"""Which of the CUDA paths runs a layer: the table, and the ways to force one.

``step`` is a matrix product and one kernel per step, for every cell, variation, dtype and size; ``cluster``
is one kernel for all steps, on thread block clusters. The table's only row is the step path until a committed
result shows that the cluster path is right and faster; till then the cluster path runs only where it is
forced. A call that the forced path does not serve raises.

Environment, read once at import: ``TORCHRNN_CUDA_PATH`` (auto, step or cluster) forces a path.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from torchrnn._native import DTYPES
from torchrnn.options import CELLS

PATHS = ("auto", "step", "cluster")
"""In the order of the codes of the ops' argument ``path``; auto leaves the choice to the table."""

VARIATIONS = frozenset(
    {"lengths", "resets", "activation", "peephole", "cell_clip", "projection", "proj_clip", "norm", "masks"}
)
"""What a call can have beside weights and states, as far as paths differ in it."""

_ANY = range(sys.maxsize)


@dataclass(frozen=True)
class Row:
    """A path, and the calls that it is chosen for: those that lie within all of these ranges and sets."""

    path: str
    why: str
    """A few words, for ``explain``."""
    capability: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (99, 9))
    """The first and the last compute capability."""
    dtypes: frozenset[torch.dtype] = frozenset(DTYPES)
    cells: frozenset[str] = frozenset(CELLS)
    hidden: range = _ANY
    batch: range = _ANY
    steps: range = _ANY
    variations: frozenset[str] = VARIATIONS
    """Those that a call may have, but need not."""


TABLE = (Row("step", "it serves every call, and no committed result shows a faster path"),)
"""The first row that a call lies within decides; every call lies within the last one."""


def choose(
    capability: tuple[int, int],
    dtype: torch.dtype,
    cell: str,
    *,
    hidden: int,
    batch: int,
    steps: int,
    variation: frozenset[str] = frozenset(),
) -> tuple[str, str]:
    """Returns the path of a call and why: the one that is forced, else that of the table.

    Args:
        capability: The compute capability of the device, major and minor.
        dtype: That of x.
        cell: A key of ``CELLS``.
        hidden: H
        batch: B
        steps: T
        variation: Which of ``VARIATIONS`` the call has.
    """
    for row in rows(capability, dtype):
        sizes = hidden in row.hidden and batch in row.batch and steps in row.steps
        if sizes and cell in row.cells and variation <= row.variations:
            return row.path, row.why
    raise AssertionError("every call lies within the last row")


def rows(capability: tuple[int, int], dtype: torch.dtype) -> list[Row]:
    """Returns what can be chosen on a device for a dtype: one row where a path is forced."""
    if forced():
        return [Row(PATHS[forced()], "it is forced")]
    return [r for r in TABLE if r.capability[0] <= capability <= r.capability[1] and dtype in r.dtypes]


def forced() -> int:
    """Returns the code of the path that is forced; 0 if none is."""
    return _FORCED[-1]


@contextlib.contextmanager
def use_path(name: str) -> Iterator[None]:
    """Forces a path inside a ``with`` block, or with auto lets the table choose; not for several threads.

    Raises:
        ValueError: If the name is not one of ``PATHS``.
    """
    _FORCED.append(_code(name))
    try:
        yield
    finally:
        _FORCED.pop()


def allows_tf32() -> bool:
    """Returns whether float32 products of recurrent layers may be rounded to TF32, by torch's flags.

    They are ``torch.backends.cudnn.allow_tf32`` and, newer, ``torch.backends.cudnn.rnn.fp32_precision``. The
    newer is read: where the flags of cuDNN's operators differ, reading the older one raises.
    """
    if torch.compiler.is_compiling():
        # In words that a compiler knows and guards; they take ten times as long.
        precision = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]  # It has no stub.
    else:
        precision = torch._C._get_fp32_precision_getter("cuda", "rnn")
    return bool(precision == "tf32")


def _code(name: str) -> int:
    if name not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {name!r}")
    return PATHS.index(name)


try:
    _FORCED = [_code(os.environ.get("TORCHRNN_CUDA_PATH") or "auto")]
except ValueError as error:
    raise ValueError(f"TORCHRNN_CUDA_PATH: {error}") from None
