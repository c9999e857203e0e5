"""Every cell and unrolling function has TensorFlow 1.15's values and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from conftest import one_thread
from golden_cells import ENTRIES, TF1, TOLERANCES, WAYS, Case, assert_close, classes
from torch.utils import _pytree as pytree

from torchrnn.contrib import rnn
from torchrnn.rnn_cell import base

CLASSES = sorted({name for entry in ENTRIES for name in classes(entry["cell"])})
# One call of a cell is not unrolled.
RUNS = [
    pytest.param(entry, way, id=f"{entry['name']}-{way}")
    for entry in ENTRIES
    for way in WAYS
    if way == "fused" or entry["runner"] != "cell_step"
]
DOUBLES = [pytest.param(entry, id=entry["name"]) for entry in ENTRIES if entry["dtype"] == "float64"]
# TensorFlow declares sizes of one piece of the input, and fused cells have none.
SIZED = [
    pytest.param(entry, id=entry["name"])
    for entry in ENTRIES
    if "output_size" in entry and "init_sizes" not in entry["cell"]
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_the_index_lists_every_file_once() -> None:
    assert sorted(entry["file"] for entry in ENTRIES) == sorted(path.name for path in TF1.glob("*.npz"))
    assert len({entry["name"] for entry in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_the_index_is_there(name: str) -> None:
    assert isinstance(getattr(rnn, name, None), type)


@pytest.mark.parametrize(("entry", "way"), RUNS)
def test_values_and_gradients_are_those_of_tensorflow(entry: dict[str, Any], way: str) -> None:
    case = Case(entry)
    with WAYS[way]():
        found = case.results()
    expected = case.expected()
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert_close(found[key], value, key)


@pytest.mark.parametrize("entry", DOUBLES)
def test_float32_is_as_close_to_the_numbers_in_float64(entry: dict[str, Any]) -> None:
    found = Case(entry, torch.float32).results()
    for key, value in Case(entry).expected().items():
        assert found[key].dtype == torch.float32
        assert_close(found[key].double(), value, key, TOLERANCES[torch.float32])


def sizes_of(spec: Any) -> Any:
    """Returns the state size of the index as a nest: a tuple's fields by name, shapes as ``torch.Size``."""
    if isinstance(spec, list):
        return tuple(map(sizes_of, spec))
    if not isinstance(spec, Mapping):
        return spec
    return torch.Size(spec["shape"]) if "shape" in spec else {k: sizes_of(v) for k, v in spec["fields"]}


def named(sizes: Any) -> Any:
    """Returns a cell's nest of sizes as ``sizes_of`` does."""
    if hasattr(sizes, "_asdict"):
        return {key: named(value) for key, value in sizes._asdict().items()}
    return tuple(map(named, sizes)) if type(sizes) is tuple else sizes


@pytest.mark.parametrize("entry", SIZED)
def test_sizes_are_those_of_tensorflow(entry: dict[str, Any]) -> None:
    (cell,) = Case(entry).cells().values()
    assert named(cell.state_size) == sizes_of(entry["state_size"])
    assert cell.output_size == sizes_of(entry["output_size"])
    state = cell.zero_state(2, torch.float64)
    sizes = pytree.tree_leaves(cell.state_size, is_leaf=base.is_size)
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(state)]
    assert shapes == [(2, *base.shape_of(size)) for size in sizes]
