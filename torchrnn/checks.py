"""Argument errors of a layer call: what no path can run is refused here, before any kernel.

Each message names the op, the argument, what was required and what was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from torchrnn._native import DTYPES
from torchrnn.options import CELLS, Options
from torchrnn.reference import Arguments


def check(a: Arguments, options: Options) -> None:
    """Raises ValueError or TypeError for what no path can run; values of lengths if they are at hand."""
    call = _Call.of(a, options)
    _check_weights(call, a, options)
    _check_states(call, a, options)
    if a.lengths is not None:
        check_lengths(call.name, call.x, a.lengths)
    if a.resets is not None:
        _check_resets(call, a.resets)


class _Call(NamedTuple):
    """The sizes of a call, read off x and the first weight_hh, which everything else must fit."""

    name: str
    x: Tensor
    directions: int
    gates: int
    hidden: int
    outputs: int

    @classmethod
    def of(cls, a: Arguments, options: Options) -> _Call:
        name, gates, x = options.cell, CELLS[options.cell].gates, a.x
        if x.dim() != 3:
            raise ValueError(f"{name}: x must be [T, B, I], got {list(x.shape)}")
        if x.size(0) < 1:
            raise ValueError(f"{name}: x must have at least 1 step, got {list(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name}: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
        directions = len(a.weight_hh)
        if directions not in (1, 2):
            raise ValueError(
                f"{name}: weight_hh must have 1 or 2 entries, one per direction, got {directions}"
            )
        first = a.weight_hh[0]
        if not isinstance(first, Tensor):
            raise TypeError(f"{name}: weight_hh must hold tensors, got {type(first).__name__}")
        if first.dim() != 2:
            raise ValueError(f"{name}: weight_hh must be [{gates}H, R], got {list(first.shape)}")
        return cls(name, x, directions, gates, first.size(0) // gates, first.size(1))

    def need(self, field: str, value: Tensor | None, form: str, *shapes: tuple[int, ...]) -> None:
        """Raises unless value is None, or has one of the shapes and x's dtype and device."""
        if value is None:
            return
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.name}: {field} must be a tensor, got {type(value).__name__}")
        # Asked twice, as torch.compile finds no shape of dynamic sizes by the first question.
        if value.shape not in shapes and all(value.shape != shape for shape in shapes):
            # Formatted only here: under torch.compile a formatted size is a constant.
            steps, batch, inputs = self.x.shape
            raise ValueError(
                f"{self.name}: {field} must be {form} with T={steps}, B={batch}, I={inputs}, "
                f"H={self.hidden}, R={self.outputs}, D={self.directions}, got {list(value.shape)}"
            )
        if value.dtype != self.x.dtype:
            raise ValueError(f"{self.name}: {field} must have x's dtype {self.x.dtype}, got {value.dtype}")
        if value.device != self.x.device:
            raise ValueError(
                f"{self.name}: {field} must be on x's device {self.x.device}, got {value.device}"
            )

    def need_list(self, field: str, values: Sequence[Tensor], form: str, *shape: int) -> None:
        """Raises unless each direction has a tensor that holds."""
        if len(values) != self.directions:
            raise ValueError(
                f"{self.name}: {field} must have {self.directions} entries, one per direction, "
                f"got {len(values)}"
            )
        for value in values:
            self.need(field, value, form, shape)


def _check_weights(call: _Call, a: Arguments, options: Options) -> None:
    name, hidden, outputs = call.name, call.hidden, call.outputs
    rows, inputs = call.gates * hidden, call.x.size(2)
    gates = "" if call.gates == 1 else str(call.gates)
    call.need_list("weight_hh", a.weight_hh, f"[{gates}H, R]", rows, outputs)
    call.need_list("weight_ih", a.weight_ih, f"[{gates}H, I]", rows, inputs)
    if a.bias_ih or a.bias_hh:
        call.need_list("bias_ih", a.bias_ih, f"[{gates}H]", rows)
        call.need_list("bias_hh", a.bias_hh, f"[{gates}H]", rows)
    if a.weight_hr:
        _need_memory(call, "weight_hr", options)
        call.need_list("weight_hr", a.weight_hr, "[R, H]", outputs, hidden)
    elif outputs != hidden:
        raise ValueError(
            f"{name}: weight_hh must be [{gates}H, H] with H={hidden}, got {list(a.weight_hh[0].shape)}"
        )
    elif options.proj_clip is not None:
        raise ValueError(f"{name}: proj_clip must come with weight_hr, got no weight_hr")
    if a.peephole:
        _need_memory(call, "peephole", options)
        call.need_list("peephole", a.peephole, "[3, H]", 3, hidden)
    if a.norm_gain or a.norm_shift:
        if options.cell != "lstm":
            raise ValueError(f"{name}: norm_gain must be absent, it applies to cell lstm only")
        call.need_list("norm_gain", a.norm_gain, "[5, H]", 5, hidden)
        call.need_list("norm_shift", a.norm_shift, "[5, H]", 5, hidden)


def _check_states(call: _Call, a: Arguments, options: Options) -> None:
    steps, batch, _ = call.x.shape
    directions = call.directions
    call.need("h0", a.h0, "[D, B, R]", (directions, batch, call.outputs))
    if a.c0 is not None:
        _need_memory(call, "c0", options)
        call.need("c0", a.c0, "[D, B, H]", (directions, batch, call.hidden))
    for field, size, letter in (
        ("mask_h", call.outputs, "R"),
        ("zoneout_h", call.outputs, "R"),
        ("mask_c", call.hidden, "H"),
        ("zoneout_c", call.hidden, "H"),
    ):
        value = getattr(a, field)
        if value is None:
            continue
        if letter == "H":
            _need_memory(call, field, options)
        shapes = ((directions, steps, batch, size), (directions, 1, batch, size))
        call.need(field, value, f"[D, T or 1, B, {letter}]", *shapes)


def _need_memory(call: _Call, field: str, options: Options) -> None:
    if not CELLS[options.cell].memory:
        raise ValueError(f"{call.name}: {field} must be absent, it applies to cells with memory only")


def check_lengths(name: str, x: Tensor, lengths: Tensor) -> None:
    """Raises unless lengths fit x [T, B, I]; ``name`` is that of the op."""
    steps, batch, _ = x.shape
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name}: lengths must be a tensor, got {type(lengths).__name__}")
    if lengths.shape != (batch,):
        raise ValueError(f"{name}: lengths must be [B] with B={batch}, got {list(lengths.shape)}")
    if lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: lengths must be int64 or int32, got {lengths.dtype}")
    if batch > 0 and _has_values(lengths):
        low, high = (int(bound) for bound in torch.aminmax(lengths))
        if low < 0 or high > steps:
            raise ValueError(f"{name}: lengths must be in 0..T with T={steps}, got {low}..{high}")


def _has_values(tensor: Tensor) -> bool:
    """Whether the values of a tensor are at hand, and looking at them is not a part of a trace."""
    # On an accelerator looking would stop the host until the device has caught up.
    return not (
        tensor.device.type != "cpu"
        or torch.compiler.is_compiling()
        or isinstance(tensor, FakeTensor)
        or torch._C._get_tracing_state() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # Of make_fx.
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _check_resets(call: _Call, resets: Tensor) -> None:
    name, (steps, batch, _) = call.name, call.x.shape
    if not isinstance(resets, Tensor):
        raise TypeError(f"{name}: resets must be a tensor, got {type(resets).__name__}")
    if resets.shape != (steps, batch):
        raise ValueError(f"{name}: resets must be [T, B] with T={steps}, B={batch}, got {list(resets.shape)}")
    if resets.dtype != torch.bool:
        raise ValueError(f"{name}: resets must be bool, got {resets.dtype}")
    if resets.device != call.x.device:
        raise ValueError(f"{name}: resets must be on x's device {call.x.device}, got {resets.device}")
