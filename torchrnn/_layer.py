"""What the layers share: the ``torch.nn`` contract around one ``ops.layer`` call per layer.

Letters: T steps, B batch rows, L layers, D directions (1 or 2), I inputs, H hidden units, P projected
outputs, R = P if there is a projection, else H; N rows of a PackedSequence. Over 400 lines because torch.nn's
class has so many duties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from torchrnn import _dynamo, ops, recompute
from torchrnn._tools import script
from torchrnn.differentiable import plain
from torchrnn.options import Options
from torchrnn.prepacking import Packed, Prepackable, pack
from torchrnn.reference import Arguments, autocast_dtype, cast

OPTIONS = {
    "LSTM": Options(cell="lstm"),
    "GRU": Options(cell="gru"),
    "GRU_RESET_BEFORE": Options(cell="gru_reset_before"),
    "RNN_TANH": Options(cell="rnn"),
    "RNN_RELU": Options(cell="rnn", activation="relu"),
}

_SCALAR_TYPES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.bool: "Bool",
}


def scalar_type(dtype: torch.dtype) -> str:
    """Returns the name that ATen's error texts give a dtype."""
    return _SCALAR_TYPES.get(dtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class _Packing:
    """Where the rows of a PackedSequence stand in a padded one, whose columns are in the caller's order."""

    steps: int
    batch: int
    rows: Tensor  # [N]: the index into [T * B] of each packed row.
    lengths: Tensor  # [B]

    @classmethod
    def of(cls, packed: PackedSequence) -> _Packing:
        """Reads off the layout; B counts rows of length zero if ``sorted_indices`` names them."""
        data, sizes, order, inverse = packed
        batch = _batch_size(sizes, order)
        alive = torch.arange(batch, device=sizes.device) < sizes.unsqueeze(
            1
        )  # [T, B], columns in the order of falling length
        step, column = (index.to(data.device) for index in alive.nonzero(as_tuple=True))
        if step.numel() != data.size(0) or bool((sizes[1:] > sizes[:-1]).any()):
            raise RuntimeError(
                f"batch_sizes must not increase and must add up to the {data.size(0)} rows of data, "
                f"got {sizes.tolist()}"
            )
        lengths = alive.sum(0).to(data.device)
        if order is not None and inverse is not None:
            column, lengths = order[column], lengths[inverse]
        return cls(sizes.numel(), batch, step * batch + column, lengths)

    def pad(self, data: Tensor) -> Tensor:
        """Turns [N, F] into [T, B, F], zero where there is no row."""
        padded = data.new_zeros(self.steps * self.batch, data.size(1)).index_copy(0, self.rows, data)
        return padded.view(self.steps, self.batch, data.size(1))

    def unpad(self, padded: Tensor) -> Tensor:
        """Turns [T, B, F] into [N, F]."""
        return padded.flatten(0, 1).index_select(0, self.rows)


def _batch_size(sizes: Tensor, order: Tensor | None) -> int:
    if order is not None:
        return order.numel()
    if torch._C._get_tracing_state() is not None:
        end: Any = sizes[0]
        return torch.arange(end, device=sizes.device).size(0)  # Traces record a size, and keep a number.
    return int(sizes[0])


class Layer(Prepackable, nn.RNNBase):
    """What the three layers share: everything but the form of the state and the gates' options.

    The weights are read by name at every call, so replaced, reparametrized and computed ones are always seen
    (``functional_call``, ``parametrize``, ``weight_norm``, weight drop); ``_flat_weights`` is read likewise.
    """

    recompute: bool = False  # On the class: pickles of torch.nn layers do not have it.

    __prepare_scriptable__ = script.refuse

    def __init__(self, *args: Any, recompute: bool = False, **kwargs: Any) -> None:
        if not isinstance(recompute, bool):
            raise TypeError(f"recompute should be a bool, got: {type(recompute).__name__}")
        self.recompute = recompute
        super().__init__(*args, **kwargs)

    def extra_repr(self) -> str:
        """Returns the arguments that differ from their defaults."""
        return super().extra_repr() + (", recompute=True" if self.recompute else "")

    @property
    def _flat_weights(self) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: object) -> None:
        """Ignores what ``torch.nn.RNNBase`` would cache."""

    def _init_flat_weights(self) -> None:
        self._flat_weight_refs = []

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Does nothing: no kernel needs the weights in one block of memory."""

    def _pack(self) -> tuple[Packed | None, ...]:
        directions = 2 if self.bidirectional else 1
        count = directions * len(self._all_weights[0])
        weights = [self._parameters.get(name) for name in self._flat_weights_names]
        each = (weights[begin : begin + count] for begin in range(0, len(weights), count))
        return tuple(pack(own, self._options(), self.bias, self.proj_size > 0) for own in each)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.pop("_flat_weights", None)  # Of a torch.nn layer.
        self._init_flat_weights()

    def _options(self) -> Options:
        return OPTIONS[self.mode]

    def _states(self, hx: Any) -> tuple[Tensor, ...]:
        """Returns the initial states as a tuple, empty if there are none."""
        return () if hx is None else (hx,)

    def _hidden(self, states: Sequence[Tensor]) -> Any:
        """Returns states in the form that the caller has."""
        return states[0]

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """Runs the layers over a sequence.

        Args:
            input: [T, B, I], [B, T, I] if ``batch_first``, [T, I] without a batch, or a PackedSequence. The
                dtype of the weights: float32, float64, bfloat16 or float16.
            hx: The initial state, zeros by default: h [L*D, B, R], for an LSTM ``(h, c)`` with c
                [L*D, B, H]; without B for an unbatched input.
            lengths: How many steps of each row count, [B] integers in 0..T in any order; None for all. The
                rest is not read: outputs there are zero, and the final state is that of the last step that
                counts. For a batched tensor only.
            resets: Where to forget, [T, B] bool, [B, T] if ``batch_first`` and [T] without a batch; for a
                PackedSequence [T, B] in the caller's order of rows. No state crosses from step t-1 to a
                marked step t, in either direction. None for nowhere.

        Returns:
            ``(output, hx)``: [T, B, D*R] in the layout of ``input``, and the final state, formed as ``hx``.

        Raises:
            ValueError: If the rank or dtype of ``input`` does not fit, as in ``torch.nn``, or ``lengths`` or
                ``resets`` do not.
            RuntimeError: Where ``torch.nn`` raises it: if a size, or another rank, dtype or device does not
                fit, or if T is 0.
        """
        if lengths is None and resets is None and plain():
            results = self._infer(input, hx)
            if results is not None:
                return results
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError(f"{self._options().cell}: lengths must be None with a PackedSequence")
            return self._forward_packed(input, hx, resets)
        rank = input.dim()
        if rank not in (2, 3):
            name, noun = ("RNN", " tensor") if self.mode.startswith("RNN") else (self.mode, "")
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {rank}D{noun} instead")
        batched = rank == 3
        states = self._states(hx)
        x = input
        if states:
            self._check_ranks(states, rank)
        if not batched:
            x = input.unsqueeze(0 if self.batch_first else 1)
            states = tuple(state.unsqueeze(1) for state in states)
        self._check_args(x, states, None, x.size(0 if self.batch_first else 1))
        if lengths is not None:
            lengths = self._check_lengths(lengths, input)
        if resets is not None:
            resets = self._check_resets(resets, input)
        if self.batch_first:
            x = x.transpose(0, 1)
        y, states = self._run(x, states, lengths, resets, None)
        if not batched:
            return y.squeeze(1), self._hidden([state.squeeze(1) for state in states])
        return y.transpose(0, 1) if self.batch_first else y, self._hidden(states)

    def _infer(self, input: Any, hx: Any) -> tuple[Tensor, Any] | None:
        """The short way of a plain inference call: it looks at types only, and leaves the rest to the op.

        Returns None for what is not as simple as that, mistakes too: then ``forward`` has to look closer.
        """
        h0, c0 = hx, None
        if self.mode == "LSTM" and hx is not None:
            if type(hx) is not tuple or len(hx) != 2 or hx[0] is None or hx[1] is None:
                return None
            h0, c0 = hx
        get = self._parameters.get
        weights = [get(name) for name in self._flat_weights_names]
        if not ops.infers(input, weights, h0, c0) or input.dim() != 3 or (self.training and self.dropout):
            return None
        x = input.transpose(0, 1) if self.batch_first else input
        rest = *self._options().codes, self.bias, self.proj_size > 0
        finals = []
        try:
            if self.num_layers == 1:
                x, *states = ops.infer(x, weights, (h0, c0), rest, (*self._prepacked, None)[0])
                finals.append(states)
            else:
                directions = 2 if self.bidirectional else 1
                count = directions * len(self._all_weights[0])
                for state in (h0, c0):
                    if state is not None and state.size(0) != self.num_layers * directions:
                        return None
                for layer, packed in enumerate(self._prepacked or [None] * self.num_layers):
                    rows = slice(layer * directions, (layer + 1) * directions)
                    first = [None if state is None else state[rows] for state in (h0, c0)]
                    own = weights[layer * count : (layer + 1) * count]
                    x, *states = ops.infer(x, own, first, rest, packed)
                    finals.append(states)
        except RuntimeError:
            return None
        y = x.transpose(0, 1) if self.batch_first else x
        return y, self._hidden(self._stacked(finals))

    def _forward_packed(
        self, packed: PackedSequence, hx: Any, resets: Tensor | None
    ) -> tuple[PackedSequence, Any]:
        data, sizes, order, inverse = packed
        batch = _batch_size(sizes, order)
        states = self._states(hx)
        for i, state in enumerate(states):
            if not isinstance(state, Tensor):
                raise TypeError(
                    f"expected Tensor as element {i} in argument 2, but got {type(state).__name__}"
                )
        if order is not None and any(state.dim() != 3 or state.size(1) != batch for state in states):
            # torch.nn takes the rows that sorted_indices names from whatever it is given.
            states = tuple(state.index_select(1, order)[:, inverse] for state in states)
        self._check_args(data, states, sizes, batch)
        packing = _Packing.of(packed)
        y, states = self._run(packing.pad(data), states, packing.lengths, resets, packing)
        return PackedSequence(packing.unpad(y), sizes, order, inverse), self._hidden(states)

    def _run(
        self,
        x: Tensor,
        states: Sequence[Tensor],
        lengths: Tensor | None,
        resets: Tensor | None,
        packing: _Packing | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Runs all layers on x [T, B, I]; returns the last one's output [T, B, D*R] and all final states."""
        options = self._options()
        directions = 2 if self.bidirectional else 1
        finals = []
        state_dtype = (states[0] if states else x).dtype if self._keeps_states(x, packing) else None
        for layer in range(self.num_layers):
            if layer and self.training and self.dropout != 0:
                x = self._drop(x, packing)
            rows = slice(layer * directions, (layer + 1) * directions)
            first = states if self.num_layers == 1 else [state[rows] for state in states]
            h0, c0 = (*first, None, None)[:2]
            weights = [self._named(names) for names in self._all_weights[rows]]
            w_ih, w_hh, *rest = [[*both] for both in zip(*weights, strict=True)]
            b_ih, b_hh = rest[:2] if self.bias else ([], [])
            w_hr = rest[-1] if self.proj_size > 0 else []
            a = Arguments(x, w_ih, w_hh, b_ih, b_hh, w_hr, h0=h0, c0=c0, lengths=lengths, resets=resets)
            try:
                packed = self._prepacked[layer] if self._prepacked else None
                if self.recompute and packed is None:
                    x, _, h_n, c_n = recompute.layer(a, options, state_dtype=state_dtype)
                else:
                    x, _, h_n, c_n = ops.layer(a, options, packed=packed, state_dtype=state_dtype)
            except ValueError:
                problem = _torch_problem(a)
                if problem is None:
                    raise
                raise RuntimeError(problem) from None
            if self.proj_size > 0 and (dtype := autocast_dtype(x.device.type)) is not None:
                x, h_n = cast([x, h_n], dtype)  # The product with weight_hr is autocast's.
            finals.append((h_n, c_n))
        return x.clone() if self._reads_copy(x, packing) else x, self._stacked(finals)

    def _keeps_states(self, x: Tensor, packing: _Packing | None) -> bool:
        """Whether autocast leaves the states in their own dtype, as those of ``torch.nn``.

        An LSTM's are rounded where oneDNN runs it, and those of an RNN everywhere.
        """
        if self.mode != "LSTM":
            return self.mode == "GRU"
        is_trained_in_half = x.dtype == torch.float16 and torch.is_grad_enabled()
        return self.proj_size > 0 or packing is not None or is_trained_in_half

    def _reads_copy(self, y: Tensor, packing: _Packing | None) -> bool:
        """Whether the caller gets a copy of y, which backward will read, and may write to it.

        Which is so where ``torch.nn`` lets him: it keeps the output itself only where oneDNN trains the LSTM,
        in one direction.
        """
        if self.mode != "LSTM" or self.recompute or packing is not None:
            return False
        if torch.compiler.is_compiling():  # Compilers write to nothing in place.
            return False
        if not self.bidirectional and self.proj_size == 0 and y.dtype in (torch.float32, torch.bfloat16):
            return False
        return y.requires_grad or torch._C._get_tracing_state() is not None  # A trace is for all grad modes.

    def _stacked(self, finals: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """Returns the final states of all layers, from ``(h_n, c_n)`` of each."""
        used = finals if self.mode == "LSTM" else [final[:1] for final in finals]
        if len(used) == 1:
            return tuple(used[0])
        return tuple(torch.cat(state) for state in zip(*used, strict=True))

    def _named(self, names: Sequence[str]) -> list[Tensor]:
        """Returns weights by name; a parameter without the detour that attributes of a module take."""
        parameters = self._parameters
        return [w if (w := parameters.get(name)) is not None else getattr(self, name) for name in names]

    def _drop(self, x: Tensor, packing: _Packing | None) -> Tensor:
        if packing is None:
            return torch.dropout(x, self.dropout, True)
        # Draws for the packed rows only, as torch.nn does, so that a seed gives the same masks.
        return packing.pad(torch.dropout(packing.unpad(x), self.dropout, True))

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raises what ``torch.nn`` raises for an input of wrong rank, size or dtype."""
        weight = getattr(self, self._flat_weights_names[0])
        rank = 3 if batch_sizes is None else 2
        if input.dtype != weight.dtype or input.dim() != rank or input.size(-1) != self.input_size:
            super().check_input(input, batch_sizes)

    def _check_args(
        self, input: Tensor, states: Sequence[Tensor], batch_sizes: Tensor | None, batch: int
    ) -> None:
        """Raises what ``torch.nn`` raises for input and states; its own slower checks find the words."""
        self.check_input(input, batch_sizes)
        rows = self.num_layers * (2 if self.bidirectional else 1)
        outputs = self.proj_size or self.hidden_size
        for state, size in zip(states, (outputs, self.hidden_size), strict=False):
            if state.shape != (rows, batch, size):
                sizes = None if batch_sizes is None else batch_sizes.new_tensor([batch])
                self.check_forward_args(input, self._hidden(states), sizes)

    def _check_ranks(self, states: Sequence[Tensor], rank: int) -> None:
        ranks = [state.dim() for state in states]
        if all(r == rank for r in ranks):
            return
        kind = "batched" if rank == 3 else "unbatched"
        names, got = "hx", f"{ranks[0]}-D tensor"
        if len(ranks) == 2:
            names, got = "hx and cx", f"({ranks[0]}-D, {ranks[1]}-D) tensors"
        raise RuntimeError(f"For {kind} {rank}-D input, {names} should also be {rank}-D but got {got}")

    def _check_lengths(self, lengths: Tensor | Sequence[int], input: Tensor) -> Tensor:
        """Returns lengths as a tensor; its size and values are checked in ``ops``."""
        if input.dim() != 3:
            raise ValueError(
                f"{self._options().cell}: lengths must come with a batched input, got {list(input.shape)}"
            )
        if isinstance(lengths, Tensor):
            return lengths
        # On the CPU whatever the default device: there their values can be checked.
        return torch.tensor(lengths, dtype=None if len(lengths) else torch.int64, device="cpu")

    def _check_resets(self, resets: Tensor, input: Tensor) -> Tensor:
        """Returns resets as [T, B]; the dtype is checked in ``ops``."""
        name, shape = self._options().cell, input.shape[:-1]
        if not isinstance(resets, Tensor):
            raise TypeError(f"{name}: resets must be a tensor, got {type(resets).__name__}")
        if resets.shape != shape:
            letters = "T" if len(shape) == 1 else "BT" if self.batch_first else "TB"
            sizes = ", ".join(f"{letter}={size}" for letter, size in zip(letters, shape, strict=True))
            raise ValueError(
                f"{name}: resets must be [{', '.join(letters)}] with {sizes}, got {list(resets.shape)}"
            )
        if input.dim() == 2:
            return resets.unsqueeze(1)
        return resets.transpose(0, 1) if self.batch_first else resets


def dtypes_differ(a: Tensor, b: Tensor) -> bool:
    """Whether dtypes differ, also after autocast, which leaves float64 as it is."""
    return a.dtype != b.dtype and (
        not torch._C._is_any_autocast_enabled() or torch.float64 in (a.dtype, b.dtype)
    )


def _torch_problem(a: Arguments) -> str | None:
    """Returns ATen's text for the mistakes that it finds in these arguments, None if it would run them."""
    if a.x.size(0) == 0:
        return "Expected sequence length to be larger than 0 in RNN"
    hidden = [("hidden", state) for state in (a.h0, a.c0) if state is not None]
    weights = (a.weight_ih, a.weight_hh, a.bias_ih, a.bias_hh, a.weight_hr)
    for kind, tensor in [*hidden, *(("parameter", weight) for both in weights for weight in both)]:
        if tensor.device != a.x.device:
            found = f"found input tensor at {a.x.device} and {kind} tensor at {tensor.device}"
            return f"Input and {kind} tensors are not at the same device, {found}"
        if dtypes_differ(tensor, a.x):
            types = scalar_type(a.x.dtype), scalar_type(tensor.dtype)
            found = f"found input tensor with {types[0]} and {kind} tensor with {types[1]}"
            return f"Input and {kind} tensors are not the same dtype, {found}"
    return None


_dynamo.allow(Layer)
