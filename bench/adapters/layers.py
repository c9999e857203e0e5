"""Layers of torch.nn and those with its interface."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bench.adapters.problem import Kind, Problem, Run, make_call, make_layer, make_run
from bench.cases import STEP_GATES, Case

Forward = Callable[[nn.Module, Tensor, Any, Tensor | None], tuple[Tensor, Any]]
Layers = dict[str, Kind]


def packed_forward(layer: nn.Module, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
    """Calls a layer of torch.nn, in a ragged case with the packing that its user has to do."""
    if lengths is None:
        y, final = layer(x, state)
        return y, final
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, final = layer(packed, state)
    return pad_packed_sequence(y, total_length=x.size(0))[0], final


def lengths_forward(layer: nn.Module, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
    """Calls a layer of torchrnn."""
    y, final = layer(x, state) if lengths is None else layer(x, state, lengths=lengths)
    return y, final


class TorchLayer:
    """A layer with the interface of torch.nn.

    Args:
        name: Of the peer, in the results.
        layers: Cell -> class.
        forward: Calls a layer with input, state and lengths.
        dtype: What to compute in; by default the dtype of the case.
        dtypes: Which cases to run, by their dtype; by default all.
        options: Further arguments of the classes.
    """

    own_threads = False

    def __init__(
        self,
        name: str,
        layers: Layers,
        forward: Forward,
        *,
        dtype: torch.dtype | None = None,
        dtypes: Collection[str] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.layers, self.forward = name, layers, forward
        self.dtype, self.dtypes, self.options = dtype, dtypes, options or {}

    def available(self) -> str | None:
        return None

    def supports(self, case: Case) -> bool:
        return case.cell in self.layers and (self.dtypes is None or case.dtype in self.dtypes)

    def make(self, problem: Problem, dtype: torch.dtype) -> nn.Module:
        """Returns the layer as it is called."""
        case = problem.case
        options = {"dtype": dtype, "device": problem.x.device, **self.options}
        layer = make_layer(self.layers[case.cell], case, **options)
        layer.load_state_dict(problem.weights)
        # cuDNN keeps what backward needs in training, gradients or not.
        return layer.train(case.mode in ("train", "grad"))

    def prepare(self, problem: Problem) -> Run:
        case = problem.case
        dtype = self.dtype or problem.x.dtype
        layer = self.make(problem, dtype)
        parameters: list[Tensor] = list(layer.parameters())
        x, dy = problem.x.to(dtype, copy=True), problem.dy.to(dtype)
        states = [part.to(dtype) for part in problem.state]
        if case.cell in STEP_GATES:
            states = [part[0] for part in states]
        state = None if not states else tuple(states) if case.cell.startswith("lstm") else states[0]
        if case.bare:
            return make_call(case, layer, x, state)

        def forward() -> list[Tensor]:
            y, final = self.forward(layer, x, state, problem.lengths)
            return [y, *(final if isinstance(final, tuple) else (final,))]

        return make_run(case, forward, x, parameters, dy)
