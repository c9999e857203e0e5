"""The LSTM of ``tf.contrib.rnn`` whose input gate is what the forget gate leaves."""

from __future__ import annotations

from collections.abc import Mapping

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
    join_state,
    kernel_activation,
    linear,
    lstm_size,
    split_state,
    why_no_kernel,
    zeros,
)
from torchrnn.rnn_cell.core import listed, state_masks
from torchrnn.rnn_cell.engine import gate_columns, gate_vector, run_layer
from torchrnn.rnn_cell.normalized import add_norms, layer_norm, norm_shapes

SUMS = ("transform", "forget", "output")
"""The scopes of the layer norms of j, f and o."""


class CoupledInputForgetGateLSTMCell(RNNCell):
    """The LSTM with i = 1 - f (Greff et al. 2015, arXiv:1503.04069), projected and normalised on request.

    j, f, o = split([x, h] @ W_0 + B) with candidate j; with layer norm each is normalised and B left out.
    Peepholes add W_F_diag * c to f and W_O_diag * c' to o. f = sigmoid(f + forget_bias);
    c' = f * c + (1 - f) * act(j), normalised with layer norm; h' = sigmoid(o) * act(c'), projected and
    clipped.

    Args:
        num_units: U
        use_peepholes: Whether the gates see c.
        initializer: Of W_0, peepholes and projection: fills a tensor in place; glorot_uniform by default.
        num_proj: P, the size of the projected output; None for no projection.
        proj_clip: Bound on the projected output; without ``num_proj`` it has no effect.
        num_unit_shards: Ignored: W_0 is whole.
        num_proj_shards: Ignored: W_P_0 is whole.
        forget_bias: Added to f in every step; it is no part of a variable.
        state_is_tuple: Whether the state is ``LSTMStateTuple(c, h)``, else one tensor [c | h].
        activation: A name or a callable; None for tanh.
        reuse: Ignored.
        layer_norm: Whether to normalise.
        norm_gain: What the gains start at.
        norm_shift: What the shifts start at.
        norm_eps: Added to the variance; None for TensorFlow's 1e-12, in float16 1e-3.
        name: The variable scope, "coupled_input_forget_gate_lstm_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables, with R = P or U: W_0 [I+R, 3U], B [3U], W_F_diag, W_O_diag [U], W_P_0 [U, P]; with
    ``layer_norm`` also gamma and beta [U] in each of the scopes transform, forget, output and state.

    Raises:
        ValueError: If ``num_proj`` is not positive or the activation is not known.
    """

    scope = "coupled_input_forget_gate_lstm_cell"
    W_0: nn.Parameter
    B: nn.Parameter
    W_F_diag: nn.Parameter
    W_O_diag: nn.Parameter
    W_P_0: nn.Parameter
    activation: Activation

    def __init__(
        self,
        num_units: int,
        use_peepholes: bool = False,
        initializer: Initializer | None = None,
        num_proj: int | None = None,
        proj_clip: float | None = None,
        num_unit_shards: int = 1,
        num_proj_shards: int = 1,
        forget_bias: float = 1.0,
        state_is_tuple: bool = True,
        activation: str | Activation | None = None,
        reuse: bool | None = None,
        layer_norm: bool = False,
        norm_gain: float = 1.0,
        norm_shift: float = 0.0,
        *,
        norm_eps: float | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        if num_proj is not None and num_proj < 1:
            raise ValueError(f"{self.name}: num_proj must be None or at least 1, got {num_proj}")
        self.num_units, self.num_proj, self.proj_clip = num_units, num_proj, proj_clip
        self.use_peepholes, self.forget_bias = use_peepholes, forget_bias
        self.state_is_tuple = state_is_tuple
        self.activation = activation_of(activation)
        self.layer_norm, self.norm_eps = layer_norm, norm_eps
        self.add_variable("W_0", initializer)
        self.add_variable("B", zeros)
        if use_peepholes:
            self.add_variable("W_F_diag", initializer)
            self.add_variable("W_O_diag", initializer)
        if num_proj is not None:
            self.add_variable("W_P_0", initializer)
        if layer_norm:
            add_norms(self, (*SUMS, "state"), norm_gain, norm_shift)

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
            "W_0": (input_size + self.output_size, 3 * units),
            "B": (3 * units,),
        }
        if self.use_peepholes:
            shapes |= {"W_F_diag": (units,), "W_O_diag": (units,)}
        if self.num_proj is not None:
            shapes["W_P_0"] = (units, self.num_proj)
        if self.layer_norm:
            shapes |= norm_shapes((*SUMS, "state"), units)
        return shapes

    def _norm(self, scope: str, x: Tensor) -> Tensor:
        return layer_norm(self, scope, x, self.norm_eps) if self.layer_norm else x

    def call(self, inputs: Tensor, state: Nest) -> tuple[Tensor, Nest]:
        """Returns ``(h', (c', h'))``."""
        c, h = split_state(state, self.num_units, self.state_is_tuple)
        sums = linear([inputs, h], self.W_0, None if self.layer_norm else self.B).chunk(3, -1)
        j, f, o = map(self._norm, SUMS, sums)
        if self.use_peepholes:
            f = f + self.W_F_diag * c
        f = torch.sigmoid(f + self.forget_bias)
        c = self._norm("state", f * c + (1 - f) * self.activation(j))
        if self.use_peepholes:
            o = o + self.W_O_diag * c
        h = torch.sigmoid(o) * self.activation(c)
        if self.num_proj is not None:
            h = h @ self.W_P_0
            if self.proj_clip is not None:
                h = h.clamp(-self.proj_clip, self.proj_clip)
        return h, join_state(c, h, self.state_is_tuple)

    def unroll(self, inputs: Tensor, state: Nest, run: Run) -> tuple[Tensor, Nest]:
        """Runs a sequence in one call of the engine, unless ``why_loop`` says why not."""
        activation = kernel_activation(self.activation)
        if activation is None or self.why_loop() is not None:
            return super().unroll(inputs, state, run)
        projects = self.num_proj is not None
        order = (1, 0, 2)  # j, f, o to the engine's f, j, o
        bias = gate_vector(self.B, order).view(3, -1)
        c, h = split_state(state, self.num_units, self.state_is_tuple)
        y, h, c = run_layer(
            Options(
                cell="lstm_coupled", activation=activation, proj_clip=self.proj_clip if projects else None
            ),
            run,
            inputs,
            gate_columns(self.W_0, order),
            torch.cat([bias[:1] + self.forget_bias, bias[1:]]).view(-1),
            h,
            c,
            projection=self.W_P_0.t() if projects else None,
            # The engine has a row for the input gate too, and ignores it.
            peephole=torch.stack([torch.zeros_like(self.W_F_diag), self.W_F_diag, self.W_O_diag])
            if self.use_peepholes
            else None,
            masks=state_masks(run, self.num_units, self.state_is_tuple),
        )
        return y, join_state(c, h, self.state_is_tuple)

    def why_loop(self) -> str | None:
        """Returns why a sequence runs step by step; None if it does not."""
        return "no kernel normalises coupled gates" if self.layer_norm else why_no_kernel(self.activation)

    def way(self) -> str:
        """Returns how a sequence runs otherwise."""
        projects = self.num_proj is not None
        return "one op over the sequence, coupled lstm" + listed({
            "peepholes": self.use_peepholes,
            "projection": projects,
            "proj_clip": projects and self.proj_clip is not None,
        })  # fmt: skip
