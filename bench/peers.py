"""What is measured against what: adapters that make a library run a case.

A peer has a ``name``, says by ``supports`` which cases it can run, and returns from ``prepare`` a function of
no arguments that runs the case once and returns all that it computed, in the order of ``TorchLayer``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

import torchrnn
from bench.cases import Case

Run = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Problem:
    """The tensors of a case, equal for all peers."""

    case: Case
    x: Tensor  # [T, B, I]
    dy: Tensor  # [T, B, H], the gradient of the output in training.
    weights: dict[str, Tensor]  # With the names and layout of torch.nn.


def make_problem(case: Case) -> Problem:
    """Returns the tensors of a case, the same ones at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = {"lstm": nn.LSTM, "gru": nn.GRU}[case.cell](case.inputs, case.hidden)
        x = torch.randn(case.steps, case.batch, case.inputs)
        dy = torch.randn(case.steps, case.batch, case.hidden)
    return Problem(case, x, dy, layer.state_dict())


class Peer(Protocol):
    name: str

    def supports(self, case: Case) -> bool: ...

    def prepare(self, problem: Problem) -> Run: ...


class TorchLayer:
    """A layer like those of torch.nn: returns output, the final states and, in training, all gradients."""

    def __init__(
        self, name: str, layers: dict[str, type[nn.RNNBase]], dtype: torch.dtype = torch.float32
    ) -> None:
        self.name, self.layers, self.dtype = name, layers, dtype

    def supports(self, case: Case) -> bool:
        return case.cell in self.layers

    def prepare(self, problem: Problem) -> Run:
        case = problem.case
        layer = self.layers[case.cell](case.inputs, case.hidden, dtype=self.dtype)
        layer.load_state_dict(problem.weights)
        x, dy = problem.x.to(self.dtype), problem.dy.to(self.dtype)

        def forward() -> list[Tensor]:
            y, state = layer(x)
            return [y, *(state if isinstance(state, tuple) else (state,))]

        def infer() -> list[Tensor]:
            with torch.inference_mode():
                return forward()

        def train() -> list[Tensor]:
            outputs = forward()
            gradients = torch.autograd.grad(outputs[0], [x, *layer.parameters()], dy)
            return [*(output.detach() for output in outputs), *gradients]

        if case.mode == "infer":
            return infer
        x.requires_grad_()
        return train


OURS = TorchLayer("torchrnn", {"lstm": torchrnn.LSTM, "gru": torchrnn.GRU})
TORCH_NN = {"lstm": nn.LSTM, "gru": nn.GRU}
PEERS: tuple[Peer, ...] = (TorchLayer("torch.nn", TORCH_NN),)
EXACT = TorchLayer("float64", TORCH_NN, torch.float64)

# Float64 is slow, and errors show in a few steps as well as in many.
ERROR_FLOPS = 2e9
ERROR_STEPS = 4


def shortened(case: Case) -> Case:
    """Returns the case with as many steps as a run in float64 can afford."""
    affordable = int(case.steps * ERROR_FLOPS / case.flops)
    steps = min(case.steps, max(ERROR_STEPS, affordable))
    return Case(case.cell, case.mode, steps, case.batch, case.inputs, case.hidden)


def errors(case: Case, peers: list[Peer]) -> dict[str, float]:
    """Returns each peer's largest error against float64, relative to the largest value of its tensor."""
    problem = make_problem(shortened(case))
    exact = EXACT.prepare(problem)()
    return {
        peer.name: max(
            float((value.double() - true).abs().max() / true.abs().max())
            for value, true in zip(peer.prepare(problem)(), exact, strict=True)
        )
        for peer in peers
    }
