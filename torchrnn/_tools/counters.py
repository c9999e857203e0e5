"""Makes counters of operations count the layers and cells.

``torch.utils.flop_counter`` goes by ops, and counts the products of matrices in ours as it counts torch's: a
multiplication and an addition are two operations. The others here go by the exact class of a module, in
tables that are open to all: ours are counted by what counts those of ``torch.nn``, however it does.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from torchrnn._tools.imports import when_imported
from torchrnn.interop.convert import OURS
from torchrnn.ops import unflatten
from torchrnn.options import CELLS

_TABLES = {
    "thop.profile": "register_hooks",
    "ptflops.pytorch_ops": "MODULES_MAPPING",
    "calflops.pytorch_ops": "MODULE_HOOK_MAPPING",
    "deepspeed.profiling.flops_profiler.profiler": "MODULE_HOOK_MAPPING",
}
"""Module -> its table of what counts the operations of each class."""


def _forward(*args: Any, out_val: Any = None) -> int:
    return sum(_products(*args))


def _backward(*args: Any, out_val: Any = None) -> int:
    need_x, need_weights, *_ = args[-4:]
    inputs, recurrent, projection = _products(*args[4:-6])
    # The gradients of the states and of what is projected are on the way to all others.
    count: int = inputs * (need_x + need_weights) + (recurrent + projection) * (1 + need_weights)
    return count


def _packed(*args: Any, out_val: Any = None) -> int:
    x, _, _, _, lengths, _, cell, _, hidden, outputs, directions, projection, _ = args
    gates = next(kind.gates for kind in CELLS.values() if kind.code == cell)
    weights = gates * hidden * (x.size(2) + outputs) + projection * outputs * hidden
    count: int = 2 * _rows(x, lengths) * directions * weights
    return count


_FORMULAS = {
    "layer": _forward,
    "layer_infer": _forward,
    "layer_train": _forward,
    "layer_packed": _packed,
    "layer_backward": _backward,
}
"""Op -> its number of operations. The other ops multiply no matrices."""


def _products(*args: Any) -> tuple[int, int, int]:
    """Returns the operations of the products with the inputs, of the recurrent ones and of projections."""
    a, _ = unflatten(args)
    rows = _rows(a.x, a.lengths)
    inputs, recurrent, projection = (
        2 * rows * sum(weight.numel() for weight in weights)
        for weights in (a.weight_ih, a.weight_hh, a.weight_hr)
    )
    return inputs, recurrent, projection


def _rows(x: Tensor, lengths: Tensor | None) -> int:
    """Returns how many steps of all rows are computed; all of them where lengths have no values."""
    steps, batch, _ = x.shape
    if lengths is None or lengths.is_meta or is_fake(lengths):
        return steps * batch
    return int(lengths.clamp(0, steps).sum())


def _enter_formulas(flop_counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        flop_counter.register_flop_formula(getattr(torch.ops.torchrnn, name), get_raw=True)(formula)


def _enter_classes(module: ModuleType, table: str) -> None:
    counts = getattr(module, table, {})
    counts.update({ours: counts[theirs] for theirs, ours in OURS.items() if theirs in counts})


when_imported("torch.utils.flop_counter", _enter_formulas)
for _name, _table in _TABLES.items():
    when_imported(_name, partial(_enter_classes, table=_table))
