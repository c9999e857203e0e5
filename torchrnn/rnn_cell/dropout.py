"""Dropout on the input, the output and the state of a cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchrnn.dropout import dropout
from torchrnn.rnn_cell.base import LSTMStateTuple, Nest, Run, describe, map_sizes
from torchrnn.rnn_cell.core import unroll_cell
from torchrnn.rnn_cell.wrappers import SameInputWrapper

Visitor = Callable[[Nest], Any]
KINDS = ("input", "output", "state")


class DropoutWrapper(SameInputWrapper):
    """Drops numbers of input, output and state: each is kept with its probability p, and then divided by p.

    In a step the input is dropped, the cell runs, and of its results output and state are dropped, each by
    its own mask: what is dropped from the output stays in the state, and the other way round. p counts in
    float32, as in TensorFlow. Only in training mode; ``eval()`` turns dropout off.

    By default every step has masks of its own. With ``variational_recurrent`` (after Gal and Ghahramani 2016,
    arXiv:1512.05287) masks are drawn once for a sequence, and as in TensorFlow one mask [1, size] serves all
    rows of the batch; ``per_sample`` gives each row its own, as the paper does. A sequence begins with every
    unrolling function, ``zero_state`` and ``start_sequence``. Who calls the cell step by step with states of
    his own calls ``start_sequence`` himself.

    Args:
        cell: The cell inside.
        input_keep_prob: p of the input, in 0..1: a float, or a tensor without axes. A float 1 drops nothing.
        output_keep_prob: p of the output.
        state_keep_prob: p of the state.
        variational_recurrent: Whether masks stay the same for all steps.
        input_size: Required with ``variational_recurrent`` if the input is dropped, as in TensorFlow; the
            masks take their sizes from what they are applied to.
        dtype: Likewise required with ``variational_recurrent``.
        seed: A ``torch.Generator``, or an int for a new one; None for torch's default generator.
        dropout_state_filter_visitor: Called with the state, and chooses what of it is dropped. False is for
            nothing. True is for the tensor, or if it is a structure, for what the visitor chooses of each
            part; for a structure it may also return one bool per part, in a structure like it. By default
            everything but the c of an ``LSTMStateTuple``; a concatenated state [c | h] is one tensor, and is
            dropped.
        noise: Uniform noise in [0, 1) to use instead of drawn one: "input", "output" and "state", each a list
            with one tensor per tensor of the nest, in its order, or one tensor alone; None in the list where
            nothing is dropped. A number is kept where noise >= 1 - p. With ``variational_recurrent`` a tensor
            is [1, size], else [T, B, size], entry k for the step that is walked k-th: where a sequence
            is run backwards, entry 0 is for the last step of a row. (Step by step it is the k-th call.)
        per_sample: With ``variational_recurrent``, whether each row has a mask of its own.

    Raises:
        ValueError: If a probability is not in 0..1, what ``variational_recurrent`` requires is not there, or
            noise has other keys; at the call, if a probability is 0.
        TypeError: If ``cell`` is no cell, or the visitor is not callable.
    """

    def __init__(
        self,
        cell: Any,
        input_keep_prob: float | Tensor = 1.0,
        output_keep_prob: float | Tensor = 1.0,
        state_keep_prob: float | Tensor = 1.0,
        variational_recurrent: bool = False,
        input_size: Nest = None,
        dtype: torch.dtype | None = None,
        seed: int | torch.Generator | None = None,
        dropout_state_filter_visitor: Visitor | None = None,
        *,
        noise: Mapping[str, Tensor | Sequence[Tensor | None]] | None = None,
        per_sample: bool = False,
    ) -> None:
        super().__init__(cell)
        if dropout_state_filter_visitor is not None and not callable(dropout_state_filter_visitor):
            raise TypeError("dropout_state_filter_visitor must be callable")
        self.input_keep_prob = _keep_prob("input_keep_prob", input_keep_prob)
        self.output_keep_prob = _keep_prob("output_keep_prob", output_keep_prob)
        self.state_keep_prob = _keep_prob("state_keep_prob", state_keep_prob)
        if variational_recurrent and dtype is None:
            raise ValueError("When variational_recurrent=True, dtype must be provided")
        if variational_recurrent and _drops(self.input_keep_prob) and input_size is None:
            raise ValueError(
                "When variational_recurrent=True and input_keep_prob < 1.0 or is unknown, "
                "input_size must be provided"
            )
        self.variational_recurrent, self.per_sample = variational_recurrent, per_sample
        self.generator = generator_of(seed)
        self.visitor = dropout_state_filter_visitor or drop_all_but_memory
        self.noise = {
            kind: [given] if isinstance(given, Tensor) else list(given)
            for kind, given in (noise or {}).items()
        }
        if not self.noise.keys() <= set(KINDS):
            raise ValueError(f"noise must have keys of {', '.join(KINDS)}, got {', '.join(self.noise)}")
        self._step = 0
        self._drawn: dict[Any, Tensor] = {}

    def start_sequence(self) -> None:
        """Makes the next call draw new masks, and begin with the first step of given noise."""
        self._step = 0
        self._drawn.clear()
        super().start_sequence()

    # Factors ----------------------------------------------------------------------------------------------

    def _keep(self, kind: str) -> float | Tensor | None:
        """Returns the probability to keep in this mode; None if nothing is dropped."""
        keep: float | Tensor = getattr(self, f"{kind}_keep_prob")
        if not self.training or not _drops(keep):
            return None
        if not isinstance(keep, Tensor) and keep == 0:
            raise ValueError("rate must be a scalar tensor or a float in the range [0, 1), got 1")
        return keep

    def _chosen(self, kind: str, nest: Nest) -> list[bool]:
        """Returns which of the tensors of a nest are dropped."""
        if kind == "state":
            return visit(self.visitor, nest)
        return [True] * len(pytree.tree_leaves(nest))

    def _factors(self, kind: str, nest: Nest, run: Run | None, steps: int) -> list[Tensor | None]:
        """Returns the factors on the tensors of one step, [B, ...]; of all T steps if there is a run.

        They are [B, ...], or [T, B, ...] for a run, with axes of size 1 where they are shared; None for what
        is not dropped.
        """
        keep = self._keep(kind)
        values = pytree.tree_leaves(nest)
        if keep is None:
            return [None] * len(values)
        return [
            self._factor(kind, i, keep, _floating(v), run, steps) if chosen else None
            for i, (v, chosen) in enumerate(zip(values, self._chosen(kind, nest), strict=True))
        ]

    def _factor(
        self, kind: str, i: int, keep: float | Tensor, value: Tensor, run: Run | None, steps: int
    ) -> Tensor:
        if self._draws(keep, kind):
            shape = value.shape if run is None else (steps, *value.shape)
            return dropout(value.new_ones(()).expand(shape), keep, self.generator)
        noise = self._uniform(kind, i, value, run, steps).to(value.device)
        if isinstance(keep, Tensor):
            keep = keep.to(value.device, torch.float32)
        # In place: each pass over a whole sequence's noise that allocates costs as much as drawing it.
        return noise.ge_(1 - keep).to(value.dtype).div_(keep)

    def _draws(self, keep: float | Tensor, kind: str) -> TypeGuard[float]:
        """Whether each number is dropped by itself and by drawn noise, which is all that the op can do."""
        return isinstance(keep, float) and not self.variational_recurrent and kind not in self.noise

    def _uniform(self, kind: str, i: int, value: Tensor, run: Run | None, steps: int) -> Tensor:
        """Returns numbers in [0, 1) that the caller may overwrite, shaped as ``_factors`` says."""
        noise = self._given(kind, i)
        if self.variational_recurrent:
            if noise is None:
                shape = (value.size(0) if self.per_sample else 1, *value.shape[1:])
                key = kind, i, shape
                if key not in self._drawn:
                    self._drawn[key] = uniform(shape, self.generator, value.device)
                noise = self._drawn[key]
            return noise.clone() if run is None else noise.unsqueeze(0).clone()
        if noise is None:
            shape = value.shape if run is None else (steps, *value.shape)
            return uniform(shape, self.generator, value.device)
        needed = self._step + 1 if run is None else steps
        if noise.size(0) < needed:
            raise ValueError(
                f"noise: {kind} must have an entry for each of {needed} steps, got {noise.size(0)}"
            )
        return (noise[self._step] if run is None else _by_time(noise, run, steps)).clone()

    def _given(self, kind: str, i: int) -> Tensor | None:
        if kind not in self.noise:
            return None
        noise = self.noise[kind][i] if i < len(self.noise[kind]) else None
        if noise is None:
            raise ValueError(f"noise: tensor {i} of the {kind} is dropped, but there is no noise for it")
        return noise

    def _drop(self, kind: str, nest: Nest, run: Run | None = None) -> Nest:
        """Returns tensors [B, ...] of one step, or [T, B, ...] of a run, times their factors."""
        keep = self._keep(kind)
        if keep is None:
            return nest
        values, spec = pytree.tree_flatten(nest)
        if self._draws(keep, kind):
            pairs = zip(values, self._chosen(kind, nest), strict=True)
            dropped = [dropout(_floating(v), keep, self.generator) if chosen else v for v, chosen in pairs]
            return pytree.tree_unflatten(dropped, spec)
        step = nest if run is None else pytree.tree_map(lambda v: v[0], nest)
        factors = self._factors(kind, step, run, 0 if run is None else values[0].size(0))
        return pytree.tree_unflatten([_times(v, f) for v, f in zip(values, factors, strict=True)], spec)

    # Running ----------------------------------------------------------------------------------------------

    def call(self, inputs: Nest, state: Nest) -> tuple[Nest, Nest]:
        """Returns the dropped output and the dropped state that the cell makes of the dropped input."""
        output, new = self.cell(self._drop("input", inputs), state)
        new, output = self._drop("state", new), self._drop("output", output)
        if self.noise:
            self._step += 1
        return output, new

    def unroll(self, inputs: Nest, state: Nest, run: Run) -> tuple[Nest, Nest]:
        """Drops input and output of all steps; the state by masks that the cell inside applies."""
        steps = pytree.tree_leaves(inputs)[0].size(0)
        inputs = self._drop("input", inputs, run)
        inner = replace(run, masks=self._masks(state, run, steps))
        outputs, state = unroll_cell(self.cell, inputs, state, inner)
        return self._drop("output", outputs, run), state

    def _masks(self, state: Nest, run: Run, steps: int) -> Nest:
        """Returns the factors on the state, times those that come from outside."""
        # A plain tuple may stand for a named one, which the visitor knows by its type.
        spec = pytree.tree_structure(map_sizes(lambda _: 0, self.state_size))
        state = pytree.tree_unflatten(pytree.tree_leaves(state), spec)
        factors = self._factors("state", state, run, steps)
        if run.masks is not None:
            outer = pytree.tree_leaves(run.masks)
            factors = [b if a is None else _times(a, b) for a, b in zip(factors, outer, strict=True)]
        return None if all(f is None for f in factors) else pytree.tree_unflatten(factors, spec)

    def extra_repr(self) -> str:
        """Returns the probabilities."""
        names = [f"{kind}_keep_prob" for kind in KINDS]
        return ", ".join(f"{name}={torch.as_tensor(getattr(self, name)).item():g}" for name in names)

    def way(self) -> str:
        """Returns how the parts of the dropout run in this mode."""
        kinds = [kind for kind in KINDS if self.training and _drops(getattr(self, f"{kind}_keep_prob"))]
        ways = []
        if outer := " and ".join(kind for kind in kinds if kind != "state"):
            ways.append(f"{outer} of the whole sequence at once")
        if "state" in kinds:
            ways.append("the state by masks that the cell inside applies")
        return "drops " + (", ".join(ways) or "nothing")


def generator_of(seed: int | torch.Generator | None) -> torch.Generator | None:
    """Returns a generator, or a new one with a seed; None for torch's default generator."""
    if seed is None or isinstance(seed, torch.Generator):
        return seed
    return torch.Generator().manual_seed(seed)


def uniform(shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draws numbers in [0, 1) where the generator is; returns them on a device."""
    # float32 whatever the dtype: the 8 bits of bfloat16 would round the probability.
    where = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=torch.float32, device=where).to(device)


def drop_all_but_memory(state: Nest) -> Nest:
    """The default filter: everything but the c of an ``LSTMStateTuple``."""
    return LSTMStateTuple(False, True) if isinstance(state, LSTMStateTuple) else True


def visit(visitor: Visitor, node: Nest) -> list[bool]:
    """Returns, for each tensor of a nest, whether a visitor chooses it; see ``DropoutWrapper``.

    Raises:
        TypeError: If the visitor returns neither a bool nor, for a structure, one bool per part of it.
    """
    answer = visitor(node)
    # One level: only the node itself is taken apart.
    parts, _ = pytree.tree_flatten(node, is_leaf=lambda v: v is not node)
    is_leaf = len(parts) == 1 and parts[0] is node
    if isinstance(answer, bool):
        answers = [answer] * len(parts)
    else:
        answers = [] if is_leaf else pytree.tree_leaves(answer)
    if len(answers) != len(parts) or not all(isinstance(a, bool) for a in answers):
        raise TypeError(
            "dropout_state_filter_visitor must return a bool, or for a structure one bool per part, "
            f"got {answer} for {describe(node)}"
        )
    if is_leaf:
        return answers
    return [
        chosen
        for part, into in zip(parts, answers, strict=True)
        for chosen in (visit(visitor, part) if into else [False] * len(pytree.tree_leaves(part)))
    ]


def _keep_prob(name: str, value: float | Tensor) -> float | Tensor:
    """Returns a probability after checks; a float in the precision of float32."""
    number = torch.as_tensor(value, dtype=torch.float32).item()
    if not 0 <= number <= 1:
        raise ValueError(f"Parameter {name} must be between 0 and 1: {number:g}")
    return value if isinstance(value, Tensor) else number


def _drops(keep: float | Tensor) -> bool:
    """Whether anything may be dropped."""
    return isinstance(keep, Tensor) or keep < 1


def _floating(value: Tensor) -> Tensor:
    """Returns a tensor that can be scaled."""
    if not value.is_floating_point():
        raise ValueError(
            "x has to be a floating point tensor since it's going to be scaled. "
            f"Got a {value.dtype} tensor instead."
        )
    return value


def _times(value: Tensor, factor: Tensor | None) -> Tensor:
    return value if factor is None else value * factor


def _by_time(noise: Tensor, run: Run, steps: int) -> Tensor:
    """Turns noise [K, B, ...] by the order in which steps are walked into noise [T, B, ...] by time."""
    if not run.reverse:
        return noise[:steps]
    times = torch.arange(steps, device=noise.device)[:, None]
    last = steps if run.lengths is None else run.lengths.to(noise.device)
    walked = (last - 1 - times).clamp(min=0)  # Past a row's length any entry will do.
    return noise.take_along_dim(walked.view(*walked.shape, *[1] * (noise.dim() - 2)), 0)
