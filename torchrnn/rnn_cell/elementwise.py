"""Cells of ``tf.contrib.rnn`` without a product of the state: vectors in its place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrnn.rnn_cell.base import (
    Activation,
    Initializer,
    LSTMStateTuple,
    Nest,
    Run,
    activation_of,
    constant,
    kernel_activation,
    linear,
    lstm_size,
    split_state,
    why_no_kernel,
)
from torchrnn.rnn_cell.core import forget, state_masks
from torchrnn.rnn_cell.gated import HoistedCell
from torchrnn.scan import scan


def symmetric_uniform(tensor: Tensor) -> None:
    """Fills with U(-1, 1)."""
    nn.init.uniform_(tensor, -1.0, 1.0)


class ScannedCell(HoistedCell):
    """A cell whose ``step`` is one of the recurrences of ``torchrnn.scan``."""

    activation: Activation
    recurrence: str
    """The name of ``step`` there."""
    _step_parts = (*HoistedCell._step_parts, "project", "step")

    def why_loop(self) -> str | None:
        """Returns why a sequence runs in the loop; None if it does not."""
        return why_no_kernel(self.activation)

    def way(self) -> str:
        """Returns how a sequence runs otherwise."""
        op = f"one op over the sequence, {self.recurrence}"
        return f"products with the input for all steps at once, then {op}"

    def scan(
        self,
        sums: Tensor,
        u: Tensor | None,
        h: Tensor | None,
        c: Tensor | None,
        run: Run,
        masks: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ``(y, h_n, c_n)`` of the recurrence over sums [T, B, G*U]; masks are those of h and c."""
        mask_h, mask_c = (None if m is None else m.expand(-1, sums.size(1), -1) for m in masks)
        return scan(
            self.recurrence,
            sums,
            u,
            h,
            c,
            activation=kernel_activation(self.activation) or "",
            lengths=run.lengths,
            mask_h=mask_h,
            mask_c=mask_c,
            reverse=run.reverse,
        )


class SRUCell(ScannedCell):
    """The simple recurrent unit (Lei et al. 2017, arXiv:1709.02755).

    n, f, r, s = split(x @ kernel), with a bias on f and r; f = sigmoid(f), r = sigmoid(r);
    c' = f * c + (1 - f) * n; h = r * act(c') + (1 - r) * s. The output is h, the state c'.

    Args:
        num_units: U
        activation: A name or a callable; None for tanh.
        reuse: Ignored.
        name: The variable scope, "sru_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: kernel [I, 4U], bias [2U].
    """

    scope = "sru_cell"
    recurrence = "sru"
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
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.num_units = num_units
        self.activation = activation_of(activation)
        self.add_variable("kernel")
        self.add_variable("bias")

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        return {"kernel": (input_size, 4 * self.num_units), "bias": (2 * self.num_units,)}

    def project(self, inputs: Tensor) -> Tensor:
        """Returns n, f, r, s, the biases in it, [..., 4U]."""
        return linear([inputs], self.kernel, F.pad(self.bias, (self.num_units, self.num_units)))

    def step(self, projected: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(h, c')``."""
        n, f, r, s = projected.chunk(4, -1)
        f, r = torch.sigmoid(f), torch.sigmoid(r)
        c = f * state + (1 - f) * n
        return r * self.activation(c) + (1 - r) * s, c

    def unroll(self, inputs: Tensor, state: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Runs a sequence in one op, if it has the activation."""
        if self.why_loop() is not None:
            return super().unroll(inputs, state, run)
        y, _, c = self.scan(self.project(inputs), None, None, state, run, (None, run.masks))
        return y, c


class IndRNNCell(ScannedCell):
    """The independently recurrent network (Li et al. 2018, arXiv:1803.04831).

    h' = act(x @ kernel_w + kernel_u * h + bias).

    Args:
        num_units: U
        activation: A name or a callable; None for tanh.
        reuse: Ignored.
        name: The variable scope, "ind_rnn_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: kernel_w [I, U], kernel_u [1, U] with initial values U(-1, 1), bias [U].
    """

    scope = "ind_rnn_cell"
    recurrence = "ind_rnn"
    kernel_w: nn.Parameter
    kernel_u: nn.Parameter
    bias: nn.Parameter
    activation: Activation

    def __init__(
        self,
        num_units: int,
        activation: str | Activation | None = None,
        reuse: bool | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.num_units = num_units
        self.activation = activation_of(activation)
        self.add_variable("kernel_w")
        self.add_variable("kernel_u", symmetric_uniform)
        self.add_variable("bias")

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        units = self.num_units
        return {"kernel_w": (input_size, units), "kernel_u": (1, units), "bias": (units,)}

    def project(self, inputs: Tensor) -> Tensor:
        """Returns x @ kernel_w + bias, [..., U]."""
        return linear([inputs], self.kernel_w, self.bias)

    def step(self, projected: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(h', h')``."""
        h = self.activation(projected + self.kernel_u * state)
        return h, h

    def unroll(self, inputs: Tensor, state: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Runs a sequence in one op, if it has the activation."""
        if self.why_loop() is not None:
            return super().unroll(inputs, state, run)
        y, h, _ = self.scan(self.project(inputs), self.kernel_u[0], state, None, run, (run.masks, None))
        return y, h


class IndyGRUCell(ScannedCell):
    """``GRUCell`` with vectors in place of the recurrent matrices, as ``IndRNNCell`` has them.

    r, u = split(sigmoid(x @ gates/kernel_w + gates/kernel_u * [h, h] + gates/bias));
    n = act(x @ candidate/kernel + candidate/kernel_u * (r * h) + candidate/bias); h' = u * h + (1 - u) * n.

    Args:
        num_units: U
        activation: A name or a callable; None for tanh.
        reuse: Ignored.
        kernel_initializer: Of gates/kernel_w and candidate/kernel: fills a tensor in place; glorot_uniform by
            default.
        bias_initializer: Of both biases; by default that of the gates is 1 and that of the candidate 0.
        name: The variable scope, "indy_gru_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: gates/kernel_w [I, 2U], gates/kernel_u [1, 2U], gates/bias [2U], candidate/kernel [I, U],
    candidate/kernel_u [1, U], candidate/bias [U]; initial values of kernel_u are U(-1, 1).
    """

    scope = "indy_gru_cell"
    recurrence = "indy_gru"
    gates_kernel_w: nn.Parameter
    gates_kernel_u: nn.Parameter
    gates_bias: nn.Parameter
    candidate_kernel: nn.Parameter
    candidate_kernel_u: nn.Parameter
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
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.num_units = num_units
        self.activation = activation_of(activation)
        self.add_variable("gates/kernel_w", kernel_initializer)
        self.add_variable("gates/kernel_u", symmetric_uniform)
        self.add_variable("gates/bias", bias_initializer or constant(1.0))
        self.add_variable("candidate/kernel", kernel_initializer)
        self.add_variable("candidate/kernel_u", symmetric_uniform)
        self.add_variable("candidate/bias", bias_initializer)

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        units = self.num_units
        return {
            "gates/kernel_w": (input_size, 2 * units),
            "gates/kernel_u": (1, 2 * units),
            "gates/bias": (2 * units,),
            "candidate/kernel": (input_size, units),
            "candidate/kernel_u": (1, units),
            "candidate/bias": (units,),
        }

    def project(self, inputs: Tensor) -> Tensor:
        """Returns the inputs' part of r, u and n with the biases, [..., 3U]."""
        kernel = torch.cat([self.gates_kernel_w, self.candidate_kernel], 1)
        return linear([inputs], kernel, torch.cat([self.gates_bias, self.candidate_bias]))

    def step(self, projected: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(h', h')``."""
        gates, n = projected.split([2 * self.num_units, self.num_units], -1)
        r, u = torch.sigmoid(gates + self.gates_kernel_u * torch.cat([state, state], -1)).chunk(2, -1)
        n = self.activation(n + self.candidate_kernel_u * (r * state))
        h = u * state + (1 - u) * n
        return h, h

    def unroll(self, inputs: Tensor, state: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Runs a sequence in one op, if it has the activation."""
        if self.why_loop() is not None:
            return super().unroll(inputs, state, run)
        u = torch.cat([self.gates_kernel_u, self.candidate_kernel_u], 1)[0]
        y, h, _ = self.scan(self.project(inputs), u, state, None, run, (run.masks, None))
        return y, h


class IndyLSTMCell(ScannedCell):
    """``BasicLSTMCell`` with vectors in place of the recurrent matrix (Gonnet and Deselaers 2019).

    i, j, f, o = split(x @ kernel_w + kernel_u * [h, h, h, h] + bias), arXiv:1903.08023;
    c' = sigmoid(f + forget_bias) * c + sigmoid(i) * act(j); h' = sigmoid(o) * act(c').

    Args:
        num_units: U
        forget_bias: Added to f in every step; it is no part of the variable.
        activation: A name or a callable; None for tanh.
        reuse: Ignored.
        kernel_initializer: Of kernel_w: fills a tensor in place; glorot_uniform by default.
        bias_initializer: Likewise; zeros by default.
        name: The variable scope, "indy_lstm_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: kernel_w [I, 4U], kernel_u [1, 4U] with initial values U(-1, 1), bias [4U].
    """

    scope = "indy_lstm_cell"
    recurrence = "indy_lstm"
    kernel_w: nn.Parameter
    kernel_u: nn.Parameter
    bias: nn.Parameter
    activation: Activation

    def __init__(
        self,
        num_units: int,
        forget_bias: float = 1.0,
        activation: str | Activation | None = None,
        reuse: bool | None = None,
        kernel_initializer: Initializer | None = None,
        bias_initializer: Initializer | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.num_units, self.forget_bias = num_units, forget_bias
        self.activation = activation_of(activation)
        self.add_variable("kernel_w", kernel_initializer)
        self.add_variable("kernel_u", symmetric_uniform)
        self.add_variable("bias", bias_initializer)

    @property
    def state_size(self) -> Nest:
        """``LSTMStateTuple(U, U)``."""
        return lstm_size(self.num_units, self.num_units, True)

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        units = 4 * self.num_units
        return {"kernel_w": (input_size, units), "kernel_u": (1, units), "bias": (units,)}

    def project(self, inputs: Tensor) -> Tensor:
        """Returns x @ kernel_w + bias, [..., 4U]."""
        return linear([inputs], self.kernel_w, self.bias)

    def step(self, projected: Tensor, state: Nest) -> tuple[Tensor, Nest]:
        """Returns ``(h', (c', h'))``."""
        c, h = split_state(state, self.num_units, True)
        i, j, f, o = (projected + self.kernel_u * torch.cat([h] * 4, -1)).chunk(4, -1)
        c = torch.sigmoid(f + self.forget_bias) * c + torch.sigmoid(i) * self.activation(j)
        h = torch.sigmoid(o) * self.activation(c)
        return h, LSTMStateTuple(c, h)

    def unroll(self, inputs: Tensor, state: Nest, run: Run) -> tuple[Tensor, Nest]:
        """Runs a sequence in one op, if it has the activation."""
        if self.why_loop() is not None:
            return super().unroll(inputs, state, run)
        c, h = split_state(state, self.num_units, True)
        bias = forget(self.bias.view(4, -1), self.forget_bias, 2).view(-1)
        sums = linear([inputs], self.kernel_w, bias)
        y, h, c = self.scan(sums, self.kernel_u[0], h, c, run, state_masks(run, self.num_units, True))
        return y, LSTMStateTuple(c, h)
