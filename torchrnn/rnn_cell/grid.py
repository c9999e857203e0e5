"""The LSTMs of ``tf.contrib.rnn`` that run along the frequency axis as well as along time.

Their inputs [B, I] are cut along I into pieces of ``feature_size`` that start every ``frequency_skip``
features; letters besides: K pieces, S sides (frequency and time) with weights of their own, G gates.

One file for all three, which share their pieces; more than a third of it documents arguments.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrnn.rnn_cell.base import Initializer, Nest, RNNCell, Run, describe, loop, zeros


def _check_pieces(name: str, feature_size: int | None, frequency_skip: int | None) -> tuple[int, int]:
    """Returns both sizes; ValueError unless they are positive."""
    if not feature_size or not frequency_skip or min(feature_size, frequency_skip) < 1:
        raise ValueError(
            f"{name}: feature_size and frequency_skip must be at least 1, "
            f"got {feature_size} and {frequency_skip}"
        )
    return feature_size, frequency_skip


_WAY = "one product of the inputs of all steps, then step by step; no kernel runs along time and frequency"
"""How the cells run a sequence."""


class TimeFreqLSTMCell(RNNCell):
    """The time-frequency LSTM (Li, Mohamed, Zweig and Gong 2015): one LSTM over all pieces.

    For each piece x with its own c and m of the step before, and m_freq the m' of the piece before (0 at
    first): i, j, f, o = split([x, m, m_freq] @ W_0 + B), with W_I_diag * c added to i and W_F_diag * c to f;
    c' = sigmoid(f + forget_bias) * c + sigmoid(i) * tanh(j), clipped; o gets W_O_diag * c';
    m' = sigmoid(o) * tanh(c').

    The output [B, U*K] holds the m' of the K pieces, the state [B, 2*U*K] their c' and m' by turns, with
    K = (I - feature_size) // frequency_skip + 1. So the sizes are known once the cell is built: by ``build``
    or its first input. Before, they are those that TensorFlow declares, U and 2U, which are right for one
    piece.

    Args:
        num_units: U
        use_peepholes: Whether the gates see c.
        cell_clip: Bound on the size of c', also if 0; None for none.
        initializer: Of W_0 and peepholes: fills a tensor in place; glorot_uniform by default.
        num_unit_shards: Ignored.
        forget_bias: Added to f in every step; it is no part of the variable.
        feature_size: The size of a piece; required.
        frequency_skip: How many features after one piece the next one starts.
        reuse: Ignored.
        name: The variable scope, "time_freq_lstm_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: W_0 [feature_size + 2U, 4U], B [4U], W_F_diag, W_I_diag, W_O_diag [U].

    Raises:
        ValueError: If ``feature_size`` or ``frequency_skip`` is not positive.
    """

    scope = "time_freq_lstm_cell"
    W_0: nn.Parameter
    B: nn.Parameter
    W_F_diag: nn.Parameter
    W_I_diag: nn.Parameter
    W_O_diag: nn.Parameter

    def __init__(
        self,
        num_units: int,
        use_peepholes: bool = False,
        cell_clip: float | None = None,
        initializer: Initializer | None = None,
        num_unit_shards: int = 1,
        forget_bias: float = 1.0,
        feature_size: int | None = None,
        frequency_skip: int = 1,
        reuse: bool | None = None,
        *,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.num_units, self.use_peepholes = num_units, use_peepholes
        self.cell_clip, self.forget_bias = cell_clip, forget_bias
        self.feature_size, self.frequency_skip = _check_pieces(self.name, feature_size, frequency_skip)
        self._pieces = 1
        for variable in self.variable_shapes(0):
            self.add_variable(variable, zeros if variable == "B" else initializer)

    @property
    def state_size(self) -> int:
        """2*U*K; 2U before the cell is built."""
        return 2 * self.output_size

    @property
    def output_size(self) -> int:
        """U*K; U before the cell is built."""
        return self.num_units * self._pieces

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes, which are the same for all I."""
        units = self.num_units
        shapes: dict[str, tuple[int, ...]] = {
            "W_0": (self.feature_size + 2 * units, 4 * units),
            "B": (4 * units,),
        }
        return shapes | {f"W_{gate}_diag": (units,) for gate in "FIO"} if self.use_peepholes else shapes

    def build_own(self, size: int, dtype: torch.dtype | None, device: Any) -> None:
        """Creates the variables, and counts the pieces."""
        if size < self.feature_size:
            raise ValueError(
                f"{self.name}: inputs must have at least feature_size={self.feature_size} features, "
                f"got {size}"
            )
        super().build_own(size, dtype, device)
        self._pieces = (size - self.feature_size) // self.frequency_skip + 1

    def _project(self, inputs: Tensor) -> Tensor:
        """Returns what inputs [..., I] add to the gates of their pieces, [..., K, 4U]."""
        pieces = inputs.unfold(-1, self.feature_size, self.frequency_skip)
        return pieces @ self.W_0[: self.feature_size] + self.B

    def _checked(self, state: Tensor) -> Tensor:
        if state.size(-1) != self.state_size:
            raise ValueError(
                f"{self.name}: the state must be [B, {self.state_size}] for {self._pieces} pieces of "
                f"{self.num_units} units, got {list(state.shape)}"
            )
        return state

    def _step(self, gates: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        parts = state.unflatten(-1, (2 * self._pieces, self.num_units)).unbind(1)
        rows_time, rows_freq = self.W_0[self.feature_size :].chunk(2)
        gates = gates + torch.stack(parts[1::2], 1) @ rows_time
        m = torch.zeros_like(parts[0])
        new: list[Tensor] = []
        for k, old in enumerate(parts[::2]):
            i, j, f, o = (gates[:, k] + m @ rows_freq).chunk(4, -1)
            if self.use_peepholes:
                i, f = i + self.W_I_diag * old, f + self.W_F_diag * old
            c = torch.sigmoid(f + self.forget_bias) * old + torch.sigmoid(i) * torch.tanh(j)
            if self.cell_clip is not None:
                c = c.clamp(-self.cell_clip, self.cell_clip)
            if self.use_peepholes:
                o = o + self.W_O_diag * c
            m = torch.sigmoid(o) * torch.tanh(c)
            new += [c, m]
        return torch.cat(new[1::2], -1), torch.cat(new, -1)

    def call(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(the m' of all pieces, c' and m' of all pieces)``."""
        return self._step(self._project(inputs), self._checked(state))

    def unroll(self, inputs: Tensor, state: Tensor, run: Run) -> tuple[Nest, Nest]:
        """Runs a sequence: the products with the inputs over all steps at once, then the loop."""
        return loop(self._step, self._project(inputs), self._checked(state), run)

    def way(self) -> str:
        """Returns how a sequence runs."""
        return _WAY


# The named tuples of the states ---------------------------------------------------------------------------


# Each is made once, so that structures are equal; not by functools.cache, which torch.compile ignores.
_STATE_TUPLES: dict[tuple[Any, ...], Any] = {}


def _state_tuple(name: str, directions: tuple[str, ...], counts: tuple[int, ...]) -> Any:
    """Returns the class of a grid's state."""
    key = name, directions, counts
    if key not in _STATE_TUPLES:
        fields = [
            f"{direction}state_f{piece:02}_b{block:02}_{what}".replace("/", "_")
            for direction in directions
            for block, count in enumerate(counts)
            for piece in range(count)
            for what in "cm"
        ]
        make: Any = namedtuple
        made = _STATE_TUPLES[key] = make(name, fields)
        # The class stands in no module, where pickle would look for it.
        made.__reduce__ = lambda self: (_make_state, (key, tuple(self)))
    return _STATE_TUPLES[key]


def _make_state(key: tuple[Any, ...], values: tuple[Any, ...]) -> Any:
    return _state_tuple(*key)(*values)


class _Lane(NamedTuple):
    """The weights of one block in one direction; columns and S: the frequency side, then the time side."""

    x: Tensor  # [feature_size, S*G*U], what is applied to a piece
    m_time: Tensor  # [U, S*G*U], to m of the step before
    m_freq: Tensor  # [U, S*G*U], to m of the piece before
    bias: Tensor  # [S*G*U]
    peepholes: dict[str, Tensor]  # by gate, [2, S, U]: factors on c of frequency and of time


class GridLSTMCell(RNNCell):
    """The grid LSTM (Kalchbrenner et al. 2015, arXiv:1507.01526), as Sainath and Li (2016) have it.

    Pieces come in blocks with weights of their own. For each piece x, with c_t and m_t of the step before,
    and c_f and m_f of the piece before in the block (0 at first), both sides s = f, t have
    i, j, f, o = split([x, m_t, m_f] @ W_s_b_0 + B_s_b) and c_s' = sigmoid(f + forget_bias) * c_s +
    sigmoid(i) * tanh(j), clipped; m_s' = sigmoid(o) * tanh(c_s'). Peepholes add W_I_diag_freqf_b * c_f +
    W_I_diag_freqt_b * c_t to i of the frequency side, and so on; o sees the new c_f' and c_t'.

    The output [B, 2*U*K] holds m_t' and m_f' of all K pieces by turns. The state is a named tuple of
    c_t' and m_t' [B, U] of all pieces, with the fields ``state_f00_b00_c``, ``state_f00_b00_m`` for the first
    piece (f00) of the first block (b00), and so on.

    Args:
        num_units: U
        use_peepholes: Whether the gates see both c.
        share_time_frequency_weights: Whether the time side has the variables of the frequency side.
        cell_clip: Bound on the size of c_f' and c_t', also if 0; None for none.
        initializer: Of all variables but B: fills a tensor in place; glorot_uniform by default.
        num_unit_shards: Ignored.
        forget_bias: Added to f in every step; it is no part of the variable.
        feature_size: The size of a piece; required.
        frequency_skip: How many features after one piece the next one starts; required.
        num_frequency_blocks: A list of the numbers of pieces of the blocks; required.
        start_freqindex_list: The feature at which each block starts; by default there is one block, which
            starts at 0 and has as many pieces as the inputs have.
        end_freqindex_list: The feature before which each block ends, for which each must have as many pieces
            as there are from its start; None for no such check.
        couple_input_forget_gates: Whether there is no gate f, but 1 - sigmoid(i) in place of its sigmoid.
        state_is_tuple: Whether the state is the named tuple, else one tensor [B, 2*U*K] of its fields, where
            each block has its own part. (In TensorFlow all blocks read that of the first.)
        reuse: Ignored.
        name: The variable scope, "grid_lstm_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables of block b, for s = f, and also t unless shared, with G = 3 if coupled, else 4:
    W_s_b_0 [feature_size + 2U, G*U], B_s_b [G*U], and for peepholes W_{I,F,O}_diag_{freq,time}{f,t}_b [U].

    Raises:
        ValueError: If ``num_frequency_blocks`` is missing, or numbers do not fit each other.
    """

    scope = "grid_lstm_cell"
    _directions: tuple[str, ...] = ("",)
    _tuple_name = "GridLSTMStateTuple"

    def __init__(
        self,
        num_units: int,
        use_peepholes: bool = False,
        share_time_frequency_weights: bool = False,
        cell_clip: float | None = None,
        initializer: Initializer | None = None,
        num_unit_shards: int = 1,
        forget_bias: float = 1.0,
        feature_size: int | None = None,
        frequency_skip: int | None = None,
        num_frequency_blocks: Sequence[int] | None = None,
        start_freqindex_list: Sequence[int] | None = None,
        end_freqindex_list: Sequence[int] | None = None,
        couple_input_forget_gates: bool = False,
        state_is_tuple: bool = True,
        reuse: bool | None = None,
        *,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        if num_frequency_blocks is None:
            raise ValueError("Must specify num_frequency_blocks")
        self.num_units, self.use_peepholes = num_units, use_peepholes
        self.share_time_frequency_weights = share_time_frequency_weights
        self.couple_input_forget_gates = couple_input_forget_gates
        self.cell_clip, self.forget_bias = cell_clip, forget_bias
        self.state_is_tuple = state_is_tuple
        self.feature_size, self.frequency_skip = _check_pieces(self.name, feature_size, frequency_skip)
        self.num_frequency_blocks = [int(count) for count in num_frequency_blocks]
        self._fills_inputs = start_freqindex_list is None and end_freqindex_list is None
        self._starts = [0] if start_freqindex_list is None else list(start_freqindex_list)
        self._check_blocks(end_freqindex_list)
        self._key = self._tuple_name, self._directions, tuple(self.num_frequency_blocks)
        _state_tuple(*self._key)
        for variable in self.variable_shapes(0):
            bias = variable.rpartition("/")[2].startswith("B_")
            self.add_variable(variable, zeros if bias else initializer)

    def _check_blocks(self, ends: Sequence[int] | None) -> None:
        """Raises ValueError unless the numbers of pieces, starts and ends fit each other."""
        counts, starts = self.num_frequency_blocks, self._starts
        if not counts or min(counts) < 1:
            raise ValueError(f"{self.name}: num_frequency_blocks must be numbers of at least 1, got {counts}")
        if len(counts) != len(starts):
            raise ValueError(
                f"{self.name}: num_frequency_blocks and start_freqindex_list must have one number per block, "
                f"got {counts} and {starts}"
            )
        if min(starts) < 0:
            raise ValueError(f"{self.name}: start_freqindex_list must be at least 0, got {starts}")
        if ends is None:
            return
        if len(ends) != len(starts):
            raise ValueError(
                f"{self.name}: start_freqindex_list and end_freqindex_list must have one number per block, "
                f"got {starts} and {list(ends)}"
            )
        for count, start, end in zip(counts, starts, ends, strict=True):
            self._check_count(count, end - start)

    def _check_count(self, count: int, size: int) -> None:
        """Raises ValueError unless a range of features has this many pieces."""
        there = max(0, (size - self.feature_size) // self.frequency_skip + 1)
        if there != count:
            raise ValueError(
                f"Invalid num_frequency_blocks, requires {count} but gets {there} from {size} features with "
                f"feature_size={self.feature_size} and frequency_skip={self.frequency_skip}, please check "
                f"the input size and filter config are correct."
            )

    @property
    def state_tuple_type(self) -> Any:
        """The class of the named tuple of the state."""
        return _state_tuple(*self._key)

    @property
    def state_size(self) -> Nest:
        """The named tuple of U for every field, or 2*U*K."""
        if not self.state_is_tuple:
            return self.output_size
        return self.state_tuple_type._make([self.num_units] * self._fields)

    @property
    def output_size(self) -> int:
        """2*U*K, for the pieces of all blocks and directions."""
        return self.num_units * self._fields

    @property
    def _fields(self) -> int:
        """How many tensors the state has: c and m of each piece."""
        return 2 * sum(self.num_frequency_blocks) * len(self._directions)

    @property
    def _sides(self) -> dict[str, str]:
        """The sides that have variables: their letter and what the names of their peepholes say."""
        return {"f": "freq"} if self.share_time_frequency_weights else {"f": "freq", "t": "time"}

    @property
    def _gates(self) -> str:
        """The gates besides j."""
        return "IO" if self.couple_input_forget_gates else "FIO"

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes, which are the same for all I."""
        rows, columns = self.feature_size + 2 * self.num_units, (len(self._gates) + 1) * self.num_units
        shapes: dict[str, tuple[int, ...]] = {}
        for direction in self._directions:
            for block in range(len(self.num_frequency_blocks)):
                for side in self._sides:
                    shapes[f"{direction}W_{side}_{block}_0"] = (rows, columns)
                    shapes[f"{direction}B_{side}_{block}"] = (columns,)
                if self.use_peepholes:
                    shapes |= {
                        f"{direction}W_{gate}_diag_{side}{of}_{block}": (self.num_units,)
                        for side in self._sides.values()
                        for gate in self._gates
                        for of in "ft"
                    }
        return shapes

    def build_own(self, size: int, dtype: torch.dtype | None, device: Any) -> None:
        """Creates the variables, if the pieces lie within inputs of a size."""
        if self._fills_inputs:
            self._check_count(self.num_frequency_blocks[0], size)
        end = max(map(self._end, self._starts, self.num_frequency_blocks))
        if end > size:
            raise ValueError(f"{self.name}: the pieces need inputs of size {end}, got {size}")
        super().build_own(size, dtype, device)

    def _end(self, start: int, count: int) -> int:
        """Returns the feature before which the last piece ends."""
        return start + (count - 1) * self.frequency_skip + self.feature_size

    def _lanes(self) -> list[_Lane]:
        """Returns the weights by direction and block."""
        return [
            self._lane(direction, block)
            for direction in self._directions
            for block in range(len(self.num_frequency_blocks))
        ]

    def _lane(self, direction: str, block: int) -> _Lane:
        def of(name: str) -> Tensor:
            variable: Tensor = getattr(self, (direction + name).replace("/", "_"))
            return variable

        units, sides = self.num_units, self._sides
        weight = torch.cat([of(f"W_{side}_{block}_0") for side in sides], 1)
        x, m_time, m_freq = weight.split([self.feature_size, units, units])
        bias = torch.cat([of(f"B_{side}_{block}") for side in sides])
        peepholes = {
            gate: torch.stack(
                [
                    torch.stack([of(f"W_{gate}_diag_{side}{c}_{block}") for side in sides.values()])
                    for c in "ft"
                ]
            )
            for gate in (self._gates if self.use_peepholes else "")
        }
        return _Lane(x, m_time, m_freq, bias, peepholes)

    def _cut(self, inputs: Tensor) -> list[Tensor]:
        """Returns the pieces of inputs [..., I] by direction and block, [..., K, feature_size] each."""
        return [
            inputs[..., start : self._end(start, count)].unfold(-1, self.feature_size, self.frequency_skip)
            for start, count in zip(self._starts, self.num_frequency_blocks, strict=True)
        ]

    def _project(self, lanes: list[_Lane], inputs: Tensor) -> list[Tensor]:
        """Returns what inputs [..., I] add to the gates of their pieces, [..., K, S*G*U] by lane."""
        return [x @ lane.x + lane.bias for lane, x in zip(lanes, self._cut(inputs), strict=True)]

    def _step(self, lanes: list[_Lane], gates: list[Tensor], state: Nest) -> tuple[Tensor, Nest]:
        parts = self._split(state)
        outputs: list[Tensor] = []
        new: list[Tensor] = []
        for lane, each in zip(lanes, gates, strict=True):
            mine, parts = parts[: 2 * each.size(1)], parts[2 * each.size(1) :]
            for m_freq, c_time, m_time in self._walk(lane, each, mine[::2], mine[1::2]):
                outputs += [m_time, m_freq]
                new += [c_time, m_time]
        return torch.cat(outputs, -1), self._join(new)

    def _walk(
        self, lane: _Lane, gates: Tensor, c_time: list[Tensor], m_time: list[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields the new m_f, c_t and m_t of one piece of a lane after the other.

        Both sides go together, along axis 1: [B, 2, U], and [B, S, U] what weights give.
        """
        gates = gates + torch.stack(m_time, 1) @ lane.m_time

        def seen(gate: str, c: Tensor) -> Tensor | int:
            return (c.unsqueeze(2) * lane.peepholes[gate]).sum(1) if self.use_peepholes else 0

        c_freq = m_freq = torch.zeros_like(c_time[0])
        for k, c_old in enumerate(c_time):
            sums = gates[:, k] + m_freq @ lane.m_freq
            columns = sums.unflatten(-1, (len(self._sides), (len(self._gates) + 1) * self.num_units))
            i, j, *f, o = columns.chunk(len(self._gates) + 1, -1)
            c = torch.stack([c_freq, c_old], 1)
            i = torch.sigmoid(i + seen("I", c))
            keep = torch.sigmoid(f[0] + self.forget_bias + seen("F", c)) if f else 1 - i
            c = keep * c + i * torch.tanh(j)
            if self.cell_clip is not None:
                c = c.clamp(-self.cell_clip, self.cell_clip)
            m = torch.sigmoid(o + seen("O", c)) * torch.tanh(c)
            c_freq, m_freq = c[:, 0], m[:, 0]
            yield m_freq, c[:, 1], m[:, 1]

    def _split(self, state: Nest) -> list[Tensor]:
        """Returns c and m of all pieces, by turns."""
        size = self.output_size
        if not self.state_is_tuple:
            if not isinstance(state, Tensor) or state.size(-1) != size:
                raise ValueError(
                    f"Expected state to be a tensor [B, {size}], but received: {describe(state)}"
                )
            return list(state.unflatten(-1, (self._fields, self.num_units)).unbind(1))
        if not isinstance(state, tuple | list) or len(state) != self._fields:
            raise ValueError(
                f"Expected state to be a tuple of length {self._fields}, but received: {describe(state)}"
            )
        return list(state)

    def _join(self, parts: list[Tensor]) -> Nest:
        return self.state_tuple_type._make(parts) if self.state_is_tuple else torch.cat(parts, -1)

    def call(self, inputs: Tensor, state: Nest) -> tuple[Tensor, Nest]:
        """Returns ``(m_t' and m_f' of all pieces, c_t' and m_t' of all pieces)``."""
        lanes = self._lanes()
        return self._step(lanes, self._project(lanes, inputs), state)

    def unroll(self, inputs: Tensor, state: Nest, run: Run) -> tuple[Nest, Nest]:
        """Runs a sequence: the products with the inputs over all steps at once, then the loop."""
        lanes = self._lanes()
        return loop(partial(self._step, lanes), self._project(lanes, inputs), state, run)

    def way(self) -> str:
        """Returns how a sequence runs."""
        return _WAY


class BidirectionalGridLSTMCell(GridLSTMCell, keeps_unroll=True):
    """Two grid LSTMs, one along the pieces and one from the last piece of a block to the first.

    The output is that of both, [forward | backward], and so is the state, a named tuple whose fields start
    with ``fwd_`` and ``bwd_``; backwards, f00 is the last piece. See ``GridLSTMCell``.

    Args:
        num_units: As for ``GridLSTMCell``, and so up to ``couple_input_forget_gates``.
        use_peepholes: Likewise.
        share_time_frequency_weights: Likewise.
        cell_clip: Likewise.
        initializer: Likewise.
        num_unit_shards: Likewise.
        forget_bias: Likewise.
        feature_size: Likewise.
        frequency_skip: Likewise.
        num_frequency_blocks: Likewise.
        start_freqindex_list: Likewise.
        end_freqindex_list: Likewise.
        couple_input_forget_gates: Likewise.
        backward_slice_offset: How many features later the backward pieces start; past the inputs, and before
            them if it is negative, there are zeros.
        reuse: Ignored.
        name: The variable scope, "bidirectional_grid_lstm_cell" by default.
        dtype: The dtype of the variables; by default that of the first input.

    Variables: those of ``GridLSTMCell``, once below fwd/ and once below bwd/.
    """

    scope = "bidirectional_grid_lstm_cell"
    _directions = ("fwd/", "bwd/")
    _tuple_name = "BidirectionalGridLSTMStateTuple"

    def __init__(
        self,
        num_units: int,
        use_peepholes: bool = False,
        share_time_frequency_weights: bool = False,
        cell_clip: float | None = None,
        initializer: Initializer | None = None,
        num_unit_shards: int = 1,
        forget_bias: float = 1.0,
        feature_size: int | None = None,
        frequency_skip: int | None = None,
        num_frequency_blocks: Sequence[int] | None = None,
        start_freqindex_list: Sequence[int] | None = None,
        end_freqindex_list: Sequence[int] | None = None,
        couple_input_forget_gates: bool = False,
        backward_slice_offset: int = 0,
        reuse: bool | None = None,
        *,
        name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_units,
            use_peepholes,
            share_time_frequency_weights,
            cell_clip,
            initializer,
            num_unit_shards,
            forget_bias,
            feature_size,
            frequency_skip,
            num_frequency_blocks,
            start_freqindex_list,
            end_freqindex_list,
            couple_input_forget_gates,
            name=name,
            dtype=dtype,
        )
        self.backward_slice_offset = int(backward_slice_offset)

    def _cut(self, inputs: Tensor) -> list[Tensor]:
        later = max(self.backward_slice_offset, 0)
        earlier = max(-self.backward_slice_offset, 0)
        shifted = F.pad(inputs, (earlier, later))[..., later:]
        return super()._cut(inputs) + [pieces.flip(-2) for pieces in super()._cut(shifted)]
