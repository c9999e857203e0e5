"""What a peer is given, and what it must be able to do."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bench.cases import STEP_GATES, Case

# Returns tensors or arrays: output, final states and, in training, the gradients of the input and the
# parameters; from a bare call what the layer returns.
Run = Callable[[], Any]
Kind = Callable[..., nn.Module]  # A class with the arguments of torch.nn.LSTM, or of LSTMCell for one step.

CLASSES = {
    "lstm": "LSTM",
    "gru": "GRU",
    "rnn": "RNN",
    "lstmcell": "LSTMCell",
    "grucell": "GRUCell",
    "rnncell": "RNNCell",
}


def kinds(module: Any) -> dict[str, Kind]:
    """Returns the classes of torch.nn, or those with the same names of another module, by cell."""
    return {cell: getattr(module, name) for cell, name in CLASSES.items()}


TORCH_LAYERS = kinds(nn)


@dataclass(frozen=True)
class Problem:
    """The tensors of a case, equal for all peers and of the dtype of the case.

    T steps, B rows, I inputs, H hidden units, D directions, L layers.
    """

    case: Case
    x: Tensor  # [T, B, I]
    dy: Tensor  # [T, B, D*H], the gradient of the output in training.
    state: tuple[Tensor, ...]  # [L*D, B, H] each, before the first step; empty unless streaming.
    lengths: Tensor | None  # [B], if ragged.
    weights: dict[str, Tensor]  # With the names and layout of torch.nn; other cells have their own.


def make_problem(case: Case, device: str = "cpu") -> Problem:
    """Returns the tensors of a case, the same ones at every call; lengths are on the CPU."""
    dtype, bound = getattr(torch, case.dtype), 1 / math.sqrt(case.hidden)
    with torch.random.fork_rng(devices=[] if device == "cpu" else [device]), torch.device(device):
        torch.manual_seed(0)
        x = torch.randn(case.steps, case.batch, case.inputs).to(dtype)
        dy = torch.randn(case.steps, case.batch, case.directions * case.hidden).to(dtype)
        states = (2 if case.cell.startswith("lstm") else 1) if case.streaming else 0
        shape = case.layers * case.directions, case.batch, case.hidden
        state = tuple(torch.rand(shape).sub_(0.5).to(dtype) for _ in range(states))
        # As torch.nn initialises them: uniform in +-1/sqrt(H).
        with torch.device("meta"):
            plain = nn.LSTM if case.cell.endswith("lstm") else nn.GRU
            shapes = make_layer(TORCH_LAYERS.get(case.cell, plain), case).state_dict()
        weights = {
            name: torch.empty(like.shape).uniform_(-bound, bound).to(dtype) for name, like in shapes.items()
        }
    lengths = torch.tensor(case.lengths) if case.ragged else None
    return Problem(case, x, dy, state, lengths, weights)


def make_layer(kind: Kind, case: Case, **options: Any) -> nn.Module:
    """Returns a new layer of the case's sizes."""
    if case.cell in STEP_GATES:
        return kind(case.inputs, case.hidden, **options)
    return kind(case.inputs, case.hidden, case.layers, bidirectional=case.directions == 2, **options)


def grad_mode(case: Case) -> contextlib.AbstractContextManager[Any]:
    """Returns what the runs of a case are called in. Only a bare call does not bring it along."""
    return torch.no_grad() if case.mode == "nograd" else contextlib.nullcontext()


def make_call(case: Case, layer: nn.Module, x: Tensor, state: Any) -> Run:
    """Returns the bare call of a layer, of a class that runs one step one call per step.

    Args:
        case: The case.
        layer: What is called.
        x: [T, B, I]
        state: Its second argument, None if it is called without one.
    """
    given = () if state is None else (state,)
    if case.cell not in STEP_GATES:
        return partial(layer, x, *given)
    inputs = x.unbind()
    if case.steps == 1:
        return partial(layer, *inputs, *given)

    def loop() -> Any:
        hx = state
        for x_t in inputs:
            hx = layer(x_t, hx)
        return hx

    return loop


def make_run(
    case: Case, forward: Callable[[], list[Tensor]], x: Tensor, parameters: list[Tensor], dy: Tensor
) -> Run:
    """Returns what runs a case in plain PyTorch.

    Args:
        case: The case.
        forward: Returns the output and the final states.
        x: What ``forward`` reads; in training its gradient is asked for.
        parameters: Likewise.
        dy: The gradient of the output.
    """

    def infer() -> list[Tensor]:
        with torch.inference_mode():
            return forward()

    def train() -> list[Tensor]:
        outputs = forward()
        gradients = torch.autograd.grad(outputs[0], [x, *parameters], dy)
        return [*(output.detach() for output in outputs), *gradients]

    if case.mode == "infer":
        return infer
    for tensor in (x, *parameters):
        tensor.requires_grad_()
    return train


class Peer(Protocol):
    name: str
    own_threads: bool  # Whether it brings threads of its own beside those of torch.

    def available(self) -> str | None:
        """Returns why the peer cannot run here, or None if it can."""

    def supports(self, case: Case) -> bool:
        """Returns whether the peer runs the case."""

    def prepare(self, problem: Problem) -> Run:
        """Returns a function that runs the case once and returns all that it computed."""
