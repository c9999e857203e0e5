"""What is measured on a GPU: ours on each path, torch.nn, and what users take instead of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.adapters.loop import CompiledLoop
from bench.adapters.problem import make_run
from bench.cases import Case
from bench.gpu_cases import EAGER, GRAPHED, PERSISTENT, SMALL, STEPS, algorithm, plain
from bench.gpu_device import Device
from bench.peers import (
    LAYERS,
    OURS,
    TORCH_LAYERS,
    Peer,
    Problem,
    Run,
    TorchLayer,
    lengths_forward,
    packed_forward,
)
from torchrnn.cuda import use_path

# (T, B, I, H) of the peers that compile for each size, for seconds or minutes: they must not eat the budget.
COMPILED_SIZES = ((STEPS, 32, 256, 256),)
COMPILE_SECONDS = 60.0


class Ours(TorchLayer):
    """Ours, on one path: by default that which the dispatch chooses."""

    def __init__(self, name: str, path: str = "auto") -> None:
        super().__init__(name, LAYERS, lengths_forward)
        self.path = path

    def prepare(self, problem: Problem) -> Run:
        if problem.lengths is not None:  # Where a user who cares for speed has them; torch.nn wants the CPU.
            problem = dataclasses.replace(problem, lengths=problem.lengths.to(problem.x.device))
        run = super().prepare(problem)
        if self.path == "auto":
            return run

        def forced() -> list[Tensor]:
            with use_path(self.path):
                return list(run())

        return forced


class Graph:
    """Another peer, called once as a CUDA graph and then replayed."""

    own_threads = False

    def __init__(self, name: str, peer: TorchLayer, device: Device, *, ragged: bool) -> None:
        self.name, self.peer, self.device, self.ragged = name, peer, device, ragged
        self.dtype = peer.dtype

    def available(self) -> str | None:
        return self.peer.available()

    def supports(self, case: Case) -> bool:
        return self.peer.supports(case) and (self.ragged or not case.ragged)

    def prepare(self, problem: Problem) -> Run:
        return self.device.capture(self.peer.prepare(problem))


class HalfTorch(TorchLayer):
    """torch.nn in float16, where that buys a persistent kernel of cuDNN that the dtype of the case lacks."""

    def __init__(self) -> None:
        super().__init__("torch.nn fp16", TORCH_LAYERS, packed_forward, dtype=torch.float16)

    def supports(self, case: Case) -> bool:
        chosen = algorithm(dataclasses.replace(case, dtype="float16"))
        return case.dtype != "float16" and chosen in (PERSISTENT, SMALL) and chosen != algorithm(case)


class GpuLoop(CompiledLoop):
    """The compiled loop, in half precision: its float32 products follow another flag than the layers'."""

    def available(self) -> str | None:
        return None if find_spec("triton") else "triton not installed"

    def supports(self, case: Case) -> bool:
        return plain(case) and case.dtype != "float32" and size_of(case) in COMPILED_SIZES


class FlashRnn:
    """The LSTM of the package flashrnn, behind the product with the input, which it leaves to its user."""

    name = "flashrnn"
    own_threads = False

    def available(self) -> str | None:
        return None if find_spec("flashrnn") else "flashrnn not installed"

    def supports(self, case: Case) -> bool:
        return plain(case) and case.cell == "lstm" and size_of(case) in COMPILED_SIZES

    def prepare(self, problem: Problem) -> Run:
        flashrnn = import_module("flashrnn").flashrnn
        case = problem.case
        steps, rows, units = case.steps, case.batch, case.hidden
        weights = [weight.clone() for weight in problem.weights.values()]
        x = problem.x.clone()

        def forward() -> list[Tensor]:
            w_ih, w_hh, b_ih, b_hh = weights
            wx = linear(x, w_ih).view(steps, rows, 4, 1, units).transpose(0, 1)
            bias = (b_ih + b_hh).view(4, 1, units)
            states, last = flashrnn(
                wx, w_hh.view(4, 1, units, units), bias, function="lstm", backend="cuda_fused"
            )
            y = states[0].reshape(rows, steps, units).transpose(0, 1)
            return [y, *(part.reshape(1, rows, units) for part in last)]

        return make_run(case, forward, x, weights, problem.dy)


def size_of(case: Case) -> tuple[int, int, int, int]:
    return case.steps, case.batch, case.inputs, case.hidden


COMPILING = (CompiledLoop.name, FlashRnn.name)
PATHS = ("step", "cluster")


def make_peers(device: Device) -> list[Peer]:
    """Returns ours, as a user calls it, and then all others."""
    ours, torchs = Ours(OURS.name), TorchLayer(EAGER, TORCH_LAYERS, packed_forward)
    return [
        ours,
        *(Ours(f"{OURS.name} {path}", path) for path in PATHS),
        Graph(f"{OURS.name} graph", ours, device, ragged=True),
        torchs,
        # Packing copies indices to the device, which no graph may.
        Graph(GRAPHED, torchs, device, ragged=False),
        HalfTorch(),
        GpuLoop(),
        FlashRnn(),
    ]


def is_ours(name: str) -> bool:
    return name.split(maxsplit=1)[0] == OURS.name


def unavailable(peers: Collection[Peer]) -> dict[str, str]:
    """Returns which peers cannot run here, and why."""
    reasons = {peer.name: peer.available() for peer in peers}
    return {name: reason for name, reason in reasons.items() if reason is not None}
