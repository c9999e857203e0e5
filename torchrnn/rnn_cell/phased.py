"""The phased LSTM of ``tf.contrib.rnn``, for inputs that come at irregular times."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from torchrnn.rnn_cell.base import (
    LSTMStateTuple,
    Nest,
    constant,
    linear,
    lstm_size,
    split_state,
)
from torchrnn.rnn_cell.gated import HoistedCell


def log_uniform(tensor: Tensor, low: float, high: float) -> None:
    """Fills with exp(U(log low, log high))."""
    nn.init.uniform_(tensor, math.log(low), math.log(high))
    with torch.no_grad():
        tensor.exp_()


class PhasedLSTMCell(HoistedCell, keeps_unroll=True):
    """The LSTM with a time gate (Neil et al. 2016, arXiv:1610.09513).

    The inputs are a pair of the time t [B, 1] and x [B, I]. i, f = split(sigmoid([x, h] @ mask_gates));
    d = f * c + i * tanh([x, h] @ new_input); o = sigmoid([x, h] @ output_gate); m = tanh(d) * o. With
    peepholes mask_gates also read c, and output_gate d. The cycle is s = mod(t - phase, period) / period, and
    the time gate k = 2s / ratio_on while s < ratio_on / 2, then 2 - 2s / ratio_on while s < ratio_on, then
    leak * s, also in evaluation. c' = k * d + (1 - k) * c; h' = k * m + (1 - k) * h.

    The cycle is computed in the dtype of the time, which may be wider than that of x: float64 for times that
    are large against the period.

    Args:
        num_units: U
        use_peepholes: Whether the gates see c.
        leak: Slope of the time gate while it is closed.
        ratio_on: Initial share of the period in which the time gate is open.
        trainable_ratio_on: Whether ``ratio_on`` gets a gradient; it is a variable in any case.
        period_init_min: Initial periods are exp(U(log min, log max)).
        period_init_max: Likewise.
        reuse: Ignored.
        name: The variable scope, "phased_lstm_cell" by default.
        dtype: The dtype of the variables; by default that of the first x.

    Variables, with N = I+U, and M = I+2U with peepholes, else N: mask_gates/kernel [M, 2U],
    mask_gates/bias [2U], new_input/kernel [N, U], new_input/bias [U], output_gate/kernel [M, U],
    output_gate/bias [U], period, phase, ratio_on [U]. Initial phases are U(0, period).

    Raises:
        ValueError: If not 0 < ``period_init_min`` <= ``period_init_max``.
    """

    scope = "phased_lstm_cell"
    mask_gates_kernel: nn.Parameter
    mask_gates_bias: nn.Parameter
    new_input_kernel: nn.Parameter
    new_input_bias: nn.Parameter
    output_gate_kernel: nn.Parameter
    output_gate_bias: nn.Parameter
    period: nn.Parameter
    phase: nn.Parameter
    ratio_on: nn.Parameter

    def __init__(
        self,
        num_units: int,
        use_peepholes: bool = False,
        leak: float = 0.001,
        ratio_on: float = 0.1,
        trainable_ratio_on: bool = True,
        period_init_min: float = 1.0,
        period_init_max: float = 1000.0,
        reuse: bool | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        if not 0 < period_init_min <= period_init_max:
            raise ValueError(
                f"{self.name}: 0 < period_init_min <= period_init_max is required, "
                f"got {period_init_min} and {period_init_max}"
            )
        self.num_units, self.use_peepholes, self.leak = num_units, use_peepholes, leak
        for part in ("mask_gates", "new_input", "output_gate"):
            self.add_variable(f"{part}/kernel")
            self.add_variable(f"{part}/bias")
        self.add_variable("period", partial(log_uniform, low=period_init_min, high=period_init_max))
        self.add_variable("phase", self._initialize_phase)
        self.add_variable("ratio_on", constant(ratio_on))
        self.ratio_on.requires_grad = trainable_ratio_on

    def _initialize_phase(self, tensor: Tensor) -> None:
        nn.init.uniform_(tensor)
        with torch.no_grad():
            tensor.mul_(self.period)

    @property
    def state_size(self) -> Nest:
        """``LSTMStateTuple(U, U)``."""
        return lstm_size(self.num_units, self.num_units, True)

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        units = self.num_units
        rows = input_size + units
        seeing = rows + units if self.use_peepholes else rows
        return {
            "mask_gates/kernel": (seeing, 2 * units),
            "mask_gates/bias": (2 * units,),
            "new_input/kernel": (rows, units),
            "new_input/bias": (units,),
            "output_gate/kernel": (seeing, units),
            "output_gate/bias": (units,),
            "period": (units,),
            "phase": (units,),
            "ratio_on": (units,),
        }

    def input_size_of(self, inputs: Nest) -> int:
        """Returns I of a pair of time [..., 1] and x [..., I]."""
        return super().input_size_of(_pair(inputs, self.name)[1])

    def check_inputs(self, inputs: Nest) -> None:
        """Raises ValueError unless the inputs are a pair of time [B, 1] and x [B, I] of floating dtypes."""
        time, x = _pair(inputs, self.name)
        super().check_inputs(time)
        super().check_inputs(x)
        if time.size(-1) != 1:
            raise ValueError(f"{self.name}: the time must be [B, 1], got {list(time.shape)}")

    @property
    def _input_rows(self) -> int:
        return self.new_input_kernel.size(0) - self.num_units

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (self.mask_gates_kernel, self.mask_gates_bias),
            (self.new_input_kernel, self.new_input_bias),
            (self.output_gate_kernel, self.output_gate_bias),
        ]

    def project(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Returns the time gate k [..., U], and x's part of mask_gates, new_input and output_gate."""
        time, x = inputs
        period = self.period.to(time.dtype)
        # TensorFlow's modulo has no gradient to its second argument.
        cycle = torch.remainder(time - self.phase.to(time.dtype), period.detach()) / period
        cycle = cycle.to(x.dtype)
        up = 2 * cycle / self.ratio_on
        k = torch.where(cycle < self.ratio_on, 2 - up, self.leak * cycle)
        k = torch.where(cycle < 0.5 * self.ratio_on, up, k)
        rows = self._input_rows
        return k, *(linear([x], kernel[:rows], bias) for kernel, bias in self._parts())

    def step(self, projected: tuple[Tensor, ...], state: Nest) -> tuple[Tensor, Nest]:
        """Returns ``(h', (c', h'))``."""
        c, h = split_state(state, self.num_units, True)
        k, gates, new, output = projected
        mask_kernel, new_kernel, output_kernel = (kernel[self._input_rows :] for kernel, _ in self._parts())
        peep = self.use_peepholes
        i, f = torch.sigmoid(gates + linear([h, c] if peep else [h], mask_kernel)).chunk(2, -1)
        new_c = f * c + i * torch.tanh(new + linear([h], new_kernel))
        o = torch.sigmoid(output + linear([h, new_c] if peep else [h], output_kernel))
        new_h = torch.tanh(new_c) * o
        c, h = k * new_c + (1 - k) * c, k * new_h + (1 - k) * h
        return h, LSTMStateTuple(c, h)


def _pair(inputs: Nest, name: str) -> tuple[Tensor, Tensor]:
    """Returns time and x; TypeError if the inputs are no pair."""
    if not isinstance(inputs, tuple | list) or len(inputs) != 2:
        raise TypeError(f"{name}: inputs must be a pair (time, x), got {type(inputs).__name__}")
    return inputs[0], inputs[1]
