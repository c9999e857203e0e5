"""Sequences and cells of size 0: no rows, no steps, no features, no units."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import one_thread
from every_cell import CELLS, CONV, run, sequence
from golden_cells import WAYS
from torch import Tensor
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import torchrnn


@pytest.fixture(autouse=True)
def _on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def check(name: str, batch: int, steps: int, size: int, units: int) -> None:
    """Asserts that a sequence gives what its sizes say, the same in both ways, in grad mode and without."""
    lengths = [[1] * batch, [0] * batch, [steps] * batch]
    for rows, is_learning in itertools.product([None, *lengths], [True, False]):
        cell, found = CELLS[name](units), []
        x = sequence(name, batch, steps, size)
        differ = [v.requires_grad_() for v in pytree.tree_leaves(x) if v.is_floating_point()]
        for way in WAYS.values():
            with torch.set_grad_enabled(is_learning), way():
                outputs, state = run(cell, x, rows)
            found.append((outputs, state))
            found[-1] += (gradients((outputs, state), [*differ, *cell.parameters()]),) if is_learning else ()
        assert_close(found[0], found[1], msg=lambda text, r=rows: f"lengths {r}: {text}")
        shape = cell.output_size if name in CONV else (cell.output_size,)
        assert outputs.shape == (batch, steps, *shape)
        assert all(v.shape[0] == batch and v.isfinite().all() for v in pytree.tree_leaves(state))
        assert not outputs[:, rows[0] if rows and batch else steps :].any()


def gradients(results: Any, leaves: list[Tensor]) -> list[Tensor | None]:
    total = sum(v.sum() for v in pytree.tree_leaves(results))
    wanted = [leaf for leaf in leaves if not torch.nn.parameter.is_lazy(leaf)]
    if not total.requires_grad:
        return []
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    for grad, leaf in zip(found, wanted, strict=True):
        assert grad is None or (grad.shape == leaf.shape and grad.isfinite().all())
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, wanted, strict=True)]


# A grid has pieces of features, a highway and a residual as many as it puts out.
NEEDS_FEATURES = {*CONV, "time and frequency", "grid", "grid both", "highway", "residual", "embedding"}
SIZES = list(itertools.product([0, 2], [0, 3], [0, 4]))


@pytest.mark.parametrize(("batch", "steps"), [(0, 0), (0, 3), (2, 0)])
@pytest.mark.parametrize("name", CELLS)
def test_no_rows_and_no_steps(name: str, batch: int, steps: int) -> None:
    check(name, batch, steps, 4, 4)


@pytest.mark.parametrize("name", [name for name in CELLS if name not in NEEDS_FEATURES])
def test_no_features(name: str) -> None:
    for batch, steps in itertools.product([0, 2], [0, 3]):
        check(name, batch, steps, 0, 4)


@pytest.mark.parametrize("name", [name for name in CELLS if name not in CONV])
def test_no_units(name: str) -> None:
    """A cell of no units is one like any other: nothing is put out, all that depends on it is empty or 0."""
    for batch, steps, size in SIZES:
        if size or name not in NEEDS_FEATURES:
            check(name, batch, steps, size, 0)


@pytest.mark.parametrize("name", [name for name in CELLS if name not in CONV])
@pytest.mark.parametrize("batch", [0, 2])
def test_a_step_of_no_units(name: str, batch: int) -> None:
    cell, x = CELLS[name](0), pytree.tree_map(lambda v: v[:, 0], sequence(name, batch, 1))
    cell.build_for(x)
    output, _ = cell(x, cell.zero_state(batch, torch.float32))
    assert output.shape == (batch, cell.output_size)


@pytest.mark.parametrize("name", ["lstm", "gru", "layer norm", "sru", "nas"])
def test_no_units_in_both_directions_and_in_lists(name: str) -> None:
    cells, x = [CELLS[name](0), CELLS[name](0)], torch.randn(2, 3, 4)
    (forward, backward), _ = torchrnn.bidirectional_dynamic_rnn(*cells, x, [3, 1], dtype=x.dtype)
    outputs_of = cells[0].output_size
    assert forward.shape == backward.shape == (2, 3, outputs_of)
    outputs, _, _ = torchrnn.static_bidirectional_rnn(*cells, list(x.unbind(1)), dtype=x.dtype)
    assert [y.shape for y in outputs] == [(2, 2 * outputs_of)] * 3
    outputs, _ = torchrnn.static_rnn(cells[0], list(x.unbind(1)), dtype=x.dtype)
    assert [y.shape for y in outputs] == [(2, outputs_of)] * 3


@pytest.mark.parametrize("name", CONV)
def test_a_convolution_without_channels_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"sizes must be at least 1, got .* output_channels 0"):
        CELLS[name](0)
