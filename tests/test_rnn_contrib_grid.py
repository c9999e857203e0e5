"""The convolutional and the frequency-axis LSTMs: equations, names, both ways to run, and errors.

One file: the equations, written down anew here, serve all sections.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import torchrnn
from torchrnn import rnn_cell
from torchrnn.rnn_cell import LSTMStateTuple


def grid(*args: Any, **kwargs: Any) -> Any:
    return rnn_cell.GridLSTMCell(
        3, *args, feature_size=2, frequency_skip=1, num_frequency_blocks=[3], **kwargs
    )


def blocks(**kwargs: Any) -> Any:
    return rnn_cell.GridLSTMCell(
        3,
        feature_size=2,
        frequency_skip=2,
        num_frequency_blocks=[2, 1],
        start_freqindex_list=[0, 4],
        end_freqindex_list=[4, 6],
        **kwargs,
    )


def bigrid(**kwargs: Any) -> Any:
    return rnn_cell.BidirectionalGridLSTMCell(
        3, feature_size=2, frequency_skip=1, num_frequency_blocks=[3], **kwargs
    )


# Cells with the shape of one input row.
MAKERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "conv1d": (lambda: rnn_cell.Conv1DLSTMCell([5, 2], 3, [3]), (5, 2)),
    "conv1d-even": (lambda: rnn_cell.Conv1DLSTMCell([5, 2], 3, [4], forget_bias=0.3), (5, 2)),
    "conv2d": (lambda: rnn_cell.Conv2DLSTMCell([3, 4, 2], 2, [3, 2]), (3, 4, 2)),
    "conv2d-1x1": (lambda: rnn_cell.Conv2DLSTMCell([3, 4, 2], 2, [1, 1], use_bias=False), (3, 4, 2)),
    "conv3d": (lambda: rnn_cell.Conv3DLSTMCell([2, 3, 2, 1], 2, [2, 3, 1]), (2, 3, 2, 1)),
    "timefreq": (lambda: rnn_cell.TimeFreqLSTMCell(3, feature_size=2), (5,)),
    "timefreq-all": (
        lambda: rnn_cell.TimeFreqLSTMCell(3, True, 0.4, forget_bias=0.2, feature_size=3, frequency_skip=2),
        (8,),
    ),
    "grid": (grid, (4,)),
    "grid-shared": (lambda: grid(True, True, 0.4), (4,)),
    "grid-coupled": (lambda: grid(True, couple_input_forget_gates=True), (4,)),
    "grid-blocks": (lambda: blocks(use_peepholes=True), (6,)),
    "grid-concatenated": (lambda: blocks(use_peepholes=True, state_is_tuple=False), (6,)),
    "bigrid": (lambda: bigrid(use_peepholes=True), (4,)),
    "bigrid-later": (lambda: bigrid(backward_slice_offset=1), (4,)),
    "bigrid-earlier": (lambda: bigrid(backward_slice_offset=-2), (4,)),
    "bigrid-zeros": (lambda: bigrid(backward_slice_offset=7), (4,)),
}


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


@pytest.fixture(params=MAKERS)
def case(request: pytest.FixtureRequest) -> tuple[Any, Tensor, Any]:
    """Returns a built cell with random variables, inputs [4, 5, ...] and a random state."""
    make, shape = MAKERS[request.param]
    cell = make()
    cell.build(shape)
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    state = pytree.tree_map(torch.randn_like, cell.zero_state(4))
    return cell, torch.randn(4, 5, *shape), state


def variables(cell: Any) -> dict[str, Tensor]:
    """Returns the variables by TensorFlow's names below the cell's scope."""
    return {name.partition("/")[2]: getattr(owner, at) for name, owner, at in cell.tf_names()}


def shapes(cell: Any) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in variables(cell).items()}


# The equations, one number per piece at a time --------------------------------------------------------------


def conv_step(cell: Any, x: Tensor, state: Any) -> Any:
    """One step, its convolution as a sum over the kernel's offsets."""
    v = variables(cell)
    kernel = v["kernel"]
    x = torch.cat([x, state.h], -1)
    pads = [pad for k in reversed(kernel.shape[:-2]) for pad in ((k - 1) // 2, k - 1 - (k - 1) // 2)]
    padded = F.pad(x, [0, 0, *pads])
    gates = v.get("biases", torch.zeros(()))
    for offset in torch.cartesian_prod(*[torch.arange(k) for k in kernel.shape[:-2]]).view(
        -1, kernel.dim() - 2
    ):
        part = padded
        for axis, start in enumerate(offset.tolist()):
            part = part.narrow(axis + 1, start, x.size(axis + 1))
        gates = gates + part @ kernel[tuple(offset.tolist())]
    i, j, f, o = gates.chunk(4, -1)
    c = torch.sigmoid(f + cell.forget_bias) * state.c + torch.sigmoid(i) * torch.tanh(j)
    h = torch.tanh(c) * torch.sigmoid(o)
    return h, LSTMStateTuple(c, h)


def clipped(cell: Any, c: Tensor) -> Tensor:
    return c if cell.cell_clip is None else c.clamp(-cell.cell_clip, cell.cell_clip)


def timefreq_step(cell: Any, x: Tensor, state: Tensor) -> Any:
    v, units, size, new = variables(cell), cell.num_units, cell.feature_size, []
    m_freq = x.new_zeros(x.size(0), units)

    def see(gate: str, c: Tensor) -> Any:
        return v[f"W_{gate}_diag"] * c if cell.use_peepholes else 0

    for k, start in enumerate(range(0, x.size(1) - size + 1, cell.frequency_skip)):
        c, m = state[:, 2 * k * units :][:, : 2 * units].chunk(2, 1)
        i, j, f, o = (torch.cat([x[:, start : start + size], m, m_freq], 1) @ v["W_0"] + v["B"]).chunk(4, 1)
        i, f = i + see("I", c), f + see("F", c)
        c = clipped(cell, torch.sigmoid(f + cell.forget_bias) * c + torch.sigmoid(i) * torch.tanh(j))
        m_freq = torch.sigmoid(o + see("O", c)) * torch.tanh(c)
        new += [c, m_freq]
    return torch.cat(new[1::2], 1), torch.cat(new, 1)


def grid_piece(cell: Any, of: Callable[[str], Tensor], x: Tensor, time: Any, freq: Any) -> Any:
    """Returns the new ``(c, m)`` of time and of frequency for one piece."""
    (c_time, m_time), (c_freq, m_freq) = time, freq

    def see(gate: str, tag: str, c_freq: Tensor, c_time: Tensor) -> Any:
        if not cell.use_peepholes:
            return 0
        return of(f"W_{gate}_diag_{tag}f_{{b}}") * c_freq + of(f"W_{gate}_diag_{tag}t_{{b}}") * c_time

    a = torch.cat([x, m_time, m_freq], 1)
    time_side = ("f", "freq") if cell.share_time_frequency_weights else ("t", "time")
    new, opens = [], []
    for (side, tag), old in ((time_side, c_time), (("f", "freq"), c_freq)):
        g = a @ of(f"W_{side}_{{b}}_0") + of(f"B_{side}_{{b}}")
        if cell.couple_input_forget_gates:
            i, j, o = g.chunk(3, 1)
            i = torch.sigmoid(i + see("I", tag, c_freq, c_time))
            f = 1 - i
        else:
            i, j, f, o = g.chunk(4, 1)
            i = torch.sigmoid(i + see("I", tag, c_freq, c_time))
            f = torch.sigmoid(f + cell.forget_bias + see("F", tag, c_freq, c_time))
        new.append(clipped(cell, f * old + i * torch.tanh(j)))
        opens.append((o, tag))
    c_time, c_freq = new
    m_time, m_freq = (
        torch.sigmoid(o + see("O", tag, c_freq, c_time)) * torch.tanh(c)
        for (o, tag), c in zip(opens, new, strict=True)
    )
    return (c_time, m_time), (c_freq, m_freq)


def grid_step(cell: Any, x: Tensor, state: Any) -> Any:
    flat = list(state) if cell.state_is_tuple else list(state.split(cell.num_units, 1))
    v = variables(cell)
    outputs: list[Tensor] = []
    new: list[Tensor] = []
    two_ways = isinstance(cell, rnn_cell.BidirectionalGridLSTMCell)
    for direction in ("fwd/", "bwd/") if two_ways else ("",):
        later = cell.backward_slice_offset if direction == "bwd/" else 0
        wide = F.pad(x, (9, 9))[:, 9 + later :]
        for b, count in enumerate(cell.num_frequency_blocks):
            starts = [[0, 4][b] + k * cell.frequency_skip for k in range(count)]
            freq = (x.new_zeros(x.size(0), cell.num_units),) * 2
            for start in reversed(starts) if direction == "bwd/" else starts:
                time, freq = grid_piece(
                    cell,
                    lambda name, prefix=direction, b=b: v[prefix + name.format(b=b)],
                    wide[:, start : start + cell.feature_size],
                    flat[len(new) : len(new) + 2],
                    freq,
                )
                outputs += [time[1], freq[1]]
                new += time
    new_state = cell.state_tuple_type(*new) if cell.state_is_tuple else torch.cat(new, 1)
    return torch.cat(outputs, 1), new_state


def reference_step(cell: Any, x: Tensor, state: Any) -> Any:
    if isinstance(cell, rnn_cell.ConvLSTMCell):
        return conv_step(cell, x, state)
    return (timefreq_step if isinstance(cell, rnn_cell.TimeFreqLSTMCell) else grid_step)(cell, x, state)


def test_step_follows_the_equations(case: Any) -> None:
    cell, x, state = case
    output, new = cell(x[:, 0], state)
    torch.testing.assert_close((output, new), reference_step(cell, x[:, 0], state))
    assert type(new) is type(state)


def gradients(results: Any, cell: Any, *inputs: Any) -> Any:
    leaves = pytree.tree_leaves(results)
    loss = sum((leaf * torch.linspace(-1, 1, leaf.numel()).view_as(leaf)).sum() for leaf in leaves)
    return torch.autograd.grad(loss, [*pytree.tree_leaves(inputs), *cell.parameters()])


@pytest.mark.parametrize("lengths", [None, [5, 0, 3, 1]])
def test_unroll_equals_stepwise_with_gradients(case: Any, lengths: Any) -> None:
    cell, x, state = case
    pytree.tree_map(lambda v: v.requires_grad_(), (x, state))
    results = torchrnn.dynamic_rnn(cell, x, lengths, state)
    with torchrnn.stepwise():
        expected = torchrnn.dynamic_rnn(cell, x, lengths, state)
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(gradients(results, cell, x, state), gradients(expected, cell, x, state))


def test_unroll_runs_backwards(case: Any) -> None:
    cell, x, _ = case
    lengths = torch.tensor([5, 2, 3, 1])
    (_, output), (_, state) = torchrnn.bidirectional_dynamic_rnn(
        cell, copy.deepcopy(cell), x, lengths, dtype=x.dtype
    )
    for row, length in enumerate(lengths.tolist()):
        one = x[row : row + 1, :length].flip(1)
        expected, final = torchrnn.dynamic_rnn(cell, one, dtype=x.dtype)
        torch.testing.assert_close(output[row : row + 1, :length], expected.flip(1))
        torch.testing.assert_close(pytree.tree_map(lambda v, row=row: v[row : row + 1], state), final)


def test_padding_is_zero_in_outputs_and_never_read(case: Any) -> None:
    cell, x, state = case
    lengths = torch.tensor([5, 0, 3, 1])
    padding = torch.arange(5) >= lengths[:, None]
    dirty = x.clone()
    dirty[padding] = float("nan")
    dirty.requires_grad_()
    results = torchrnn.dynamic_rnn(cell, dirty, lengths, state)
    torch.testing.assert_close(results, torchrnn.dynamic_rnn(cell, x, lengths, state))
    assert not results[0][padding].any()
    for before, after in zip(pytree.tree_leaves(state), pytree.tree_leaves(results[1]), strict=True):
        assert torch.equal(before[1], after[1])
    found = gradients(results, cell, dirty)
    assert all(torch.isfinite(g).all() for g in found)
    assert not found[0][padding].any()


def test_gradcheck_of_a_step(case: Any) -> None:
    cell, x, state = case
    row, spec = pytree.tree_flatten(pytree.tree_map(lambda v: v[:1].clone().requires_grad_(), state))

    def step(x: Tensor, *rest: Tensor) -> Any:
        parameters = dict(zip(dict(cell.named_parameters()), rest[len(row) :], strict=True))
        given = x, pytree.tree_unflatten(rest[: len(row)], spec)
        output, new = torch.func.functional_call(cell, parameters, given)
        return output, *pytree.tree_leaves(new)

    assert torch.autograd.gradcheck(
        step, (x[:1, 0].clone().requires_grad_(), *row, *cell.parameters()), fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
def test_other_dtypes_run_and_train(name: str, dtype: torch.dtype) -> None:
    make, shape = MAKERS[name]
    cell = make()
    cell.build(shape, dtype)
    x = torch.randn(2, 3, *shape, dtype=dtype)
    output, state = torchrnn.dynamic_rnn(cell, x, [3, 2], dtype=dtype)
    assert {v.dtype for v in pytree.tree_leaves((output, state))} == {dtype}
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cell.parameters())
    wide, expected = copy.deepcopy(cell).double(), output.double()
    found, _ = torchrnn.dynamic_rnn(wide, x.double(), [3, 2], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", MAKERS)
def test_state_dict_loads_into_a_cell_without_variables(name: str) -> None:
    make, shape = MAKERS[name]
    cell, other = make(), make()
    x = torch.randn(2, 3, *shape)
    cell.build(shape)
    expected = torchrnn.dynamic_rnn(cell, x, dtype=x.dtype)
    other.load_state_dict(cell.state_dict())
    torch.testing.assert_close(torchrnn.dynamic_rnn(other, x, dtype=x.dtype), expected, rtol=0, atol=0)


def test_cells_and_states_can_be_copied_and_pickled(case: Any) -> None:
    cell, x, state = case
    stored = io.BytesIO()
    torch.save((cell, state), stored)
    stored.seek(0)
    cell_2, state_2 = torch.load(stored, weights_only=False)
    assert type(state_2) is type(state)
    torch.testing.assert_close(cell_2(x[:, 0], state_2), cell(x[:, 0], state), rtol=0, atol=0)
    assert type(copy.deepcopy(state)) is type(pickle.loads(pickle.dumps(state))) is type(state)


@pytest.mark.parametrize("name", ["conv2d", "timefreq", "bigrid"])
def test_compile_finds_no_break(name: str) -> None:
    make, shape = MAKERS[name]
    cell = make()
    cell.build(shape)
    x, lengths = torch.randn(2, 3, *shape), torch.tensor([3, 1])
    run = torch.compile(
        lambda x: torchrnn.dynamic_rnn(cell, x, lengths, dtype=x.dtype), backend="eager", fullgraph=True
    )
    found, expected = run(x), torchrnn.dynamic_rnn(cell, x, lengths, dtype=x.dtype)
    torch.testing.assert_close(found, expected)
    assert type(found[1]) is type(expected[1])


def test_explain_says_what_is_hoisted(case: Any) -> None:
    assert "inputs of all steps" in torchrnn.explain(case[0])


# Names, shapes, sizes ---------------------------------------------------------------------------------------


def test_conv_variables_and_sizes_are_those_of_tensorflow() -> None:
    cell = rnn_cell.Conv2DLSTMCell([3, 4, 2], 5, [3, 2])
    assert not cell.built
    cell(torch.zeros(1, 3, 4, 2), cell.zero_state(1))
    assert shapes(cell) == {"kernel": [3, 2, 7, 20], "biases": [20]}
    size = torch.Size([3, 4, 5])
    assert (cell.state_size, cell.output_size) == (LSTMStateTuple(size, size), size)
    assert not cell.biases.any()
    assert cell.kernel.abs().max() <= (6 / (3 * 2 * (7 + 20))) ** 0.5
    assert [name for name, *_ in cell.tf_names()] == ["conv_2d_lstm_cell/kernel", "conv_2d_lstm_cell/biases"]
    names = {n: c.scope for n, c in vars(rnn_cell).items() if n.startswith("Conv")}
    assert names == {
        "ConvLSTMCell": "conv_lstm_cell",
        "Conv1DLSTMCell": "conv_1d_lstm_cell",
        "Conv2DLSTMCell": "conv_2d_lstm_cell",
        "Conv3DLSTMCell": "conv_3d_lstm_cell",
    }
    general = rnn_cell.ConvLSTMCell(1, [4, 2], 3, [3], use_bias=False, name="mine")
    general.build([4, 2])
    assert [name for name, *_ in general.tf_names()] == ["mine/kernel"]


def test_grid_variables_are_those_of_tensorflow() -> None:
    cell = blocks(use_peepholes=True)
    cell.build(6)
    expected: dict[str, list[int]] = {}
    for b in range(2):
        for side in "ft":
            expected |= {f"W_{side}_{b}_0": [8, 12], f"B_{side}_{b}": [12]}
        for side in ("freq", "time"):
            expected |= {f"W_{gate}_diag_{side}{of}_{b}": [3] for gate in "FIO" for of in "ft"}
    assert shapes(cell) == expected
    shared = bigrid(share_time_frequency_weights=True, use_peepholes=True, couple_input_forget_gates=True)
    shared.build(4)
    once = {"W_f_0_0": [8, 9], "B_f_0": [9]} | {f"W_{g}_diag_freq{of}_0": [3] for g in "IO" for of in "ft"}
    assert shapes(shared) == {
        f"{way}/{name}": shape for way in ("fwd", "bwd") for name, shape in once.items()
    }
    assert {name.partition("/")[0] for name, *_ in shared.tf_names()} == {"bidirectional_grid_lstm_cell"}


def test_grid_initializer_fills_all_but_biases() -> None:
    cell = bigrid(use_peepholes=True, initializer=torch.nn.init.ones_)
    cell.build(4)
    for name, value in variables(cell).items():
        assert torch.equal(value, torch.full_like(value, float("B_" not in name)))


def test_grid_state_is_a_named_tuple_per_piece() -> None:
    cell = blocks()
    assert type(cell.state_size).__name__ == "GridLSTMStateTuple"
    assert cell.state_size._fields == tuple(
        f"state_{piece}_{what}" for piece in ("f00_b00", "f01_b00", "f00_b01") for what in "cm"
    )
    assert set(cell.state_size) == {3}
    assert cell.output_size == 18
    assert type(blocks().zero_state(2)) is cell.state_tuple_type
    both = bigrid()
    assert type(both.state_size).__name__ == "BidirectionalGridLSTMStateTuple"
    assert both.state_size._fields[::6] == ("fwd_state_f00_b00_c", "bwd_state_f00_b00_c")
    assert (len(both.state_size), both.output_size) == (12, 36)


def test_grid_concatenated_state_has_a_part_per_block() -> None:
    tupled, joined = blocks(), blocks(state_is_tuple=False)
    assert joined.state_size == 18
    tupled.build(6)
    joined.load_state_dict(tupled.state_dict())
    x = torch.randn(2, 3, 6)
    state = tupled.state_tuple_type(*torch.randn(6, 2, 3))
    expected, final = torchrnn.dynamic_rnn(tupled, x, [3, 1], state)
    output, found = torchrnn.dynamic_rnn(joined, x, [3, 1], torch.cat(list(state), 1))
    torch.testing.assert_close((output, found), (expected, torch.cat(list(final), 1)))


def test_grid_takes_plain_tuples() -> None:
    cell = grid()
    x, state = torch.randn(2, 4), tuple(torch.randn(6, 2, 3))
    output, new = cell(x, state)
    assert type(new) is cell.state_tuple_type
    torch.testing.assert_close(output, cell(x, list(state))[0])
    torch.testing.assert_close(torchrnn.dynamic_rnn(cell, x[:, None], initial_state=state)[1], new)


def test_cells_stack() -> None:
    x = torch.randn(2, 3, 5)
    stack = rnn_cell.MultiRNNCell([rnn_cell.TimeFreqLSTMCell(3, feature_size=2), rnn_cell.GRUCell(4)])
    results = torchrnn.dynamic_rnn(stack, x, [3, 1], dtype=x.dtype)
    with torchrnn.stepwise():
        torch.testing.assert_close(results, torchrnn.dynamic_rnn(stack, x, [3, 1], dtype=x.dtype))


def test_timefreq_sizes_are_the_true_ones_once_built() -> None:
    cell = rnn_cell.TimeFreqLSTMCell(3, feature_size=2, use_peepholes=True)
    assert (cell.state_size, cell.output_size) == (6, 3)
    cell.build(5)
    assert (cell.state_size, cell.output_size) == (24, 12)
    peepholes = {f"W_{gate}_diag": [3] for gate in "FIO"}
    assert shapes(cell) == {"W_0": [8, 12], "B": [12], **peepholes}
    assert next(cell.tf_names())[0] == "time_freq_lstm_cell/W_0"


def test_timefreq_runs_over_a_sequence_without_being_built_first() -> None:
    cell, x = rnn_cell.TimeFreqLSTMCell(3, feature_size=2), torch.randn(3, 4, 5)
    results = torchrnn.dynamic_rnn(cell, x, [4, 0, 2], dtype=x.dtype)
    assert results[0].shape == (3, 4, 12)
    torch.testing.assert_close(results, torchrnn.dynamic_rnn(cell, x, [4, 0, 2], cell.zero_state(3)))


# Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: rnn_cell.ConvLSTMCell(2, [3, 4], 2, [3, 3]),
            r"Invalid input_shape \[3, 4\] for conv_ndims=2\.",
        ),
        (
            lambda: rnn_cell.Conv1DLSTMCell([3, 4, 2], 2, [3]),
            r"Invalid input_shape \[3, 4, 2\] for conv_ndims=1",
        ),
        (lambda: rnn_cell.Conv2DLSTMCell([3, 4, 2], 2, [3]), r"Invalid kernel_shape \[3\] for conv_ndims=2"),
        (lambda: rnn_cell.ConvLSTMCell(4, [1] * 5, 2, [3] * 4), "conv_ndims must be 1, 2 or 3, got 4"),
        (lambda: rnn_cell.Conv1DLSTMCell([5, 2], 0, [3]), "output_channels 0"),
        (lambda: rnn_cell.Conv1DLSTMCell([5, 2], 3, [3], skip_connection=True), "skip_connection=True"),
        (
            lambda: rnn_cell.TimeFreqLSTMCell(3),
            "feature_size and frequency_skip must be at least 1, got None",
        ),
        (lambda: rnn_cell.GridLSTMCell(3), "Must specify num_frequency_blocks"),
        (lambda: rnn_cell.BidirectionalGridLSTMCell(3), "Must specify num_frequency_blocks"),
        (
            lambda: rnn_cell.GridLSTMCell(3, feature_size=2, num_frequency_blocks=[2]),
            "frequency_skip must be at least 1, got 2 and None",
        ),
    ],
)
def test_bad_arguments_are_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("counts", "starts", "ends", "message"),
    [
        ([], None, None, "numbers of at least 1, got \\[\\]"),
        ([2, 0], [0, 4], [4, 6], "numbers of at least 1, got \\[2, 0\\]"),
        ([2, 1], None, None, "one number per block"),
        ([2], [0, 4], [4, 6], "one number per block"),
        ([2, 1], [0, 4], [4], "start_freqindex_list and end_freqindex_list must have one number per block"),
        ([2, 1], [-2, 4], [2, 6], "start_freqindex_list must be at least 0"),
        ([2, 2], [0, 4], [4, 6], "Invalid num_frequency_blocks, requires 2 but gets 1"),
        ([2], None, [7], "Invalid num_frequency_blocks, requires 2 but gets 3"),
        ([2], [5], [3], "Invalid num_frequency_blocks, requires 2 but gets 0"),
    ],
)
def test_grid_blocks_that_do_not_fit_are_errors(counts: Any, starts: Any, ends: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rnn_cell.GridLSTMCell(
            3,
            feature_size=2,
            frequency_skip=2,
            num_frequency_blocks=counts,
            start_freqindex_list=starts,
            end_freqindex_list=ends,
        )


def test_inputs_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match="requires 3 but gets 4"):
        grid().build(5)
    with pytest.raises(ValueError, match="the pieces need inputs of size 6, got 5"):
        blocks().build(5)
    with pytest.raises(ValueError, match="at least feature_size=4 features, got 3"):
        rnn_cell.TimeFreqLSTMCell(3, feature_size=4).build(3)
    conv = rnn_cell.Conv1DLSTMCell([5, 2], 3, [3])
    with pytest.raises(ValueError, match=r"2 channels of input_shape \[5, 2\], got 3"):
        conv.build([5, 3])
    for shape in ([1, 4, 2], [1, 5, 3], [1, 5]):
        with pytest.raises(ValueError, match=r"expected \[B, 5, 2\], found"):
            conv(torch.zeros(shape), conv.zero_state(1))
    with pytest.raises(ValueError, match=r"expected \[B, 5, 2\], found"):
        torchrnn.dynamic_rnn(conv, torch.zeros(1, 3, 4, 2), dtype=torch.float64)
    with pytest.raises(TypeError, match="inputs must be a tensor"):
        conv([torch.zeros(1, 5, 2)], conv.zero_state(1))
    with pytest.raises(ValueError, match="floating point inputs"):
        conv(torch.zeros(1, 5, 2, dtype=torch.int64), conv.zero_state(1))
    with pytest.raises(ValueError, match="expected ndim=2, found ndim=3"):
        grid()(torch.zeros(1, 2, 4), grid().zero_state(1))


def test_states_that_do_not_fit_are_errors() -> None:
    conv = rnn_cell.Conv1DLSTMCell([5, 2], 3, [3])
    with pytest.raises(ValueError, match="Expected state to be a tuple of length 2"):
        conv(torch.zeros(1, 5, 2), torch.zeros(1, 5, 3))
    with pytest.raises(ValueError, match="Expected state to be a tuple of length 6"):
        grid()(torch.zeros(1, 4), torch.zeros(1, 18))
    with pytest.raises(ValueError, match=r"Expected state to be a tensor \[B, 18\]"):
        grid(state_is_tuple=False)(torch.zeros(1, 4), grid().zero_state(1))
    with pytest.raises(ValueError, match=r"the state must be \[B, 24\] for 4 pieces of 3 units"):
        rnn_cell.TimeFreqLSTMCell(3, feature_size=2)(torch.zeros(1, 5), torch.zeros(1, 6))
