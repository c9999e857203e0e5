"""TorchScript: scripting says what to do instead, and what was traced can be frozen."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchrnn
from torchrnn import rnn_cell
from torchrnn.interop import from_keras

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

NAMES = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]


class Own(torchrnn.GRU):
    pass


class Holder(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(3, 3), nn.ModuleDict({"rnn": module})

    def forward(self, x: Tensor):
        return self.rest["rnn"](self.first(x))


def first(result: Any) -> Tensor:
    """Returns the output of a layer, or the h of a cell."""
    return first(result[0]) if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", NAMES)
def test_scripting_a_layer_or_cell_names_convert(name: str) -> None:
    x = torch.randn(2, 3) if name.endswith("Cell") else torch.randn(5, 2, 3)
    model = Holder(getattr(torchrnn, name)(3, 4))
    expected, modules = model(x), list(model.modules())
    for module in (model, model.rest["rnn"]):
        text = re.escape(f"torch.jit.script cannot compile {name}") + r".*convert\(model, to=\"torch\"\)"
        with pytest.raises(RuntimeError, match=text):
            torch.jit.script(module)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    scripted = torch.jit.script(torchrnn.convert(model, to="torch"))
    torch.testing.assert_close(first(scripted(x)), first(expected))


def test_scripting_other_modules_names_other_ways() -> None:
    weights = [torch.randn(3, 4).numpy(), torch.randn(4, 4).numpy(), torch.randn(4).numpy()]
    keras = from_keras({"class_name": "SimpleRNN", "config": {"units": 4}}, weights)
    stack = rnn_cell.MultiRNNCell([rnn_cell.DropoutWrapper(rnn_cell.LSTMCell(4))])
    for module in (rnn_cell.GRUCell(4), stack, rnn_cell.LSTMBlockFusedCell(4), keras):
        with pytest.raises(
            RuntimeError, match=r"cannot compile .* use torch\.jit\.trace or torch\.export"
        ) as caught:
            torch.jit.script(Holder(module))
        assert "convert" not in str(caught.value)
    with pytest.raises(RuntimeError, match="cannot compile Own"):
        torch.jit.script(Own(3, 4))


@pytest.mark.parametrize("name", NAMES)
def test_what_was_traced_can_be_scripted_and_frozen(name: str) -> None:
    model = Holder(getattr(torchrnn, name)(3, 4)).eval()
    x = torch.randn(2, 3) if name.endswith("Cell") else torch.randn(5, 2, 3)
    traced = torch.jit.trace(model, (x,), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(torch.jit.freeze(traced), file)
    file.seek(0)
    ways = traced, torch.jit.script(nn.Sequential(traced)), torch.jit.freeze(traced), torch.jit.load(file)
    with torch.no_grad():
        for way in (*ways, torch.jit.optimize_for_inference(traced)):
            for each in (x, torch.randn_like(x), torch.cat([x, x])):
                torch.testing.assert_close(first(way(each)), first(model(each)))
