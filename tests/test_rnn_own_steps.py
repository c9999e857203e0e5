"""Steps that a user has changed: what overrides a part of a cell's step is called at each step.

One file, as all sections change the cells of one table.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType, MethodType
from typing import Any

import pytest
import torch
from conftest import one_thread
from every_cell import CELLS, run, run_by_calls, sequence
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import torchrnn
from torchrnn import rnn_cell
from torchrnn.rnn_cell import (
    BasicLSTMCell,
    DropoutWrapper,
    GRUCell,
    InputProjectionWrapper,
    MinimalRNNCell,
    MultiRNNCell,
    OutputProjectionWrapper,
    ResidualWrapper,
    RNNCell,
    UGRNNCell,
)
from torchrnn.rnn_cell.base import Run

T = 3


@pytest.fixture(autouse=True)
def _double_on_one_thread() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    with one_thread():
        yield


def test_the_table_has_every_class() -> None:
    def inside(cell: Any) -> Iterator[type]:
        yield type(cell)
        for _, each in cell.inner_cells():
            yield from inside(each)

    there = {cls for make in CELLS.values() for cls in inside(make(4))}
    public = {v for v in vars(rnn_cell).values() if isinstance(v, type) and issubclass(v, RNNCell)}
    assert public - there == {RNNCell}


# Ways to change a step ------------------------------------------------------------------------------------


def doubled(call: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what doubles the output, with the signature of TensorFlow's cells until 1.1."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        output, state = call(*args, **kwargs)
        return 2 * output, state

    return changed


def by_class(cell: Any, name: str) -> str:
    old = type(cell)

    def changed(self: Any, inputs: Any, state: Any, *scope: Any) -> Any:
        return doubled(getattr(super(new, self), name))(inputs, state, *scope)

    new: Any = type("Doubled", (old,), {name: changed})
    cell.__class__ = new
    return "Doubled"


def by_grandparent(cell: Any, name: str) -> str:
    by_class(cell, name)
    cell.__class__ = type("Child", (type("Parent", (type(cell),), {}),), {"extra": 1})
    return "Doubled"


def by_mixin(cell: Any, name: str) -> str:
    class Doubling:
        pass

    def changed(self: Any, inputs: Any, state: Any, *scope: Any) -> Any:
        return doubled(getattr(super(Doubling, self), name))(inputs, state, *scope)

    setattr(Doubling, name, changed)
    cell.__class__ = type("Mixed", (Doubling, type(cell)), {})
    return "Doubling"


def by_patched_class(cell: Any, name: str) -> str:
    cell.__class__ = type("Patched", (type(cell),), {})
    setattr(type(cell), name, doubled(getattr(type(cell), name)))
    return "Patched"


def on_the_cell(cell: Any, name: str) -> str:
    setattr(cell, name, doubled(getattr(cell, name)))
    return "the cell"


CHANGES = [by_class, by_grandparent, by_mixin, by_patched_class, on_the_cell]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CELLS)
def test_a_changed_step_is_called_over_a_sequence(name: str, change: Callable[[Any, str], str]) -> None:
    # Python looks up __call__ in the class.
    for method in ("forward", "call") if change is on_the_cell else ("__call__", "forward", "call"):
        cell, x = CELLS[name](4), sequence(name)
        plain, _ = run(cell, x)
        who = change(cell, method)
        outputs, state = run(cell, x)
        assert not torch.equal(outputs, plain), method
        assert_close((outputs, state), run_by_calls(cell, x))
        says = torchrnn.explain(cell).splitlines()[0]
        assert "generic loop, step by step; " in says
        if name != "attention":  # It always runs in the loop.
            assert f"; {who} " in says
            assert says.endswith(method)


def methods_of_a_step(cell: Any, x: Any) -> set[str]:
    """Returns the names of the methods and properties of its own that the cell calls in a step."""
    codes: dict[Any, str] = {}
    ours = {name for base in type(cell).__mro__ if issubclass(base, RNNCell) for name in vars(base)}
    for name in ours:
        value = getattr(type(cell), name)
        function = value.fget if isinstance(value, property) else value
        if hasattr(function, "__code__"):
            codes[function.__code__] = name
    called: set[str] = set()

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in codes and frame.f_locals.get("self") is cell:
            called.add(codes[frame.f_code])

    state = cell.zero_state(2, torch.get_default_dtype())
    step = pytree.tree_map(lambda v: v[:, 0], x)
    sys.setprofile(watch)
    try:
        cell.call(step, state)
    finally:
        sys.setprofile(None)
    return called | {"__call__", "forward", "check_inputs"}


# What TensorFlow's protocol has, which is not a part of a step; and project takes any number of steps.
NO_PARTS = {"state_size", "output_size", "project"}


@pytest.mark.parametrize("name", CELLS)
def test_every_part_of_a_step_is_called_at_each_step_if_it_is_overridden(name: str) -> None:
    cell, x = CELLS[name](4), sequence(name)
    run(cell, x)
    run_by_calls(cell, x)  # The first call of all builds the cell, and checks its inputs twice.
    parts = methods_of_a_step(cell, x) - NO_PARTS
    assert "call" in parts
    base = type(cell)
    for part in parts:
        counts, old = Counter[str](), getattr(base, part)
        if isinstance(old, property):
            new: Any = property(lambda self, f=old.fget, c=counts: c.update("a") or f(self))
        else:
            new = lambda self, *a, f=old, c=counts, **k: c.update("a") or f(self, *a, **k)  # noqa: E731
        cell.__class__ = type("Counting", (base,), {part: new})
        run(cell, x)
        assert counts.total() >= T, part


# Where such a cell stands ---------------------------------------------------------------------------------


class Doubled(GRUCell):
    """A cell as they were written until TensorFlow 1.1."""

    def __call__(self, inputs: Tensor, state: Tensor, scope: object = None) -> Any:
        output, state = super().__call__(inputs, state, scope)
        return 2 * output, state


AROUND: dict[str, Callable[[Any], Any]] = {
    "stack": lambda cell: MultiRNNCell([GRUCell(4), cell, BasicLSTMCell(3)]),
    "residual": ResidualWrapper,
    "dropout": lambda cell: DropoutWrapper(cell, 0.5, 0.5, 0.5).eval(),
    "device": lambda cell: rnn_cell.DeviceWrapper(cell, "cpu"),
    "highway": rnn_cell.HighwayWrapper,
    "input projection": lambda cell: InputProjectionWrapper(cell, 3),
    "output projection": lambda cell: OutputProjectionWrapper(cell, 3),
    "attention": lambda cell: rnn_cell.AttentionCellWrapper(cell, 2),
    "wrappers in wrappers": lambda cell: MultiRNNCell([ResidualWrapper(DropoutWrapper(cell)), GRUCell(2)]),
}


@pytest.mark.parametrize("around", AROUND)
def test_a_changed_step_is_called_inside_wrappers_and_stacks(around: str) -> None:
    cell, x = AROUND[around](Doubled(4)), sequence("gru")
    assert_close(run(cell, x), run_by_calls(cell, x))
    if around != "attention":
        line = next(line for line in torchrnn.explain(cell).splitlines() if "Doubled" in line)
        assert line.endswith("Doubled(4): generic loop, step by step; Doubled overrides __call__")
        assert "generic loop" not in torchrnn.explain(cell).replace(line, "")


def test_a_changed_step_is_called_inside_an_embedding() -> None:
    cell, x = rnn_cell.EmbeddingWrapper(Doubled(4), 5, 3), sequence("embedding")
    assert_close(run(cell, x), run_by_calls(cell, x))


@pytest.mark.parametrize("lengths", [None, [3, 1]])
def test_a_changed_step_is_called_by_every_function(lengths: list[int] | None) -> None:
    cell, x, dtype = Doubled(4), sequence("gru"), torch.get_default_dtype()
    with torchrnn.stepwise():
        expected, last = run(cell, x, lengths)
        backwards, first = torchrnn.bidirectional_dynamic_rnn(cell, cell, x, lengths, dtype=dtype)
    steps = list(x.unbind(1))
    assert_close(run(cell, x, lengths), (expected, last))
    for function in (torchrnn.static_rnn, torchrnn.rnn):
        outputs, state = function(cell, steps, None, dtype, lengths)
        assert_close((torch.stack(outputs, 1), state), (expected, last))
    both = torchrnn.bidirectional_dynamic_rnn(cell, cell, x, lengths, dtype=dtype)
    assert_close(both, (backwards, first))
    outputs, *states = torchrnn.bidirectional_rnn(cell, cell, steps, dtype=dtype, sequence_length=lengths)
    assert_close((torch.stack(outputs, 1), tuple(states)), (torch.cat(backwards, -1), first))
    outputs, (fw,), (bw,) = torchrnn.stack_bidirectional_dynamic_rnn(
        [cell], [cell], x, dtype=dtype, sequence_length=lengths
    )
    assert_close((outputs, fw, bw), (torch.cat(backwards, -1), *first))
    fused = rnn_cell.FusedRNNCellAdaptor(cell)
    assert_close(fused(x.transpose(0, 1), None, dtype, lengths), (expected.transpose(0, 1), last))
    reverse = rnn_cell.TimeReversedFusedRNN(fused)
    assert_close(reverse(x.transpose(0, 1), None, dtype, lengths), (backwards[1].transpose(0, 1), first[1]))


def test_a_changed_wrapper_and_a_changed_stack_are_called() -> None:
    class Difference(ResidualWrapper):
        def __call__(self, inputs: Tensor, state: Any, scope: object = None) -> Any:
            output, state = self.cell(inputs, state)
            return output - inputs, state

    class Shifted(MultiRNNCell):
        def __call__(self, inputs: Tensor, state: Any, scope: object = None) -> Any:
            output, state = super().__call__(inputs, state, scope=scope)
            return output + 100, state

    class Kept(DropoutWrapper):
        def call(self, inputs: Tensor, state: Any) -> Any:
            return self.cell(inputs, state)

    class Scaled(OutputProjectionWrapper):
        def forward(self, inputs: Tensor, state: Any, scope: object = None) -> Any:
            output, state = super().forward(inputs, state, scope)
            return 3 * output, state

    for cell in (
        Difference(GRUCell(4)),
        Shifted([GRUCell(4), GRUCell(4)]),
        Kept(GRUCell(4), 0.1, 0.1, 0.1),
        Scaled(GRUCell(4), 3),
        MultiRNNCell([Difference(GRUCell(4)), Kept(Shifted([GRUCell(3)]), 0.1)]),
    ):
        x = sequence("gru")
        assert_close(run(cell, x), run_by_calls(cell, x))


def test_a_changed_step_trains_as_by_calls() -> None:
    cell, x = MultiRNNCell([Doubled(4), GRUCell(4)]), sequence("gru")
    found = []
    for way in (run, run_by_calls):
        outputs, _ = way(cell, x)
        found.append(torch.autograd.grad(outputs.square().sum(), list(cell.parameters())))
    assert_close(found[0], found[1])


def test_a_changed_step_compiles_in_one_graph() -> None:
    cell, x = MultiRNNCell([Doubled(4), GRUCell(4)]), sequence("gru")
    expected = run(cell, x)
    torch._dynamo.reset()
    assert_close(torch.compile(run, backend="eager", fullgraph=True)(cell, x), expected)
    torch._dynamo.reset()


# What is handed on ----------------------------------------------------------------------------------------


class Attending(GRUCell):
    """Reads a context besides its inputs, in more features than they have."""

    context = torch.ones(2, 3, dtype=torch.float64)

    def __call__(self, inputs: Tensor, state: Tensor, scope: object = None) -> Any:
        return super().__call__(torch.cat([inputs, self.context], -1), state, scope)


class Embedding(GRUCell):
    """Looks its inputs up, which are integers."""

    def __call__(self, inputs: Tensor, state: Tensor, scope: object = None) -> Any:
        return super().__call__(torch.eye(5)[inputs[:, 0]], state, scope)


@pytest.mark.parametrize(
    "around",
    [lambda c: c, ResidualWrapper, lambda c: MultiRNNCell([c, c.__class__(2)])],
    ids=["alone", "wrapped", "stacked"],
)
def test_a_cell_is_built_for_what_its_own_call_hands_on(around: Callable[[Any], Any]) -> None:
    cell, x = around(Attending(4)), sequence("gru")
    found = run(cell, x)
    assert_close(found, run_by_calls(cell, x))
    assert_close(found, run(cell, x))
    assert cell.state_dict()[next(k for k in cell.state_dict() if "gates_kernel" in k)].shape == (11, 8)


def test_a_cell_may_look_up_integers_in_its_own_call() -> None:
    cell, x = Embedding(4), sequence("embedding")
    found = run(cell, x)
    assert_close(found, run_by_calls(cell, x))
    assert cell.gates_kernel.shape == (9, 8)


def test_a_cell_built_by_the_user_is_not_built_anew() -> None:
    cell = Attending(4)
    cell.build(4)
    with pytest.raises(
        ValueError, match=r"inputs of size 7 need gates/kernel \[11, 8\], but it was built as"
    ):
        run(cell, sequence("gru"))


def test_a_cell_may_call_what_is_not_overridden() -> None:
    class Direct(GRUCell):
        def __call__(self, inputs: Tensor, state: Tensor, scope: object = None) -> Any:
            output, state = self.call(inputs, state)
            return -output, state

    cell, x = Direct(4), sequence("gru")
    assert_close(run(cell, x), run_by_calls(cell, x))


def test_a_cell_without_variables_of_ours_may_have_its_own_call() -> None:
    class Plain(RNNCell):
        state_size = output_size = 4

        def __call__(self, inputs: Tensor, state: Tensor, scope: object = None) -> Any:
            with_state = torch.tanh(inputs + state)
            return with_state, with_state

    cell, x = Plain(), sequence("gru")
    assert_close(run(cell, x), run_by_calls(cell, x))
    assert torchrnn.explain(cell) == "Plain: generic loop, step by step; the class has no faster way"


# Ways of a user's own -------------------------------------------------------------------------------------


class Sums(GRUCell):
    """A cell with a way of its own, which counts how often it goes it."""

    runs = 0

    def call(self, inputs: Tensor, state: Tensor) -> Any:
        output, state = super().call(inputs, state)
        return self.scaled(output), state

    def scaled(self, output: Tensor) -> Tensor:
        return 2 * output

    def unroll(self, inputs: Tensor, state: Tensor, run: Run) -> Any:
        type(self).runs += 1
        outputs, state = super().unroll(inputs, state, run)
        return self.scaled(outputs), state


def test_a_way_of_a_users_own_may_use_that_of_its_base() -> None:
    cell, x, before = Sums(4), sequence("gru"), Sums.runs
    found = run(cell, x)
    assert Sums.runs == before + 1
    assert_close(found, run_by_calls(cell, x))
    assert torchrnn.explain(cell) == "Sums(4): one op over the sequence, gru with reset before the product"


def test_a_way_of_a_users_own_is_left_where_a_step_is_changed_again() -> None:
    class Negated(Sums):
        def call(self, inputs: Tensor, state: Tensor) -> Any:
            output, state = super().call(inputs, state)
            return -output, state

    class Same(Sums, keeps_unroll=True):
        def call(self, inputs: Tensor, state: Tensor) -> Any:
            return super().call(inputs, state)

    x = sequence("gru")
    for cell, runs in ((Negated(4), 0), (Same(4), 1)):
        before = Sums.runs + Same.runs
        assert_close(run(cell, x), run_by_calls(cell, x))
        assert (Sums.runs + Same.runs - before > 0) == runs


def test_a_way_of_a_mixin_is_gone_unless_hooks_want_steps() -> None:
    class Way:
        def unroll(self: Any, inputs: Tensor, state: Tensor, run: Run) -> Any:
            outputs, state = super().unroll(inputs, state, run)  # type: ignore[misc]
            return outputs + 1, state

    class Mixed(Way, GRUCell):
        pass

    cell, x = Mixed(4), sequence("gru")
    outputs, _ = run(cell, x)
    expected, _ = run_by_calls(cell, x)
    assert_close(outputs, expected + 1)
    cell.register_forward_hook(lambda *_: None)
    assert_close(run(cell, x)[0], expected)


@pytest.mark.parametrize("change", [by_class, on_the_cell])
def test_a_wrapper_of_a_users_own_may_call_unroll_of_any_cell(change: Callable[[Any, str], str]) -> None:
    class Around(ResidualWrapper):
        def unroll(self, inputs: Tensor, state: Any, run: Run) -> Any:
            outputs, state = self.cell.unroll(inputs, state, run)
            return inputs + outputs, state

    inner, x = GRUCell(4), sequence("gru")
    change(inner, "call")
    cell = Around(inner)
    assert_close(run(cell, x), run_by_calls(cell, x))


def test_a_reason_of_the_users_own_makes_the_loop_run_and_is_told() -> None:
    class Watched(BasicLSTMCell):
        calls = 0

        def why_loop(self) -> str:
            return "it is watched"

    cell, calls = Watched(4), Counter[str]()
    cell.activation = lambda v: calls.update("a") or torch.tanh(v)
    run(cell, sequence("lstm"))
    assert calls.total() == 2 * T
    assert torchrnn.explain(cell) == "Watched(4): generic loop, step by step; it is watched"


def test_every_cell_of_ours_has_the_way_that_its_class_is_to_have() -> None:
    for make in CELLS.values():
        assert "overrides" not in torchrnn.explain(make(4))


# States ---------------------------------------------------------------------------------------------------


def test_an_initial_state_of_the_users_own_is_started_from() -> None:
    class FromOne(GRUCell):
        def get_initial_state(self, inputs: Any = None, batch_size: Any = None, dtype: Any = None) -> Tensor:
            return torch.ones(batch_size, 4, dtype=dtype)

    class Zero(GRUCell):
        def zero_state(self, batch_size: int, dtype: torch.dtype) -> Tensor:
            return torch.ones(batch_size, 4, dtype=dtype)

    on_cell = GRUCell(4)
    on_cell.zero_state = lambda batch_size, dtype: torch.ones(batch_size, 4, dtype=dtype)
    x = sequence("gru")
    for cell in (FromOne(4), Zero(4), on_cell):
        cell.build(4)
        ones = torch.ones(2, 4)
        expected = torchrnn.dynamic_rnn(cell, x, initial_state=ones)
        assert_close(run(cell, x), expected)
        stack = MultiRNNCell([ResidualWrapper(cell)])
        outputs, (state,) = run(stack, x)
        assert_close((outputs - x, state), expected)


# Activations ----------------------------------------------------------------------------------------------


def centred(x: Tensor) -> Tensor:
    """An activation that looks at all rows of a step."""
    assert x.dim() == 2
    return x - x.mean(0)


@pytest.mark.parametrize(
    "activation", [centred, nn.Softmax(1), nn.BatchNorm1d(4, affine=False, track_running_stats=False)]
)
@pytest.mark.parametrize(
    "make",
    [
        lambda a: GRUCell(4, a),
        lambda a: UGRNNCell(4, activation=a),
        lambda a: MinimalRNNCell(4, a),
        lambda a: rnn_cell.CFNCell(4, a),
        lambda a: InputProjectionWrapper(GRUCell(3), 4, a),
        lambda a: OutputProjectionWrapper(GRUCell(3), 4, a),
    ],
    ids=["gru", "ugrnn", "minimal", "cfn", "input projection", "output projection"],
)
def test_an_activation_of_the_users_own_sees_one_step(make: Callable[[Any], Any], activation: Any) -> None:
    cell, x = make(activation), sequence("gru", batch=4)
    assert_close(run(cell, x), run_by_calls(cell, x))
    name = getattr(activation, "__name__", type(activation).__name__)
    assert f"the activation {name}" in torchrnn.explain(cell)


def test_an_activation_may_be_a_callable_without_a_hash() -> None:
    class Scaled:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, x: Tensor) -> Tensor:
            return 2 * x

    cell, x = GRUCell(4, Scaled()), sequence("gru")
    assert_close(run(cell, x), run_by_calls(cell, x))


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.register_forward_hook(lambda module, args, output: 2 * output),
        lambda a: a.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        lambda a: setattr(a, "forward", torch.sin),
    ],
    ids=["hook", "pre-hook", "forward"],
)
@pytest.mark.parametrize("name", ["BasicRNNCell", "GRUCell", "BasicLSTMCell", "UGRNNCell", "IndRNNCell"])
def test_hooks_on_an_activation_are_called(name: str, change: Callable[[Any], Any]) -> None:
    activation, x = nn.Tanh(), sequence("gru")
    cell = getattr(rnn_cell, name)(4, activation=activation)
    plain, _ = run(cell, x)
    change(activation)
    found = run(cell, x)
    assert not torch.equal(found[0], plain)
    assert_close(found, run_by_calls(cell, x))
    assert "no kernel has hooks on the activation Tanh" in torchrnn.explain(cell)


def test_an_activation_may_be_changed_after_the_constructor() -> None:
    cell, x = GRUCell(4), sequence("gru")
    run(cell, x)
    for activation in (torch.relu, torch.sin, torch.sigmoid):
        cell.activation = activation
        assert_close(run(cell, x), run_by_calls(cell, x))


@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("name", ["lstm", "layer norm basic", "coupled", "grouped", "ugrnn", "indy lstm"])
def test_a_forget_bias_may_be_learnt(name: str, shape: tuple[int, ...]) -> None:
    cell, x = CELLS[name](4), sequence(name)
    run(cell, x)
    cell.forget_bias = nn.Parameter(torch.full(shape, 0.7))
    found = []
    for way in (run, run_by_calls):
        outputs, _ = way(cell, x)
        found.append((outputs, *torch.autograd.grad(outputs.square().sum(), [cell.forget_bias])))
    assert_close(found[0], found[1])


def test_a_bound_method_of_another_object_may_stand_for_forward() -> None:
    class Hook:
        """What libraries that move weights put in front of a module's forward."""

        def __init__(self, cell: Any) -> None:
            self.forward, self.calls = cell.forward, 0
            cell.forward = MethodType(Hook.new_forward, self)

        def new_forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.forward(*args, **kwargs)

    cell, x = BasicLSTMCell(4), sequence("lstm")
    expected = run(cell, x)
    hook = Hook(cell)
    assert_close(run(MultiRNNCell([cell]), x), (expected[0], (expected[1],)))
    assert hook.calls == T
    assert "the cell has its own forward" in torchrnn.explain(cell)
