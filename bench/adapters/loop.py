"""What a user writes without a layer: one step in plain PyTorch, compiled, in a Python loop over time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.adapters.problem import Problem, Run, make_run
from bench.cases import Case

Step = Callable[..., tuple[Tensor, ...]]

# Each shape compiles for seconds, and again for each number of threads. At these two the loop is neither all
# overhead, as with one row, nor hidden behind products that take a millisecond each.
SIZES = ((128, 8, 256, 256), (128, 32, 256, 256))


def lstm_step(x: Tensor, weights: Sequence[Tensor], h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    w_ih, w_hh, b_ih, b_hh = weights
    i, f, g, o = (linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(x: Tensor, weights: Sequence[Tensor], h: Tensor) -> tuple[Tensor, ...]:
    w_ih, w_hh, b_ih, b_hh = weights
    xr, xz, xn = linear(x, w_ih, b_ih).chunk(3, 1)
    hr, hz, hn = linear(h, w_hh, b_hh).chunk(3, 1)
    n = torch.tanh(xn + (xr + hr).sigmoid() * hn)
    return (n + (xz + hz).sigmoid() * (h - n),)


STEPS: dict[str, Step] = {"lstm": lstm_step, "gru": gru_step}


class CompiledLoop:
    """The loop over the steps of one layer of one direction."""

    name = "compiled loop"
    own_threads = False

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend

    def available(self) -> str | None:
        compilers = (os.environ.get("CXX", "g++"), "clang++")
        return None if any(shutil.which(name) for name in compilers) else "no C++ compiler"

    def supports(self, case: Case) -> bool:
        size = (case.steps, case.batch, case.inputs, case.hidden)
        return case.cell in STEPS and size in SIZES and case == Case(case.cell, case.mode, *size)

    def prepare(self, problem: Problem) -> Run:
        case = problem.case
        # All shapes of a step share a cache of compiled code; when it is full, the rest would run uncompiled.
        torch._dynamo.reset()
        step = torch.compile(STEPS[case.cell], dynamic=False, backend=self.backend)
        weights = [weight.clone() for weight in problem.weights.values()]
        x = problem.x.clone()
        zeros = x.new_zeros(case.batch, case.hidden)
        first = tuple(part[0] for part in problem.state) or ((zeros,) * (2 if case.cell == "lstm" else 1))

        def forward() -> list[Tensor]:
            state, outputs = first, []
            for x_t in x.unbind():
                state = step(x_t, weights, *state)
                outputs.append(state[0])
            return [torch.stack(outputs), *(part.unsqueeze(0) for part in state)]

        return make_run(case, forward, x, weights, problem.dy)
