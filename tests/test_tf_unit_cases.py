"""The numbers and relations that TensorFlow 1.15's own unit tests assert."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import one_thread
from golden_cells import GOLDEN, WAYS, load, make, structured
from torch import Tensor
from torch.utils import _pytree as pytree

import torchrnn
from torchrnn import rnn_cell

CASES: list[dict[str, Any]] = json.loads((GOLDEN / "tf_unit_cases.json").read_text())["cases"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Plus1RNNCell(rnn_cell.RNNCell):
    """A cell that adds 1 to its input and to its state of 5."""

    @property
    def state_size(self) -> int:
        return 5

    @property
    def output_size(self) -> int:
        return 5

    def call(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return inputs + 1, state + 1


class DuckPlus1RNNCell:
    """The same, and no RNNCell."""

    state_size = output_size = 5

    def zero_state(self, batch_size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch_size, 5, dtype=dtype)

    def __call__(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return inputs + 1, state + 1


def name_of(case: dict[str, Any]) -> str:
    return str(case["test"].rpartition("::")[2])


def tensor(values: Any, dtype: torch.dtype) -> Tensor:
    """Returns indices as integers, and everything else in the dtype."""
    is_index = np.asarray(values).dtype.kind == "i"
    return torch.tensor(values, dtype=torch.int64 if is_index else dtype)


def value_of(variable: dict[str, Any], dtype: torch.dtype) -> Tensor:
    if "const" in variable:
        return torch.full(variable["shape"], variable["const"], dtype=dtype)
    return torch.tensor(variable["values"], dtype=dtype).reshape(variable["shape"])


def run(case: dict[str, Any], cell: Any) -> tuple[Tensor, Any]:
    dtype = getattr(torch, case["dtype"])
    inputs = [tensor(values, dtype) for values in case["inputs"]]
    if case["cell"]["class"] == "PhasedLSTMCell":
        inputs[0] = inputs[0].double()  # The time may be more exact than the rest.
    x: Any = inputs[0] if len(inputs) == 1 else tuple(inputs)
    state = None
    if case["state"] is not None:
        state = structured(cell, [tensor(values, dtype) for values in case["state"]])
    lengths = case["sequence_length"]
    if case["call"] == "step":
        result: tuple[Tensor, Any] = cell(x, state)
        return result
    if case["call"] == "static_rnn":
        outputs, state = torchrnn.static_rnn(cell, list(x.unbind()), state, dtype, lengths)
        return torch.stack(outputs), state
    return torchrnn.dynamic_rnn(cell, x, lengths, state, dtype, time_major=case["time_major"])


def check(case: dict[str, Any], plus_1: type) -> None:
    cell = make(case["cell"], {"Plus1RNNCell": plus_1})
    with torch.no_grad():
        if case["variables"]:
            dtype = getattr(torch, case["dtype"])
            values = {name: value_of(each, dtype) for name, each in case["variables"].items()}
            load(values, {"root/" if case["call"] == "step" else "root/rnn/": cell})
        output, state = run(case, cell)
    leaves = pytree.tree_leaves(state)
    found = {"output": output} | {f"state.{k}": leaf for k, leaf in enumerate(leaves)}
    if "state_concat" in case["expected"]:
        found["state_concat"] = torch.cat(leaves, 1)
    for key, expected in case["expected"].items():
        np.testing.assert_allclose(found[key].numpy(), expected, case["rtol"], case["atol"], err_msg=key)
    # TensorFlow's own numbers in full; the literals are rounded.
    computed = case["tf_computed"]
    np.testing.assert_allclose(output.numpy(), computed["output"], 1e-5, 1e-6)
    for leaf, expected in zip(leaves, computed["state"], strict=True):
        np.testing.assert_allclose(leaf.numpy(), expected, 1e-5, 1e-6)


@pytest.mark.parametrize(
    ("case", "way"),
    [
        pytest.param(case, way, id=f"{name_of(case)}-{way}")
        for case in CASES
        for way in WAYS
        if way == "fused" or case["call"] != "step"
    ],
)
def test_literals_of_tensorflow(case: dict[str, Any], way: str) -> None:
    with WAYS[way]():
        check(case, Plus1RNNCell)


@pytest.mark.parametrize("case", [case for case in CASES if "Plus1" in str(case["cell"])], ids=name_of)
def test_literals_of_tensorflow_with_a_cell_that_is_no_rnn_cell(case: dict[str, Any]) -> None:
    check(case, DuckPlus1RNNCell)


# Relations ------------------------------------------------------------------------------------------------

MAKERS: dict[str, Callable[[], Any]] = {
    "rnn": lambda: rnn_cell.BasicRNNCell(4),
    "gru": lambda: rnn_cell.GRUCell(4),
    "lstm": lambda: rnn_cell.LSTMCell(4, use_peepholes=True, cell_clip=0.3, num_proj=3),
    "concatenated": lambda: rnn_cell.LSTMCell(4, state_is_tuple=False),
    "softsign": lambda: rnn_cell.GRUCell(4, activation="softsign"),
    "stack": lambda: rnn_cell.MultiRNNCell([rnn_cell.LSTMCell(4), rnn_cell.GRUCell(5)]),
    "own": Plus1RNNCell,
}


def same(run_a: Callable[..., Any], run_b: Callable[..., Any], cell: Any, *inputs: Tensor) -> None:
    """Asserts that two functions of the inputs agree in values and all gradients."""
    results, grads = [], []
    leaves = [each.requires_grad_() for each in inputs]
    for each in (run_a, run_b):
        found = pytree.tree_leaves(each(*leaves))
        results.append(found)
        wanted = leaves + list(cell.parameters())
        loss = sum((value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum() for value in found)
        grads.append(torch.autograd.grad(loss, wanted))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.fixture
def _double() -> None:
    torch.set_default_dtype(torch.float64)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("lengths", [None, [5, 0, 2]])
@pytest.mark.parametrize("name", MAKERS)
def test_static_rnn_equals_dynamic_rnn(name: str, lengths: list[int] | None) -> None:
    cell = MAKERS[name]()
    cell.build(5)

    def dynamic(x: Tensor) -> Any:
        return torchrnn.dynamic_rnn(cell, x, lengths, dtype=x.dtype, time_major=True)

    def static(x: Tensor) -> Any:
        outputs, state = torchrnn.static_rnn(cell, list(x), dtype=x.dtype, sequence_length=lengths)
        return torch.stack(outputs), state

    same(dynamic, static, cell, torch.randn(5, 3, 5))


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("name", MAKERS)
def test_raw_rnn_equals_dynamic_rnn(name: str) -> None:
    cell, lengths = MAKERS[name](), torch.tensor([5, 0, 2])
    cell.build(5)

    def dynamic(x: Tensor) -> Any:
        return torchrnn.dynamic_rnn(cell, x, lengths, dtype=x.dtype, time_major=True)

    def raw(x: Tensor) -> Any:
        def step(time: int, output: Any, state: Any, _: Any) -> Any:
            first = cell.zero_state(3, x.dtype) if time == 0 else state
            return time >= lengths, x[min(time, 4)], first, output, None

        return torchrnn.raw_rnn(cell, step)[:2]

    same(dynamic, raw, cell, torch.randn(5, 3, 5))


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("name", MAKERS)
def test_palindromes_read_the_same_in_both_directions(name: str) -> None:
    cell = MAKERS[name]()
    half = torch.randn(3, 2, 5)
    x = torch.cat([half, half.flip(1), torch.randn(3, 2, 5)], 1)
    lengths = torch.tensor([4, 4, 4])
    (fw, bw), (state_fw, state_bw) = torchrnn.bidirectional_dynamic_rnn(cell, cell, x, lengths, dtype=x.dtype)
    torch.testing.assert_close(fw[:, :4], bw[:, :4].flip(1))
    assert not fw[:, 4:].any()
    assert not bw[:, 4:].any()
    torch.testing.assert_close(state_fw, state_bw)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("lengths", [None, [6, 0, 1, 4]])
def test_the_backward_direction_is_the_forward_one_over_each_rows_reversal(lengths: list[int] | None) -> None:
    cell, x = rnn_cell.GRUCell(4), torch.randn(4, 6, 5)
    (_, out), (_, state) = torchrnn.bidirectional_dynamic_rnn(cell, cell, x, lengths, dtype=x.dtype)

    def backwards(values: Tensor) -> Tensor:
        rows = zip(values, lengths or [6] * 4, strict=True)
        return torch.stack([torch.cat([row[:n].flip(0), row[n:]]) for row, n in rows])

    expected, expected_state = torchrnn.dynamic_rnn(cell, backwards(x), lengths, dtype=x.dtype)
    torch.testing.assert_close(out, backwards(expected))
    torch.testing.assert_close(state, expected_state)


def test_shards_change_nothing() -> None:
    cells = [rnn_cell.LSTMCell(4, num_unit_shards=n, num_proj_shards=n, num_proj=3) for n in (None, 2)]
    x = torch.randn(2, 5, 3)
    for cell in cells:
        cell.build(3)
    cells[1].load_state_dict(cells[0].state_dict())
    plain, sharded = (torchrnn.dynamic_rnn(cell, x, dtype=x.dtype) for cell in cells)
    torch.testing.assert_close(plain, sharded, rtol=0, atol=0)


def test_a_residual_function_may_slice_the_input() -> None:
    gru = {"class": "GRUCell", "kwargs": {"num_units": 3}}
    cell = make({"class": "ResidualWrapper", "cell": gru, "residual_slice": 3})
    x, state = torch.randn(2, 5), torch.randn(2, 3)
    output, new = cell(x, state)
    (inner,) = (module for module in cell.modules() if isinstance(module, rnn_cell.GRUCell))
    expected, expected_new = inner(x, state)
    torch.testing.assert_close(output, x[:, :3] + expected)
    torch.testing.assert_close(new, expected_new)
