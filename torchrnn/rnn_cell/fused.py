"""The callables of ``tf.contrib.rnn`` that run a whole time-major sequence at once, and what makes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# The module and not its names: each of both imports the other.
from torchrnn import unroll
from torchrnn.rnn_cell.base import Nest, RNNCell, assert_cell, build_cell
from torchrnn.rnn_cell.block import LSTMBlockCell

Lengths = Tensor | Sequence[int] | None


class FusedRNNCell(nn.Module):
    """The base: what is called as ``fused(inputs, initial_state, dtype, sequence_length)``.

    It is no ``RNNCell``: the unrolling functions do not take it.
    """

    def forward(
        self,
        inputs: Nest,
        initial_state: Nest = None,
        dtype: torch.dtype | None = None,
        sequence_length: Lengths = None,
        scope: object = None,
    ) -> tuple[Nest, Nest]:
        """Runs a sequence.

        Args:
            inputs: [T, B, I], or a list of T tensors [B, I].
            initial_state: As the cell's state; None for zeros of ``dtype``.
            dtype: The dtype of the zero state; required without ``initial_state``.
            sequence_length: [B] integers: how many steps of each row count; None for all.
            scope: Ignored.

        Returns:
            ``(outputs, state)``: a tensor [T, B, ...] or a list like the inputs, zero past a row's length,
            and the state after the last step that counts.
        """
        return self.run(inputs, initial_state, dtype, sequence_length)

    def run(
        self, inputs: Nest, state: Nest, dtype: torch.dtype | None, lengths: Lengths
    ) -> tuple[Nest, Nest]:
        """Does what ``forward`` does; to be defined by a subclass."""
        raise NotImplementedError(f"{type(self).__name__} must define run")

    def inner_cells(self) -> Sequence[tuple[str, nn.Module]]:
        """Returns the cell inside after its scope, as ``RNNCell.inner_cells``."""
        return []

    def tf_names(self, repeats: bool = False) -> Iterator[tuple[str, nn.Module, str]]:
        """Yields TensorFlow's name, the owner and the attribute of every variable, as ``RNNCell`` does."""
        for scope, cell in self.inner_cells():
            if isinstance(cell, RNNCell | FusedRNNCell):
                for name, owner, attribute in cell.tf_names(repeats):
                    yield scope + name, owner, attribute

    def build(
        self, input_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        """Creates the variables for I inputs; as ``RNNCell.build``."""
        for _, cell in self.inner_cells():
            if isinstance(cell, FusedRNNCell):
                cell.build(input_size, dtype, device)
            else:
                build_cell(cell, input_size, dtype, device)


class FusedRNNCellAdaptor(FusedRNNCell):
    """Runs a cell over a time-major sequence: ``dynamic_rnn``, or for a list ``static_rnn``.

    Args:
        cell: An ``RNNCell``, or any object with its protocol.
        use_dynamic_rnn: Ignored: both functions compute the same.

    Raises:
        TypeError: If ``cell`` is no cell.
    """

    def __init__(self, cell: Any, use_dynamic_rnn: bool = False) -> None:
        super().__init__()
        assert_cell(cell)
        self.cell = cell

    def inner_cells(self) -> Sequence[tuple[str, nn.Module]]:
        """Returns the cell."""
        return [("", self.cell)]

    def run(
        self, inputs: Nest, state: Nest, dtype: torch.dtype | None, lengths: Lengths
    ) -> tuple[Nest, Nest]:
        """Runs a sequence; see ``FusedRNNCell.forward``.

        Raises:
            ValueError: As the function that runs it.
            TypeError: Likewise.
        """
        if isinstance(inputs, list):
            return unroll.static_rnn(self.cell, inputs, state, dtype, lengths)
        return unroll.dynamic_rnn(self.cell, inputs, lengths, state, dtype, time_major=True)


class LSTMBlockFusedCell(FusedRNNCellAdaptor):
    """``LSTMBlockCell`` over a whole time-major sequence.

    Args:
        num_units: U
        forget_bias: Added to f in every step; it is no part of the variable.
        cell_clip: Bound on the size of c', if it is more than 0, which gradients ignore; None for none.
        use_peephole: Whether the gates see c.
        reuse: Ignored.
        dtype: The dtype of the variables; by default that of the first input.
        name: The variable scope.

    Variables, held by the attribute ``cell``: kernel [I+U, 4U], bias [4U], w_i_diag, w_f_diag, w_o_diag [U].
    """

    def __init__(
        self,
        num_units: int,
        forget_bias: float = 1.0,
        cell_clip: float | None = None,
        use_peephole: bool = False,
        reuse: bool | None = None,
        dtype: torch.dtype | None = None,
        name: str = "lstm_fused_cell",
    ) -> None:
        super().__init__(LSTMBlockCell(num_units, forget_bias, cell_clip, use_peephole, dtype, name=name))

    @property
    def num_units(self) -> int:
        """The number of units U."""
        units: int = self.cell.num_units
        return units

    def run(
        self, inputs: Nest, state: Nest, dtype: torch.dtype | None, lengths: Lengths
    ) -> tuple[Nest, Nest]:
        """Runs a sequence; see ``FusedRNNCell.forward``.

        Raises:
            ValueError: If there is neither a state nor a dtype, the state is no pair (c, h), or a shape does
                not fit.
            TypeError: If inputs and state differ in dtype.
        """
        if state is None and dtype is None:
            raise ValueError("Either initial_state or dtype needs to be specified")
        if state is not None and len(state) != 2:
            raise ValueError("Expecting initial_state to be a tuple with length 2 or None")
        return super().run(inputs, state, dtype, lengths)


class TimeReversedFusedRNN(FusedRNNCell):
    """Runs a fused cell from the last step to the first, and returns its outputs in the order of the inputs.

    A tensor is reversed within the length of each row. A list is reversed whole, whatever the lengths, as in
    TensorFlow: rows that are shorter then start with what follows their end.

    Args:
        cell: A ``FusedRNNCell``, or a callable with the arguments of its ``forward``.

    Raises:
        TypeError: If ``cell`` is not callable.
    """

    def __init__(self, cell: Any) -> None:
        super().__init__()
        if not callable(cell):
            raise TypeError(f"cell must be callable, got {type(cell).__name__}")
        self.cell = cell

    def inner_cells(self) -> Sequence[tuple[str, nn.Module]]:
        """Returns the fused cell."""
        return [("", self.cell)]

    def run(
        self, inputs: Nest, state: Nest, dtype: torch.dtype | None, lengths: Lengths
    ) -> tuple[Nest, Nest]:
        """Runs a sequence; see ``FusedRNNCell.forward``.

        Raises:
            ValueError: As the fused cell, and if a length is not in 0..T.
        """
        x = _reversed(inputs, lengths)
        outputs, final = self.cell(x, initial_state=state, dtype=dtype, sequence_length=lengths)
        return _reversed(outputs, lengths), final


def _reversed(sequence: Nest, lengths: Lengths) -> Nest:
    """Reverses a list, or tensors [T, B, ...] within the lengths of their rows."""
    if isinstance(sequence, list):
        return sequence[::-1]
    return pytree.tree_map(lambda x: _reversed_rows(x, lengths), sequence)


def _reversed_rows(x: Tensor, lengths: Lengths) -> Tensor:
    steps, batch = x.shape[:2]
    unroll.check_range(lengths, steps)
    ends = unroll.row_lengths(lengths, steps, batch, x.device)
    if ends is None:
        return x.flip(0)
    time = torch.arange(steps, device=x.device)[:, None]
    source = torch.where(time < ends, ends - 1 - time, time)  # Padding stays where it is.
    return x[source, torch.arange(batch, device=x.device)]
