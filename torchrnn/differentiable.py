"""Ops with gradients of every order and under every transform, from their kernels and one reference.

A family is four ops. NAME is what callers, traces and exported programs hold, whatever the grad mode is when
they are made. It runs NAME_infer or, in training, NAME_train, which also returns a tape, and NAME_backward,
which is itself differentiable. Kernels register these three for a device; everything else is made here of the
reference, a function of differentiable torch operators only, and at the dispatcher, so that it holds for
eager calls, inside ``torch.compile`` and for direct calls of the ops alike:

- a device without kernels runs the reference;
- second derivatives go through it;
- so do functorch's transforms (vmap, grad, jvp ...) and forward-mode differentiation;
- so does a gradient by an input that kernels have none for.

NAME itself has no kernels but those in Python, since TorchScript shares lists of tensors between calls, which
torch's stable ABI empties when it hands them to a kernel in C++.

Over 400 lines because the four ops of a family and their gradients are one mechanism.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

DIFFERENTIABLE = 4
"""How many inputs kernels have a gradient for: the first ones."""

_INTERPRETER = torch._C._functorch.CInterpreter


def plain() -> bool:
    """Whether a call computes and nothing else: nothing records, transforms, traces, casts or compiles it."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._is_any_autocast_enabled()
        or transformed()
    )


def transformed() -> bool:
    """Whether a functorch transform (vmap, jvp, grad ...) or forward-mode differentiation is active."""
    # By its type, as torch.compile has an object here in any case.
    return (
        type(torch._C._functorch.peek_interpreter_stack()) is _INTERPRETER or forward_ad._current_level >= 0
    )


class DifferentiableOp:
    """A family of ops, defined in ``library``.

    Args:
        library: Where the ops are defined; it must outlive them.
        name: NAME.
        inputs: The schema's tensors, such as "Tensor? h0". Kernels have gradients for the first four, which
            NAME_backward returns in their order: those that ``need_*`` excludes, or of absent inputs, empty.
        options: The schema's other arguments.
        outputs: Names of the results, tensors all; the first one is y. An absent one is empty, [0].
        reference: ``(inputs, options) -> outputs``, in differentiable torch operators.
        check: ``(inputs, options)``: raises ValueError or TypeError for what no path can run. Kernels have
            checks of their own; these are for every other path of a direct call.
        fake: ``(inputs, options) -> (*outputs, tape)``, of the right shapes and dtypes, on the first input's
            device.
        keeps_y: ``options -> bool``: whether NAME_backward reads y. Otherwise callers may change it in place.
    """

    def __init__(
        self,
        library: torch.library.Library,
        name: str,
        *,
        inputs: Sequence[str],
        options: Sequence[str],
        outputs: Sequence[str],
        reference: Callable[[Sequence[Any], Sequence[Any]], tuple[Tensor, ...]],
        check: Callable[[Sequence[Any], Sequence[Any]], None],
        fake: Callable[[Sequence[Any], Sequence[Any]], tuple[Tensor, ...]],
        keeps_y: Callable[[Sequence[Any]], bool],
    ) -> None:
        self.name, self.outputs = name, outputs
        self.inputs = [text.split()[1] for text in inputs]
        self.count, self.results = len(inputs), len(outputs)
        self.reference, self.check_call, self.fake, self.keeps_y = reference, check, fake, keeps_y
        differentiable = [text.replace("?", "").split() for text in inputs[:DIFFERENTIABLE]]
        returns = ", ".join(f"Tensor {output}" for output in outputs)
        arguments = ", ".join([*inputs, *options])
        douts = ", ".join(f"Tensor? d{output}" for output in outputs)
        needs = ", ".join(f"bool need_{item}" for _, item in differentiable)
        gradients = ", ".join(f"{kind} d{item}" for kind, item in differentiable)
        library.define(f"{name}({arguments}) -> ({returns})")
        library.define(f"{name}_infer({arguments}) -> ({returns})")
        library.define(f"{name}_train({arguments}) -> ({returns}, Tensor tape)")
        library.define(
            f"{name}_backward({douts}, {arguments}, Tensor? y, Tensor tape, {needs}) -> ({gradients})"
        )
        namespace = torch.ops.torchrnn
        self.op, self.infer_op, self.train_op, self.backward_op = (
            getattr(namespace, f"{name}{suffix}").default for suffix in ("", "_infer", "_train", "_backward")
        )
        rows = (
            (name, self.infer_op, self._fake, self._transformed, self._autograd),
            (f"{name}_infer", self._fallback, self._fake, self._transformed, self._autograd),
            (f"{name}_train", self._train_fallback, self._train_fake, None, None),
            (
                f"{name}_backward",
                self._backward_fallback,
                self._backward_fake,
                self._backward_transformed,
                self._backward_autograd,
            ),
        )
        for op, fallback, fake_kernel, transform, autograd in rows:
            library.impl(op, fallback, "CompositeExplicitAutograd")
            torch.library.register_fake(f"torchrnn::{op}", fake_kernel, lib=library)
            library.impl(op, loop_over_batch(getattr(namespace, op).default), "Batched")
            if transform is not None:
                library.impl(op, transform, "FuncTorchDynamicLayerFrontMode")
            if autograd is not None:
                library.impl(op, autograd, "Autograd", with_keyset=True)

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        """Calls NAME."""
        results: tuple[Tensor, ...]
        if plain():  # Straight to the kernel: ``_autograd`` is Python, which small calls would feel.
            with torch._C._AutoDispatchBelowAutograd():
                results = self.infer_op(*args)
        else:
            results = self.op(*args)
        return results

    def _split(self, args: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        return args[: self.count], args[self.count :]

    # Fallback, fake kernels and transforms ----------------------------------------------------------------

    def _fallback(self, *args: Any) -> tuple[Tensor, ...]:
        inputs, options = self._split(args)
        self._check(inputs, options)
        # An op may not return the same storage twice or an argument's: with T=1 the reference's h_n can be y.
        return tuple(out.clone() for out in self.reference(inputs, options))

    def _train_fallback(self, *args: Any) -> tuple[Tensor, ...]:
        outputs = self._fallback(*args)
        # The reference keeps nothing, but compilers cache the shape of a tape, and must find it everywhere.
        return *outputs, torch.zeros_like(self.fake(*self._split(args))[-1])

    def _backward_fallback(self, *args: Any) -> tuple[Any, ...]:
        # Kernels run below autograd, whose key the dispatcher leaves out: here it is let in again.
        included = torch._C._dispatch_tls_local_include_set()
        excluded = torch._C._dispatch_tls_local_exclude_set()
        excluded = excluded.remove(torch._C.DispatchKey.AutogradFunctionality)
        with torch._C._ForceDispatchKeyGuard(included, excluded):
            return self._backward_by_reference(args, False)

    def _backward_by_reference(self, args: Sequence[Any], create_graph: bool) -> tuple[Any, ...]:
        douts, inputs, options, needs = self._split_backward(args)
        self._check_backward(args)
        flat, layout = flatten(inputs[:DIFFERENTIABLE])
        with torch.enable_grad():
            variables = nest([_point(tensor) for tensor in flat], layout)
            found = self._vjp(variables, inputs, options, douts, create_graph)
        grads = [torch.zeros_like(v) if grad is None else grad for grad, v in zip(found, flat, strict=True)]
        return _needed(inputs, nest(grads, layout), needs)

    def _fake(self, *args: Any) -> tuple[Tensor, ...]:
        return self._train_fake(*args)[:-1]

    def _train_fake(self, *args: Any) -> tuple[Tensor, ...]:
        inputs, options = self._split(args)
        self._check(inputs, options)
        return self.fake(inputs, options)

    def _backward_fake(self, *args: Any) -> tuple[Any, ...]:
        _, inputs, _, needs = self._split_backward(args)
        self._check_backward(args)
        flat, layout = flatten(inputs[:DIFFERENTIABLE])
        return _needed(inputs, nest([tensor.new_empty(tensor.shape) for tensor in flat], layout), needs)

    def _transformed(self, *args: Any) -> tuple[Tensor, ...]:
        inputs, options = self._split(args)
        self._check(inputs, options)
        # Copies, since a compiled jvp takes no view of an input that is itself a part of a larger tensor.
        flat, layout = flatten(inputs[:DIFFERENTIABLE])
        copies = nest([tensor.clone() for tensor in flat], layout)
        return self.reference([*copies, *inputs[DIFFERENTIABLE:]], options)

    def _backward_transformed(self, *args: Any) -> tuple[Any, ...]:
        douts, inputs, options, needs = self._split_backward(args)
        self._check_backward(args)
        flat, layout = flatten(inputs[:DIFFERENTIABLE])

        def outputs(*variables: Tensor) -> tuple[Tensor, ...]:
            given = nest(variables, layout)
            found = self.reference([*given, *inputs[DIFFERENTIABLE:]], options)
            return tuple(out for out, d in zip(found, douts, strict=True) if d is not None)

        pull = torch.func.vjp(outputs, *flat)[1]
        return _needed(inputs, nest(pull(tuple(d for d in douts if d is not None)), layout), needs)

    def _check(self, inputs: Sequence[Any], options: Sequence[Any]) -> None:
        """Raises for what no path can run; dispatch brings here all that is not strided or on one device."""
        first = inputs[0]
        for name, value in zip(self.inputs, inputs, strict=True):
            for tensor in flatten([value])[0]:
                check_plain(self.name, name, tensor, first)
        self.check_call(inputs, options)

    def _check_backward(self, args: Sequence[Any]) -> None:
        """Raises unless the forward call holds, and what it gave and its gradients are like its results."""
        douts, inputs, options, _ = self._split_backward(args)
        self._check(inputs, options)
        first: Tensor = inputs[0]
        *outputs, tape = self.fake([first.to("meta"), *inputs[1:]], options)
        y_given, tape_given = args[-DIFFERENTIABLE - 2 : -DIFFERENTIABLE]
        pairs = [(f"d{name}", d, out) for name, d, out in zip(self.outputs, douts, outputs, strict=True)]
        if y_given is None and self.keeps_y(options):
            raise ValueError(f"{self.name}: y must be given, got None")
        for name, given, like in [*pairs, ("y", y_given, outputs[0]), ("tape", tape_given, tape)]:
            if given is None and name != "tape":
                continue
            check_plain(self.name, name, given, first)
            if like.dim() == 1:
                if name == "tape":
                    continue  # Of a cell that needs none: nothing is read of what stands for it.
                raise ValueError(f"{self.name}: {name} must be absent, as is what it belongs to")
            if given.shape != like.shape or given.dtype != like.dtype:
                raise ValueError(
                    f"{self.name}: {name} must be {like.dtype} {list(like.shape)}, "
                    f"got {given.dtype} {list(given.shape)}"
                )

    def _split_backward(
        self, args: Sequence[Any]
    ) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any], Sequence[bool]]:
        """Returns douts, inputs, options and needs."""
        first, last = self.results + self.count, len(args) - DIFFERENTIABLE
        # y and tape stand before the needs; the reference has no use for them.
        return args[: self.results], args[self.results : first], args[first : last - 2], args[last:]

    def _vjp(
        self,
        variables: Sequence[Any],
        inputs: Sequence[Any],
        options: Sequence[Any],
        douts: Sequence[Tensor | None],
        create_graph: bool,
    ) -> Sequence[Tensor | None]:
        """Returns the gradients by the tensors in variables, which take the place of the first inputs."""
        outputs = self.reference([*variables, *inputs[DIFFERENTIABLE:]], options)
        pairs = [(o, d) for o, d in zip(outputs, douts, strict=True) if d is not None and o.requires_grad]
        wanted, _ = flatten(variables)
        if not pairs:
            return [None] * len(wanted)
        return torch.autograd.grad(
            [out for out, _ in pairs],
            wanted,
            [d for _, d in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )

    # Gradients --------------------------------------------------------------------------------------------

    # By hand, because torch.library.register_autograd reads the schema anew at every call, which for such
    # schemas takes longer than a small layer.

    def _autograd(self, keyset: Any, *args: Any) -> Any:
        inputs, options = self._split(args)
        flat, layout = flatten(inputs)
        if has_tangent(*flat):
            self._check(inputs, options)
            return self.reference(inputs, options)
        if torch.is_grad_enabled():
            # A mask is learnt, say.
            if any(tensor.requires_grad for tensor in flatten(inputs[DIFFERENTIABLE:])[0]):
                self._check(inputs, options)
                return self.reference(inputs, options)
            if any(tensor.requires_grad for tensor in flat):
                apply = _Gradient.apply  # torch leaves it without annotations.
                return apply(self, options, layout, *flat)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return self.infer_op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def _backward_autograd(self, keyset: Any, *args: Any) -> Any:
        flat, layout = flatten(args[: self.results + self.count])
        kept, _ = flatten(args[-DIFFERENTIABLE - 2 : -DIFFERENTIABLE])
        if has_tangent(*flat):
            return self._backward_by_reference(args, torch.is_grad_enabled())
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in [*flat, *kept]):
            rest = args[self.results + self.count :]
            apply = _BackwardGradient.apply  # As above.
            grads = apply(self, rest, layout, *flat)  # type: ignore[no-untyped-call]
            return nest(grads, _gradient_layout(args[self.results :], args[-DIFFERENTIABLE:]))
        with torch._C._AutoDispatchBelowAutograd():
            return self.backward_op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


class _Gradient(torch.autograd.Function):
    """The gradient of NAME: a call of NAME_backward. ``flat`` are the tensors in its inputs."""

    @staticmethod
    def forward(
        ctx: Any, family: DifferentiableOp, options: Sequence[Any], layout: Sequence[Any], *flat: Tensor
    ) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            *outputs, tape = family.train_op(*nest(flat, layout), *options)
        # What stands for an absent result has one dimension, and no gradient.
        ctx.mark_non_differentiable(*(out for out in outputs if out.dim() == 1))
        ctx.keeps_y = family.keeps_y(options)
        ctx.save_for_backward(*flat, tape, *(outputs[:1] if ctx.keeps_y else ()))
        ctx.family, ctx.options, ctx.layout = family, options, layout
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> Any:
        # Unpacked once: what stands behind a saved tensor may give it only once.
        *flat, tape, y = ctx.saved_tensors if ctx.keeps_y else (*ctx.saved_tensors, None)
        needs = nest(ctx.needs_input_grad[3:], ctx.layout)[:DIFFERENTIABLE]
        grads = ctx.family.backward_op(
            *douts,
            *nest(flat, ctx.layout),
            *ctx.options,
            y,
            tape,
            *(any(need) if isinstance(need, list) else bool(need) for need in needs),
        )
        found: list[Tensor | None] = []
        for grad, need in zip(grads, needs, strict=True):
            if isinstance(need, list):
                found += [g if n else None for g, n in zip(grad or [None] * len(need), need, strict=True)]
            elif need is not None:
                found.append(grad if need else None)
        return None, None, None, *found, *[None] * (len(flat) - len(found))


class _BackwardGradient(torch.autograd.Function):
    """The gradient of NAME_backward, through the reference. ``flat`` are the tensors in douts and inputs.

    With g = vjp(douts) the gradients that NAME_backward returned and dd those by them, these are the
    gradients of <g, dd> by the inputs and by douts.
    """

    @staticmethod
    def forward(
        ctx: Any, family: DifferentiableOp, rest: Sequence[Any], layout: Sequence[Any], *flat: Tensor
    ) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            grads = family.backward_op(*nest(flat, layout), *rest)
        ctx.save_for_backward(*flat)
        ctx.family, ctx.options, ctx.layout = family, rest[: -DIFFERENTIABLE - 2], layout
        ctx.set_materialize_grads(False)
        found, ctx.places = flatten(grads)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved, family = ctx.saved_tensors, ctx.family
        with torch.enable_grad():
            given = nest(saved, ctx.layout)
            douts, inputs = given[: family.results], given[family.results :]
            points, layout = flatten([*douts, *inputs[:DIFFERENTIABLE]])
            points = [_point(tensor) for tensor in points]
            found = nest(points, layout)
            douts, variables = found[: family.results], found[family.results :]
            first = family._vjp(variables, inputs, ctx.options, douts, True)
            by_first = _spread(nest(grads, ctx.places), variables)
            pairs = [
                (g, dd)
                for g, dd in zip(first, by_first, strict=True)
                if g is not None and g.requires_grad and dd is not None
            ]
            second: Sequence[Tensor | None] = [None] * len(points)
            if pairs:
                second = torch.autograd.grad(
                    [g for g, _ in pairs],
                    points,
                    [dd for _, dd in pairs],
                    create_graph=True,
                    allow_unused=True,
                )
        return None, None, None, *second, *[None] * (len(saved) - len(second))


def _point(tensor: Tensor) -> Tensor:
    """Returns a view that one can differentiate by and that still leads to the caller's tensor."""
    view = tensor.view_as(tensor)  # Unlike detach() it has the tangent of a dual number.
    return view if view.requires_grad else view.requires_grad_()


def has_tangent(*tensors: Tensor) -> bool:
    """Whether one of the tensors is a dual number of forward-mode differentiation."""
    # First what is the same for all of them, as most calls end there.
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def _spread(grads: Sequence[Any], variables: Sequence[Any]) -> list[Tensor | None]:
    """Returns for each tensor in variables what belongs to it of gradients that are empty if not needed."""
    found: list[Tensor | None] = []
    for grad, variable in zip(grads, variables, strict=True):
        if isinstance(variable, list):
            found += grad or [None] * len(variable)
        elif variable is not None:
            found.append(grad)
    return found


def _gradient_layout(inputs: Sequence[Any], needs: Sequence[bool]) -> list[int | None]:
    """Returns the layout of what NAME_backward returns."""
    pairs = zip(inputs[:DIFFERENTIABLE], needs, strict=True)
    return [(len(value) if need else 0) if isinstance(value, list) else -1 for value, need in pairs]


def _needed(inputs: Sequence[Any], grads: Sequence[Any], needs: Sequence[bool]) -> tuple[Any, ...]:
    """Returns the gradients by the first inputs as NAME_backward has them: empty if not needed or absent."""
    first: Tensor = inputs[0]
    return tuple(
        ([g.clone() for g in grad] if need else [])
        if isinstance(grad, list)
        else grad.clone()
        if need and grad is not None
        else first.new_empty(0)
        for grad, need in zip(grads, needs, strict=True)
    )


def check_plain(op: str, name: str, tensor: Any, first: Any) -> None:
    """Raises unless an argument of an op is a strided tensor with memory, on the device of its first one."""
    if not isinstance(tensor, Tensor) or not isinstance(first, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise ValueError(f"{op}: {name} must be strided, got {tensor.layout}")
    if tensor.device != first.device:
        raise ValueError(f"{op}: {name} must be on {first.device}, got {tensor.device}")
    if _lacks_memory(tensor):
        raise ValueError(f"{op}: {name} has no memory")


def _lacks_memory(tensor: Tensor) -> bool:
    """Whether memory was given back, as by sharded training between steps: torch's operators read it."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type == "meta":
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor._is_zerotensor():
        return False
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


# Nests of tensors -----------------------------------------------------------------------------------------


def flatten(args: Sequence[Any]) -> tuple[list[Tensor], list[int | None]]:
    """Returns the tensors among arguments, which may be None or lists of tensors, and their places."""
    flat: list[Tensor] = []
    for value in args:
        if value is not None:
            flat.extend([value] if isinstance(value, Tensor) else value)
    return flat, [v if v is None else -1 if isinstance(v, Tensor) else len(v) for v in args]


def nest(flat: Sequence[Any], layout: Sequence[int | None]) -> list[Any]:
    """Undoes ``flatten``."""
    it = iter(flat)
    return [v if v is None else next(it) if v < 0 else [next(it) for _ in range(v)] for v in layout]


# Batched backward passes ----------------------------------------------------------------------------------


def loop_over_batch(op: Any) -> Callable[..., Any]:
    """Returns the kernel of an op for ``torch.autograd.grad(is_grads_batched=True)`` and its like.

    They run the backward pass on tensors with a hidden dimension, not by functorch but by the older vmap in
    ``torch._vmap_internals``. Here the op is called once for each index of that dimension.
    """

    def kernel(*args: Any) -> Any:
        flat, layout = flatten([arg if isinstance(arg, Tensor | list) else None for arg in args])
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        batched = [torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in flat]
        # A tensor that is batched at an outer level only is expanded to one.
        opened = [
            torch._remove_batch_dim(tensor, level, 1, 0) if is_batched else tensor.unsqueeze(0)
            for tensor, is_batched in zip(flat, batched, strict=True)
        ]
        size = max(tensor.size(0) for tensor in opened)
        rows = [tensor.expand(size, *tensor.shape[1:]).unbind(0) for tensor in opened]
        results = []
        for one in zip(*rows, strict=True):
            tensors = nest(one, layout)
            call = [arg if t is None else t for arg, t in zip(args, tensors, strict=True)]
            result = op(*call)
            found, places = flatten([result] if isinstance(result, Tensor) else result)
            results.append(found)
        stacked = [torch._add_batch_dim(torch.stack(each), 0, level) for each in zip(*results, strict=True)]
        return stacked[0] if isinstance(result, Tensor) else tuple(nest(stacked, places))

    return kernel
