"""The unrolling functions: arguments and errors, lengths, padding, structures, and their two ways to run.

One file for all functions, whose cells and inputs the sections share.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import one_thread
from golden_cells import WAYS
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchrnn
from torchrnn import rnn_cell
from torchrnn.rnn_cell import LSTMStateTuple

MAKERS: dict[str, Callable[[], Any]] = {
    "rnn": lambda: rnn_cell.BasicRNNCell(4),
    "gru": lambda: rnn_cell.GRUCell(4),
    "lstm": lambda: rnn_cell.LSTMCell(4, use_peepholes=True, cell_clip=0.5, num_proj=3),
    "lstm-concatenated": lambda: rnn_cell.BasicLSTMCell(4, state_is_tuple=False),
    "gru-softsign": lambda: rnn_cell.GRUCell(4, activation="softsign"),
    "stack": lambda: rnn_cell.MultiRNNCell([rnn_cell.LSTMCell(4), rnn_cell.GRUCell(5)]),
}
WRAPPED: dict[str, Callable[[], Any]] = {
    "dropout": lambda: rnn_cell.DropoutWrapper(rnn_cell.LSTMCell(4), 0.7, 0.7, 0.7).eval(),
    "residual": lambda: rnn_cell.ResidualWrapper(rnn_cell.GRUCell(5)),
    "input projection": lambda: rnn_cell.InputProjectionWrapper(rnn_cell.GRUCell(4), 3),
    "output projection": lambda: rnn_cell.OutputProjectionWrapper(rnn_cell.GRUCell(4), 3),
    "highway": lambda: rnn_cell.HighwayWrapper(rnn_cell.GRUCell(5)),
    "attention": lambda: rnn_cell.AttentionCellWrapper(rnn_cell.LSTMCell(4), 3),
    "layer norm": lambda: rnn_cell.LayerNormBasicLSTMCell(4),
    "stack of wrappers": lambda: rnn_cell.MultiRNNCell(
        [rnn_cell.ResidualWrapper(rnn_cell.LSTMCell(5)), rnn_cell.DropoutWrapper(rnn_cell.GRUCell(4))]
    ),
}


@pytest.fixture(autouse=True)
def _double_on_one_thread() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    with one_thread():
        yield


def run(cell: Any, x: Tensor, lengths: Any = None, state: Any = None, **kwargs: Any) -> Any:
    return torchrnn.dynamic_rnn(cell, x, lengths, state, x.dtype, **kwargs)


def grads(results: Any, *inputs: Any) -> Any:
    """Returns gradients of a fixed functional of results; zeros where there is none."""
    leaves = pytree.tree_leaves(results)
    loss = sum((leaf * torch.linspace(-1, 1, leaf.numel()).view_as(leaf)).sum() for leaf in leaves)
    wanted = pytree.tree_leaves(inputs)
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


# Errors ---------------------------------------------------------------------------------------------------


def gru() -> Any:
    return rnn_cell.GRUCell(4)


def steps(count: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 2, 5))


X = (2, 3, 5)
ERRORS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "rank 2": (
        ValueError,
        r"Shape \(4, 3\) must have rank at least 3",
        lambda: run(gru(), torch.randn(4, 3)),
    ),
    "no tensor": (TypeError, "must be a tensor", lambda: torchrnn.dynamic_rnn(gru(), [[1.0]], dtype=None)),
    "unequal steps": (
        ValueError,
        "Time steps or batch size are not the same",
        lambda: torchrnn.dynamic_rnn(Nested(), {"a": torch.ones(2, 3, 1), "b": torch.ones(2, 4, 1)}),
    ),
    "no state and no dtype": (
        ValueError,
        r"If there is no initial_state, you must give a dtype\.",
        lambda: torchrnn.dynamic_rnn(gru(), torch.randn(X)),
    ),
    "a scalar length": (
        ValueError,
        r"sequence_length must be a vector of length batch_size, but saw shape: \(\)",
        lambda: run(gru(), torch.randn(X), 3),
    ),
    "too few lengths": (ValueError, "batch_size=2, got 1", lambda: run(gru(), torch.randn(X), [3])),
    "lengths that are no integers": (ValueError, "integers", lambda: run(gru(), torch.randn(X), [1.0, 2.0])),
    "states of two dtypes": (
        ValueError,
        "different inferred_dtypes",
        lambda: torchrnn.dynamic_rnn(
            rnn_cell.LSTMCell(4), torch.randn(X), initial_state=(torch.zeros(2, 4), torch.zeros(2, 4).float())
        ),
    ),
    "x of another dtype than the state": (
        TypeError,
        "one dtype, got torch.float32",
        lambda: torchrnn.dynamic_rnn(gru(), torch.randn(X).float(), dtype=torch.float64),
    ),
    "a state with another structure": (
        ValueError,
        "structure of cell.state_size",
        lambda: run(rnn_cell.LSTMCell(4), torch.randn(X), None, torch.zeros(2, 4)),
    ),
    "a state with another batch": (
        ValueError,
        "B=2 rows",
        lambda: run(gru(), torch.randn(X), None, torch.zeros(3, 4)),
    ),
    "a cell for other inputs": (
        ValueError,
        r"inputs of size 5 need gates/kernel \[9, 8\], but it was built as \[7, 8\]",
        lambda: run(built(gru(), 3), torch.randn(X)),
    ),
    "integers": (
        ValueError,
        "RNN cell only supports floating point inputs, but saw dtype: torch.int64",
        lambda: torchrnn.dynamic_rnn(gru(), torch.ones(X, dtype=torch.int64), dtype=torch.float64),
    ),
    "static, no list": (
        TypeError,
        "inputs must be a sequence",
        lambda: torchrnn.static_rnn(gru(), torch.randn(X), dtype=torch.float64),
    ),
    "static, empty": (
        ValueError,
        "inputs must not be empty",
        lambda: torchrnn.static_rnn(gru(), [], dtype=torch.float64),
    ),
    "static, no state and no dtype": (
        ValueError,
        "If no initial_state is provided, dtype must be specified",
        lambda: torchrnn.static_rnn(gru(), steps()),
    ),
    "raw, no function": (TypeError, "loop_fn must be a callable", lambda: torchrnn.raw_rnn(gru(), 3)),
    "stack, nothing forwards": (
        ValueError,
        r"Must specify at least one fw cell for BidirectionalRNN\.",
        lambda: torchrnn.stack_bidirectional_dynamic_rnn([], [gru()], torch.randn(X)),
    ),
    "stack, nothing backwards": (
        ValueError,
        r"Must specify at least one bw cell for BidirectionalRNN\.",
        lambda: torchrnn.stack_bidirectional_rnn([gru()], [], steps()),
    ),
    "stack, a tuple forwards": (
        ValueError,
        r"cells_fw must be a list of RNNCells \(one per layer\)\.",
        lambda: torchrnn.stack_bidirectional_dynamic_rnn((gru(),), [gru()], torch.randn(X)),
    ),
    "stack, a tuple backwards": (
        ValueError,
        r"cells_bw must be a list of RNNCells \(one per layer\)\.",
        lambda: torchrnn.stack_bidirectional_rnn([gru()], (gru(),), steps()),
    ),
    "stack, unequal depths": (
        ValueError,
        r"Forward and Backward cells must have the same depth\.",
        lambda: torchrnn.stack_bidirectional_dynamic_rnn([gru()], [gru(), gru()], torch.randn(X)),
    ),
    "stack, states are no list": (
        ValueError,
        r"initial_states_fw must be a list of state tensors \(one per layer\)\.",
        lambda: torchrnn.stack_bidirectional_dynamic_rnn(
            [gru()], [gru()], torch.randn(X), initial_states_fw=(torch.zeros(2, 4),)
        ),
    ),
    "stack, too many states": (
        ValueError,
        r"initial_states_bw must be a list of state tensors \(one per layer\)\.",
        lambda: torchrnn.stack_bidirectional_dynamic_rnn(
            [gru()], [gru()], torch.randn(X), initial_states_bw=[torch.zeros(2, 4)] * 2
        ),
    ),
    "saver, a tuple for a tensor": (
        ValueError,
        r"state_name should be the same type as cell\.state_size",
        lambda: torchrnn.static_state_saving_rnn(gru(), steps(), Saver({}), ("h",)),
    ),
    "saver, a name for a tuple": (
        ValueError,
        r"state_name should be the same type as cell\.state_size",
        lambda: torchrnn.static_state_saving_rnn(rnn_cell.LSTMCell(4), steps(), Saver({}), "h"),
    ),
    "saver, too few names": (
        ValueError,
        r"#elems\(state_name\) != #elems\(cell\.state_size\): 1 vs\. 2",
        lambda: torchrnn.static_state_saving_rnn(rnn_cell.LSTMCell(4), steps(), Saver({}), ("h",)),
    ),
}


def built(cell: Any, size: int) -> Any:
    cell.build(size)
    return cell


@pytest.mark.parametrize(("error", "text", "call"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(error: type[Exception], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=text):
        call()


NO_CELLS: dict[str, Callable[[Any], Any]] = {
    "dynamic_rnn": lambda cell: torchrnn.dynamic_rnn(cell, torch.randn(X), dtype=torch.float64),
    "static_rnn": lambda cell: torchrnn.static_rnn(cell, steps(), dtype=torch.float64),
    "raw_rnn": lambda cell: torchrnn.raw_rnn(cell, lambda *_: None),
    "static_state_saving_rnn": lambda cell: torchrnn.static_state_saving_rnn(cell, steps(), None, "h"),
    "forwards": lambda cell: torchrnn.bidirectional_dynamic_rnn(cell, gru(), torch.randn(X)),
    "backwards": lambda cell: torchrnn.bidirectional_dynamic_rnn(gru(), cell, torch.randn(X)),
    "static forwards": lambda cell: torchrnn.static_bidirectional_rnn(cell, gru(), steps()),
    "static backwards": lambda cell: torchrnn.bidirectional_rnn(gru(), cell, steps()),
    "explain": torchrnn.explain,
}


@pytest.mark.parametrize("call", NO_CELLS.values(), ids=NO_CELLS.keys())
@pytest.mark.parametrize("value", [None, 3, nn.LSTM(5, 4), nn.GRUCell(5, 4)], ids=repr)
def test_what_is_no_cell_is_refused(call: Callable[[Any], Any], value: Any) -> None:
    with pytest.raises(TypeError, match="is not an RNNCell"):
        call(value)


@pytest.mark.parametrize("lengths", [[3, 4], [-1, 2]])
def test_a_reversal_refuses_lengths_that_the_rows_do_not_have(lengths: list[int]) -> None:
    for each in (lengths, torch.tensor(lengths)):
        with pytest.raises(ValueError, match=r"0\.\.T with T=3"):
            torchrnn.bidirectional_dynamic_rnn(gru(), gru(), torch.randn(X), each, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"0\.\.T with T=3"):
            torchrnn.static_bidirectional_rnn(gru(), gru(), steps(), None, None, torch.float64, each)


# Lengths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKERS)
def test_lengths_end_rows(name: str, way: str) -> None:
    cell, x = MAKERS[name](), torch.randn(5, 6, 5)
    lengths = [6, 3, 0, -2, 9]
    with WAYS[way]():
        outputs, state = run(cell, x, lengths)
        for row, length in enumerate(lengths):
            n = min(max(length, 0), 6)
            expected, last = run(cell, x[row : row + 1, :n])
            torch.testing.assert_close(outputs[row : row + 1, :n], expected)
            assert not outputs[row, n:].any()
            torch.testing.assert_close(pytree.tree_map(lambda v, r=row: v[r : r + 1], state), last)


@pytest.mark.parametrize("way", WAYS)
def test_lengths_may_be_a_list_or_any_integers(way: str) -> None:
    cell, x = gru(), torch.randn(3, 4, 5)
    with WAYS[way]():
        expected = run(cell, x, torch.tensor([4, 0, 2]))
        for lengths in ([4, 0, 2], (4, 0, 2), torch.tensor([4, 0, 2], dtype=torch.int32)):
            torch.testing.assert_close(run(cell, x, lengths), expected, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKERS)
def test_rows_of_no_steps_return_their_state_with_gradient_1(name: str, way: str) -> None:
    cell, x = MAKERS[name](), torch.randn(2, 3, 5)
    state = pytree.tree_map(lambda v: torch.randn_like(v).requires_grad_(), cell.zero_state(2, x.dtype))
    with WAYS[way]():
        outputs, new = run(cell, x, [0, 0], state)
    assert not outputs.any()
    torch.testing.assert_close(new, state, rtol=0, atol=0)
    leaves = pytree.tree_leaves(state)
    found = torch.autograd.grad(sum(v.sum() for v in pytree.tree_leaves(new)), leaves)
    assert all(bool((each == 1).all()) for each in found)


@pytest.mark.parametrize("lengths", [None, [0, 0]])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKERS)
def test_no_steps_at_all(name: str, way: str, lengths: Any) -> None:
    cell = MAKERS[name]()
    state = pytree.tree_map(torch.randn_like, cell.zero_state(2, torch.float64))
    for time_major in (False, True):
        x = torch.randn((0, 2, 5) if time_major else (2, 0, 5))
        with WAYS[way]():
            outputs, new = run(cell, x, lengths, state, time_major=time_major)
        assert outputs.shape == (*x.shape[:2], cell.output_size)
        torch.testing.assert_close(new, state, rtol=0, atol=0)


def test_outputs_of_no_steps_have_the_dtype_of_the_state() -> None:
    cell = rnn_cell.EmbeddingWrapper(rnn_cell.GRUCell(4), 6, 3)
    ids = torch.zeros(2, 0, 1, dtype=torch.int64)
    assert torchrnn.dynamic_rnn(cell, ids, dtype=torch.float32)[0].dtype == torch.float32
    emitted, _, _ = torchrnn.raw_rnn(
        cell,
        lambda *_: (
            torch.ones(2, dtype=torch.bool),
            ids[:, :, 0].new_zeros(2),
            torch.zeros(2, 4),
            None,
            None,
        ),
    )
    assert emitted.dtype == torch.float64


def test_a_call_that_is_refused_for_dtypes_leaves_the_cell_unbuilt() -> None:
    cell, x = rnn_cell.GRUCell(4), torch.randn(2, 3, 5)
    with pytest.raises(TypeError, match="inputs and state must have one dtype"):
        torchrnn.dynamic_rnn(cell, x, dtype=torch.float32)
    assert not cell.built


@pytest.mark.parametrize("lengths", [None, []])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKERS)
def test_no_rows(name: str, way: str, lengths: Any) -> None:
    cell = MAKERS[name]()
    with WAYS[way]():
        outputs, state = run(cell, torch.randn(0, 3, 5), lengths)
    assert outputs.shape == (0, 3, cell.output_size)
    assert all(v.size(0) == 0 for v in pytree.tree_leaves(state))


def test_static_rnn_takes_lengths_that_are_all_0() -> None:
    outputs, state = torchrnn.static_rnn(gru(), steps(), dtype=torch.float64, sequence_length=[0, 0])
    assert len(outputs) == 3
    assert not any(bool(each.any()) for each in [*outputs, state])


# Padding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*MAKERS, *WRAPPED])
def test_padding_reaches_no_value_and_no_gradient(name: str, way: str, bad: float) -> None:
    cell, lengths = (MAKERS | WRAPPED)[name](), [4, 2, 0]
    found = []
    clean = torch.randn(3, 4, 5)
    for padding in (0.0, bad):
        x = clean.clone()
        for row, length in enumerate(lengths):
            x[row, length:] = padding
        x.requires_grad_()
        with WAYS[way]():
            (fw, bw), states = torchrnn.bidirectional_dynamic_rnn(cell, cell, x, lengths, dtype=x.dtype)
        found.append([fw, bw, states, grads((fw, bw, states), x, *cell.parameters())])
        assert not any(bool(found[-1][3][0][row, n:].any()) for row, n in enumerate(lengths))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_padding_of_a_users_cell_is_not_read() -> None:
    x = torch.randn(2, 3, 2)
    x[1, 1:] = math.nan
    x.requires_grad_()
    outputs, state = torchrnn.dynamic_rnn(Nested(), {"a": x, "b": x}, [3, 1], dtype=x.dtype)
    assert all(bool(v.isfinite().all()) for v in pytree.tree_leaves((outputs, state)))
    assert bool(grads((outputs, state), x)[0].isfinite().all())


# Structures -----------------------------------------------------------------------------------------------


class Nested(rnn_cell.RNNCell):
    """A cell with dicts and tuples of inputs {a, b: [B, 2]}, states and outputs."""

    @property
    def state_size(self) -> Any:
        return {"sum": 2, "both": (2, torch.Size([2, 2]))}

    @property
    def output_size(self) -> Any:
        return ({"product": 2}, torch.Size([2, 2]))

    def check_inputs(self, inputs: Any) -> None:
        assert set(inputs) == {"a", "b"}

    def call(self, inputs: Any, state: Any) -> Any:
        a, b = inputs["a"], inputs["b"]
        total, (last, outer) = state["sum"] + a, state["both"]
        outer = outer.tanh() + a[:, :, None] * b[:, None]
        return ({"product": a * last}, outer), {"sum": total, "both": (b, outer)}


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_nests_of_inputs_outputs_and_states(way: str, time_major: bool) -> None:
    a, b = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    inputs = {"a": a, "b": b}
    if time_major:
        inputs = pytree.tree_map(lambda v: v.transpose(0, 1), inputs)
    with WAYS[way]():
        (first, outer), state = torchrnn.dynamic_rnn(
            Nested(), inputs, [4, 2, 0], dtype=a.dtype, time_major=time_major
        )
    assert outer.shape == ((4, 3, 2, 2) if time_major else (3, 4, 2, 2))
    product = first["product"]
    if time_major:
        product, outer = product.transpose(0, 1), outer.transpose(0, 1)
    before = torch.cat([torch.zeros(3, 1, 2), b[:, :-1]], 1)
    for row, n in enumerate([4, 2, 0]):
        torch.testing.assert_close(product[row, :n], (a * before)[row, :n])
        assert not product[row, n:].any()
        assert not outer[row, n:].any()
        torch.testing.assert_close(state["sum"][row], a[row, :n].sum(0))
        last, memory = state["both"]
        torch.testing.assert_close(last[row], b[row, n - 1] if n else torch.zeros(2))
        torch.testing.assert_close(memory[row], outer[row, n - 1] if n else torch.zeros(2, 2))


def test_nests_through_the_other_functions() -> None:
    a, b = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    expected, last = torchrnn.dynamic_rnn(Nested(), {"a": a, "b": b}, dtype=a.dtype, time_major=True)
    listed = [{"a": each_a, "b": each_b} for each_a, each_b in zip(a, b, strict=True)]
    outputs, state = torchrnn.static_rnn(Nested(), listed, dtype=a.dtype)
    torch.testing.assert_close(pytree.tree_map(lambda *v: torch.stack(v), *outputs), expected)
    torch.testing.assert_close(state, last)
    (fw, bw), _ = torchrnn.bidirectional_dynamic_rnn(
        Nested(), Nested(), {"a": a, "b": b}, dtype=a.dtype, time_major=True
    )
    torch.testing.assert_close(fw, expected)
    assert pytree.tree_structure(bw) == pytree.tree_structure(expected)
    both, _, _ = torchrnn.static_bidirectional_rnn(Nested(), Nested(), listed, dtype=a.dtype)
    assert both[0][0]["product"].shape == (3, 4)


def test_lists_of_unlike_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="one structure"):
        torchrnn.static_rnn(Nested(), [torch.ones(2, 2), {"a": torch.ones(2, 2)}], dtype=torch.float64)


class Shaped(rnn_cell.RNNCell):
    """A running sum of inputs [B, 2, 3]."""

    @property
    def state_size(self) -> torch.Size:
        return torch.Size([2, 3])

    output_size = state_size

    def check_inputs(self, inputs: Any) -> None:
        assert inputs.shape[1:] == (2, 3)

    def call(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return inputs + state, inputs + state


@pytest.mark.parametrize("way", WAYS)
def test_states_and_inputs_of_higher_rank(way: str) -> None:
    x = torch.randn(4, 5, 2, 3)
    with WAYS[way]():
        outputs, state = run(Shaped(), x, [5, 3, 0, 1])
    sums = x.cumsum(1)
    for row, n in enumerate([5, 3, 0, 1]):
        torch.testing.assert_close(outputs[row, :n], sums[row, :n])
        assert not outputs[row, n:].any()
        torch.testing.assert_close(state[row], sums[row, n - 1] if n else torch.zeros(2, 3))
    outputs, state = run(Shaped(), x[:, :0])
    assert outputs.shape == (4, 0, 2, 3)
    assert state.shape == (4, 2, 3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKERS)
def test_time_major_only_swaps_axes(name: str, way: str) -> None:
    cell, x = MAKERS[name](), torch.randn(3, 4, 5)
    with WAYS[way]():
        outputs, state = run(cell, x, [4, 2, 3])
        swapped, same = run(cell, x.transpose(0, 1), [4, 2, 3], time_major=True)
    torch.testing.assert_close(swapped.transpose(0, 1), outputs, rtol=0, atol=0)
    torch.testing.assert_close(same, state, rtol=0, atol=0)


def test_transpose_batch_time_swaps_two_axes_if_there_are_two() -> None:
    x = torch.randn(2, 3, 4)
    assert torch.equal(torchrnn.transpose_batch_time(x), x.transpose(0, 1))
    assert torchrnn.transpose_batch_time(x[0, 0]) is not None
    assert torch.equal(torchrnn.transpose_batch_time(x[0, 0]), x[0, 0])


# Initial states -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_plain_tuples_do_for_named_states(way: str) -> None:
    cell, x = rnn_cell.LSTMCell(4), torch.randn(2, 3, 5)
    c, h = torch.randn(2, 4), torch.randn(2, 4)
    with WAYS[way]():
        expected, last = run(cell, x, None, LSTMStateTuple(c, h))
        for state in ((c, h), [c, h]):
            outputs, new = run(cell, x, None, state)
            assert isinstance(new, LSTMStateTuple)
            torch.testing.assert_close((outputs, new), (expected, last), rtol=0, atol=0)
    stack, inner = rnn_cell.MultiRNNCell([cell, rnn_cell.GRUCell(3)]), torch.randn(2, 3)
    with WAYS[way]():
        outputs, (lstm, _) = run(stack, x, None, [(c, h), inner])
    assert isinstance(lstm, LSTMStateTuple)
    torch.testing.assert_close(lstm, last)


@pytest.mark.parametrize("name", MAKERS)
def test_an_initial_state_needs_no_dtype_and_zeros_are_the_default(name: str) -> None:
    cell, x = MAKERS[name](), torch.randn(2, 3, 5)
    zeros = torchrnn.dynamic_rnn(cell, x, initial_state=cell.zero_state(2, x.dtype))
    torch.testing.assert_close(run(cell, x), zeros, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKERS)
def test_a_state_carries_a_sequence_on(name: str, way: str) -> None:
    cell, x = MAKERS[name](), torch.randn(2, 6, 5)
    with WAYS[way]():
        expected = run(cell, x)
        first, state = run(cell, x[:, :2])
        second, last = run(cell, x[:, 2:], None, state)
    torch.testing.assert_close((torch.cat([first, second], 1), last), expected)


def test_each_direction_has_its_own_state() -> None:
    fw, bw, x = gru(), gru(), torch.randn(2, 3, 5)
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    (out_fw, out_bw), _ = torchrnn.bidirectional_dynamic_rnn(
        fw, bw, x, initial_state_fw=a, initial_state_bw=b
    )
    torch.testing.assert_close(out_fw, run(fw, x, None, a)[0])
    torch.testing.assert_close(out_bw, run(bw, x.flip(1), None, b)[0].flip(1))


def test_states_by_layer_of_a_bidirectional_stack() -> None:
    fw, bw, x = [gru(), gru()], [gru(), gru()], torch.randn(2, 3, 5)
    a, b = ([torch.randn(2, 4), torch.randn(2, 4)] for _ in range(2))
    outputs, states_fw, states_bw = torchrnn.stack_bidirectional_dynamic_rnn(fw, bw, x, a, b)
    y: Any = x
    for i in range(2):
        y, states = torchrnn.bidirectional_dynamic_rnn(fw[i], bw[i], y, None, a[i], b[i])
        y = torch.cat(y, -1)
        torch.testing.assert_close((states_fw[i], states_bw[i]), states, rtol=0, atol=0)
    torch.testing.assert_close(outputs, y, rtol=0, atol=0)


class Saver:
    """Keeps states by name."""

    def __init__(self, states: dict[str, Tensor]) -> None:
        self.states = states

    def state(self, name: str) -> Tensor:
        return self.states[name]

    def save_state(self, name: str, value: Tensor) -> None:
        self.states[name] = value


def test_a_state_saver_gives_and_gets_the_state() -> None:
    cell, x = rnn_cell.LSTMCell(4), torch.randn(6, 2, 5)
    saver = Saver({"c": torch.zeros(2, 4), "h": torch.zeros(2, 4)})
    outputs = []
    for part in (x[:2], x[2:]):
        found, state = torchrnn.static_state_saving_rnn(cell, list(part), saver, ("c", "h"))
        outputs += found
        torch.testing.assert_close((saver.states["c"], saver.states["h"]), tuple(state), rtol=0, atol=0)
    expected, last = run(cell, x, time_major=True)
    torch.testing.assert_close((torch.stack(outputs), state), (expected, last))
    saver = Saver({"h": torch.zeros(2, 4)})
    torchrnn.static_state_saving_rnn(gru(), list(x), saver, "h", sequence_length=[0, 6])
    assert not saver.states["h"][0].any()
    assert saver.states["h"][1].any()


# raw_rnn --------------------------------------------------------------------------------------------------


def test_raw_rnn_emits_a_structure_of_its_own_and_carries_a_loop_state() -> None:
    cell, x, lengths = gru(), torch.randn(4, 3, 5), torch.tensor([3, 0, 2])

    def step(time: int, output: Any, state: Any, loop_state: Any) -> Any:
        done = time >= lengths
        if time == 0:
            assert output is None
            assert state is None
            assert loop_state is None
            emit = {"norm": torch.zeros(()), "twice": torch.zeros(4)}
            return done, x[0], torch.zeros(3, 4), emit, [0]
        emit = {"norm": output.norm(dim=1), "twice": 2 * output}
        # A state of the caller's: what the next step starts from.
        return done, x[min(time, 3)], state / 2, emit, [*loop_state, time]

    emitted, state, loop_state = torchrnn.raw_rnn(cell, step)
    assert loop_state == [0, 1, 2, 3]
    assert emitted["norm"].shape == (3, 3)
    assert emitted["twice"].shape == (3, 3, 4)
    h, expected = torch.zeros(3, 4), []
    for t in range(3):
        output, _ = cell(x[t], h)
        h = torch.where((t < lengths)[:, None], output / 2, h)
        expected.append(torch.where((t < lengths)[:, None], 2 * output, 0))
    torch.testing.assert_close(emitted["twice"], torch.stack(expected))
    torch.testing.assert_close(emitted["norm"], torch.stack(expected).norm(dim=2) / 2)
    torch.testing.assert_close(state, h)


def test_raw_rnn_that_is_finished_at_once_emits_no_step() -> None:
    state = torch.randn(2, 4)
    emitted, last, loop_state = torchrnn.raw_rnn(
        gru(), lambda *_: (torch.tensor([True, True]), torch.randn(2, 5), state, None, "kept")
    )
    assert emitted.shape == (0, 2, 4)
    assert torch.equal(last, state)
    assert loop_state == "kept"


def test_raw_rnn_keeps_rows_finished() -> None:
    done = {0: [False, False], 1: [True, False], 2: [False, False], 3: [False, True]}

    def step(time: int, output: Any, state: Any, _: Any) -> Any:
        first = torch.zeros(2, 4) if time == 0 else state
        return torch.tensor(done[time]), torch.ones(2, 5), first, output, None

    emitted, _, loop_state = torchrnn.raw_rnn(gru(), step)
    assert emitted.shape == (3, 2, 4)
    assert emitted[0].all()
    assert not emitted[1:, 0].any()
    assert emitted[1:, 1].all()
    assert loop_state is None


# The two ways ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize(("batch", "units"), list(itertools.product([1, 7, 33], repeat=2)))
@pytest.mark.parametrize("name", ["BasicRNNCell", "GRUCell", "BasicLSTMCell", "LSTMCell"])
def test_stepwise_equals_fused(name: str, batch: int, units: int, lengths: bool) -> None:
    kwargs: dict[str, Any] = {}
    if name == "LSTMCell":
        kwargs = {"use_peepholes": True, "cell_clip": 0.4, "num_proj": units + 1, "proj_clip": 0.2}
    cells = [getattr(rnn_cell, name)(units, **kwargs) for _ in range(2)]
    x = torch.randn(batch, 4, 3, requires_grad=True)
    rows = torch.randint(0, 5, (batch,)) if lengths else None
    states = [
        pytree.tree_map(lambda v: torch.randn_like(v).requires_grad_(), cell.zero_state(batch, x.dtype))
        for cell in cells
    ]
    found = []
    for way in WAYS.values():
        with way():
            results = torchrnn.bidirectional_dynamic_rnn(*cells, x, rows, *states)
        wanted = [x, states, [list(cell.parameters()) for cell in cells]]
        found.append((results, grads(results, wanted)))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MAKERS)
def test_results_have_the_dtype_of_the_inputs(name: str, way: str, dtype: torch.dtype) -> None:
    cell, x = MAKERS[name](), torch.randn(2, 3, 5, dtype=dtype, requires_grad=True)
    with WAYS[way]():
        results = run(cell, x, [3, 1])
    assert {leaf.dtype for leaf in pytree.tree_leaves(results)} == {dtype}
    assert {leaf.dtype for leaf in grads([v.double() for v in pytree.tree_leaves(results)], x)} == {dtype}


def test_names_of_0_x_are_known() -> None:
    cell, x = gru(), steps()
    state, lengths = torch.randn(2, 4), [3, 1]
    expected = torchrnn.static_rnn(cell, x, state, None, lengths)
    # The order of arguments in 0.12: cell, inputs, initial_state, dtype, sequence_length, scope.
    torch.testing.assert_close(torchrnn.rnn(cell, x, state, None, lengths, "encoder"), expected)
    saver = Saver({"h": state})
    outputs, last = torchrnn.state_saving_rnn(cell, x, saver, "h", lengths, "encoder")
    torch.testing.assert_close((outputs, last), expected)
    both = torchrnn.bidirectional_rnn(cell, cell, x, state, state, None, lengths, "both")
    torch.testing.assert_close(
        both, torchrnn.static_bidirectional_rnn(cell, cell, x, state, state, None, lengths)
    )


def test_stepwise_calls_the_cell_and_ends_with_its_block() -> None:
    calls: list[int] = []
    cell, x = gru(), torch.randn(2, 3, 5)
    cell.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(KeyError), torchrnn.stepwise():
        run(cell, x)
        raise KeyError
    assert len(calls) == 3
    run(cell, x)
    assert len(calls) == 3 + 1  # Once before the sequence.


def test_a_subclass_with_equations_of_its_own_is_not_run_by_those_of_its_base() -> None:
    class Halved(rnn_cell.LSTMCell):
        def call(self, inputs: Any, state: Any) -> Any:
            output, new = super().call(inputs, state)
            return output / 2, new

    class Doubled(rnn_cell.GRUCell):
        def forward(self, inputs: Any, state: Any, scope: object = None) -> Any:
            output, new = super().forward(inputs, state)
            return output * 2, new

    for cell in (Halved(4), Doubled(4)):
        for outer in (cell, rnn_cell.MultiRNNCell([cell])):
            x = torch.randn(2, 3, 5)
            with torchrnn.stepwise():
                expected = run(outer, x)
            torch.testing.assert_close(run(outer, x), expected)
            assert "generic loop" in torchrnn.explain(outer)
            assert "one op" not in torchrnn.explain(outer)


def test_a_subclass_with_parts_of_a_step_of_its_own_is_not_run_by_those_of_its_base() -> None:
    class Halved(rnn_cell.UGRNNCell):
        def step(self, projected: Tensor, state: Tensor) -> Any:
            output, new = super().step(projected, state)
            return output / 2, new

    class Doubled(rnn_cell.GLSTMCell):
        def project(self, inputs: Tensor) -> Tensor:
            return super().project(inputs) * 2

    class Negated(Halved):
        def call(self, inputs: Tensor, state: Tensor) -> Any:
            output, new = super().call(inputs, state)
            return -output, new

    class Shifted(Negated):
        def step(self, projected: Tensor, state: Tensor) -> Any:
            output, new = super().step(projected, state)
            return output + 1, new

    class Explained(rnn_cell.GRUCell):
        def call(self, inputs: Tensor, state: Tensor) -> Any:
            return super().call(inputs, state + 1)

        def why_loop(self) -> str:
            return "it is mine"

    for cell in (Halved(4), Doubled(4), Negated(4), Shifted(4), Explained(4)):
        x = torch.randn(2, 3, 5)
        with torchrnn.stepwise():
            expected = run(cell, x)
        torch.testing.assert_close(run(cell, x), expected)
        assert "one op" not in torchrnn.explain(cell)
    assert "for all steps at once" in torchrnn.explain(Halved(4))
    assert torchrnn.explain(Explained(4)).endswith("step by step; it is mine")


def test_explain_says_nothing_of_cells_inside_one_that_calls_them_step_by_step() -> None:
    class Outer(rnn_cell.RNNCell):
        state_size = output_size = 4

        def __init__(self) -> None:
            super().__init__()
            self.cell = rnn_cell.GRUCell(4)

        def inner_cells(self) -> Any:
            return [("", self.cell)]

        def call(self, inputs: Tensor, state: Tensor) -> Any:
            output, new = self.cell(inputs, state)
            return output, new

    class Own(Outer):
        def unroll(self, inputs: Tensor, state: Tensor, run: Any) -> Any:
            return self.cell.unroll(inputs, state, run)

    assert torchrnn.explain(Outer()) == "Outer: generic loop, step by step; the class has no faster way"
    assert torchrnn.explain(Own()).splitlines()[0] == "Own: in its own way over the whole sequence"
    assert "one op" in torchrnn.explain(Own()).splitlines()[1]


def test_explain_has_a_line_for_each_part() -> None:
    cell = rnn_cell.MultiRNNCell(
        [
            rnn_cell.LSTMCell(4, use_peepholes=True, num_proj=3),
            rnn_cell.GRUCell(5, activation="softsign"),
            rnn_cell.BasicRNNCell(6),
        ]
    )
    first, *lines = torchrnn.explain(cell).splitlines()
    assert first.startswith("MultiRNNCell of 3")
    assert [line.split(":")[0] for line in lines] == ["  LSTMCell(4)", "  GRUCell(5)", "  BasicRNNCell(6)"]
    for line in (lines[0], lines[2]):
        assert "one op over the sequence" in line
    assert "peepholes, projection" in lines[0]
    assert "generic loop" in lines[1]
    assert "softsign" in lines[1]


def test_explain_says_why_a_users_cell_runs_in_the_loop() -> None:
    class Duck:
        state_size = output_size = 3

        def zero_state(self, batch_size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch_size, 3, dtype=dtype)

        def __call__(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return inputs + state, inputs

    for cell, name in ((Duck(), "Duck"), (Shaped(), "Shaped")):
        text = torchrnn.explain(cell)
        assert text.startswith(f"{name}: generic loop")
        assert len(text.splitlines()) == 1
    stack = rnn_cell.MultiRNNCell([Duck(), rnn_cell.GRUCell(4)])
    assert [line.split(":")[0] for line in torchrnn.explain(stack).splitlines()[1:]] == [
        "  Duck",
        "  GRUCell(4)",
    ]
    assert run(stack, torch.randn(2, 4, 3))[0].shape == (2, 4, 4)


class OnlyInitialState:
    """A cell with ``get_initial_state`` and no ``zero_state``."""

    state_size = output_size = 3

    def get_initial_state(self, inputs: Any, batch_size: int, dtype: torch.dtype) -> Tensor:
        return torch.ones(batch_size, 3, dtype=dtype)

    def __call__(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return inputs + state, inputs + state


def test_a_cell_may_give_its_initial_state_either_way() -> None:
    x = torch.randn(2, 4, 3)
    outputs, _ = run(OnlyInitialState(), x)
    torch.testing.assert_close(outputs, 1 + x.cumsum(1))


# With the rest of torch -----------------------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """Something before and after a cell's unrolling."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.before = nn.Linear(5, 5)
        self.cell = cell

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Any:
        outputs, state = torchrnn.dynamic_rnn(self.cell, self.before(x), lengths, dtype=x.dtype)
        return outputs * 2, state


def check_compiled(name: str, backend: str) -> None:
    model = Model(built(MAKERS[name](), 5))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(3, 4, 5, requires_grad=True)
    for lengths in (None, torch.tensor([4, 0, 2])):
        expected, found = model(x, lengths), compiled(x, lengths)
        torch.testing.assert_close(found, expected)
        wanted = [x, *model.parameters()]
        torch.testing.assert_close(grads(found, wanted), grads(expected, wanted))


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("name", ["lstm", "gru-softsign"])
def test_a_model_with_a_built_cell_is_one_graph(name: str) -> None:
    check_compiled(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("name", MAKERS)
def test_a_model_with_a_built_cell_compiles(name: str) -> None:
    check_compiled(name, "inductor")


@pytest.mark.parametrize("is_built", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_copies_of_cells_compute_the_same(name: str, is_built: bool) -> None:
    cell, x = MAKERS[name](), torch.randn(2, 3, 5)
    if is_built:
        cell.build(5)
    copies = [copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))]
    expected = run(cell, x)
    for each in copies:
        if not is_built:
            each.build(5)
            each.load_state_dict(cell.state_dict())
        torch.testing.assert_close(run(each, x), expected, rtol=0, atol=0)
        with torch.no_grad():
            for parameter in each.parameters():
                parameter.zero_()
    torch.testing.assert_close(run(cell, x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gru", "stack"])
def test_functional_calls_take_other_parameters(name: str, way: str) -> None:
    model = Model(built(MAKERS[name](), 5))
    other = {key: torch.randn_like(value) for key, value in model.named_parameters()}
    x = torch.randn(2, 3, 5)
    with WAYS[way]():
        found = torch.func.functional_call(model, other, (x,))
        model.load_state_dict(other)
        torch.testing.assert_close(found, model(x))


def test_vmap_over_a_sequence_of_a_loop() -> None:
    cell = built(gru(), 5)
    x = torch.randn(3, 2, 4, 5)
    with torchrnn.stepwise():
        outputs, _ = torch.func.vmap(lambda each: run(cell, each))(x)
        expected, _ = run(cell, x.flatten(0, 1))
    torch.testing.assert_close(outputs.flatten(0, 1), expected)


@pytest.mark.parametrize("lengths", [None, [2, 0, 6, 3]], ids=["full", "lengths"])
def test_a_model_exports_with_any_number_of_steps(lengths: list[int] | None) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = rnn_cell.MultiRNNCell([rnn_cell.LSTMCell(7), rnn_cell.GRUCell(3)])
            self.cell.build(5)

        def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
            return torchrnn.dynamic_rnn(self.cell, x, lengths, dtype=x.dtype)[0]

    model, given = Model(), None if lengths is None else torch.tensor(lengths)
    steps = {"x": {1: torch.export.Dim("steps", min=2, max=50)}, "lengths": None}
    program = torch.export.export(model, (torch.randn(4, 6, 5), given), dynamic_shapes=steps)
    x = torch.randn(4, 9, 5)
    torch.testing.assert_close(program.module()(x, given), model(x, given))
