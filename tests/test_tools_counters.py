"""Counters of operations count the layers and cells, by their ops or as those of ``torch.nn``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import leaves
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import torchrnn
from torchrnn import ops, reference, rnn_cell
from torchrnn._tools import counters
from torchrnn._tools.imports import _waiting, when_imported
from torchrnn.options import CELLS, Options
from torchrnn.reference import Arguments

T, B, N, H, P = 5, 3, 7, 4, 2  # Steps, rows, inputs, hidden units, projected outputs.
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def count(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    total: int = counter.get_total_flops()
    return total


def backward(results: Any) -> None:
    sum(leaf.sum() for leaf in leaves(results) if leaf.requires_grad).backward()


def arguments(cell: str, directions: int, projected: bool = False, **extras: Any) -> Arguments:
    """All tensors of a call, which all require a gradient."""
    gates, outputs = CELLS[cell].gates, P if projected else H

    def weights(*shape: int) -> list[Tensor]:
        return [torch.randn(*shape, requires_grad=True) for _ in range(directions)]

    states = torch.randn(directions, B, outputs), torch.randn(directions, B, H)
    return Arguments(
        torch.randn(T, B, N, requires_grad=True),
        weights(gates * H, N),
        weights(gates * H, outputs),
        weights(gates * H),
        weights(gates * H),
        weights(P, H) if projected else [],
        *([], [], []),
        h0=states[0].requires_grad_(),
        c0=states[1].requires_grad_() if CELLS[cell].memory else None,
        **extras,
    )


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", [*CELLS, "projected"])
def test_passes_count_what_torch_counts_in_the_equations(cell: str, directions: int) -> None:
    options = Options("lstm" if cell == "projected" else cell)
    a = arguments(options.cell, directions, cell == "projected")

    def both(layer: Any) -> tuple[int, int, int]:
        with torch.no_grad():
            inference = count(lambda: layer(a, options))
        results = [out for out in layer(a, options) if out is not None and out.numel()]
        return inference, count(lambda: layer(a, options)), count(lambda: backward(results))

    forward, training, backwards = both(ops.layer)
    assert (forward, training, backwards) == both(reference.layer)
    assert training == forward
    assert backwards == 2 * forward


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("grad", [False, True])
def test_layers(name: str, grad: bool) -> None:
    layer = getattr(torchrnn, name)(N, H, 2, bidirectional=True, batch_first=True)
    x = torch.randn(B, T, N)
    layer(x)  # Weights may be packed by the next call.
    products = 2 * T * B * GATES[name] * H * 2 * ((N + H) + (2 * H + H))
    with torch.set_grad_enabled(grad):
        assert count(lambda: layer(x)) == products
    if name != "LSTM":  # Which torch.nn runs in an op that torch does not count.
        assert count(lambda: getattr(nn, name)(N, H, 2, bidirectional=True, batch_first=True)(x)) == products
    first = 2 * T * B * GATES[name] * H * 2 * N  # The gradient by x, which is not wanted.
    results = layer(x)
    assert count(lambda: backward(results)) == 2 * products - first
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    results = layer(x.requires_grad_())
    assert count(lambda: backward(results)) == products


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_cells_of_any_dtype(name: str, dtype: torch.dtype) -> None:
    cell, theirs = (getattr(library, f"{name}Cell")(N, H, dtype=dtype) for library in (torchrnn, nn))
    x = torch.randn(B, N, dtype=dtype)
    products = 2 * B * GATES[name] * H * (N + H)
    assert count(lambda: cell(x)) == count(lambda: theirs(x)) == products


def test_a_step_past_a_length_is_not_counted() -> None:
    gru = torchrnn.GRU(N, H)
    x, lengths = torch.randn(T, B, N, requires_grad=True), torch.tensor([5, 0, 2])
    products = 2 * int(lengths.sum()) * 3 * H * (N + H)
    packed = nn.utils.rnn.pack_padded_sequence(x[:, :2], torch.tensor([5, 2]))
    resets = torch.ones(T, B, dtype=torch.bool)
    with torch.no_grad():
        assert count(lambda: gru(x, lengths=lengths)) == products
        assert count(lambda: gru(packed)) == products
        assert count(lambda: gru(x, lengths=lengths, resets=resets)) == products
    results = gru(x, lengths=lengths)
    assert count(lambda: backward(results)) == 2 * products
    with FakeTensorMode():
        fake, unknown = torchrnn.GRU(N, H), torch.empty(B, dtype=torch.int64)
        assert count(lambda: fake(torch.empty(T, B, N), lengths=unknown)) == 2 * T * B * 3 * H * (N + H)
    meta = torchrnn.GRU(N, H, device="meta")
    shape = torch.empty(T, B, N, device="meta")
    assert count(lambda: meta(shape, lengths=lengths.to("meta"))) == 2 * T * B * 3 * H * (N + H)


def test_recomputing_and_cells_of_tensorflow() -> None:
    products = 2 * T * B * 4 * H * (N + H)
    lstm, x = torchrnn.LSTM(N, H, recompute=True), torch.randn(T, B, N)
    results = lstm(x)
    # Once more forwards, and then all of backward but the gradient by x.
    assert count(lambda: backward(results)) == 3 * products - 2 * T * B * 4 * H * N
    cell = rnn_cell.LSTMCell(H, use_peepholes=True)
    assert count(lambda: torchrnn.dynamic_rnn(cell, x, dtype=x.dtype, time_major=True)) == products


def test_packed_weights() -> None:
    x = torch.randn(T, B, N)
    for cell, projected in (("lstm", False), ("lstm", True), ("gru_reset_before", False)):
        a = arguments(cell, 2, projected)
        packed = torch.empty(0)
        rest = H, P if projected else H, 2, projected, False
        with torch.no_grad():
            expected = count(lambda a=a, cell=cell: ops.layer(a, Options(cell)))
        args = x, packed, None, None, None, None, CELLS[cell].code, 0, *rest
        assert counters._packed(*args, out_val=None) == expected


def test_counts_have_the_names_of_modules() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = torchrnn.LSTM(N, H), nn.Linear(H, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    model, x = Tagger(), torch.randn(T, B, N, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    counts = counter.get_flop_counts()
    assert sum(counts["Tagger.rnn"].values()) == 3 * 2 * T * B * 4 * H * (N + H)
    assert sum(counts["Tagger"].values()) == counter.get_total_flops()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The packages of other counters, with no more than their tables."""
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in _ROOTS}
    for name in modules:
        monkeypatch.delitem(sys.modules, name)
    for name, table in counters._TABLES.items():
        folder = tmp_path
        for part in name.split(".")[:-1]:
            folder /= part
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        source = (
            f"from torch import nn\n{table} = {{nn.LSTM: 'lstm', nn.GRUCell: 'gru', nn.Linear: 'linear'}}\n"
        )
        (folder / f"{name.rpartition('.')[2]}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in _ROOTS]:
        del sys.modules[name]


_ROOTS = {name.partition(".")[0] for name in counters._TABLES}


@pytest.mark.parametrize("name", counters._TABLES)
@pytest.mark.usefixtures("packages")
def test_tables_by_class_get_our_classes(name: str) -> None:
    if name not in _waiting:  # The package is installed, and has been imported.
        when_imported(name, lambda module: counters._enter_classes(module, counters._TABLES[name]))
    table = getattr(importlib.import_module(name), counters._TABLES[name])
    expected = {nn.LSTM: "lstm", nn.GRUCell: "gru", nn.Linear: "linear"}
    assert table == {**expected, torchrnn.LSTM: "lstm", torchrnn.GRUCell: "gru"}
