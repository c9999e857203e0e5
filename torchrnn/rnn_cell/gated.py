"""Gated cells of ``tf.contrib.rnn`` whose product with the input does not wait for the state.

One file for these small cells; half of it documents arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import UninitializedParameter

from torchrnn.options import Options
from torchrnn.rnn_cell.base import (
    Activation,
    Initializer,
    LSTMStateTuple,
    Nest,
    RNNCell,
    Run,
    activation_of,
    constant,
    kernel_activation,
    linear,
    loop,
    lstm_size,
    split_state,
    why_each_step,
    why_no_kernel,
)
from torchrnn.rnn_cell.engine import run_layer


class HoistedCell(RNNCell):
    """A cell of two parts: ``project`` of the input alone, and ``step`` of that and the state.

    Over a sequence ``project`` runs once, on all steps, and only ``step`` in the loop.
    """

    num_units: int

    def project(self, inputs: Nest) -> Nest:
        """Returns what a step needs of the inputs [..., I], in tensors [..., N]."""
        raise NotImplementedError(f"{type(self).__name__} must define project(inputs)")

    def step(self, projected: Nest, state: Nest) -> tuple[Nest, Nest]:
        """Returns ``(output, new_state)`` from ``project(inputs)`` of one step."""
        raise NotImplementedError(f"{type(self).__name__} must define step(projected, state)")

    def call(self, inputs: Nest, state: Nest) -> tuple[Nest, Nest]:
        """Returns ``(output, new_state)``."""
        return self.step(self.project(inputs), state)

    def unroll(self, inputs: Nest, state: Nest, run: Run) -> tuple[Nest, Nest]:
        """Runs a sequence: all steps' products with the input at once, the rest in the loop."""
        return loop(self.step, self.project(inputs), state, run)

    def way(self) -> str:
        """Returns how a sequence runs."""
        why = "; no kernel has its recurrence" if self._unrolls[0].owner is HoistedCell else ""
        return f"products with the input for all steps at once, the rest step by step{why}"


class NASCell(HoistedCell):
    """The cell that architecture search found (Zoph and Le 2016, arXiv:1611.01578).

    X = x @ kernel and M = h @ recurrent_kernel + bias, 8 parts each: l0 = sigmoid(X0 + M0),
    l1 = relu(X1 + M1), l2 = sigmoid(X2 + M2), l3 = relu(X3 * M3), l4 = tanh(X4 + M4), l5 = sigmoid(X5 + M5),
    l6 = tanh(X6 + M6), l7 = sigmoid(X7 + M7). c' = tanh(tanh(l0 * l1) + c) * tanh(l2 + l3);
    h' = tanh(c' * tanh(tanh(l4 * l5) + sigmoid(l6 + l7))), projected.

    Args:
        num_units: U
        num_proj: P, the size of the projected output; None for no projection.
        use_bias: Whether M has a bias.
        reuse: Ignored.
        name: The variable scope, "nas_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables, with R = P or U: kernel [I, 8U], recurrent_kernel [R, 8U], bias [8U],
    projection_weights [U, P].

    Raises:
        ValueError: If ``num_proj`` is not positive.
    """

    scope = "nas_cell"
    kernel: nn.Parameter
    recurrent_kernel: nn.Parameter
    bias: nn.Parameter
    projection_weights: nn.Parameter

    def __init__(
        self,
        num_units: int,
        num_proj: int | None = None,
        use_bias: bool = False,
        reuse: bool | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        if num_proj is not None and num_proj < 1:
            raise ValueError(f"{self.name}: num_proj must be None or at least 1, got {num_proj}")
        self.num_units, self.num_proj, self.use_bias = num_units, num_proj, use_bias
        self.add_variable("kernel")
        self.add_variable("recurrent_kernel")
        if use_bias:
            self.add_variable("bias")
        if num_proj is not None:
            self.add_variable("projection_weights")

    @property
    def output_size(self) -> int:
        """The number of outputs, P or U."""
        return self.num_proj or self.num_units

    @property
    def state_size(self) -> Nest:
        """``LSTMStateTuple(U, R)``."""
        return lstm_size(self.num_units, self.output_size, True)

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        units = self.num_units
        shapes: dict[str, tuple[int, ...]] = {
            "kernel": (input_size, 8 * units),
            "recurrent_kernel": (self.output_size, 8 * units),
        }
        if self.use_bias:
            shapes["bias"] = (8 * units,)
        if self.num_proj is not None:
            shapes["projection_weights"] = (units, self.num_proj)
        return shapes

    def project(self, inputs: Tensor) -> Tensor:
        """Returns X, [..., 8U]."""
        return inputs @ self.kernel

    def step(self, projected: Tensor, state: Nest) -> tuple[Tensor, Nest]:
        """Returns ``(h', (c', h'))``."""
        c, h = split_state(state, self.num_units, True)
        m = linear([h], self.recurrent_kernel, self.bias if self.use_bias else None)
        s0, s1, s2, _, s4, s5, s6, s7 = (projected + m).chunk(8, -1)
        l3 = torch.relu(projected.chunk(8, -1)[3] * m.chunk(8, -1)[3])
        keep = torch.tanh(torch.sigmoid(s0) * torch.relu(s1))
        c = torch.tanh(keep + c) * torch.tanh(torch.sigmoid(s2) + l3)
        a2 = torch.tanh(torch.tanh(s4) * torch.sigmoid(s5))
        a3 = torch.sigmoid(torch.tanh(s6) + torch.sigmoid(s7))
        h = torch.tanh(c * torch.tanh(a2 + a3))
        if self.num_proj is not None:
            h = h @ self.projection_weights
        return h, LSTMStateTuple(c, h)


class UGRNNCell(HoistedCell):
    """The update-gate RNN (Collins et al. 2016, arXiv:1611.09913).

    g, n = split([x, h] @ kernel + bias); g = sigmoid(g + forget_bias); h' = g * h + (1 - g) * act(n).

    Args:
        num_units: U
        initializer: Of the kernel: fills a tensor in place; glorot_uniform by default.
        forget_bias: Added to g in every step; it is no part of the variable.
        activation: A name or a callable; None for tanh.
        reuse: Ignored.
        name: The variable scope, "ugrnn_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: kernel [I+U, 2U], bias [2U].
    """

    scope = "ugrnn_cell"
    kernel: nn.Parameter
    bias: nn.Parameter
    activation: Activation
    _step_parts = (*HoistedCell._step_parts, "project", "step")

    def __init__(
        self,
        num_units: int,
        initializer: Initializer | None = None,
        forget_bias: float = 1.0,
        activation: str | Activation | None = None,
        reuse: bool | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.num_units, self.forget_bias = num_units, forget_bias
        self.activation = activation_of(activation)
        self.add_variable("kernel", initializer)
        self.add_variable("bias")

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        units = self.num_units
        return {"kernel": (input_size + units, 2 * units), "bias": (2 * units,)}

    @property
    def _kernels(self) -> tuple[Tensor, Tensor]:
        """The rows of the kernel for the inputs, and those for the state."""
        inputs = self.kernel.size(0) - self.num_units
        return self.kernel[:inputs], self.kernel[inputs:]

    def project(self, inputs: Tensor) -> Tensor:
        """Returns the inputs' part of g and n, [..., 2U]."""
        return linear([inputs], self._kernels[0], self.bias)

    def step(self, projected: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(h', h')``."""
        g, n = (projected + state @ self._kernels[1]).chunk(2, -1)
        g = torch.sigmoid(g + self.forget_bias)
        h = g * state + (1 - g) * self.activation(n)
        return h, h

    def unroll(self, inputs: Tensor, state: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Runs a sequence in one call of the engine, if it has the activation."""
        activation = kernel_activation(self.activation)
        if activation is None:
            return super().unroll(inputs, state, run)
        # It is torch's GRU with r = 1: without weights, and sigmoid(50) is 1 to the last bit in every dtype.
        kernel = F.pad(self.kernel, (self.num_units, 0))
        g, n = self.bias.chunk(2)
        bias = torch.cat([torch.full_like(g, 50), g + self.forget_bias, n])
        options = Options(cell="gru", activation=activation)
        y, h, _ = run_layer(options, run, inputs, kernel, bias, state, masks=(run.masks, None))
        return y, h

    def why_loop(self) -> str | None:
        """Returns why a sequence runs in the loop; None if it does not."""
        return why_no_kernel(self.activation)

    def way(self) -> str:
        """Returns how a sequence runs otherwise."""
        return "one op over the sequence, gru with a reset gate of 1"


class IntersectionRNNCell(HoistedCell):
    """The intersection RNN, +RNN (Collins et al. 2016, arXiv:1611.09913).

    gh, hh, gy, y = split([x, h] @ kernel + bias), x projected first if it does not have U features;
    gh = sigmoid(gh + forget_bias) and gy likewise; h' = gh * h + (1 - gh) * tanh(hh);
    output = gy * x + (1 - gy) * y_act(y).

    Args:
        num_units: U
        num_in_proj: The size to which inputs of another size than U are projected: U. None for no projection.
        initializer: Of both kernels: fills a tensor in place; glorot_uniform by default.
        forget_bias: Added to gh and gy in every step; it is no part of the variable.
        y_activation: A name or a callable; None for relu.
        reuse: Ignored.
        name: The variable scope, "intersection_rnn_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: kernel [2U, 4U], bias [4U]; if I is not U also in_projection/kernel [I, U],
    in_projection/bias [U].

    Raises:
        ValueError: When it is built, if I is not U and ``num_in_proj`` is not U either.
    """

    scope = "intersection_rnn_cell"
    kernel: nn.Parameter
    bias: nn.Parameter
    in_projection_kernel: nn.Parameter | None
    in_projection_bias: nn.Parameter | None
    y_activation: Activation

    def __init__(
        self,
        num_units: int,
        num_in_proj: int | None = None,
        initializer: Initializer | None = None,
        forget_bias: float = 1.0,
        y_activation: str | Activation | None = "relu",
        reuse: bool | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.num_units, self.num_in_proj, self.forget_bias = num_units, num_in_proj, forget_bias
        self.y_activation = activation_of(y_activation, "relu")
        self.add_variable("kernel", initializer)
        self.add_variable("bias")
        # Until the size of the input is known, they may be needed.
        self.add_variable("in_projection/kernel", initializer)
        self.add_variable("in_projection/bias")

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        units = self.num_units
        shapes: dict[str, tuple[int, ...]] = {"kernel": (2 * units, 4 * units), "bias": (4 * units,)}
        if input_size != units:
            shapes |= {"in_projection/kernel": (input_size, units), "in_projection/bias": (units,)}
        return shapes

    def build_own(self, size: int, dtype: torch.dtype | None, device: Any) -> None:
        """Creates the variables; those of the projection only for inputs of another size than U."""
        if size == self.num_units:
            self._drop_projection()
        elif self.in_projection_kernel is None or self.num_in_proj != self.num_units:
            raise ValueError(
                "Must have input size == output size for Intersection RNN. To fix, num_in_proj should be set "
                f"to num_units at cell init. Got inputs of size {size}, num_units={self.num_units}, "
                f"num_in_proj={self.num_in_proj}"
            )
        super().build_own(size, dtype, device)

    def _drop_projection(self) -> None:
        if isinstance(self.in_projection_kernel, UninitializedParameter):
            self.in_projection_kernel = self.in_projection_bias = None

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "kernel" in state_dict and prefix + "in_projection_kernel" not in state_dict:
            self._drop_projection()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def project(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x, projected if need be, [..., U], and its part of the gates, [..., 4U]."""
        units = self.num_units
        if inputs.size(-1) != units:
            assert self.in_projection_kernel is not None
            inputs = linear([inputs], self.in_projection_kernel, self.in_projection_bias)
        return inputs, linear([inputs], self.kernel[:units], self.bias)

    def step(self, projected: tuple[Tensor, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(output, h')``."""
        x, wx = projected
        gh, hh, gy, y = (wx + state @ self.kernel[self.num_units :]).chunk(4, -1)
        gh, gy = torch.sigmoid(gh + self.forget_bias), torch.sigmoid(gy + self.forget_bias)
        h = gh * state + (1 - gh) * torch.tanh(hh)
        return gy * x + (1 - gy) * self.y_activation(y), h


class _KerasStyleCell(HoistedCell):
    """What ``MinimalRNNCell`` and ``CFNCell`` share: their constructor."""

    kernel: nn.Parameter
    bias: nn.Parameter
    activation: Activation

    def __init__(
        self,
        units: int,
        activation: str | Activation | None = "tanh",
        kernel_initializer: Initializer | None = None,
        bias_initializer: Initializer | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.num_units = units
        self.activation = activation_of(activation)
        self.add_variable("kernel", kernel_initializer)
        self.add_variable("bias", bias_initializer or constant(1.0))

    def why_loop(self) -> str | None:
        """Returns why ``project`` does not run on all steps at once; None if it does."""
        return why_each_step(self.activation)


class MinimalRNNCell(_KerasStyleCell):
    """The minimal RNN (Chen 2017, arXiv:1711.06788).

    With the rows of the kernel in three blocks x, z, h: z = act(x @ kernel_x);
    u = sigmoid([z, h] @ kernel_zh + bias); h' = u * h + (1 - u) * z.

    Args:
        units: U
        activation: A name or a callable; None for tanh.
        kernel_initializer: Fills a tensor in place; glorot_uniform by default.
        bias_initializer: Likewise; ones by default.
        name: The variable scope, "minimal_rnn_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: kernel [I+2U, U], bias [U].
    """

    scope = "minimal_rnn_cell"

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        units = self.num_units
        return {"kernel": (input_size + 2 * units, units), "bias": (units,)}

    def project(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z and its part of the gate, [..., U] each."""
        kernel_x, kernel_z, _ = self.kernel.split([inputs.size(-1), self.num_units, self.num_units])
        z = self.activation(inputs @ kernel_x)
        return z, linear([z], kernel_z, self.bias)

    def step(self, projected: tuple[Tensor, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(h', h')``."""
        z, wz = projected
        u = torch.sigmoid(wz + state @ self.kernel[self.kernel.size(0) - self.num_units :])
        h = u * state + (1 - u) * z
        return h, h


class CFNCell(_KerasStyleCell):
    """The chaos-free network (Laurent and von Brecht 2016, arXiv:1612.06212).

    wt, we, wn = split(x @ kernel); t, e = split(sigmoid(h @ recurrent_kernel + [wt, we] + bias));
    h' = t * act(h) + (1 - e) * act(wn).

    Args:
        units: U
        activation: A name or a callable; None for tanh.
        kernel_initializer: Of both kernels: fills a tensor in place; glorot_uniform by default.
        bias_initializer: Likewise; ones by default.
        name: The variable scope, "cfn_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: kernel [I, 3U], recurrent_kernel [U, 2U], bias [2U].
    """

    scope = "cfn_cell"
    recurrent_kernel: nn.Parameter

    def __init__(
        self,
        units: int,
        activation: str | Activation | None = "tanh",
        kernel_initializer: Initializer | None = None,
        bias_initializer: Initializer | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(units, activation, kernel_initializer, bias_initializer, name, dtype)
        self.add_variable("recurrent_kernel", kernel_initializer)

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        units = self.num_units
        return {
            "kernel": (input_size, 3 * units),
            "recurrent_kernel": (units, 2 * units),
            "bias": (2 * units,),
        }

    def project(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the inputs' part of the gates, [..., 2U], and act(wn), [..., U]."""
        gates, wn = (inputs @ self.kernel).split([2 * self.num_units, self.num_units], -1)
        return gates + self.bias, self.activation(wn)

    def step(self, projected: tuple[Tensor, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(h', h')``."""
        wx, new = projected
        t, e = torch.sigmoid(wx + state @ self.recurrent_kernel).chunk(2, -1)
        h = t * self.activation(state) + (1 - e) * new
        return h, h
