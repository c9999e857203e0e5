"""Keras's recurrent layers with their weights, and back.

Letters: T steps, B batch rows, I inputs, U units, G gates of the cell. Weights are kept in Keras's layout.
Keras 3 and tf_keras compute the same but for hard_sigmoid.

One file from the configuration to the modules, as neither is of use without the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from torchrnn import ops
from torchrnn._tools import script
from torchrnn.interop.arrays import as_array, as_tensor
from torchrnn.options import Options
from torchrnn.reference import Arguments
from torchrnn.rnn_cell.base import (
    ACTIVATIONS,
    Activation,
    Run,
    alive_mask,
    describe,
    hard_sigmoid,
    kernel_activation,
    loop,
)
from torchrnn.rnn_cell.engine import gate_columns, gate_vector
from torchrnn.rnn_cell.hooks import before_sequence, pre_hooks, why_called

_MERGES = ("concat", "sum", "ave", "mul", None)
_MORE_ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "mish": F.mish,
    "relu6": F.relu6,
    "silu": F.silu,
    "swish": F.silu,
}
_USED = {
    *(
        "units",
        "activation",
        "recurrent_activation",
        "use_bias",
        "dropout",
        "recurrent_dropout",
        "reset_after",
    ),
    *("return_sequences", "go_backwards", "zero_output_for_mask", "cell", "cells"),
    *("layer", "backward_layer", "merge_mode"),
}
_WITHOUT_EFFECT = {
    *("name", "trainable", "dtype", "seed", "implementation", "unroll", "use_cudnn", "unit_forget_bias"),
    *("batch_input_shape", "batch_shape", "input_shape", "input_dim", "input_length", "return_state"),
}


def from_keras(layer_config: Mapping[str, Any], weights: Sequence[Any], keras_version: int = 3) -> nn.Module:
    """Builds the module that computes what a Keras layer does.

    The module is called as ``m(x, mask=None, initial_state=None)`` and always returns ``(outputs, states)``:

    - x: [B, T, I].
    - mask: [B, T], true where a step counts; any pattern. A masked step is not read: it keeps the state and
      repeats the output of the step before (zeros at first), or is zero with ``zero_output_for_mask`` and in
      a ``Bidirectional`` that returns sequences.
    - initial_state: A list as ``states`` is, of [B, U]; one tensor will do for one state. None for zeros.
    - outputs: [B, T, U], or the last [B, U] if ``return_sequences`` is False. A configuration that Keras has
      written says which; in one that does not it is taken as True. A pair with ``merge_mode`` None.
    - states: A list whether or not ``return_state``: [h, c] of an LSTM and [h] of others; of stacked cells
      one cell after the other, of a ``Bidirectional`` forward, then backward.

    Dropout acts in training mode: one mask per call and row on the inputs, and one on the h that enters the
    recurrent product.

    Args:
        layer_config: ``{"class_name": ..., "config": layer.get_config()}`` of ``LSTM``, ``GRU``,
            ``SimpleRNN``, ``Bidirectional``, or ``RNN`` over ``LSTMCell``, ``GRUCell``,
            ``SimpleRNNCell``, ``StackedRNNCells`` or a list of these. Initializers, regularizers,
            constraints and dtype policies are not looked at: the module computes in the weights' dtype.
        weights: As ``layer.get_weights()`` has them: kernel [I, G*U], recurrent_kernel [U, G*U] and bias
            [G*U] ([2, 3U] of a GRU with ``reset_after``) of each cell. Arrays or tensors.
        keras_version: Whose hard_sigmoid: relu6(x + 3) / 6 of Keras 3, or clip(0.2 x + 0.5, 0, 1) of 1 and 2
            (``tf.keras`` and tf_keras).

    Raises:
        ValueError: If the number or shapes of the weights do not fit, or the configuration has something that
            has no counterpart here, such as ``stateful``.
        TypeError: If ``layer_config`` is not a mapping of that form.
    """
    kind, config = _parts(layer_config)
    arrays = [as_tensor(value, f"weight {i}") for i, value in enumerate(weights)]
    module = _layer(kind, config, list(arrays), keras_version)
    expected = len(list(_weights(module)))
    if expected != len(arrays):
        raise ValueError(f"{kind}: must have {expected} weights, got {len(arrays)}")
    return module


def to_keras(module: nn.Module) -> list[Any]:
    """Returns copies of the weights of a module of ``from_keras`` as ``layer.set_weights`` takes them."""
    return [as_array(weight) for weight in _weights(module)]


def keras_gradients(module: nn.Module) -> list[Any]:
    """Returns copies of the gradients of a module of ``from_keras``, in the order of ``to_keras``.

    None stands for a weight whose ``grad`` is None.
    """
    return [None if weight.grad is None else as_array(weight.grad) for weight in _weights(module)]


# Cells ----------------------------------------------------------------------------------------------------


class KerasCell(nn.Module):
    """One cell: a step in plain torch, and a sequence in one call of the engine where it knows the cell.

    Args:
        config: Keras's configuration.
        weights: Those that are left of all; the cell takes its own off the front.
        keras_version: As of ``from_keras``.
    """

    gates: ClassVar[int]
    states: ClassVar[int] = 1
    cell: str
    """The engine's name."""
    order: ClassVar[Sequence[int]]
    """Where in Keras's order the engine's gates are."""
    kernel: nn.Parameter
    recurrent_kernel: nn.Parameter
    bias: nn.Parameter | None

    __prepare_scriptable__ = script.refuse

    def __init__(self, config: Mapping[str, Any], weights: list[Tensor], keras_version: int) -> None:
        super().__init__()
        name = type(self).__name__
        units = config.get("units")
        if not isinstance(units, int) or units < 1:
            raise ValueError(f"{name}: units must be a positive int, got {units!r}")
        self.units = units
        self.activation = _activation(config, "activation", "tanh", keras_version)
        self.recurrent_activation = _activation(config, "recurrent_activation", "sigmoid", keras_version)
        self.dropout = _rate(config, "dropout")
        self.recurrent_dropout = _rate(config, "recurrent_dropout")
        self.reset_after = bool(config.get("reset_after", True))
        columns = self.gates * units
        inputs = weights[0].size(0) if weights and weights[0].dim() == 2 else 0
        shapes: dict[str, tuple[int, ...]]
        shapes = {"kernel": (inputs, columns), "recurrent_kernel": (units, columns)}
        if config.get("use_bias", True):
            shapes["bias"] = self.bias_shape()
        else:
            self.bias = None
        if len(weights) < len(shapes):
            raise ValueError(f"{name}: must have the weights {', '.join(shapes)}, got {len(weights)}")
        for weight, shape in shapes.items():
            value = weights.pop(0)
            if tuple(value.shape) != shape:
                raise ValueError(f"{name}: {weight} must be {list(shape)}, got {list(value.shape)}")
            self.register_parameter(weight, nn.Parameter(value.clone()))

    def bias_shape(self) -> tuple[int, ...]:
        """Returns [G*U]."""
        return (self.gates * self.units,)

    def biases(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Returns those of the input and of the recurrent product."""
        return (None, None) if self.bias is None else (self.bias, torch.zeros_like(self.bias))

    def forward(
        self, inputs: Tensor, state: list[Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs one step; returns ``(h', new state)``.

        Args:
            inputs: [B, I]
            state: [h] or [h, c], [B, U] each.
            mask: Factor on the h that enters the product.
        """
        h = state[0] if mask is None else state[0] * mask
        bias, recurrent_bias = self.biases()
        wx = F.linear(inputs, self.kernel.t(), bias)
        rh = F.linear(h, self.recurrent_kernel.t(), recurrent_bias)
        new = self.step(wx, rh, h, state)
        return new[0], new

    def step(self, wx: Tensor, rh: Tensor, h: Tensor, state: list[Tensor]) -> list[Tensor]:
        """Returns the new state.

        Args:
            wx: x @ kernel with its bias, [B, G*U].
            rh: The same of h.
            h: The h that enters products.
            state: The old state.
        """
        raise NotImplementedError(f"{type(self).__name__} must define step")

    def unroll(self, x: Tensor, lengths: Tensor | None, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Runs x [T, B, I]; returns outputs [T, B, U], zero past a row's length, and the final state."""
        mask = None
        if self.training and self.dropout:
            x = x * F.dropout(x.new_ones(x.shape[1:]), self.dropout)
        if self.training and self.recurrent_dropout:
            mask = F.dropout(torch.ones_like(state[0]), self.recurrent_dropout)
        activation = kernel_activation(self.activation)
        is_known = self.gates == 1 or self.recurrent_activation is torch.sigmoid
        is_changed = why_called(self) or not vars(self).keys().isdisjoint({"forward", "step"})
        if mask is not None or activation is None or not is_known or is_changed:
            return loop(partial(self, mask=mask), x, state, Run(lengths))
        if pre_hooks(self) and (step := before_sequence(self, x[0], state)) is not None:
            return loop(step, x, state, Run(lengths))
        kernels = (gate_columns(kernel, self.order) for kernel in (self.kernel, self.recurrent_kernel))
        w_ih, w_hh = (kernel.t().contiguous() for kernel in kernels)
        b_ih, b_hh = ([] if b is None else [gate_vector(b, self.order)] for b in self.biases())
        h0, c0 = [*(each.unsqueeze(0) for each in state), None][:2]
        a = Arguments(x, [w_ih], [w_hh], b_ih, b_hh, h0=h0, c0=c0, lengths=lengths)
        y, _, *final = ops.layer(
            a, Options(cell=self.cell, activation=activation), state_dtype=state[0].dtype
        )
        return y, [each[0] for each in final[: self.states]]

    def extra_repr(self) -> str:
        """Returns the sizes."""
        return f"{self.kernel.size(0)}, {self.units}"


class SimpleRNNCell(KerasCell):
    """h' = act(x @ kernel + h @ recurrent_kernel + bias)."""

    gates = 1
    cell = "rnn"
    order = (0,)

    def step(self, wx: Tensor, rh: Tensor, h: Tensor, state: list[Tensor]) -> list[Tensor]:
        """Returns [h']."""
        return [self.activation(wx + rh)]


class LSTMCell(KerasCell):
    """The LSTM with gates i, f, g (candidate), o: c' = f * c + i * g; h' = o * act(c').

    i, f and o have the recurrent activation and g the other. There is no forget_bias but that in the bias.
    """

    gates = 4
    states = 2
    cell = "lstm"
    order = (0, 1, 2, 3)

    def step(self, wx: Tensor, rh: Tensor, h: Tensor, state: list[Tensor]) -> list[Tensor]:
        """Returns [h', c']."""
        i, f, g, o = (wx + rh).chunk(4, -1)
        c = self.recurrent_activation(f) * state[1] + self.recurrent_activation(i) * self.activation(g)
        return [self.recurrent_activation(o) * self.activation(c), c]


class GRUCell(KerasCell):
    """The GRU with gates z, r and candidate n: h' = z * h + (1 - z) * n.

    n = act(x_n + r * (h @ R_n + b_n)) with ``reset_after``, as in ``torch.nn.GRU``; else
    n = act(x_n + (r * h) @ R_n).
    """

    gates = 3
    order = (1, 0, 2)

    def __init__(self, config: Mapping[str, Any], weights: list[Tensor], keras_version: int) -> None:
        super().__init__(config, weights, keras_version)
        self.cell = "gru" if self.reset_after else "gru_reset_before"

    def bias_shape(self) -> tuple[int, ...]:
        """Returns [2, 3U], of the input and of the recurrent product, with ``reset_after``; else [3U]."""
        return (2, 3 * self.units) if self.reset_after else (3 * self.units,)

    def biases(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Returns those of the input and of the recurrent product."""
        if self.bias is None or not self.reset_after:
            return super().biases()
        return self.bias[0], self.bias[1]

    def step(self, wx: Tensor, rh: Tensor, h: Tensor, state: list[Tensor]) -> list[Tensor]:
        """Returns [h']."""
        (wx_z, wx_r, wx_n), (rh_z, rh_r, rh_n) = wx.chunk(3, -1), rh.chunk(3, -1)
        z, r = self.recurrent_activation(wx_z + rh_z), self.recurrent_activation(wx_r + rh_r)
        inner = r * rh_n if self.reset_after else (r * h) @ self.recurrent_kernel[:, 2 * self.units :]
        return [z * state[0] + (1 - z) * self.activation(wx_n + inner)]


_CELLS: dict[str, type[KerasCell]] = {"LSTM": LSTMCell, "GRU": GRUCell, "SimpleRNN": SimpleRNNCell}


# Layers ---------------------------------------------------------------------------------------------------


class KerasRNN(nn.Module):
    """Cells on top of each other over a sequence: Keras's ``RNN``, ``LSTM``, ``GRU`` and ``SimpleRNN``.

    How it is called is said at ``from_keras``.

    Args:
        config: Keras's configuration of the layer.
        cells: The cells.
    """

    def __init__(self, config: Mapping[str, Any], cells: Sequence[KerasCell]) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)
        self.return_sequences = bool(config.get("return_sequences", True))
        self.go_backwards = bool(config.get("go_backwards", False))
        self.zero_output_for_mask = bool(config.get("zero_output_for_mask", False))

    @property
    def sizes(self) -> list[int]:
        """The sizes of all states."""
        return [cell.units for cell in self._cells() for _ in range(cell.states)]

    def _cells(self) -> Iterator[KerasCell]:
        for cell in self.cells:
            assert isinstance(cell, KerasCell)
            yield cell

    def forward(self, x: Tensor, mask: Any = None, initial_state: Any = None) -> tuple[Tensor, list[Tensor]]:
        """Runs a sequence; see ``from_keras``."""
        kernel = next(self._cells()).kernel
        if x.dim() != 3 or x.size(2) != kernel.size(0):
            raise ValueError(f"x must be [B, T, I] with I={kernel.size(0)}, got {list(x.shape)}")
        if x.dtype != kernel.dtype:
            raise ValueError(f"x must have the dtype of the weights {kernel.dtype}, got {x.dtype}")
        alive = _time_major(mask, x)
        states = _states(initial_state, self.sizes, x)
        x = x.transpose(0, 1)
        if self.go_backwards:
            x = x.flip(0)
            alive = None if alive is None else alive.flip(0)
        lengths = None
        if alive is not None:
            # The steps that count, in their order, and then the others: rows with lengths.
            order = alive.byte().argsort(dim=0, descending=True, stable=True)
            x = torch.take_along_dim(x, order.unsqueeze(2), 0)
            lengths = alive.sum(0)
            x = torch.where(alive_mask(lengths, len(x)).unsqueeze(2), x, 0)
        finals: list[Tensor] = []
        for cell in self._cells():
            x, final = cell.unroll(x, lengths, [states.pop(0) for _ in range(cell.states)])
            finals += final
        if alive is not None:
            # Back to where they were; a masked step has the output of the last that counted before it.
            counted = alive.cumsum(0)
            x = torch.take_along_dim(x, (counted - 1).clamp(min=0).unsqueeze(2), 0)
            shown = alive if self.zero_output_for_mask else counted > 0
            x = torch.where(shown.unsqueeze(2), x, 0)
        return x.transpose(0, 1) if self.return_sequences else x[-1], finals

    def extra_repr(self) -> str:
        """Returns what differs from the defaults."""
        flags = {
            "return_sequences=False": not self.return_sequences,
            "go_backwards=True": self.go_backwards,
            "zero_output_for_mask=True": self.zero_output_for_mask,
        }
        return ", ".join(text for text, there in flags.items() if there)


class KerasBidirectional(nn.Module):
    """One layer forwards and one backwards: Keras's ``Bidirectional``.

    How it is called is said at ``from_keras``.

    Args:
        forward_layer: The one.
        backward_layer: The other.
        merge_mode: "concat", "sum", "ave", "mul", or None for a pair of outputs.

    Raises:
        ValueError: If the layers walk in the same direction or return different things, or the mode is not
            known.
    """

    def __init__(self, forward_layer: KerasRNN, backward_layer: KerasRNN, merge_mode: str | None) -> None:
        super().__init__()
        if merge_mode not in _MERGES:
            raise ValueError(f"merge_mode must be one of {_MERGES}, got {merge_mode!r}")
        if forward_layer.go_backwards == backward_layer.go_backwards:
            raise ValueError(
                f"go_backwards must differ between the two layers, got {forward_layer.go_backwards} of both"
            )
        if forward_layer.return_sequences != backward_layer.return_sequences:
            raise ValueError(
                f"return_sequences must be that of both layers, got {forward_layer.return_sequences} and "
                f"{backward_layer.return_sequences}"
            )
        self.forward_layer, self.backward_layer, self.merge_mode = forward_layer, backward_layer, merge_mode
        for layer in (forward_layer, backward_layer):
            layer.zero_output_for_mask = layer.return_sequences

    def forward(
        self, x: Tensor, mask: Any = None, initial_state: Any = None
    ) -> tuple[Tensor | tuple[Tensor, Tensor], list[Tensor]]:
        """Runs a sequence; see ``from_keras``."""
        sizes = self.forward_layer.sizes
        states = _states(initial_state, sizes + self.backward_layer.sizes, x)
        fw, states_fw = self.forward_layer(x, mask, states[: len(sizes)])
        bw, states_bw = self.backward_layer(x, mask, states[len(sizes) :])
        if self.forward_layer.return_sequences:
            bw = bw.flip(1)
        return self._merge(fw, bw), states_fw + states_bw

    def _merge(self, fw: Tensor, bw: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.merge_mode == "concat":
            return torch.cat([fw, bw], -1)
        if self.merge_mode == "sum":
            return fw + bw
        if self.merge_mode == "ave":
            return (fw + bw) / 2
        if self.merge_mode == "mul":
            return fw * bw
        return fw, bw

    def extra_repr(self) -> str:
        """Returns how outputs are merged."""
        return f"merge_mode={self.merge_mode!r}"


def _time_major(mask: Any, x: Tensor) -> Tensor | None:
    """Returns a mask [B, T] as [T, B] bool."""
    if mask is None:
        return None
    alive = torch.as_tensor(mask, device=x.device)
    if alive.shape != x.shape[:2]:
        raise ValueError(f"mask must be [B, T] = {list(x.shape[:2])}, got {list(alive.shape)}")
    return alive.bool().t()


def _states(value: Any, sizes: Sequence[int], x: Tensor) -> list[Tensor]:
    """Returns initial states as a flat list."""
    shapes = [(x.size(0), size) for size in sizes]
    if value is None:
        return [x.new_zeros(shape) for shape in shapes]
    states = pytree.tree_leaves(value)
    if [tuple(state.shape) for state in states] != shapes:
        raise ValueError(f"initial_state must be {[list(s) for s in shapes]}, got {describe(value)}")
    return states


# Reading configurations -----------------------------------------------------------------------------------


def _parts(value: Any) -> tuple[str, Mapping[str, Any]]:
    """Returns the class name and the configuration of an object that Keras has written."""
    if not isinstance(value, Mapping) or not isinstance(value.get("config"), Mapping):
        raise TypeError(f'a layer must be {{"class_name": ..., "config": {{...}}}}, got {value!r}')
    return str(value.get("class_name")), value["config"]


def _check(kind: str, config: Mapping[str, Any]) -> None:
    """Raises for what would change results and is not there, such as ``stateful``."""
    for key, value in config.items():
        known = key in _USED or key in _WITHOUT_EFFECT
        known = known or key.endswith(("_initializer", "_regularizer", "_constraint"))
        if not known and value is not None and value is not False:
            raise ValueError(f"{kind}: {key}={value!r} is not supported")


def _layer(
    kind: str, config: Mapping[str, Any], weights: list[Tensor], version: int
) -> KerasRNN | KerasBidirectional:
    """Builds a layer, which takes its weights off the list."""
    _check(kind, config)
    if kind == "Bidirectional":
        first, inner = _parts(config.get("layer"))
        given = config.get("backward_layer")
        second, other = (first, {**inner, "go_backwards": True}) if given is None else _parts(given)
        fw, bw = _layer(first, inner, weights, version), _layer(second, other, weights, version)
        if not isinstance(fw, KerasRNN) or not isinstance(bw, KerasRNN):
            raise ValueError("Bidirectional: layer must not be a Bidirectional itself")
        return KerasBidirectional(fw, bw, config.get("merge_mode", "concat"))
    if kind == "RNN":
        cell = config.get("cell", config.get("cells"))
        return KerasRNN(config, list(_cells(cell, weights, version)))
    if kind in _CELLS:
        return KerasRNN(config, [_CELLS[kind](config, weights, version)])
    raise ValueError(f"class_name must be one of {', '.join(_CELLS)}, RNN or Bidirectional, got {kind!r}")


def _cells(value: Any, weights: list[Tensor], version: int) -> Iterator[KerasCell]:
    """Yields the cells of a cell, a stack or a list, which take their weights off the list."""
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError("RNN: cell must hold at least one cell, got none")
        for each in value:
            yield from _cells(each, weights, version)
        return
    kind, config = _parts(value)
    _check(kind, config)
    if kind == "StackedRNNCells":
        yield from _cells(config.get("cells"), weights, version)
    elif kind.removesuffix("Cell") in _CELLS and kind.endswith("Cell"):
        yield _CELLS[kind.removesuffix("Cell")](config, weights, version)
    else:
        names = ", ".join(f"{name}Cell" for name in _CELLS)
        raise ValueError(f"class_name of a cell must be one of {names} or StackedRNNCells, got {kind!r}")


def _activation(config: Mapping[str, Any], key: str, default: str, version: int) -> Activation:
    """Returns the function; as in Keras None is the identity."""
    value = config.get(key, default)
    name = value.get("config") if isinstance(value, Mapping) else value
    name = "linear" if name is None else name
    if name == "hard_sigmoid" and version >= 3:
        return _hard_sigmoid_of_3
    functions = ACTIVATIONS | _MORE_ACTIVATIONS | {"hard_sigmoid": hard_sigmoid}
    if not isinstance(name, str) or name not in functions:
        raise ValueError(f"{key}={value!r} is not supported, it must be one of {', '.join(functions)}")
    return functions[name]


def _hard_sigmoid_of_3(x: Tensor) -> Tensor:
    # The gradient of torch's own hardsigmoid has 1/6 in float32, whatever the dtype.
    return F.relu6(x + 3) / 6


def _rate(config: Mapping[str, Any], key: str) -> float:
    """Returns a share to drop."""
    rate = float(config.get(key) or 0)
    if not 0 <= rate < 1:
        raise ValueError(f"{key} must be at least 0 and less than 1, got {rate}")
    return rate


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """Yields the weights in Keras's order."""
    if not isinstance(module, KerasRNN | KerasBidirectional):
        raise TypeError(f"module must be one of from_keras, got {type(module).__name__}")
    for cell in module.modules():
        if not isinstance(cell, KerasCell):
            continue
        for name in ("kernel", "recurrent_kernel", "bias"):
            weight = getattr(cell, name)
            if weight is None:
                continue
            if name not in cell._parameters and not is_parametrized(cell, name):
                raise ValueError(f"{name}: is made at each run, by a forward pre-hook: remove that first")
            yield weight
