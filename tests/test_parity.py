"""Results, states and every gradient against torch.nn, over the grid of what torch.nn can do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Trio, assert_close_to_f64, needs_kernels, trio
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYERS = {
    "lstm": (nn.LSTM, {}),
    "lstm-proj": (nn.LSTM, {"proj_size": True}),
    "gru": (nn.GRU, {}),
    "rnn-tanh": (nn.RNN, {}),
    "rnn-relu": (nn.RNN, {"nonlinearity": "relu"}),
}
SIZES = ((5, 3, 7, 33), (4, 1, 33, 7), (3, 7, 1, 2), (2, 5, 130, 17), (6, 2, 5, 64))
"""T, B, I, H: none a multiple of a vector, but for the last."""


def build(name: str, inputs: int, hidden: int, dtype: torch.dtype, **arguments: Any) -> Trio:
    """Builds a layer three times; proj_size is made to fit hidden."""
    kind, extras = LAYERS[name]
    arguments |= extras
    if "proj_size" in arguments:
        arguments["proj_size"] = max(1, hidden // 2)
    three = trio(lambda space: getattr(space, kind.__name__)(inputs, hidden, **arguments), dtype)
    if has_kinks(name, dtype) and arguments.get("bias", True):
        leave_kinks(three)
    return three


def has_kinks(name: str, dtype: torch.dtype) -> bool:
    """Whether rounding can turn a relu on or off, upon which its gradient jumps: no bound holds then."""
    return name == "rnn-relu" and dtype != torch.float64


def leave_kinks(three: Trio) -> None:
    """Gives each unit a bias that keeps it on, or off, for good."""
    for name, parameter in three.exact.named_parameters():
        if name.startswith("bias_ih"):
            parameter.data = torch.where(torch.rand_like(parameter) < 0.5, 8.0, -8.0).double()
        if name.startswith("weight_hh"):
            parameter.data = (parameter.data / 8).double()
    for module in (three.ours, three.theirs):
        module.load_state_dict(three.exact.state_dict())


def states(layer: nn.RNNBase, batch: int, dtype: torch.dtype) -> Any:
    """Returns random initial states that require gradients."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(count, batch, layer.proj_size or layer.hidden_size, dtype=dtype, requires_grad=True)
    if layer.mode != "LSTM":
        return h
    return h, torch.randn(count, batch, layer.hidden_size, dtype=dtype, requires_grad=True)


def run_padded(layer: nn.Module, x: Tensor, hx: Any, lengths: Tensor) -> Any:
    """Runs torch.nn on padded rows by packing them."""
    first = layer.batch_first
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=first, enforce_sorted=False)
    out, state = layer(packed, hx)
    return pad_packed_sequence(out, batch_first=first, total_length=x.size(1 if first else 0))[0], state


def forms() -> Iterator[tuple[bool, bool, str]]:
    """Yields (bias, batch_first, form of the input)."""
    return itertools.product((True, False), (False, True), ("full", "lengths", "packed"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "two-way"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_matches_torch(
    any_path: str, name: str, layers: int, bidirectional: bool, dtype: torch.dtype
) -> None:
    for i, (bias, batch_first, form) in enumerate(forms()):
        steps, batch, inputs, hidden = SIZES[i % len(SIZES)]
        three = build(
            name,
            inputs,
            hidden,
            dtype,
            num_layers=layers,
            bidirectional=bidirectional,
            bias=bias,
            batch_first=batch_first,
        )
        shape = (batch, steps, inputs) if batch_first else (steps, batch, inputs)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        hx = states(three.theirs, batch, dtype) if i % 2 else None
        lengths = torch.randint(1, steps + 1, (batch,))
        if has_kinks(name, dtype) and not bias:
            with torch.no_grad():
                assert_close_to_f64(three.ours(x), three.theirs(x), three.exact(x.double()), dtype)
        elif form == "full":
            three.check(x, hx, dtype=dtype)
        elif form == "lengths":
            three.check(
                x, hx, dtype=dtype, lengths=lengths, through=lambda m, *a, n=lengths: run_padded(m, *a, n)
            )
        else:
            lengths[0] = steps
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=batch_first, enforce_sorted=False)
            three.check(packed, hx, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (2, 33, 130, 33), (3, 70, 33, 130), (17, 2, 1025, 9)], ids=str
)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_matches_torch_at_odd_sizes(
    any_path: str, name: str, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    steps, batch, inputs, hidden = sizes
    three = build(name, inputs, hidden + (name == "lstm-proj"), dtype, bidirectional=True)
    x = torch.randn(steps, batch, inputs, dtype=dtype, requires_grad=True)
    three.check(x, states(three.theirs, batch, dtype), dtype=dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_matches_torch_when_hidden_is_1025(any_path: str, name: str) -> None:
    three = build(name, 7, 1025, torch.float32)
    x = torch.randn(3, 9, 7, requires_grad=True)
    three.check(x, states(three.theirs, 9, torch.float32))


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_matches_torch_on_any_number_of_threads(name: str, batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    three = build(name, 130, 257, torch.float32, bidirectional=threads == 3)
    x = torch.randn(12, batch, 130, requires_grad=True)
    lengths = torch.randint(1, 13, (batch,))
    three.check(x, None, lengths=lengths, through=lambda m, *a: run_padded(m, *a, lengths))


@needs_kernels
def test_results_repeat_to_the_bit() -> None:
    torch.set_num_threads(2)
    three = build("lstm", 64, 257, torch.float32, num_layers=2, bidirectional=True)
    x = torch.randn(30, 33, 64)
    results = []
    for _ in range(3):
        y, _ = three.ours(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(three.ours.parameters()))])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))
