"""Recurrences without a recurrent product, as one op over the sequence: IndRNN, IndyGRU, IndyLSTM and SRU.

Their units do not see each other: what a layer multiplies by a matrix is only its input, for all steps at
once, and that product is the caller's. The op takes the sums ``wx`` and runs the recurrence.

Letters: T steps, B batch rows, U units, G gates of the cell. Like ``ops.py`` this file holds schemas,
argument errors, fake kernels, gradients and the fallback: ``scan`` is for training, ``scan_infer`` for
inference, and ``scan_backward`` is itself differentiable. What ``scan`` calls a tape is the c of every step;
everything else backward computes anew. Over 400 lines, because all of these change together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrnn._native import DTYPES
from torchrnn.checks import check_lengths, transformed
from torchrnn.options import ACTIVATIONS
from torchrnn.reference import _ACTIVATIONS as FUNCTIONS
from torchrnn.reference import autocasts


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

_TENSORS = "Tensor wx, Tensor? u, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? mask_h, Tensor? mask_c"
_TENSOR_COUNT = 7
# Codes, because a str argument would cost an allocation that torch's stable ABI never frees.
_OPTIONS = "int cell, int activation, bool reverse"

_LIBRARY = torch.library.Library("torchrnn", "FRAGMENT")
_LIBRARY.define(f"scan({_TENSORS}, {_OPTIONS}) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor tape)")
_LIBRARY.define(f"scan_infer({_TENSORS}, {_OPTIONS}) -> (Tensor y, Tensor h_n, Tensor c_n)")
# du is empty if it is not needed or there is no u; dh0 and dc0 are if the cell does not carry such a state.
_LIBRARY.define(
    f"scan_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, {_TENSORS}, {_OPTIONS}, "
    "Tensor y, Tensor tape, bool need_du) -> (Tensor dwx, Tensor du, Tensor dh0, Tensor dc0)"
)


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
    wx, u, h0, c0, lengths, mask_h, mask_c = _autocast(wx, u, h0, c0, lengths, mask_h, mask_c)
    _check_tensors(cell, wx, {"h0": h0, "c0": c0, "mask_h": mask_h, "mask_c": mask_c}, u)
    if lengths is not None:
        check_lengths(cell, wx, lengths)
        lengths = lengths.to(wx.device)
    tensors = (wx, u, h0, c0, lengths, mask_h, mask_c)
    options = (CELLS[cell].code, ACTIVATIONS[activation], reverse)
    training = torch.is_grad_enabled()
    if reference_only(training, mask_h, mask_c):
        return _reference(tensors, *options)[:3]
    if training and any(tensor is not None and tensor.requires_grad for tensor in tensors[:4]):
        y, h_n, c_n, _ = torch.ops.torchrnn.scan(*tensors, *options)
    else:
        y, h_n, c_n = torch.ops.torchrnn.scan_infer(*tensors, *options)
    return y, h_n, c_n


def reference_only(training: bool, *masks: Tensor | None) -> bool:
    """Whether the ops do not serve a call: under a transform, or for gradients by masks."""
    return transformed() or (training and any(mask is not None and mask.requires_grad for mask in masks))


def _autocast(wx: Tensor, *others: Tensor | None) -> Any:
    """Brings the floating tensors to autocast's dtype, if autocast is on; float64 stays as it is."""
    device = wx.device.type
    if not autocasts(device):
        return wx, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (wx, *others)
    )


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


def _reference(
    tensors: Sequence[Any], code: int, activation: int, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the op ``scan`` in plain torch, out of place and with differentiable operators only.

    Half-precision inputs are computed in float32 throughout and rounded once, at the end.
    """
    cell, act = _CELLS[code], FUNCTIONS[_ACTIVATIONS[activation]]
    _, gates, carries_h, carries_c = CELLS[cell]
    wx, u, h0, c0, lengths, mask_h, mask_c = tensors
    steps, batch, sums = wx.shape
    dtype, wide = wx.dtype, torch.promote_types(wx.dtype, torch.float32)
    wx, u = wx.to(wide), [] if u is None else u.to(wide).chunk(gates)
    zeros = wx.new_zeros(batch, sums // gates)
    h, c = (zeros if state is None else state.to(wide) for state in (h0, c0))
    alive = None
    if lengths is not None:
        alive = (torch.arange(steps, device=wx.device)[:, None] < lengths).unsqueeze(-1)  # [T, B, 1]
        wx = torch.where(alive, wx, 0)  # Padding may hold anything; 0 * NaN in a gradient would spread it.
    hs, cs = [zeros] * steps, [zeros] * steps
    for t in range(steps - 1, -1, -1) if reverse else range(steps):
        hs[t], cs[t] = _step(cell, act, wx[t].chunk(gates, -1), u, (h, c))
        h_new, c_new = (
            new if mask is None else new * mask[t if mask.size(0) > 1 else 0].to(wide)
            for new, mask in ((hs[t], mask_h), (cs[t], mask_c))
        )
        h = h_new if alive is None else torch.where(alive[t], h_new, h)
        c = c_new if alive is None else torch.where(alive[t], c_new, c)
    y, tape = (torch.stack(s) if s else wx.new_zeros(0, *zeros.shape) for s in (hs, cs))
    if alive is not None:
        y, tape = torch.where(alive, y, 0), torch.where(alive, tape, 0)
    empty = y.new_empty(0)
    return (
        y.to(dtype),
        (h if carries_h else empty).to(dtype),
        (c if carries_c else empty).to(dtype),
        tape if carries_c else empty,
    )


# Fallback and fake kernels --------------------------------------------------------------------------------


def _scan_fallback(*args: Any) -> tuple[Tensor, ...]:
    # An op may not return the same storage twice or an argument's: with T=1 the reference's h_n can be y.
    return tuple(out.clone() for out in _reference(args[:_TENSOR_COUNT], *args[_TENSOR_COUNT:]))


def _vjp(args: Sequence[Any], douts: Sequence[Tensor | None], create_graph: bool) -> tuple[Any, ...]:
    """Returns variables, their gradients, and douts, all as the reference has them; None where absent.

    With ``create_graph`` all three lead back to the caller's tensors.
    """

    def point(tensor: Tensor | None) -> Tensor | None:
        """Returns a view that one can differentiate by and that still leads to the caller's tensor."""
        if tensor is None:
            return None
        attached = create_graph and tensor.requires_grad
        return tensor.view_as(tensor) if attached else tensor.detach().requires_grad_()

    variables = [point(v) for v in args[:4]]
    douts = [point(d) if create_graph else d for d in douts]
    outputs = _reference([*variables, *args[4:_TENSOR_COUNT]], *args[_TENSOR_COUNT:])[:3]
    pairs = [(o, d) for o, d in zip(outputs, douts, strict=True) if d is not None and o.requires_grad]
    present = [v for v in variables if v is not None]
    found: Sequence[Tensor | None] = [None] * len(present)
    if pairs:
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            present,
            [d for _, d in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    it = iter(found)
    return variables, [None if v is None else next(it) for v in variables], douts


def _scan_backward_fallback(*args: Any) -> tuple[Tensor, ...]:
    # Kernels run below autograd, whose key the dispatcher leaves out: here it is let in again.
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    excluded = excluded.remove(torch._C.DispatchKey.AutogradFunctionality)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        _, grads, _ = _vjp(args[3:-3], args[:3], create_graph=False)
    likes = _scan_backward_fake(*args)
    return tuple(
        grad.clone() if grad is not None and grad.shape == like.shape else torch.zeros_like(like)
        for grad, like in zip(grads, likes, strict=True)
    )


def _scan_infer_fake(*args: Any) -> tuple[Tensor, ...]:
    wx: Tensor = args[0]
    _, gates, carries_h, carries_c = CELLS[_CELLS[args[_TENSOR_COUNT]]]
    steps, batch, units = wx.size(0), wx.size(1), wx.size(2) // gates
    new = wx.new_empty
    return (
        new(steps, batch, units),
        new(batch, units) if carries_h else new(0),
        new(batch, units) if carries_c else new(0),
    )


def _scan_fake(*args: Any) -> tuple[Tensor, ...]:
    y, h_n, c_n = _scan_infer_fake(*args)
    wide = torch.promote_types(y.dtype, torch.float32)
    tape = y.new_empty(y.shape if CELLS[_CELLS[args[_TENSOR_COUNT]]].carries_c else 0, dtype=wide)
    return y, h_n, c_n, tape


def _scan_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    need_du, rest = args[-1], args[3:-3]
    wx, u = rest[:2]
    _, dh0, dc0 = _scan_infer_fake(*rest)
    return wx.new_empty(wx.shape), wx.new_empty(u.shape if need_du and u is not None else 0), dh0, dc0


for _name, _kernel, _fake in (
    ("scan", _scan_fallback, _scan_fake),
    ("scan_infer", lambda *args: _scan_fallback(*args)[:3], _scan_infer_fake),
    ("scan_backward", _scan_backward_fallback, _scan_backward_fake),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"torchrnn::{_name}", _fake, lib=_LIBRARY)


# Gradients ------------------------------------------------------------------------------------------------


# By hand, because torch.library.register_autograd reads the schema anew at every call.


class _ScanGradient(torch.autograd.Function):
    """The gradient of ``scan``: a call of ``scan_backward``."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, options: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = torch.ops.torchrnn.scan.default.redispatch(keyset, *tensors, *options)
        y, tape = outputs[0], outputs[-1]
        ctx.mark_non_differentiable(tape)
        ctx.save_for_backward(*tensors, y, tape)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> Any:
        *tensors, y, tape = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:6]
        grads = torch.ops.torchrnn.scan_backward(*douts[:3], *tensors, *ctx.options, y, tape, needs[1])
        wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return (None, None, *wanted, None, None, None)


class _ScanBackwardGradient(torch.autograd.Function):
    """The gradient of ``scan_backward``, through the reference.

    With g = vjp(douts) the gradients that it returned and dd those by them, these are the gradients of
    <g, dd> by the scan's tensors and by douts.
    """

    @staticmethod
    def forward(ctx: Any, keyset: Any, options: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        *given, y, tape = tensors
        *scalars, need_du = options
        with torch._C._AutoDispatchBelowAutograd():
            grads = torch.ops.torchrnn.scan_backward.default.redispatch(
                keyset, *given, *scalars, y, tape, need_du
            )
        ctx.save_for_backward(*given)
        ctx.scalars = scalars
        ctx.set_materialize_grads(False)
        return grads

    @staticmethod
    def backward(ctx: Any, *dds: Tensor | None) -> Any:
        given = ctx.saved_tensors
        with torch.enable_grad():
            variables, grads, douts = _vjp([*given[3:], *ctx.scalars], given[:3], create_graph=True)
            pairs = [
                (g, dd)
                for g, dd in zip(grads, dds, strict=True)
                if g is not None and g.requires_grad and dd is not None
            ]
            wanted = [*douts, *variables]
            present = [v for v in wanted if v is not None]
            second: Sequence[Tensor | None] = [None] * len(present)
            if pairs:
                second = torch.autograd.grad(
                    [g for g, _ in pairs],
                    present,
                    [dd for _, dd in pairs],
                    create_graph=True,
                    allow_unused=True,
                )
        it = iter(second)
        found = [None if v is None else next(it) for v in wanted]
        # lengths, masks, y and tape have no gradient.
        return (None, None, *found, *[None] * 5)


def _scan_autograd(keyset: Any, *args: Any) -> Any:
    below = keyset & torch._C._after_autograd_keyset
    tensors, options = args[:_TENSOR_COUNT], args[_TENSOR_COUNT:]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        apply = _ScanGradient.apply  # torch leaves it without annotations.
        return apply(below, options, *tensors)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.torchrnn.scan.default.redispatch(below, *args)


def _scan_backward_autograd(keyset: Any, *args: Any) -> Any:
    below = keyset & torch._C._after_autograd_keyset
    given = 3 + _TENSOR_COUNT
    tensors, options = [*args[:given], *args[-3:-1]], (*args[given:-3], args[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        apply = _ScanBackwardGradient.apply  # As above.
        return apply(below, options, *tensors)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.torchrnn.scan_backward.default.redispatch(below, *args)


_LIBRARY.impl("scan", _scan_autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("scan_backward", _scan_backward_autograd, "Autograd", with_keyset=True)
