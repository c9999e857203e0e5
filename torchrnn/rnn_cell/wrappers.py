"""Cells around a cell: residual and highway connections, projections, an embedding, a device.

Over a sequence a wrapper does its own work for all steps at once, and the cell inside runs in its own way.

One file for all small wrappers, which share their bases; more than half of it documents arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from torchrnn.rnn_cell.base import (
    Activation,
    Initializer,
    Nest,
    RNNCell,
    Run,
    activate,
    activation_of,
    assert_cell,
    build_cell,
    cat_size,
    constant,
    ignore_input_size,
    linear,
    to_device,
    why_each_step,
    zero_state_of,
)
from torchrnn.rnn_cell.core import unroll_cell


class Wrapper(RNNCell):
    """The base of the wrappers; state and output are those of the cell inside.

    Args:
        cell: An ``RNNCell``, or any object with its protocol.

    Raises:
        TypeError: If it is no cell.
    """

    cell: Any

    def __init__(self, cell: Any) -> None:
        super().__init__()
        assert_cell(cell)
        self.cell = cell

    @property
    def state_size(self) -> Nest:
        """That of the cell inside."""
        return self.cell.state_size

    @property
    def output_size(self) -> Nest:
        """That of the cell inside."""
        return self.cell.output_size

    def inner_cells(self) -> Sequence[tuple[str, nn.Module]]:
        """Returns the cell inside, in the wrapper's scope."""
        return [("", self.cell)]

    def zero_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Nest:
        """Returns that of the cell inside, and starts a new sequence."""
        self.start_sequence()
        return zero_state_of(self.cell, batch_size, dtype, device)

    def way(self) -> str:
        """Returns how the wrapper's own part of a sequence runs."""
        return "the cell inside over the whole sequence"


class SameInputWrapper(Wrapper):
    """The base of the wrappers that leave inputs, of any kind, to the cell inside."""

    def check_inputs(self, inputs: Nest) -> None:
        """Leaves the check to the cell inside."""

    def input_size_of(self, inputs: Nest) -> int:
        """Returns 0: no variable of the wrapper depends on the inputs."""
        return 0


class ResidualWrapper(SameInputWrapper):
    """Adds the input to the output: out = x + cell(x) (Wu et al. 2016, arXiv:1609.08144).

    Args:
        cell: The cell inside; unless there is a ``residual_fn``, it puts out what it takes in.
        residual_fn: ``residual_fn(inputs, outputs)`` of one step, [B, ...] each, in place of the sum.

    Raises:
        ValueError: At the call, if without ``residual_fn`` input and output differ in shape or structure.
    """

    def __init__(self, cell: Any, residual_fn: Callable[[Nest, Nest], Nest] | None = None) -> None:
        super().__init__(cell)
        self.residual_fn = residual_fn

    def call(self, inputs: Nest, state: Nest) -> tuple[Nest, Nest]:
        """Returns the residual of input and output, and the state of the cell inside."""
        outputs, state = self.cell(inputs, state)
        return (self.residual_fn or add)(inputs, outputs), state

    def unroll(self, inputs: Nest, state: Nest, run: Run) -> tuple[Nest, Nest]:
        """Runs the cell inside, then adds; a function of the user's is called for each step."""
        outputs, state = unroll_cell(self.cell, inputs, state, run)
        if self.residual_fn is None:
            return add(inputs, outputs), state
        steps = [
            self.residual_fn(*pytree.tree_map(lambda v, t=t: v[t], (inputs, outputs)))
            for t in range(pytree.tree_leaves(inputs)[0].size(0))
        ]
        return pytree.tree_map(lambda *v: torch.stack(v), *steps), state

    def way(self) -> str:
        """Returns how the sum runs."""
        if self.residual_fn is None:
            return "adds the whole sequence at once"
        return "residual_fn step by step, on the outputs of the whole sequence"


def add(inputs: Nest, outputs: Nest) -> Nest:
    """Returns the sum of two nests; ValueError unless they are alike."""
    x, spec = pytree.tree_flatten(inputs)
    y, other = pytree.tree_flatten(outputs)
    if spec != other:
        raise ValueError(
            f"The two structures don't have the same nested structure: inputs {spec}, outputs {other}"
        )
    for a, b in zip(x, y, strict=True):
        check_same_shape(a, b)
    return pytree.tree_unflatten([a + b for a, b in zip(x, y, strict=True)], spec)


def check_same_shape(inputs: Tensor, outputs: Tensor) -> None:
    """Raises ValueError unless two tensors have one shape."""
    if inputs.shape != outputs.shape:
        raise ValueError(f"Shapes {tuple(inputs.shape)} and {tuple(outputs.shape)} are incompatible")


class HighwayWrapper(Wrapper):
    """A gate between input and output (Srivastava et al. 2015, arXiv:1505.00387).

    g = sigmoid(x @ carry_w + carry_b); t = 1 - g, or sigmoid(x @ transform_w + transform_b);
    out = x * g + cell(x) * t.

    Args:
        cell: The cell inside, with as many outputs as inputs.
        couple_carry_transform_gates: Whether t = 1 - g.
        carry_bias_init: Where carry_b starts; transform_b starts at its negative.

    Variables: carry_w, transform_w [I, I], carry_b, transform_b [I], straight in the enclosing scope.

    Raises:
        ValueError: At the call, if the cell inside does not put out what it takes in.
    """

    carry_w: nn.Parameter
    carry_b: nn.Parameter
    transform_w: nn.Parameter
    transform_b: nn.Parameter

    def __init__(
        self, cell: Any, couple_carry_transform_gates: bool = True, carry_bias_init: float = 1.0
    ) -> None:
        super().__init__(cell)
        self.couple_carry_transform_gates = couple_carry_transform_gates
        self.add_variable("carry_w")
        self.add_variable("carry_b", constant(carry_bias_init))
        if not couple_carry_transform_gates:
            self.add_variable("transform_w")
            self.add_variable("transform_b", constant(-carry_bias_init))

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        gates = ["carry"] if self.couple_carry_transform_gates else ["carry", "transform"]
        matrices: dict[str, tuple[int, ...]] = {f"{gate}_w": (input_size, input_size) for gate in gates}
        return matrices | {f"{gate}_b": (input_size,) for gate in gates}

    def _highway(self, x: Tensor, y: Tensor) -> Tensor:
        check_same_shape(x, y)
        carry = torch.sigmoid(linear([x], self.carry_w, self.carry_b))
        if self.couple_carry_transform_gates:
            transform = 1 - carry
        else:
            transform = torch.sigmoid(linear([x], self.transform_w, self.transform_b))
        return x * carry + y * transform

    def call(self, inputs: Tensor, state: Nest) -> tuple[Tensor, Nest]:
        """Returns input and output, gated, and the state of the cell inside."""
        outputs, state = self.cell(inputs, state)
        return self._highway(inputs, outputs), state

    def unroll(self, inputs: Tensor, state: Nest, run: Run) -> tuple[Tensor, Nest]:
        """Runs the cell inside, then the gates of all steps."""
        outputs, state = unroll_cell(self.cell, inputs, state, run)
        return self._highway(inputs, outputs), state

    def way(self) -> str:
        """Returns how the gates run."""
        return "gates of the whole sequence at once"


class InputProjectionWrapper(Wrapper):
    """Projects the input: cell(act(x @ kernel + bias)).

    Args:
        cell: The cell inside, which reads ``num_proj`` inputs.
        num_proj: The size of the projection.
        activation: A name or a callable; None for the identity.
        input_size: Ignored with a warning, as in TensorFlow.
        reuse: Ignored.

    Variables: kernel [I, num_proj], bias [num_proj].
    """

    scope = "input_projection_wrapper"
    kernel: nn.Parameter
    bias: nn.Parameter
    activation: Activation

    def __init__(
        self,
        cell: Any,
        num_proj: int,
        activation: str | Activation | None = None,
        input_size: object = None,
        reuse: bool | None = None,
    ) -> None:
        super().__init__(cell)
        ignore_input_size(input_size)
        self.num_proj = num_proj
        self.activation = activation_of(activation, "linear")
        self.add_variable("kernel")
        self.add_variable("bias")

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        return {"kernel": (input_size, self.num_proj), "bias": (self.num_proj,)}

    def build_inner(self, inputs: Nest, dtype: torch.dtype | None, device: Any) -> None:
        """Builds the cell inside for the projection."""
        build_cell(self.cell, self.num_proj, dtype, device)

    def call(self, inputs: Tensor, state: Nest) -> tuple[Nest, Nest]:
        """Returns what the cell inside makes of the projection."""
        output, new = self.cell(self.activation(linear([inputs], self.kernel, self.bias)), state)
        return output, new

    def unroll(self, inputs: Tensor, state: Nest, run: Run) -> tuple[Nest, Nest]:
        """Projects all steps, then runs the cell inside."""
        projected = activate(self.activation, linear([inputs], self.kernel, self.bias))
        return unroll_cell(self.cell, projected, state, run)

    def way(self) -> str:
        """Returns how the projection runs."""
        return _projection_way(self.activation)


class OutputProjectionWrapper(SameInputWrapper):
    """Projects the output: act(cell(x) @ kernel + bias). The state is that of the cell inside.

    Args:
        cell: The cell inside, with R outputs.
        output_size: P, the size of the projection.
        activation: A name or a callable; None for the identity.
        reuse: Ignored.

    Variables: kernel [R, P], bias [P].

    Raises:
        ValueError: If ``output_size`` is less than 1.
    """

    scope = "output_projection_wrapper"
    kernel: nn.Parameter
    bias: nn.Parameter
    activation: Activation

    def __init__(
        self,
        cell: Any,
        output_size: int,
        activation: str | Activation | None = None,
        reuse: bool | None = None,
    ) -> None:
        super().__init__(cell)
        if output_size < 1:
            raise ValueError(f"Parameter output_size must be > 0: {output_size}.")
        self._output_size = output_size
        self.activation = activation_of(activation, "linear")
        self.add_variable("kernel")
        self.add_variable("bias")

    @property
    def output_size(self) -> int:
        """The size of the projection P."""
        return self._output_size

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes, which no input matters to."""
        size = self._output_size
        return {"kernel": (cat_size(self.cell.output_size), size), "bias": (size,)}

    def call(self, inputs: Nest, state: Nest) -> tuple[Tensor, Nest]:
        """Returns the projected output, and the state of the cell inside."""
        output, new = self.cell(inputs, state)
        return self.activation(linear([output], self.kernel, self.bias)), new

    def unroll(self, inputs: Nest, state: Nest, run: Run) -> tuple[Tensor, Nest]:
        """Runs the cell inside, then projects all steps."""
        outputs, state = unroll_cell(self.cell, inputs, state, run)
        return activate(self.activation, linear([outputs], self.kernel, self.bias)), state

    def way(self) -> str:
        """Returns how the projection runs."""
        return _projection_way(self.activation)


def _projection_way(activation: Activation) -> str:
    return "; ".join(filter(None, ["projects the whole sequence at once", why_each_step(activation)]))


class EmbeddingWrapper(Wrapper):
    """Looks the inputs up in a table: cell(embedding[ids]).

    Inputs of a step are integers [B] or [B, 1]; ``dynamic_rnn`` takes [B, T, 1].

    Args:
        cell: The cell inside, which reads ``embedding_size`` inputs.
        embedding_classes: V, how many ids there are: 0..V-1.
        embedding_size: E, the size of a row of the table.
        initializer: Fills the table in place; by default U(-sqrt(3), sqrt(3)), whose variance is 1.
        reuse: Ignored.

    Variables: embedding [V, E], of the state's dtype.

    Raises:
        ValueError: If a size is not positive; at the call, if the ids have another shape.
        TypeError: At the call, if the ids are no integers.
    """

    scope = "embedding_wrapper"
    embedding: nn.Parameter

    def __init__(
        self,
        cell: Any,
        embedding_classes: int,
        embedding_size: int,
        initializer: Initializer | None = None,
        reuse: bool | None = None,
    ) -> None:
        super().__init__(cell)
        if embedding_classes <= 0 or embedding_size <= 0:
            raise ValueError(
                "Both embedding_classes and embedding_size must be > 0: "
                f"{embedding_classes}, {embedding_size}."
            )
        self.embedding_classes, self.embedding_size = embedding_classes, embedding_size
        self.add_variable("embedding", initializer or _unit_variance)

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of the table, which no input matters to."""
        return {"embedding": (self.embedding_classes, self.embedding_size)}

    def input_size_of(self, inputs: Tensor) -> int:
        """Returns 0, as no shape depends on the inputs; TypeError if they are not integers."""
        if inputs.is_floating_point() or inputs.is_complex() or inputs.dtype == torch.bool:
            raise TypeError(f"{self.name}: ids must be integers, got {inputs.dtype}")
        return 0

    def build_inner(self, inputs: Nest, dtype: torch.dtype | None, device: Any) -> None:
        """Builds the cell inside for rows of the table."""
        build_cell(self.cell, self.embedding_size, dtype, device)

    def check_inputs(self, inputs: Nest) -> None:
        """Raises TypeError unless the inputs are a tensor."""
        if not isinstance(inputs, Tensor):
            raise TypeError(f"{self.name}: ids must be a tensor, got {type(inputs).__name__}")

    def _look_up(self, ids: Tensor, lead: int) -> Tensor:
        """Returns the rows of ids, whose axes are the ``lead`` first ones, and maybe one more of size 1."""
        if ids.dim() == lead + 1 and ids.size(-1) == 1:
            ids = ids.squeeze(-1)
        if ids.dim() != lead:
            raise ValueError(
                f"{self.name}: ids of a step must be [B] or [B, 1], got {list(ids.shape[lead - 1 :])}"
            )
        return F.embedding(ids.long(), self.embedding)

    def call(self, inputs: Tensor, state: Nest) -> tuple[Nest, Nest]:
        """Returns what the cell inside makes of the rows."""
        output, new = self.cell(self._look_up(inputs, 1), state)
        return output, new

    def unroll(self, inputs: Tensor, state: Nest, run: Run) -> tuple[Nest, Nest]:
        """Looks all steps up, then runs the cell inside."""
        return unroll_cell(self.cell, self._look_up(inputs, 2), state, run)

    def way(self) -> str:
        """Returns how the lookup runs."""
        return "looks the whole sequence up at once"


def _unit_variance(tensor: Tensor) -> None:
    bound = math.sqrt(3)
    nn.init.uniform_(tensor, -bound, bound)


class DeviceWrapper(SameInputWrapper):
    """Runs a cell on a device: what goes in is copied there, and what comes out back to the inputs' device.

    A cell that has no values yet gets them on the device; variables that are there stay where they are.

    Args:
        cell: The cell inside.
        device: A ``torch.device`` or its name.
    """

    def __init__(self, cell: Any, device: torch.device | str) -> None:
        super().__init__(cell)
        self.device = torch.device(device)

    def build_inner(self, inputs: Nest, dtype: torch.dtype | None, device: Any) -> None:
        """Builds the cell inside on the device."""
        build_cell(self.cell, to_device(inputs, self.device), dtype, self.device)

    def call(self, inputs: Nest, state: Nest) -> tuple[Nest, Nest]:
        """Returns what the cell inside does."""
        x, state = to_device((inputs, state), self.device)
        return self._back(self.cell(x, state), inputs)

    def unroll(self, inputs: Nest, state: Nest, run: Run) -> tuple[Nest, Nest]:
        """Runs the cell inside on the device."""
        x, state = to_device((inputs, state), self.device)
        lengths, masks = to_device((run.lengths, run.masks), self.device)
        results = unroll_cell(self.cell, x, state, replace(run, lengths=lengths, masks=masks))
        return self._back(results, inputs)

    def _back(self, results: tuple[Nest, Nest], inputs: Nest) -> tuple[Nest, Nest]:
        output, state = to_device(results, pytree.tree_leaves(inputs)[0].device)
        return output, state

    def way(self) -> str:
        """Returns where the cell inside runs."""
        return f"the cell inside over the whole sequence on {self.device}"
