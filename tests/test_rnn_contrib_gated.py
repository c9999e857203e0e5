"""The gated, elementwise, grouped and phased cells of tf.contrib.rnn.

One file, as each section goes over the same table of cells.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchrnn import rnn_cell
from torchrnn.rnn_cell import (
    CFNCell,
    GLSTMCell,
    IndRNNCell,
    IndyGRUCell,
    IndyLSTMCell,
    IntersectionRNNCell,
    LSTMCell,
    LSTMStateTuple,
    MinimalRNNCell,
    NASCell,
    PhasedLSTMCell,
    RNNCell,
    SRUCell,
    UGRNNCell,
)
from torchrnn.rnn_cell.base import ACTIVATIONS, Run, loop
from torchrnn.unroll import bidirectional_dynamic_rnn, dynamic_rnn, explain, static_rnn, stepwise

INPUTS, UNITS = 4, 6

CELLS: dict[str, Callable[[], RNNCell]] = {
    "nas": lambda: NASCell(UNITS),
    "nas_proj_bias": lambda: NASCell(UNITS, 3, use_bias=True),
    "ugrnn": lambda: UGRNNCell(UNITS),
    "ugrnn_sin": lambda: UGRNNCell(UNITS, activation=torch.sin),
    "intersection": lambda: IntersectionRNNCell(UNITS, UNITS),
    "intersection_same_size": lambda: IntersectionRNNCell(INPUTS),
    "minimal": lambda: MinimalRNNCell(UNITS),
    "cfn": lambda: CFNCell(UNITS),
    "sru": lambda: SRUCell(UNITS),
    "indrnn": lambda: IndRNNCell(UNITS),
    "indygru": lambda: IndyGRUCell(UNITS),
    "indylstm": lambda: IndyLSTMCell(UNITS),
    "glstm": lambda: GLSTMCell(UNITS, number_of_groups=2),
    "glstm_sin": lambda: GLSTMCell(UNITS, number_of_groups=2, activation=torch.sin),
    "glstm_proj": lambda: GLSTMCell(UNITS, num_proj=4, number_of_groups=2),
    "phased": lambda: PhasedLSTMCell(UNITS, period_init_max=4.0, ratio_on=0.5),
    "phased_peep": lambda: PhasedLSTMCell(UNITS, use_peepholes=True, period_init_max=4.0, ratio_on=0.5),
}

SHAPES: dict[str, dict[str, list[int]]] = {
    "nas": {"nas_cell/kernel": [4, 48], "nas_cell/recurrent_kernel": [6, 48]},
    "nas_proj_bias": {
        "nas_cell/kernel": [4, 48],
        "nas_cell/recurrent_kernel": [3, 48],
        "nas_cell/bias": [48],
        "nas_cell/projection_weights": [6, 3],
    },
    "ugrnn": {"ugrnn_cell/kernel": [10, 12], "ugrnn_cell/bias": [12]},
    "intersection": {
        "intersection_rnn_cell/kernel": [12, 24],
        "intersection_rnn_cell/bias": [24],
        "intersection_rnn_cell/in_projection/kernel": [4, 6],
        "intersection_rnn_cell/in_projection/bias": [6],
    },
    "intersection_same_size": {
        "intersection_rnn_cell/kernel": [8, 16],
        "intersection_rnn_cell/bias": [16],
    },
    "minimal": {"minimal_rnn_cell/kernel": [16, 6], "minimal_rnn_cell/bias": [6]},
    "cfn": {"cfn_cell/kernel": [4, 18], "cfn_cell/recurrent_kernel": [6, 12], "cfn_cell/bias": [12]},
    "sru": {"sru_cell/kernel": [4, 24], "sru_cell/bias": [12]},
    "indrnn": {
        "ind_rnn_cell/kernel_w": [4, 6],
        "ind_rnn_cell/kernel_u": [1, 6],
        "ind_rnn_cell/bias": [6],
    },
    "indygru": {
        "indy_gru_cell/gates/kernel_w": [4, 12],
        "indy_gru_cell/gates/kernel_u": [1, 12],
        "indy_gru_cell/gates/bias": [12],
        "indy_gru_cell/candidate/kernel": [4, 6],
        "indy_gru_cell/candidate/kernel_u": [1, 6],
        "indy_gru_cell/candidate/bias": [6],
    },
    "indylstm": {
        "indy_lstm_cell/kernel_w": [4, 24],
        "indy_lstm_cell/kernel_u": [1, 24],
        "indy_lstm_cell/bias": [24],
    },
    "glstm_proj": {
        "glstm_cell/group0/kernel": [4, 12],
        "glstm_cell/group1/kernel": [4, 12],
        **{f"glstm_cell/bias_{gate}": [6] for gate in "ijfo"},
        "glstm_cell/projection/kernel": [6, 4],
    },
    "phased_peep": {
        "phased_lstm_cell/mask_gates/kernel": [16, 12],
        "phased_lstm_cell/mask_gates/bias": [12],
        "phased_lstm_cell/new_input/kernel": [10, 6],
        "phased_lstm_cell/new_input/bias": [6],
        "phased_lstm_cell/output_gate/kernel": [16, 6],
        "phased_lstm_cell/output_gate/bias": [6],
        **{f"phased_lstm_cell/{name}": [6] for name in ("period", "phase", "ratio_on")},
    },
}


def built(name: str, dtype: torch.dtype = torch.float64) -> RNNCell:
    """A cell whose variables are all away from their initial values."""
    cell = CELLS[name]()
    cell.build(INPUTS, dtype)
    with torch.no_grad():
        for key, parameter in cell.named_parameters():
            if key not in ("period", "phase", "ratio_on"):
                parameter.add_(torch.randn_like(parameter), alpha=0.4)
    return cell


def inputs_of(name: str, steps: int = 5, batch: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    """Batch-major inputs: of a phased cell a pair of rising times and x."""
    x = torch.randn(batch, steps, INPUTS, dtype=dtype)
    if not name.startswith("phased"):
        return x
    return torch.rand(batch, steps, 1, dtype=dtype).cumsum(1), x


def state_of(cell: RNNCell, batch: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    return pytree.tree_map(torch.randn_like, cell.zero_state(batch, dtype))


def with_gradients(cell: RNNCell, inputs: Any, run: Callable[..., Any]) -> list[Tensor]:
    """The leaves of what ``run`` returns, and their gradients to the inputs and all variables."""
    inputs = pytree.tree_map(lambda v: v.detach().clone().requires_grad_(), inputs)
    outputs = pytree.tree_leaves(run(inputs))
    loss = sum(((i + 1) * out.sin()).sum() for i, out in enumerate(outputs))
    sources = [*pytree.tree_leaves(inputs), *cell.parameters()]
    return [*outputs, *torch.autograd.grad(loss, sources)]


# Over a sequence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("lengths", [None, [5, 0, 3]], ids=["full", "ragged"])
def test_a_sequence_gives_what_single_steps_give(name: str, lengths: list[int] | None) -> None:
    cell, inputs = built(name), inputs_of(name)
    state = state_of(cell)

    def run(inputs: Any) -> Any:
        return bidirectional_dynamic_rnn(cell, cell, inputs, lengths, state, state)

    with stepwise():
        expected = with_gradients(cell, inputs, run)
    torch.testing.assert_close(with_gradients(cell, inputs, run), expected)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("steps", [1, 5], ids=["one_mask", "mask_per_step"])
def test_masks_on_the_carried_state_give_what_the_loop_gives(name: str, steps: int) -> None:
    cell, inputs = built(name), pytree.tree_map(lambda v: v.transpose(0, 1), inputs_of(name))
    state = state_of(cell)
    masks = pytree.tree_map(lambda v: torch.rand(steps, *v.shape, dtype=v.dtype), state)
    run = Run(torch.tensor([5, 2, 4]), reverse=True, masks=masks)
    (y, last), (expected, expected_last) = cell.unroll(inputs, state, run), loop(cell, inputs, state, run)
    alive = expected != 0
    torch.testing.assert_close(y * alive, expected)
    torch.testing.assert_close(last, expected_last)


@pytest.mark.parametrize("name", CELLS)
def test_padding_may_hold_nan(name: str) -> None:
    cell, inputs, lengths = built(name), inputs_of(name), torch.tensor([5, 0, 2])
    padding = torch.arange(5) >= lengths[:, None]

    def run(inputs: Any) -> Any:
        return dynamic_rnn(cell, inputs, lengths, dtype=torch.float64)

    expected = with_gradients(cell, inputs, run)
    torch.testing.assert_close(
        with_gradients(
            cell, pytree.tree_map(lambda v: v.masked_fill(padding[..., None], math.nan), inputs), run
        ),
        expected,
    )
    assert not expected[0][padding].any()


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_floating_dtype_runs(name: str, dtype: torch.dtype) -> None:
    cell = CELLS[name]()
    outputs, state = dynamic_rnn(cell, inputs_of(name, dtype=dtype), dtype=dtype)
    assert {v.dtype for v in [outputs, *pytree.tree_leaves(state), *cell.parameters()]} == {dtype}
    assert all(v.isfinite().all() for v in [outputs, *pytree.tree_leaves(state)])


@pytest.mark.parametrize("name", ["sru", "glstm", "phased"])
def test_no_steps_and_no_rows_are_sequences_too(name: str) -> None:
    cell = built(name)
    state = state_of(cell)
    outputs, last = dynamic_rnn(cell, inputs_of(name, steps=0), initial_state=state)
    assert outputs.shape == (3, 0, UNITS)
    torch.testing.assert_close(last, state)
    assert dynamic_rnn(cell, inputs_of(name, batch=0), dtype=torch.float64)[0].shape == (0, 5, UNITS)


def test_explain_says_how_a_cell_runs() -> None:
    assert explain(UGRNNCell(3)) == "UGRNNCell(3): one op over the sequence, gru with a reset gate of 1"
    assert explain(UGRNNCell(3, activation=torch.sin)).endswith("no kernel has the activation sin")
    assert explain(GLSTMCell(4)) == "GLSTMCell(4): one op over the sequence per group, lstm"
    assert explain(GLSTMCell(4, num_proj=2)).endswith("the projection mixes the groups")
    assert "for all steps at once" in explain(NASCell(3))


# One step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CELLS)
def test_a_step_passes_gradcheck(name: str) -> None:
    cell, inputs = built(name), pytree.tree_map(lambda v: v[:, 0], inputs_of(name, batch=2))
    if name.startswith("phased"):  # One row in each of the open halves of the cycle.
        time = torch.tensor([[0.1], [0.4]], dtype=torch.float64)
        inputs = (time, inputs[1])
        with torch.no_grad():
            cell.period.fill_(1.0)
            cell.phase.zero_()
            cell.ratio_on.fill_(0.5)
    names = [key for key, _ in cell.named_parameters() if key != "period"]
    leaves, spec = pytree.tree_flatten((inputs, state_of(cell, 2), [getattr(cell, key) for key in names]))
    leaves = [v.detach().clone().requires_grad_() for v in leaves]

    def step(*values: Tensor) -> list[Tensor]:
        inputs, state, variables = pytree.tree_unflatten(values, spec)
        overrides = dict(zip(names, variables, strict=True))
        return pytree.tree_leaves(torch.func.functional_call(cell, overrides, (inputs, state)))

    assert torch.autograd.gradcheck(step, leaves)


@pytest.mark.parametrize("make", [UGRNNCell, MinimalRNNCell, CFNCell, SRUCell, IndRNNCell, IndyGRUCell])
@pytest.mark.parametrize("name", ["relu", "softsign"])
def test_an_activation_goes_by_name_or_by_callable(make: Any, name: str) -> None:
    by_name, by_callable, default = (make(UNITS, activation=a) for a in (name, ACTIVATIONS[name], None))
    x, h = torch.randn(3, INPUTS), torch.randn(3, UNITS)
    by_name(x, h)
    for other in (by_callable, default):
        other.load_state_dict(by_name.state_dict())
    torch.testing.assert_close(by_callable(x, h), by_name(x, h))
    assert not torch.allclose(default(x, h)[0], by_name(x, h)[0])


@pytest.mark.parametrize(
    "make", [UGRNNCell, MinimalRNNCell, CFNCell, SRUCell, IndRNNCell, IndyGRUCell, IndyLSTMCell, GLSTMCell]
)
def test_an_unknown_activation_is_an_error(make: Any) -> None:
    with pytest.raises(ValueError, match="Unknown activation function:nosuch"):
        make(UNITS, activation="nosuch")


def test_intersection_activates_its_output_by_name_or_by_callable() -> None:
    x, h = torch.randn(3, UNITS), torch.randn(3, UNITS)
    cells = [IntersectionRNNCell(UNITS, y_activation=a) for a in ("softsign", nn.functional.softsign, None)]
    cells[0](x, h)
    for other in cells[1:]:
        other.load_state_dict(cells[0].state_dict())
    (output, state), again, (by_relu, same_state) = (cell(x, h) for cell in cells)
    torch.testing.assert_close(again, (output, state))
    torch.testing.assert_close(same_state, state)
    assert not torch.allclose(by_relu, output)
    with pytest.raises(ValueError, match="Unknown activation function:nosuch"):
        IntersectionRNNCell(UNITS, y_activation="nosuch")


def test_ugrnn_with_an_open_gate_keeps_its_state() -> None:
    cell = UGRNNCell(UNITS, forget_bias=100.0)
    h = torch.randn(3, UNITS)
    torch.testing.assert_close(cell(torch.randn(3, INPUTS), h), (h, h))


def test_intersection_with_an_open_gate_passes_its_input() -> None:
    cell, x = IntersectionRNNCell(UNITS, forget_bias=100.0), torch.randn(3, UNITS)
    torch.testing.assert_close(cell(x, torch.randn(3, UNITS))[0], x)


def test_sru_outputs_h_and_carries_c() -> None:
    cell = built("sru")
    x = torch.randn(3, INPUTS, dtype=torch.float64)
    output, c = cell(x, torch.zeros(3, UNITS, dtype=torch.float64))
    n, f, r, s = (x @ cell.kernel).chunk(4, -1)
    bias_f, bias_r = cell.bias.chunk(2)
    f, r = torch.sigmoid(f + bias_f), torch.sigmoid(r + bias_r)
    torch.testing.assert_close(c, (1 - f) * n)
    torch.testing.assert_close(output, r * torch.tanh(c) + (1 - r) * s)


def test_indy_cells_are_the_full_cells_with_diagonal_matrices() -> None:
    x, h, c = (torch.randn(3, size, dtype=torch.float64) for size in (INPUTS, UNITS, UNITS))

    def diagonal(vector: Tensor) -> Tensor:
        return torch.cat([torch.diag(v) for v in vector.view(-1, UNITS)], 1)

    indy: Any = built("indylstm")
    full = rnn_cell.BasicLSTMCell(UNITS)
    full.build(INPUTS, torch.float64)
    with torch.no_grad():
        full.kernel.copy_(torch.cat([indy.kernel_w, diagonal(indy.kernel_u)]))
        full.bias.copy_(indy.bias)
    torch.testing.assert_close(indy(x, LSTMStateTuple(c, h)), full(x, LSTMStateTuple(c, h)))

    indy, gru = built("indygru"), rnn_cell.GRUCell(UNITS)
    gru.build(INPUTS, torch.float64)
    with torch.no_grad():
        gru.gates_kernel.copy_(torch.cat([indy.gates_kernel_w, diagonal(indy.gates_kernel_u)]))
        gru.gates_bias.copy_(indy.gates_bias)
        gru.candidate_kernel.copy_(torch.cat([indy.candidate_kernel, diagonal(indy.candidate_kernel_u)]))
        gru.candidate_bias.copy_(indy.candidate_bias)
    torch.testing.assert_close(indy(x, h), gru(x, h))

    indy, rnn = built("indrnn"), rnn_cell.BasicRNNCell(UNITS)
    rnn.build(INPUTS, torch.float64)
    with torch.no_grad():
        rnn.kernel.copy_(torch.cat([indy.kernel_w, diagonal(indy.kernel_u)]))
        rnn.bias.copy_(indy.bias)
    torch.testing.assert_close(indy(x, h), rnn(x, h))


# The grouped LSTM -----------------------------------------------------------------------------------------


def lstm_of_group(cell: Any, group: int) -> LSTMCell:
    """The LSTM that one group is, without the projection."""
    units = cell.num_units // cell.number_of_groups
    lstm = LSTMCell(units, num_proj=cell.num_proj, forget_bias=cell.forget_bias)
    kernel = getattr(cell, f"group{group}_kernel")
    lstm.build(kernel.size(0) - lstm.output_size, kernel.dtype)
    biases = [getattr(cell, f"bias_{gate}")[group * units :][:units] for gate in "ijfo"]
    with torch.no_grad():
        lstm.kernel.copy_(kernel)
        lstm.bias.copy_(torch.cat(biases))
        if cell.num_proj is not None:
            lstm.projection_kernel.copy_(cell.projection_kernel)
    return lstm


@pytest.mark.parametrize("num_proj", [None, 3])
def test_glstm_of_one_group_is_an_lstm(num_proj: int | None) -> None:
    cell = GLSTMCell(UNITS, num_proj=num_proj, forget_bias=0.5)
    cell.build(INPUTS, torch.float64)
    x, state = inputs_of("glstm"), state_of(cell)
    expected = dynamic_rnn(lstm_of_group(cell, 0), x, initial_state=state)
    torch.testing.assert_close(dynamic_rnn(cell, x, initial_state=state), expected)


def test_glstm_of_two_groups_is_two_lstms() -> None:
    cell = built("glstm")
    x, state = inputs_of("glstm"), state_of(cell)
    y, (c, h) = dynamic_rnn(cell, x, initial_state=state)
    for group in range(2):
        y_k, (c_k, h_k) = dynamic_rnn(
            lstm_of_group(cell, group),
            x.chunk(2, -1)[group],
            initial_state=LSTMStateTuple(*(v.chunk(2, -1)[group] for v in state)),
        )
        for whole, part in ((y, y_k), (c, c_k), (h, h_k)):
            torch.testing.assert_close(whole.chunk(2, -1)[group], part)


def test_glstm_applies_the_activation_to_the_output_only() -> None:
    cell: Any = GLSTMCell(UNITS, forget_bias=0.0, activation="linear")
    x, state = torch.randn(3, INPUTS), cell.zero_state(3)
    h, (c, _) = cell(x, state)
    i, j, _, o = (x @ cell.group0_kernel[:INPUTS]).chunk(4, -1)
    torch.testing.assert_close(c, torch.sigmoid(i) * torch.tanh(j))
    torch.testing.assert_close(h, torch.sigmoid(o) * c)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_units": 5, "number_of_groups": 2}, "num_units must be divisible by number_of_groups"),
        ({"num_units": 6, "num_proj": 3, "number_of_groups": 2}, "num_proj must be divisible"),
        ({"num_units": 6, "number_of_groups": 0}, "number_of_groups must be at least 1, got 0"),
        ({"num_units": 6, "num_proj": 0}, "num_proj must be None or at least 1, got 0"),
    ],
)
def test_glstm_refuses_sizes_that_do_not_divide(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GLSTMCell(**arguments)


def test_glstm_refuses_an_input_size_that_does_not_divide() -> None:
    cell = GLSTMCell(UNITS, number_of_groups=2)
    with pytest.raises(ValueError, match="input size must be divisible by number_of_groups, got 5 and 2"):
        cell(torch.zeros(3, 5), cell.zero_state(3))


# The intersection RNN -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_in_proj", [None, 3])
def test_intersection_refuses_another_input_size_without_projection(num_in_proj: int | None) -> None:
    cell = IntersectionRNNCell(UNITS, num_in_proj)
    with pytest.raises(ValueError, match="Must have input size == output size for Intersection RNN"):
        cell(torch.zeros(3, INPUTS), torch.zeros(3, UNITS))
    with pytest.raises(ValueError, match="Must have input size == output size for Intersection RNN"):
        dynamic_rnn(cell, torch.zeros(3, 5, INPUTS), dtype=torch.float32)


def test_intersection_built_without_projection_refuses_another_size_later() -> None:
    cell = IntersectionRNNCell(UNITS, UNITS)
    cell(torch.zeros(3, UNITS), torch.zeros(3, UNITS))
    assert cell.in_projection_kernel is None
    assert len(list(cell.parameters())) == 2
    with pytest.raises(ValueError, match="Must have input size"):
        cell(torch.zeros(3, INPUTS), torch.zeros(3, UNITS))


def test_intersection_built_with_projection_takes_its_own_size_as_it_is() -> None:
    cell = IntersectionRNNCell(UNITS, UNITS, forget_bias=100.0)
    cell.build(INPUTS)
    x = torch.randn(3, UNITS)
    torch.testing.assert_close(cell(x, torch.zeros(3, UNITS))[0], x)


# The phased LSTM ------------------------------------------------------------------------------------------


def phased_with_gate(**kwargs: Any) -> PhasedLSTMCell:
    """A cell with period 10, phase 0 and the time gate open for the first half of it."""
    cell = PhasedLSTMCell(UNITS, ratio_on=0.5, leak=0.1, **kwargs)
    cell.build(INPUTS)
    with torch.no_grad():
        cell.period.fill_(10.0)
        cell.phase.zero_()
    return cell


@pytest.mark.parametrize(
    ("time", "gate"),
    [(0.0, 0.0), (1.25, 0.5), (2.5, 1.0), (3.75, 0.5), (8.0, 0.08), (21.25, 0.5), (-2.0, 0.08)],
)
def test_phased_mixes_the_states_by_the_time_gate(time: float, gate: float) -> None:
    cell = phased_with_gate()
    x, state = torch.randn(3, INPUTS), LSTMStateTuple(torch.randn(3, UNITS), torch.randn(3, UNITS))
    _, (c_open, h_open) = cell((torch.full((3, 1), 2.5), x), state)
    output, (c, h) = cell((torch.full((3, 1), time), x), state)
    torch.testing.assert_close(c, gate * c_open + (1 - gate) * state.c)
    torch.testing.assert_close(h, gate * h_open + (1 - gate) * state.h)
    assert output is h


def test_phased_takes_large_times_in_float64() -> None:
    cell = phased_with_gate()
    x, state = torch.randn(3, INPUTS), cell.zero_state(3)
    near, far = (torch.full((3, 1), t, dtype=torch.float64) for t in (1.25, 1e12 + 1.25))
    output, new = cell((far, x), state)
    torch.testing.assert_close(output, cell((near, x), state)[0])
    assert {v.dtype for v in (output, *new, *cell.parameters())} == {torch.float32}


@pytest.mark.parametrize("is_stepwise", [False, True])
def test_phased_runs_over_a_sequence_with_times_in_float64(is_stepwise: bool) -> None:
    cell, time, x = PhasedLSTMCell(UNITS), torch.rand(3, 5, 1).double(), torch.randn(3, 5, INPUTS)
    with stepwise() if is_stepwise else contextlib.nullcontext():
        outputs, _ = dynamic_rnn(cell, (time, x), dtype=torch.float32)
    assert {v.dtype for v in (outputs, *cell.parameters())} == {torch.float32}
    with pytest.raises(
        TypeError, match=r"one dtype, got torch\.float32 and torch\.float64 and torch\.bfloat16"
    ):
        dynamic_rnn(PhasedLSTMCell(UNITS), (time, x), dtype=torch.bfloat16)


def test_phased_is_built_by_its_first_call_or_sequence() -> None:
    cell = PhasedLSTMCell(UNITS)
    assert not cell.built
    cell((torch.zeros(3, 1), torch.zeros(3, INPUTS)), cell.zero_state(3))
    assert cell.new_input_kernel.shape == (INPUTS + UNITS, UNITS)
    cell = PhasedLSTMCell(UNITS)
    inputs = [(torch.zeros(3, 1), torch.zeros(3, INPUTS))] * 2
    static_rnn(cell, inputs, dtype=torch.float32)
    assert cell.new_input_kernel.shape == (INPUTS + UNITS, UNITS)


def test_phased_ratio_on_is_a_variable_that_need_not_learn() -> None:
    for trainable in (True, False):
        cell = phased_with_gate(trainable_ratio_on=trainable)
        assert "phased_lstm_cell/ratio_on" in [name for name, _, _ in cell.tf_names()]
        assert "ratio_on" in cell.state_dict()
        output, _ = cell((torch.full((3, 1), 1.25), torch.randn(3, INPUTS)), cell.zero_state(3))
        output.sum().backward()
        assert (cell.ratio_on.grad is not None) == trainable == cell.ratio_on.requires_grad
        assert cell.period.grad is not None


def test_phased_modulo_gives_the_period_no_gradient() -> None:
    cell = phased_with_gate()
    time = torch.full((1, 1), 21.25, requires_grad=True)
    gate = cell.project((time, torch.zeros(1, INPUTS)))[0]
    in_time, in_period = torch.autograd.grad(gate.sum(), [time, cell.period])
    # gate = 4 * cycle, with a cycle of 1.25 / period.
    torch.testing.assert_close(in_time, torch.full((1, 1), 4 / 10 * UNITS))
    torch.testing.assert_close(in_period, torch.full((UNITS,), -4 * 1.25 / 100))


def test_phased_refuses_other_inputs() -> None:
    cell, time, x = PhasedLSTMCell(UNITS), torch.zeros(3, 1), torch.zeros(3, INPUTS)
    state = cell.zero_state(3)
    with pytest.raises(TypeError, match=r"inputs must be a pair \(time, x\), got Tensor"):
        cell(x, state)
    with pytest.raises(ValueError, match=r"the time must be \[B, 1\], got \[3, 4\]"):
        cell((x, x), state)
    with pytest.raises(ValueError, match="only supports floating point inputs"):
        cell((time.long(), x), state)
    with pytest.raises(ValueError, match="expected ndim=2, found ndim=1"):
        cell((time, x[0]), state)
    with pytest.raises(ValueError, match="0 < period_init_min <= period_init_max is required, got 0 and 1"):
        PhasedLSTMCell(UNITS, period_init_min=0, period_init_max=1)


# Variables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_variables_have_the_names_and_shapes_of_tensorflow(name: str) -> None:
    cell = built(name)
    shapes = {tf_name: list(getattr(owner, attribute).shape) for tf_name, owner, attribute in cell.tf_names()}
    assert shapes == SHAPES[name]


@pytest.mark.parametrize("name", CELLS)
def test_a_state_dict_builds_another_cell(name: str) -> None:
    cell, other, inputs = built(name), CELLS[name]().double(), inputs_of(name)
    other.load_state_dict(cell.state_dict())
    assert other.built
    for again in (other, copy.deepcopy(cell)):
        torch.testing.assert_close(
            dynamic_rnn(again, inputs, dtype=torch.float64), dynamic_rnn(cell, inputs, dtype=torch.float64)
        )


@pytest.mark.parametrize("name", CELLS)
def test_name_and_dtype_are_taken(name: str) -> None:
    make: Any = type(CELLS[name]())
    cell = make(UNITS, name="mine", dtype=torch.float64)
    cell.build(UNITS, torch.float32)
    assert {p.dtype for p in cell.parameters()} == {torch.float64}
    assert all(tf_name.startswith("mine/") for tf_name, _, _ in cell.tf_names())


@pytest.mark.parametrize("name", CELLS)
def test_initial_values_are_those_of_tensorflow(name: str) -> None:
    cell = CELLS[name]()
    cell.build(INPUTS)
    ones = {"indygru": ["gates_bias"], "minimal": ["bias"], "cfn": ["bias"]}.get(name, [])
    for key, value in cell.named_parameters():
        if key in ones:
            assert (value == 1).all(), key
        elif key.startswith("bias") or key.endswith("bias"):
            assert (value == 0).all(), key
        elif key.endswith("kernel_u"):
            assert value.abs().max() < 1
            assert value.min() < 0 < value.max()
        elif value.dim() == 2:
            assert 0 < value.abs().max() <= math.sqrt(6 / sum(value.shape)), key


def test_kernel_u_spans_minus_one_to_one_in_a_wide_cell() -> None:
    cell = IndRNNCell(2000)
    cell.build(1)
    assert cell.kernel_u.min() < -0.99
    assert cell.kernel_u.max() > 0.99


def test_phased_initial_values_are_those_of_tensorflow() -> None:
    cell = PhasedLSTMCell(2000, ratio_on=0.2, period_init_min=2.0, period_init_max=200.0)
    cell.build(1)
    assert cell.period.min() >= 2
    assert cell.period.max() <= 200
    # The logarithm is uniform: half of the periods are below the geometric mean.
    assert 0.45 < (cell.period < 20).float().mean() < 0.55
    assert ((cell.phase >= 0) & (cell.phase <= cell.period)).all()
    assert 0.45 < (cell.phase / cell.period).mean() < 0.55
    assert (cell.ratio_on == torch.tensor(0.2)).all()


@pytest.mark.parametrize(
    "cell",
    [
        UGRNNCell(UNITS, initializer=nn.init.ones_),
        IntersectionRNNCell(UNITS, UNITS, initializer=nn.init.ones_),
        GLSTMCell(UNITS, initializer=nn.init.ones_, num_proj=4, number_of_groups=2),
        MinimalRNNCell(UNITS, kernel_initializer=nn.init.ones_, bias_initializer=nn.init.zeros_),
        CFNCell(UNITS, kernel_initializer=nn.init.ones_, bias_initializer=nn.init.zeros_),
        IndyGRUCell(UNITS, kernel_initializer=nn.init.ones_, bias_initializer=nn.init.zeros_),
        IndyLSTMCell(UNITS, kernel_initializer=nn.init.ones_, bias_initializer=nn.init.zeros_),
    ],
    ids=lambda cell: type(cell).__name__,
)
def test_initializers_are_taken(cell: RNNCell) -> None:
    cell.build(INPUTS)
    for key, value in cell.named_parameters():
        if "bias" in key:
            assert (value == 0).all(), key
        elif key.endswith("kernel_u"):
            assert value.abs().max() < 1, key
        else:
            assert (value == 1).all(), key


@pytest.mark.parametrize("make", [NASCell, GLSTMCell])
def test_a_projection_must_have_a_size(make: Any) -> None:
    with pytest.raises(ValueError, match="num_proj must be None or at least 1, got 0"):
        make(UNITS, num_proj=0)
