"""LSTMs of ``tf.contrib.rnn`` that normalise the sums of their gates, or their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrnn.rnn_cell.base import (
    Activation,
    Initializer,
    RNNCell,
    constant,
    glorot_uniform,
    ignore_input_size,
)
from torchrnn.rnn_cell.core import ENGINE_ORDER, SUMS, LSTMCell, forget
from torchrnn.rnn_cell.dropout import generator_of, uniform

# Layer normalisation --------------------------------------------------------------------------------------


def add_norms(cell: RNNCell, scopes: Sequence[str], gain: float, shift: float) -> None:
    """Declares the variables gamma and beta of layer norms, which start at gain and shift."""
    for scope in scopes:
        cell.add_variable(f"{scope}/gamma", constant(gain))
        cell.add_variable(f"{scope}/beta", constant(shift))


def norm_shapes(scopes: Sequence[str], units: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of what ``add_norms`` declares."""
    return {f"{scope}/{name}": (units,) for scope in scopes for name in ("gamma", "beta")}


def epsilon(norm_eps: float | None, dtype: torch.dtype) -> float:
    """Returns what is added to the variance: by default TensorFlow's 1e-12, in float16 1e-3."""
    if norm_eps is not None:
        return norm_eps
    return 1e-3 if dtype == torch.float16 else 1e-12


def layer_norm(cell: RNNCell, scope: str, x: Tensor, norm_eps: float | None) -> Tensor:
    """Normalises each row of x [B, U] to mean 0 and variance 1, then applies a scope's gamma and beta."""
    gain, shift = getattr(cell, f"{scope}_gamma"), getattr(cell, f"{scope}_beta")
    return F.layer_norm(x, x.shape[-1:], gain, shift, epsilon(norm_eps, x.dtype))


# The cells ------------------------------------------------------------------------------------------------


class _NormalisedLSTMCell(LSTMCell, keeps_unroll=True):
    """``LSTMCell`` with layer norms of its sums and of c', if they are asked for."""

    layer_norm = False
    norm_eps: float | None = None

    def _bias(self) -> Tensor | None:
        return None if self.layer_norm else self.bias

    def _norm(self, scope: str, x: Tensor) -> Tensor:
        return layer_norm(self, scope, x, self.norm_eps) if self.layer_norm else x

    def _shifts(self) -> tuple[Tensor | None, tuple[Tensor, Tensor, float] | None]:
        if not self.layer_norm:
            return super()._shifts()
        scopes = [*(SUMS[k] for k in ENGINE_ORDER), "state"]
        gain, shift = (torch.stack([getattr(self, f"{s}_{v}") for s in scopes]) for v in ("gamma", "beta"))
        return None, (gain, forget(shift, self.forget_bias), epsilon(self.norm_eps, gain.dtype))

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        norms = norm_shapes((*SUMS, "state"), self.num_units) if self.layer_norm else {}
        return {**super().variable_shapes(input_size), **norms}

    def way(self) -> str:
        """Returns how a sequence runs, unless step by step."""
        return super().way() + (", layer-normalised" if self.layer_norm else "")


class LayerNormBasicLSTMCell(_NormalisedLSTMCell, keeps_unroll=True):
    """The LSTM with layer normalisation and dropout of the candidate.

    Layer norm: Ba et al. 2016, arXiv:1607.06450; dropout without loss of memory: Semeniuta et al. 2016,
    arXiv:1603.05118. With the sums i, j, f, o = split([x, h] @ kernel), candidate j, and each normalised
    over its own row by LN: c' = LN(sigmoid(LN(f) + forget_bias) * c + sigmoid(LN(i)) * drop(act(LN(j)))),
    h' = sigmoid(LN(o)) * act(c'). The normalised c' is what the state holds.

    Args:
        num_units: U
        forget_bias: Added to f in every step; it is no part of a variable.
        input_size: Ignored with a warning, as in TensorFlow.
        activation: A name or a callable; None for tanh.
        layer_norm: Whether to normalise; if not, a bias is added to the sums.
        norm_gain: What the gains start at.
        norm_shift: What the shifts start at.
        dropout_keep_prob: Probability, more than 0, with which an entry of the candidate is kept, in training
            mode; a mask is drawn for every step.
        dropout_prob_seed: A ``torch.Generator``, or an int for a new one; None for torch's default generator.
        reuse: Ignored.
        norm_eps: Added to the variance; None for TensorFlow's 1e-12, in float16 1e-3.
        noise: Replays a run: ``{"g": u}`` with numbers u [T, B, U] in [0, 1) for the steps in the order in
            which they are run. An entry is kept if its number is at least 1 - dropout_keep_prob.
        name: The variable scope, "layer_norm_basic_lstm_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: kernel [I+U, 4U]; gamma and beta [U] in each of the scopes input, transform, forget, output and
    state; without ``layer_norm`` instead bias [4U], which does not start at zero.

    Raises:
        ValueError: If ``dropout_keep_prob`` is not in (0, 1], ``noise`` has other keys, or the activation is
            not known.
    """

    scope = "layer_norm_basic_lstm_cell"

    def __init__(
        self,
        num_units: int,
        forget_bias: float = 1.0,
        input_size: object = None,
        activation: str | Activation | None = None,
        layer_norm: bool = True,
        norm_gain: float = 1.0,
        norm_shift: float = 0.0,
        dropout_keep_prob: float = 1.0,
        dropout_prob_seed: int | torch.Generator | None = None,
        reuse: bool | None = None,
        *,
        norm_eps: float | None = None,
        noise: Mapping[str, Tensor] | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        ignore_input_size(input_size)
        super().__init__(num_units, forget_bias=forget_bias, activation=activation, name=name, dtype=dtype)
        if not 0 < dropout_keep_prob <= 1:
            raise ValueError(f"{self.name}: dropout_keep_prob must be in (0, 1], got {dropout_keep_prob}")
        if noise is not None and set(noise) != {"g"}:
            raise ValueError(f"{self.name}: noise must have the one key 'g', got {list(noise)}")
        self.layer_norm, self.norm_eps = layer_norm, norm_eps
        self.dropout_keep_prob, self.noise = dropout_keep_prob, noise
        self.generator = generator_of(dropout_prob_seed)
        self._step = 0
        if layer_norm:
            self.register_parameter("bias", None)
            add_norms(self, (*SUMS, "state"), norm_gain, norm_shift)
        else:
            self.add_variable("bias", glorot_uniform)

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        shapes = dict(super().variable_shapes(input_size))
        if self.layer_norm:
            del shapes["bias"]
        return shapes

    def start_sequence(self) -> None:
        """Starts ``noise`` from its first step."""
        self._step = 0

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout_keep_prob < 1

    def _candidate(self, j: Tensor) -> Tensor:
        g = super()._candidate(j)
        if not self._drops:
            return g
        keep = self._noise(g) >= 1 - self.dropout_keep_prob
        return torch.where(keep, g / self.dropout_keep_prob, 0)

    def _noise(self, g: Tensor) -> Tensor:
        """Returns numbers [B, U] in [0, 1) for the next step."""
        if self.noise is None:
            return uniform(g.shape, self.generator, g.device)
        noise, t = self.noise["g"], self._step
        if noise.shape[1:] != g.shape or t >= noise.size(0):
            raise ValueError(
                f"{self.name}: noise['g'] must be [T, {g.size(0)}, {g.size(1)}] with T > {t}, "
                f"got {list(noise.shape)}"
            )
        self._step += 1
        return noise[t].to(g.device)

    def why_loop(self) -> str | None:
        """Returns why a sequence runs step by step; None if it does not."""
        return "dropout acts inside each step in training" if self._drops else super().why_loop()


class LayerNormLSTMCell(_NormalisedLSTMCell):
    """``LSTMCell`` with layer normalisation (Ba et al. 2016, arXiv:1607.06450).

    Each of the sums i, j, f, o is normalised over its own row before the peepholes are added, and the new c
    before it is clipped; the normalised, clipped c is what the state holds.

    Args:
        num_units: U
        use_peepholes: Whether the gates see c.
        cell_clip: Bound on the size of c', also if 0; None for none.
        initializer: Of kernel, peepholes and projection: fills a tensor in place; glorot_uniform by default.
        num_proj: P, the size of the projected output; None for no projection.
        proj_clip: Bound on the projected output; without ``num_proj`` it has no effect.
        forget_bias: Added to f in every step; it is no part of a variable.
        activation: A name or a callable; None for tanh.
        layer_norm: Whether to normalise.
        norm_gain: What the gains start at.
        norm_shift: What the shifts start at.
        reuse: Ignored.
        norm_eps: Added to the variance; None for TensorFlow's 1e-12, in float16 1e-3.
        name: The variable scope, "layer_norm_lstm_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: those of ``LSTMCell``, of which bias has no effect with ``layer_norm``; with it also gamma and
    beta [U] in each of the scopes input, transform, forget, output and state.

    Raises:
        ValueError: If ``num_proj`` is not positive or the activation is not known.
    """

    scope = "layer_norm_lstm_cell"

    def __init__(
        self,
        num_units: int,
        use_peepholes: bool = False,
        cell_clip: float | None = None,
        initializer: Initializer | None = None,
        num_proj: int | None = None,
        proj_clip: float | None = None,
        forget_bias: float = 1.0,
        activation: str | Activation | None = None,
        layer_norm: bool = False,
        norm_gain: float = 1.0,
        norm_shift: float = 0.0,
        reuse: bool | None = None,
        *,
        norm_eps: float | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_units,
            use_peepholes,
            cell_clip,
            initializer,
            num_proj,
            proj_clip,
            forget_bias=forget_bias,
            activation=activation,
            name=name,
            dtype=dtype,
        )
        self.layer_norm, self.norm_eps = layer_norm, norm_eps
        if layer_norm:
            add_norms(self, (*SUMS, "state"), norm_gain, norm_shift)


class WeightNormLSTMCell(LSTMCell, keeps_unroll=True):
    """``LSTMCell`` with weight normalisation (Salimans & Kingma 2016, arXiv:1602.07868).

    The rows of kernel for x and those for h are normalised on their own: each column w becomes
    gain * w / sqrt(max(sum(w^2), 1e-12)), with the gains norm_0 and norm_1. So is the projection.

    Args:
        num_units: U
        norm: Whether to normalise.
        use_peepholes: Whether the gates see c.
        cell_clip: Bound on the size of c', also if 0; None for none.
        initializer: Of all variables but bias: fills a tensor in place; glorot_uniform by default.
        num_proj: P, the size of the projected output; None for no projection.
        proj_clip: Bound on the projected output; without ``num_proj`` it has no effect.
        forget_bias: Added to f in every step; it is no part of the variable.
        activation: A name or a callable; None for tanh.
        reuse: Ignored.
        name: The variable scope, "wn_lstm_cell/wn_lstm_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: those of ``LSTMCell``, and with ``norm`` norm_0, norm_1 [4U] and projection/norm_0 [P].

    Raises:
        ValueError: If ``num_proj`` is not positive or the activation is not known.
    """

    scope = "wn_lstm_cell/wn_lstm_cell"
    norm_0: nn.Parameter
    norm_1: nn.Parameter
    projection_norm_0: nn.Parameter

    def __init__(
        self,
        num_units: int,
        norm: bool = True,
        use_peepholes: bool = False,
        cell_clip: float | None = None,
        initializer: Initializer | None = None,
        num_proj: int | None = None,
        proj_clip: float | None = None,
        forget_bias: float = 1,
        activation: str | Activation | None = None,
        reuse: bool | None = None,
        *,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_units,
            use_peepholes,
            cell_clip,
            initializer,
            num_proj,
            proj_clip,
            forget_bias=forget_bias,
            activation=activation,
            name=name,
            dtype=dtype,
        )
        self.norm = norm
        if norm:
            self.add_variable("norm_0", initializer)
            self.add_variable("norm_1", initializer)
            if num_proj is not None:
                self.add_variable("projection/norm_0", initializer)

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for I inputs."""
        shapes = dict(super().variable_shapes(input_size))
        if self.norm:
            shapes["norm_0"] = shapes["norm_1"] = (4 * self.num_units,)
            if self.num_proj is not None:
                shapes["projection/norm_0"] = (self.num_proj,)
        return shapes

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        kernel, projection = super()._weights()
        if not self.norm:
            return kernel, projection
        of_x, of_h = kernel.split([kernel.size(0) - self.output_size, self.output_size])
        kernel = torch.cat([_unit_columns(of_x) * self.norm_0, _unit_columns(of_h) * self.norm_1])
        if projection is not None:
            projection = _unit_columns(projection) * self.projection_norm_0
        return kernel, projection

    def way(self) -> str:
        """Returns how a sequence runs, unless step by step."""
        return super().way() + (", weights normalised once before it" if self.norm else "")


def _unit_columns(w: Tensor) -> Tensor:
    """Returns w with each column divided by its length, as TensorFlow's ``l2_normalize`` bounds it."""
    return w * w.square().sum(0).clamp(min=1e-12).rsqrt()
