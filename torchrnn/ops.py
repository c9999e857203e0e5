"""The boundary: schemas, argument errors, fake kernels, gradients and the fallback of every op.

One family of ops serves all cells: ``layer`` for training (returns a tape), ``layer_infer``, and ``layer_backward``,
which is itself differentiable. C++ registers the kernels of a device and nothing else; a device without kernels gets
the reference. Letters and argument shapes are those of ``reference.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchrnn import _native, reference
from torchrnn.options import ACTIVATIONS, CELLS, Options
from torchrnn.reference import Arguments

_TENSORS = (
    "Tensor x, Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] bias_ih, Tensor[] bias_hh, Tensor[] weight_hr, "
    "Tensor[] peephole, Tensor[] norm_gain, Tensor[] norm_shift, Tensor? h0, Tensor? c0, Tensor? lengths, "
    "Tensor? resets, Tensor? mask_h, Tensor? mask_c, Tensor? zoneout_h, Tensor? zoneout_c"
)
# Cell and activation are codes: a str argument would cost an allocation that torch's stable ABI never frees.
_OPTIONS = "int cell, int activation, float? cell_clip, float? proj_clip, float norm_eps, bool reverse"

_LIBRARY = torch.library.Library("torchrnn", "FRAGMENT")
_LIBRARY.define(
    f"layer({_TENSORS}, {_OPTIONS}, bool all_states) "
    "-> (Tensor y, Tensor c_all, Tensor h_n, Tensor c_n, Tensor tape)"
)
_LIBRARY.define(
    f"layer_infer({_TENSORS}, {_OPTIONS}, bool all_states) -> (Tensor y, Tensor c_all, Tensor h_n, Tensor c_n)"
)
# Gradients come back as dx, dh0, dc0 and then those of weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole,
# norm_gain and norm_shift, each with one entry per direction if the argument had. What need_* excludes is empty.
_LIBRARY.define(
    f"layer_backward(Tensor? dy, Tensor? dc_all, Tensor? dh_n, Tensor? dc_n, {_TENSORS}, {_OPTIONS}, "
    "Tensor y, Tensor tape, bool need_dx, bool need_dstate, bool need_dweights) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)"
)

_CELL_NAMES = {cell.code: name for name, cell in CELLS.items()}
_ACTIVATION_NAMES = {code: name for name, code in ACTIVATIONS.items()}
_TENSOR_COUNT = len(Arguments._fields)
_LISTS = slice(1, 9)  # The list arguments, whose gradients layer_backward returns as dweights.


def layer(
    a: Arguments, options: Options, all_states: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs one recurrent layer over a sequence, all its directions in one call.

    Args:
        a: The tensors; shapes are given at ``reference.Arguments``. All floating ones share one dtype (float32,
            float64, bfloat16 or float16) and device; any strides.
        options: The cell and its variations.
        all_states: Whether to return the c of every step.

    Returns:
        ``(y, c_all, h_n, c_n)`` with shapes [T, B, D*R], [T, B, D*H], [D, B, R], [D, B, H]. Outputs past a row's
        length are zero. ``c_all`` is empty if not wanted, ``c_n`` if the cell has no memory. A state given as None
        is zeros.

    Raises:
        ValueError: If a shape, dtype, device, length or combination does not hold.
        TypeError: If an argument is not a tensor where one is required.
    """
    a = _autocast(a)
    _check(a, options)
    if _reference_only(a, options):
        return reference.layer(a, options, all_states)
    flat = (
        *a,
        CELLS[options.cell].code,
        ACTIVATIONS[options.activation],
        options.cell_clip,
        options.proj_clip,
        options.norm_eps,
        options.reverse,
        all_states,
    )
    if torch.is_grad_enabled() and _requires_grad(a):
        y, c_all, h_n, c_n, _ = torch.ops.torchrnn.layer(*flat)
    else:
        y, c_all, h_n, c_n = torch.ops.torchrnn.layer_infer(*flat)
    return y, c_all, h_n, c_n


def _reference_only(a: Arguments, options: Options) -> bool:
    """Whether no kernel serves the call: an unserved variation, or a transform that ops cannot take part in."""
    return bool(
        a.peephole
        or a.norm_gain
        or a.mask_h is not None
        or a.mask_c is not None
        or a.zoneout_h is not None
        or a.zoneout_c is not None
        or options.cell_clip is not None
        or options.proj_clip is not None
        or options.activation not in (("tanh", "relu") if options.cell == "rnn" else ("tanh",))
        or _transformed(a.x)
    )


def _transformed(x: Tensor) -> bool:
    """Whether a functorch transform (vmap, jvp, grad ...) or forward-mode differentiation is active."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def _requires_grad(a: Arguments) -> bool:
    for value in a:
        if value is None:
            continue
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif any(tensor.requires_grad for tensor in value):
            return True
    return False


def _autocast(a: Arguments) -> Arguments:
    """Brings the floating tensors to autocast's dtype, if autocast is on; float64 stays as it is."""
    device = a.x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return a
    dtype = torch.get_autocast_dtype(device)

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
        return value if value is None else [cast(tensor) for tensor in value]

    return Arguments(*map(cast, a))


# Argument errors ------------------------------------------------------------------------------------------------


def _check(a: Arguments, options: Options) -> None:
    """Raises for what no path can run, naming op, argument, what was required and what was given."""
    name, cell = options.cell, CELLS[options.cell]
    x = a.x
    if x.dim() != 3:
        raise ValueError(f"{name}: x must be [T, B, I], got {list(x.shape)}")
    steps, batch, inputs = x.shape
    if steps < 1:
        raise ValueError(f"{name}: x must have at least 1 step, got {list(x.shape)}")
    if x.dtype not in _native.DTYPES:
        raise ValueError(f"{name}: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    directions = len(a.weight_hh)
    if directions not in (1, 2):
        raise ValueError(f"{name}: weight_hh must have 1 or 2 entries, one per direction, got {directions}")
    if a.weight_hh[0].dim() != 2:
        raise ValueError(f"{name}: weight_hh must be [{cell.gates}H, R], got {list(a.weight_hh[0].shape)}")
    rows, outputs = a.weight_hh[0].shape
    hidden = rows // cell.gates
    sizes = f"with T={steps}, B={batch}, I={inputs}, H={hidden}, R={outputs}, D={directions}"

    def need(field: str, value: Tensor | None, form: str, *shapes: tuple[int, ...]) -> None:
        if value is None:
            return
        if value.shape not in shapes:
            raise ValueError(f"{name}: {field} must be {form} {sizes}, got {list(value.shape)}")
        if value.dtype != x.dtype:
            raise ValueError(f"{name}: {field} must have x's dtype {x.dtype}, got {value.dtype}")
        if value.device != x.device:
            raise ValueError(f"{name}: {field} must be on x's device {x.device}, got {value.device}")

    def need_list(field: str, values: Sequence[Tensor], form: str, shape: tuple[int, ...], optional: bool = True) -> None:
        if not values and optional:
            return
        if len(values) != directions:
            raise ValueError(f"{name}: {field} must have {directions} entries, one per direction, got {len(values)}")
        for value in values:
            need(field, value, form, shape)

    gates = cell.gates
    prefix = "" if gates == 1 else str(gates)
    need_list("weight_hh", a.weight_hh, f"[{prefix}H, R]", (gates * hidden, outputs), optional=False)
    need_list("weight_ih", a.weight_ih, f"[{prefix}H, I]", (gates * hidden, inputs), optional=False)
    need_list("bias_ih", a.bias_ih, f"[{prefix}H]", (gates * hidden,))
    need_list("bias_hh", a.bias_hh, f"[{prefix}H]", (gates * hidden,))
    if bool(a.bias_ih) != bool(a.bias_hh):
        raise ValueError(f"{name}: bias_ih and bias_hh must both be given or both be absent")
    if a.weight_hr and not cell.memory:
        raise ValueError(f"{name}: weight_hr applies to cell lstm only")
    if not a.weight_hr and outputs != hidden:
        raise ValueError(f"{name}: weight_hh must be [{prefix}H, H] with H={hidden}, got {[rows, outputs]}")
    need_list("weight_hr", a.weight_hr, "[R, H]", (outputs, hidden))
    if options.proj_clip is not None and not a.weight_hr:
        raise ValueError(f"{name}: proj_clip must come with weight_hr")
    for field in ("peephole", "norm_gain", "norm_shift"):
        if getattr(a, field) and not cell.memory:
            raise ValueError(f"{name}: {field} applies to cell lstm only")
    need_list("peephole", a.peephole, "[3, H]", (3, hidden))
    need_list("norm_gain", a.norm_gain, "[5, H]", (5, hidden))
    need_list("norm_shift", a.norm_shift, "[5, H]", (5, hidden))
    if bool(a.norm_gain) != bool(a.norm_shift):
        raise ValueError(f"{name}: norm_gain and norm_shift must both be given or both be absent")

    for field in ("c0", "mask_c", "zoneout_c"):
        if getattr(a, field) is not None and not cell.memory:
            raise ValueError(f"{name}: {field} applies to cell lstm only")
    need("h0", a.h0, "[D, B, R]", (directions, batch, outputs))
    need("c0", a.c0, "[D, B, H]", (directions, batch, hidden))
    for field, size in (("mask_h", outputs), ("zoneout_h", outputs), ("mask_c", hidden), ("zoneout_c", hidden)):
        shapes = ((directions, steps, batch, size), (directions, 1, batch, size))
        need(field, getattr(a, field), f"[D, T or 1, B, {'R' if field.endswith('h') else 'H'}]", *shapes)

    if a.lengths is not None:
        _check_lengths(name, a.lengths, steps, batch)
    if a.resets is not None:
        if a.resets.shape != (steps, batch):
            raise ValueError(f"{name}: resets must be [T, B] = {[steps, batch]}, got {list(a.resets.shape)}")
        if a.resets.dtype != torch.bool:
            raise ValueError(f"{name}: resets must be bool, got {a.resets.dtype}")
        if a.resets.device != x.device:
            raise ValueError(f"{name}: resets must be on x's device {x.device}, got {a.resets.device}")


def _check_lengths(name: str, lengths: Tensor, steps: int, batch: int) -> None:
    if lengths.shape != (batch,):
        raise ValueError(f"{name}: lengths must be [B] = {[batch]}, got {list(lengths.shape)}")
    if lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: lengths must be int64 or int32, got {lengths.dtype}")
    # Values on an accelerator are not looked at: that would stop the host until the device has caught up.
    if lengths.device.type != "cpu" or torch.compiler.is_compiling() or _transformed(lengths) or batch == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(lengths))
    if low < 0 or high > steps:
        raise ValueError(f"{name}: lengths must be in 0..T={steps}, got {low}..{high}")


# Fallback and fake kernels --------------------------------------------------------------------------------------


def _unflatten(args: tuple[Any, ...]) -> tuple[Arguments, Options]:
    """Turns tensors and options, as the schemas have them, back into objects."""
    cell, activation, cell_clip, proj_clip, norm_eps, reverse = args[_TENSOR_COUNT : _TENSOR_COUNT + 6]
    a = Arguments(*args[:_TENSOR_COUNT])
    return a, Options(
        _CELL_NAMES[cell], _ACTIVATION_NAMES[activation], cell_clip, proj_clip, norm_eps, reverse
    )


def _layer_infer_reference(*args: Any) -> tuple[Tensor, ...]:
    a, options = _unflatten(args)
    # An op may not return the same storage twice or an argument's: with T=1 the reference's h_n can be y.
    return tuple(out.clone() for out in reference.layer(a, options, args[-1]))


def _layer_reference(*args: Any) -> tuple[Tensor, ...]:
    return (*_layer_infer_reference(*args), args[0].new_empty(0))


def _layer_backward_reference(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    douts, args, (need_dx, need_dstate, need_dweights) = args[:4], args[4:-5], args[-3:]
    a, options = _unflatten(args)
    variables, rebuild = _differentiable(a)
    outputs, vjp = torch.func.vjp(lambda *v: reference.layer(rebuild(v), options, douts[1] is not None), *variables)
    grads = rebuild(
        vjp(tuple(torch.zeros_like(o) if d is None else d for o, d in zip(outputs, douts, strict=True)))
    )
    empty = a.x.new_empty(0)
    return (
        grads.x if need_dx else empty,
        grads.h0 if need_dstate and grads.h0 is not None else empty.clone(),
        grads.c0 if need_dstate and grads.c0 is not None else empty.clone(),
        [g for grad in grads[_LISTS] for g in grad] if need_dweights else [],
    )


def _differentiable(a: Arguments) -> tuple[list[Tensor], Any]:
    """Returns the tensors that have a gradient, and a function that puts others into their places."""
    variables = [a.x, *(t for tensors in a[_LISTS] for t in tensors), *(t for t in (a.h0, a.c0) if t is not None)]

    def rebuild(values: Sequence[Tensor]) -> Arguments:
        it = iter(values)
        x = next(it)
        lists = [[next(it) for _ in tensors] for tensors in a[_LISTS]]
        states = [None if state is None else next(it) for state in (a.h0, a.c0)]
        return Arguments(x, *lists, *states, *a[11:])

    return variables, rebuild


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
    directions, hidden, _ = _sizes(a, options)
    wide = torch.promote_types(a.x.dtype, torch.float32)
    if _native.has_kernels(a.x.device):
        tape = a.x.new_empty(directions, steps, batch, CELLS[options.cell].tape * hidden, dtype=wide)
    else:
        tape = a.x.new_empty(0)
    return (*_layer_infer_fake(*args), tape)


def _layer_backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    need_dx, need_dstate, need_dweights = args[-3:]
    a = Arguments(*args[4 : 4 + _TENSOR_COUNT])
    empty = a.x.new_empty

    def like(t: Tensor | None, needed: bool) -> Tensor:
        return t.new_empty(t.shape) if needed and t is not None else empty(0)

    dweights = [t.new_empty(t.shape) for tensors in a[_LISTS] for t in tensors] if need_dweights else []
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
torch.library.register_fake("torchrnn::layer_backward", _layer_backward_fake, lib=_LIBRARY)


# Gradients ------------------------------------------------------------------------------------------------------


def _save(ctx: Any, tensors: Sequence[Any], rest: tuple[Any, ...]) -> None:
    """Saves arguments, of which some are None or lists of tensors, through save_for_backward."""
    flat: list[Tensor] = []
    for value in tensors:
        if value is not None:
            flat.extend([value] if isinstance(value, Tensor) else value)
    ctx.save_for_backward(*flat)
    ctx.layout = [v if v is None else -1 if isinstance(v, Tensor) else len(v) for v in tensors]
    ctx.rest = rest
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> list[Any]:
    it = iter(ctx.saved_tensors)
    return [v if v is None else next(it) if v < 0 else [next(it) for _ in range(v)] for v in ctx.layout]


def _layer_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, tape = output[0], output[-1]
    ctx.mark_non_differentiable(tape)
    _save(ctx, (*inputs[:_TENSOR_COUNT], y, tape), inputs[_TENSOR_COUNT:])


def _layer_grad(ctx: Any, dy: Any, dc_all: Any, dh_n: Any, dc_n: Any, _dtape: Any) -> tuple[Any, ...]:
    *tensors, y, tape = _saved(ctx)
    *options, all_states = ctx.rest
    needs = ctx.needs_input_grad
    need_dstate = any(needs[9:11])
    need_dweights = any(any(need) for need in needs[_LISTS])
    dx, dh0, dc0, flat = torch.ops.torchrnn.layer_backward(
        dy, dc_all if all_states else None, dh_n, dc_n, *tensors, *options, y, tape, needs[0], need_dstate, need_dweights
    )
    it = iter(flat)
    lists = [[next(it) if need_dweights else None for _ in tensors[i]] for i in range(1, 9)]
    grads = [
        dx if needs[0] else None,
        *lists,
        dh0 if needs[9] else None,
        dc0 if needs[10] else None,
    ]
    return (*grads, *[None] * (_TENSOR_COUNT - len(grads) + len(ctx.rest)))


def _layer_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _save(ctx, inputs[: 4 + _TENSOR_COUNT], inputs[4 + _TENSOR_COUNT :])


def _layer_backward_grad(ctx: Any, ddx: Any, ddh0: Any, ddc0: Any, ddweights: Any) -> tuple[Any, ...]:
    """Differentiates the backward pass, through the reference: the gradient of <vjp(douts), dd> by everything."""
    saved = _saved(ctx)
    douts, a, options = saved[:4], *_unflatten((*saved[4:], *ctx.rest))
    variables, rebuild = _differentiable(a)
    with torch.enable_grad():
        # Views, so that they are points of the graph to differentiate by and still lead to the caller's tensors.
        variables = [v.view_as(v) if v.requires_grad else v.detach().requires_grad_() for v in variables]
        douts = [d if d is None else d.view_as(d) if d.requires_grad else d.detach().requires_grad_() for d in douts]
        outputs = reference.layer(rebuild(variables), options, douts[1] is not None)
        pairs = [(o, d) for o, d in zip(outputs, douts, strict=True) if d is not None]
        grads = torch.autograd.grad(
            [o for o, _ in pairs],
            variables,
            [d for _, d in pairs],
            create_graph=True,
            allow_unused=True,
        )
        dd = [ddx, *(ddweights if ctx.rest[-1] and ddweights else [None] * sum(map(len, a[_LISTS])))]
        dd += [g for g, state in ((ddh0, a.h0), (ddc0, a.c0)) if state is not None]
        used = [(g, d) for g, d in zip(grads, dd, strict=True) if g is not None and d is not None and g.requires_grad]
        wanted = [*variables, *(d for d in douts if d is not None)]
        second: Sequence[Tensor | None] = [None] * len(wanted)
        if used:
            second = torch.autograd.grad(
                [g for g, _ in used],
                wanted,
                [d for _, d in used],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
    by_variable = rebuild(second[: len(variables)])  # type: ignore[arg-type]
    it = iter(second[len(variables) :])
    by_dout = [None if d is None else next(it) for d in douts]
    return (*by_dout, *by_variable[:11], *[None] * (_TENSOR_COUNT - 11 + len(ctx.rest)))


torch.library.register_autograd("torchrnn::layer", _layer_grad, setup_context=_layer_setup, lib=_LIBRARY)
torch.library.register_autograd(
    "torchrnn::layer_backward", _layer_backward_grad, setup_context=_layer_backward_setup, lib=_LIBRARY
)
