"""``torch.fx`` takes our modules and the unrolling functions as nodes of its graphs."""

import copy
import pickle
from typing import Any

import pytest
import torch
from conftest import leaves
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import torchrnn
from torchrnn import rnn_cell
from torchrnn.interop import from_keras

CELLS = ["LSTMCell", "GRUCell", "RNNCell"]


class Own(torchrnn.LSTM):
    """A user's layer, which computes something of its own."""

    def forward(self, input: Any, hx: Any = None, **kwargs: Any) -> Any:
        y, hx = super().forward(input * 2, hx, **kwargs)
        return y + 1, hx


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 3), torchrnn.GRU(3, 4))
        self.own, self.rnn = Own(4, 4), torchrnn.RNN(4, 4, 2)
        self.cells = nn.ModuleList(getattr(torchrnn, name)(4, 4) for name in CELLS)

    def forward(self, x: Tensor, h: Tensor, lengths: Tensor, resets: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = self.first(x)
        y, _ = self.own(y, lengths=lengths)
        y, h_n = self.rnn(y, h, resets=resets)
        state = self.cells[0](y[-1])
        return self.cells[2](self.cells[1](state[0])), h_n


class Unrolled(nn.Module):
    """TensorFlow's cells: called by themselves and by the unrolling functions."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = rnn_cell.LSTMCell(4, use_peepholes=True)
        self.stack = rnn_cell.MultiRNNCell([rnn_cell.DropoutWrapper(rnn_cell.GRUCell(4)) for _ in range(2)])
        self.pair = nn.ModuleList(rnn_cell.BasicRNNCell(4) for _ in range(2))
        self.fused = rnn_cell.LSTMBlockFusedCell(4)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor], lengths: Tensor) -> list[Tensor]:
        y, new = self.cell(x[:, 0], state)
        ys, final = torchrnn.dynamic_rnn(self.stack, x, dtype=torch.float32, sequence_length=lengths)
        both, finals = torchrnn.bidirectional_dynamic_rnn(*self.pair, ys, dtype=torch.float32)
        steps, _ = torchrnn.static_rnn(self.pair[0], [both[0][:, 0], both[1][:, 1]], dtype=torch.float32)
        top, states, _ = torchrnn.stack_bidirectional_dynamic_rnn(
            [self.pair[0]], [self.pair[1]], ys, dtype=torch.float32
        )
        fused, _ = self.fused(ys, dtype=torch.float32)
        return [y, new.h, final[-1], finals[1], steps[1], top, states[0], fused]


def targets(graph: fx.Graph) -> list[str]:
    return [node.target for node in graph.nodes if node.op == "call_module"]


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def inputs() -> tuple[Tensor, ...]:
    return torch.randn(5, 2, 3), torch.randn(2, 2, 4), torch.tensor([5, 2]), torch.rand(5, 2) < 0.3


def test_layers_and_cells_are_nodes() -> None:
    model, args = Model(), inputs()
    traced = fx.symbolic_trace(model)
    traced.graph.lint()
    assert targets(traced.graph) == ["first.0", "first.1", "own", "rnn", "cells.0", "cells.1", "cells.2"]
    assert traced.rnn is model.rnn
    expected = model(*args)
    copies = copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), fx.Transformer(traced).transform()
    for each in (traced, fx.Interpreter(traced).run, fx.symbolic_trace(traced), *copies):
        assert_same(each(*args), expected)
    traced(*args)[0].sum().backward()
    assert all(p.grad is not None for p in model.first.parameters())


def test_converted_models_give_the_graph_of_torch() -> None:
    plain, normed = (nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4)) for _ in range(2))
    parametrizations.weight_norm(normed[1], "weight_hh_l0")
    for model in (plain, normed):
        expected, x = fx.symbolic_trace(model), torch.randn(5, 2, 3)
        ours = fx.symbolic_trace(torchrnn.convert(copy.deepcopy(model)))
        assert ours.code == expected.code
        for a, b in zip(leaves(ours(x)), leaves(expected(x)), strict=True):
            torch.testing.assert_close(a, b)
        assert_same(torchrnn.convert(ours, to="torch")(x), expected(x))


def test_cells_and_functions_of_tensorflow_are_nodes() -> None:
    model, x = Unrolled().eval(), torch.randn(2, 5, 3)
    args = x, (torch.randn(2, 4), torch.randn(2, 4)), torch.tensor([5, 2])
    traced = fx.symbolic_trace(model)  # Before there are variables.
    assert targets(traced.graph) == ["cell", "fused"]
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    names = ("dynamic_rnn", "bidirectional_dynamic_rnn", "static_rnn", "stack_bidirectional_dynamic_rnn")
    assert {getattr(torchrnn, name) for name in names} <= called
    expected = model(*args)
    for each in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert_same(each(*args), expected)


def test_modules_of_keras_are_nodes() -> None:
    weights = [torch.randn(3, 4).numpy(), torch.randn(4, 4).numpy(), torch.randn(4).numpy()]
    model = nn.Sequential(from_keras({"class_name": "SimpleRNN", "config": {"units": 4}}, weights))
    traced, x = fx.symbolic_trace(model), torch.randn(2, 5, 3)
    assert targets(traced.graph) == ["0"]
    assert_same(traced(x), model(x))


def test_hooks_run_once() -> None:
    model, x = nn.Sequential(torchrnn.LSTM(3, 4)), torch.randn(5, 2, 3)
    model[0].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    model[0].register_forward_hook(lambda _, __, out: (out[0] * 2, out[1]))
    assert_same(fx.symbolic_trace(model)(x), model(x))


def test_tracers_of_users_decide() -> None:
    class More(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, nn.Sequential) or super().is_leaf_module(m, module_qualified_name)

    class Less(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return type(m) is not torchrnn.GRU and super().is_leaf_module(m, module_qualified_name)

    assert targets(More().trace(Model()))[:2] == ["first", "own"]
    with pytest.raises(fx.proxy.TraceError):
        Less().trace(Model())
    assert not fx.Tracer().is_leaf_module(Model(), "model")
    assert not fx.Tracer().is_leaf_module(nn.Sequential(), "model")


def test_features_are_extracted() -> None:
    """By a tracer with its own way to call modules, and a graph that is cut, as torchvision does it."""

    class Names(fx.Tracer):
        def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
            name = self.path_of_module(m)
            if self.is_leaf_module(m, name):
                return self.create_proxy("call_module", name, args, kwargs)
            return forward(*args, **kwargs)

    model, args = Model(), inputs()
    graph = Names().trace(model)
    *_, output = graph.nodes
    output.args = (next(node for node in graph.nodes if node.target == "own"),)
    cut = fx.GraphModule(model, graph)
    cut.graph.eliminate_dead_code()
    cut.delete_all_unused_submodules()
    cut.recompile()
    assert [name for name, _ in cut.named_children()] == ["first", "own"]
    assert_same(cut(*args), model.own(model.first(args[0])[0], lengths=args[2]))


def test_functions_run_where_there_is_nothing_to_trace() -> None:
    cell = rnn_cell.GRUCell(4)
    x = torch.randn(2, 5, 3)
    constant, _ = torchrnn.dynamic_rnn(cell, x, dtype=x.dtype)

    def add(y: Tensor) -> Tensor:
        return y + torchrnn.dynamic_rnn(cell, x, dtype=x.dtype)[0].detach()

    assert_same(fx.symbolic_trace(add)(constant), constant * 2)
