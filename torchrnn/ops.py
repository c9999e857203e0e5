"""The boundary: schemas, argument errors, fake kernels and options of the op that every layer calls.

One family of ops serves all cells, see ``differentiable.py``: ``layer``, and what training makes of it. C++
registers the kernels of a device and nothing else; a device without kernels gets the reference. Letters and
argument shapes are those of ``reference.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrnn import _native, cuda, reference
from torchrnn.checks import check
from torchrnn.differentiable import DifferentiableOp
from torchrnn.options import ACTIVATIONS, CELLS, Options
from torchrnn.prepacking import Packed, layer_packed, refuse_gradient, usable
from torchrnn.reference import PARTS, Arguments

# ``weights`` are those of one direction after the other, of each the parts that the layer has, in the order
# of PARTS.
_INPUTS = (
    "Tensor x", "Tensor[] weights", "Tensor? h0", "Tensor? c0",
    "Tensor? lengths", "Tensor? resets", "Tensor? mask_h", "Tensor? mask_c",
)  # fmt: skip
# Cell and activation are codes: a str argument would cost an allocation that torch's stable ABI never frees.
# tf32 and path are CUDA's: ``_options`` tells what they are.
_OPTIONS = (
    "int cell", "int activation", "bool bias", "bool projection", "bool peephole", "bool norm",
    "float? cell_clip", "float? proj_clip", "float norm_eps", "bool reverse", "bool tf32", "int path",
    "bool all_states",
)  # fmt: skip

_LIBRARY = torch.library.Library("torchrnn", "FRAGMENT")
_CELL_NAMES = {cell.code: name for name, cell in CELLS.items()}
_ACTIVATION_NAMES = {code: name for name, code in ACTIVATIONS.items()}


def layer(
    a: Arguments,
    options: Options,
    all_states: bool = False,
    *,
    packed: Packed | None = None,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Runs one recurrent layer over a sequence, all its directions in one call.

    Args:
        a: The tensors; shapes are given at ``reference.Arguments``. All floating ones share one dtype
            (float32, float64, bfloat16 or float16) and device; any strides.
        options: The cell and its variations.
        all_states: Whether to return the c of every step.
        packed: What was packed of these weights, if it was.
        state_dtype: What autocast on the CPU leaves the states at if that is wider than its own dtype, and
            then everything; None to leave nothing.

    Returns:
        ``(y, c_all, h_n, c_n)`` with shapes [T, B, D*R], [T, B, D*H], [D, B, R], [D, B, H]. Outputs past a
        row's length are zero. ``c_all`` is None if not wanted, ``c_n`` empty if the cell has no memory. A
        state given as None is zeros.

    Raises:
        ValueError: If a shape, dtype, device, length or combination does not hold.
        TypeError: If an argument is not a tensor where one is required.
        RuntimeError: If a gradient is wanted and the weights are packed.
    """
    weights = in_order(a) if packed is not None else []
    a = checked(a, options, state_dtype)
    if packed is not None and usable(packed, weights):
        refuse_gradient(options.cell, a.differentiable)
        y, h_n, c_n = layer_packed(a.x, packed.data, a.h0, a.c0, a.lengths, a.resets, *packed.scalars)
        return y, None, h_n, c_n
    if reference_only(a):
        y, c_all, h_n, c_n = reference.layer(a, options, all_states)
    else:
        y, c_all, h_n, c_n = LAYER(*flat(a, options, all_states))
    return y, c_all if all_states else None, h_n, c_n


def checked(a: Arguments, options: Options, state_dtype: torch.dtype | None = None) -> Arguments:
    """Raises for mistakes; returns the arguments in autocast's dtype, all on one device."""
    if not isinstance(a.x, Tensor):
        raise TypeError(f"{options.cell}: x must be a tensor, got {type(a.x).__name__}")
    a = autocast(a, state_dtype)
    check(a, options)
    if a.lengths is not None and a.lengths.device != a.x.device:
        a = a._replace(lengths=a.lengths.to(a.x.device))
    return a


def reference_only(a: Arguments) -> bool:
    """Whether no kernel serves a variation of the call, and the op does not take it."""
    return a.zoneout_h is not None or a.zoneout_c is not None


def flat(a: Arguments, options: Options, all_states: bool = False) -> tuple[Any, ...]:
    """Returns checked arguments as the op ``layer`` has them; ``unflatten`` undoes it."""
    # CPU kernels read neither, and a small call would feel the questions.
    tf32, path = (False, 0) if a.x.is_cpu else (cuda.allows_tf32(), cuda.forced())
    return (
        a.x, in_order(a), a.h0, a.c0, a.lengths, a.resets, a.mask_h, a.mask_c,
        *options.codes,
        bool(a.bias_ih), bool(a.weight_hr), bool(a.peephole), bool(a.norm_gain),
        options.cell_clip, options.proj_clip, options.norm_eps, options.reverse, tf32, path,
        all_states,
    )  # fmt: skip


def in_order(a: Arguments) -> list[Tensor]:
    """Returns all weights and biases, direction by direction."""
    return [weight for one in zip(*filter(None, a.lists), strict=True) for weight in one]


def autocast(a: Arguments, state_dtype: torch.dtype | None = None) -> Arguments:
    """Brings the floating tensors to autocast's dtype, if autocast is on; float64 stays as it is.

    ``torch.nn`` rounds the states of some of its layers and cells on the CPU, and leaves others in float32,
    with which their sums are float32 too. These are computed in float32 throughout.
    """
    dtype = reference.autocast_dtype(a.x.device.type, state_dtype)
    return a if dtype is None else Arguments._make(reference.cast(value, dtype) for value in a)


# What the ops are made of ----------------------------------------------------------------------------------


def unflatten(args: Sequence[Any]) -> tuple[Arguments, Options]:
    """Turns the arguments of the op ``layer`` back into objects."""
    x, weights, *states = args[: len(_INPUTS)]
    options = args[len(_INPUTS) :]
    cell, activation, bias, projection, peephole, norm, cell_clip, proj_clip, norm_eps, reverse = options[:10]
    there = (True, True, bias, bias, projection, peephole, norm, norm)
    count = sum(there)
    if len(weights) not in (count, 2 * count):
        raise ValueError(f"layer: weights must hold {count} tensors per direction, got {len(weights)}")
    # Every count-th one, from the place of the part on.
    places = [sum(there[:i]) for i in range(len(PARTS))]
    parts = [list(weights[at::count]) if has else [] for at, has in zip(places, there, strict=True)]
    a = Arguments._make([x, *parts, *states, None, None])
    path = options[11]
    if cell not in _CELL_NAMES or activation not in _ACTIVATION_NAMES or not 0 <= path < len(cuda.PATHS):
        raise ValueError(f"layer: cell {cell}, activation {activation} or path {path} is not known")
    return a, Options(
        _CELL_NAMES[cell], _ACTIVATION_NAMES[activation], cell_clip, proj_clip, norm_eps, reverse
    )


def _reference(inputs: Sequence[Any], options: Sequence[Any]) -> tuple[Tensor, ...]:
    return reference.layer(*unflatten([*inputs, *options]), options[-1])


def _check(inputs: Sequence[Any], options: Sequence[Any]) -> None:
    check(*unflatten([*inputs, *options]))


def _fake(inputs: Sequence[Any], options: Sequence[Any]) -> tuple[Tensor, ...]:
    a, named = unflatten([*inputs, *options])
    (steps, batch, _), (rows, outputs) = a.x.shape, a.weight_hh[0].shape
    cell, directions = CELLS[named.cell], len(a.weight_hh)
    hidden = rows // cell.gates
    wide = torch.promote_types(a.x.dtype, torch.float32)
    # The last part is the projection before it is clipped.
    bound = math.inf if named.proj_clip is None else named.proj_clip
    clipped = outputs if bound <= torch.finfo(wide).max else 0
    size = cell.tape * hidden + (hidden + 5 if a.norm_gain else 0) + clipped
    new = a.x.new_empty
    return (
        new(steps, batch, directions * outputs),
        new(steps, batch, directions * hidden) if options[-1] and cell.memory else new(0),
        new(directions, batch, outputs),
        new(directions, batch, hidden) if cell.memory else new(0),
        new(directions, steps, batch, size, dtype=wide),
    )


LAYER = DifferentiableOp(
    _LIBRARY,
    "layer",
    inputs=_INPUTS,
    options=_OPTIONS,
    outputs=("y", "c_all", "h_n", "c_n"),
    reference=_reference,
    check=_check,
    fake=_fake,
    keeps_y=lambda options: not CELLS[_CELL_NAMES[options[0]]].keeps_output,
)


# Inference on the CPU -------------------------------------------------------------------------------------

# The same kernels with as few arguments as a plain call has, since each costs a small step some time; for
# calls that nothing records, so without gradients and fake kernels. The ops check their arguments, and have
# no words for a user's mistake: a call that they refuse is repeated the long way, which has.
_LIBRARY.define(
    "plain_layer(Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, int cell, int activation, bool bias, "
    "bool projection) -> (Tensor y, Tensor h_n, Tensor c_n)"
)
# x [B, I] and states [B, H] are those of one step.
_LIBRARY.define(
    "plain_cell(Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? h0, "
    "Tensor? c0, int cell, int activation) -> (Tensor h, Tensor c)"
)
plain_layer = torch.ops.torchrnn.plain_layer.default
plain_cell = torch.ops.torchrnn.plain_cell.default


def infers(x: Any, weights: Sequence[Any], *states: Any) -> bool:
    """Whether these may go to ``plain_layer`` and ``plain_cell``: plain tensors on the CPU, with kernels."""
    if type(x) is not Tensor or not x.is_cpu or _native.WHY_NOT is not None:
        return False
    for weight in weights:
        if type(weight) is not nn.Parameter and type(weight) is not Tensor:
            return False
    return all(state is None or type(state) is Tensor for state in states)


def infer(
    x: Tensor,
    weights: Sequence[Any],
    states: Sequence[Tensor | None],
    rest: tuple[Any, ...],
    packed: Packed | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one layer of a call that ``infers``.

    Args:
        x: [T, B, I]
        weights: As the ops have them.
        states: h0 and c0, or None.
        rest: The last arguments of ``plain_layer``.
        packed: What was packed of the weights, if it was.

    Returns:
        ``(y, h_n, c_n)`` of ``layer``.

    Raises:
        RuntimeError: If the op refuses an argument.
    """
    results: tuple[Tensor, Tensor, Tensor]
    if packed is not None and x.dtype == weights[0].dtype and usable(packed, weights):
        results = layer_packed(x, packed.data, *states, None, None, *packed.scalars)
    else:
        results = plain_layer(x, weights, *states, *rest)
    return results
