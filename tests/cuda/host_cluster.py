"""A pytest plugin: the host build stands for a GPU whose cluster path runs on the emulated device.

Of the tests of the parity with torch it keeps those of the cluster path which do not ask torch for a device,
at sizes that do not take long.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from load_host_build import ops

from torchrnn import cuda
from torchrnn.options import Options
from torchrnn.reference import Arguments

TESTS = (
    "test_layer_matches_torch",
    "test_what_torch_has_not_matches_the_reference",
    "test_strides_do_not_matter",
    "test_a_batch_of_no_rows",
    "test_either_path_goes_back_from_the_tape_of_the_other",
    "test_the_cluster_path_says_what_it_does_not_serve",
    "test_the_cluster_path_serves_float32_up_to_its_own_size",
)
MOST = 3000  # T * B * H of a case, about a second.

told = ops.flat


def flat(a: Arguments, options: Options, all_states: bool = False) -> tuple[Any, ...]:
    """Tells the ops on the CPU what they would be told on CUDA."""
    return (*told(a, options)[:-3], cuda.allows_tf32(), cuda.forced(), all_states)


@contextlib.contextmanager
def use_device(_: str) -> Iterator[torch.device]:
    """Makes tensors on the CPU, whatever is asked for."""
    with torch.device("cpu") as device, sys.modules["conftest"].use_tf32(False):
        yield device


def pytest_sessionstart() -> None:
    """Makes torch and the tests believe in a GPU, after conftest.py and before the tests are imported."""
    patch = pytest.MonkeyPatch()
    patch.setattr(ops, "flat", flat)
    patch.setattr(sys.modules["conftest"], "use_device", use_device)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests and the cases that are not to run here."""

    def chosen(item: Any) -> bool:
        if item.originalname not in TESTS:
            return False
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("route", "cluster") != "cluster":
            return False
        steps, batch, _, hidden = parameters.get("sizes", (1, 1, 1, 1))
        return steps * batch * hidden <= MOST and parameters.get("hidden", 0) <= 257

    kept = [item for item in items if chosen(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
