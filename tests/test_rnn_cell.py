"""The protocol of the cells: sizes, states, variables, building, and what a user's own cell may be.

One file for the one protocol.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from conftest import one_thread
from golden_cells import GOLDEN, WAYS, assert_close
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import torchrnn
from torchrnn.rnn_cell import (
    BasicLSTMCell,
    BasicRNNCell,
    GRUCell,
    LSTMCell,
    LSTMStateTuple,
    MultiRNNCell,
    RNNCell,
)

CORE: dict[str, Any] = {"rnn": BasicRNNCell, "gru": GRUCell, "basic lstm": BasicLSTMCell, "lstm": LSTMCell}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# Sizes and states -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "state_size", "output_size"),
    [
        (BasicRNNCell(4), 4, 4),
        (GRUCell(4), 4, 4),
        (BasicLSTMCell(4), LSTMStateTuple(4, 4), 4),
        (BasicLSTMCell(4, state_is_tuple=False), 8, 4),
        (LSTMCell(4, num_proj=3), LSTMStateTuple(4, 3), 3),
        (LSTMCell(4, num_proj=6), LSTMStateTuple(4, 6), 6),
        (LSTMCell(4, num_proj=3, state_is_tuple=False), 7, 3),
        (MultiRNNCell([GRUCell(4), LSTMCell(5)]), (4, LSTMStateTuple(5, 5)), 5),
        (MultiRNNCell([GRUCell(4), LSTMCell(5, state_is_tuple=False)], state_is_tuple=False), 14, 5),
    ],
)
def test_sizes(cell: Any, state_size: Any, output_size: int) -> None:
    assert cell.state_size == state_size
    assert type(cell.state_size) is type(state_size)
    assert cell.output_size == output_size


def test_zero_state_has_the_structure_of_the_sizes() -> None:
    state = MultiRNNCell([GRUCell(4), LSTMCell(5, num_proj=3)]).zero_state(2, torch.float64)
    assert isinstance(state, tuple)
    assert isinstance(state[1], LSTMStateTuple)
    assert [tuple(v.shape) for v in (state[0], state[1].c, state[1].h)] == [(2, 4), (2, 5), (2, 3)]
    assert {v.dtype for v in (state[0], *state[1])} == {torch.float64}
    assert not any(v.any() for v in (state[0], *state[1]))
    assert GRUCell(4).zero_state(3).dtype == torch.get_default_dtype()
    assert BasicLSTMCell(4, state_is_tuple=False).zero_state(0, torch.float32).shape == (0, 8)


def test_get_initial_state_goes_by_inputs_or_by_batch_and_dtype() -> None:
    cell, x = LSTMCell(4), torch.randn(3, 5, dtype=torch.float64)
    for state in (cell.get_initial_state(x), cell.get_initial_state(batch_size=3, dtype=torch.float64)):
        assert state.c.shape == state.h.shape == (3, 4)
        assert state.dtype == torch.float64
    assert cell.get_initial_state(x, dtype=torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="batch size from input tensor is different"):
        cell.get_initial_state(x, batch_size=4)
    with pytest.raises(ValueError, match="batch_size and dtype cannot be None"):
        cell.get_initial_state(batch_size=4)


def test_a_state_tuple_has_c_first_and_a_dtype_if_there_is_one() -> None:
    c, h = torch.zeros(2, 4), torch.ones(2, 4)
    state = LSTMStateTuple(c, h)
    assert state[0] is state.c is c
    assert state[1] is state.h is h
    assert state == (c, h)
    assert state.dtype == torch.float32
    with pytest.raises(TypeError, match=r"Inconsistent internal state: torch\.float32 vs torch\.float64"):
        _ = LSTMStateTuple(c, h.double()).dtype


@pytest.mark.parametrize("num_proj", [None, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_concatenated_state_is_c_then_h(way: str, num_proj: int | None) -> None:
    kwargs = {"use_peepholes": True, "num_proj": num_proj}
    cells = [LSTMCell(4, **kwargs), LSTMCell(4, state_is_tuple=False, **kwargs)]
    for cell in cells:
        cell.build(5)
    cells[1].load_state_dict(cells[0].state_dict())
    x, state = torch.randn(2, 3, 5), LSTMStateTuple(torch.randn(2, 4), torch.randn(2, num_proj or 4))
    with WAYS[way]():
        outputs, last = torchrnn.dynamic_rnn(cells[0], x, initial_state=state)
        same, joined = torchrnn.dynamic_rnn(cells[1], x, initial_state=torch.cat(state, 1))
    torch.testing.assert_close(same, outputs)
    torch.testing.assert_close(joined, torch.cat(last, 1))


@pytest.mark.parametrize(
    ("cell", "state", "text"),
    [
        (
            MultiRNNCell([GRUCell(4), GRUCell(4)]),
            torch.zeros(2, 8),
            "Expected state to be a tuple of length 2",
        ),
        (
            MultiRNNCell([GRUCell(4), GRUCell(4)]),
            (torch.zeros(2, 4),),
            "Expected state to be a tuple of length 2",
        ),
        (LSTMCell(4), torch.zeros(2, 8), "Expected state to be a tuple of length 2"),
        (
            LSTMCell(4, state_is_tuple=False),
            (torch.zeros(2, 4),) * 2,
            r"Expected state to be a tensor \[c \| h\]",
        ),
    ],
)
def test_a_state_of_another_structure_is_refused(cell: Any, state: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        cell(torch.randn(2, 5), state)


def test_a_plain_tuple_does_in_a_direct_call() -> None:
    cell = LSTMCell(4)
    state = torch.randn(2, 4), torch.randn(2, 4)
    output, new = cell(torch.randn(2, 5), state)
    assert isinstance(new, LSTMStateTuple)
    assert output is new.h


# Building and variables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORE)
def test_the_first_input_builds_a_cell(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        cell = CORE[name](4)
        assert not cell.built
        state = cell.zero_state(2, dtype)
        cell(torch.randn(2, 5, dtype=dtype), state)
        assert cell.built
        assert {p.dtype for p in cell.parameters()} == {dtype}
        parameters = list(cell.parameters())
        cell(torch.randn(3, 5, dtype=dtype), cell.zero_state(3, dtype))
        assert all(a is b for a, b in zip(parameters, cell.parameters(), strict=True))


@pytest.mark.parametrize("size", [5, [5], (2, 3, 5), torch.Size([2, 5])])
def test_build_takes_a_size_or_a_shape(size: Any) -> None:
    cell = LSTMCell(4, use_peepholes=True, num_proj=3)
    cell.build(size)
    assert {name: tuple(p.shape) for name, p in cell.named_parameters()} == {
        "kernel": (8, 16),
        "bias": (16,),
        "w_f_diag": (4,),
        "w_i_diag": (4,),
        "w_o_diag": (4,),
        "projection_kernel": (4, 3),
    }


def test_build_builds_a_stack_for_the_outputs_of_each_layer() -> None:
    stack = MultiRNNCell([LSTMCell(4, num_proj=3), GRUCell(2)])
    stack.build(5, torch.float64)
    assert {name: tuple(getattr(owner, attribute).shape) for name, owner, attribute in stack.tf_names()} == {
        "multi_rnn_cell/cell_0/lstm_cell/kernel": (8, 16),
        "multi_rnn_cell/cell_0/lstm_cell/bias": (16,),
        "multi_rnn_cell/cell_0/lstm_cell/projection/kernel": (4, 3),
        "multi_rnn_cell/cell_1/gru_cell/gates/kernel": (5, 4),
        "multi_rnn_cell/cell_1/gru_cell/gates/bias": (4,),
        "multi_rnn_cell/cell_1/gru_cell/candidate/kernel": (5, 2),
        "multi_rnn_cell/cell_1/gru_cell/candidate/bias": (2,),
    }
    assert {p.dtype for p in stack.parameters()} == {torch.float64}


def test_the_dtype_of_a_cell_goes_before_that_of_its_input() -> None:
    cell = GRUCell(4, dtype=torch.float64)
    cell.build(5, torch.float32)
    assert {p.dtype for p in cell.parameters()} == {torch.float64}
    with pytest.raises(ValueError, match=r"floating point variables, but saw dtype: torch\.int32"):
        GRUCell(4, dtype=torch.int32)


def test_a_name_is_the_scope() -> None:
    cells = [GRUCell(4, name="mine"), GRUCell(4)]
    assert [name for cell in cells for name, _, _ in cell.tf_names() if "gates/k" in name] == [
        "mine/gates/kernel",
        "gru_cell/gates/kernel",
    ]
    assert [cell(2).name for cell in CORE.values()] == [
        "basic_rnn_cell",
        "gru_cell",
        "basic_lstm_cell",
        "lstm_cell",
    ]


@pytest.mark.parametrize(
    ("cell", "variables"),
    [
        (BasicRNNCell(50), {"kernel": (70, 50)}),
        (BasicLSTMCell(50), {"kernel": (70, 200)}),
        (GRUCell(50), {"gates_kernel": (70, 100), "candidate_kernel": (70, 50)}),
        (
            LSTMCell(50, use_peepholes=True, num_proj=40),
            {
                "kernel": (60, 200),
                "projection_kernel": (50, 40),
                "w_i_diag": (50, 50),
                "w_f_diag": (50, 50),
                "w_o_diag": (50, 50),
            },
        ),
    ],
)
def test_kernels_start_glorot_uniform_and_biases_at_their_constants(
    cell: Any, variables: Mapping[str, tuple[int, int]]
) -> None:
    cell.build(20)
    for name, value in cell.named_parameters():
        if name in variables:
            bound = math.sqrt(6 / sum(variables[name]))
            assert 0.9 * bound < value.abs().max().item() <= bound
            assert abs(value.mean().item()) < 0.3 * bound
        else:
            assert name.endswith("bias")
            assert bool((value == (name == "gates_bias")).all())


def test_initializers_fill_what_tensorflow_lets_them_fill() -> None:
    cell = LSTMCell(4, use_peepholes=True, num_proj=3, initializer=nn.init.ones_)
    cell.build(5)
    for name, value in cell.named_parameters():
        assert bool((value == (name != "bias")).all())
    gru = GRUCell(4, kernel_initializer=nn.init.ones_, bias_initializer=nn.init.ones_)
    gru.build(5)
    assert all(bool((value == 1).all()) for value in gru.parameters())


def test_forget_bias_is_no_part_of_the_variable() -> None:
    cell = BasicLSTMCell(4, forget_bias=3.0)
    cell.build(5)
    assert not cell.bias.any()


def test_trainable_weights_are_the_parameters_of_a_built_cell() -> None:
    cell = MultiRNNCell([GRUCell(4), BasicRNNCell(3)])
    assert cell.trainable_weights == []
    cell.build(5)
    assert len(cell.trainable_weights) == 6
    assert all(a is b for a, b in zip(cell.trainable_weights, cell.parameters(), strict=True))
    cell.cells[0].gates_bias.requires_grad_(False)
    assert len(cell.trainable_weights) == 5


@pytest.mark.parametrize("name", CORE)
def test_a_state_dict_loads_into_a_cell_that_is_not_built(name: str) -> None:
    source, target = CORE[name](4), CORE[name](4)
    x = torch.randn(2, 3, 5)
    expected = torchrnn.dynamic_rnn(source, x, dtype=x.dtype)
    target.load_state_dict(source.state_dict())
    assert target.built
    torch.testing.assert_close(torchrnn.dynamic_rnn(target, x, dtype=x.dtype), expected, rtol=0, atol=0)
    assert CORE[name](4).state_dict().keys() == source.state_dict().keys()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_made_before_the_first_call_trains_the_cell(make: Any) -> None:
    cell = MultiRNNCell([LSTMCell(4), GRUCell(3)])
    optimizer = make(cell.parameters(), lr=0.1)
    x = torch.randn(2, 3, 5)
    outputs, _ = torchrnn.dynamic_rnn(cell, x, dtype=x.dtype)
    before = [p.detach().clone() for p in cell.parameters()]
    outputs.square().sum().backward()
    optimizer.step()
    assert all(bool((a != b).any()) for a, b in zip(before, cell.parameters(), strict=True))


def test_a_first_call_in_inference_mode_builds_a_cell_that_can_be_trained() -> None:
    cell, x = LSTMCell(4), torch.randn(2, 3, 5)
    with torch.inference_mode():
        expected, _ = torchrnn.dynamic_rnn(cell, x, dtype=x.dtype)
    outputs, _ = torchrnn.dynamic_rnn(cell, x, dtype=x.dtype)
    torch.testing.assert_close(outputs, expected.clone())
    outputs.sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in cell.parameters())


def test_a_cell_built_for_one_size_refuses_another() -> None:
    cell = BasicRNNCell(4)
    cell.build(5)
    with pytest.raises(
        ValueError, match=r"inputs of size 6 need kernel \[10, 4\], but it was built as \[9, 4\]"
    ):
        cell(torch.randn(2, 6), torch.zeros(2, 4))
    cell.build(5)


def test_to_moves_the_dtype_of_a_built_cell() -> None:
    cell = MultiRNNCell([LSTMCell(4), GRUCell(3)])
    cell.build(5)
    cell.double()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    assert torchrnn.dynamic_rnn(cell, x, dtype=x.dtype)[0].dtype == torch.float64


def test_parametrized_variables_are_used_in_both_ways() -> None:
    cell = GRUCell(4)
    cell.build(5)
    parametrizations.weight_norm(cell, "gates_kernel", dim=1)
    x, found = torch.randn(2, 3, 5), []
    for way in WAYS.values():
        with way():
            found.append(torchrnn.dynamic_rnn(cell, x, dtype=x.dtype))
    torch.testing.assert_close(found[0], found[1])
    found[0][0].sum().backward()
    assert all(p.grad is not None for p in cell.parameters())
    assert "gru_cell/gates/kernel" in {name for name, _, _ in cell.tf_names()}


# Arguments ------------------------------------------------------------------------------------------------


def test_one_object_in_two_layers_shares_its_weights_with_a_warning() -> None:
    cell = GRUCell(4)
    with pytest.warns(UserWarning, match="same object and will share weights"):
        stack = MultiRNNCell([cell] * 2)
    x = torch.randn(2, 3, 4)
    outputs, _ = torchrnn.dynamic_rnn(stack, x, dtype=x.dtype)
    assert len(list(stack.parameters())) == 4
    expected, _ = torchrnn.dynamic_rnn(cell, torchrnn.dynamic_rnn(cell, x, dtype=x.dtype)[0], dtype=x.dtype)
    torch.testing.assert_close(outputs, expected)


@pytest.mark.filterwarnings("ignore:At least two cells")
@pytest.mark.parametrize("way", WAYS)
def test_one_object_in_two_layers_needs_inputs_of_its_own_size(way: str) -> None:
    stack = MultiRNNCell([GRUCell(4)] * 2)
    with WAYS[way](), pytest.raises(ValueError, match="built as"):
        torchrnn.dynamic_rnn(stack, torch.randn(2, 3, 5), dtype=torch.float32)


def test_stacks_check_their_cells() -> None:
    with pytest.raises(ValueError, match=r"Must specify at least one cell for MultiRNNCell\."):
        MultiRNNCell([])
    with pytest.raises(TypeError, match="cells must be a list or tuple, but saw: GRUCell"):
        MultiRNNCell(GRUCell(4))
    with pytest.raises(TypeError, match="is not an RNNCell"):
        MultiRNNCell([GRUCell(4), nn.Linear(4, 4)])
    with pytest.raises(
        ValueError,
        match=r"tuples of states, but the flag state_is_tuple is not set\.  State sizes are: \[LSTM",
    ):
        MultiRNNCell([LSTMCell(3)], state_is_tuple=False)


@pytest.mark.parametrize("name", CORE)
def test_input_size_is_ignored_with_a_warning(name: str) -> None:
    with pytest.warns(UserWarning, match="input_size parameter is deprecated"):
        cell = CORE[name](4, input_size=7)
    cell(torch.randn(2, 5), cell.zero_state(2))


ACTIVATIONS: dict[str, Any] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "elu": nn.functional.elu,
    "selu": nn.functional.selu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": nn.functional.softplus,
    "softsign": nn.functional.softsign,
    "softmax": lambda x: torch.softmax(x, -1),
    "exponential": torch.exp,
    "hard_sigmoid": lambda x: (0.2 * x + 0.5).clamp(0, 1),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_activations_by_name(name: str, way: str) -> None:
    cell, x = BasicRNNCell(4, activation=name), torch.randn(2, 3, 5, dtype=torch.float64)
    with WAYS[way]():
        outputs, _ = torchrnn.dynamic_rnn(cell, x, dtype=x.dtype)
    h = torch.zeros(2, 4, dtype=x.dtype)
    for t in range(3):
        h = ACTIVATIONS[name](torch.cat([x[:, t], h], 1) @ cell.kernel + cell.bias)
        torch.testing.assert_close(outputs[:, t], h)


@pytest.mark.parametrize("make", CORE.values(), ids=CORE.keys())
def test_an_activation_is_a_name_a_callable_or_nothing(make: Any) -> None:
    x = torch.randn(2, 3, 5)
    found = []
    for activation in (None, "", "tanh", torch.tanh, nn.Tanh(), lambda x: x.tanh()):
        torch.manual_seed(0)
        found.append(torchrnn.dynamic_rnn(make(4, activation=activation), x, dtype=x.dtype))
        torch.testing.assert_close(found[-1], found[0])
    with pytest.raises(ValueError, match="Unknown activation function:nosuch"):
        make(4, activation="nosuch")
    with pytest.raises(TypeError, match="activation must be a name or callable, got int"):
        make(4, activation=3)


def test_an_activation_may_have_parameters() -> None:
    cell, x = GRUCell(4, activation=nn.PReLU()), torch.randn(2, 3, 5)
    outputs, _ = torchrnn.dynamic_rnn(cell, x, dtype=x.dtype)
    outputs.sum().backward()
    assert cell.activation.weight.grad is not None
    assert len(list(cell.parameters())) == 5


@pytest.mark.parametrize("num_proj", [0, -1])
def test_a_projection_to_nothing_is_refused(num_proj: int) -> None:
    with pytest.raises(ValueError, match=f"num_proj must be None or at least 1, got {num_proj}"):
        LSTMCell(4, num_proj=num_proj)


def test_a_clip_of_a_projection_that_is_not_there_has_no_effect() -> None:
    x = torch.randn(2, 3, 5)
    found = []
    for clip in (None, 1e-3):
        torch.manual_seed(0)
        found.append(torchrnn.dynamic_rnn(LSTMCell(4, proj_clip=clip), x, dtype=x.dtype))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("name", CORE)
def test_a_step_takes_one_step_of_floating_point(name: str) -> None:
    cell = CORE[name](4)
    state = cell.zero_state(2)
    for x, found in ((torch.randn(2, 3, 5), 3), (torch.randn(5), 1)):
        with pytest.raises(
            ValueError, match=f"Input 0 of layer {cell.name} .*expected ndim=2, found ndim={found}"
        ):
            cell(x, state)
    with pytest.raises(ValueError, match=r"only supports floating point inputs, but saw dtype: torch\.int64"):
        cell(torch.ones(2, 5, dtype=torch.int64), state)
    with pytest.raises(TypeError, match="inputs must be a tensor, got list"):
        cell([[1.0]], state)


@pytest.mark.parametrize("name", CORE)
def test_inputs_that_are_refused_do_not_build_a_cell(name: str) -> None:
    cell = CORE[name](4)
    for x in (torch.randn(2, 3, 5), torch.ones(2, 5, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"expected ndim=2|floating point inputs"):
            cell(x, cell.zero_state(2))
        assert not cell.built


@pytest.mark.parametrize("name", CORE)
def test_scope_and_reuse_are_accepted(name: str) -> None:
    cell = CORE[name](4, reuse=True)
    cell(torch.randn(2, 5), cell.zero_state(2), scope="anything")
    cell(torch.randn(2, 5), cell.zero_state(2), "anything")


# Users' own cells -----------------------------------------------------------------------------------------


class Gated(RNNCell):
    """A cell with variables of its own."""

    scope = "gated"

    def __init__(self, units: int, name: str | None = None) -> None:
        super().__init__(name=name)
        self.num_units = units
        self.add_variable("gate/kernel")
        self.add_variable("gate/bias")
        self.add_variable("scale", nn.init.ones_)

    @property
    def state_size(self) -> int:
        return self.num_units

    @property
    def output_size(self) -> int:
        return self.num_units

    def variable_shapes(self, input_size: int) -> Mapping[str, tuple[int, ...]]:
        units = self.num_units
        return {"gate/kernel": (input_size + units, units), "gate/bias": (units,), "scale": (units,)}

    def call(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.cat([inputs, state], 1) @ self.gate_kernel + self.gate_bias
        return self.scale * h.tanh(), h.tanh()


class Linears(RNNCell):
    """A cell with modules of its own, written as a module, with TensorFlow's ``zero_state``."""

    state_size = output_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(5, 4)
        self.state = nn.Linear(4, 4)

    def zero_state(self, batch_size: int, dtype: torch.dtype) -> Tensor:
        return torch.ones(batch_size, 4, dtype=dtype)

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.inputs(inputs) + self.state(state))
        return h, h


def test_a_users_cell_has_variables_as_the_others() -> None:
    cell = MultiRNNCell([Gated(4), Gated(3, name="other")])
    x = torch.randn(2, 3, 5, requires_grad=True)
    outputs, state = torchrnn.dynamic_rnn(cell, x, [3, 1], dtype=x.dtype)
    outputs.sum().backward()
    assert all(p.grad is not None for p in cell.parameters())
    names = [name for name, _, _ in cell.tf_names()]
    assert names[:3] == [f"multi_rnn_cell/cell_0/gated/{n}" for n in ("gate/kernel", "gate/bias", "scale")]
    assert names[3] == "multi_rnn_cell/cell_1/other/gate/kernel"
    assert not cell.cells[0].gate_bias.any()
    assert bool((cell.cells[0].scale == 1).all())
    with torchrnn.stepwise():
        torch.testing.assert_close(
            torchrnn.dynamic_rnn(cell, x, [3, 1], dtype=x.dtype), (outputs, state), rtol=0, atol=0
        )


def test_a_users_cell_may_override_forward_and_hold_modules() -> None:
    cell = Linears()
    assert len(list(cell.parameters())) == 4
    x = torch.randn(2, 3, 5)
    outputs, state = torchrnn.dynamic_rnn(cell, x, dtype=x.dtype)
    h = torch.ones(2, 4)
    for t in range(3):
        h = torch.tanh(cell.inputs(x[:, t]) + cell.state(h))
        torch.testing.assert_close(outputs[:, t], h)
    torch.testing.assert_close(state, h)
    first = torchrnn.dynamic_rnn(MultiRNNCell([cell, GRUCell(3)]), x, dtype=x.dtype)[1][0]
    torch.testing.assert_close(first, h)


def test_what_a_users_cell_leaves_out_is_named() -> None:
    class Nothing(RNNCell):
        pass

    cell = Nothing()
    for attribute in ("state_size", "output_size"):
        with pytest.raises(NotImplementedError, match=f"Nothing must define {attribute}"):
            getattr(cell, attribute)
    with pytest.raises(NotImplementedError, match="Nothing must define call"):
        cell.call(None, None)


# An example -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_the_padded_batch_of_a_textbook(way: str) -> None:
    example = json.loads((GOLDEN / "padded_batch_example.json").read_text())
    cell = BasicRNNCell(num_units=example["num_units"])
    x, lengths = torch.tensor(example["X"], dtype=torch.float32), torch.tensor(example["sequence_length"])
    cell.build(x.size(-1))
    with torch.no_grad():
        cell.kernel.copy_(torch.tensor(example["kernel"]))
        cell.bias.copy_(torch.tensor(example["bias"]))
    with WAYS[way]():
        outputs, state = torchrnn.dynamic_rnn(cell, x, sequence_length=lengths, dtype=torch.float32)
    for key, found in (("outputs", outputs), ("state", state)):
        published = "published_states" if key == "state" else "published_outputs"
        assert_close(found, torch.tensor(example[key]), key, 1e-6)
        assert_close(found, torch.tensor(example[published]), published, 1e-6)
    assert not outputs[1, 1].any()
    last = outputs[torch.arange(4), lengths - 1]
    torch.testing.assert_close(state, last, rtol=0, atol=0)


def test_a_cell_made_and_called_in_inference_mode_can_be_trained_later() -> None:
    with torch.inference_mode():
        cell = LSTMCell(4)
        torchrnn.dynamic_rnn(cell, torch.randn(2, 3, 5), dtype=torch.float32)
    outputs, _ = torchrnn.dynamic_rnn(cell, torch.randn(2, 3, 5), dtype=torch.float32)
    outputs.sum().backward()
    assert cell.kernel.grad.any()
