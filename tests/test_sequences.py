"""Rows of different lengths, packed or not, sequences with resets, and dropout between layers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import Trio, leaves, trio
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import torchrnn

LAYERS = ["LSTM", "GRU", "RNN"]
LENGTHS = [4, 0, 6, 1, 2]
STEPS, ROWS, INPUTS, HIDDEN = 6, len(LENGTHS), 3, 5


def initial(name: str, layers: int, rows: int = ROWS, batched: bool = True) -> Any:
    shape = (layers, rows, HIDDEN)
    h = torch.randn(shape, requires_grad=True)
    return (h, torch.randn(shape, requires_grad=True)) if name == "LSTM" else h


def pair_of_layers(name: str, **options: Any) -> Trio:
    return trio(lambda library: getattr(library, name)(INPUTS, HIDDEN, 2, bidirectional=True, **options))


def in_segments(layer: Any, x: Tensor, first: list[Tensor], marks: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Runs torch.nn's layer on one row x [T, I] with a cut before each marked step; states are [L*D, R]."""
    backward = (torch.arange(first[0].size(0)) % 2 == 1).view(-1, 1)
    pieces, last = [], first
    for begin, end in itertools.pairwise(sorted({0, *marks, x.size(0)})):
        # A direction has the given state in the segment where it starts, and leaves one where it ends.
        starts = torch.where(backward, end == x.size(0), begin == 0 and 0 not in marks)
        ends = torch.where(backward, begin == 0, end == x.size(0))
        given = [torch.where(starts, state, 0) for state in first]
        piece, ended = layer(x[begin:end], tuple(given) if len(given) == 2 else given[0])
        pieces.append(piece)
        last = [torch.where(ends, new, old) for new, old in zip(leaves(ended), last, strict=True)]
    return torch.cat([x.new_zeros(0, 2 * HIDDEN), *pieces]), last


def row_by_row(lengths: list[int], resets: Tensor | None = None, batch_first: bool = False) -> Any:
    """Returns how torch.nn computes rows with lengths and resets: each row and each segment on its own."""

    def run(layer: Any, x: Tensor, hx: Any = None) -> Any:
        x = x.transpose(0, 1) if batch_first else x
        states = leaves(hx)
        if hx is None:
            states = [x.new_zeros(4, ROWS, HIDDEN)] * len(leaves(layer(x)[1]))
        outputs, finals = [], []
        for row, steps in enumerate(lengths):
            marks = [] if resets is None else resets[:steps, row].nonzero().flatten().tolist()
            y, last = in_segments(layer, x[:steps, row], [state[:, row] for state in states], marks)
            outputs.append(F.pad(y, (0, 0, 0, STEPS - steps)))
            finals.append(last)
        hidden = tuple(torch.stack(parts, 1) for parts in zip(*finals, strict=True))
        return torch.stack(outputs, 0 if batch_first else 1), hidden if len(hidden) == 2 else hidden[0]

    return run


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_in_any_order_and_zero(path: str, name: str, batch_first: bool) -> None:
    modules = pair_of_layers(name, batch_first=batch_first)
    x = torch.randn((ROWS, STEPS, 3) if batch_first else (STEPS, ROWS, 3), requires_grad=True)
    through = row_by_row(LENGTHS, batch_first=batch_first)
    hx = initial(name, 4)
    y, ended = modules.check(x, hx, through=through, lengths=torch.tensor(LENGTHS))
    for state, first in zip(leaves(ended), leaves(hx), strict=True):
        assert torch.equal(state[:, 1], first[:, 1])
    assert not (y[1] if batch_first else y[:, 1]).any()
    for lengths in (LENGTHS, torch.tensor(LENGTHS, dtype=torch.int32)):
        assert torch.equal(modules.ours(x, hx, lengths=lengths)[0], y)


@pytest.mark.parametrize("name", LAYERS)
def test_lengths_are_what_packing_gives(path: str, name: str) -> None:
    lengths = torch.tensor([3, 6, 1])

    def packed(layer: nn.Module, x: Tensor) -> Any:
        y, hx = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(y)[0], hx

    modules = pair_of_layers(name)
    x = torch.randn(STEPS, 3, 3, requires_grad=True)
    y, _ = modules.check(x, through=packed, lengths=lengths)
    assert torch.equal(packed(modules.ours, x)[0], y)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("lengths", [[6, 4, 4, 1], [1, 6, 2, 5], [3, 3]], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_sequences(path: str, name: str, lengths: list[int], batch_first: bool) -> None:
    modules = pair_of_layers(name, batch_first=batch_first)
    rows = len(lengths)
    packed = pack_padded_sequence(torch.randn(STEPS, rows, 3), torch.tensor(lengths), enforce_sorted=False)
    if lengths == sorted(lengths, reverse=True):
        packed = PackedSequence(packed.data, packed.batch_sizes)
    packed = packed._replace(data=packed.data.requires_grad_())
    y, _ = modules.check(packed)
    assert isinstance(y, PackedSequence)
    assert y.batch_sizes is packed.batch_sizes
    assert y.sorted_indices is packed.sorted_indices
    modules.check(packed, initial(name, 4, rows))


def test_packed_projection(path: str) -> None:
    modules = trio(lambda library: library.LSTM(3, 5, 2, bidirectional=True, proj_size=2))
    packed = pack_padded_sequence(torch.randn(STEPS, 3, 3), torch.tensor([2, 6, 3]), enforce_sorted=False)
    modules.check(packed, (torch.randn(4, 3, 2), torch.randn(4, 3, 5)))


def test_more_states_than_packed_rows_are_taken_as_torch_takes_them() -> None:
    modules = trio(lambda library: library.GRU(3, 5))
    packed = pack_padded_sequence(torch.randn(STEPS, 2, 3), torch.tensor([2, 6]), enforce_sorted=False)
    modules.check(packed, torch.randn(1, 4, 5))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("given", [False, True])
def test_packed_rows_of_length_zero(path: str, name: str, given: bool) -> None:
    modules = pair_of_layers(name)
    order = torch.tensor(LENGTHS).argsort(descending=True, stable=True)
    x = torch.randn(STEPS, ROWS, 3)
    full = pack_padded_sequence(x[:, order[:-1]], torch.tensor(LENGTHS)[order[:-1]])
    packed = PackedSequence(full.data.requires_grad_(), full.batch_sizes, order)
    hx = [initial(name, 4)] if given else []

    def through(layer: nn.Module, packed: PackedSequence, hx: Any = None) -> Any:
        padded = pad_packed_sequence(PackedSequence(packed.data, packed.batch_sizes))[0]
        padded = torch.cat([padded, padded.new_zeros(STEPS, 1, 3)], 1)[:, order.argsort()]
        y, ended = row_by_row(LENGTHS)(layer, padded, hx)
        lengths = torch.tensor(LENGTHS)[order[:-1]]
        data = pack_padded_sequence(y[:, order[:-1]], lengths).data
        return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices), ended

    y, ended = modules.check(packed, *hx, through=through)
    assert isinstance(y, PackedSequence)
    for i, state in enumerate(leaves(ended)):
        assert torch.equal(state[:, 1], leaves(hx)[i][:, 1] if given else torch.zeros(4, 5))


@pytest.mark.parametrize("name", LAYERS)
def test_padding_is_never_read(path: str, name: str) -> None:
    layer = getattr(torchrnn, name)(3, 5, 2, bidirectional=True)
    lengths = torch.tensor(LENGTHS)
    padding = torch.arange(STEPS)[:, None] >= lengths
    clean = torch.randn(STEPS, ROWS, 3).masked_fill(padding.unsqueeze(-1), 0.0)
    results = []
    for value in (0.0, float("nan"), float("inf")):
        x = clean.masked_fill(padding.unsqueeze(-1), value).requires_grad_()
        outputs = leaves(layer(x, lengths=lengths))
        incoming = [torch.ones_like(output) for output in outputs]
        incoming[0] = incoming[0].masked_fill(padding.unsqueeze(-1), value)
        grads = torch.autograd.grad(outputs, [x, *layer.parameters()], incoming)
        assert not grads[0][padding].any()
        results.append([*outputs, *grads])
    for other in results[1:]:
        for result, expected in zip(other, results[0], strict=True):
            assert torch.equal(result, expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_split_the_sequence(path: str, name: str, cut: bool, batch_first: bool) -> None:
    modules = pair_of_layers(name, batch_first=batch_first)
    resets = torch.zeros(STEPS, ROWS, dtype=torch.bool)
    for step, row in ((0, 0), (1, 0), (5, 0), (2, 2), (3, 2), (0, 3), (4, 4), (1, 4), (0, 1)):
        resets[step, row] = True
    lengths = LENGTHS if cut else [STEPS] * ROWS
    x = torch.randn((ROWS, STEPS, 3) if batch_first else (STEPS, ROWS, 3), requires_grad=True)
    extras: dict[str, Any] = {"resets": resets.T if batch_first else resets}
    if cut:
        extras["lengths"] = lengths
    through = row_by_row(lengths, resets, batch_first)
    modules.check(x, through=through, **extras)
    modules.check(x, initial(name, 4), through=through, **extras)


def test_resets_of_packed_and_unbatched_input(path: str) -> None:
    gru = torchrnn.GRU(3, 5, 2, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(3, STEPS, 3), torch.tensor([2, 6, 4])
    resets = torch.rand(3, STEPS) < 0.4
    y, h_n = gru(x, lengths=lengths, resets=resets)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    y_packed, h_packed = gru(packed, resets=resets.T)
    assert torch.equal(pad_packed_sequence(y_packed, batch_first=True)[0], y)
    assert torch.equal(h_packed, h_n)
    assert resets[1].any()
    y_row, h_row = gru(x[1], resets=resets[1])
    torch.testing.assert_close(y_row, y[1])
    torch.testing.assert_close(h_row, h_n[:, 1])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_draws_what_torch_draws(name: str, packed: bool) -> None:
    def seed(*_: Any) -> None:
        torch.manual_seed(3)

    modules = trio(lambda library: getattr(library, name)(3, 5, 3, dropout=0.4, bidirectional=True))
    for module in modules:
        module.register_forward_pre_hook(seed)
    x: Any = torch.randn(STEPS, 4, 3)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([2, 6, 4, 4]), enforce_sorted=False)
    trained = leaves(modules.check(x))[0]
    for module in modules:
        module.eval()
    evaluated = leaves(modules.check(x))[0]
    assert not torch.equal(trained, evaluated)


def test_dropout_is_between_layers_and_can_be_changed() -> None:
    gru = torchrnn.GRU(3, 5, 2)
    first, second = torchrnn.GRU(3, 5), torchrnn.GRU(5, 5)
    for layer, suffix in ((first, "_l0"), (second, "_l1")):
        parts = {key: value for key, value in gru.state_dict().items() if key.endswith(suffix)}
        layer.load_state_dict({key.replace(suffix, "_l0"): value for key, value in parts.items()})
    x = torch.randn(STEPS, 4, 3)
    for p in (0.0, 0.5, 1.0, 1):
        gru.dropout = p
        torch.manual_seed(1)
        y = gru(x)[0]
        torch.manual_seed(1)
        assert torch.equal(y, second(F.dropout(first(x)[0], p))[0])
        assert torch.equal(gru.eval()(x)[0], second(first(x)[0])[0])
        gru.train()
    state = torch.get_rng_state()
    gru.dropout = 0.0
    gru(x)
    gru.eval().dropout = 0.5
    gru(x)
    assert torch.equal(torch.get_rng_state(), state)
