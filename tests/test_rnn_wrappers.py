"""The wrappers of TensorFlow 1's cells but dropout: equations, variables, errors, and both ways to run.

One file, as each wrapper goes through the same checks first.
"""

from __future__ import annotations

import copy
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
    Conv1DLSTMCell,
    DeviceWrapper,
    DropoutWrapper,
    EmbeddingWrapper,
    GridLSTMCell,
    GRUCell,
    HighwayWrapper,
    InputProjectionWrapper,
    LSTMCell,
    MultiRNNCell,
    OutputProjectionWrapper,
    PhasedLSTMCell,
    ResidualWrapper,
    RNNCell,
    TimeFreqLSTMCell,
)

T, B, N = 6, 4, 5
F64 = torch.float64
LENGTHS = torch.tensor([6, 2, 0, 5])


class Duck:
    """A cell that is no module: h' = tanh(x + h)."""

    state_size = output_size = N

    def get_initial_state(self, inputs: Any = None, batch_size: Any = None, dtype: Any = None) -> Tensor:
        return torch.full((batch_size, N), 0.5, dtype=dtype)

    def __call__(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(x + h)
        return h, h


def slice_and_add(x: Tensor, y: Tensor) -> Tensor:
    assert x.dim() == 2
    return x[:, :3] + y


MAKERS: dict[str, Callable[[], RNNCell]] = {
    "residual": lambda: ResidualWrapper(GRUCell(N)),
    "residual_fn": lambda: ResidualWrapper(GRUCell(3), slice_and_add),
    "highway": lambda: HighwayWrapper(LSTMCell(N)),
    "highway-uncoupled": lambda: HighwayWrapper(GRUCell(N), couple_carry_transform_gates=False),
    "input-projection": lambda: InputProjectionWrapper(LSTMCell(4), 3, activation="relu"),
    "output-projection": lambda: OutputProjectionWrapper(GRUCell(4), 3, activation=torch.tanh),
    "device": lambda: DeviceWrapper(LSTMCell(4), "cpu"),
    "attention": lambda: AttentionCellWrapper(LSTMCell(4), 3),
    "attention-sizes": lambda: AttentionCellWrapper(
        GRUCell(4), 2, attn_size=3, attn_vec_size=6, input_size=7
    ),
    "attention-concatenated": lambda: AttentionCellWrapper(GRUCell(4), 2, state_is_tuple=False),
    "stack": lambda: MultiRNNCell(
        [ResidualWrapper(GRUCell(N)), OutputProjectionWrapper(InputProjectionWrapper(LSTMCell(4), 3), 2)]
    ),
}


def built(cell: RNNCell, dtype: torch.dtype = F64) -> RNNCell:
    """Builds a cell with no variable at zero, where an error might not show."""
    cell.build(N, dtype)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return cell


def results(run: Callable[[], Any], leaves: list[Tensor]) -> list[Tensor]:
    """Returns outputs, and gradients of a fixed function of them."""
    values = pytree.tree_leaves(run())
    loss = sum((v * torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view(v.shape)).sum() for v in values)
    return [*values, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_sequence_at_once_equals_step_by_step(name: str, lengths: Tensor | None) -> None:
    cell = built(MAKERS[name]())
    x = torch.randn(B, T, N, dtype=F64, requires_grad=True)
    state = pytree.tree_map(lambda s: torch.randn_like(s).requires_grad_(), cell.zero_state(B, F64))
    leaves = [x, *pytree.tree_leaves(state), *cell.parameters()]

    def run() -> Any:
        return torchrnn.bidirectional_dynamic_rnn(cell, cell, x, lengths, state, state)

    at_once = results(run, leaves)
    with torchrnn.stepwise():
        stepwise = results(run, leaves)
    assert_close(at_once, stepwise)


@pytest.mark.parametrize("name", MAKERS)
def test_padding_of_nan_reaches_no_result_and_no_gradient(name: str) -> None:
    cell = built(MAKERS[name]())
    x = torch.randn(B, T, N, dtype=F64)
    x[torch.arange(T) >= LENGTHS[:, None]] = torch.nan
    x.requires_grad_()
    found = results(lambda: torchrnn.dynamic_rnn(cell, x, LENGTHS, dtype=F64), [x, *cell.parameters()])
    assert all(v.isfinite().all() for v in found)


@pytest.mark.parametrize("name", MAKERS)
def test_state_dict_and_deep_copy_keep_the_numbers(name: str) -> None:
    cell = built(MAKERS[name]())
    x = torch.randn(B, T, N, dtype=F64)
    expected, _ = torchrnn.dynamic_rnn(cell, x, dtype=F64)
    other = MAKERS[name]()
    other.build(N, F64)
    other.load_state_dict(cell.state_dict())
    for same in (other, copy.deepcopy(cell)):
        assert_close(torchrnn.dynamic_rnn(same, x, dtype=F64)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MAKERS)
def test_variables_and_outputs_have_the_dtype_of_the_input(name: str, dtype: torch.dtype) -> None:
    cell = MAKERS[name]()
    y, _ = torchrnn.dynamic_rnn(cell, torch.randn(B, T, N, dtype=dtype), dtype=dtype)
    assert y.dtype == dtype
    assert {p.dtype for p in cell.parameters()} == {dtype}


@pytest.mark.parametrize(
    "make",
    [
        ResidualWrapper,
        HighwayWrapper,
        lambda cell: InputProjectionWrapper(cell, N),
        lambda cell: OutputProjectionWrapper(cell, N),
        lambda cell: DeviceWrapper(cell, "cpu"),
        lambda cell: AttentionCellWrapper(cell, 2),
    ],
)
def test_cell_inside_need_not_be_a_module(make: Callable[[Any], RNNCell]) -> None:
    cell = built(make(Duck()))
    state = cell.zero_state(B, F64)
    assert (pytree.tree_leaves(state)[0] == 0.5).all()
    x = torch.randn(B, T, N, dtype=F64)
    at_once = torchrnn.dynamic_rnn(cell, x, dtype=F64)
    with torchrnn.stepwise():
        assert_close(torchrnn.dynamic_rnn(cell, x, dtype=F64), at_once)
    with pytest.raises(TypeError, match="is not an RNNCell"):
        make(torch.nn.Linear(N, N))


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        (ResidualWrapper(GRUCell(N)), []),
        (DeviceWrapper(GRUCell(N), "cpu"), []),
        (HighwayWrapper(GRUCell(N)), ["carry_w", "carry_b"]),
        (
            HighwayWrapper(GRUCell(N), couple_carry_transform_gates=False),
            ["carry_w", "carry_b", "transform_w", "transform_b"],
        ),
        (
            InputProjectionWrapper(GRUCell(N), 3),
            ["input_projection_wrapper/kernel", "input_projection_wrapper/bias"],
        ),
        (
            OutputProjectionWrapper(GRUCell(N), 3),
            ["output_projection_wrapper/kernel", "output_projection_wrapper/bias"],
        ),
        (EmbeddingWrapper(GRUCell(N), 3, 2), ["embedding_wrapper/embedding"]),
        (
            AttentionCellWrapper(GRUCell(N), 3),
            [
                f"attention_cell_wrapper/{name}"
                for name in (
                    "kernel",
                    "bias",
                    "attention/attn_w",
                    "attention/attn_v",
                    "attention/kernel",
                    "attention/bias",
                    "attn_output_projection/kernel",
                    "attn_output_projection/bias",
                )
            ],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_variables_have_the_names_of_tensorflow(cell: RNNCell, names: list[str]) -> None:
    inner = ["gates/kernel", "gates/bias", "candidate/kernel", "candidate/bias"]
    scope = f"{cell.name}/" if cell.name else ""
    expected = [*names, *(f"{scope}gru_cell/{name}" for name in inner)]
    assert sorted(name for name, _, _ in cell.tf_names()) == sorted(expected)


def test_explain_has_a_line_for_wrapper_and_cell_inside() -> None:
    text = torchrnn.explain(ResidualWrapper(GRUCell(N)))
    assert text.splitlines()[0] == "ResidualWrapper: adds the whole sequence at once"
    assert text.splitlines()[1].startswith("  GRUCell(5): one op over the sequence")
    assert "residual_fn step by step" in torchrnn.explain(ResidualWrapper(GRUCell(N), slice_and_add))
    assert "generic loop" in torchrnn.explain(AttentionCellWrapper(GRUCell(N), 2))


# Cells inside with inputs of their own kind -----------------------------------------------------------------


def conv(depth: int = 2) -> Conv1DLSTMCell:
    return Conv1DLSTMCell([N, depth], 2, [3])


def grid() -> GridLSTMCell:
    return GridLSTMCell(3, feature_size=2, frequency_skip=1, num_frequency_blocks=[3])


KINDS: dict[str, Callable[[], Any]] = {
    "pair": lambda: (torch.rand(B, T, 1, dtype=F64), torch.randn(B, T, N)),
    "ids": lambda: torch.randint(6, (B, T, 1)),
    "images": lambda: torch.randn(B, T, N, 2),
    "vectors": lambda: torch.randn(B, T, N),
}
COMPOSITES: dict[str, tuple[str, Callable[[], RNNCell]]] = {
    "stack on phased": ("pair", lambda: MultiRNNCell([PhasedLSTMCell(4), LSTMCell(3)])),
    "stack on embedding": ("ids", lambda: MultiRNNCell([EmbeddingWrapper(GRUCell(4), 6, 3), LSTMCell(3)])),
    "stack of convolutions": ("images", lambda: MultiRNNCell([conv(), conv()])),
    "stack on pieces": ("vectors", lambda: MultiRNNCell([TimeFreqLSTMCell(3, feature_size=2), GRUCell(4)])),
    "dropout of phased": ("pair", lambda: DropoutWrapper(PhasedLSTMCell(4)).eval()),
    "dropout of convolution": ("images", lambda: DropoutWrapper(conv(), 0.5).eval()),
    "dropout of ids": ("ids", lambda: DropoutWrapper(MultiRNNCell([EmbeddingWrapper(GRUCell(4), 6, 3)]))),
    "residual of convolution": ("images", lambda: ResidualWrapper(conv())),
    "device of convolution": ("images", lambda: DeviceWrapper(MultiRNNCell([conv()]), "cpu")),
    "device of phased": ("pair", lambda: DeviceWrapper(PhasedLSTMCell(4), "cpu")),
    "output of phased": ("pair", lambda: OutputProjectionWrapper(PhasedLSTMCell(4), 3)),
    "output of pieces": ("vectors", lambda: OutputProjectionWrapper(TimeFreqLSTMCell(3, feature_size=2), 3)),
    "input of grid": ("vectors", lambda: InputProjectionWrapper(grid(), 4)),
    "attention on grid": ("vectors", lambda: AttentionCellWrapper(grid(), 2, input_size=4)),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "make"), COMPOSITES.values(), ids=COMPOSITES)
def test_cells_inside_build_themselves_for_what_they_read(
    kind: str, make: Callable[[], RNNCell], way: str
) -> None:
    cell, inputs = make(), KINDS[kind]()
    with WAYS[way]():
        outputs, state = torchrnn.dynamic_rnn(cell, inputs, dtype=torch.float32)
    assert {p.dtype for p in cell.parameters()} == {outputs.dtype} == {torch.float32}
    step, new = [], cell.zero_state(B, torch.float32)
    for t in range(T):
        y, new = cell(pytree.tree_map(lambda v, t=t: v[:, t], inputs), new)
        step.append(y)
    assert_close((outputs, state), (torch.stack(step, 1), new))


@pytest.mark.parametrize("name", [name for name, (kind, _) in COMPOSITES.items() if kind != "vectors"])
def test_the_first_step_builds_what_the_first_sequence_does(name: str) -> None:
    kind, make = COMPOSITES[name]
    inputs = KINDS[kind]()
    whole, stepped = make(), make()
    torchrnn.dynamic_rnn(whole, inputs, dtype=torch.float32)
    stepped(pytree.tree_map(lambda v: v[:, 0], inputs), stepped.zero_state(B, torch.float32))
    assert {n: (p.shape, p.dtype) for n, p in stepped.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in whole.named_parameters()
    }


class TwoArguments(GRUCell):
    """A cell whose ``zero_state`` has TensorFlow's arguments only."""

    def zero_state(self, batch_size: int, dtype: torch.dtype) -> Tensor:
        return torch.full((batch_size, N), 0.5, dtype=dtype)


@pytest.mark.parametrize(
    "make",
    [
        ResidualWrapper,
        DropoutWrapper,
        HighwayWrapper,
        lambda cell: MultiRNNCell([DeviceWrapper(cell, "cpu")]),
    ],
)
def test_zero_states_of_cells_inside_may_have_two_arguments(make: Callable[[Any], RNNCell]) -> None:
    cell = make(TwoArguments(N))
    assert all(bool((v == 0.5).all()) for v in pytree.tree_leaves(cell.zero_state(B, F64)))
    torchrnn.dynamic_rnn(cell, torch.randn(B, T, N), dtype=torch.float32)


# Residual and highway -------------------------------------------------------------------------------------


def test_residual_adds_the_input_and_leaves_the_state() -> None:
    gru = built(GRUCell(N))
    x, h = torch.randn(2, B, N, dtype=F64)
    y, new = gru(x, h)
    assert_close(ResidualWrapper(gru)(x, h), (x + y, new))


def test_residual_fn_may_slice_the_input() -> None:
    gru = built(GRUCell(3))
    x, h = torch.randn(B, N, dtype=F64), torch.randn(B, 3, dtype=F64)
    y, new = gru(x, h)
    assert_close(ResidualWrapper(gru, slice_and_add)(x, h), (x[:, :3] + y, new))


@pytest.mark.parametrize("make", [ResidualWrapper, HighwayWrapper])
def test_input_and_output_of_different_sizes_are_an_error(make: Callable[[Any], RNNCell]) -> None:
    cell = make(GRUCell(N + 1))
    with pytest.raises(ValueError, match=r"Shapes \(4, 5\) and \(4, 6\) are incompatible"):
        cell(torch.randn(B, N), torch.zeros(B, N + 1))
    with pytest.raises(ValueError, match="are incompatible"):
        torchrnn.dynamic_rnn(cell, torch.randn(B, T, N), dtype=torch.float32)


def test_residual_of_different_structures_is_an_error() -> None:
    class Two(Duck):
        def __call__(self, x: Any, h: Tensor) -> tuple[Any, Any]:
            return super().__call__(x[0], h)

    x = torch.randn(B, N)
    with pytest.raises(ValueError, match="same nested structure"):
        ResidualWrapper(Two())((x, x), x)


def test_highway_gates_input_and_output() -> None:
    cell = built(HighwayWrapper(GRUCell(N), couple_carry_transform_gates=False))
    x, h = torch.randn(2, B, N, dtype=F64)
    y, new = cell.cell(x, h)
    carry = torch.sigmoid(x @ cell.carry_w + cell.carry_b)
    transform = torch.sigmoid(x @ cell.transform_w + cell.transform_b)
    assert_close(cell(x, h), (x * carry + y * transform, new))


def test_highway_with_a_closed_carry_gate_is_the_cell_inside() -> None:
    gru = built(GRUCell(N))
    cell = HighwayWrapper(gru, carry_bias_init=-100.0)
    x, h = torch.randn(2, B, N, dtype=F64)
    assert_close(cell(x, h), gru(x, h))


def test_highway_biases_start_at_opposite_values() -> None:
    cell = HighwayWrapper(GRUCell(N), couple_carry_transform_gates=False, carry_bias_init=0.5)
    cell.build(N)
    assert cell.carry_b.eq(0.5).all()
    assert cell.transform_b.eq(-0.5).all()


# Projections ----------------------------------------------------------------------------------------------


def test_input_projection_is_linear_by_default() -> None:
    cell = built(InputProjectionWrapper(GRUCell(4), 3))
    assert cell.cell.gates_kernel.shape == (3 + 4, 8)
    x, h = torch.randn(B, N, dtype=F64), torch.randn(B, 4, dtype=F64)
    assert_close(cell(x, h), cell.cell(x @ cell.kernel + cell.bias, h))


def test_input_projection_warns_of_input_size() -> None:
    with pytest.warns(UserWarning, match="input_size"):
        InputProjectionWrapper(GRUCell(4), 3, None, 7)


def test_output_projection_is_linear_by_default_and_leaves_the_state() -> None:
    cell = built(OutputProjectionWrapper(GRUCell(4), 3))
    assert cell.output_size == 3
    assert cell.state_size == 4
    x, h = torch.randn(B, N, dtype=F64), torch.randn(B, 4, dtype=F64)
    y, new = cell.cell(x, h)
    assert_close(cell(x, h), (y @ cell.kernel + cell.bias, new))


def test_output_projection_past_the_length_is_zero() -> None:
    cell = built(OutputProjectionWrapper(GRUCell(4), 3))
    y, _ = torchrnn.dynamic_rnn(cell, torch.randn(B, T, N, dtype=F64), LENGTHS, dtype=F64)
    past = torch.arange(T) >= LENGTHS[:, None]
    assert y[past].eq(0).all()
    assert y[~past].ne(0).all()


@pytest.mark.parametrize("size", [0, -1])
def test_output_projection_needs_a_positive_size(size: int) -> None:
    with pytest.raises(ValueError, match=f"Parameter output_size must be > 0: {size}."):
        OutputProjectionWrapper(GRUCell(4), size)


@pytest.mark.parametrize("make", [InputProjectionWrapper, OutputProjectionWrapper])
def test_projection_knows_its_activations(make: Callable[..., RNNCell]) -> None:
    with pytest.raises(ValueError, match="Unknown activation function:nosuch"):
        make(GRUCell(4), 3, "nosuch")


# Embedding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("shape", [(B,), (B, 1)], ids=["B", "B1"])
def test_embedding_looks_up_ids_of_a_step(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cell = EmbeddingWrapper(GRUCell(4), 6, 3)
    ids, h = torch.tensor([5, 0, 2, 2], dtype=dtype), torch.randn(B, 4, dtype=F64)
    found = cell(ids.view(shape), h)
    assert cell.embedding.dtype == F64
    assert_close(found, cell.cell(cell.embedding[ids.long()], h))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_embedding_of_a_sequence_equals_step_by_step(dtype: torch.dtype, lengths: Tensor | None) -> None:
    cell = OutputProjectionWrapper(EmbeddingWrapper(LSTMCell(4), 6, 3), 2)
    ids = torch.randint(6, (B, T, 1), dtype=dtype)

    def run() -> Any:
        return torchrnn.dynamic_rnn(cell, ids, lengths, dtype=F64)

    run()
    assert {p.dtype for p in cell.parameters()} == {F64}
    at_once = results(run, list(cell.parameters()))
    with torchrnn.stepwise():
        assert_close(results(run, list(cell.parameters())), at_once)


@pytest.mark.parametrize("way", WAYS)
def test_embedding_builds_all_cells_at_the_first_sequence(way: str) -> None:
    cell = DeviceWrapper(OutputProjectionWrapper(EmbeddingWrapper(LSTMCell(4), 6, 3), 2), "cpu")
    ids = torch.randint(6, (B, T, 1))
    with WAYS[way]():
        y, _ = torchrnn.dynamic_rnn(cell, ids, dtype=torch.float32)
    assert y.shape == (B, T, 2)
    assert y.dtype == torch.float32


@pytest.mark.parametrize("shape", [(B,), (B, 1)], ids=["B", "B1"])
def test_static_rnn_takes_ids_with_or_without_a_last_axis(shape: tuple[int, ...]) -> None:
    cell = EmbeddingWrapper(GRUCell(4), 6, 3)
    ids = torch.randint(6, (T, B))
    y, h = torchrnn.static_rnn(cell, [row.view(shape) for row in ids], dtype=F64)
    expected, last = torchrnn.dynamic_rnn(cell, ids.unsqueeze(-1), dtype=F64, time_major=True)
    assert_close((torch.stack(y), h), (expected, last))


def test_embedding_starts_with_variance_1() -> None:
    cell = EmbeddingWrapper(GRUCell(4), 200, 100)
    cell.build(1)
    assert cell.embedding.abs().max() <= 3**0.5
    assert cell.embedding.var().sub(1).abs() < 0.05
    assert cell.embedding.mean().abs() < 0.05


def test_embedding_initializer_fills_the_table() -> None:
    cell = EmbeddingWrapper(GRUCell(4), 6, 3, initializer=torch.nn.init.ones_)
    cell.build(1, F64)
    assert cell.embedding.eq(1).all()
    assert cell.cell.gates_kernel.dtype == F64


@pytest.mark.parametrize(("classes", "size"), [(0, 3), (3, 0), (-1, 2)])
def test_embedding_needs_positive_sizes(classes: int, size: int) -> None:
    message = f"Both embedding_classes and embedding_size must be > 0: {classes}, {size}."
    with pytest.raises(ValueError, match=message):
        EmbeddingWrapper(GRUCell(4), classes, size)


def test_embedding_needs_one_id_per_row() -> None:
    cell = EmbeddingWrapper(GRUCell(4), 6, 3)
    h = torch.zeros(B, 4)
    with pytest.raises(ValueError, match=r"ids of a step must be \[B\] or \[B, 1\], got \[4, 2\]"):
        cell(torch.zeros(B, 2, dtype=torch.int64), h)
    with pytest.raises(ValueError, match=r"got \[4, 2\]"):
        torchrnn.dynamic_rnn(cell, torch.zeros(B, T, 2, dtype=torch.int64), dtype=torch.float32)


def test_embedding_needs_integers() -> None:
    cell = EmbeddingWrapper(GRUCell(4), 6, 3)
    with pytest.raises(TypeError, match="ids must be integers, got"):
        cell(torch.zeros(B, 1), torch.zeros(B, 4))
    with pytest.raises(TypeError, match="ids must be integers, got"):
        torchrnn.dynamic_rnn(cell, torch.zeros(B, T, 1), dtype=torch.float32)


# Device ---------------------------------------------------------------------------------------------------


def test_device_wrapper_builds_the_cell_on_the_device() -> None:
    class Told(GRUCell):
        def build_own(self, size: int, dtype: torch.dtype | None, device: Any) -> None:
            self.device = device

    cell = DeviceWrapper(Told(4), "cuda:1")
    cell.build(N, device="cpu")
    assert cell.cell.device == torch.device("cuda:1")


def test_device_wrapper_changes_no_number() -> None:
    lstm = built(LSTMCell(4))
    x = torch.randn(B, T, N, dtype=F64)
    expected = torchrnn.dynamic_rnn(lstm, x, LENGTHS, dtype=F64)
    assert_close(torchrnn.dynamic_rnn(DeviceWrapper(lstm, "cpu"), x, LENGTHS, dtype=F64), expected)


@pytest.mark.gpu  # Which is what has it skipped elsewhere.
@pytest.mark.parametrize("way", WAYS)
def test_device_wrapper_runs_there_and_returns_to_the_inputs(way: str) -> None:
    cell = DeviceWrapper(LSTMCell(4), "cuda")
    x = torch.randn(B, T, N)
    with WAYS[way]():
        y, state = torchrnn.dynamic_rnn(cell, x, LENGTHS, dtype=torch.float32)
    assert {p.device.type for p in cell.parameters()} == {"cuda"}
    assert {v.device.type for v in (y, *state)} == {"cpu"}


# Attention ------------------------------------------------------------------------------------------------


def test_attention_remembers_its_last_outputs() -> None:
    cell = built(AttentionCellWrapper(LSTMCell(4), 3))
    state = cell.zero_state(B, F64)
    outputs = []
    for x in torch.randn(T, B, N, dtype=F64):
        y, state = cell(x, state)
        outputs.append(y)
    assert_close(state[2], torch.cat(outputs[-3:], -1))


def test_attention_with_one_slot_attends_to_it_alone() -> None:
    cell = built(AttentionCellWrapper(GRUCell(4), 1))
    x = torch.randn(B, N, dtype=F64)
    state = pytree.tree_map(torch.randn_like, cell.zero_state(B, F64))
    _, (_, attention, _) = cell(x, state)
    assert_close(attention, state[2])


@pytest.mark.parametrize("way", WAYS)
def test_attention_state_may_be_one_tensor(way: str) -> None:
    apart = built(AttentionCellWrapper(BasicLSTMCell(4), 3))
    joined = AttentionCellWrapper(BasicLSTMCell(4, state_is_tuple=False), 3, state_is_tuple=False)
    assert joined.state_size == 8 + 4 + 12
    joined.build(N, F64)
    joined.load_state_dict(apart.state_dict())
    x = torch.randn(B, T, N, dtype=F64)
    y, state = torchrnn.dynamic_rnn(apart, x, LENGTHS, dtype=F64)
    with WAYS[way]():
        z, tensor = torchrnn.dynamic_rnn(joined, x, LENGTHS, dtype=F64)
    assert_close(z, y)
    assert_close(tensor, torch.cat(pytree.tree_leaves(state), -1))


def test_attention_sizes_have_their_defaults() -> None:
    cell = AttentionCellWrapper(GRUCell(4), 3)
    cell.build(N)
    assert (cell.output_size, cell.state_size) == (4, (4, 4, 12))
    assert cell.kernel.shape == (N + 4, N)
    assert cell.attention_attn_w.shape == (1, 1, 4, 4)


def test_attention_projects_the_input_to_input_size() -> None:
    cell = AttentionCellWrapper(GRUCell(4), 3, attn_size=2, attn_vec_size=6, input_size=7)
    cell.build(N)
    assert (cell.output_size, cell.state_size) == (2, (4, 2, 6))
    assert cell.kernel.shape == (N + 2, 7)
    assert cell.cell.gates_kernel.shape == (7 + 4, 8)
    assert cell.attention_attn_w.shape == (1, 1, 2, 6)


@pytest.mark.parametrize("length", [0, -2])
def test_attention_needs_a_positive_length(length: int) -> None:
    with pytest.raises(ValueError, match=f"attn_length should be greater than zero, got {length}"):
        AttentionCellWrapper(GRUCell(4), length)


def test_attention_of_a_tuple_needs_a_tuple() -> None:
    with pytest.raises(
        ValueError, match="Cell returns tuple of states, but the flag state_is_tuple is not set"
    ):
        AttentionCellWrapper(LSTMCell(4), 4, state_is_tuple=False)
    cell = AttentionCellWrapper(GRUCell(4), 2)
    with pytest.raises(ValueError, match="Expected state to be a tuple of length 3, but received"):
        cell(torch.zeros(B, N), torch.zeros(B, 16))
