"""TensorFlow's variables by their names: in, out, and what is refused.

One file, as all sections make their checkpoints alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import leaves
from every_cell import CELLS, sequence
from every_cell import run as run_cell
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune

import torchrnn
from torchrnn import rnn_cell
from torchrnn.interop import load_tf_variables, tf_gradients, tf_variables
from torchrnn.rnn_cell import BasicLSTMCell, BasicRNNCell, GRUCell, LSTMCell, MultiRNNCell, RNNCell

F64 = torch.float64
N, U = 3, 4


def arrays(shapes: dict[str, tuple[int, ...]], scope: str = "") -> dict[str, Any]:
    return {scope + name: np.random.randn(*shape) for name, shape in shapes.items()}


def lstm_arrays(scope: str = "lstm_cell/", inputs: int = N) -> dict[str, Any]:
    return arrays({"kernel": (inputs + U, 4 * U), "bias": (4 * U,)}, scope)


def peephole_cell() -> LSTMCell:
    return LSTMCell(U, use_peepholes=True, num_proj=2, cell_clip=1.0, proj_clip=0.5)


MAKE = {
    "BasicRNNCell": lambda: BasicRNNCell(U),
    "BasicLSTMCell": lambda: BasicLSTMCell(U),
    "LSTMCell with peepholes and projection": peephole_cell,
    "GRUCell": lambda: GRUCell(U),
    "MultiRNNCell": lambda: MultiRNNCell([BasicLSTMCell(U), peephole_cell(), GRUCell(5)]),
}
NAMES = {
    "BasicRNNCell": ["basic_rnn_cell/kernel", "basic_rnn_cell/bias"],
    "BasicLSTMCell": ["basic_lstm_cell/kernel", "basic_lstm_cell/bias"],
    "LSTMCell with peepholes and projection": [
        "lstm_cell/kernel",
        "lstm_cell/bias",
        "lstm_cell/w_i_diag",
        "lstm_cell/w_f_diag",
        "lstm_cell/w_o_diag",
        "lstm_cell/projection/kernel",
    ],
    "GRUCell": [
        "gru_cell/gates/kernel",
        "gru_cell/gates/bias",
        "gru_cell/candidate/kernel",
        "gru_cell/candidate/bias",
    ],
    "MultiRNNCell": [
        "multi_rnn_cell/cell_0/basic_lstm_cell/kernel",
        "multi_rnn_cell/cell_0/basic_lstm_cell/bias",
        "multi_rnn_cell/cell_1/lstm_cell/kernel",
        "multi_rnn_cell/cell_1/lstm_cell/bias",
        "multi_rnn_cell/cell_1/lstm_cell/w_i_diag",
        "multi_rnn_cell/cell_1/lstm_cell/w_f_diag",
        "multi_rnn_cell/cell_1/lstm_cell/w_o_diag",
        "multi_rnn_cell/cell_1/lstm_cell/projection/kernel",
        "multi_rnn_cell/cell_2/gru_cell/gates/kernel",
        "multi_rnn_cell/cell_2/gru_cell/gates/bias",
        "multi_rnn_cell/cell_2/gru_cell/candidate/kernel",
        "multi_rnn_cell/cell_2/gru_cell/candidate/bias",
    ],
}
SCOPES = ["", "rnn/", "model/rnn/", "bidirectional_rnn/fw/"]


def built(name: str) -> Any:
    """Returns a cell whose variables, biases too, are random."""
    cell = MAKE[name]()
    cell.build(N, F64)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.normal_()
    return cell


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert list(ours) == list(theirs)
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def run(cell: Any, x: Tensor) -> list[Tensor]:
    return leaves(torchrnn.dynamic_rnn(cell, x, dtype=x.dtype))


# One cell -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_names_are_tensorflows(name: str) -> None:
    assert list(tf_variables(built(name))) == NAMES[name]
    assert list(tf_variables(built(name), "rnn")) == [f"rnn/{each}" for each in NAMES[name]]
    assert list(tf_variables(built(name), "a/rnn/")) == [f"a/rnn/{each}" for each in NAMES[name]]


@pytest.mark.parametrize("suffix", ["", ":0"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("is_built", [True, False])
@pytest.mark.parametrize("name", MAKE)
def test_variables_go_round(name: str, is_built: bool, scope: str, suffix: str) -> None:
    source = built(name)
    target = built(name) if is_built else MAKE[name]()
    given = {f"{scope}{key}{suffix}": value for key, value in tf_variables(source).items()}
    load_tf_variables(target, dict(reversed(given.items())))
    assert_same(tf_variables(target), tf_variables(source))
    x = torch.randn(2, 5, N, dtype=F64)
    assert all(map(torch.equal, run(target, x), run(source, x)))


@pytest.mark.parametrize("name", CELLS)
def test_variables_of_every_cell_go_round(name: str) -> None:
    torch.set_default_dtype(F64)
    source, targets, x = CELLS[name](U), [CELLS[name](U), CELLS[name](U)], sequence(name)
    expected = run_cell(source, x)
    run_cell(targets[1], x)
    for target in targets:
        load_tf_variables(target, tf_variables(source, "model/rnn"))
        assert all(map(torch.equal, leaves(run_cell(target, x)), leaves(expected)))


@pytest.mark.parametrize("name", MAKE)
def test_names_of_1_0_are_those_with_weights_and_biases(name: str) -> None:
    source, target = built(name), MAKE[name]()
    old = {
        "rnn/" + key.replace("kernel", "weights").replace("bias", "biases"): value
        for key, value in tf_variables(source).items()
    }
    load_tf_variables(target, old)
    assert_same(tf_variables(target), tf_variables(source))


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("BasicRNNCell", ["RNN/BasicRNNCell/Linear/Matrix", "RNN/BasicRNNCell/Linear/Bias"]),
        ("BasicLSTMCell", ["RNN/BasicLSTMCell/Linear/Matrix", "RNN/BasicLSTMCell/Linear/Bias"]),
        (
            "LSTMCell with peepholes and projection",
            [f"RNN/LSTMCell/{end}" for end in ("W_0", "B", "W_I_diag", "W_F_diag", "W_O_diag", "W_P_0")],
        ),
        (
            "GRUCell",
            [f"RNN/GRUCell/{g}/Linear/{end}" for g in ("Gates", "Candidate") for end in ("Matrix", "Bias")],
        ),
        (
            "MultiRNNCell",
            [
                *(f"RNN/MultiRNNCell/Cell0/BasicLSTMCell/Linear/{end}" for end in ("Matrix", "Bias")),
                *(
                    f"RNN/MultiRNNCell/Cell1/LSTMCell/{end}"
                    for end in ("W_0", "B", "W_I_diag", "W_F_diag", "W_O_diag", "W_P_0")
                ),
                *(
                    f"RNN/MultiRNNCell/Cell2/GRUCell/{gate}/Linear/{end}"
                    for gate in ("Gates", "Candidate")
                    for end in ("Matrix", "Bias")
                ),
            ],
        ),
    ],
)
def test_names_of_0_x_are_known(name: str, old: list[str]) -> None:
    source, target = built(name), MAKE[name]()
    load_tf_variables(target, dict(zip(old, tf_variables(source).values(), strict=True)))
    assert_same(tf_variables(target), tf_variables(source))


GATES = ("gates/kernel", "gates/bias", "candidate/kernel", "candidate/bias")
BLOCK_GATES = ("w_ru", "b_ru", "w_c", "b_c")
PEEPHOLES = ("w_i_diag", "w_f_diag", "w_o_diag")
NORMS = [
    f"{norm}/{name}"
    for norm in ("input", "transform", "forget", "output", "state")
    for name in ("gamma", "beta")
]


def below(old: str, new: str, *names: str | tuple[str, str]) -> dict[str, str]:
    """Returns old names -> those of today, below their scopes; two names where they are not the same."""
    pairs = [(name, name) if isinstance(name, str) else name for name in names]
    return {f"{old}/{was}": f"{new}/{now}" for was, now in pairs}


def old_gru(scope: str, linear: str = "Linear/") -> dict[str, str]:
    matrix, bias = ("Matrix", "Bias") if linear else ("weights", "biases")
    gates = ("Gates", "Candidate") if linear else ("gates", "candidate")
    pairs = [
        (f"{gate}/{linear}{was}", f"{gate.lower()}/{now}")
        for gate in gates
        for was, now in ((matrix, "kernel"), (bias, "bias"))
    ]
    return below("GRUCell" if linear else "gru_cell", f"{scope}gru_cell", *pairs)


LINEAR = (("Linear/Matrix", "kernel"), ("Linear/Bias", "bias"))
WEIGHTS = (("weights", "kernel"), ("biases", "bias"))
# As variables of these versions were called: in their sources, and in the list of names that TensorFlow's
# contrib/rnn/python/tools/checkpoint_convert.py converts.
FORMER: dict[str, tuple[Any, dict[str, str]]] = {
    "NASCell, 1.1": (
        lambda: rnn_cell.NASCell(U, 2, use_bias=True),
        below(
            "nas_rnn",
            "nas_cell",
            ("weights", "kernel"),
            ("recurrent_weights", "recurrent_kernel"),
            "bias",
            "projection_weights",
        ),
    ),
    "NASCell, converted": (
        lambda: rnn_cell.NASCell(U),
        below("nas_rnn", "nas_cell", "kernel", "recurrent_kernel"),
    ),
    "LSTMBlockFusedCell, 0.12": (
        lambda: rnn_cell.LSTMBlockFusedCell(U, use_peephole=True),
        below(
            "LSTMBlockFusedCell",
            "lstm_fused_cell",
            ("W_0", "kernel"),
            ("B", "bias"),
            *(
                (name.replace("w_", "W_").replace("_i", "_I").replace("_f", "_F").replace("_o", "_O"), name)
                for name in PEEPHOLES
            ),
        ),
    ),
    "LSTMBlockFusedCell, 1.0": (
        lambda: rnn_cell.LSTMBlockFusedCell(U, use_peephole=True),
        below("lstm_block_wrapper", "lstm_fused_cell", *WEIGHTS, *PEEPHOLES),
    ),
    "LSTMBlockFusedCell, 1.2": (
        lambda: rnn_cell.LSTMBlockFusedCell(U),
        below("lstm_block_wrapper", "lstm_fused_cell", "kernel", "bias"),
    ),
    "LSTMBlockCell, 0.12": (
        lambda: rnn_cell.LSTMBlockCell(U, use_peephole=True),
        below(
            "LSTMBlockCell",
            "lstm_cell",
            ("W", "kernel"),
            ("b", "bias"),
            ("wci", "w_i_diag"),
            ("wcf", "w_f_diag"),
            ("wco", "w_o_diag"),
        ),
    ),
    "LSTMBlockCell, 0.12, compatible": (
        lambda: rnn_cell.LSTMBlockCell(U),
        below("LSTMCell", "lstm_cell", ("W_0", "kernel"), ("B", "bias")),
    ),
    "LSTMBlockCell, 1.0": (lambda: rnn_cell.LSTMBlockCell(U), below("lstm_cell", "lstm_cell", *WEIGHTS)),
    "CudnnCompatibleLSTMCell, of CudnnLSTM": (
        lambda: rnn_cell.CudnnCompatibleLSTMCell(U),
        below(
            "cudnn_lstm/rnn/multi_rnn_cell/cell_0/cudnn_compatible_lstm_cell",
            "cudnn_compatible_lstm_cell",
            "kernel",
            "bias",
        ),
    ),
    "GRUBlockCell, to 1.7": (
        lambda: rnn_cell.GRUBlockCell(U),
        below("GRUBlockCell", "gru_cell", *BLOCK_GATES),
    ),
    "GRUBlockCellV2, 1.4": (
        lambda: rnn_cell.GRUBlockCellV2(U),
        below("GRUBlockCellV2", "gru_cell", *GATES),
    ),
    "GRUBlockCellV2 from GRUBlockCell": (
        lambda: rnn_cell.GRUBlockCellV2(U),
        below("gru_cell", "gru_cell", *zip(BLOCK_GATES, GATES, strict=True)),
    ),
    "GRUCell from GRUBlockCell, 1.0": (
        lambda: GRUCell(U),
        below("GRUBlockCell", "gru_cell", *zip(BLOCK_GATES, GATES, strict=True)),
    ),
    "GRUBlockCell from GRUCell": (
        lambda: rnn_cell.GRUBlockCell(U),
        below("gru_cell", "gru_cell", *zip(GATES, BLOCK_GATES, strict=True)),
    ),
    "LayerNormBasicLSTMCell, 0.12": (
        lambda: rnn_cell.LayerNormBasicLSTMCell(U),
        below("LayerNormBasicLSTMCell", "layer_norm_basic_lstm_cell", ("linear/weights", "kernel"), *NORMS),
    ),
    "LayerNormBasicLSTMCell, 0.12, not normalised": (
        lambda: rnn_cell.LayerNormBasicLSTMCell(U, layer_norm=False),
        below(
            "LayerNormBasicLSTMCell",
            "layer_norm_basic_lstm_cell",
            ("linear/weights", "kernel"),
            ("linear/b", "bias"),
        ),
    ),
    "LayerNormBasicLSTMCell, 1.0": (
        lambda: rnn_cell.LayerNormBasicLSTMCell(U, layer_norm=False),
        below("layer_norm_basic_lstm_cell", "layer_norm_basic_lstm_cell", *WEIGHTS),
    ),
    "UGRNNCell, 1.1": (lambda: rnn_cell.UGRNNCell(U), below("ugrnn_cell", "ugrnn_cell", *WEIGHTS)),
    "IntersectionRNNCell, 1.1": (
        lambda: rnn_cell.IntersectionRNNCell(U, U),
        below(
            "intersection_rnn_cell",
            "intersection_rnn_cell",
            *WEIGHTS,
            ("in_projection/weights", "in_projection/kernel"),
            ("in_projection/biases", "in_projection/bias"),
        ),
    ),
    "CoupledInputForgetGateLSTMCell, 0.12": (
        lambda: rnn_cell.CoupledInputForgetGateLSTMCell(U, True, num_proj=2),
        below(
            "CoupledInputForgetGateLSTMCell",
            "coupled_input_forget_gate_lstm_cell",
            "W_0",
            "B",
            "W_F_diag",
            "W_O_diag",
            "W_P_0",
        ),
    ),
    "TimeFreqLSTMCell, 0.12": (
        lambda: rnn_cell.TimeFreqLSTMCell(U, feature_size=2),
        below("TimeFreqLSTMCell", "time_freq_lstm_cell", "W_0", "B"),
    ),
    "GridLSTMCell, 0.12": (
        lambda: rnn_cell.GridLSTMCell(U, feature_size=1, frequency_skip=1, num_frequency_blocks=[3]),
        below("GridLSTMCell", "grid_lstm_cell", "W_f_0_0", "B_f_0", "W_t_0_0", "B_t_0"),
    ),
    "AttentionCellWrapper, 0.12": (
        lambda: rnn_cell.AttentionCellWrapper(BasicRNNCell(U), 2),
        below(
            "AttentionCellWrapper",
            "attention_cell_wrapper",
            *LINEAR,
            ("Attention/AttnW", "attention/attn_w"),
            ("Attention/AttnV", "attention/attn_v"),
            ("Attention/Linear/Matrix", "attention/kernel"),
            ("Attention/Linear/Bias", "attention/bias"),
            ("AttnOutputProjection/Linear/Matrix", "attn_output_projection/kernel"),
            ("AttnOutputProjection/Linear/Bias", "attn_output_projection/bias"),
            ("BasicRNNCell/Linear/Matrix", "basic_rnn_cell/kernel"),
            ("BasicRNNCell/Linear/Bias", "basic_rnn_cell/bias"),
        ),
    ),
    "AttentionCellWrapper, 1.0": (
        lambda: rnn_cell.AttentionCellWrapper(BasicRNNCell(U), 2),
        below(
            "attention_cell_wrapper",
            "attention_cell_wrapper",
            *WEIGHTS,
            "attention/attn_w",
            "attention/attn_v",
            ("attention/weights", "attention/kernel"),
            ("attention/biases", "attention/bias"),
            ("attn_output_projection/weights", "attn_output_projection/kernel"),
            ("attn_output_projection/biases", "attn_output_projection/bias"),
            ("basic_rnn_cell/weights", "basic_rnn_cell/kernel"),
            ("basic_rnn_cell/biases", "basic_rnn_cell/bias"),
        ),
    ),
    # The cell inside stood beside these wrappers.
    "InputProjectionWrapper, 0.12": (
        lambda: rnn_cell.InputProjectionWrapper(GRUCell(U), 2),
        below("InputProjectionWrapper", "input_projection_wrapper", *LINEAR)
        | old_gru("input_projection_wrapper/"),
    ),
    "InputProjectionWrapper, 1.0": (
        lambda: rnn_cell.InputProjectionWrapper(GRUCell(U), 2),
        below("input_projection_wrapper", "input_projection_wrapper", *WEIGHTS)
        | old_gru("input_projection_wrapper/", ""),
    ),
    "OutputProjectionWrapper, 0.12": (
        lambda: rnn_cell.OutputProjectionWrapper(GRUCell(U), 2),
        below("OutputProjectionWrapper", "output_projection_wrapper", *LINEAR)
        | old_gru("output_projection_wrapper/"),
    ),
    "EmbeddingWrapper, 0.12": (
        lambda: rnn_cell.EmbeddingWrapper(GRUCell(U), 5, 2),
        below("EmbeddingWrapper", "embedding_wrapper", "embedding") | old_gru("embedding_wrapper/"),
    ),
    "EmbeddingWrapper, 1.0": (
        lambda: rnn_cell.EmbeddingWrapper(GRUCell(U), 5, 2),
        below("embedding_wrapper", "embedding_wrapper", "embedding") | old_gru("embedding_wrapper/", ""),
    ),
    "wrappers in a stack, 1.0": (
        lambda: MultiRNNCell(
            [rnn_cell.OutputProjectionWrapper(rnn_cell.InputProjectionWrapper(BasicLSTMCell(U), 2), 2)]
        ),
        {
            f"multi_rnn_cell/cell_0/{was}/{old}": f"multi_rnn_cell/cell_0/{now}/{new}"
            for was, now in (
                ("output_projection_wrapper", "output_projection_wrapper"),
                ("input_projection_wrapper", "output_projection_wrapper/input_projection_wrapper"),
                ("basic_lstm_cell", "output_projection_wrapper/input_projection_wrapper/basic_lstm_cell"),
            )
            for old, new in WEIGHTS
        },
    ),
}


@pytest.mark.parametrize("scope", ["", "rnn/", "model/RNN/"])
@pytest.mark.parametrize("is_built", [False, True])
@pytest.mark.parametrize("name", FORMER)
def test_former_names_are_known(name: str, is_built: bool, scope: str) -> None:
    make, names = FORMER[name]
    source, target = make(), make()
    source.build(N, F64)
    if is_built:
        target.build(N, F64)
    today = tf_variables(source)
    assert sorted(today) == sorted(names.values())
    load_tf_variables(target, {f"{scope}{old}:0": today[new] for old, new in names.items()})
    assert_same(tf_variables(target), today)


@pytest.mark.parametrize(
    "names",
    [["rnn/lstm_cell/weights/part_{}"], ["RNN/LSTMCell/W_{}:0"], ["LSTMCell/W_{}", "LSTMCell/W_P_{}"]],
    ids=str,
)
def test_shards_of_a_matrix_are_put_together(names: list[str]) -> None:
    def make() -> LSTMCell:
        return LSTMCell(U, num_proj=2 if len(names) > 1 else None)

    source, target = make(), make()
    source.build(N, F64)
    given = tf_variables(source, names[0].rpartition("LSTMCell")[0] + "" if "LSTM" in names[0] else "rnn")
    kernels = [name for name in given if name.endswith("kernel")]
    for kernel, shard in zip(kernels, names, strict=True):
        for i, rows in enumerate(np.array_split(given.pop(kernel), 3)):
            given[shard.format(i)] = rows
    load_tf_variables(target, given)
    assert_same(tf_variables(target), tf_variables(source))
    del given[names[0].format(1)]
    with pytest.raises(ValueError, match=r"not of this cell: .*[W_t]_[02]"):
        load_tf_variables(make(), given)


def test_shards_of_unequal_columns_are_refused() -> None:
    given = {"LSTMCell/W_0": np.zeros((3, 16)), "LSTMCell/W_1": np.zeros((4, 15)), "LSTMCell/B": np.zeros(16)}
    with pytest.raises(
        ValueError, match=r"W_0: shards must have one number of columns, got \[3, 16\], \[4, 15"
    ):
        load_tf_variables(LSTMCell(U), given)


def test_variables_of_a_users_own_cell_are_no_shards() -> None:
    class Own(RNNCell):
        scope = "own"

        def __init__(self) -> None:
            super().__init__()
            for i in range(2):
                self.add_variable(f"W_{i}")

        def variable_shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
            return {"W_0": (2, 3), "W_1": (2, 3)}

    cell, given = Own(), arrays({"W_0": (2, 3), "W_1": (2, 3)}, "own/")
    load_tf_variables(cell, given)
    assert_same(tf_variables(cell), given)


def test_name_of_the_cell_is_its_scope() -> None:
    cell = LSTMCell(U, name="encoder")
    load_tf_variables(cell, lstm_arrays("rnn/encoder/"))
    assert list(tf_variables(cell)) == ["encoder/kernel", "encoder/bias"]


def test_cell_that_is_there_twice_has_its_variables_once() -> None:
    cell = LSTMCell(U)
    with pytest.warns(UserWarning, match="will share weights"):
        stack = MultiRNNCell([cell, cell])
    given = lstm_arrays("multi_rnn_cell/cell_0/lstm_cell/", inputs=U)
    load_tf_variables(stack, given)
    assert_same(tf_variables(stack), given)
    fw_and_bw = lstm_arrays("fw/lstm_cell/")
    cell = LSTMCell(U)
    load_tf_variables((cell, cell), fw_and_bw)
    assert_same(tf_variables((cell, cell)), fw_and_bw)


def test_built_cell_keeps_its_dtype_and_its_parameters() -> None:
    cell = LSTMCell(U)
    cell.build(N, torch.float32)
    before = list(cell.parameters())
    given = lstm_arrays()
    load_tf_variables(cell, given)
    assert all(new is old for new, old in zip(cell.parameters(), before, strict=True))
    assert cell.kernel.dtype == torch.float32
    np.testing.assert_array_equal(cell.kernel.detach(), given["lstm_cell/kernel"].astype(np.float32))


def test_unbuilt_cell_takes_the_dtype_of_the_arrays_or_its_own() -> None:
    cell, single = LSTMCell(U), LSTMCell(U, dtype=torch.float32)
    optimizer = torch.optim.SGD(cell.parameters(), 0.1)
    load_tf_variables(cell, lstm_arrays())
    load_tf_variables(single, lstm_arrays())
    assert cell.kernel.dtype == F64
    assert single.kernel.dtype == torch.float32
    assert optimizer.param_groups[0]["params"][0] is cell.kernel


def test_tensors_and_read_only_arrays_are_taken() -> None:
    given = lstm_arrays()
    for array in given.values():
        array.flags.writeable = False
    one, other = LSTMCell(U), LSTMCell(U)
    load_tf_variables(one, given)
    load_tf_variables(other, {name: torch.tensor(array) for name, array in given.items()})
    assert_same(tf_variables(one), given)
    assert_same(tf_variables(other), given)


def test_arrays_are_copies() -> None:
    cell, given = LSTMCell(U), lstm_arrays()
    load_tf_variables(cell, given)
    out = tf_variables(cell)
    given["lstm_cell/kernel"][:] = 0
    with torch.no_grad():
        cell.bias.zero_()
    assert out["lstm_cell/kernel"].any()
    assert out["lstm_cell/bias"].any()
    assert cell.kernel.detach().numpy().any()


def test_bfloat16_comes_out_as_float32() -> None:
    cell = LSTMCell(U, dtype=torch.bfloat16)
    load_tf_variables(cell, lstm_arrays())
    assert tf_variables(cell)["lstm_cell/kernel"].dtype == np.float32


def test_gradients_have_the_names_of_the_variables() -> None:
    cell = built("LSTMCell with peepholes and projection")
    assert tf_gradients(cell) == {}
    sum(each.sum() for each in run(cell, torch.randn(2, 5, N, dtype=F64))).backward()
    gradients = tf_gradients(cell, "rnn")
    assert list(gradients) == list(tf_variables(cell, "rnn"))
    assert_same(
        {name: gradients[f"rnn/{name}"] for name in ("lstm_cell/kernel",)},
        {"lstm_cell/kernel": cell.kernel.grad.numpy()},
    )


def test_variable_without_gradient_is_left_out() -> None:
    cell = built("GRUCell")
    cell.gates_bias.requires_grad_(False)
    run(cell, torch.randn(2, 5, N, dtype=F64))[0].sum().backward()
    assert list(tf_gradients(cell)) == [each for each in NAMES["GRUCell"] if each != "gru_cell/gates/bias"]


@pytest.mark.parametrize("inputs", [N, U])
def test_unbuilt_cell_with_variables_that_depend_on_the_input_has_those_given(inputs: int) -> None:
    def make() -> Any:
        return torchrnn.contrib.rnn.IntersectionRNNCell(U, num_in_proj=U)

    source, target = make(), make()
    source.build(inputs, F64)
    given = tf_variables(source, "rnn")
    assert len(given) == (2 if inputs == U else 4)
    load_tf_variables(target, given)
    assert_same(tf_variables(target, "rnn"), given)
    x = torch.randn(2, 5, inputs, dtype=F64)
    assert all(map(torch.equal, run(target, x), run(source, x)))
    with pytest.raises(ValueError, match="missing: intersection_rnn_cell/kernel"):
        load_tf_variables(make(), {"intersection_rnn_cell/bias": np.zeros(4 * U)})


def test_fused_cell_is_loaded_as_a_cell() -> None:
    cell = torchrnn.contrib.rnn.LSTMBlockFusedCell(U)
    given = lstm_arrays("lstm_fused_cell/")
    load_tf_variables(cell, given)
    assert_same(tf_variables(cell), given)


# Two directions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["", "bidirectional_rnn/", "model/bidirectional_rnn/", "BiRNN/"])
@pytest.mark.parametrize("name", MAKE)
def test_pair_stands_below_fw_and_bw(name: str, scope: str) -> None:
    source, target = (built(name), built(name)), (MAKE[name](), MAKE[name]())
    assert list(tf_variables(source)) == [f"{d}/{each}" for d in ("fw", "bw") for each in NAMES[name]]
    load_tf_variables(target, tf_variables(source, scope))
    assert_same(tf_variables(target), tf_variables(source))


def test_one_direction_of_a_pair_is_loaded_from_its_own_variables() -> None:
    pair = built("GRUCell"), built("GRUCell")
    backward = {k: v for k, v in tf_variables(pair, "bidirectional_rnn").items() if "/bw/" in k}
    cell = GRUCell(U)
    load_tf_variables(cell, backward)
    assert_same(tf_variables(cell), tf_variables(pair[1]))


def test_stack_of_pairs_has_the_names_of_both_versions() -> None:
    def layers() -> list[tuple[Any, Any]]:
        return [(LSTMCell(U), GRUCell(U)), (BasicRNNCell(2), LSTMCell(3))]

    source = layers()
    for i, pair in enumerate(source):
        for cell in pair:
            cell.build(2 * U if i else N, F64)
    names = list(tf_variables(source, "stack_bidirectional_rnn"))
    assert names[0] == "stack_bidirectional_rnn/cell_0/bidirectional_rnn/fw/lstm_cell/kernel"
    assert names[-1] == "stack_bidirectional_rnn/cell_1/bidirectional_rnn/bw/lstm_cell/bias"
    dynamic = tf_variables(source, "stack_bidirectional_rnn")
    static = {name.replace("bidirectional_rnn/fw", "fw"): value for name, value in dynamic.items()}
    static = {name.replace("bidirectional_rnn/bw", "bw"): value for name, value in static.items()}
    old = {
        name.replace("stack_bidirectional_rnn/cell_", "StackRNN/Layer")
        .replace("bidirectional_rnn/fw", "BiRNN/FW")
        .replace("bidirectional_rnn/bw", "BiRNN/BW"): value
        for name, value in dynamic.items()
    }
    assert "StackRNN/Layer1/BiRNN/BW/lstm_cell/bias" in old
    for given in (dynamic, static, old):
        pairs = layers()
        load_tf_variables(pairs, given)
        assert_same(tf_variables(pairs), tf_variables(source))
        by_layer = layers()
        lists = [pair[0] for pair in by_layer], [pair[1] for pair in by_layer]
        load_tf_variables(lists, given)
        assert_same(tf_variables(lists), tf_variables(source))
        x = torch.randn(2, 5, N, dtype=F64)
        ours, _, _ = torchrnn.stack_bidirectional_dynamic_rnn(*lists, x, dtype=F64)
        assert ours.shape == (2, 5, 2 + 3)


# Mistakes -------------------------------------------------------------------------------------------------


def state_of(cell: Any) -> list[Any]:
    return [None if is_lazy(p) else p.detach().clone() for p in cell.parameters()]


@pytest.mark.parametrize("is_built", [True, False])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rnn/lstm_cell/bias": None}, "^variables missing: rnn/lstm_cell/bias$"),
        (
            {"rnn/lstm_cell/w_f_diag": np.zeros(U)},
            "^variables not of this cell: rnn/lstm_cell/w_f_diag$",
        ),
        (
            {"rnn/lstm_cell/kernel/Adam:0": np.zeros((N + U, 4 * U))},
            "^variables not of this cell: rnn/lstm_cell/kernel/Adam:0$",
        ),
        (
            {"rnn/lstm_cell/bias": None, "rnn/lstm_cell/b": np.zeros(4 * U)},
            "^variables missing: rnn/lstm_cell/bias; not of this cell: rnn/lstm_cell/b$",
        ),
        ({"lstm_cell/bias": np.zeros(4 * U)}, "^variables not of this cell: lstm_cell/bias$"),
        (
            {"rnn/lstm_cell/biases:0": np.zeros(4 * U)},
            "^rnn/lstm_cell/bias and rnn/lstm_cell/biases:0 are names of the same variable$",
        ),
        (
            {"rnn/lstm_cell/bias": np.zeros(4 * U + 1)},
            r"^lstm_cell/bias: must have shape \[16\], got \[17\]$",
        ),
        (
            {"rnn/lstm_cell/bias": np.zeros((1, 4 * U))},
            r"^lstm_cell/bias: must have shape \[16\], got \[1, 16\]$",
        ),
        (
            {"rnn/lstm_cell/kernel": np.zeros((N + U, 5 * U))},
            r"^lstm_cell/kernel: must have shape \[7, 16\], got \[7, 20\]$",
        ),
        (
            {"rnn/lstm_cell/bias": np.zeros(4 * U, int)},
            "^rnn/lstm_cell/bias: must hold floating point numbers, got torch.int64$",
        ),
        (
            {"bw/lstm_cell/kernel": np.zeros((N + U, 4 * U)), "bw/lstm_cell/bias": np.zeros(4 * U)},
            "^the variables fit below more than one scope: rnn/, bw/$",
        ),
    ],
)
def test_variables_that_do_not_fit_are_named_and_change_nothing(
    change: dict[str, Any], text: str, is_built: bool
) -> None:
    cell = LSTMCell(U)
    if is_built:
        cell.build(N, F64)
    before = state_of(cell)
    given = {**lstm_arrays("rnn/lstm_cell/"), **change}
    with pytest.raises(ValueError, match=text):
        load_tf_variables(cell, {name: array for name, array in given.items() if array is not None})
    after = state_of(cell)
    assert all(a is b if b is None else torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_wrong_input_size_of_built_cell_is_refused() -> None:
    cell = LSTMCell(U)
    cell.build(N)
    with pytest.raises(ValueError, match=r"lstm_cell/kernel: must have shape \[7, 16\], got \[9, 16\]"):
        load_tf_variables(cell, lstm_arrays(inputs=5))


def test_kernel_too_small_for_the_units_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lstm_cell/kernel: must have shape \[4, 16\], got \[3, 16\]"):
        load_tf_variables(LSTMCell(U), lstm_arrays(inputs=-1))


def test_layers_that_do_not_fit_each_other_leave_the_stack_unbuilt() -> None:
    stack = MultiRNNCell([LSTMCell(U), LSTMCell(U)])
    wrong, right = (
        {**lstm_arrays("cell_0/lstm_cell/"), **lstm_arrays("cell_1/lstm_cell/", n)} for n in (5, U)
    )
    with pytest.raises(ValueError, match="the variables do not fit each other: lstm_cell: inputs of size 4"):
        load_tf_variables(stack, {f"multi_rnn_cell/{name}": array for name, array in wrong.items()})
    assert all(map(is_lazy, stack.parameters()))
    load_tf_variables(stack, {f"multi_rnn_cell/{name}": array for name, array in right.items()})
    run(stack, torch.randn(2, 5, N, dtype=F64))


def test_stack_missing_a_layer_names_what_is_missing() -> None:
    stack = MultiRNNCell([LSTMCell(U), LSTMCell(U)])
    with pytest.raises(
        ValueError, match="missing: rnn/multi_rnn_cell/cell_1/lstm_cell/kernel, rnn/multi_rnn"
    ):
        load_tf_variables(stack, lstm_arrays("rnn/multi_rnn_cell/cell_0/lstm_cell/"))


def layers(count: int, scope: str = "multi_rnn_cell/cell_{}/") -> dict[str, Any]:
    return {k: v for i in range(count) for k, v in lstm_arrays(scope.format(i) + "lstm_cell/", U).items()}


BUILD_TWO = r"; the same LSTMCell object is in 2 places, and has one set of variables: build separate cells, "
BUILD_TWO += r"\[LSTMCell\(...\) for _ in range\(2\)\]$"


@pytest.mark.filterwarnings("ignore:At least two cells")
@pytest.mark.parametrize("is_built", [False, True])
@pytest.mark.parametrize(
    ("around", "given"),
    [
        (lambda cell: MultiRNNCell([cell] * 2), layers(2)),
        (lambda cell: MultiRNNCell([rnn_cell.DropoutWrapper(cell), cell]), layers(2)),
        (lambda cell: MultiRNNCell([rnn_cell.ResidualWrapper(cell) for _ in range(2)]), layers(2)),
        (lambda cell: (cell, cell), lstm_arrays("fw/lstm_cell/", U) | lstm_arrays("bw/lstm_cell/", U)),
        (
            lambda cell: [(cell, LSTMCell(U)), (cell, LSTMCell(U))],
            layers(2, "cell_{}/bidirectional_rnn/fw/") | layers(2, "cell_{}/bidirectional_rnn/bw/"),
        ),
        (
            lambda cell: ([cell, LSTMCell(U)], [LSTMCell(U), cell]),
            layers(2, "cell_{}/bidirectional_rnn/fw/") | layers(2, "cell_{}/bidirectional_rnn/bw/"),
        ),
    ],
    ids=["stack", "wrapped once", "wrapped", "pair", "layers forwards", "across"],
)
def test_variables_for_each_place_of_one_cell_are_refused_with_a_hint(
    around: Any, given: dict[str, Any], is_built: bool
) -> None:
    cell = LSTMCell(U)
    if is_built:
        cell.build(U, F64)
    before = state_of(cell)
    with pytest.raises(ValueError, match=BUILD_TWO):
        load_tf_variables(around(cell), {f"model/{name}:0": value for name, value in given.items()})
    assert all(
        a is b if b is None else torch.equal(a, b) for a, b in zip(state_of(cell), before, strict=True)
    )


def test_more_layers_than_there_are_is_no_matter_of_shared_cells() -> None:
    for cell in (MultiRNNCell([LSTMCell(U)]), MultiRNNCell([LSTMCell(U), LSTMCell(U)])):
        with pytest.raises(ValueError, match=r"^variables not of this cell: [^;]*cell_2/lstm_cell/bias$"):
            load_tf_variables(cell, layers(3))


@pytest.mark.parametrize(
    "make",
    [
        lambda cell: prune.l1_unstructured(cell, "kernel", 0.5),
        lambda cell: nn.utils.spectral_norm(cell, "kernel"),
        lambda cell: nn.utils.parametrizations.weight_norm(cell, "kernel"),
    ],
    ids=["prune", "spectral_norm", "parametrized"],
)
def test_a_variable_that_is_made_from_others_cannot_be_set(make: Any) -> None:
    cell = LSTMCell(U)
    cell.build(N, F64)
    make(cell)
    before = state_of(cell)
    with pytest.raises(
        ValueError, match="lstm_cell/kernel: is made from other parameters, remove what makes"
    ):
        load_tf_variables(MultiRNNCell([cell]), lstm_arrays("multi_rnn_cell/cell_0/lstm_cell/"))
    assert all(map(torch.equal, state_of(cell), before))


def test_a_variable_that_is_made_at_each_run_is_not_given_as_it_was_made_last() -> None:
    cell = LSTMCell(U)
    cell.build(N, F64)
    prune.l1_unstructured(cell, "kernel", 0.5)
    for function in (tf_variables, tf_gradients):
        with pytest.raises(
            ValueError, match="rnn/lstm_cell/kernel: is made at each run, by a forward pre-hook"
        ):
            function(cell, "rnn")
    prune.remove(cell, "kernel")
    assert not tf_variables(cell)["lstm_cell/kernel"].all()


def test_a_parametrized_variable_is_given_as_it_is_used() -> None:
    cell = LSTMCell(U)
    cell.build(N, F64)
    nn.utils.parametrizations.weight_norm(cell, "kernel")
    run(cell, torch.randn(2, 5, N, dtype=F64))[0].sum().backward()
    with torch.no_grad():
        cell.parametrizations.kernel.original0.mul_(2)
    assert_same(
        tf_variables(cell),
        {"lstm_cell/kernel": cell.kernel.detach().numpy(), "lstm_cell/bias": cell.bias.detach().numpy()},
    )
    with pytest.raises(ValueError, match="lstm_cell/kernel: has no gradient, as it is parametrized"):
        tf_gradients(cell)


def test_nothing_given_names_all() -> None:
    with pytest.raises(ValueError, match=r"^variables missing: lstm_cell/kernel, lstm_cell/bias$"):
        load_tf_variables(LSTMCell(U), {})


@pytest.mark.parametrize("function", [tf_variables, tf_gradients])
def test_unbuilt_cell_has_no_variables_to_give(function: Any) -> None:
    with pytest.raises(ValueError, match="lstm_cell/kernel: has no value yet"):
        function(LSTMCell(U))


@pytest.mark.parametrize("cell", [nn.LSTM(2, 3), [], (), None, [LSTMCell(U)], ([], [])], ids=repr)
def test_what_is_no_cell_is_refused(cell: Any) -> None:
    with pytest.raises(TypeError, match="cell must be an RNNCell, a pair"):
        load_tf_variables(cell, {})


def test_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(TypeError, match="variables must map names to arrays, got list"):
        load_tf_variables(LSTMCell(U), [("kernel", 1)])


class Custom(RNNCell):
    """A user's cell with names that look old."""

    scope = "custom"

    def __init__(self) -> None:
        super().__init__()
        self.add_variable("bias")
        self.add_variable("biases")

    def variable_shapes(self, input_size: int) -> dict[str, tuple[int, ...]]:
        return {"bias": (U,), "biases": (2,)}


def test_names_that_only_look_old_are_taken_as_they_are() -> None:
    cell = Custom()
    given = arrays({"bias": (U,), "biases": (2,)}, "custom/")
    load_tf_variables(cell, {f"rnn/{name}:0": array for name, array in given.items()})
    assert_same(tf_variables(cell), given)


# torch.nn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [None, 2])
def test_tensorflows_lstm_equals_torch_lstm(projection: int | None) -> None:
    cell, outputs = LSTMCell(U, num_proj=projection, forget_bias=0.7), projection or U
    shapes = {"kernel": (N + outputs, 4 * U), "bias": (4 * U,)}
    if projection:
        shapes["projection/kernel"] = (U, projection)
    given = {name: torch.tensor(array) for name, array in arrays(shapes).items()}
    load_tf_variables(cell, {f"rnn/lstm_cell/{name}": value for name, value in given.items()})
    i, j, f, o = given["kernel"].chunk(4, 1)
    b_i, b_j, b_f, b_o = given["bias"].chunk(4)
    weight = torch.cat([i, f, j, o], 1).t()
    theirs = nn.LSTM(N, U, proj_size=projection or 0, batch_first=True, dtype=F64)
    state = {
        "weight_ih_l0": weight[:, :N],
        "weight_hh_l0": weight[:, N:],
        "bias_ih_l0": torch.cat([b_i, b_f + 0.7, b_j, b_o]),
        "bias_hh_l0": torch.zeros(4 * U),
    }
    if projection:
        state["weight_hr_l0"] = given["projection/kernel"].t()
    theirs.load_state_dict(state)
    x = torch.randn(2, 5, N, dtype=F64)
    y, (h, c) = theirs(x)
    torch.testing.assert_close(run(cell, x), [y, c[0], h[0]])


def test_tensorflows_basic_rnn_equals_torch_rnn() -> None:
    cell = BasicRNNCell(U)
    given = {name: torch.tensor(v) for name, v in arrays({"kernel": (N + U, U), "bias": (U,)}).items()}
    load_tf_variables(cell, {f"rnn/basic_rnn_cell/{name}": value for name, value in given.items()})
    theirs = nn.RNN(N, U, batch_first=True, dtype=F64)
    theirs.load_state_dict(
        {
            "weight_ih_l0": given["kernel"][:N].t(),
            "weight_hh_l0": given["kernel"][N:].t(),
            "bias_ih_l0": given["bias"],
            "bias_hh_l0": torch.zeros(U),
        }
    )
    x = torch.randn(2, 5, N, dtype=F64)
    y, h = theirs(x)
    torch.testing.assert_close(run(cell, x), [y, h[0]])
