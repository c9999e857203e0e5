"""The cells that TensorFlow ran as one op per step, and those that agree with cuDNN's layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchrnn.options import Options
from torchrnn.rnn_cell.base import Initializer, RNNCell, Run, constant, linear
from torchrnn.rnn_cell.core import GRUCell, LSTMCell
from torchrnn.rnn_cell.engine import run_layer


class LSTMBlockCell(LSTMCell, keeps_unroll=True):
    """``LSTMCell`` with tanh and without projection, whose clip has no gradient of its own.

    Gradients pass ``cell_clip`` as if it were not there (straight through), also where it bites; in
    ``LSTMCell`` they are zero there.

    Args:
        num_units: U
        forget_bias: Added to f in every step; it is no part of the variable.
        cell_clip: Bound on the size of c', if it is more than 0; None for none.
        use_peephole: Whether the gates see c.
        dtype: The dtype of the variables; by default that of the first input.
        reuse: Ignored.
        name: The variable scope.

    Variables: kernel [I+U, 4U], bias [4U], w_i_diag, w_f_diag, w_o_diag [U].
    """

    def __init__(
        self,
        num_units: int,
        forget_bias: float = 1.0,
        cell_clip: float | None = None,
        use_peephole: bool = False,
        dtype: torch.dtype | None = None,
        reuse: bool | None = None,
        name: str = "lstm_cell",
    ) -> None:
        clip = cell_clip if cell_clip is not None and cell_clip > 0 else None
        super().__init__(num_units, use_peephole, clip, forget_bias=forget_bias, name=name, dtype=dtype)

    def _clip(self, c: Tensor) -> Tensor:
        # The value of the clamp, and the gradient of c.
        return c if self.cell_clip is None else super()._clip(c.detach()) + (c - c.detach())

    def why_loop(self) -> str | None:
        """Returns why a sequence runs step by step; None if it does not."""
        if self.cell_clip is not None and torch.is_grad_enabled():
            return "no kernel passes gradients straight through cell_clip; in no_grad mode one op"
        return super().why_loop()


class CudnnCompatibleLSTMCell(LSTMBlockCell):
    """``LSTMBlockCell`` with ``forget_bias`` 0, clip and peepholes left out: the LSTM of cuDNN and torch.

    Args:
        num_units: U
        reuse: Ignored.

    Variables: kernel [I+U, 4U], bias [4U], the latter with the sum of cuDNN's two biases.
    """

    def __init__(self, num_units: int, reuse: bool | None = None) -> None:
        super().__init__(num_units, forget_bias=0, name="cudnn_compatible_lstm_cell")


class GRUBlockCell(GRUCell):
    """``GRUCell`` with tanh, and other names of variables.

    Args:
        num_units: U
        cell_size: U by its former name; exactly one of both must be given.
        reuse: Ignored.
        name: The variable scope.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: w_ru [I+U, 2U], b_ru [2U], w_c [I+U, U], b_c [U], held by the attributes of ``GRUCell``:
    gates_kernel, gates_bias, candidate_kernel and candidate_bias.

    Raises:
        ValueError: If both or none of ``num_units`` and ``cell_size`` are given.
    """

    names: Mapping[str, str] = {
        "gates_kernel": "w_ru",
        "gates_bias": "b_ru",
        "candidate_kernel": "w_c",
        "candidate_bias": "b_c",
    }
    """TensorFlow's names by attribute, where they are not those of ``GRUCell``."""

    def __init__(
        self,
        num_units: int | None = None,
        cell_size: int | None = None,
        reuse: bool | None = None,
        name: str = "gru_cell",
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        units = cell_size if num_units is None else num_units
        if units is None or (num_units is not None and cell_size is not None):
            raise ValueError("Exactly one of num_units or cell_size must be provided.")
        super().__init__(units, name=name, dtype=dtype)
        for attribute, tf_name in self.names.items():
            self._variables[attribute] = (tf_name, self._variables[attribute][1])


class GRUBlockCellV2(GRUBlockCell):
    """``GRUBlockCell`` with ``GRUCell``'s names of variables.

    Args:
        num_units: U
        cell_size: U by its former name; exactly one of both must be given.
        reuse: Ignored.
        name: The variable scope.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: gates/kernel [I+U, 2U], gates/bias [2U], candidate/kernel [I+U, U], candidate/bias [U].

    Raises:
        ValueError: If both or none of ``num_units`` and ``cell_size`` are given.
    """

    names: Mapping[str, str] = {}


class CudnnCompatibleGRUCell(RNNCell):
    """The GRU of cuDNN and ``torch.nn.GRU``, with the reset after the product.

    r, u = split(sigmoid([x, h] @ gates/kernel + gates/bias)); n = tanh(x @ candidate/input_projection +
    r * (h @ candidate/hidden_projection)), each projection with a kernel and a bias;
    h' = u * h + (1 - u) * n.

    Args:
        num_units: U
        reuse: Ignored.
        kernel_initializer: Fills a tensor in place; glorot_uniform by default.
        name: The variable scope, "cudnn_compatible_gru_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: gates/kernel [I+U, 2U], gates/bias [2U], which starts at 1, candidate/input_projection/kernel
    [I, U] and bias [U], candidate/hidden_projection/kernel [U, U] and bias [U].
    """

    scope = "cudnn_compatible_gru_cell"
    gates_kernel: nn.Parameter
    gates_bias: nn.Parameter
    candidate_input_projection_kernel: nn.Parameter
    candidate_input_projection_bias: nn.Parameter
    candidate_hidden_projection_kernel: nn.Parameter
    candidate_hidden_projection_bias: nn.Parameter

    def __init__(
        self,
        num_units: int,
        reuse: bool | None = None,
        kernel_initializer: Initializer | None = None,
        *,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.num_units = num_units
        self.add_variable("gates/kernel", kernel_initializer)
        self.add_variable("gates/bias", constant(1.0))
        for part in ("input", "hidden"):
            self.add_variable(f"candidate/{part}_projection/kernel", kernel_initializer)
            self.add_variable(f"candidate/{part}_projection/bias")

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        units = self.num_units
        return {
            "gates/kernel": (input_size + units, 2 * units),
            "gates/bias": (2 * units,),
            "candidate/input_projection/kernel": (input_size, units),
            "candidate/input_projection/bias": (units,),
            "candidate/hidden_projection/kernel": (units, units),
            "candidate/hidden_projection/bias": (units,),
        }

    def call(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(h', h')``."""
        r, u = torch.sigmoid(linear([inputs, state], self.gates_kernel, self.gates_bias)).chunk(2, -1)
        of_x = linear([inputs], self.candidate_input_projection_kernel, self.candidate_input_projection_bias)
        of_h = linear([state], self.candidate_hidden_projection_kernel, self.candidate_hidden_projection_bias)
        h = u * state + (1 - u) * torch.tanh(of_x + r * of_h)
        return h, h

    def unroll(self, inputs: Tensor, state: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Runs a sequence in one call of the engine."""
        candidate = torch.cat(
            [self.candidate_input_projection_kernel, self.candidate_hidden_projection_kernel]
        )
        kernel = torch.cat([self.gates_kernel, candidate], 1)
        bias = torch.cat([self.gates_bias, self.candidate_input_projection_bias])
        zeros = torch.zeros_like(self.gates_bias)
        hidden_bias = torch.cat([zeros, self.candidate_hidden_projection_bias])
        y, h, _ = run_layer(
            Options(cell="gru"),
            run,
            inputs,
            kernel,
            bias,
            state,
            masks=(run.masks, None),
            hidden_bias=hidden_bias,
        )
        return y, h

    def way(self) -> str:
        """Returns how a sequence runs."""
        return "one op over the sequence, gru with reset after the product"
