"""Recurrences without a recurrent product, as one op over the sequence: IndRNN, IndyGRU, IndyLSTM and SRU.

Their units do not see each other: what a layer multiplies by a matrix is only its input, for all steps at
once, and that product is the caller's. The op takes the sums ``wx`` and runs the recurrence.

Letters: T steps, B batch rows, U units, G gates of the cell. Like ``ops.py`` this file holds argument errors,
the fake kernel and what the op is made of, see ``differentiable.py``; the reference is here too. What the op
calls a tape is the c of every step; everything else backward computes anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrnn._native import DTYPES
from torchrnn.checks import check_lengths
from torchrnn.differentiable import DifferentiableOp
from torchrnn.options import ACTIVATIONS
from torchrnn.reference import _ACTIVATIONS as FUNCTIONS
from torchrnn.reference import autocast_dtype, cast


class ScanCell(NamedTuple):
    """What the boundary must know of a cell; its equations are in ``_step`` and ``cells/elementwise.h``."""

    code: int
    """Value of the ``cell`` argument of the ops, equal to ``enum class ScanCell`` in ``scan_params.h``."""
    gates: int
    """Blocks of ``wx`` and ``u``."""
    carries_h: bool
    """Whether a step reads the h before, by way of ``u``."""
    carries_c: bool
    """Whether the state has a memory c."""


CELLS = {
    "ind_rnn": ScanCell(0, gates=1, carries_h=True, carries_c=False),
    "indy_gru": ScanCell(1, gates=3, carries_h=True, carries_c=False),
    "indy_lstm": ScanCell(2, gates=4, carries_h=True, carries_c=True),
    "sru": ScanCell(3, gates=4, carries_h=False, carries_c=True),
}
_CELLS = list(CELLS)
_ACTIVATIONS = list(ACTIVATIONS)

_LIBRARY = torch.library.Library("torchrnn", "FRAGMENT")


def scan(
    cell: str,
    wx: Tensor,
    u: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    activation: str = "tanh",
    lengths: Tensor | None = None,
    mask_h: Tensor | None = None,
    mask_c: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a recurrence over its projected inputs.

    With s = sigmoid, act the activation, and the blocks of ``wx`` and ``u`` in the order of the gates:

    - ``ind_rnn`` (Li et al. 2018, arXiv:1803.04831): h' = act(wx + u * h).
    - ``indy_gru`` (Gonnet & Deselaers 2019, arXiv:1903.08023), gates r, z, n: r = s(wx_r + u_r * h),
      z = s(wx_z + u_z * h), n = act(wx_n + u_n * (r * h)), h' = z * h + (1 - z) * n.
    - ``indy_lstm`` (likewise), gates i, g, f, o: i, f, o = s(wx + u * h), g = act(wx_g + u_g * h),
      c' = f * c + i * g, h' = o * act(c'). A forget bias is the caller's to add to wx.
    - ``sru`` (Lei et al. 2017, arXiv:1709.02755), blocks x~, f, r, x^: c' = s(f) * c + (1 - s(f)) * x~
      and the output is s(r) * act(c') + (1 - s(r)) * x^; the state is c alone.

    Gradients flow to wx, u, h0 and c0, and to the masks if they require them.

    Args:
        cell: A key of ``CELLS``.
        wx: [T, B, G*U], the sums of input products and biases; any strides.
        u: [G*U], the recurrent weights; for all cells but sru.
        h0: [B, U], the initial h; None is zeros. Not for sru.
        c0: [B, U], the initial c; None is zeros. For indy_lstm and sru.
        activation: tanh, relu, sigmoid or identity.
        lengths: [B] integers in 0..T, in any order; None is all T. Steps past a row's length leave its state
            as it is, and nothing of wx is read there.
        mask_h: [T or 1, B, U], factor on the h that is carried on from each step, after it was output.
        mask_c: [T or 1, B, U], likewise on c.
        reverse: Whether to walk from each row's last step to its first.

    Returns:
        ``(y, h_n, c_n)``: the outputs [T, B, U], zero past a row's length, and the state carried on from the
        last step, [B, U] each; empty where the cell carries no such state.

    Raises:
        ValueError: If a name, shape, dtype, device or length does not hold.
        TypeError: If an argument is not a tensor where one is required.
    """
    _check_cell(cell, wx, activation)
    state = next((state for state in (h0, c0) if isinstance(state, Tensor)), wx)
    dtype = autocast_dtype(wx.device.type, state.dtype)
    if dtype is not None:
        wx, u, h0, c0, mask_h, mask_c = cast([wx, u, h0, c0, mask_h, mask_c], dtype)
    _check_tensors(cell, wx, {"h0": h0, "c0": c0, "mask_h": mask_h, "mask_c": mask_c}, u)
    if lengths is not None:
        check_lengths(cell, wx, lengths)
        lengths = lengths.to(wx.device)
    y, h_n, c_n = SCAN(
        wx, u, h0, c0, lengths, mask_h, mask_c, CELLS[cell].code, ACTIVATIONS[activation], reverse
    )
    return y, h_n, c_n


# Argument errors ------------------------------------------------------------------------------------------


def _check_cell(cell: str, wx: Tensor, activation: str) -> None:
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{cell}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not isinstance(wx, Tensor):
        raise TypeError(f"{cell}: wx must be a tensor, got {type(wx).__name__}")
    gates = CELLS[cell].gates
    if wx.dim() != 3 or wx.size(2) % gates != 0:
        raise ValueError(f"{cell}: wx must be {_form('[T, B, U]', gates)}, got {list(wx.shape)}")
    if wx.dtype not in DTYPES:
        raise ValueError(f"{cell}: wx must be float32, float64, bfloat16 or float16, got {wx.dtype}")


def _check_tensors(cell: str, wx: Tensor, states: dict[str, Tensor | None], u: Tensor | None) -> None:
    _, gates, carries_h, carries_c = CELLS[cell]
    steps, batch, sums = wx.shape
    if carries_h and u is None:
        raise ValueError(f"{cell}: u must be given, got None")
    values = {"u": u, **states}
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{cell}: {name} must be a tensor, got {type(value).__name__}")
        if not (carries_c if name in ("c0", "mask_c") else carries_h):
            raise ValueError(f"{cell}: {name} must be absent, the cell has no such state or weight")
        shape: tuple[int, ...] = (batch, sums // gates)
        if name == "u":
            shape, form = (sums,), _form("[U]", gates)
        elif name.startswith("mask"):
            shape, form = (1 if value.dim() and value.size(0) == 1 else steps, *shape), "[T or 1, B, U]"
        else:
            form = "[B, U]"
        if value.shape != shape:
            # Formatted only here: under torch.compile a formatted size is a constant.
            sizes = f"T={steps}, B={batch}, U={sums // gates}"
            raise ValueError(f"{cell}: {name} must be {form} with {sizes}, got {list(value.shape)}")
        if value.dtype != wx.dtype:
            raise ValueError(f"{cell}: {name} must have wx's dtype {wx.dtype}, got {value.dtype}")
        if value.device != wx.device:
            raise ValueError(f"{cell}: {name} must be on wx's device {wx.device}, got {value.device}")


def _form(shape: str, gates: int) -> str:
    return shape if gates == 1 else shape.replace("U", f"{gates}U")


# Reference ------------------------------------------------------------------------------------------------


def _step(
    cell: str,
    act: Callable[[Tensor], Tensor],
    sums: Sequence[Tensor],
    u: Sequence[Tensor],
    state: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Returns the new h, which is the output, and c; a cell without c returns it as it is."""
    h, c = state
    if cell == "sru":
        x, f, r, highway = sums
        f, r = torch.sigmoid(f), torch.sigmoid(r)
        c = f * c + (1 - f) * x
        return r * act(c) + (1 - r) * highway, c
    if cell == "indy_gru":
        r, z = torch.sigmoid(sums[0] + u[0] * h), torch.sigmoid(sums[1] + u[1] * h)
        n = act(sums[2] + u[2] * (r * h))
        return z * h + (1 - z) * n, c
    pre = [s + w * h for s, w in zip(sums, u, strict=True)]
    if cell == "ind_rnn":
        return act(pre[0]), c
    i, g, f, o = pre
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * act(g)
    return torch.sigmoid(o) * act(c), c


def reference(inputs: Sequence[Any], options: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the op ``scan`` in plain torch, out of place and with differentiable operators only.

    Half-precision inputs are computed in float32 throughout and rounded once, at the end.
    """
    code, activation, reverse = options
    cell, act = _CELLS[code], FUNCTIONS[_ACTIVATIONS[activation]]
    _, gates, carries_h, carries_c = CELLS[cell]
    wx, u, h0, c0, lengths, mask_h, mask_c = inputs
    steps, batch, sums = wx.shape
    dtype, wide = wx.dtype, torch.promote_types(wx.dtype, torch.float32)
    wx, u = wx.to(wide), [] if u is None else u.to(wide).chunk(gates)
    zeros = wx.new_zeros(batch, sums // gates)
    h, c = (zeros if state is None else state.to(wide) for state in (h0, c0))
    alive = None
    if lengths is not None:
        alive = (torch.arange(steps, device=wx.device)[:, None] < lengths).unsqueeze(-1)  # [T, B, 1]
        wx = torch.where(alive, wx, 0)  # Padding may hold anything; 0 * NaN in a gradient would spread it.
    hs = [zeros] * steps
    for t in range(steps - 1, -1, -1) if reverse else range(steps):
        hs[t], c_step = _step(cell, act, wx[t].chunk(gates, -1), u, (h, c))
        h_new, c_new = (
            new if mask is None else new * mask[t if mask.size(0) > 1 else 0].to(wide)
            for new, mask in ((hs[t], mask_h), (c_step, mask_c))
        )
        h = h_new if alive is None else torch.where(alive[t], h_new, h)
        c = c_new if alive is None else torch.where(alive[t], c_new, c)
    y = torch.stack(hs) if hs else wx.new_zeros(0, *zeros.shape)
    if alive is not None:
        y = torch.where(alive, y, 0)
    empty = y.new_empty(0)
    return y.to(dtype), (h if carries_h else empty).to(dtype), (c if carries_c else empty).to(dtype)


def _check(inputs: Sequence[Any], options: Sequence[Any]) -> None:
    wx, u, h0, c0, lengths, mask_h, mask_c = inputs
    code, activation, _ = options
    if not (0 <= code < len(_CELLS) and 0 <= activation < len(_ACTIVATIONS)):
        raise ValueError(f"scan: cell {code} or activation {activation} is not known")
    cell = _CELLS[code]
    _check_cell(cell, wx, _ACTIVATIONS[activation])
    _check_tensors(cell, wx, {"h0": h0, "c0": c0, "mask_h": mask_h, "mask_c": mask_c}, u)
    if lengths is not None:
        check_lengths(cell, wx, lengths)


def _fake(inputs: Sequence[Any], options: Sequence[Any]) -> tuple[Tensor, ...]:
    wx = inputs[0]
    _, gates, carries_h, carries_c = CELLS[_CELLS[options[0]]]
    steps, batch, units = wx.size(0), wx.size(1), wx.size(2) // gates
    new = wx.new_empty
    wide = torch.promote_types(wx.dtype, torch.float32)
    return (
        new(steps, batch, units),
        new(batch, units) if carries_h else new(0),
        new(batch, units) if carries_c else new(0),
        new((steps, batch, units) if carries_c else 0, dtype=wide),
    )


SCAN = DifferentiableOp(
    _LIBRARY,
    "scan",
    inputs=(
        "Tensor wx", "Tensor? u", "Tensor? h0", "Tensor? c0",
        "Tensor? lengths", "Tensor? mask_h", "Tensor? mask_c",
    ),
    # Codes, because a str argument would cost an allocation that torch's stable ABI never frees.
    options=("int cell", "int activation", "bool reverse"),
    outputs=("y", "h_n", "c_n"),
    reference=reference,
    check=_check,
    fake=_fake,
    keeps_y=lambda _: True,
)  # fmt: skip
