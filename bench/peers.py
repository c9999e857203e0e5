"""What is measured against what, and what they get wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

import torchrnn
from bench.adapters.cells import Unrolled
from bench.adapters.layers import TorchLayer, lengths_forward, packed_forward
from bench.adapters.loop import CompiledLoop
from bench.adapters.onnx import OnnxRuntime, OpenVino
from bench.adapters.prepacked import Prepacked
from bench.adapters.problem import TORCH_LAYERS, Peer, Problem, Run, grad_mode, kinds, make_problem
from bench.cases import PREPACKED, TF_PRODUCTS, Case

__all__ = [
    "EXACT",
    "LAYERS",
    "OURS",
    "PEERS",
    "TORCH_LAYERS",
    "Peer",
    "Problem",
    "Run",
    "TorchLayer",
    "deviations",
    "errors",
    "grad_mode",
    "lengths_forward",
    "make_problem",
    "ours",
    "packed_forward",
    "select",
    "shortened",
    "skipped",
]

LAYERS = kinds(torchrnn)

OURS = TorchLayer("torchrnn", LAYERS, lengths_forward)
EXACT = TorchLayer("float64", TORCH_LAYERS, packed_forward, dtype=torch.float64)
# What half precision gains or loses: the same layer on the same values in float32.
WIDE = TorchLayer(
    "torchrnn fp32", LAYERS, lengths_forward, dtype=torch.float32, dtypes=("bfloat16", "float16")
)
# The cells of torchrnn.rnn_cell: ours under the same name, and what a cell without a faster way runs in.
OUR_CELLS = Unrolled(OURS.name)
LOOP = Unrolled("generic loop", torchrnn.stepwise)
EXACT_CELLS = Unrolled("float64", torchrnn.stepwise, torch.float64)
# The layer of the same sizes without the cell's variations, which show what these cost; results differ.
PLAIN_LAYERS = {
    name: LAYERS["lstm" if name.endswith("lstm") else "gru"]
    for name in TF_PRODUCTS
    if name.endswith(("lstm", "gru"))
}
PLAIN = TorchLayer("torchrnn plain", PLAIN_LAYERS, lengths_forward)
PEERS: tuple[Peer, ...] = (
    TorchLayer("torch.nn", TORCH_LAYERS, packed_forward),
    CompiledLoop(),
    OnnxRuntime(),
    OpenVino(),
    WIDE,
    Prepacked(PREPACKED, LAYERS, lengths_forward),
    LOOP,
    PLAIN,
)


def ours(case: Case) -> Peer:
    """Returns what of torchrnn runs the case."""
    return OUR_CELLS if OUR_CELLS.supports(case) else OURS


def select(case: Case, names: Iterable[str]) -> list[Peer]:
    """Returns the named peers that can run the case here."""
    chosen = set(names)
    return [p for p in PEERS if p.name in chosen and p.available() is None and p.supports(case)]


def skipped(names: Iterable[str]) -> dict[str, str]:
    """Returns why which of the named peers cannot run here."""
    chosen = set(names)
    reasons = {peer.name: peer.available() for peer in PEERS if peer.name in chosen}
    return {name: reason for name, reason in reasons.items() if reason is not None}


# Float64 is slow, and errors show in a few steps as well as in many.
ERROR_FLOPS = 2e9
ERROR_STEPS = 4


def shortened(case: Case, flops: float = ERROR_FLOPS) -> Case:
    """Returns the case with as many steps as a run in float64 can afford."""
    affordable = int(case.steps * flops / case.flops)
    return dataclasses.replace(case, steps=min(case.steps, max(ERROR_STEPS, affordable)))


def errors(case: Case, peers: Iterable[Peer]) -> dict[str, float]:
    """Returns each peer's largest error against float64, relative to the largest value of its tensor.

    What dropout drops is random, so a case with dropout is compared without it.
    """
    problem = make_problem(dataclasses.replace(shortened(case), keep=1.0))
    with grad_mode(case):
        exact = (EXACT_CELLS if EXACT_CELLS.supports(case) else EXACT).prepare(problem)()
        return {
            peer.name: max(deviations(peer.prepare(problem)(), exact)) for peer in peers if peer is not PLAIN
        }


def deviations(values: Any, exact: Any) -> list[float]:
    """Returns the largest error of each tensor, relative to its largest value."""
    return [
        ((torch.as_tensor(value).double() - true).abs().max() / true.abs().max()).item()
        for value, true in zip(pytree.tree_leaves(values), pytree.tree_leaves(exact), strict=True)
    ]
