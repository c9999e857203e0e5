"""``torch.compile`` and ``torch.export`` take a model with our layers as one graph, with dynamic sizes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import gradients, leaves
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache
from torch.nn.utils import parametrizations

import torchrnn
from torchrnn import _dynamo

LAYERS = ["LSTM", "GRU", "RNN"]


class Model(nn.Module):
    """Something before and after the recurrent part, so that a graph break would show."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(3, 3)
        self.recurrent = recurrent

    def forward(self, x: Tensor, hx: Any = None, lengths: Any = None, resets: Any = None) -> list[Tensor]:
        extras = {"lengths": lengths, "resets": resets}
        given = {key: value for key, value in extras.items() if value is not None}
        return [leaf * 2 for leaf in leaves(self.recurrent(self.before(x).tanh(), hx, **given))]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_equal(model: nn.Module, compiled: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """Asserts that the eager and the compiled model give the same results and gradients."""
    eager, ours = model(x, *args, **kwargs), compiled(x, *args, **kwargs)
    for a, b in zip(leaves(ours), leaves(eager), strict=True):
        torch.testing.assert_close(a, b)
    expected = gradients(model, eager, x, *args)
    for name, grad in gradients(model, ours, x, *args).items():
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
def test_a_model_is_one_graph(name: str, options: dict[str, Any]) -> None:
    model = Model(getattr(torchrnn, name)(3, 5, **options))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(model, compiled, torch.randn(4, 4, 3, requires_grad=True))
    with torch.no_grad():
        x = torch.randn(4, 4, 3)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("name", LAYERS)
def test_states_lengths_and_resets(name: str) -> None:
    model = Model(getattr(torchrnn, name)(3, 5, bidirectional=True))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    h = torch.randn(2, 3, 5, requires_grad=True)
    hx = (h, torch.randn(2, 3, 5, requires_grad=True)) if name == "LSTM" else h
    lengths, resets = torch.tensor([4, 0, 2]), torch.rand(4, 3) < 0.4
    x = torch.randn(4, 3, 3, requires_grad=True)
    assert_equal(model, compiled, x, hx, lengths=lengths, resets=resets)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(name: str) -> None:
    model = Model(getattr(torchrnn, name)(3, 5))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(model, compiled, torch.randn(4, 3, requires_grad=True))


def test_options_computed_weights_and_the_layer_itself() -> None:
    x = torch.randn(4, 2, 3, requires_grad=True)
    normed = parametrizations.weight_norm(torchrnn.LSTM(3, 5, proj_size=2), "weight_hh_l0")
    for model in (Model(torchrnn.GRU(3, 5, reset_after=False)), Model(normed), torchrnn.RNN(3, 5)):
        assert_equal(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x)


@pytest.mark.parametrize("name", LAYERS)
def test_dynamic_sizes_do_not_recompile(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = Model(getattr(torchrnn, name)(3, 5, 2, batch_first=True))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compiled(torch.randn(2, 4, 3))
    frames = counter.frame_count
    for rows, steps in ((2, 4), (3, 7), (5, 2), (4, 9)):
        assert_equal(model, compiled, torch.randn(rows, steps, 3))
    assert counter.frame_count == frames


def test_changed_parameters_and_dropout_are_seen() -> None:
    model = Model(torchrnn.LSTM(3, 5, 2, dropout=0.5))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 2, 3)
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    model.eval()
    before = compiled(x)
    torch.testing.assert_close(before, model(x))
    with torch.no_grad():
        model.recurrent.weight_ih_l0.mul_(2)
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.equal(compiled(x)[0], before[0])


def test_layers_of_torch_compile_as_before() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(Model(nn.GRU(3, 5)), fullgraph=True, backend="aot_eager")(torch.randn(4, 2, 3))
    assert not torch._dynamo.config.allow_rnn


def test_dynamo_is_patched_whether_imported_before_or_after(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = sys.modules["torch._dynamo.variables.builder"].VariableBuilder
    assert hasattr(builder.wrap_module, "__wrapped__")  # Imported after torchrnn.
    calls = []
    monkeypatch.setattr(builder, "wrap_module", lambda _, value: calls.append(torch._dynamo.config.allow_rnn))
    _dynamo.allow(torchrnn.GRU)
    builder.wrap_module(None, torchrnn.GRU(3, 5))
    builder.wrap_module(None, torchrnn.RNN(3, 5))
    assert calls == [True, False]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_inductor() -> None:
    model = Model(torchrnn.LSTM(3, 5, bidirectional=True))
    with fresh_cache():  # The cache on disk does not know whether the kernels were loaded.
        assert_equal(model, torch.compile(model, fullgraph=True), torch.randn(4, 2, 3, requires_grad=True))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_sizes(name: str, strict: bool) -> None:
    model = Model(getattr(torchrnn, name)(3, 5, 2, bidirectional=True)).eval()
    sizes = {0: torch.export.Dim("steps", min=2, max=64), 1: torch.export.Dim("rows", min=2, max=64)}
    lengths = torch.tensor([4, 2])
    exported = torch.export.export(
        model,
        (torch.randn(4, 2, 3),),
        {"lengths": lengths},
        dynamic_shapes={"x": sizes, "lengths": {0: sizes[1]}},
        strict=strict,
    )
    assert [str(node.target) for node in exported.graph.nodes if "torchrnn" in str(node.target)] == [
        "torchrnn.layer.default"
    ] * 2
    for steps, rows in ((4, 2), (7, 5)):
        x, lengths = torch.randn(steps, rows, 3), torch.randint(0, steps + 1, (rows,))
        for a, b in zip(exported.module()(x, lengths=lengths), model(x, lengths=lengths), strict=True):
            torch.testing.assert_close(a, b)
