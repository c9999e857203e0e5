"""A pytest plugin: the ops of a process without CPU kernels run on the CUDA step path, built for the host."""

from __future__ import annotations

import os

import pytest
import torch

from torchrnn import ops

assert ops  # The library's kernels are for its schemas, which must be there first.
torch.ops.load_library(os.environ["TORCHRNN_HOST_BUILD"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what does not call the ops: the cases that run the reference itself."""
    chosen, others = [], []
    for item in items:
        calls = getattr(item, "callspec", None)
        (others if calls and "reference" in calls.params.values() else chosen).append(item)
    items[:] = chosen
    config.hook.pytest_deselected(items=others)
