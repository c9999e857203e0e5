"""The equations in plain torch: the fallback on every device, and what the kernels are tested against.

Letters: T steps, B batch rows, D directions (1 or 2), I inputs, H hidden units, G gates of the cell, P
projected outputs, R = P if there is a projection, else H.

Everything here is out of place and made of differentiable operators, so gradients of any order, ``vmap`` and
forward mode work. Half-precision inputs are computed in float32 throughout and rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrnn.options import CELLS, Options

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


PARTS = (
    "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "peephole", "norm_gain", "norm_shift",
)  # fmt: skip
"""What a direction is made of, in the order of ``Arguments`` and of the op's ``weights``."""


class Arguments(NamedTuple):
    """All tensors of a layer call. A list has one entry per direction; an empty list or None means absent.

    Sizes are the letters of the module's docstring.
    """

    x: Tensor
    """[T, B, I]"""
    weight_ih: list[Tensor]
    """[G*H, I]; gates i, f, g, o (lstm), f, g, o (lstm_coupled) or r, z, n (gru)."""
    weight_hh: list[Tensor]
    """[G*H, R]"""
    bias_ih: list[Tensor]
    """[G*H]"""
    bias_hh: list[Tensor]
    """[G*H]"""
    weight_hr: list[Tensor] = []  # noqa: RUF012  Read only, as all here.
    """[P, H], the projection."""
    peephole: list[Tensor] = []  # noqa: RUF012
    """[3, H]: rows i, f (on the old c) and o (on the new c); lstm_coupled has no i and ignores the first."""
    norm_gain: list[Tensor] = []  # noqa: RUF012
    """[G+1, H]: one row per gate, the last for c."""
    norm_shift: list[Tensor] = []  # noqa: RUF012
    """[G+1, H]"""
    h0: Tensor | None = None
    """[D, B, R]; None is zeros."""
    c0: Tensor | None = None
    """[D, B, H]; None is zeros."""
    lengths: Tensor | None = None
    """[B] integers in 0..T, in any order."""
    resets: Tensor | None = None
    """[T, B] bool: no state crosses from step t-1 to step t, in either direction."""
    mask_h: Tensor | None = None
    """[D, T or 1, B, R]: factor on the h that is carried on, after it was output."""
    mask_c: Tensor | None = None
    """[D, T or 1, B, H]: factor on the c that is carried on."""
    zoneout_h: Tensor | None = None
    """[D, T or 1, B, R]: share of the previous h that is kept, 0..1."""
    zoneout_c: Tensor | None = None
    """[D, T or 1, B, H]: share of the previous c that is kept, 0..1."""

    @property
    def lists(self) -> tuple[list[Tensor], ...]:
        """The list arguments, weight_ih to norm_shift."""
        return self[1:9]

    @property
    def differentiable(self) -> list[Tensor]:
        """The tensors that kernels have a gradient for."""
        states = [state for state in (self.h0, self.c0) if state is not None]
        return [self.x, *(tensor for tensors in self.lists for tensor in tensors), *states]


@dataclass(frozen=True)
class _Direction:
    """One direction's weights in the accumulation dtype, and the cell's equations on them."""

    options: Options
    weight_hh: Tensor
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    peephole: Tensor | None
    norm_gain: Tensor | None
    norm_shift: Tensor | None

    def step(self, wx: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns the new ``(h, c)`` from ``wx`` = W x + b_ih of this step, [B, G*H]."""
        activation = _ACTIVATIONS[self.options.activation]
        if self.options.cell in ("lstm", "lstm_coupled"):
            assert c is not None
            return self._lstm(wx, h, c, activation)
        if self.options.cell == "gru":
            # Reset after the recurrent product (cuDNN; torch.nn.GRU).
            r, z, n = wx.chunk(3, -1)
            rh_r, rh_z, rh_n = F.linear(h, self.weight_hh, self.bias_hh).chunk(3, -1)
            r, z = torch.sigmoid(r + rh_r), torch.sigmoid(z + rh_z)
            n = activation(n + r * rh_n)
            return n + z * (h - n), None
        if self.options.cell == "gru_reset_before":
            # Reset before the product (Cho et al. 2014, arXiv:1406.1078, eq. 5-8; TensorFlow's GRUCell).
            hidden = h.size(-1)
            gates, candidate = self.weight_hh.split([2 * hidden, hidden])
            bias_gates, bias_n = (
                (None, None) if self.bias_hh is None else self.bias_hh.split([2 * hidden, hidden])
            )
            r, z, n = wx.chunk(3, -1)
            rh_r, rh_z = F.linear(h, gates, bias_gates).chunk(2, -1)
            r, z = torch.sigmoid(r + rh_r), torch.sigmoid(z + rh_z)
            n = activation(n + F.linear(r * h, candidate, bias_n))
            return n + z * (h - n), None
        # Elman 1990.
        return activation(wx + F.linear(h, self.weight_hh, self.bias_hh)), None

    def _lstm(
        self, wx: Tensor, h: Tensor, c: Tensor, activation: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000 and its variations.

        Peepholes: Gers & Schmidhuber 2000. Projection: Sak et al. 2014, arXiv:1402.1128. Layer normalisation:
        each gate's sum on its own, and the new c, as TensorFlow's LayerNormBasicLSTMCell stores it. Coupled
        gates: Greff et al. 2015, arXiv:1503.04069.
        """
        sums = (wx + F.linear(h, self.weight_hh, self.bias_hh)).chunk(CELLS[self.options.cell].gates, -1)
        *first, f, g, o = (self._norm(gate, row) for row, gate in enumerate(sums))  # Coupled, i is not there.
        if self.peephole is not None:
            first, f = [i + self.peephole[0] * c for i in first], f + self.peephole[1] * c
        f = torch.sigmoid(f)
        i = torch.sigmoid(first[0]) if first else 1 - f
        c = f * c + i * activation(g)
        c = self._norm(c, 4)
        c = _clip(c, self.options.cell_clip)
        if self.peephole is not None:
            o = o + self.peephole[2] * c
        h = torch.sigmoid(o) * activation(c)
        if self.weight_hr is not None:
            h = _clip(F.linear(h, self.weight_hr), self.options.proj_clip)
        return h, c

    def _norm(self, x: Tensor, row: int) -> Tensor:
        if self.norm_gain is None or self.norm_shift is None:
            return x
        return F.layer_norm(x, x.shape[-1:], self.norm_gain[row], self.norm_shift[row], self.options.norm_eps)


def autocasts(device: str) -> bool:
    """Returns whether autocast is on for a type of device; not each one has it."""
    # torch 2.11 cannot trace the question which has. Those that are compiled for have it, but for meta.
    known = device != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def autocast_dtype(device: str, state_dtype: torch.dtype | None = None) -> torch.dtype | None:
    """Returns what autocast computes with on a type of device; None if it is off.

    Args:
        device: The type.
        state_dtype: What the states have if autocast leaves them alone, as it does on the CPU only.
    """
    if not autocasts(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    if state_dtype is None or device != "cpu" or state_dtype == torch.float64:
        return dtype
    return torch.promote_types(dtype, state_dtype)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Brings tensors, in lists too, to a dtype; integers, float64 and what is no tensor stay as they are."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
    return [cast(tensor, dtype) for tensor in value] if isinstance(value, list) else value


def layer(a: Arguments, options: Options, all_states: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs one layer, all its directions.

    Args:
        a: The tensors, of one floating dtype and device.
        options: The cell and its variations.
        all_states: Whether the c of every step is wanted.

    Returns:
        ``(y, c_all, h_n, c_n)``: the outputs [T, B, D*R], zero past a row's length; every c [T, B, D*H]
        likewise, or an empty tensor if not wanted or not there; the final states [D, B, R] and [D, B, H], c_n
        empty for a cell without memory.
    """
    device = a.x.device.type
    if autocasts(device):
        # Autocast would round the products to its own dtype.
        with torch.autocast(device, enabled=False):
            return layer(a, options, all_states)
    dtype = a.x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    outputs = [_direction(a, options, d, wide) for d in range(len(a.weight_ih))]
    y = torch.cat([out[0] for out in outputs], -1).to(dtype)
    h_n = torch.stack([out[2] for out in outputs]).to(dtype)
    if not CELLS[options.cell].memory:
        return y, y.new_empty(0), h_n, y.new_empty(0)
    c_all = torch.cat([out[1] for out in outputs], -1).to(dtype) if all_states else y.new_empty(0)
    return y, c_all, h_n, torch.stack([out[3] for out in outputs]).to(dtype)


def _direction(
    a: Arguments, options: Options, d: int, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns ``(y, c_all, h_n, c_n)`` of direction d: [T, B, R], [T, B, H], [B, R], [B, H]."""

    def pick(tensors: list[Tensor]) -> Tensor | None:
        return tensors[d].to(wide) if tensors else None

    steps, batch = a.x.shape[:2]
    weight_hh = a.weight_hh[d].to(wide)
    hidden = weight_hh.size(0) // CELLS[options.cell].gates
    cell = _Direction(
        options,
        weight_hh,
        pick(a.bias_hh),
        pick(a.weight_hr),
        pick(a.peephole),
        pick(a.norm_gain),
        pick(a.norm_shift),
    )
    x = a.x.to(wide)
    time = torch.arange(steps, device=x.device)
    alive = None if a.lengths is None else (time[:, None] < a.lengths.to(x.device)).unsqueeze(-1)  # [T, B, 1]
    if alive is not None:
        x = torch.where(alive, x, 0)  # Padding may hold anything; 0 * NaN in dW would spread it.
    # As a matrix: for more axes the vmap of dynamic sizes has no rule.
    wx = F.linear(x.flatten(0, 1), a.weight_ih[d].to(wide), pick(a.bias_ih))
    wx = wx.view(steps, batch, wx.size(1))

    h = x.new_zeros(batch, weight_hh.size(1)) if a.h0 is None else a.h0[d].to(wide)
    c: Tensor | None = None
    if CELLS[options.cell].memory:
        c = x.new_zeros(batch, hidden) if a.c0 is None else a.c0[d].to(wide)

    backwards = options.reverse or d == 1
    hs: list[Tensor] = [h] * steps
    cs: list[Tensor | None] = [c] * steps
    for t in range(steps - 1, -1, -1) if backwards else range(steps):
        h_prev, c_prev = h, c
        cut = _cut(a.resets, alive, t, backwards)
        if cut is not None:
            h_prev = torch.where(cut, 0, h_prev)
            c_prev = None if c_prev is None else torch.where(cut, 0, c_prev)
        h_new, c_new = cell.step(wx[t], h_prev, c_prev)
        h_new = _keep(h_new, h_prev, a.zoneout_h, d, t)
        if c_new is not None and c_prev is not None:
            c_new = _keep(c_new, c_prev, a.zoneout_c, d, t)
        hs[t], cs[t] = h_new, c_new
        h_new = _scale(h_new, a.mask_h, d, t)
        if c_new is not None:
            c_new = _scale(c_new, a.mask_c, d, t)
        h = h_new if alive is None else torch.where(alive[t], h_new, h)
        if c is not None and c_new is not None:
            c = c_new if alive is None else torch.where(alive[t], c_new, c)

    y = torch.stack(hs)
    c_all = torch.stack([s for s in cs if s is not None]) if c is not None else y.new_empty(0)
    if alive is not None:
        y = torch.where(alive, y, 0)
        c_all = torch.where(alive, c_all, 0) if c is not None else c_all
    return y, c_all, h, c if c is not None else y.new_empty(0)


def _cut(resets: Tensor | None, alive: Tensor | None, t: int, backwards: bool) -> Tensor | None:
    """Returns [B, 1] bool, true where the state must be forgotten before step t is computed.

    A reset at t parts step t-1 from step t. Backwards the step before t is t+1, so the mark is the one at
    t+1, and it counts only if step t+1 exists in that row.
    """
    if resets is None:
        return None
    mark = t + 1 if backwards else t
    if mark == resets.size(0):
        return None
    cut = resets[mark].unsqueeze(-1)
    return cut if alive is None or not backwards else cut & alive[mark]


def _clip(x: Tensor, bound: float | None) -> Tensor:
    """Bounds all numbers; a bound beyond those of the dtype is none."""
    return x if bound is None or bound > torch.finfo(x.dtype).max else x.clamp(-bound, bound)


def _keep(new: Tensor, prev: Tensor, share: Tensor | None, d: int, t: int) -> Tensor:
    """Zoneout (Krueger et al. 2016, arXiv:1606.01305): keeps ``share`` of the previous value."""
    if share is None:
        return new
    z = share[d, t if share.size(1) > 1 else 0].to(new.dtype)
    return z * prev + (1 - z) * new


def _scale(state: Tensor, mask: Tensor | None, d: int, t: int) -> Tensor:
    """Dropout on the carried state."""
    return state if mask is None else state * mask[d, t if mask.size(1) > 1 else 0].to(state.dtype)
