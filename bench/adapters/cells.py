"""Cells of torchrnn.rnn_cell, unrolled by dynamic_rnn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchrnn
from bench.adapters.problem import Problem, Run, make_run
from bench.cases import Case
from torchrnn import rnn_cell
from torchrnn.rnn_cell import RNNCell

CELLS: dict[str, Callable[[int], RNNCell]] = {
    "peephole-lstm": partial(rnn_cell.LSTMCell, use_peepholes=True),
    "reset-before-gru": rnn_cell.GRUCell,
    "normalised-lstm": rnn_cell.LayerNormBasicLSTMCell,
    "coupled-lstm": rnn_cell.CoupledInputForgetGateLSTMCell,
    "projected-lstm": lambda units: rnn_cell.LSTMCell(units, num_proj=units),
    "indrnn": rnn_cell.IndRNNCell,
    "sru": rnn_cell.SRUCell,
}


def make_cell(case: Case) -> RNNCell:
    """Returns the cell of a case, with the same weights at every call."""

    def layer() -> RNNCell:
        cell = CELLS[case.cell](case.hidden)
        return cell if case.keep == 1 else rnn_cell.DropoutWrapper(cell, case.keep, case.keep, case.keep)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cell = rnn_cell.MultiRNNCell([layer() for _ in range(case.layers)]) if case.layers > 1 else layer()
        cell.build(case.inputs)
        for parameter in cell.parameters():  # No zeros: each parameter must count in the errors.
            nn.init.normal_(parameter, std=0.05)
    return cell


class Unrolled:
    """A cell over a sequence.

    Args:
        name: Of the peer, in the results.
        context: What it runs in.
        dtype: What to compute in; by default the dtype of the case.
    """

    own_threads = False

    def __init__(
        self,
        name: str,
        context: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.name, self.context, self.dtype = name, context, dtype

    def available(self) -> str | None:
        return None

    def supports(self, case: Case) -> bool:
        return case.cell in CELLS

    def prepare(self, problem: Problem) -> Run:
        case = problem.case
        dtype = self.dtype or problem.x.dtype
        cell = make_cell(case).to(dtype).train(case.mode == "train")
        x = problem.x.to(dtype, copy=True)

        def forward() -> list[Tensor]:
            with self.context():
                y, final = torchrnn.dynamic_rnn(cell, x, problem.lengths, dtype=dtype, time_major=True)
            return [y, *pytree.tree_leaves(final)]

        return make_run(case, forward, x, list(cell.parameters()), problem.dy.to(dtype))
