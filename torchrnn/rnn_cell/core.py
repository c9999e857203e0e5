"""The cells of ``tf.nn.rnn_cell``: basic RNN, LSTM, GRU, and the stack of cells.

One file, most of it the documentation of arguments: the other cells are variations of these.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchrnn.options import Options
from torchrnn.rnn_cell.base import (
    Activation,
    Initializer,
    Nest,
    RNNCell,
    Run,
    activation_of,
    assert_cell,
    build_cell,
    cat_size,
    constant,
    describe,
    ignore_input_size,
    join_state,
    kernel_activation,
    linear,
    loop,
    lstm_size,
    split_state,
    why_no_kernel,
    zero_state_of,
)
from torchrnn.rnn_cell.engine import gate_columns, gate_vector, run_layer

SUMS = ("input", "transform", "forget", "output")
"""The scopes of the layer norms of an LSTM's sums i, j, f and o."""
ENGINE_ORDER = (0, 2, 1, 3)
"""Where in TensorFlow's order i, j, f, o of an LSTM's sums the engine's i, f, j, o are."""


def state_masks(run: Run, units: int, as_tuple: bool) -> tuple[Tensor | None, Tensor | None]:
    """Returns the masks of an LSTM's h and c, which come in the form of its state."""
    if run.masks is None:
        return None, None
    if as_tuple:
        mask_c, mask_h = run.masks
        return mask_h, mask_c
    return run.masks[..., units:], run.masks[..., :units]


def forget(rows: Tensor, forget_bias: float, row: int = 1) -> Tensor:
    """Returns rows [G, U] with ``forget_bias`` added to that of f, by default the engine's.

    Out of place, because torch.func.linearize does without what is written in place.
    """
    return torch.cat([rows[:row], (rows[row : row + 1] + forget_bias).to(rows.dtype), rows[row + 1 :]])


def listed(extras: Mapping[str, bool]) -> str:
    """Returns " with a, b" of the names that are there, for ``RNNCell.way``."""
    names = ", ".join(name for name, there in extras.items() if there)
    return f" with {names}" if names else ""


class BasicRNNCell(RNNCell):
    """The Elman cell: h' = act([x, h] @ kernel + bias).

    Args:
        num_units: U
        activation: A name or a callable; None for tanh.
        reuse: Ignored.
        name: The variable scope, "basic_rnn_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.
        input_size: Ignored with a warning, as in TensorFlow.

    Variables: kernel [I+U, U], bias [U].
    """

    scope = "basic_rnn_cell"
    kernel: nn.Parameter
    bias: nn.Parameter
    activation: Activation

    def __init__(
        self,
        num_units: int,
        activation: str | Activation | None = None,
        reuse: bool | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        *,
        input_size: object = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        ignore_input_size(input_size)
        self.num_units = num_units
        self.activation = activation_of(activation)
        self.add_variable("kernel")
        self.add_variable("bias")

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        return {"kernel": (input_size + self.num_units, self.num_units), "bias": (self.num_units,)}

    def call(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(h', h')``."""
        h = self.activation(linear([inputs, state], self.kernel, self.bias))
        return h, h

    def unroll(self, inputs: Tensor, state: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Runs a sequence in one call of the engine, if it has the activation."""
        activation = kernel_activation(self.activation)
        if activation is None:
            return super().unroll(inputs, state, run)
        options = Options(cell="rnn", activation=activation)
        y, h, _ = run_layer(options, run, inputs, self.kernel, self.bias, state, masks=(run.masks, None))
        return y, h

    def why_loop(self) -> str | None:
        """Returns why a sequence runs step by step; None if it does not."""
        return why_no_kernel(self.activation)

    def way(self) -> str:
        """Returns how a sequence runs otherwise."""
        return "one op over the sequence, rnn"


class LSTMCell(RNNCell):
    """The LSTM with TensorFlow's variations.

    i, j, f, o = split([x, h] @ kernel + bias) with candidate j; peepholes add w_i_diag * c to i, w_f_diag * c
    to f and w_o_diag * c' to o. c' = sigmoid(f + forget_bias) * c + sigmoid(i) * act(j), clipped;
    h' = sigmoid(o) * act(c'), projected and clipped.

    Args:
        num_units: U
        use_peepholes: Whether the gates see c.
        cell_clip: Bound on the size of c', also if 0; None for none.
        initializer: Of kernel, peepholes and projection: fills a tensor in place; glorot_uniform by default.
        num_proj: P, the size of the projected output; None for no projection.
        proj_clip: Bound on the projected output; without ``num_proj`` it has no effect.
        num_unit_shards: Ignored, as in TensorFlow.
        num_proj_shards: Ignored, as in TensorFlow.
        forget_bias: Added to f in every step; it is no part of the variable.
        state_is_tuple: Whether the state is ``LSTMStateTuple(c, h)``, else one tensor [c | h].
        activation: A name or a callable; None for tanh.
        reuse: Ignored.
        name: The variable scope, "lstm_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.
        input_size: Ignored with a warning, as in TensorFlow.

    Variables, with R = P or U: kernel [I+R, 4U], bias [4U], w_i_diag, w_f_diag, w_o_diag [U],
    projection/kernel [U, P].

    Raises:
        ValueError: If ``num_proj`` is not positive or the activation is not known.
    """

    scope = "lstm_cell"
    kernel: nn.Parameter
    bias: nn.Parameter
    w_i_diag: nn.Parameter
    w_f_diag: nn.Parameter
    w_o_diag: nn.Parameter
    projection_kernel: nn.Parameter
    activation: Activation

    def __init__(
        self,
        num_units: int,
        use_peepholes: bool = False,
        cell_clip: float | None = None,
        initializer: Initializer | None = None,
        num_proj: int | None = None,
        proj_clip: float | None = None,
        num_unit_shards: int | None = None,
        num_proj_shards: int | None = None,
        forget_bias: float = 1.0,
        state_is_tuple: bool = True,
        activation: str | Activation | None = None,
        reuse: bool | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        *,
        input_size: object = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        ignore_input_size(input_size)
        if num_proj is not None and num_proj < 1:
            raise ValueError(f"{self.name}: num_proj must be None or at least 1, got {num_proj}")
        self.num_units, self.num_proj = num_units, num_proj
        self.use_peepholes, self.forget_bias = use_peepholes, forget_bias
        self.cell_clip, self.proj_clip = cell_clip, proj_clip
        self.state_is_tuple = state_is_tuple
        self.activation = activation_of(activation)
        self.add_variable("kernel", initializer)
        self.add_variable("bias")
        if use_peepholes:
            for gate in "ifo":
                self.add_variable(f"w_{gate}_diag", initializer)
        if num_proj is not None:
            self.add_variable("projection/kernel", initializer)

    @property
    def output_size(self) -> int:
        """The number of outputs, P or U."""
        return self.num_proj or self.num_units

    @property
    def state_size(self) -> Nest:
        """``LSTMStateTuple(U, R)``, or U+R."""
        return lstm_size(self.num_units, self.output_size, self.state_is_tuple)

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        units = self.num_units
        shapes: dict[str, tuple[int, ...]] = {
            "kernel": (input_size + self.output_size, 4 * units),
            "bias": (4 * units,),
        }
        if self.use_peepholes:
            shapes |= {f"w_{gate}_diag": (units,) for gate in "ifo"}
        if self.num_proj is not None:
            shapes["projection/kernel"] = (units, self.num_proj)
        return shapes

    # What the variations among the subclasses change, for a step as for the engine.

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        """Returns the kernel and the projection as they are applied."""
        return self.kernel, None if self.num_proj is None else self.projection_kernel

    def _bias(self) -> Tensor | None:
        """Returns what is added to the sums."""
        return self.bias

    def _norm(self, scope: str, x: Tensor) -> Tensor:
        """Returns x, which a subclass may normalise: a sum, by its scope in ``SUMS``, or c' ("state")."""
        return x

    def _candidate(self, j: Tensor) -> Tensor:
        """Returns what enters the memory through the input gate."""
        return self.activation(j)

    def _clip(self, c: Tensor) -> Tensor:
        """Returns c' within ``cell_clip``."""
        return c if self.cell_clip is None else c.clamp(-self.cell_clip, self.cell_clip)

    def _shifts(self) -> tuple[Tensor | None, tuple[Tensor, Tensor, float] | None]:
        """Returns the engine's bias and layer norm, one of them with ``forget_bias`` in it."""
        bias = gate_vector(self.bias, ENGINE_ORDER).view(4, -1)
        return forget(bias, self.forget_bias).view(-1), None

    def call(self, inputs: Tensor, state: Nest) -> tuple[Tensor, Nest]:
        """Returns ``(h', (c', h'))``."""
        kernel, projection = self._weights()
        c, h = split_state(state, self.num_units, self.state_is_tuple)
        i, j, f, o = map(self._norm, SUMS, linear([inputs, h], kernel, self._bias()).chunk(4, -1))
        if self.use_peepholes:
            i, f = i + self.w_i_diag * c, f + self.w_f_diag * c
        c = torch.sigmoid(f + self.forget_bias) * c + torch.sigmoid(i) * self._candidate(j)
        c = self._clip(self._norm("state", c))
        if self.use_peepholes:
            o = o + self.w_o_diag * c
        h = torch.sigmoid(o) * self.activation(c)
        if projection is not None:
            h = h @ projection
            if self.proj_clip is not None:
                h = h.clamp(-self.proj_clip, self.proj_clip)
        return h, join_state(c, h, self.state_is_tuple)

    def unroll(self, inputs: Tensor, state: Nest, run: Run) -> tuple[Tensor, Nest]:
        """Runs a sequence in one call of the engine, unless ``why_loop`` says why not."""
        activation = kernel_activation(self.activation)
        if activation is None or self.why_loop() is not None:
            return super().unroll(inputs, state, run)
        kernel, projection = self._weights()
        bias, norm = self._shifts()
        c, h = split_state(state, self.num_units, self.state_is_tuple)
        y, h, c = run_layer(
            Options(
                cell="lstm",
                activation=activation,
                cell_clip=self.cell_clip,
                proj_clip=None if projection is None else self.proj_clip,
            ),
            run,
            inputs,
            gate_columns(kernel, ENGINE_ORDER),
            bias,
            h,
            c,
            projection=None if projection is None else projection.t(),
            peephole=torch.stack([self.w_i_diag, self.w_f_diag, self.w_o_diag])
            if self.use_peepholes
            else None,
            norm=norm,
            masks=state_masks(run, self.num_units, self.state_is_tuple),
        )
        return y, join_state(c, h, self.state_is_tuple)

    def why_loop(self) -> str | None:
        """Returns why a sequence runs step by step; None if it does not."""
        return why_no_kernel(self.activation)

    def way(self) -> str:
        """Returns how a sequence runs otherwise."""
        projects = self.num_proj is not None
        return "one op over the sequence, lstm" + listed({
            "peepholes": self.use_peepholes,
            "cell_clip": self.cell_clip is not None,
            "projection": projects,
            "proj_clip": projects and self.proj_clip is not None,
        })  # fmt: skip


class BasicLSTMCell(LSTMCell):
    """The LSTM without variations (Zaremba et al. 2014, arXiv:1409.2329); see ``LSTMCell``.

    Variables: kernel [I+U, 4U], bias [4U].
    """

    scope = "basic_lstm_cell"

    def __init__(
        self,
        num_units: int,
        forget_bias: float = 1.0,
        state_is_tuple: bool = True,
        activation: str | Activation | None = None,
        reuse: bool | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        *,
        input_size: object = None,
    ) -> None:
        ignore_input_size(input_size)
        super().__init__(
            num_units,
            forget_bias=forget_bias,
            state_is_tuple=state_is_tuple,
            activation=activation,
            name=name,
            dtype=dtype,
        )


class GRUCell(RNNCell):
    """The GRU with the reset before the product (Cho et al. 2014, arXiv:1406.1078).

    r, u = split(sigmoid([x, h] @ gates/kernel + gates/bias)); n = act([x, r * h] @ candidate/kernel +
    candidate/bias); h' = u * h + (1 - u) * n. No weights make ``torch.nn.GRU`` compute this.

    Args:
        num_units: U
        activation: A name or a callable; None for tanh.
        reuse: Ignored.
        kernel_initializer: Fills a tensor in place; glorot_uniform by default.
        bias_initializer: Of both biases; by default that of the gates is 1 and that of the candidate 0.
        name: The variable scope, "gru_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.
        input_size: Ignored with a warning, as in TensorFlow.

    Variables: gates/kernel [I+U, 2U], gates/bias [2U], candidate/kernel [I+U, U], candidate/bias [U].
    """

    scope = "gru_cell"
    gates_kernel: nn.Parameter
    gates_bias: nn.Parameter
    candidate_kernel: nn.Parameter
    candidate_bias: nn.Parameter
    activation: Activation

    def __init__(
        self,
        num_units: int,
        activation: str | Activation | None = None,
        reuse: bool | None = None,
        kernel_initializer: Initializer | None = None,
        bias_initializer: Initializer | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        *,
        input_size: object = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        ignore_input_size(input_size)
        self.num_units = num_units
        self.activation = activation_of(activation)
        self.add_variable("gates/kernel", kernel_initializer)
        self.add_variable("gates/bias", bias_initializer or constant(1.0))
        self.add_variable("candidate/kernel", kernel_initializer)
        self.add_variable("candidate/bias", bias_initializer)

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        units = self.num_units
        return {
            "gates/kernel": (input_size + units, 2 * units),
            "gates/bias": (2 * units,),
            "candidate/kernel": (input_size + units, units),
            "candidate/bias": (units,),
        }

    def call(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(h', h')``."""
        r, u = torch.sigmoid(linear([inputs, state], self.gates_kernel, self.gates_bias)).chunk(2, -1)
        n = self.activation(linear([inputs, r * state], self.candidate_kernel, self.candidate_bias))
        h = u * state + (1 - u) * n
        return h, h

    def unroll(self, inputs: Tensor, state: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Runs a sequence in one call of the engine, if it has the activation."""
        activation = kernel_activation(self.activation)
        if activation is None:
            return super().unroll(inputs, state, run)
        options = Options(cell="gru_reset_before", activation=activation)
        kernel = torch.cat([self.gates_kernel, self.candidate_kernel], 1)
        bias = torch.cat([self.gates_bias, self.candidate_bias])
        y, h, _ = run_layer(options, run, inputs, kernel, bias, state, masks=(run.masks, None))
        return y, h

    def why_loop(self) -> str | None:
        """Returns why a sequence runs step by step; None if it does not."""
        return why_no_kernel(self.activation)

    def way(self) -> str:
        """Returns how a sequence runs otherwise."""
        return "one op over the sequence, gru with reset before the product"


class MultiRNNCell(RNNCell):
    """A stack: each cell reads the output of the one before.

    Args:
        cells: The cells, from the first layer to the last. A cell that is there twice shares its weights.
        state_is_tuple: Whether the state is a tuple with one state per cell, else one tensor of all.

    Raises:
        ValueError: If there is no cell, or the states are tuples although ``state_is_tuple`` is False.
        TypeError: If ``cells`` is not a list or tuple of cells.
    """

    scope = "multi_rnn_cell"

    def __init__(self, cells: Sequence[Any], state_is_tuple: bool = True) -> None:
        super().__init__()
        if not cells:
            raise ValueError("Must specify at least one cell for MultiRNNCell.")
        if not isinstance(cells, list | tuple):
            raise TypeError(f"cells must be a list or tuple, but saw: {cells}.")
        for cell in cells:
            assert_cell(cell)
        if len({id(cell) for cell in cells}) < len(cells):
            warnings.warn(
                "At least two cells provided to MultiRNNCell are the same object and will share weights.",
                stacklevel=2,
            )
        self.state_is_tuple = state_is_tuple
        self.cells = list(cells)
        # Registered where they can be; a user's cell need not be a module.
        for i, cell in enumerate(cells):
            if isinstance(cell, nn.Module):
                self.add_module(f"cell_{i}", cell)
        sizes = [cell.state_size for cell in cells]
        if not state_is_tuple and any(isinstance(size, tuple) for size in sizes):
            raise ValueError(
                "Some cells return tuples of states, but the flag state_is_tuple is not set.  "
                f"State sizes are: {sizes}"
            )

    @property
    def state_size(self) -> Nest:
        """A tuple of the cells' state sizes, or their sum."""
        sizes = tuple(cell.state_size for cell in self.cells)
        return sizes if self.state_is_tuple else cat_size(sizes)

    @property
    def output_size(self) -> Nest:
        """That of the last cell."""
        return self.cells[-1].output_size

    def inner_cells(self) -> Sequence[tuple[str, nn.Module]]:
        """Returns the cells with their scopes cell_0/, cell_1/, ..."""
        return [(f"cell_{i}/", cell) for i, cell in enumerate(self.cells)]

    def build_inner(self, inputs: Nest, dtype: torch.dtype | None, device: Any) -> None:
        """Builds the first cell for the inputs and each other one for the output of the one before."""
        for cell in self.cells:
            build_cell(cell, inputs, dtype, device)
            inputs = cell.output_size

    def input_size_of(self, inputs: Nest) -> int:
        """Returns 0: the stack has no variables of its own."""
        return 0

    def zero_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Nest:
        """Returns the zero states of all cells."""
        self.start_sequence()
        if not self.state_is_tuple:
            return super().zero_state(batch_size, dtype, device)
        return tuple(zero_state_of(cell, batch_size, dtype, device) for cell in self.cells)

    def check_inputs(self, inputs: Nest) -> None:
        """Leaves the check to the first cell."""

    def _split(self, state: Nest) -> list[Nest]:
        if self.state_is_tuple:
            if not isinstance(state, tuple | list) or len(state) != len(self.cells):
                raise ValueError(
                    f"Expected state to be a tuple of length {len(self.cells)}, "
                    f"but received: {describe(state)}"
                )
            return list(state)
        return list(state.split([cat_size(cell.state_size) for cell in self.cells], -1))

    def _join(self, states: list[Nest]) -> Nest:
        return tuple(states) if self.state_is_tuple else torch.cat(states, -1)

    def call(self, inputs: Nest, state: Nest) -> tuple[Nest, Nest]:
        """Returns the last cell's output and all new states."""
        states = []
        for cell, each in zip(self.cells, self._split(state), strict=True):
            inputs, new = cell(inputs, each)
            states.append(new)
        return inputs, self._join(states)

    def unroll(self, inputs: Nest, state: Nest, run: Run) -> tuple[Nest, Nest]:
        """Runs the cells one after the other, each over the whole sequence."""
        masks = [None] * len(self.cells) if run.masks is None else self._split(run.masks)
        states = []
        for cell, each, mask in zip(self.cells, self._split(state), masks, strict=True):
            inputs, new = unroll_cell(cell, inputs, each, replace(run, masks=mask))
            states.append(new)
        return inputs, self._join(states)

    def way(self) -> str:
        """Returns how a sequence runs."""
        return "one cell after the other, each over the whole sequence"

    def describe(self) -> str:
        """Returns the class with the number of cells."""
        return f"{type(self).__name__} of {len(self.cells)}"


def unroll_cell(cell: Any, inputs: Nest, state: Nest, run: Run) -> tuple[Nest, Nest]:
    """Runs any cell over a sequence, by its own ``unroll`` if it has one; see ``RNNCell.unroll``."""
    if isinstance(cell, RNNCell):
        return cell.unroll(inputs, state, run)
    return loop(cell, inputs, state, run)
