"""The grouped LSTM of ``tf.contrib.rnn``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchrnn.options import Options
from torchrnn.rnn_cell.base import (
    Activation,
    Initializer,
    LSTMStateTuple,
    Nest,
    Run,
    activation_of,
    kernel_activation,
    lstm_size,
    split_state,
    zeros,
)
from torchrnn.rnn_cell.core import ENGINE_ORDER, state_masks
from torchrnn.rnn_cell.engine import gate_columns, run_layer
from torchrnn.rnn_cell.gated import HoistedCell


class GLSTMCell(HoistedCell):
    """The LSTM whose kernel is block-diagonal (Kuchaiev and Ginsburg 2017, arXiv:1703.10722).

    x and h are cut into K groups: i, j, f, o of group k are split([x_k, h_k] @ group{k}/kernel). Each gate is
    the concatenation of the groups plus its bias. c' = sigmoid(f + forget_bias) * c + sigmoid(i) * tanh(j),
    whatever the activation; h' = sigmoid(o) * act(c'), projected.

    Args:
        num_units: U
        initializer: Of the kernels: fills a tensor in place; glorot_uniform by default.
        num_proj: P, the size of the projected output; None for no projection.
        number_of_groups: K; it must divide U, P and I.
        forget_bias: Added to f in every step; it is no part of the variable.
        activation: Of the output: a name or a callable; None for tanh.
        reuse: Ignored.
        name: The variable scope, "glstm_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables, with R = P or U: group{k}/kernel [(I+R)/K, 4U/K] for each group k, bias_i, bias_j, bias_f,
    bias_o [U], projection/kernel [U, P].

    Raises:
        ValueError: If K does not divide a size, or K or ``num_proj`` is not positive.
    """

    scope = "glstm_cell"
    bias_i: nn.Parameter
    bias_j: nn.Parameter
    bias_f: nn.Parameter
    bias_o: nn.Parameter
    projection_kernel: nn.Parameter
    activation: Activation
    _step_parts = (*HoistedCell._step_parts, "project", "step")

    def __init__(
        self,
        num_units: int,
        initializer: Initializer | None = None,
        num_proj: int | None = None,
        number_of_groups: int = 1,
        forget_bias: float = 1.0,
        activation: str | Activation | None = None,
        reuse: bool | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        if number_of_groups < 1:
            raise ValueError(f"{self.name}: number_of_groups must be at least 1, got {number_of_groups}")
        if num_proj is not None and num_proj < 1:
            raise ValueError(f"{self.name}: num_proj must be None or at least 1, got {num_proj}")
        self.num_units, self.num_proj = num_units, num_proj
        self.number_of_groups, self.forget_bias = number_of_groups, forget_bias
        self._check_divides("num_units", num_units)
        self._check_divides("num_proj", self.output_size)
        self.activation = activation_of(activation)
        for group in range(number_of_groups):
            self.add_variable(f"group{group}/kernel", initializer)
        for gate in "ijfo":
            self.add_variable(f"bias_{gate}", zeros)
        if num_proj is not None:
            self.add_variable("projection/kernel", initializer)

    def _check_divides(self, argument: str, size: int) -> None:
        if size % self.number_of_groups:
            raise ValueError(
                f"{argument} must be divisible by number_of_groups, got {size} and {self.number_of_groups}"
            )

    @property
    def output_size(self) -> int:
        """The number of outputs, P or U."""
        return self.num_proj or self.num_units

    @property
    def state_size(self) -> Nest:
        """``LSTMStateTuple(U, R)``."""
        return lstm_size(self.num_units, self.output_size, True)

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs; ValueError if the groups do not divide I."""
        self._check_divides("input size", input_size)
        units, groups = self.num_units, self.number_of_groups
        shapes: dict[str, tuple[int, ...]] = {
            f"group{group}/kernel": ((input_size + self.output_size) // groups, 4 * units // groups)
            for group in range(groups)
        }
        shapes |= {f"bias_{gate}": (units,) for gate in "ijfo"}
        if self.num_proj is not None:
            shapes["projection/kernel"] = (units, self.num_proj)
        return shapes

    def _split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.chunk(self.number_of_groups, -1)

    def _products(self, values: Tensor, part: int) -> Tensor:
        """Returns the groups of inputs (part 0) or h (1) times their kernels' rows, [..., 4U], by gates."""
        kernels = [getattr(self, f"group{group}_kernel") for group in range(self.number_of_groups)]
        of_h = self.output_size // self.number_of_groups
        rows = [kernel.split([kernel.size(0) - of_h, of_h])[part] for kernel in kernels]
        groups = [(v @ r).chunk(4, -1) for v, r in zip(self._split(values), rows, strict=True)]
        return torch.cat([group[gate] for gate in range(4) for group in groups], -1)

    def project(self, inputs: Tensor) -> Tensor:
        """Returns the inputs' part of i, j, f, o with the biases, [..., 4U]."""
        bias = torch.cat([self.bias_i, self.bias_j, self.bias_f, self.bias_o])
        return self._products(inputs, 0) + bias

    def step(self, projected: Tensor, state: Nest) -> tuple[Tensor, Nest]:
        """Returns ``(h', (c', h'))``."""
        c, h = split_state(state, self.num_units, True)
        i, j, f, o = (projected + self._products(h, 1)).chunk(4, -1)
        c = torch.sigmoid(f + self.forget_bias) * c + torch.sigmoid(i) * torch.tanh(j)
        h = torch.sigmoid(o) * self.activation(c)
        if self.num_proj is not None:
            h = h @ self.projection_kernel
        return h, LSTMStateTuple(c, h)

    def why_loop(self) -> str | None:
        """Returns why a sequence runs in the loop; None if it does not."""
        if self.num_proj is not None:
            return "the projection mixes the groups"
        if kernel_activation(self.activation) != "tanh":
            return "the candidate's activation is tanh, and no kernel has another one for the output"
        return None

    def way(self) -> str:
        """Returns how a sequence runs otherwise."""
        return "one op over the sequence per group, lstm"

    def unroll(self, inputs: Tensor, state: Nest, run: Run) -> tuple[Tensor, Nest]:
        """Runs a sequence in one call of the engine per group: without projection they are independent."""
        if self.why_loop() is not None:
            return super().unroll(inputs, state, run)
        bias = torch.stack([self.bias_i, self.bias_f + self.forget_bias, self.bias_j, self.bias_o])
        tensors = (inputs, bias, *split_state(state, self.num_units, True))
        none = (None,) * self.number_of_groups
        masks = (none if m is None else self._split(m) for m in state_masks(run, self.num_units, True))
        results = [
            run_layer(
                Options(cell="lstm"),
                run,
                x,
                gate_columns(getattr(self, f"group{group}_kernel"), ENGINE_ORDER),
                b.reshape(-1),
                h,
                c,
                masks=(mask_h, mask_c),
            )
            for group, (x, b, c, h, mask_h, mask_c) in enumerate(
                zip(*map(self._split, tensors), *masks, strict=True)
            )
        ]
        y, h, c = (torch.cat(parts, -1) for parts in zip(*results, strict=True))
        return y, LSTMStateTuple(c, h)
