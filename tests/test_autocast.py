"""Under torch.autocast on the CPU: dtypes and numbers of torch.nn, layer by layer and cell by cell."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import leaves, one_thread
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree

import torchrnn

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LAYERS = ["LSTM", "GRU", "RNN"]
CELLS = ["LSTMCell", "GRUCell", "RNNCell"]


@pytest.fixture(autouse=True)
def _on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def state(name: str, dtype: torch.dtype, *shape: int) -> Any:
    h = torch.randn(shape).to(dtype)
    return (h, torch.randn(shape).to(dtype)) if name.startswith("LSTM") else h


def outcome(
    module: nn.Module, x: Any, hx: Any, autocast: torch.dtype | None, grad: bool
) -> list[Tensor] | str:
    """Returns results, or how the call is refused."""
    try:
        with torch.set_grad_enabled(grad), torch.autocast("cpu", autocast, enabled=autocast is not None):
            found = leaves(module(x, hx))
    except (RuntimeError, ValueError) as error:
        return type(error).__name__
    return [leaf for leaf in found if leaf is not None and leaf.is_floating_point()]


def assert_same(ours: Any, theirs: Any, exact: Any, autocast: torch.dtype, label: str) -> None:
    """Asserts the dtypes of torch.nn, and numbers that are as near as its to those of float64."""
    if isinstance(theirs, str) or isinstance(ours, str):
        assert ours == theirs, label
        return
    assert [t.dtype for t in ours] == [t.dtype for t in theirs], label
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert our.shape == their.shape, label
        ours_off, theirs_off = ((t.double() - true).abs().max() for t in (our, their))
        bound = 2 * theirs_off + 8 * torch.finfo(autocast).eps * true.abs().max()
        assert ours_off <= bound, f"{label}: off by {ours_off:.2e}, torch.nn by {theirs_off:.2e}"


def check(name: str, options: dict[str, Any], autocast: torch.dtype, packed: bool = False) -> None:
    """Compares all combinations of the dtypes of weights, input and state."""
    is_cell = name.endswith("Cell")
    plain = getattr(nn, name)(4, 5, **options)
    rows = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    for weight, of_x, of_state in itertools.product(
        (F32, autocast, F64), (F32, autocast, F64), (None, F32, autocast, F64)
    ):
        theirs, exact = copy.deepcopy(plain).to(weight), copy.deepcopy(plain).to(weight).double()
        ours = getattr(torchrnn, name)(4, 5, **options).to(weight)
        ours.load_state_dict(theirs.state_dict())
        x: Any = torch.randn(*((3, 4) if is_cell else (6, 3, 4))).to(of_x)
        shape = (3, 5) if is_cell else (rows, 3, 5)
        hx = None if of_state is None else state(name, of_state, *shape)
        if hx is not None and options.get("proj_size"):
            hx = (hx[0][..., : options["proj_size"]], hx[1])
        if packed:
            x = pack_padded_sequence(x, torch.tensor([6, 3, 1]))
        doubled = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, (x, hx))
        true = [t for t in leaves(exact(*doubled)) if t is not None and t.is_floating_point()]
        # oneDNN does not train an LSTM in float16, and torch.nn refuses what ours runs.
        is_refused = name == "LSTM" and (autocast, of_x) == (F16, F32) and "proj_size" not in options
        for grad in (False,) if is_refused else (True, False):
            label = f"{name} {options} {autocast} weights {weight} x {of_x} state {of_state} grad {grad}"
            found = [outcome(module, x, hx, autocast, grad) for module in (ours, theirs)]
            assert_same(*found, true, autocast, label)


@pytest.mark.parametrize("autocast", [BF16, F16])
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_dtypes_and_numbers_are_those_of_torch(name: str, autocast: torch.dtype) -> None:
    check(name, {}, autocast)


FORMS: list[dict[str, Any]] = [{"num_layers": 2, "bidirectional": True}, {"bias": False}]


@pytest.mark.parametrize("autocast", [BF16, F16])
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_all_forms_of_layers(name: str, options: dict[str, Any], autocast: torch.dtype) -> None:
    check(name, options, autocast)


@pytest.mark.parametrize("autocast", [BF16, F16])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_layers_with_a_projection(options: dict[str, Any], autocast: torch.dtype) -> None:
    check("LSTM", {"proj_size": 2, **options}, autocast)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequences(name: str) -> None:
    check(name, {"bidirectional": True}, BF16, packed=True)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_mixed_dtypes_are_refused_without_autocast_as_by_torch(name: str) -> None:
    shape = (3,) if name.endswith("Cell") else (6, 3)
    state_shape = (3, 5) if name.endswith("Cell") else (1, 3, 5)
    for of_x, of_state in itertools.product((F32, BF16, F64), (None, F32, BF16, F64)):
        if of_x == F32 and of_state in (None, F32):
            continue
        x, hx = (
            torch.randn(*shape, 4).to(of_x),
            None if of_state is None else state(name, of_state, *state_shape),
        )
        ours, theirs = (
            outcome(getattr(library, name)(4, 5), x, hx, None, True) for library in (torchrnn, nn)
        )
        assert isinstance(theirs, str)
        assert ours == theirs, (of_x, of_state)
