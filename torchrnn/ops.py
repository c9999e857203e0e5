"""The boundary: schemas, argument errors, fake kernels, gradients and the fallback of every op.

One family of ops serves all cells: ``layer`` for training (returns a tape), ``layer_infer``, and
``layer_backward``, which is itself differentiable. C++ registers the kernels of a device and nothing else; a
device without kernels gets the reference. Letters and argument shapes are those of ``reference.py``. Over 400
lines, because all of these change together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchrnn import cuda, reference
from torchrnn.checks import check, transformed
from torchrnn.options import ACTIVATIONS, CELLS, Options
from torchrnn.packing import PackedLayer, PackedWeights, in_order
from torchrnn.reference import Arguments

_TENSORS = (
    "Tensor x, Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] bias_ih, Tensor[] bias_hh, "
    "Tensor[] weight_hr, Tensor[] peephole, Tensor[] norm_gain, Tensor[] norm_shift, "
    "Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? resets, "
    "Tensor? mask_h, Tensor? mask_c, Tensor? zoneout_h, Tensor? zoneout_c"
)
# Cell and activation are codes: a str argument would cost an allocation that torch's stable ABI never frees.
# tf32 and path are CUDA's: ``scalars`` tells what they are.
_OPTIONS = (
    "int cell, int activation, float? cell_clip, float? proj_clip, float norm_eps, bool reverse, "
    "bool tf32, int path"
)

_LIBRARY = torch.library.Library("torchrnn", "FRAGMENT")
_LIBRARY.define(
    f"layer({_TENSORS}, {_OPTIONS}, bool all_states) "
    "-> (Tensor y, Tensor c_all, Tensor h_n, Tensor c_n, Tensor tape)"
)
_LIBRARY.define(
    f"layer_infer({_TENSORS}, {_OPTIONS}, bool all_states) "
    "-> (Tensor y, Tensor c_all, Tensor h_n, Tensor c_n)"
)
# Gradients come back as dx, dh0, dc0 and then those of weight_ih, weight_hh, bias_ih, bias_hh, weight_hr,
# peephole, norm_gain and norm_shift, each with one entry per direction if the argument had. What need_*
# excludes is empty.
_LIBRARY.define(
    f"layer_backward(Tensor? dy, Tensor? dc_all, Tensor? dh_n, Tensor? dc_n, {_TENSORS}, {_OPTIONS}, "
    "Tensor y, Tensor tape, bool need_dx, bool need_dstate, bool need_dweights) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)"
)
# For inference on the CPU: ``pack`` lays weights out as the kernels want them, ``layer_packed`` runs on them.
# H, R and whether there is a projection are arguments because the layout is the kernels' own affair.
_LIBRARY.define(
    "pack(Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] bias_ih, Tensor[] bias_hh, Tensor[] weight_hr, "
    "int cell) -> Tensor"
)
_LIBRARY.define(
    "layer_packed(Tensor x, Tensor packed, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? resets, "
    "int cell, int activation, int hidden, int outputs, int directions, bool projected, bool reverse) "
    "-> (Tensor y, Tensor h_n, Tensor c_n)"
)

_CELL_NAMES = {cell.code: name for name, cell in CELLS.items()}
_ACTIVATION_NAMES = {code: name for name, code in ACTIVATIONS.items()}
_TENSOR_COUNT = len(Arguments._fields)
_NO_MASKS = (None,) * 4
_LAYER_PACKED = torch.ops.torchrnn.layer_packed.default


def layer(
    a: Arguments, options: Options, all_states: bool = False, packed: PackedWeights | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Runs one recurrent layer over a sequence, all its directions in one call.

    Args:
        a: The tensors; shapes are given at ``reference.Arguments``. All floating ones share one dtype
            (float32, float64, bfloat16 or float16) and device; any strides.
        options: The cell and its variations.
        all_states: Whether to return the c of every step.
        packed: Where the layer keeps its packed weights, which are used and renewed without grad mode.

    Returns:
        ``(y, c_all, h_n, c_n)`` with shapes [T, B, D*R], [T, B, D*H], [D, B, R], [D, B, H]. Outputs past a
        row's length are zero. ``c_all`` is None if not wanted, ``c_n`` empty if the cell has no memory. A
        state given as None is zeros.

    Raises:
        ValueError: If a shape, dtype, device, length or combination does not hold.
        TypeError: If an argument is not a tensor where one is required.
    """
    if packed is not None and (all_states or any(a[6:9]) or a[13:] != _NO_MASKS or not runs_packed()):
        packed = None
    if packed is not None and a.lengths is None and a.resets is None:
        found = packed.find(in_order(a), options)
        if found is not None and found.fits(a.x, a.h0, a.c0):
            y, h_n, c_n = layer_packed(found, a.x, a.h0, a.c0)
            return y, None, h_n, c_n
    a = checked(a, options)
    if reference_only(a, options):
        y, c_all, h_n, c_n = reference.layer(a, options, all_states)
        return y, c_all if all_states else None, h_n, c_n
    if packed is not None:
        made = packed.find(in_order(a), options) or packed.make(a, options)
        if made is not None:
            y, h_n, c_n = layer_packed(made, a.x, a.h0, a.c0, lengths=a.lengths, resets=a.resets)
            return y, None, h_n, c_n
    flat = (*a, *scalars(options, a.x), all_states)
    if torch.is_grad_enabled() and requires_grad(a):
        y, c_all, h_n, c_n, _ = torch.ops.torchrnn.layer(*flat)
    else:
        y, c_all, h_n, c_n = torch.ops.torchrnn.layer_infer(*flat)
    return y, c_all if all_states else None, h_n, c_n


def checked(a: Arguments, options: Options) -> Arguments:
    """Raises for mistakes; returns the arguments in autocast's dtype, all on one device."""
    if not isinstance(a.x, Tensor):
        raise TypeError(f"{options.cell}: x must be a tensor, got {type(a.x).__name__}")
    a = autocast(a)
    check(a, options)
    if a.lengths is not None and a.lengths.device != a.x.device:
        a = a._replace(lengths=a.lengths.to(a.x.device))
    return a


def runs_packed() -> bool:
    """Whether packed weights may be used: in inference, where nothing traces, transforms or casts them."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        # A trace would hold the packed weights as a constant, and fake tensors have nothing to pack.
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
        or transformed()
    )


def layer_packed(
    packed: PackedLayer,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a layer on packed weights that the call fits; returns ``(y, h_n, c_n)`` of ``layer``."""
    results: tuple[Tensor, Tensor, Tensor] = _LAYER_PACKED(
        x, packed.data, h0, c0, lengths, resets, *packed.scalars
    )
    return results


def scalars(options: Options, x: Tensor) -> tuple[Any, ...]:
    """Returns the options as the schemas have them, for a call with this x; ``_unflatten`` undoes it."""
    # CPU kernels read neither, and a small call would feel the questions.
    tf32, path = (False, 0) if x.is_cpu else (cuda.allows_tf32(), cuda.forced())
    return (
        CELLS[options.cell].code,
        ACTIVATIONS[options.activation],
        options.cell_clip,
        options.proj_clip,
        options.norm_eps,
        options.reverse,
        tf32,
        path,
    )


def reference_only(a: Arguments, options: Options) -> bool:
    """Whether no kernel serves the call: an unserved variation, or a transform that the ops do not know."""
    # Kernels have no gradient by a mask; one is wanted where a keep probability is learnt.
    masks = [mask for mask in (a.mask_h, a.mask_c) if mask is not None]
    learnt = torch.is_grad_enabled() and any(mask.requires_grad for mask in masks)
    return learnt or a.zoneout_h is not None or a.zoneout_c is not None or transformed()


def requires_grad(a: Arguments) -> bool:
    """Returns whether any of the tensors requires a gradient."""
    for value in a:
        if value is None:
            continue
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif any(tensor.requires_grad for tensor in value):
            return True
    return False


def autocast(a: Arguments) -> Arguments:
    """Brings the floating tensors to autocast's dtype, if autocast is on; float64 stays as it is."""
    device = a.x.device.type
    if not reference.autocasts(device):
        return a
    dtype = torch.get_autocast_dtype(device)

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
        return value if value is None else [cast(tensor) for tensor in value]

    return Arguments._make(map(cast, a))


# Fallback and fake kernels
# --------------------------------------------------------------------------------------


def _unflatten(args: tuple[Any, ...]) -> tuple[Arguments, Options]:
    """Turns tensors and options, as the schemas have them, back into objects."""
    cell, activation, cell_clip, proj_clip, norm_eps, reverse, *_ = args[_TENSOR_COUNT:]
    a = Arguments._make(args[:_TENSOR_COUNT])
    return a, Options(
        _CELL_NAMES[cell], _ACTIVATION_NAMES[activation], cell_clip, proj_clip, norm_eps, reverse
    )


def _layer_infer_reference(*args: Any) -> tuple[Tensor, ...]:
    a, options = _unflatten(args)
    # An op may not return the same storage twice or an argument's: with T=1 the reference's h_n can be y.
    return tuple(out.clone() for out in reference.layer(a, options, args[-1]))


def _layer_reference(*args: Any) -> tuple[Tensor, ...]:
    # The reference keeps nothing, but compilers cache the shape of a tape, and must find it everywhere.
    return (*_layer_infer_reference(*args), torch.zeros_like(_layer_fake(*args)[-1]))


def _layer_backward_reference(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    douts = args[:4]
    need_dx, need_dstate, need_dweights = args[-3:]
    a, options = _unflatten(args[4:])
    # Kernels run below autograd, whose key the dispatcher leaves out: here it is let in again.
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    excluded = excluded.remove(torch._C.DispatchKey.AutogradFunctionality)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        variables = [tensor.detach().requires_grad_() for tensor in differentiable(a)]
        outputs = reference.layer(rebuild(a, variables), options, douts[1] is not None)
        pairs = [
            (out, d) for out, d in zip(outputs, douts, strict=True) if d is not None and out.requires_grad
        ]
        found: Sequence[Tensor | None] = [None] * len(variables)
        if pairs:
            found = torch.autograd.grad(
                [out for out, _ in pairs], variables, [d for _, d in pairs], allow_unused=True
            )
    zeros = zip(found, variables, strict=True)
    grads = rebuild(a, [torch.zeros_like(v) if grad is None else grad for grad, v in zeros])
    return (
        grads.x if need_dx else a.x.new_empty(0),
        grads.h0 if need_dstate and grads.h0 is not None else a.x.new_empty(0),
        grads.c0 if need_dstate and grads.c0 is not None else a.x.new_empty(0),
        [grad for tensors in grads.lists for grad in tensors] if need_dweights else [],
    )


def differentiable(a: Arguments) -> list[Tensor]:
    """Returns the tensors that have a gradient."""
    states = [state for state in (a.h0, a.c0) if state is not None]
    return [a.x, *(tensor for tensors in a.lists for tensor in tensors), *states]


def rebuild(a: Arguments, values: Sequence[Any]) -> Arguments:
    """Puts values into the places of the tensors that ``differentiable`` returns."""
    it = iter(values)
    x = next(it)
    lists = [[next(it) for _ in tensors] for tensors in a.lists]
    states = [None if state is None else next(it) for state in (a.h0, a.c0)]
    return Arguments._make([x, *lists, *states, *a[11:]])


def _layer_infer_fake(*args: Any) -> tuple[Tensor, ...]:
    a, options = _unflatten(args)
    steps, batch, _ = a.x.shape
    directions, hidden, outputs = _sizes(a, options)
    new = a.x.new_empty
    memory = CELLS[options.cell].memory
    return (
        new(steps, batch, directions * outputs),
        new(steps, batch, directions * hidden) if args[-1] and memory else new(0),
        new(directions, batch, outputs),
        new(directions, batch, hidden) if memory else new(0),
    )


def _layer_fake(*args: Any) -> tuple[Tensor, ...]:
    a, options = _unflatten(args)
    steps, batch, _ = a.x.shape
    directions, hidden, outputs = _sizes(a, options)
    wide = torch.promote_types(a.x.dtype, torch.float32)
    # The last part is the projection before it is clipped.
    bound = math.inf if options.proj_clip is None else options.proj_clip
    clipped = outputs if bound <= torch.finfo(wide).max else 0
    size = CELLS[options.cell].tape * hidden + (hidden + 5 if a.norm_gain else 0) + clipped
    tape = a.x.new_empty(directions, steps, batch, size, dtype=wide)
    return (*_layer_infer_fake(*args), tape)


def _layer_packed_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, cell, hidden, outputs, directions = args[0], args[6], *args[8:11]
    steps, batch, _ = x.shape
    memory = CELLS[_CELL_NAMES[cell]].memory
    return (
        x.new_empty(steps, batch, directions * outputs),
        x.new_empty(directions, batch, outputs),
        x.new_empty(directions, batch, hidden) if memory else x.new_empty(0),
    )


def _layer_backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    need_dx, need_dstate, need_dweights = args[-3:]
    a = Arguments._make(args[4 : 4 + _TENSOR_COUNT])
    empty = a.x.new_empty

    def like(t: Tensor | None, needed: bool) -> Tensor:
        return t.new_empty(t.shape) if needed and t is not None else empty(0)

    dweights = [t.new_empty(t.shape) for tensors in a.lists for t in tensors] if need_dweights else []
    return like(a.x, need_dx), like(a.h0, need_dstate), like(a.c0, need_dstate), dweights


def _sizes(a: Arguments, options: Options) -> tuple[int, int, int]:
    """Returns D, H, R."""
    rows, outputs = a.weight_hh[0].shape
    return len(a.weight_hh), rows // CELLS[options.cell].gates, outputs


for _name, _kernel in (
    ("layer", _layer_reference),
    ("layer_infer", _layer_infer_reference),
    ("layer_backward", _layer_backward_reference),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("torchrnn::layer", _layer_fake, lib=_LIBRARY)
torch.library.register_fake("torchrnn::layer_infer", _layer_infer_fake, lib=_LIBRARY)
torch.library.register_fake("torchrnn::layer_packed", _layer_packed_fake, lib=_LIBRARY)
torch.library.register_fake("torchrnn::layer_backward", _layer_backward_fake, lib=_LIBRARY)


# Gradients ------------------------------------------------------------------------------------------------


# By hand, because torch.library.register_autograd reads the schema anew at every call, which for this schema
# takes longer than a small layer.


def _flatten(args: Sequence[Any]) -> tuple[list[Tensor], list[int | None]]:
    """Returns the tensors among arguments, which may be None or lists of tensors, and their places."""
    flat: list[Tensor] = []
    for value in args:
        if value is not None:
            flat.extend([value] if isinstance(value, Tensor) else value)
    return flat, [v if v is None else -1 if isinstance(v, Tensor) else len(v) for v in args]


def _nest(flat: Sequence[Any], layout: Sequence[int | None]) -> list[Any]:
    """Undoes ``_flatten``."""
    it = iter(flat)
    return [v if v is None else next(it) if v < 0 else [next(it) for _ in range(v)] for v in layout]


class _LayerGradient(torch.autograd.Function):
    """The gradient of ``layer``: a call of ``layer_backward``. ``flat`` are the tensors in ``args``."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, args: tuple[Any, ...], layout: list[Any], *flat: Tensor) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = torch.ops.torchrnn.layer.default.redispatch(keyset, *args)
        y, tape = outputs[0], outputs[-1]
        ctx.mark_non_differentiable(tape)
        ctx.save_for_backward(*flat, y, tape)
        ctx.layout, ctx.rest = layout, args[_TENSOR_COUNT:]
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dy, dc_all, dh_n, dc_n, _ = grads
        *flat, y, tape = ctx.saved_tensors
        *options, all_states = ctx.rest
        needs = _nest(ctx.needs_input_grad[3:], ctx.layout)
        tensors = _nest(flat, ctx.layout)
        need_dstate, need_dweights = any(needs[9:11]), any(any(need) for need in needs[1:9])
        dx, dh0, dc0, dweights = torch.ops.torchrnn.layer_backward(
            dy, dc_all if all_states else None, dh_n, dc_n, *tensors, *options, y, tape,
            needs[0], need_dstate, need_dweights,
        )  # fmt: skip
        count = sum(map(len, tensors[1:9]))
        states = [d if need else None for d, need in ((dh0, needs[9]), (dc0, needs[10])) if need is not None]
        found = [dx if needs[0] else None, *(dweights if need_dweights else [None] * count), *states]
        return (None, None, None, *found, *[None] * (len(flat) - len(found)))


def _second_gradient(ctx: Any, ddx: Any, ddh0: Any, ddc0: Any, *ddweights: Any) -> tuple[Any, ...]:
    """Differentiates the backward pass, through the reference.

    With g = vjp(douts) the gradients that ``layer_backward`` returned and dd those by them, these are the
    gradients of <g, dd> by the layer's tensors and by douts.
    """
    saved = _nest(ctx.saved_tensors, ctx.layout)
    a, options = _unflatten((*saved[4 : 4 + _TENSOR_COUNT], *ctx.rest))
    with torch.enable_grad():
        variables = [_point(v) for v in differentiable(a)]
        douts = [None if d is None else _point(d) for d in saved[:4]]
        outputs = reference.layer(rebuild(a, variables), options, douts[1] is not None)
        pairs = [(out, d) for out, d in zip(outputs, douts, strict=True) if d is not None]
        grads = torch.autograd.grad(
            [out for out, _ in pairs],
            variables,
            [d for _, d in pairs],
            create_graph=True,
            allow_unused=True,
        )
        states = [dd for dd, state in ((ddh0, a.h0), (ddc0, a.c0)) if state is not None]
        by_weights = ddweights or [None] * sum(map(len, a.lists))  # Empty if they were not needed.
        pairs = [
            (g, dd)
            for g, dd in zip(grads, [ddx, *by_weights, *states], strict=True)
            if g is not None and g.requires_grad and dd is not None
        ]
        wanted = [*variables, *(d for d in douts if d is not None)]
        second: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs:
            second = torch.autograd.grad(
                [g for g, _ in pairs], wanted, [dd for _, dd in pairs], create_graph=True, allow_unused=True
            )
    it = iter(second[len(variables) :])
    by_douts = [None if d is None else next(it) for d in douts]
    # In the order of flat; lengths, resets, y and tape have no gradient.
    flat = [g for g, d in zip(by_douts, douts, strict=True) if d is not None]
    flat += second[: len(variables)]
    return (None, None, None, *flat, *[None] * (len(ctx.saved_tensors) - len(flat)))


def _point(tensor: Tensor) -> Tensor:
    """Returns a view that one can differentiate by and that still leads to the caller's tensor."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


class _LayerBackwardGradient(torch.autograd.Function):
    """The gradient of ``layer_backward``, through the reference."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, args: tuple[Any, ...], layout: list[Any], *flat: Tensor) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            dx, dh0, dc0, dweights = torch.ops.torchrnn.layer_backward.default.redispatch(keyset, *args)
        ctx.save_for_backward(*flat)
        ctx.layout, ctx.rest = layout, args[4 + _TENSOR_COUNT : -5]
        ctx.set_materialize_grads(False)
        return (dx, dh0, dc0, *dweights)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _second_gradient(ctx, *grads)


def _layer_autograd(keyset: Any, *args: Any) -> Any:
    below = keyset & torch._C._after_autograd_keyset
    flat, layout = _flatten(args[:_TENSOR_COUNT])
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in flat):
        apply = _LayerGradient.apply  # torch leaves it without annotations.
        return apply(below, args, layout, *flat)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.torchrnn.layer.default.redispatch(below, *args)


def _layer_backward_autograd(keyset: Any, *args: Any) -> Any:
    below = keyset & torch._C._after_autograd_keyset
    flat, layout = _flatten([*args[: 4 + _TENSOR_COUNT], *args[-5:-3]])
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in flat):
        apply = _LayerBackwardGradient.apply  # As above.
        dx, dh0, dc0, *dweights = apply(below, args, layout, *flat)  # type: ignore[no-untyped-call]
        return dx, dh0, dc0, dweights
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.torchrnn.layer_backward.default.redispatch(below, *args)


_LIBRARY.impl("layer", _layer_autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("layer_backward", _layer_backward_autograd, "Autograd", with_keyset=True)
