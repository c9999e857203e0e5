"""The convolutional LSTMs of ``tf.contrib.rnn``, over one, two or three axes of space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrnn.rnn_cell.base import LSTMStateTuple, Nest, RNNCell, Run, loop, split_state

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvLSTMCell(RNNCell):
    """The LSTM whose products are convolutions (Shi et al. 2015, arXiv:1506.04214), without peepholes.

    i, j, f, o = split([x, h] * kernel + biases), where * is a convolution over the axes of space that keeps
    their sizes (an even kernel sees one more at the end) and [x, h] and the split go along the channels.
    c' = sigmoid(f + forget_bias) * c + sigmoid(i) * tanh(j); h' = tanh(c') * sigmoid(o).

    Inputs are channels last, [B, *space, C]; output, c and h are [B, *space, D] with D output channels.

    Args:
        conv_ndims: The number of axes of space: 1, 2 or 3.
        input_shape: [*space, C]
        output_channels: D
        kernel_shape: The kernel's sizes, one per axis of space.
        use_bias: Whether there are ``biases``.
        skip_connection: Must be False. In TensorFlow, True puts the inputs into h, which then fits neither
            the kernel nor the state.
        forget_bias: Added to f in every step; it is no part of the variable.
        initializers: Ignored, as in TensorFlow.
        name: The variable scope, "conv_lstm_cell" by default, and "conv_2d_lstm_cell" of two axes, say.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: kernel [*kernel_shape, C + D, 4D], biases [4D].

    Raises:
        ValueError: If the shapes do not have ``conv_ndims`` axes of space, a size is not positive, or
            ``skip_connection`` is asked for.
    """

    scope = "conv_lstm_cell"
    kernel: nn.Parameter
    biases: nn.Parameter

    def __init__(
        self,
        conv_ndims: int,
        input_shape: Sequence[int],
        output_channels: int,
        kernel_shape: Sequence[int],
        use_bias: bool = True,
        skip_connection: bool = False,
        forget_bias: float = 1.0,
        initializers: object = None,
        name: str | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        if conv_ndims not in _CONVOLUTIONS:
            raise ValueError(f"{self.name}: conv_ndims must be 1, 2 or 3, got {conv_ndims}")
        if len(input_shape) != conv_ndims + 1:
            raise ValueError(f"Invalid input_shape {input_shape} for conv_ndims={conv_ndims}.")
        if len(kernel_shape) != conv_ndims:
            raise ValueError(f"Invalid kernel_shape {kernel_shape} for conv_ndims={conv_ndims}.")
        if min(output_channels, *input_shape, *kernel_shape) < 1:
            raise ValueError(
                f"{self.name}: sizes must be at least 1, got input_shape {input_shape}, "
                f"output_channels {output_channels}, kernel_shape {kernel_shape}"
            )
        if skip_connection:
            raise ValueError(
                f"{self.name}: skip_connection=True is not supported: in TensorFlow it puts the inputs into "
                "h, which then does not fit the kernel; concatenate inputs and outputs outside the cell"
            )
        self.input_shape, self.kernel_shape = torch.Size(input_shape), torch.Size(kernel_shape)
        self.output_channels, self.forget_bias = output_channels, forget_bias
        self.add_variable("kernel")
        if use_bias:
            self.add_variable("biases")
        self.use_bias = use_bias

    @property
    def output_size(self) -> torch.Size:
        """The shape [*space, D]."""
        return torch.Size([*self.input_shape[:-1], self.output_channels])

    @property
    def state_size(self) -> LSTMStateTuple:
        """``LSTMStateTuple`` of two shapes [*space, D]."""
        return LSTMStateTuple(self.output_size, self.output_size)

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes for C input channels."""
        depth, gates = input_size + self.output_channels, 4 * self.output_channels
        shapes: dict[str, tuple[int, ...]] = {"kernel": (*self.kernel_shape, depth, gates)}
        return shapes | {"biases": (gates,)} if self.use_bias else shapes

    def build_own(self, size: int, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        """Creates the variables for the channels of ``input_shape``."""
        if size != self.input_shape[-1]:
            raise ValueError(
                f"{self.name}: inputs must have the {self.input_shape[-1]} channels of "
                f"input_shape {list(self.input_shape)}, got {size}"
            )
        super().build_own(size, dtype, device)

    def input_size_of(self, inputs: Nest) -> int:
        """Returns C of inputs [B, *space, C]."""
        self.check_inputs(inputs)
        return super().input_size_of(inputs)

    def check_inputs(self, inputs: Nest) -> None:
        """Raises TypeError unless the inputs are a tensor, and ValueError unless it has ``input_shape``."""
        if not isinstance(inputs, Tensor):
            raise TypeError(f"{self.name}: inputs must be a tensor, got {type(inputs).__name__}")
        if inputs.shape[1:] != self.input_shape:
            raise ValueError(
                f"Input 0 of layer {self.name} is incompatible with the layer: expected "
                f"[B, {', '.join(map(str, self.input_shape))}], found {list(inputs.shape)}"
            )

    def _convolve(self, x: Tensor, kernel: Tensor, biases: Tensor | None = None) -> Tensor:
        """Returns the convolution [B, *space, 4D] of x [B, *space, K] and a kernel [*kernel_shape, K, 4D]."""
        x = x.movedim(-1, 1)
        if any(size % 2 == 0 for size in self.kernel_shape):
            # Last axis first, as F.pad has them.
            x = F.pad(x, [pad for size in reversed(self.kernel_shape) for pad in (0, (size - 1) % 2)])
        padding = [(size - 1) // 2 for size in self.kernel_shape]
        convolution = _CONVOLUTIONS[len(self.kernel_shape)]
        return convolution(x, kernel.movedim((-1, -2), (0, 1)), biases, padding=padding).movedim(1, -1)

    def _update(self, gates: Tensor, c: Tensor) -> tuple[Tensor, LSTMStateTuple]:
        i, j, f, o = gates.chunk(4, -1)
        c = torch.sigmoid(f + self.forget_bias) * c + torch.sigmoid(i) * torch.tanh(j)
        h = torch.tanh(c) * torch.sigmoid(o)
        return h, LSTMStateTuple(c, h)

    def call(self, inputs: Tensor, state: Nest) -> tuple[Tensor, LSTMStateTuple]:
        """Returns ``(h', (c', h'))``."""
        c, h = split_state(state, self.output_channels, True)
        biases = self.biases if self.use_bias else None
        return self._update(self._convolve(torch.cat([inputs, h], -1), self.kernel, biases), c)

    def unroll(self, inputs: Tensor, state: Nest, run: Run) -> tuple[Nest, Nest]:
        """Runs a sequence: the input's half of the convolution over all steps at once, then the loop."""
        # A convolution is linear in its input channels.
        kernel_x, kernel_h = self.kernel.split([self.input_shape[-1], self.output_channels], -2)
        biases = self.biases if self.use_bias else None
        gates = self._convolve(inputs.flatten(0, 1), kernel_x, biases).unflatten(0, inputs.shape[:2])

        def step(gates: Tensor, state: Nest) -> tuple[Tensor, LSTMStateTuple]:
            c, h = split_state(state, self.output_channels, True)
            return self._update(gates + self._convolve(h, kernel_h), c)

        return loop(step, gates, state, run)

    def way(self) -> str:
        """Returns how a sequence runs."""
        return "one convolution of the inputs of all steps, then step by step; no kernel convolves the state"

    def describe(self) -> str:
        """Returns the class with its sizes."""
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """Returns the sizes."""
        return f"{list(self.input_shape)}, {self.output_channels}, {list(self.kernel_shape)}"


class _ConvLSTMCell(ConvLSTMCell):
    """``ConvLSTMCell`` of a class whose name says the number of axes."""

    conv_ndims: ClassVar[int]

    def __init__(
        self,
        input_shape: Sequence[int],
        output_channels: int,
        kernel_shape: Sequence[int],
        use_bias: bool = True,
        skip_connection: bool = False,
        forget_bias: float = 1.0,
        initializers: object = None,
        name: str | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            self.conv_ndims,
            input_shape,
            output_channels,
            kernel_shape,
            use_bias,
            skip_connection,
            forget_bias,
            initializers,
            name,
            dtype=dtype,
        )


class Conv1DLSTMCell(_ConvLSTMCell):
    """``ConvLSTMCell`` over inputs [B, W, C]; takes its arguments, without ``conv_ndims``."""

    scope = "conv_1d_lstm_cell"
    conv_ndims = 1


class Conv2DLSTMCell(_ConvLSTMCell):
    """``ConvLSTMCell`` over inputs [B, H, W, C]; takes its arguments, without ``conv_ndims``."""

    scope = "conv_2d_lstm_cell"
    conv_ndims = 2


class Conv3DLSTMCell(_ConvLSTMCell):
    """``ConvLSTMCell`` over inputs [B, D, H, W, C]; takes its arguments, without ``conv_ndims``."""

    scope = "conv_3d_lstm_cell"
    conv_ndims = 3
