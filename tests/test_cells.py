"""The cells keep the contract of the torch.nn cells, and a cell stepped over a sequence is a layer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conftest import gradients, leaves, trio
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import torchrnn

CELLS = ["LSTMCell", "GRUCell", "RNNCell"]


def state(name: str, *shape: int, **kwargs: Any) -> Any:
    h = torch.randn(*shape, **kwargs)
    return (h, torch.randn(*shape, **kwargs)) if name == "LSTMCell" else h


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_are_those_of_torch(path: str, name: str, bias: bool) -> None:
    modules = trio(lambda library: getattr(library, name)(3, 5, bias))
    x = torch.randn(2, 3, requires_grad=True)
    modules.check(x)
    modules.check(x, state(name, 2, 5, requires_grad=True))
    x = torch.randn(3, requires_grad=True)
    assert leaves(modules.check(x))[0].shape == (5,)
    modules.check(x, state(name, 5, requires_grad=True))


def test_relu(path: str) -> None:
    trio(lambda library: library.RNNCell(3, 5, nonlinearity="relu")).check(torch.randn(2, 3))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(path: str, name: str, dtype: torch.dtype) -> None:
    modules = trio(lambda library: getattr(library, name)(3, 5), dtype)
    modules.check(torch.randn(2, 3, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("name", CELLS)
def test_batch_of_no_rows(path: str, name: str) -> None:
    cell = getattr(torchrnn, name)(3, 5)
    result = cell(torch.randn(0, 3))
    assert all(leaf.shape == (0, 5) for leaf in leaves(result))
    assert not any(grad is None or grad.any() for grad in gradients(cell, result).values())


@pytest.mark.parametrize("name", CELLS)
def test_strides_do_not_matter_and_nothing_is_modified(path: str, name: str) -> None:
    modules = trio(lambda library: getattr(library, name)(3, 5))
    x = torch.randn(3, 4).T[::2].requires_grad_()
    h = torch.randn(5, 2).T.requires_grad_()
    hx = (h, h.detach().flip(0).requires_grad_()) if name == "LSTMCell" else h
    tensors = [x, *leaves(hx), *modules.ours.parameters()]
    before = [tensor.detach().clone() for tensor in tensors]
    modules.check(x, hx)
    assert all(torch.equal(tensor, value) for tensor, value in zip(tensors, before, strict=True))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("reset_after", [True, False])
def test_a_cell_stepped_is_a_layer(path: str, name: str, reset_after: bool) -> None:
    extras = {} if name != "GRU" else {"reset_after": reset_after}
    layer, cell = getattr(torchrnn, name)(3, 5, **extras), getattr(torchrnn, f"{name}Cell")(3, 5, **extras)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
    x = torch.randn(6, 2, 3)
    y, final = layer(x)
    hx = None
    for t in range(6):
        hx = cell(x[t], hx)
        torch.testing.assert_close(leaves(hx)[0], y[t])
    for a, b in zip(leaves(hx), leaves(final), strict=True):
        torch.testing.assert_close(a, b[0])


@pytest.mark.parametrize("name", CELLS)
def test_state_dict_seed_and_copies(name: str) -> None:
    torch.manual_seed(7)
    theirs = getattr(nn, name)(3, 5)
    torch.manual_seed(7)
    ours = getattr(torchrnn, name)(3, 5)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours)
        assert torch.equal(leaves(other(x))[0], leaves(ours(x))[0])
    loaded = type(ours).__new__(type(ours))
    loaded.__setstate__(theirs.__getstate__())
    assert torch.equal(leaves(loaded(x))[0], leaves(ours(x))[0])
    loaded.reset_parameters()


@pytest.mark.parametrize("name", CELLS)
def test_computed_and_given_weights_are_seen(name: str) -> None:
    def make(library: Any) -> nn.Module:
        return parametrizations.weight_norm(getattr(library, name)(3, 5), "weight_hh")

    modules = trio(make)
    modules.check(torch.randn(2, 3, requires_grad=True), state(name, 2, 5))
    cell = getattr(torchrnn, name)(3, 5)
    zeros: dict[str, Tensor] = {key: torch.zeros_like(value) for key, value in cell.state_dict().items()}
    h = leaves(torch.func.functional_call(cell, zeros, (torch.randn(2, 3),)))[0]
    assert not h.any()


def test_forget_bias_sets_the_forget_gate_only() -> None:
    torch.manual_seed(0)
    cell = torchrnn.LSTMCell(3, 5, forget_bias=2)
    torch.manual_seed(0)
    plain = torchrnn.LSTMCell(3, 5)
    for (name, ours), theirs in zip(cell.named_parameters(), plain.parameters(), strict=True):
        expected = theirs.detach().clone()
        if name.startswith("bias"):
            expected[5:10] = 2 if name == "bias_ih" else 0
        assert torch.equal(ours, expected), name
    assert repr(cell) == "LSTMCell(3, 5, forget_bias=2)"
    assert repr(torchrnn.GRUCell(3, 5, reset_after=False)) == "GRUCell(3, 5, reset_after=False)"
