"""DropoutWrapper: what is dropped and when, masks of steps, sequences and rows, given noise, errors.

One file, as all sections share the noise and the loop it is replayed in.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_cells import WAYS
from torch import Tensor
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import torchrnn
from torchrnn.rnn_cell import (
    AttentionCellWrapper,
    BasicLSTMCell,
    BasicRNNCell,
    DropoutWrapper,
    EmbeddingWrapper,
    GRUCell,
    LSTMCell,
    LSTMStateTuple,
    MultiRNNCell,
    RNNCell,
)
from torchrnn.rnn_cell.dropout import visit

T, B, N, U = 6, 4, 5, 3
F64 = torch.float64
LENGTHS = torch.tensor([6, 2, 0, 5])
VARIATIONAL: dict[str, Any] = {"variational_recurrent": True, "dtype": F64, "input_size": N}

CELLS: dict[str, Callable[[], RNNCell]] = {
    "rnn": lambda: BasicRNNCell(U),
    "gru": lambda: GRUCell(U),
    "lstm": lambda: LSTMCell(U),
    "lstm-concatenated": lambda: BasicLSTMCell(U, state_is_tuple=False),
    "lstm-loop": lambda: LSTMCell(U, activation="softsign"),
    "stack": lambda: MultiRNNCell([LSTMCell(4), GRUCell(U)]),
    "attention": lambda: AttentionCellWrapper(GRUCell(4), 2, attn_size=U),
}


class Counter:
    """A cell that is no module: its output is its input, its state the sum of its inputs."""

    state_size = output_size = N

    def zero_state(self, batch_size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch_size, N, dtype=dtype)

    def __call__(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return x, s + x


def noise_for(cell: RNNCell, variational: bool) -> dict[str, Any]:
    lead = (1,) if variational else (T, B)
    sizes = pytree.tree_leaves(cell.state_size)
    return {
        "input": torch.rand(*lead, N, dtype=F64),
        "output": torch.rand(*lead, U, dtype=F64),
        "state": [torch.rand(*lead, size, dtype=F64) for size in sizes],
    }


def outputs(cell: RNNCell, x: Tensor, lengths: Any = None) -> Tensor:
    y: Tensor = torchrnn.dynamic_rnn(cell, x, lengths, dtype=x.dtype, time_major=True)[0]
    return y


def masks(keep: Tensor) -> int:
    """Returns how many different masks there are along the first axis."""
    return keep.flatten(1).unique(dim=0).size(0)


# Equations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variational", [False, True], ids=["per step", "variational"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])
@pytest.mark.parametrize("name", CELLS)
def test_given_noise_makes_a_sequence_at_once_equal_step_by_step(
    name: str, lengths: Tensor | None, variational: bool
) -> None:
    inner = CELLS[name]()
    options = VARIATIONAL if variational else {}
    cell = DropoutWrapper(inner, 0.7, 0.8, 0.6, noise=noise_for(inner, variational), **options)
    cell.build(N, F64)
    x = torch.randn(T, B, N, dtype=F64, requires_grad=True)
    state = pytree.tree_map(lambda s: torch.randn_like(s).requires_grad_(), cell.zero_state(B, F64))
    found = []
    for way in WAYS.values():
        with way():
            results = pytree.tree_leaves(
                torchrnn.dynamic_rnn(cell, x, lengths, state, dtype=F64, time_major=True)
            )
        loss = sum((v * torch.linspace(-1, 1, v.numel(), dtype=F64).view(v.shape)).sum() for v in results)
        wanted = [x, *pytree.tree_leaves(state), *cell.parameters()]
        found.append([*results, *torch.autograd.grad(loss, wanted)])
    assert_close(found[0], found[1])


@pytest.mark.parametrize("way", WAYS)
def test_dropout_in_a_step_is_that_of_input_then_cell_then_state_and_output(way: str) -> None:
    lstm = LSTMCell(U)
    lstm.build(N, F64)
    noise = noise_for(lstm, False)
    noise["state"][0] = None
    cell = DropoutWrapper(lstm, 0.7, 0.8, 0.6, noise=noise)
    x = torch.randn(T, B, N, dtype=F64)
    keep = {
        kind: torch.tensor(p, dtype=torch.float32).to(F64)
        for kind, p in zip("ios", (0.7, 0.8, 0.6), strict=True)
    }
    state, expected = lstm.zero_state(B, F64), []
    for t in range(T):
        dropped = torch.where(noise["input"][t] >= 1 - keep["i"], x[t] / keep["i"], 0)
        y, (c, h) = lstm(dropped, state)
        assert_close(y, h)
        state = LSTMStateTuple(c, torch.where(noise["state"][1][t] >= 1 - keep["s"], h / keep["s"], 0))
        expected.append(torch.where(noise["output"][t] >= 1 - keep["o"], y / keep["o"], 0))
    with WAYS[way]():
        found = torchrnn.dynamic_rnn(cell, x, dtype=F64, time_major=True)
    assert_close(found, (torch.stack(expected), state))


@pytest.mark.parametrize("way", WAYS)
def test_state_past_the_length_is_the_dropped_one_of_the_last_step(way: str) -> None:
    noise = torch.rand(T, B, N, dtype=F64)
    cell = DropoutWrapper(Counter(), state_keep_prob=0.5, noise={"state": noise})
    x = torch.randn(T, B, N, dtype=F64)
    with WAYS[way]():
        _, state = torchrnn.dynamic_rnn(cell, x, LENGTHS, dtype=F64, time_major=True)
    for row, length in enumerate(LENGTHS.tolist()):
        expected = torch.zeros(N, dtype=F64)
        for t in range(length):
            expected = torch.where(noise[t, row] >= 0.5, (expected + x[t, row]) / 0.5, 0)
        assert_close(state[row], expected)


@pytest.mark.parametrize("way", WAYS)
def test_masks_of_two_wrappers_multiply(way: str) -> None:
    first, second = torch.rand(2, T, B, N, dtype=F64)
    cell = DropoutWrapper(Counter(), state_keep_prob=0.5, noise={"state": first})
    cell = DropoutWrapper(cell, state_keep_prob=0.8, noise={"state": second})
    x = torch.randn(T, B, N, dtype=F64)
    with WAYS[way]():
        _, state = torchrnn.dynamic_rnn(cell, x, dtype=F64, time_major=True)
    expected = torch.zeros(B, N, dtype=F64)
    p = torch.tensor(0.8, dtype=torch.float32).to(F64)
    for t in range(T):
        expected = (expected + x[t]) * (first[t] >= 0.5) / 0.5 * (second[t] >= 1 - p) / p
    assert_close(state, expected)


def test_given_noise_of_a_step_goes_to_the_step_walked_then() -> None:
    cell = DropoutWrapper(Counter(), 0.5, noise={"input": torch.rand(T, B, N, dtype=F64)})
    x = torch.randn(B, T, N, dtype=F64)
    (_, backward), _ = torchrnn.bidirectional_dynamic_rnn(Counter(), cell, x, LENGTHS, dtype=F64)
    expected = torch.zeros_like(x)
    for row, length in enumerate(LENGTHS.tolist()):
        reversed_row = x[row, :length].flip(0)[:, None].expand(-1, B, -1)
        walked, _ = (
            torchrnn.dynamic_rnn(cell, reversed_row, dtype=F64, time_major=True)
            if length
            else (reversed_row, None)
        )
        expected[row, :length] = walked[:, row].flip(0)
    assert_close(backward, expected)


def test_probability_counts_in_float32() -> None:
    cell = DropoutWrapper(Counter(), output_keep_prob=0.7, noise={"output": torch.ones(1, 1, N)})
    x = torch.ones(1, N, dtype=F64)
    y, _ = cell(x, x)
    assert (y == 1 / torch.tensor(0.7).to(F64)).all()
    assert (y != 1 / 0.7).all()


def test_number_is_kept_where_noise_is_at_least_1_less_p() -> None:
    noise = torch.tensor([0.0, 0.4999, 0.5, 0.5001, 0.9999]).view(1, 1, N)
    cell = DropoutWrapper(Counter(), output_keep_prob=0.5, noise={"output": noise})
    y, _ = cell(torch.ones(1, N), torch.ones(1, N))
    assert y.tolist() == [[0, 0, 2, 2, 2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", CELLS)
def test_results_have_the_dtype_of_the_input(name: str, dtype: torch.dtype) -> None:
    cell = DropoutWrapper(CELLS[name](), 0.5, 0.5, torch.tensor(0.5))
    y, state = torchrnn.dynamic_rnn(cell, torch.randn(B, T, N, dtype=dtype), LENGTHS, dtype=dtype)
    assert {v.dtype for v in pytree.tree_leaves((y, state))} == {dtype}


# When and what --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, VARIATIONAL], ids=["per step", "variational"])
@pytest.mark.parametrize("way", WAYS)
def test_eval_mode_drops_nothing(way: str, options: dict[str, Any]) -> None:
    lstm = LSTMCell(U)
    lstm.build(N, F64)
    x = torch.randn(T, B, N, dtype=F64)
    expected = torchrnn.dynamic_rnn(lstm, x, LENGTHS, dtype=F64, time_major=True)
    cell = DropoutWrapper(lstm, 0.5, 0.0, torch.tensor(0.5), **options).eval()
    with WAYS[way]():
        assert_close(torchrnn.dynamic_rnn(cell, x, LENGTHS, dtype=F64, time_major=True), expected)


@pytest.mark.parametrize("way", WAYS)
def test_probability_1_drops_nothing_and_draws_nothing(way: str) -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    x = torch.randn(T, B, N, dtype=F64)
    with WAYS[way]():
        y = outputs(DropoutWrapper(Counter(), 1, 1.0, 1, seed=generator), x)
    assert torch.equal(y, x)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("way", WAYS)
def test_probability_as_a_tensor_may_change_and_learn(way: str) -> None:
    p = torch.tensor(1.0, requires_grad=True)
    noise = torch.rand(T, B, N, dtype=F64)
    cell = DropoutWrapper(Counter(), output_keep_prob=p, noise={"output": noise})
    x = torch.randn(T, B, N, dtype=F64)
    with WAYS[way]():
        assert torch.equal(outputs(cell, x), x)
        with torch.no_grad():
            p.fill_(0.5)
        y = outputs(cell, x)
    assert_close(y, torch.where(noise >= 0.5, x / 0.5, 0))
    y.sum().backward()
    assert_close(p.grad, -(y / 0.5).sum().float())


@pytest.mark.parametrize("way", WAYS)
def test_output_dropout_leaves_the_state_and_state_dropout_the_output_of_the_step(way: str) -> None:
    x = torch.randn(1, B, N, dtype=F64)
    gru = GRUCell(U)
    gru.build(N, F64)
    y, h = torchrnn.dynamic_rnn(gru, x, dtype=F64, time_major=True)
    with WAYS[way]():
        dropped, same = torchrnn.dynamic_rnn(
            DropoutWrapper(gru, output_keep_prob=1e-6), x, dtype=F64, time_major=True
        )
        assert dropped.eq(0).all()
        assert_close(same, h)
        same, dropped = torchrnn.dynamic_rnn(
            DropoutWrapper(gru, state_keep_prob=1e-6), x, dtype=F64, time_major=True
        )
        assert dropped.eq(0).all()
        assert_close(same, y)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("cell", "kept"),
    [
        (GRUCell(U), [False]),
        (LSTMCell(U), [True, False]),
        (BasicLSTMCell(U, state_is_tuple=False), [False]),
        (
            MultiRNNCell([MultiRNNCell([LSTMCell(U), GRUCell(U)]), LSTMCell(U)]),
            [True, False, False, True, False],
        ),
        (AttentionCellWrapper(LSTMCell(U), 2), [True, False, False, False]),
    ],
    ids=["gru", "lstm", "concatenated", "nested", "attention"],
)
def test_default_filter_keeps_the_memory_of_lstms_alone(cell: RNNCell, kept: list[bool], way: str) -> None:
    wrapped = DropoutWrapper(cell, state_keep_prob=1e-6)
    with WAYS[way]():
        _, state = torchrnn.dynamic_rnn(wrapped, torch.randn(B, T, N, dtype=F64), dtype=F64)
    assert [bool(s.ne(0).any()) for s in pytree.tree_leaves(state)] == kept


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("visitor", "kept"),
    [
        (lambda state: True, [False, False, False]),
        (lambda state: False, [True, True, True]),
        (lambda state: (False, True) if type(state) is tuple else True, [True, True, False]),
        (lambda state: not isinstance(state, LSTMStateTuple), [True, True, False]),
        (lambda state: (True, False) if isinstance(state, LSTMStateTuple) else True, [False, True, False]),
        (lambda state: not isinstance(state, Tensor) or state.shape == (B, U), [True, True, False]),
    ],
    ids=["all", "none", "second cell", "no lstm", "memory", "by shape"],
)  # fmt: skip
def test_visitor_chooses_what_of_the_state_is_dropped(visitor: Any, kept: list[bool], way: str) -> None:
    stack = MultiRNNCell([LSTMCell(4), GRUCell(U)])
    cell = DropoutWrapper(stack, state_keep_prob=1e-6, dropout_state_filter_visitor=visitor)
    with WAYS[way]():
        _, state = torchrnn.dynamic_rnn(cell, torch.randn(B, T, N, dtype=F64), dtype=F64)
    assert [bool(s.ne(0).any()) for s in pytree.tree_leaves(state)] == kept


def test_visitor_of_a_dict_may_return_a_dict() -> None:
    state = {"a": torch.zeros(1), "b": (torch.zeros(1), torch.zeros(1))}
    assert visit(lambda s: {"a": False, "b": True} if isinstance(s, dict) else True, state) == [
        False,
        True,
        True,
    ]


def test_plain_tuple_as_a_state_keeps_its_memory() -> None:
    cell = DropoutWrapper(LSTMCell(U), state_keep_prob=1e-6)
    state = (torch.ones(B, U), torch.ones(B, U))
    _, (c, h) = cell(torch.randn(B, N), state)
    assert c.ne(0).all()
    assert h.eq(0).all()


def test_embedding_inside_takes_ids_and_input_dropout_does_not() -> None:
    ids = torch.randint(6, (B, T, 1))
    cell = DropoutWrapper(EmbeddingWrapper(GRUCell(U), 6, 2), output_keep_prob=0.5)
    assert torchrnn.dynamic_rnn(cell, ids, dtype=F64)[0].dtype == F64
    cell = DropoutWrapper(EmbeddingWrapper(GRUCell(U), 6, 2), input_keep_prob=0.5)
    with pytest.raises(ValueError, match="x has to be a floating point tensor"):
        torchrnn.dynamic_rnn(cell, ids, dtype=F64)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, VARIATIONAL], ids=["per step", "variational"])
@pytest.mark.parametrize("name", CELLS)
def test_padding_of_nan_reaches_no_result_and_no_gradient(
    name: str, way: str, options: dict[str, Any]
) -> None:
    cell = DropoutWrapper(CELLS[name](), 0.7, 0.8, 0.6, **options)
    x = torch.randn(B, T, N, dtype=F64)
    x[torch.arange(T) >= LENGTHS[:, None]] = torch.nan
    x.requires_grad_()
    with WAYS[way]():
        y, state = torchrnn.dynamic_rnn(cell, x, LENGTHS, dtype=F64)
    sum(v.sum() for v in pytree.tree_leaves((y, state))).backward()
    for v in pytree.tree_leaves((y, state, x.grad, [p.grad for p in cell.parameters()])):
        assert v.isfinite().all()
    assert y[torch.arange(T) >= LENGTHS[:, None]].eq(0).all()


# Masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["input", "output"])
def test_masks_of_steps_and_rows_differ(kind: str, way: str) -> None:
    cell = DropoutWrapper(Counter(), **{f"{kind}_keep_prob": 0.5})
    with WAYS[way]():
        keep = outputs(cell, torch.ones(40, 4, N))
    assert masks(keep) > 20
    assert masks(keep.transpose(0, 1)) == 4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["input", "output"])
def test_variational_mask_is_one_for_all_steps_and_rows(kind: str, way: str) -> None:
    cell = DropoutWrapper(Counter(), **{f"{kind}_keep_prob": 0.5}, **VARIATIONAL)
    with WAYS[way]():
        keep = outputs(cell, torch.ones(T, 30, N))
    assert masks(keep) == masks(keep.transpose(0, 1)) == 1


@pytest.mark.parametrize("way", WAYS)
def test_variational_masks_are_drawn_for_each_sequence(way: str) -> None:
    cell = DropoutWrapper(Counter(), output_keep_prob=0.5, **VARIATIONAL)
    with WAYS[way]():
        rows = torch.stack([outputs(cell, torch.ones(T, B, N))[0, 0] for _ in range(60)])
    assert masks(rows) > 5


@pytest.mark.parametrize("way", WAYS)
def test_variational_mask_per_sample_is_one_for_all_steps_of_a_row(way: str) -> None:
    cell = DropoutWrapper(Counter(), output_keep_prob=0.5, per_sample=True, **VARIATIONAL)
    with WAYS[way]():
        keep = outputs(cell, torch.ones(T, 60, N))
    assert masks(keep) == 1
    assert masks(keep.transpose(0, 1)) > 5


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_variational_state_mask_is_one_for_all_steps(way: str, per_sample: bool) -> None:
    cell = DropoutWrapper(Counter(), state_keep_prob=0.5, per_sample=per_sample, **VARIATIONAL)
    with WAYS[way]():
        _, state = torchrnn.dynamic_rnn(cell, torch.ones(60, T, N), dtype=torch.float32)
    # A number that is kept in every step is 2 + 4 + ... + 2^T; any other is 0.
    assert set(state.unique().tolist()) <= {0.0, float(2 ** (T + 1) - 2)}
    assert (masks(state) == 1) is (not per_sample)


def test_variational_masks_of_single_steps_last_until_the_next_sequence() -> None:
    cell = DropoutWrapper(Counter(), 0.5, 0.5, **VARIATIONAL)
    x = torch.ones(B, N)
    seen = []
    for _ in range(60):
        state = cell.zero_state(B, torch.float32)
        y, state = cell(x, state)
        assert torch.equal(cell(x, state)[0], y)
        seen.append(y)
    assert masks(torch.stack(seen)) > 5


def test_masks_of_a_batch_of_another_size_are_drawn_anew() -> None:
    cell = DropoutWrapper(Counter(), output_keep_prob=0.5, per_sample=True, **VARIATIONAL)
    for batch in (4, 7):
        y, _ = cell(torch.ones(batch, N), torch.ones(batch, N))
        assert y.shape == (batch, N)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("p", [0.2, 0.7])
def test_share_of_kept_numbers_is_the_probability(p: float, way: str) -> None:
    class Wide(Counter):
        state_size = output_size = 1000

        def zero_state(self, batch_size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch_size, 1000, dtype=dtype)

        def __call__(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            return x, torch.ones_like(x)

    x = torch.ones(10, 20, 1000)
    for kind in ("input", "output"):
        with WAYS[way]():
            y = outputs(DropoutWrapper(Wide(), **{f"{kind}_keep_prob": p}), x)
        assert abs(y.ne(0).float().mean() - p) < 0.02
        assert abs(y.mean() - 1) < 0.05
    with WAYS[way]():
        _, state = torchrnn.dynamic_rnn(DropoutWrapper(Wide(), state_keep_prob=p), x, dtype=x.dtype)
    assert abs(state.ne(0).float().mean() - p) < 0.05


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, VARIATIONAL], ids=["per step", "variational"])
def test_equal_seeds_make_equal_masks(way: str, options: dict[str, Any]) -> None:
    x = torch.randn(T, B, N, dtype=F64)
    gru = GRUCell(U)
    gru.build(N, F64)

    def run(seed: Any) -> list[Tensor]:
        cell = DropoutWrapper(gru, 0.5, 0.5, 0.5, seed=seed, **options)
        with WAYS[way]():
            return [outputs(cell, x) for _ in range(3)]

    first = run(7)
    assert_close(first, run(torch.Generator().manual_seed(7)))
    assert not torch.equal(first[0], run(8)[0])
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(9)
    expected = run(None)
    torch.manual_seed(9)
    assert_close(run(None), expected)


def test_copies_draw_the_same_masks() -> None:
    cell = DropoutWrapper(LSTMCell(U), 0.5, 0.5, 0.5, seed=7, **VARIATIONAL)
    x = torch.randn(T, B, N, dtype=F64)
    outputs(cell, x)
    copied = copy.deepcopy(cell)
    stored = io.BytesIO()
    torch.save(cell, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    expected = outputs(cell, x)
    assert_close(outputs(copied, x), expected)
    assert_close(outputs(loaded, x), expected)


def test_state_dict_holds_the_variables_of_the_cell_inside_alone() -> None:
    cell = DropoutWrapper(LSTMCell(U), 0.5, 0.5, 0.5, seed=7, **VARIATIONAL)
    x = torch.randn(T, B, N, dtype=F64)
    outputs(cell, x)
    assert sorted(cell.state_dict()) == ["cell.bias", "cell.kernel"]
    assert [name for name, _, _ in cell.tf_names()] == ["lstm_cell/kernel", "lstm_cell/bias"]
    other = DropoutWrapper(LSTMCell(U))
    other.build(N, F64)
    other.load_state_dict(cell.state_dict())
    assert_close(outputs(other.eval(), x), outputs(cell.eval(), x))


# Errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["input_keep_prob", "output_keep_prob", "state_keep_prob"])
@pytest.mark.parametrize("p", [1.2, -0.1, float("nan"), torch.tensor(1.5)])
def test_probability_outside_0_to_1_is_an_error(name: str, p: Any) -> None:
    with pytest.raises(ValueError, match=f"Parameter {name} must be between 0 and 1: "):
        DropoutWrapper(GRUCell(U), **{name: p})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["input_keep_prob", "output_keep_prob", "state_keep_prob"])
def test_probability_0_is_an_error_at_the_call(name: str, way: str) -> None:
    cell = DropoutWrapper(GRUCell(U), **{name: 0.0})
    with WAYS[way](), pytest.raises(ValueError, match=r"rate must be .* in the range \[0, 1\), got 1"):
        torchrnn.dynamic_rnn(cell, torch.randn(B, T, N), dtype=torch.float32)


def test_variational_needs_a_dtype() -> None:
    with pytest.raises(ValueError, match="When variational_recurrent=True, dtype must be provided"):
        DropoutWrapper(GRUCell(U), variational_recurrent=True)


@pytest.mark.parametrize("p", [0.5, torch.tensor(1.0)])
def test_variational_needs_an_input_size_if_the_input_is_dropped(p: Any) -> None:
    with pytest.raises(ValueError, match="input_size must be provided"):
        DropoutWrapper(GRUCell(U), p, variational_recurrent=True, dtype=F64)
    DropoutWrapper(GRUCell(U), 1.0, 0.5, 0.5, variational_recurrent=True, dtype=F64)


def test_filter_must_be_callable() -> None:
    with pytest.raises(TypeError, match="dropout_state_filter_visitor must be callable"):
        DropoutWrapper(GRUCell(U), dropout_state_filter_visitor=3)


@pytest.mark.parametrize("answer", [None, 1, (True,), (True, False, True), (True, (True, True))])
def test_filter_must_return_bools(answer: Any) -> None:
    cell = DropoutWrapper(LSTMCell(U), state_keep_prob=0.5, dropout_state_filter_visitor=lambda _: answer)
    with pytest.raises(TypeError, match="must return a bool, or for a structure one bool per part"):
        torchrnn.dynamic_rnn(cell, torch.randn(B, T, N), dtype=torch.float32)


def test_cell_inside_must_be_a_cell() -> None:
    with pytest.raises(TypeError, match="is not an RNNCell"):
        DropoutWrapper(torch.nn.Linear(N, U), 0.5)


def test_noise_must_have_known_keys() -> None:
    with pytest.raises(ValueError, match="noise must have keys of input, output, state, got inputs"):
        DropoutWrapper(GRUCell(U), 0.5, noise={"inputs": torch.rand(1, N)})


@pytest.mark.parametrize("way", WAYS)
def test_noise_must_be_there_for_all_that_is_dropped(way: str) -> None:
    x = torch.randn(B, T, N)
    short = DropoutWrapper(GRUCell(U), 0.5, noise={"input": torch.rand(T - 1, B, N)})
    with WAYS[way](), pytest.raises(ValueError, match=f"an entry for each of {T} steps, got {T - 1}"):
        torchrnn.dynamic_rnn(short, x, dtype=x.dtype)
    none = DropoutWrapper(LSTMCell(U), 1.0, 1.0, 0.5, noise={"state": [torch.rand(T, B, U)]})
    with (
        WAYS[way](),
        pytest.raises(ValueError, match="tensor 1 of the state is dropped, but there is no noise"),
    ):
        torchrnn.dynamic_rnn(none, x, dtype=x.dtype)


def test_explain_names_what_is_dropped() -> None:
    lines = torchrnn.explain(DropoutWrapper(LSTMCell(U), 0.5, 0.5, 0.5)).splitlines()
    assert lines[0] == (
        "DropoutWrapper: drops input and output of the whole sequence at once, "
        "the state by masks that the cell inside applies"
    )
    assert lines[1].startswith("  LSTMCell(3): one op over the sequence")
    for cell in (DropoutWrapper(LSTMCell(U)), DropoutWrapper(LSTMCell(U), 0.5).eval()):
        assert torchrnn.explain(cell).startswith("DropoutWrapper: drops nothing")
    assert "input_keep_prob=0.7, output_keep_prob=1" in repr(DropoutWrapper(LSTMCell(U), 0.7))
