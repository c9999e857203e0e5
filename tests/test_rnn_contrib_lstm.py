"""The LSTM and GRU variations of tf.contrib.rnn, and its callables over whole sequences.

One file, as each section goes over the same table of cells.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import one_thread
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from torchrnn import bidirectional_dynamic_rnn, dynamic_rnn, explain, rnn_cell, static_rnn, stepwise
from torchrnn.options import Options
from torchrnn.rnn_cell import base
from torchrnn.rnn_cell.base import RNNCell, Run, alive_mask, loop
from torchrnn.rnn_cell.engine import run_layer

T, B, INPUTS, U = 6, 4, 3, 5
LENGTHS = torch.tensor([6, 2, 0, 5])

# Every cell with what changes its path.
CELLS: dict[str, Callable[[], RNNCell]] = {
    "lnbasic": lambda: rnn_cell.LayerNormBasicLSTMCell(U),
    "lnbasic_relu": lambda: rnn_cell.LayerNormBasicLSTMCell(U, forget_bias=0.5, activation="relu"),
    "lnbasic_without_norm": lambda: rnn_cell.LayerNormBasicLSTMCell(U, layer_norm=False),
    "ln": lambda: rnn_cell.LayerNormLSTMCell(U, layer_norm=True),
    "ln_all": lambda: rnn_cell.LayerNormLSTMCell(
        U, True, 0.9, num_proj=4, proj_clip=0.4, layer_norm=True, norm_gain=0.8, norm_shift=0.1
    ),
    "ln_without_norm": lambda: rnn_cell.LayerNormLSTMCell(U, True, num_proj=4),
    "wn": lambda: rnn_cell.WeightNormLSTMCell(U),
    "wn_all": lambda: rnn_cell.WeightNormLSTMCell(
        U, use_peepholes=True, cell_clip=0.5, num_proj=4, proj_clip=0.3
    ),
    "wn_without_norm": lambda: rnn_cell.WeightNormLSTMCell(U, norm=False),
    "coupled": lambda: rnn_cell.CoupledInputForgetGateLSTMCell(U),
    "coupled_fused": lambda: rnn_cell.CoupledInputForgetGateLSTMCell(
        U, True, num_proj=4, proj_clip=0.3, forget_bias=0.4, activation="relu"
    ),
    "coupled_all": lambda: rnn_cell.CoupledInputForgetGateLSTMCell(
        U, True, num_proj=4, proj_clip=0.3, layer_norm=True
    ),
    "lstm_block": lambda: rnn_cell.LSTMBlockCell(U),
    "lstm_block_all": lambda: rnn_cell.LSTMBlockCell(U, cell_clip=0.4, use_peephole=True),
    "gru_block": lambda: rnn_cell.GRUBlockCell(U),
    "gru_block_v2": lambda: rnn_cell.GRUBlockCellV2(U),
    "cudnn_lstm": lambda: rnn_cell.CudnnCompatibleLSTMCell(U),
    "cudnn_gru": lambda: rnn_cell.CudnnCompatibleGRUCell(U),
}
each_cell = pytest.mark.parametrize("make", CELLS.values(), ids=CELLS)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def built(cell: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Returns a cell with large random variables, so that gates saturate and clips bite."""
    cell.build(INPUTS, dtype)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.normal_(0, 0.6)
    return cell


def state_of(cell: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Returns a random state that takes gradients."""
    return pytree.tree_map(lambda s: torch.randn_like(s).requires_grad_(), cell.zero_state(B, dtype))


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(T, B, INPUTS, dtype=dtype, requires_grad=True)


def gradients(result: Any, wanted: list[Tensor]) -> list[Tensor | None]:
    """Returns the gradients of a weighted sum of a nest, with the same weights on every call."""
    generator = torch.Generator().manual_seed(7)
    loss = sum(
        (v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum()
        for v in pytree.tree_leaves(result)
    )
    return list(torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True))


def assert_same(ours: Any, theirs: Any, our_inputs: list[Tensor], their_inputs: list[Tensor]) -> None:
    """Asserts that two results and their gradients are close."""
    assert_close(pytree.tree_leaves(ours), pytree.tree_leaves(theirs))
    for a, b in zip(gradients(ours, our_inputs), gradients(theirs, their_inputs), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b)


def copy_variables(source: Any, target: Any, names: dict[str, str] | None = None) -> None:
    """Copies variables by TensorFlow's names below the scope."""
    values = {name.split("/", 1)[1]: getattr(owner, a) for name, owner, a in source.tf_names()}
    with torch.no_grad():
        for name, owner, attribute in target.tf_names():
            key = name.split("/", 1)[1]
            getattr(owner, attribute).copy_(values[(names or {}).get(key, key)])


# Cells against other cells --------------------------------------------------------------------------------


@pytest.mark.parametrize("peephole", [False, True])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])
def test_block_cells_equal_lstm_cell_without_clip(peephole: bool, lengths: Tensor | None) -> None:
    reference = built(rnn_cell.LSTMCell(U, peephole, forget_bias=0.7))
    x, state = inputs(), state_of(reference)
    theirs = dynamic_rnn(reference, x, lengths, state, time_major=True)
    wanted = [x, *state, *reference.parameters()]
    block = rnn_cell.LSTMBlockCell(U, 0.7, use_peephole=peephole)
    fused = rnn_cell.LSTMBlockFusedCell(U, 0.7, cell_clip=-1, use_peephole=peephole)
    for cell in (block, fused):
        copy_variables(reference, built(cell))
        if cell is block:
            ours = dynamic_rnn(cell, x, lengths, state, time_major=True)
        else:
            ours = cell(x, state, sequence_length=lengths)
        assert_same(ours, theirs, [x, *state, *cell.parameters()], wanted)


def test_cell_clip_of_zero_is_no_clip_in_block_cells() -> None:
    cell, free = built(rnn_cell.LSTMBlockCell(U, cell_clip=0.0)), built(rnn_cell.LSTMBlockCell(U))
    free.load_state_dict(cell.state_dict())
    x = inputs()
    assert_close(dynamic_rnn(cell, x, dtype=x.dtype), dynamic_rnn(free, x, dtype=x.dtype))


def test_active_clip_of_block_cell_clips_values_but_no_gradients() -> None:
    clipped, true, free = (
        built(make(U, cell_clip=clip))
        for make, clip in ((rnn_cell.LSTMBlockCell, 0.3), (rnn_cell.LSTMCell, 0.3), (rnn_cell.LSTMCell, None))
    )
    true.load_state_dict(clipped.state_dict())
    free.load_state_dict(clipped.state_dict())
    x, state = inputs()[0].detach().requires_grad_(), state_of(clipped)
    results = [cell(x, state)[1] for cell in (clipped, true, free)]
    assert torch.equal(results[0].c, results[1].c)
    assert torch.equal(results[0].h, results[1].h)
    assert (results[2].c.abs() > 0.3).any()
    d_clipped, d_true, d_free = (torch.autograd.grad(r.c.sum(), x)[0] for r in results)
    assert_close(d_clipped, d_free)
    assert not torch.allclose(d_clipped, d_true)


def test_clipped_block_cell_gives_the_same_values_without_gradients() -> None:
    cell = built(rnn_cell.LSTMBlockCell(U, cell_clip=0.3, use_peephole=True))
    x = inputs()
    with torch.no_grad():
        ours = dynamic_rnn(cell, x, LENGTHS, dtype=x.dtype, time_major=True)
    assert_close(ours, dynamic_rnn(cell, x, LENGTHS, dtype=x.dtype, time_major=True))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])
def test_gru_block_cells_equal_gru_cell(lengths: Tensor | None) -> None:
    reference = built(rnn_cell.GRUCell(U))
    x, state = inputs(), state_of(reference)
    theirs = dynamic_rnn(reference, x, lengths, state, time_major=True)
    renamed = {
        "w_ru": "gates/kernel", "b_ru": "gates/bias", "w_c": "candidate/kernel", "b_c": "candidate/bias",
    }  # fmt: skip
    for cell, names in ((rnn_cell.GRUBlockCell(U), renamed), (rnn_cell.GRUBlockCellV2(cell_size=U), {})):
        copy_variables(reference, built(cell), names)
        ours = dynamic_rnn(cell, x, lengths, state, time_major=True)
        assert_same(ours, theirs, [x, state, *cell.parameters()], [x, state, *reference.parameters()])


def test_cudnn_compatible_lstm_cell_equals_torch_lstm() -> None:
    cell, reference = built(rnn_cell.CudnnCompatibleLSTMCell(U)), nn.LSTM(INPUTS, U, dtype=torch.float64)
    i, j, f, o = cell.kernel.detach().t().chunk(4)
    weight = torch.cat([i, f, j, o])
    i, j, f, o = cell.bias.detach().chunk(4)
    reference.load_state_dict({
        "weight_ih_l0": weight[:, :INPUTS], "weight_hh_l0": weight[:, INPUTS:],
        "bias_ih_l0": torch.cat([i, f, j, o]), "bias_hh_l0": torch.zeros(4 * U),
    })  # fmt: skip
    x = inputs()
    y, (h, c) = reference(x)
    assert_close(
        dynamic_rnn(cell, x, dtype=x.dtype, time_major=True), (y, rnn_cell.LSTMStateTuple(c[0], h[0]))
    )


def test_cudnn_compatible_gru_cell_equals_torch_gru() -> None:
    cell, reference = built(rnn_cell.CudnnCompatibleGRUCell(U)), nn.GRU(INPUTS, U, dtype=torch.float64)
    of_x = torch.cat([cell.gates_kernel[:INPUTS], cell.candidate_input_projection_kernel], 1)
    of_h = torch.cat([cell.gates_kernel[INPUTS:], cell.candidate_hidden_projection_kernel], 1)
    none = torch.zeros(2 * U)
    reference.load_state_dict({
        "weight_ih_l0": of_x.t(), "weight_hh_l0": of_h.t(),
        "bias_ih_l0": torch.cat([cell.gates_bias, cell.candidate_input_projection_bias]),
        "bias_hh_l0": torch.cat([none, cell.candidate_hidden_projection_bias]),
    })  # fmt: skip
    x = inputs()
    y, h = reference(x)
    assert_close(dynamic_rnn(cell, x, dtype=x.dtype, time_major=True), (y, h[0]))


@pytest.mark.parametrize(
    "make", [rnn_cell.LayerNormLSTMCell, lambda u, **k: rnn_cell.WeightNormLSTMCell(u, False, **k)]
)
def test_cells_that_do_not_normalise_equal_lstm_cell(make: Any) -> None:
    options = {"use_peepholes": True, "cell_clip": 0.4, "num_proj": 4, "proj_clip": 0.3, "forget_bias": 0.2}
    cell, reference = built(make(U, **options)), built(rnn_cell.LSTMCell(U, **options))
    reference.load_state_dict(cell.state_dict())
    x, state = inputs(), state_of(cell)
    results = [dynamic_rnn(c, x, LENGTHS, state, time_major=True) for c in (cell, reference)]
    wanted = [[x, *state, *c.parameters()] for c in (cell, reference)]
    assert_same(*results, *wanted)


@pytest.mark.parametrize("reverse", [False, True])
@each_cell
def test_whole_sequences_equal_single_steps(make: Callable[[], RNNCell], reverse: bool) -> None:
    cell = built(make())
    x, state = inputs(), state_of(cell)
    masks = pytree.tree_map(lambda s: torch.rand_like(s).round().unsqueeze(0), state)
    wanted = [x, *pytree.tree_leaves(state), *cell.parameters()]
    alive = alive_mask(LENGTHS, T).unsqueeze(-1)
    for run in (Run(None, reverse), Run(LENGTHS, reverse), Run(LENGTHS, reverse, masks)):
        y, final = cell.unroll(x, state, run)
        y = y if run.lengths is None else torch.where(alive, y, 0)
        assert_same((y, final), loop(cell, x, state, run), wanted, wanted)


# In the block cell with a clip gradients are not those of the values.
@pytest.mark.parametrize("name", [name for name in CELLS if name != "lstm_block_all"])
def test_gradients_of_one_step_are_those_of_finite_differences(name: str) -> None:
    cell = built(CELLS[name]())
    state = state_of(cell)
    leaves, spec = pytree.tree_flatten(state)

    def step(x: Tensor, *each: Tensor) -> tuple[Tensor, ...]:
        return tuple(pytree.tree_leaves(cell(x, pytree.tree_unflatten(list(each), spec))))

    assert torch.autograd.gradcheck(step, (inputs()[0].detach().requires_grad_(), *leaves), fast_mode=True)


# Normalisation and coupling -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_layer_norm_cell_stores_the_normalised_memory(dtype: torch.dtype) -> None:
    cell = rnn_cell.LayerNormBasicLSTMCell(64)
    cell.build(INPUTS, dtype)
    x = torch.randn(B, INPUTS, dtype=dtype)
    _, (c, h) = cell(x, cell.zero_state(B, dtype))
    mean, variance = c.double().mean(-1), c.double().var(-1, correction=0)
    tolerance = {"atol": 1e-9, "rtol": 1e-9} if dtype == torch.float64 else {"atol": 0.2, "rtol": 0}
    assert_close(mean, torch.zeros_like(mean), **tolerance)
    assert_close(variance, torch.ones_like(variance), **tolerance)
    assert h.dtype == dtype


def test_norm_eps_is_an_argument() -> None:
    # By default a row of nearly equal sums is still blown up to variance 1; a large epsilon leaves it flat.
    x, variances = torch.randn(B, INPUTS, dtype=torch.float64) * 1e-4, []
    for eps in (None, 1.0):
        for make in (rnn_cell.LayerNormBasicLSTMCell, rnn_cell.LayerNormLSTMCell):
            cell = make(U, layer_norm=True, norm_eps=eps)
            _, (c, _) = dynamic_rnn(cell, x[None], dtype=x.dtype, time_major=True)
            variances.append(float(c.detach().var(-1, correction=0).mean()))
    assert variances[:2] == pytest.approx([1, 1], rel=1e-6)
    assert max(variances[2:]) < 1e-3


def test_weight_norm_ignores_the_length_of_columns() -> None:
    cell = built(rnn_cell.WeightNormLSTMCell(U, num_proj=4))
    x = inputs()
    y, _ = dynamic_rnn(cell, x, dtype=x.dtype)
    with torch.no_grad():
        cell.kernel[:INPUTS] *= torch.rand(4 * U).double() + 0.5
        cell.kernel[INPUTS:] *= torch.rand(4 * U).double() + 0.5
        cell.projection_kernel *= torch.rand(4).double() + 0.5
    assert_close(dynamic_rnn(cell, x, dtype=x.dtype)[0], y)
    with torch.no_grad():
        cell.norm_1 *= 2
    assert not torch.allclose(dynamic_rnn(cell, x, dtype=x.dtype)[0], y)


def test_coupled_gates_keep_or_replace_the_whole_memory() -> None:
    x, c = torch.randn(B, INPUTS).double(), torch.randn(B, U).double()
    h = torch.zeros_like(c)
    for forget_bias in (100.0, -100.0):
        cell = built(rnn_cell.CoupledInputForgetGateLSTMCell(U, forget_bias=forget_bias))
        _, new = cell(x, (c, h))
        candidate = torch.tanh((torch.cat([x, h], 1) @ cell.W_0 + cell.B)[:, :U])
        assert_close(new.c, c if forget_bias > 0 else candidate)


def test_coupled_cell_takes_a_concatenated_state() -> None:
    cells = [
        built(rnn_cell.CoupledInputForgetGateLSTMCell(U, num_proj=4, state_is_tuple=t)) for t in (True, False)
    ]
    cells[1].load_state_dict(cells[0].state_dict())
    assert cells[1].state_size == U + 4
    x = inputs()
    (y, (c, h)), (y2, state) = (dynamic_rnn(cell, x, dtype=x.dtype) for cell in cells)
    assert_close((y2, state), (y, torch.cat([c, h], 1)))


# Recurrent dropout ----------------------------------------------------------------------------------------


def dropping(keep: float = 0.5, **options: Any) -> Any:
    return built(rnn_cell.LayerNormBasicLSTMCell(U, dropout_keep_prob=keep, **options))


def test_dropout_does_nothing_in_eval_mode() -> None:
    cell, plain = dropping(), built(rnn_cell.LayerNormBasicLSTMCell(U))
    plain.load_state_dict(cell.state_dict())
    x = inputs()
    dropped, _ = dynamic_rnn(cell, x, dtype=x.dtype)
    y, _ = dynamic_rnn(cell.eval(), x, dtype=x.dtype)
    assert not torch.allclose(dropped, y)
    assert_close(y, dynamic_rnn(plain, x, dtype=x.dtype)[0])


def test_dropout_divides_what_it_keeps_and_drops_the_rest() -> None:
    noise = torch.tensor([[0.1, 0.39, 0.4, 0.9, 0.0]]).expand(1, B, U).double()
    cell = dropping(0.6, layer_norm=False, noise={"g": noise})
    x, zero = inputs()[0], cell.zero_state(B, torch.float64)
    _, (c, _) = cell(x, zero)
    _, (whole, _) = cell.eval()(x, zero)
    # From c = 0 the memory is sigmoid(i) * g.
    assert_close(c[:, 2:4], whole[:, 2:4] / 0.6)
    assert not c[:, [0, 1, 4]].any()


def test_noise_replays_a_run_from_its_start() -> None:
    x = inputs()
    noise = torch.rand(T, B, U, dtype=x.dtype)
    cell = dropping(noise={"g": noise})
    first, _ = dynamic_rnn(cell, x, dtype=x.dtype, time_major=True)
    assert_close(dynamic_rnn(cell, x, dtype=x.dtype, time_major=True)[0], first)
    state, outputs = cell.zero_state(B, x.dtype), []
    for step in x:
        y, state = cell(step, state)
        outputs.append(y)
    assert_close(torch.stack(outputs), first)


def test_every_step_and_every_sequence_has_its_own_mask() -> None:
    cell = dropping()
    x = inputs()[:1].detach().expand(T, B, INPUTS)
    state = state_of(cell)
    steps = [cell(x[0], state)[0] for _ in range(2)]
    assert not torch.allclose(*steps)
    runs = [dynamic_rnn(cell, x, dtype=x.dtype, time_major=True)[0] for _ in range(2)]
    assert not torch.allclose(*runs)


def test_a_hidden_bias_counts_without_a_bias() -> None:
    x, kernel, bias = torch.randn(T, B, INPUTS), torch.randn(INPUTS + U, 3 * U), torch.randn(3 * U)
    arguments = Options(cell="gru"), Run(), x, kernel
    h0 = torch.randn(B, U)
    ours = run_layer(*arguments, None, h0, hidden_bias=bias)
    assert_close(ours, run_layer(*arguments, torch.zeros_like(bias), h0, hidden_bias=bias))
    assert not torch.allclose(ours[0], run_layer(*arguments, None, h0)[0])


def test_seed_and_generator_reproduce_the_masks() -> None:
    x, results = inputs(), []
    variables = dropping().state_dict()
    for seed in (5, 5, torch.Generator().manual_seed(5), 6):
        cell = dropping(dropout_prob_seed=seed)
        cell.load_state_dict(variables)
        results.append(dynamic_rnn(cell, x, dtype=x.dtype)[0])
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])
    assert not torch.allclose(results[3], results[0])


# Fused callables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_adaptor_equals_the_unrolling_functions(dynamic: bool) -> None:
    cell = built(rnn_cell.BasicLSTMCell(U))
    fused = rnn_cell.FusedRNNCellAdaptor(cell, use_dynamic_rnn=dynamic)
    x, state = inputs(), state_of(cell)
    theirs = dynamic_rnn(cell, x, LENGTHS, state, time_major=True)
    wanted = [x, *state, *cell.parameters()]
    assert_same(fused(x, state, sequence_length=LENGTHS), theirs, wanted, wanted)
    outputs, final = fused(list(x), state, sequence_length=LENGTHS)
    assert isinstance(outputs, list)
    assert_same((torch.stack(outputs), final), theirs, wanted, wanted)
    assert_close(fused(x, dtype=x.dtype), dynamic_rnn(cell, x, dtype=x.dtype, time_major=True))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])
def test_time_reversed_equals_the_backward_direction(lengths: Tensor | None) -> None:
    cell = built(rnn_cell.LSTMBlockFusedCell(U))
    fused = rnn_cell.TimeReversedFusedRNN(cell)
    x, state = inputs(), state_of(cell.cell)
    (_, out_bw), (_, state_bw) = bidirectional_dynamic_rnn(
        cell.cell, cell.cell, x, lengths, state, state, time_major=True
    )
    wanted = [x, *state, *cell.parameters()]
    assert_same(fused(x, state, sequence_length=lengths), (out_bw, state_bw), wanted, wanted)


def test_time_reversed_reverses_lists_whole() -> None:
    cell = built(rnn_cell.GRUCell(U))
    fused = rnn_cell.TimeReversedFusedRNN(rnn_cell.FusedRNNCellAdaptor(cell))
    x = inputs()
    outputs, state = fused(list(x), dtype=x.dtype, sequence_length=LENGTHS)
    theirs, final = static_rnn(cell, list(x.flip(0)), dtype=x.dtype, sequence_length=LENGTHS)
    assert_close((torch.stack(outputs), state), (torch.stack(theirs[::-1]), final))


def test_fused_cells_are_no_cells() -> None:
    x = inputs()
    for fused in (rnn_cell.LSTMBlockFusedCell(U), rnn_cell.FusedRNNCellAdaptor(rnn_cell.GRUCell(U))):
        with pytest.raises(TypeError, match="is not an RNNCell"):
            dynamic_rnn(fused, x, dtype=x.dtype)


def test_fused_cells_build_themselves_and_round_trip() -> None:
    x = inputs(torch.float32)
    for make in (
        lambda: rnn_cell.LSTMBlockFusedCell(U, use_peephole=True),
        lambda: rnn_cell.TimeReversedFusedRNN(rnn_cell.FusedRNNCellAdaptor(rnn_cell.GRUCell(U))),
    ):
        fused, other = make(), make()
        y = fused(x, dtype=x.dtype)
        other.load_state_dict(fused.state_dict())
        assert_close(other(x, dtype=x.dtype), y)
        assert_close(copy.deepcopy(fused)(x, dtype=x.dtype), y)


# Padding, dtypes, states, names ---------------------------------------------------------------------------


@each_cell
def test_padding_is_never_read(make: Callable[[], RNNCell]) -> None:
    cell = built(make())
    x, state = inputs(), state_of(cell)
    alive = alive_mask(LENGTHS, T).unsqueeze(-1)
    wanted = [x, *pytree.tree_leaves(state), *cell.parameters()]
    clean = dynamic_rnn(cell, x, LENGTHS, state, time_major=True)
    dirty = dynamic_rnn(cell, torch.where(alive, x, torch.nan), LENGTHS, state, time_major=True)
    assert_same(dirty, clean, wanted, wanted)


@pytest.mark.parametrize(
    "make",
    [
        lambda: rnn_cell.LSTMBlockFusedCell(U, cell_clip=0.4, use_peephole=True),
        lambda: rnn_cell.TimeReversedFusedRNN(rnn_cell.LSTMBlockFusedCell(U)),
    ],
    ids=["fused", "reversed"],
)
def test_padding_is_never_read_by_fused_cells(make: Any) -> None:
    fused = built(make())
    x = inputs()
    alive = alive_mask(LENGTHS, T).unsqueeze(-1)
    wanted = [x, *fused.parameters()]
    clean, dirty = (
        fused(v, dtype=x.dtype, sequence_length=LENGTHS) for v in (x, torch.where(alive, x, torch.nan))
    )
    assert_same(dirty, clean, wanted, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_cell
def test_half_precision_runs_and_trains(make: Callable[[], RNNCell], dtype: torch.dtype) -> None:
    cell = make()
    x = inputs(dtype)
    y, state = dynamic_rnn(cell, x, LENGTHS, dtype=dtype, time_major=True)
    assert all(v.dtype == dtype and v.isfinite().all() for v in pytree.tree_leaves((y, state)))
    with stepwise():
        slow, _ = dynamic_rnn(cell, x, LENGTHS, dtype=dtype, time_major=True)
    # The steps round between products; only the scale is compared.
    assert_close(y, slow, rtol=0.1, atol=0.3)
    for gradient in gradients((y, state), [x, *cell.parameters()]):
        assert gradient is None or (gradient.dtype == dtype and gradient.isfinite().all())


@each_cell
def test_state_dict_round_trips_also_into_a_cell_that_is_not_built(make: Callable[[], RNNCell]) -> None:
    cell, other = built(make(), torch.float32), make()
    other.load_state_dict(cell.state_dict())
    x = inputs(torch.float32)
    assert_close(dynamic_rnn(other, x, dtype=x.dtype), dynamic_rnn(cell, x, dtype=x.dtype))


NORMS = {f"{s}/{v}" for s in ("transform", "forget", "output", "state") for v in ("gamma", "beta")}
GRU = {"gates/kernel", "gates/bias", "candidate/kernel", "candidate/bias"}
LSTM_NORMS = NORMS | {"input/gamma", "input/beta"}
PEEPHOLES = {"w_i_diag", "w_f_diag", "w_o_diag"}


@pytest.mark.parametrize(
    ("make", "scope", "names"),
    [
        (CELLS["lnbasic"], "layer_norm_basic_lstm_cell", {"kernel"} | LSTM_NORMS),
        (CELLS["lnbasic_without_norm"], "layer_norm_basic_lstm_cell", {"kernel", "bias"}),
        (
            CELLS["ln_without_norm"],
            "layer_norm_lstm_cell",
            {"kernel", "bias", "projection/kernel"} | PEEPHOLES,
        ),
        (CELLS["ln"], "layer_norm_lstm_cell", {"kernel", "bias"} | LSTM_NORMS),
        (CELLS["wn"], "wn_lstm_cell/wn_lstm_cell", {"kernel", "bias", "norm_0", "norm_1"}),
        (
            CELLS["wn_all"],
            "wn_lstm_cell/wn_lstm_cell",
            {"kernel", "bias", "norm_0", "norm_1", "projection/kernel", "projection/norm_0"} | PEEPHOLES,
        ),
        (CELLS["coupled"], "coupled_input_forget_gate_lstm_cell", {"W_0", "B"}),
        (
            CELLS["coupled_all"],
            "coupled_input_forget_gate_lstm_cell",
            {"W_0", "B", "W_F_diag", "W_O_diag", "W_P_0"} | NORMS,
        ),
        (CELLS["lstm_block_all"], "lstm_cell", {"kernel", "bias"} | PEEPHOLES),
        (CELLS["gru_block"], "gru_cell", {"w_ru", "b_ru", "w_c", "b_c"}),
        (CELLS["gru_block_v2"], "gru_cell", GRU),
        (CELLS["cudnn_lstm"], "cudnn_compatible_lstm_cell", {"kernel", "bias"}),
        (
            CELLS["cudnn_gru"],
            "cudnn_compatible_gru_cell",
            {"gates/kernel", "gates/bias"}
            | {f"candidate/{p}_projection/{v}" for p in ("input", "hidden") for v in ("kernel", "bias")},
        ),
        (lambda: rnn_cell.LSTMBlockFusedCell(U), "lstm_fused_cell", {"kernel", "bias"}),
        (
            lambda: rnn_cell.TimeReversedFusedRNN(rnn_cell.FusedRNNCellAdaptor(rnn_cell.BasicRNNCell(U))),
            "basic_rnn_cell",
            {"kernel", "bias"},
        ),
    ],
)  # fmt: skip
def test_variables_have_the_names_of_tensorflow(make: Any, scope: str, names: set[str]) -> None:
    cell = built(make())
    assert sorted(name for name, _, _ in cell.tf_names()) == sorted(f"{scope}/{name}" for name in names)
    assert {id(getattr(owner, a)) for _, owner, a in cell.tf_names()} == set(map(id, cell.parameters()))


def test_variables_start_as_in_tensorflow() -> None:
    basic = rnn_cell.LayerNormBasicLSTMCell(U, norm_gain=0.5, norm_shift=0.25)
    bare = rnn_cell.LayerNormBasicLSTMCell(U, layer_norm=False)
    cudnn, block = rnn_cell.CudnnCompatibleGRUCell(U), rnn_cell.GRUBlockCell(U)
    weight = rnn_cell.WeightNormLSTMCell(U, initializer=nn.init.ones_)
    for cell in (basic, bare, cudnn, block, weight):
        cell.build(INPUTS)
    assert basic.bias is None
    for scope in ("input", "transform", "forget", "output", "state"):
        assert (getattr(basic, f"{scope}_gamma") == 0.5).all()
        assert (getattr(basic, f"{scope}_beta") == 0.25).all()
    assert bare.bias.any()
    assert (cudnn.gates_bias == 1).all()
    assert not cudnn.candidate_input_projection_bias.any()
    assert (block.gates_bias == 1).all()
    assert not block.candidate_bias.any()
    assert (weight.kernel == 1).all()
    assert (weight.norm_0 == 1).all()
    assert not weight.bias.any()


# What explain says, and errors ----------------------------------------------------------------------------


@each_cell
def test_explain_says_whether_the_loop_runs(
    make: Callable[[], RNNCell], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = built(make())
    says = explain(cell)
    looped: list[RNNCell] = []
    monkeypatch.setattr(base, "loop", lambda cell, *args: looped.append(cell) or loop(cell, *args))
    x = inputs()
    dynamic_rnn(cell, x, dtype=x.dtype, time_major=True)
    assert looped == ([cell] if "generic loop" in says else [])
    assert ("one op over the sequence" in says) == (not looped)


def test_explain_follows_the_mode() -> None:
    cell = dropping()
    assert "dropout" in explain(cell)
    assert explain(cell.eval()).endswith("one op over the sequence, lstm, layer-normalised")
    clipped = rnn_cell.LSTMBlockCell(U, cell_clip=1.0)
    assert "generic loop" in explain(clipped)
    with torch.no_grad():
        assert "one op over the sequence" in explain(clipped)
    assert "no kernel has the activation softsign" in explain(
        rnn_cell.WeightNormLSTMCell(U, activation="softsign")
    )
    coupled = rnn_cell.CoupledInputForgetGateLSTMCell
    assert explain(coupled(U, True)).endswith("one op over the sequence, coupled lstm with peepholes")
    assert explain(coupled(U, layer_norm=True)).endswith("step by step; no kernel normalises coupled gates")
    assert "normalised once" in explain(rnn_cell.WeightNormLSTMCell(U))


@pytest.mark.parametrize("class_name", ["LayerNormBasicLSTMCell", "LayerNormLSTMCell", "WeightNormLSTMCell"])
def test_activations_without_a_kernel_run(class_name: str) -> None:
    cell = built(getattr(rnn_cell, class_name)(U, activation="softsign"))
    x = inputs()
    with stepwise():
        slow = dynamic_rnn(cell, x, LENGTHS, dtype=x.dtype, time_major=True)
    assert_close(dynamic_rnn(cell, x, LENGTHS, dtype=x.dtype, time_major=True), slow)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5])
def test_dropout_keep_prob_must_be_a_probability(keep: float) -> None:
    with pytest.raises(ValueError, match=r"dropout_keep_prob must be in \(0, 1\]"):
        rnn_cell.LayerNormBasicLSTMCell(U, dropout_keep_prob=keep)


def test_noise_must_fit() -> None:
    with pytest.raises(ValueError, match="noise must have the one key 'g'"):
        rnn_cell.LayerNormBasicLSTMCell(U, noise={"h": torch.rand(T, B, U)})
    x = inputs()
    for shape in ((T - 1, B, U), (T, B, U + 1)):
        cell = dropping(noise={"g": torch.rand(shape)})
        with pytest.raises(ValueError, match=r"noise\['g'\] must be \[T, 4, 5\]"):
            dynamic_rnn(cell, x, dtype=x.dtype, time_major=True)


@pytest.mark.parametrize("make", [rnn_cell.GRUBlockCell, rnn_cell.GRUBlockCellV2])
def test_gru_block_cells_take_one_of_num_units_and_cell_size(make: Any) -> None:
    for arguments in ({}, {"num_units": U, "cell_size": U}):
        with pytest.raises(ValueError, match=r"Exactly one of num_units or cell_size must be provided\."):
            make(**arguments)


@pytest.mark.parametrize(
    "class_name", ["LayerNormLSTMCell", "WeightNormLSTMCell", "CoupledInputForgetGateLSTMCell"]
)
def test_arguments_of_lstm_variations_are_checked(class_name: str) -> None:
    make = getattr(rnn_cell, class_name)
    with pytest.raises(ValueError, match="num_proj must be None or at least 1, got 0"):
        make(U, num_proj=0)
    with pytest.raises(ValueError, match="Unknown activation function:nosuch"):
        make(U, activation="nosuch")
    cell = built(make(U))
    with pytest.raises(ValueError, match="expected ndim=2, found ndim=3"):
        cell(inputs(), state_of(cell))
    with pytest.raises(ValueError, match="Expected state to be a tuple of length 2"):
        cell(inputs()[0], torch.zeros(B, U))


def test_input_size_is_ignored_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="input_size"):
        rnn_cell.LayerNormBasicLSTMCell(U, input_size=3)


def test_errors_of_fused_cells() -> None:
    fused, x = built(rnn_cell.LSTMBlockFusedCell(U)), inputs()
    with pytest.raises(ValueError, match="Either initial_state or dtype needs to be specified"):
        fused(x)
    with pytest.raises(ValueError, match="Expecting initial_state to be a tuple with length 2 or None"):
        fused(x, (torch.zeros(B, U),))
    with pytest.raises(TypeError, match="is not an RNNCell"):
        rnn_cell.FusedRNNCellAdaptor(fused)
    with pytest.raises(TypeError, match="cell must be callable, got int"):
        rnn_cell.TimeReversedFusedRNN(3)
    with pytest.raises(ValueError, match=r"sequence_length must be in 0\.\.T with T=6, got 1\.\.7"):
        rnn_cell.TimeReversedFusedRNN(fused)(x, dtype=x.dtype, sequence_length=[1, 7, 2, 3])
    with pytest.raises(ValueError, match="If there is no initial_state, you must give a dtype"):
        rnn_cell.FusedRNNCellAdaptor(rnn_cell.GRUCell(U))(x)
    with pytest.raises(NotImplementedError, match="must define run"):
        rnn_cell.FusedRNNCell()(x)
