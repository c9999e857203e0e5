"""Layers of torchrnn whose weights are constants."""

from __future__ import annotations

import torch
from torch import nn

import torchrnn
from bench.adapters.layers import TorchLayer
from bench.adapters.problem import Problem
from bench.cases import Case


class Prepacked(TorchLayer):
    """A layer that runs on prepacked weights, for inference."""

    def supports(self, case: Case) -> bool:
        return case.mode in ("infer", "nograd") and super().supports(case)

    def make(self, problem: Problem, dtype: torch.dtype) -> nn.Module:
        layer = super().make(problem, dtype)
        torchrnn.prepack(layer)
        return layer
