"""Recorded models: torch.jit.trace, torch.export, AOTInductor, make_fx and torch.compile.

Whatever the grad mode they were recorded in, they compute, train and are frozen as the model itself. One
file, as the recorders share their models and what is asked of a record.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import every_cell
import pytest
import torch
from conftest import gradients, leaves
from every_layer import LAYERS, MODULES, example
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

import torchrnn

pytestmark = [
    # torch.jit is deprecated, and the tracer warns of each size that is compared.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
MODES = {"grad": torch.enable_grad, "no grad": torch.no_grad, "inference": torch.inference_mode}
RECORDED_IN = pytest.mark.parametrize("mode", ["grad", "no grad"])
OFTEN = ["lstm projected", "gru stacked", "lstm cell without bias", "gru cell"]
# Those that are not named here are left to the slow tests.
EACH_MODULE = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in MODULES]


class Model(nn.Module):
    """A module between others."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner = nn.Linear(3, 3), inner

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf * 2 for leaf in leaves(self.inner(self.before(x).tanh())))


class Twice(nn.Module):
    """A layer, and a cell, that are called more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.cell = torchrnn.LSTM(3, 3, bidirectional=False), torchrnn.GRUCell(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, hx = self.layer(x)
        y, _ = self.layer(y, hx)
        h = self.cell(y[-1])
        return y, self.cell(y[0], h)


class WithLengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torchrnn.GRU(3, 4, 2, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor, resets: Tensor) -> tuple[Tensor, ...]:
        y, h = self.layer(x, lengths=lengths)
        z, _ = self.layer(x, h, resets=resets)
        return y, z


class WithPacking(nn.Module):
    def __init__(self, library: Any = torchrnn) -> None:
        super().__init__()
        self.layer = library.LSTM(3, 4, 2, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        y, (h, c) = self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(y)[0], h, c


class Sorted(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:
        y, state = self.layer(pack_padded_sequence(x, lengths))
        return pad_packed_sequence(y)[0], state


class Unrolled(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.cell = every_cell.CELLS[name](4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaves(every_cell.run(self.cell, x)))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_computes(program: Any, model: nn.Module, *args: Any, modes: Any = MODES) -> None:
    """Asserts that a program computes in each mode what a model does."""
    for mode in modes:
        with MODES[mode]():
            for _ in range(3):  # The first calls of a traced one are not yet optimized.
                assert_close(leaves(program(*args)), leaves(model(*args)))


def assert_trains(program: Any, model: nn.Module, *args: Any) -> None:
    """Asserts that a program has the gradients of a model, whose weights it has or copies of them."""
    for _ in range(3):
        found = gradients(program, program(*args), *args)
        found = {key.removeprefix("_orig_mod."): grad for key, grad in found.items()}  # A compiled one's.
        expected = gradients(model, model(*args), *args)
        for key, grad in expected.items():
            # A cell that begins with zeros has none by its recurrent weight.
            assert grad is not None and (grad.any() or key.endswith("weight_hh")), key
            assert_close(found[key], grad, msg=lambda text, key=key: f"{key}: {text}")


def assert_serves(recorded: Callable[..., Any], model: Model) -> None:
    """Asserts both for other sizes than those of the record."""
    for steps, batch in ((4, 3), (6, 2), (1, 1)):
        x = example(model.inner, steps, batch, requires_grad=True)
        assert_computes(recorded, model, x)
        if batch > 1:
            assert_trains(recorded, model, x)


# torch.jit.trace ------------------------------------------------------------------------------------------


@RECORDED_IN
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODULES)
def test_trace(name: str, training: bool, mode: str) -> None:
    model = Model(MODULES[name](3, 5)).train(training)
    with MODES[mode]():
        traced = torch.jit.trace(model, (example(model.inner),))
    assert "torchrnn::layer(" in str(traced.inlined_graph)
    assert_serves(traced, model)


@RECORDED_IN
def test_trace_of_a_layer_itself_and_of_one_with_recomputation(mode: str) -> None:
    for layer in (torchrnn.LSTM(3, 5), torchrnn.GRU(3, 5, 2, bidirectional=True, recompute=True)):
        with MODES[mode]():
            traced = torch.jit.trace(layer, (example(layer),))
        x = example(layer, 7, 2, requires_grad=True)
        assert_computes(traced, layer, x)
        assert_trains(traced, layer, x)


@RECORDED_IN
def test_trace_of_modules_that_are_called_more_than_once(mode: str) -> None:
    # TorchScript shares the list of weights between the calls.
    model = Twice()
    with MODES[mode]():
        traced = torch.jit.trace(model, (torch.randn(4, 2, 3),))
    x = torch.randn(5, 3, 3, requires_grad=True)
    assert_computes(traced, model, x)
    assert_trains(traced, model, x)
    frozen = torch.jit.freeze(traced.eval())
    assert_computes(frozen, model, x)


@RECORDED_IN
def test_trace_with_lengths_and_resets(mode: str) -> None:
    model = WithLengths()
    with MODES[mode]():
        traced = torch.jit.trace(model, (torch.randn(4, 2, 3), torch.tensor([4, 1]), torch.rand(4, 2) < 0.5))
    x = torch.randn(6, 3, 3, requires_grad=True)
    args = x, torch.tensor([0, 6, 2]), torch.rand(6, 3) < 0.5
    assert_computes(traced, model, *args)
    assert_trains(traced, model, *args)


@RECORDED_IN
@pytest.mark.parametrize("batch", [2, 4])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_trace_of_sequences_that_are_sorted(name: str, batch: int, mode: str) -> None:
    """Whose packing does not say how many there are but by its first number of rows."""
    model = Sorted(getattr(torchrnn, name)(3, 5))
    with MODES[mode]():
        traced = torch.jit.trace(model, (torch.randn(4, 3, 3), torch.tensor([4, 2, 1])))
        x, lengths = torch.randn(6, batch, 3), torch.tensor([6, 5, 5, 1][:batch])
        assert_close(traced(x, lengths), model(x, lengths))


@RECORDED_IN
def test_trace_of_a_packed_sequence(mode: str) -> None:
    model, theirs = WithPacking(), WithPacking(nn)
    theirs.load_state_dict(model.state_dict())
    given = torch.randn(4, 2, 3), torch.tensor([2, 4])
    with MODES[mode]():
        traced, their_traced = torch.jit.trace(model, given), torch.jit.trace(theirs, given)
    x, lengths = torch.randn(6, 3, 3, requires_grad=True), torch.tensor([1, 6, 2])
    assert_close(their_traced(x, lengths), theirs(x, lengths))
    assert_computes(traced, model, x, lengths)
    assert_trains(traced, model, x, lengths)


@RECORDED_IN
@pytest.mark.parametrize("name", ["lstm varied", "gru", "layer norm basic", "indrnn", "sru", "stack", "nas"])
def test_trace_of_unrolled_cells(name: str, mode: str) -> None:
    model = Unrolled(name)
    x = every_cell.sequence(name)
    model(x)
    with MODES[mode]():
        traced = torch.jit.trace(model, (x,))
    x = torch.randn_like(x).requires_grad_()
    assert_computes(traced, model, x)
    assert_trains(traced, model, x)


def test_trace_sees_what_training_does() -> None:
    model = Model(torchrnn.GRU(3, 5))
    x = example(model.inner)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,))
    optimizer = torch.optim.Adam(traced.parameters(), lr=0.1, fused=True)
    before = traced(x)[0].detach()
    for _ in range(3):
        optimizer.zero_grad()
        traced(x)[0].square().sum().backward()
        optimizer.step()
    assert_computes(traced, model, x)
    assert not torch.allclose(traced(x)[0], before)


def _freeze(traced: Any) -> Any:
    return torch.jit.freeze(traced)


def _optimize(traced: Any) -> Any:
    return torch.jit.optimize_for_inference(traced)


def _run_optimizations(traced: Any) -> Any:
    frozen = torch.jit.freeze(traced, optimize_numerics=False)
    torch.jit.run_frozen_optimizations(frozen)
    return frozen


def _save(traced: Any) -> Any:
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def _save_frozen(traced: Any) -> Any:
    return _save(torch.jit.freeze(traced))


@RECORDED_IN
@pytest.mark.parametrize(
    "finish",
    [_freeze, _optimize, _run_optimizations, _save, _save_frozen],
    ids=lambda finish: finish.__name__.strip("_"),
)
@pytest.mark.parametrize("name", ["lstm", "gru stacked", "lstm projected", "gru cell", "twice"])
def test_frozen_and_saved_traces(name: str, finish: Callable[[Any], Any], mode: str) -> None:
    model = Twice() if name == "twice" else Model(MODULES[name](3, 5))
    model.eval()
    x = torch.randn(4, 3, 3) if name == "twice" else example(model.inner)
    with MODES[mode]():
        finished = finish(torch.jit.trace(model, (x,)))
    x = torch.randn_like(x)
    # What is loaded and not frozen fails in inference mode, once it has run in grad mode: torch's own too.
    assert_computes(finished, model, x, modes=["no grad", "grad"] if finish is _save else MODES)
    if finish is _save:
        assert_trains(finished, model, x.requires_grad_())


# torch.export ---------------------------------------------------------------------------------------------


def sizes_of(module: nn.Module) -> dict[int, Any]:
    """Returns dynamic sizes of a module's input."""
    steps, batch = (torch.export.Dim(name, min=1, max=64) for name in ("steps", "batch"))
    if not isinstance(module, nn.RNNBase):
        return {0: batch}
    return {0: batch, 1: steps} if module.batch_first else {0: steps, 1: batch}


@RECORDED_IN
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "strict"])
@pytest.mark.parametrize("name", MODULES)
def test_export(name: str, strict: bool, mode: str) -> None:
    model = Model(MODULES[name](3, 5))
    x = example(model.inner)
    with MODES[mode]():
        exported = torch.export.export(model, (x,), dynamic_shapes=(sizes_of(model.inner),), strict=strict)
    layers = getattr(model.inner, "num_layers", 1)
    ops = [str(node.target) for node in exported.graph.nodes if "torchrnn" in str(node.target)]
    assert ops == ["torchrnn.layer.default"] * layers
    assert_serves(exported.module(), model)


@RECORDED_IN
@pytest.mark.parametrize("finish", ["decompose", "save"])
@pytest.mark.parametrize("name", ["lstm", "gru stacked", "lstm projected", "rnn cell", "twice"])
def test_exported_programs_that_go_on(name: str, finish: str, mode: str) -> None:
    model = Twice() if name == "twice" else Model(MODULES[name](3, 5))
    x = torch.randn(4, 3, 3) if name == "twice" else example(model.inner)
    with MODES[mode]():
        exported = torch.export.export(model, (x,))
        if finish == "decompose":
            exported = exported.run_decompositions()
        else:
            buffer = io.BytesIO()
            torch.export.save(exported, buffer)
            buffer.seek(0)
            exported = torch.export.load(buffer)
    x = torch.randn_like(x).requires_grad_()
    assert_computes(exported.module(), model, x)
    assert_trains(exported.module(), model, x)


@RECORDED_IN
def test_export_with_lengths_and_resets(mode: str) -> None:
    model = WithLengths()
    x = torch.randn(4, 2, 3)
    steps, batch = torch.export.Dim("steps", max=64), torch.export.Dim("batch", max=64)
    with MODES[mode]():
        exported = torch.export.export(
            model,
            (x, torch.tensor([4, 1]), torch.rand(4, 2) < 0.5),
            dynamic_shapes=({0: steps, 1: batch}, {0: batch}, {0: steps, 1: batch}),
        )
    x = torch.randn(6, 3, 3, requires_grad=True)
    args = x, torch.tensor([0, 6, 2]), torch.rand(6, 3) < 0.5
    assert_computes(exported.module(), model, *args)
    assert_trains(exported.module(), model, *args)


@RECORDED_IN
@pytest.mark.parametrize("name", ["lstm varied", "gru", "layer norm basic", "indrnn", "sru", "stack"])
def test_export_of_unrolled_cells(name: str, mode: str) -> None:
    model = Unrolled(name)
    x = every_cell.sequence(name)
    model(x)
    with MODES[mode]():
        exported = torch.export.export(model, (x,))
        decomposed = exported.run_decompositions()
    x = torch.randn_like(x).requires_grad_()
    for program in (exported.module(), decomposed.module()):
        assert_computes(program, model, x)
        assert_trains(program, model, x)


class Several(nn.Module):
    """Layers and cells by their names, so that one package has them all."""

    def __init__(self, names: list[str], unrolled: list[str]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(MODULES[name](3, 5) for name in names)
        self.cells = nn.ModuleList(Unrolled(name) for name in unrolled)

    def forward(self, x: Tensor, sequence: Tensor) -> list[Tensor]:
        results = [leaf for part in self.parts for leaf in leaves(part(x if _is_layer(part) else x[0]))]
        return results + [leaf for cell in self.cells for leaf in cell(sequence)]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
UNROLLED = ["lstm varied", "gru", "indrnn", "sru"]


@needs_compiler
@RECORDED_IN
@pytest.mark.parametrize(
    "unrolled", [[], pytest.param(UNROLLED, marks=pytest.mark.slow)], ids=["", "unrolled too"]
)
def test_packages_of_every_layer_and_cell(unrolled: list[str], mode: str, tmp_path: Path) -> None:
    model = Several([*MODULES], unrolled).eval()
    x, sequence = torch.randn(4, 4, 3), torch.randn(2, 3, 4)
    model(x, sequence)
    with MODES[mode](), fresh_cache():
        exported = torch.export.export(model, (x, sequence))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "all.pt2"))
    run = torch._inductor.aoti_load_package(path)
    assert_computes(run, model, torch.randn_like(x), torch.randn_like(sequence))


# make_fx and torch.compile --------------------------------------------------------------------------------


def functional(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], list[Tensor]]:
    """Returns a model as a function of its weights too."""

    def call(weights: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        return leaves(torch.func.functional_call(model, weights, (x,)))

    return call


@RECORDED_IN
@pytest.mark.parametrize("kind", ["real", "fake", "symbolic"])
def test_make_fx(kind: str, mode: str) -> None:
    for name in ("lstm", "gru stacked", "lstm cell"):
        model = Model(MODULES[name](3, 5))
        x = example(model.inner)
        weights = {key: value.detach() for key, value in model.named_parameters()}

        call = functional(model)
        with MODES[mode]():
            graph = make_fx(call, tracing_mode=kind)(weights, x)
        names = {str(node.target) for node in graph.graph.nodes if "torchrnn" in str(node.target)}
        assert names == {"torchrnn.layer_infer.default"}  # Recorded below autograd, and yet it trains.
        x = example(model.inner, 7, 2) if kind == "symbolic" else torch.randn_like(x)
        assert_close(graph(weights, x), leaves(model(x)))
        if kind == "real":
            out_of_place = make_fx(functionalize(call))(weights, x)
            assert_close(out_of_place(weights, x), leaves(model(x)))
        given = {key: value.clone().requires_grad_() for key, value in weights.items()}
        sum(y.square().sum() for y in graph(given, x)).backward()
        sum(y.square().sum() for y in model(x)).backward()
        for key, p in model.named_parameters():
            assert_close(given[key].grad, p.grad)


@RECORDED_IN
@pytest.mark.parametrize("name", [*EACH_MODULE, "twice"])
def test_compile(name: str, mode: str) -> None:
    # Compiled in one mode first, then used in the others.
    model = Twice() if name == "twice" else Model(MODULES[name](3, 5))
    x = torch.randn(4, 3, 3) if name == "twice" else example(model.inner)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for one in (mode, *MODES):
        assert_computes(compiled, model, x, modes=[one])
        assert_trains(compiled, model, torch.randn_like(x).requires_grad_())


@needs_compiler
@pytest.mark.parametrize(
    ("names", "unrolled"),
    [
        pytest.param(["lstm projected", "gru cell"], ["sru"], id="some"),
        pytest.param([*MODULES], UNROLLED, id="all", marks=pytest.mark.slow),
    ],
)
def test_compile_by_inductor(names: list[str], unrolled: list[str]) -> None:
    model = Several(names, unrolled)
    x, sequence = torch.randn(4, 4, 3), torch.randn(2, 3, 4)
    model(x, sequence)
    with fresh_cache():
        compiled = torch.compile(model, fullgraph=True)
        assert_computes(compiled, model, x, sequence)
        assert_trains(compiled, model, x.requires_grad_(), sequence.requires_grad_())


def test_every_recording_of_a_layer_holds_one_op() -> None:
    layers = {name: make(3, 5) for name, make in LAYERS.items()}
    for name, layer in layers.items():
        traced = torch.jit.trace(layer, (example(layer),))
        graph = str(traced.inlined_graph)
        assert graph.count("torchrnn::") == layer.num_layers, name
