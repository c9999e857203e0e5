"""Hooks on cells over a sequence: those that make weights run before it, others at each step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import one_thread
from every_cell import CELLS, run, run_by_calls, sequence
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

import torchrnn
from torchrnn.interop import from_keras, to_keras
from torchrnn.rnn_cell import (
    BasicLSTMCell,
    DropoutWrapper,
    GRUCell,
    LSTMCell,
    MultiRNNCell,
    OutputProjectionWrapper,
    ResidualWrapper,
)

T = 3


@pytest.fixture(autouse=True)
def _double_on_one_thread() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    with one_thread():
        yield


# Weights that are made ------------------------------------------------------------------------------------


def parametrized(cell: Any, name: str) -> None:
    class Squared(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value * value.abs()

    parametrize.register_parametrization(cell, name, Squared())


MADE: dict[str, Callable[[Any, str], Any]] = {
    "prune": lambda cell, name: prune.l1_unstructured(cell, name, 0.5),
    "prune by columns": lambda cell, name: prune.ln_structured(cell, name, 0.5, n=2, dim=1),
    "pruned twice": lambda cell, name: (
        prune.random_unstructured(cell, name, 0.2),
        prune.l1_unstructured(cell, name, 0.2),
    ),
    "parametrized": parametrized,
    "new weight_norm": parametrizations.weight_norm,
    "weight_norm": pytest.param(
        nn.utils.weight_norm,
        marks=pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated"),
    ),
    "spectral_norm": nn.utils.spectral_norm,
}
MATRIX = {
    "rnn": "kernel",
    "lstm varied": "kernel",
    "gru": "gates_kernel",
    "gru softsign": "candidate_kernel",
    "layer norm": "kernel",
    "weight norm": "kernel",
    "coupled": "W_0",
    "grouped": "group0_kernel",
    "ugrnn": "kernel",
    "indy lstm": "kernel_w",
    "sru": "kernel",
    "nas": "recurrent_kernel",
    "phased": "new_input_kernel",
    "time and frequency": "W_0",
    "grid": "W_f_0_0",
    "input projection": "kernel",
    "output projection": "kernel",
    "attention": "attention_kernel",
}


def trained(cell: Any, x: Any, way: Any) -> Any:
    """Returns outputs of a few steps of training, and of one in no_grad mode after them."""
    optimizer = torch.optim.SGD(cell.parameters(), 0.1)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        with way():
            outputs, _ = run(cell, x)
        found.append(outputs)
        outputs.square().sum().backward()
        optimizer.step()
    with torch.no_grad(), way():
        return [*found, run(cell, x)]


def check_training(make: Callable[[], Any], x: Any) -> None:
    torch.manual_seed(1)
    first = make()
    torch.manual_seed(1)
    second = make()
    assert_close(
        trained(first, x, contextlib.nullcontext), trained(second, x, torchrnn.stepwise), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize(
    "how", [p if hasattr(p, "values") else pytest.param(p, id=k) for k, p in MADE.items()]
)
@pytest.mark.parametrize("name", MATRIX)
def test_a_weight_is_made_anew_for_each_run(name: str, how: Callable[[Any, str], Any]) -> None:
    def make() -> Any:
        cell = CELLS[name](4)
        cell.build(4)
        how(cell, MATRIX[name])
        return cell.eval()  # spectral_norm goes one step on at each call in training.

    check_training(make, sequence(name))


@pytest.mark.parametrize("how", ["prune", "parametrized"])
@pytest.mark.parametrize(
    "around",
    [
        lambda cell: MultiRNNCell([GRUCell(4), cell]),
        ResidualWrapper,
        lambda cell: DropoutWrapper(cell, 0.5, 0.5).eval(),
        lambda cell: OutputProjectionWrapper(MultiRNNCell([ResidualWrapper(cell)]), 2),
    ],
    ids=["stack", "residual", "dropout", "deep"],
)
def test_a_weight_of_a_cell_inside_is_made_anew_for_each_run(around: Callable[[Any], Any], how: str) -> None:
    def make() -> Any:
        inner = BasicLSTMCell(4)
        cell = around(inner)
        cell.build(4)
        MADE[how](inner, "kernel")
        return cell

    check_training(make, sequence("lstm"))


def test_weights_are_made_for_both_directions() -> None:
    cells, x = [GRUCell(4), GRUCell(4)], sequence("gru")
    for cell in cells:
        cell.build(4)
        prune.l1_unstructured(cell, "gates_kernel", 0.5)
    for _ in range(2):
        (forward, backward), _ = torchrnn.bidirectional_dynamic_rnn(*cells, x, [3, 2], dtype=x.dtype)
        (forward + backward).sum().backward()
        with torch.no_grad():
            for cell in cells:
                cell.gates_kernel_orig -= cell.gates_kernel_orig.grad
    found = torchrnn.bidirectional_dynamic_rnn(*cells, x, [3, 2], dtype=x.dtype)
    with torchrnn.stepwise():
        assert_close(found, torchrnn.bidirectional_dynamic_rnn(*cells, x, [3, 2], dtype=x.dtype))


def test_a_pruned_cell_is_one_op() -> None:
    cell = GRUCell(4)
    cell.build(4)
    prune.l1_unstructured(cell, "gates_kernel", 0.5)
    assert torchrnn.explain(cell) == (
        "GRUCell(4): one op over the sequence, gru with reset before the product; "
        "forward pre-hooks once before it, or step by step if they change the inputs"
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Read by Dynamo.
def test_a_pruned_cell_compiles_and_trains() -> None:
    def make() -> Any:
        torch.manual_seed(1)
        cell = GRUCell(4)
        cell.build(4)
        prune.l1_unstructured(cell, "gates_kernel", 0.5)
        return cell

    x = sequence("gru")
    torch._dynamo.reset()
    found = []
    for way in (run, torch.compile(run, backend="aot_eager")):
        cell = make()
        for _ in range(3):
            outputs, _ = way(cell, x)
            outputs.square().sum().backward()
            with torch.no_grad():
                for parameter in cell.parameters():
                    parameter.sub_(0.1 * parameter.grad)
        found.append((outputs, *cell.parameters()))
    assert_close(found[0], found[1])
    torch._dynamo.reset()


# Forward pre-hooks ----------------------------------------------------------------------------------------


MODES = [contextlib.nullcontext, torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("name", CELLS)
def test_a_pre_hook_runs_once_before_a_sequence_and_at_each_step_of_a_loop(name: str) -> None:
    cell, x, seen = CELLS[name](4), sequence(name), []
    cell.register_forward_pre_hook(lambda module, args: seen.append((module, args)))
    for mode in MODES:
        with mode():
            seen.clear()
            found = run(cell, x)
            loops = "generic loop" in torchrnn.explain(cell).splitlines()[0]
            assert len(seen) == (T if loops else 1)
            with torchrnn.stepwise():
                assert_close(run(cell, x), found)
        modules, arguments = zip(*seen, strict=True)
        assert set(modules) == {cell}
        assert_close(arguments[0], arguments[-T])  # The first step and state, whichever way.


def test_a_pre_hook_before_a_reversed_sequence_sees_the_step_that_comes_first() -> None:
    cell, x, seen = GRUCell(4), sequence("gru"), []
    cell.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torchrnn.bidirectional_dynamic_rnn(GRUCell(4), cell, x, dtype=x.dtype)
    assert_close(seen, [x[:, -1]])


def changes_by_returning(module: Any, args: Any) -> Any:
    return (2 * args[0], args[1])


def changes_by_writing(module: Any, args: Any) -> None:
    args[0].mul_(2)


def changes_the_state(module: Any, args: Any) -> Any:
    return (args[0], torch.utils._pytree.tree_map(lambda v: v / 2, args[1]))


def changes_in_keywords(module: Any, args: Any, kwargs: Any) -> Any:
    return (2 * args[0],), {"state": args[1], **kwargs}


@pytest.mark.parametrize(
    "hook", [changes_by_returning, changes_by_writing, changes_the_state, changes_in_keywords]
)
@pytest.mark.parametrize("name", ["lstm", "gru", "ugrnn", "nas", "stack", "residual", "dropout"])
def test_a_pre_hook_that_changes_a_step_runs_at_each(name: str, hook: Any) -> None:
    cell, x, calls = CELLS[name](4), sequence(name), []
    plain, _ = run(cell, x)
    cell.register_forward_pre_hook(hook, with_kwargs=hook is changes_in_keywords)
    cell.register_forward_pre_hook(lambda module, args: calls.append(1))
    for mode in MODES:
        with mode():
            calls.clear()
            found = run(cell, x.clone())
            assert len(calls) == T
            assert not torch.equal(found[0], plain)
            assert_close(found, run_by_calls(cell, x.clone()))


def test_a_pre_hook_that_returns_what_it_gets_changes_nothing() -> None:
    cell, x, calls = BasicLSTMCell(4), sequence("lstm"), []

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        calls.append(1)
        return args, kwargs

    expected = run(cell, x)
    cell.register_forward_pre_hook(hook, with_kwargs=True)
    cell.register_forward_pre_hook(lambda module, args: args)
    assert_close(run(cell, x), expected)
    assert calls == [1]


def test_a_pre_hook_of_a_cell_inside_runs_once_too() -> None:
    inner, x, calls = LSTMCell(4), sequence("lstm"), []
    stack = MultiRNNCell([ResidualWrapper(inner), GRUCell(3)])
    for each in (stack, inner):
        each.register_forward_pre_hook(lambda module, args: calls.append(type(module).__name__))
    run(stack, x, [3, 1])
    assert calls == ["MultiRNNCell", "LSTMCell"]


# Other hooks ----------------------------------------------------------------------------------------------

HOOKS: dict[str, Callable[[Any, Callable[..., Any]], Any]] = {
    "forward": lambda cell, seen: cell.register_forward_hook(lambda *_: seen()),
    "forward with keywords": lambda cell, seen: cell.register_forward_hook(
        lambda module, args, kwargs, output: seen(), with_kwargs=True
    ),
    "forward, always": lambda cell, seen: cell.register_forward_hook(lambda *_: seen(), always_call=True),
    "backward": lambda cell, seen: cell.register_full_backward_hook(lambda *_: seen()),
    "before backward": lambda cell, seen: cell.register_full_backward_pre_hook(lambda *_: seen()),
    "global forward": lambda cell, seen: nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen() if module is cell else None
    ),
    "global pre": lambda cell, seen: nn.modules.module.register_module_forward_pre_hook(
        lambda module, *_: seen() if module is cell else None
    ),
    "global backward": lambda cell, seen: nn.modules.module.register_module_full_backward_hook(
        lambda module, *_: seen() if module is cell else None
    ),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # For inputs without a gradient.
@pytest.mark.parametrize("name", CELLS)
def test_a_hook_sees_each_step(name: str) -> None:
    cell, x, seen = CELLS[name](4), sequence(name), []
    expected = run(cell, x)
    for hook, register in HOOKS.items():
        for way in (run, run_by_calls):
            seen.clear()
            handle = register(cell, lambda: seen.append(1))
            try:
                found = way(cell, x)
                found[0].sum().backward()
                says = torchrnn.explain(cell).splitlines()[0]
            finally:
                handle.remove()
            assert_close(found, expected)
            assert len(seen) == T, hook
            assert says.endswith("of modules sees each step" if "global" in hook else "hook sees each step")
            run(cell, x)[0].sum().backward()
            assert len(seen) == T, hook


def test_a_forward_hook_may_change_the_output_of_a_cell_inside() -> None:
    inner = GRUCell(4)
    stack, x = MultiRNNCell([ResidualWrapper(inner), GRUCell(3)]), sequence("gru")
    run(stack, x)
    inner.register_forward_hook(lambda module, args, result: (2 * result[0], result[1]))
    assert_close(run(stack, x), run_by_calls(stack, x))
    lines = torchrnn.explain(stack).splitlines()
    assert [("generic loop" in line) for line in lines] == [False, False, True, False]
    assert lines[2].endswith("GRUCell(4): generic loop, step by step; a forward hook sees each step")


def keras_layer(name: str) -> Any:
    gates, state = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}[name], torch.get_rng_state()
    torch.manual_seed(1)
    weights = [torch.randn(4, gates * 3), torch.randn(3, gates * 3)]
    torch.set_rng_state(state)
    config = {"units": 3, "use_bias": False, "return_sequences": True}
    return from_keras({"class_name": name, "config": config}, weights)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN"])
def test_hooks_on_the_cells_of_a_keras_layer(name: str) -> None:
    x, calls = torch.randn(2, T, 4), []
    plain, pruned = keras_layer(name), keras_layer(name)
    prune.l1_unstructured(pruned.cells[0], "kernel", 0.5)
    with torch.no_grad():
        plain.cells[0].kernel.mul_(pruned.cells[0].kernel_mask)
    for _ in range(2):
        outputs, _ = pruned(x)
        assert_close(outputs, plain(x)[0])
        outputs.sum().backward()
        with torch.no_grad():
            plain.cells[0].kernel.mul_(2)
            pruned.cells[0].kernel_orig.mul_(2)
    with pytest.raises(ValueError, match="kernel: is made at each run, by a forward pre-hook"):
        to_keras(pruned)

    expected, _ = plain(x)
    cell = plain.cells[0]
    cell.register_forward_pre_hook(lambda module, args: calls.append(1))
    assert_close(plain(x)[0], expected)
    assert len(calls) == 1
    doubled = plain(torch.cat([2 * x]))[0]
    handle = cell.register_forward_pre_hook(lambda module, args: (2 * args[0], args[1]))
    assert_close(plain(x)[0], doubled)
    assert len(calls) == 2 + T
    handle.remove()
    cell.register_forward_hook(lambda module, args, result: (result[0] + 1, result[1]))
    assert_close(plain(x)[0], expected + 1)


def test_hooks_on_fused_cells_run_once_as_on_any_module() -> None:
    cell, calls = torchrnn.contrib.rnn.LSTMBlockFusedCell(4), []
    cell.register_forward_hook(lambda *_: calls.append(1))
    cell.register_forward_pre_hook(lambda *_: calls.append(2))
    cell(torch.randn(3, 2, 4), dtype=torch.float64)
    assert calls == [2, 1]


def test_hooks_on_parameters_run_once_with_the_whole_gradient() -> None:
    cell, x, seen = GRUCell(4), sequence("gru"), []
    cell.build(4)
    cell.gates_kernel.register_hook(seen.append)
    run(cell, x)[0].sum().backward()
    assert len(seen) == 1
    assert_close(seen[0], cell.gates_kernel.grad)
