"""Keras's layers: numbers made by Keras 3, its masks against a plain loop, and the way back.

One file, as all sections build their layers and masks alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import gradients
from torch import Tensor, nn

import torchrnn
from torchrnn.interop import from_keras, keras_gradients, to_keras

GOLDEN = Path(__file__).parent / "golden" / "keras"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "index.json").read_text())["cases"]}
F64 = torch.float64
RANDOM = np.random.default_rng(20240229)
Step = Callable[[Tensor, list[Tensor]], list[Tensor]]


def serialized(spec: dict[str, Any]) -> dict[str, Any]:
    """Turns the index's description of a layer into Keras's own."""
    flags = {"return_sequences": True, "return_state": True}
    if spec["class"] == "Bidirectional":
        return {"class_name": "Bidirectional", "config": {"layer": serialized(spec["layer"])}}
    if spec["class"] == "RNN":
        cells = [{"class_name": cell["class"], "config": cell["kwargs"]} for cell in spec["cells"]]
        stack = {"class_name": "StackedRNNCells", "config": {"cells": cells}}
        return {"class_name": "RNN", "config": {"cell": stack, **flags}}
    return {"class_name": spec["class"], "config": {**spec["kwargs"], **flags}}


def numbered(arrays: Any, prefix: str) -> list[Any]:
    return [arrays[f"{prefix}.{i}"] for i in range(len(arrays.files)) if f"{prefix}.{i}" in arrays.files]


def assert_near(ours: Any, golden: Any, what: str) -> None:
    ours = ours.detach().numpy() if isinstance(ours, Tensor) else ours
    assert ours.shape == golden.shape, what
    assert ours.dtype == golden.dtype, what
    error = np.max(np.abs(ours - golden) / (1 + np.abs(golden)))
    assert error <= (1e-9 if golden.dtype == np.float64 else 2e-5), f"{what}: {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_keras_numbers(name: str, path: str) -> None:
    arrays = np.load(GOLDEN / CASES[name]["file"])
    module = from_keras(serialized(CASES[name]["layer"]), numbered(arrays, "w"))
    x = torch.tensor(arrays["x"], requires_grad=True)
    init = [torch.tensor(a, requires_grad=True) for a in numbered(arrays, "init")]
    mask = torch.tensor(arrays["mask"]) if "mask" in arrays.files else None
    out, states = module(x, mask=mask, initial_state=init or None)
    assert_near(out, arrays["out"], "out")
    golden = numbered(arrays, "state")
    assert len(states) == len(golden)
    loss = (out * torch.tensor(arrays["coef.out"])).sum()
    for k, (state, coef) in enumerate(zip(states, numbered(arrays, "coef.state"), strict=True)):
        assert_near(state, golden[k], f"state {k}")
        loss = loss + (state * torch.tensor(coef)).sum()
    loss.backward()
    assert x.grad is not None
    assert_near(x.grad, arrays["grad.x"], "gradient of x")
    for k, wanted in enumerate(numbered(arrays, "grad.init")):
        assert init[k].grad is not None
        assert_near(init[k].grad, wanted, f"gradient of state {k}")
    for k, (ours, wanted) in enumerate(zip(keras_gradients(module), numbered(arrays, "grad.w"), strict=True)):
        assert_near(ours, wanted, f"gradient of weight {k}")


def test_every_golden_case_is_there() -> None:
    assert len(CASES) == 20
    assert {case["file"] for case in CASES.values()} == {file.name for file in GOLDEN.glob("*.npz")}


# Configurations -------------------------------------------------------------------------------------------

GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}


def layer(kind: str, units: int = 3, **config: Any) -> dict[str, Any]:
    return {"class_name": kind, "config": {"units": units, "return_sequences": True, **config}}


def bidirectional(inner: dict[str, Any], **config: Any) -> dict[str, Any]:
    return {"class_name": "Bidirectional", "config": {"layer": inner, **config}}


def stack(*cells: dict[str, Any], **config: Any) -> dict[str, Any]:
    return {"class_name": "RNN", "config": {"cell": list(cells), "return_sequences": True, **config}}


def arrays_for(kind: str, inputs: int = 2, units: int = 3, **config: Any) -> list[Any]:
    columns = GATES[kind] * units
    bias = (2, columns) if kind == "GRU" and config.get("reset_after", True) else (columns,)
    shapes: list[tuple[int, ...]] = [(inputs, columns), (units, columns)]
    return [RANDOM.standard_normal(shape) for shape in shapes + [bias] * config.get("use_bias", True)]


def sequence(batch: int = 3, steps: int = 5, inputs: int = 2) -> Tensor:
    return torch.randn(batch, steps, inputs, dtype=F64, requires_grad=True)


def plain_step(
    kind: str, weights: list[Any], activation: Any = torch.tanh, gate: Any = torch.sigmoid
) -> Step:
    """Returns one step, written from Keras's documentation."""
    kernel, recurrent, bias = (torch.as_tensor(w) for w in weights)
    units = recurrent.size(0)

    def lstm(x: Tensor, state: list[Tensor]) -> list[Tensor]:
        h, c = state
        z = x @ kernel + h @ recurrent + bias
        i, f, g, o = (z[:, k * units : (k + 1) * units] for k in range(4))
        c = gate(f) * c + gate(i) * activation(g)
        return [gate(o) * activation(c), c]

    def gru(x: Tensor, state: list[Tensor]) -> list[Tensor]:
        (h,) = state
        after = bias.dim() == 2
        wx = x @ kernel + (bias[0] if after else bias)
        rh = h @ recurrent + (bias[1] if after else 0)
        z = gate(wx[:, :units] + rh[:, :units])
        r = gate(wx[:, units : 2 * units] + rh[:, units : 2 * units])
        inner = r * rh[:, 2 * units :] if after else (r * h) @ recurrent[:, 2 * units :]
        return [z * h + (1 - z) * activation(wx[:, 2 * units :] + inner)]

    def simple(x: Tensor, state: list[Tensor]) -> list[Tensor]:
        return [activation(x @ kernel + state[0] @ recurrent + bias)]

    return {"LSTM": lstm, "GRU": gru, "SimpleRNN": simple}[kind]


def plain_loop(
    step: Step, x: Tensor, mask: Tensor, state: list[Tensor], backwards: bool = False, zero: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Returns what Keras does with a mask, row by row."""
    outputs, finals = [], []
    times = range(x.size(1) - 1, -1, -1) if backwards else range(x.size(1))
    for b in range(x.size(0)):
        now = [s[b : b + 1] for s in state]
        last = torch.zeros_like(now[0])
        row = []
        for t in times:
            if mask[b, t]:
                now = step(x[b : b + 1, t], now)
                last = now[0]
            row.append(last if mask[b, t] or not zero else torch.zeros_like(last))
        outputs.append(torch.cat(row))
        finals.append(now)
    return torch.stack(outputs), [torch.cat(each) for each in zip(*finals, strict=True)]


MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
    "mixed": [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [0, 0, 1, 0, 0]],
    "with an empty row": [[0, 0, 0, 0, 0], [1, 1, 0, 1, 1], [0, 0, 0, 0, 1]],
}
KINDS: dict[str, dict[str, Any]] = {
    "LSTM": {},
    "GRU": {},
    "GRU reset before": {"reset_after": False},
    "SimpleRNN": {},
    "LSTM hard_sigmoid": {"recurrent_activation": "hard_sigmoid"},
    "GRU softsign": {"activation": "softsign"},
}


def hard_sigmoid(x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6) / 6


def kind_of(name: str) -> str:
    return name.partition(" ")[0]


def functions(name: str) -> tuple[Any, Any]:
    gate = hard_sigmoid if "hard_sigmoid" in name else torch.sigmoid
    return nn.functional.softsign if "softsign" in name else torch.tanh, gate


# Masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("name", KINDS)
def test_masked_sequence_equals_plain_loop(name: str, pattern: str, flags: tuple[bool, bool]) -> None:
    backwards, zero = flags
    kind = kind_of(name)
    weights = arrays_for(kind, **KINDS[name])
    module = from_keras(
        layer(kind, **KINDS[name], go_backwards=backwards, zero_output_for_mask=zero), weights
    )
    x, mask = sequence(), torch.tensor(MASKS[pattern], dtype=torch.bool)
    state = [torch.randn(3, 3, dtype=F64, requires_grad=True) for _ in range(1 + (kind == "LSTM"))]
    ours = module(x, mask, state)
    step = plain_step(kind, [*module.cells[0].parameters()], *functions(name))
    theirs = plain_loop(step, x, mask, state, backwards, zero)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(module, ours, x, state), gradients(module, theirs, x, state))


@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("name", ["LSTM", "GRU reset before", "LSTM hard_sigmoid"])
def test_masked_steps_are_not_read(name: str, pattern: str) -> None:
    kind = kind_of(name)
    module = from_keras(bidirectional(layer(kind, **KINDS[name])), 2 * arrays_for(kind, **KINDS[name]))
    mask = torch.tensor(MASKS[pattern], dtype=torch.bool)
    results = []
    for padding in (0.0, torch.nan, torch.inf):
        torch.manual_seed(0)
        x = sequence().detach().masked_fill(~mask.unsqueeze(2), padding).requires_grad_()
        result = module(x, mask)
        results.append((result, gradients(module, result, x)))
    assert torch.equal(results[0][0][0], results[1][0][0])
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    assert not results[0][1]["input 0"][~mask].any()


@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN"])
def test_last_output_of_masked_sequence(name: str) -> None:
    weights, x = arrays_for(name), sequence()
    mask = torch.tensor(MASKS["mixed"], dtype=torch.bool)
    last, states = from_keras(layer(name, return_sequences=False), weights)(x, mask)
    outputs, _ = from_keras(layer(name), weights)(x, mask)
    assert torch.equal(last, outputs[:, -1])
    assert torch.equal(last, states[0])
    zeroed, _ = from_keras(layer(name, return_sequences=False, zero_output_for_mask=True), weights)(x, mask)
    assert torch.equal(zeroed, last * mask[:, -1:])


@pytest.mark.parametrize("name", ["LSTM", "GRU", "GRU reset before", "SimpleRNN"])
def test_masked_sequence_is_one_call_of_the_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torchrnn.interop.keras.loop")
    kind = kind_of(name)
    module = from_keras(bidirectional(layer(kind, **KINDS[name])), 2 * arrays_for(kind, **KINDS[name]))
    for pattern in MASKS.values():
        module(sequence(), torch.tensor(pattern))


def test_full_mask_changes_nothing() -> None:
    module, x = from_keras(layer("LSTM"), arrays_for("LSTM")), sequence()
    torch.testing.assert_close(module(x, torch.ones(3, 5, dtype=torch.bool)), module(x))


def test_mask_may_hold_integers_in_an_array() -> None:
    module, x = from_keras(layer("GRU"), arrays_for("GRU")), sequence()
    mask = np.array(MASKS["mixed"])
    assert torch.equal(module(x, mask)[0], module(x, torch.tensor(mask, dtype=torch.bool))[0])


# Bidirectional and stacks ---------------------------------------------------------------------------------

MERGES: dict[str | None, Callable[[Tensor, Tensor], Any]] = {
    "concat": lambda fw, bw: torch.cat([fw, bw], -1),
    "sum": lambda fw, bw: fw + bw,
    "ave": lambda fw, bw: (fw + bw) / 2,
    "mul": lambda fw, bw: fw * bw,
    None: lambda fw, bw: (fw, bw),
}


@pytest.mark.parametrize("sequences", [True, False])
@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("mode", MERGES)
def test_bidirectional_merges_two_plain_loops(mode: str | None, pattern: str, sequences: bool) -> None:
    weights = [arrays_for("LSTM"), arrays_for("LSTM")]
    inner = layer("LSTM", return_sequences=sequences)
    module = from_keras(bidirectional(inner, merge_mode=mode), weights[0] + weights[1])
    x, mask = sequence(), torch.tensor(MASKS[pattern], dtype=torch.bool)
    init = [torch.randn(3, 3, dtype=F64) for _ in range(4)]
    loops = [
        plain_loop(plain_step("LSTM", w), x, mask, state, backwards, zero=sequences)
        for w, state, backwards in zip(weights, (init[:2], init[2:]), (False, True), strict=True)
    ]
    (fw, states_fw), (bw, states_bw) = loops
    merged = MERGES[mode](fw, bw.flip(1)) if sequences else MERGES[mode](fw[:, -1], bw[:, -1])
    torch.testing.assert_close(module(x, mask, init), (merged, states_fw + states_bw))


def test_bidirectional_takes_a_backward_layer_of_its_own() -> None:
    forward, backward = arrays_for("LSTM"), arrays_for("GRU", units=4)
    config = bidirectional(layer("LSTM"), backward_layer=layer("GRU", 4, go_backwards=True))
    x = sequence()
    out, states = from_keras(config, forward + backward)(x)
    fw, states_fw = from_keras(layer("LSTM"), forward)(x)
    bw, states_bw = from_keras(layer("GRU", 4, go_backwards=True), backward)(x)
    torch.testing.assert_close(out, torch.cat([fw, bw.flip(1)], -1))
    torch.testing.assert_close(states, states_fw + states_bw)


def test_stack_equals_layers_one_after_the_other() -> None:
    weights = [arrays_for("LSTM"), arrays_for("GRU", 3, 4, reset_after=False), arrays_for("SimpleRNN", 4, 2)]
    kinds = [("LSTM", 3, {}), ("GRU", 4, {"reset_after": False}), ("SimpleRNN", 2, {})]
    cells = [{"class_name": f"{kind}Cell", "config": {"units": n, **config}} for kind, n, config in kinds]
    x, mask = sequence(), torch.tensor(MASKS["mixed"], dtype=torch.bool)
    nested = {"class_name": "StackedRNNCells", "config": {"cells": cells}}
    y, finals = x, []
    for (kind, units, config), arrays in zip(kinds, weights, strict=True):
        y, states = from_keras(layer(kind, units, **config), arrays)(y, mask)
        finals += states
    for described in (stack(*cells), {"class_name": "RNN", "config": {"cell": nested}}):
        module = from_keras(described, [array for arrays in weights for array in arrays])
        torch.testing.assert_close(module(x, mask), (y, finals))
        again = module(x, mask, [[finals[0], finals[1]], finals[2], finals[3]])
        torch.testing.assert_close(again, module(x, mask, finals))


def test_single_cell_in_rnn_equals_layer() -> None:
    weights, x = arrays_for("GRU"), sequence()
    cell = {"class_name": "GRUCell", "config": {"units": 3}}
    module = from_keras({"class_name": "RNN", "config": {"cell": cell, "return_sequences": True}}, weights)
    assert torch.equal(module(x)[0], from_keras(layer("GRU"), weights)(x)[0])


def test_sequences_are_returned_unless_the_configuration_says_no() -> None:
    weights, x = arrays_for("GRU"), sequence()
    config = {"class_name": "GRU", "config": {"units": 3}}
    assert from_keras(config, weights)(x)[0].shape == (3, 5, 3)


# What a step computes -------------------------------------------------------------------------------------


def test_hard_sigmoid_is_that_of_the_version() -> None:
    weights, x = arrays_for("LSTM"), sequence()
    config = layer("LSTM", recurrent_activation="hard_sigmoid")
    mask = torch.ones(3, 5, dtype=torch.bool)
    zeros = [torch.zeros(3, 3, dtype=F64)] * 2
    for version, gate in (
        (3, hard_sigmoid),
        (2, lambda v: (0.2 * v + 0.5).clamp(0, 1)),
    ):
        wanted = plain_loop(plain_step("LSTM", weights, gate=gate), x, mask, zeros)
        torch.testing.assert_close(from_keras(config, weights, keras_version=version)(x), wanted)


def test_activation_none_is_the_identity() -> None:
    weights, x = arrays_for("SimpleRNN"), sequence()
    none, linear = (from_keras(layer("SimpleRNN", activation=a), weights)(x)[0] for a in (None, "linear"))
    assert torch.equal(none, linear)
    assert not torch.equal(none, from_keras(layer("SimpleRNN"), weights)(x)[0])


def test_serialized_function_is_taken_by_its_name() -> None:
    weights, x = arrays_for("LSTM"), sequence()
    function = {"module": "builtins", "class_name": "function", "config": "relu"}
    module = from_keras(layer("LSTM", activation=function), weights)
    assert torch.equal(module(x)[0], from_keras(layer("LSTM", activation="relu"), weights)(x)[0])


@pytest.mark.parametrize("name", KINDS)
def test_dropout_masks_are_one_per_row_and_constant_over_time(name: str) -> None:
    kind = kind_of(name)
    weights = arrays_for(kind, **KINDS[name])
    module = from_keras(layer(kind, **KINDS[name], dropout=0.5), weights)
    plain = from_keras(layer(kind, **KINDS[name]), weights)
    x = sequence()
    assert torch.equal(module.eval()(x)[0], plain(x)[0])
    torch.manual_seed(1)
    dropped = module.train()(x)[0]
    torch.manual_seed(1)
    factor = nn.functional.dropout(torch.ones(3, 2, dtype=F64), 0.5)
    torch.testing.assert_close(dropped, plain(x * factor.unsqueeze(1))[0])


@pytest.mark.parametrize("name", KINDS)
def test_recurrent_dropout_acts_on_what_enters_the_product(name: str) -> None:
    kind = kind_of(name)
    weights = arrays_for(kind, **KINDS[name])
    module = from_keras(layer(kind, **KINDS[name], recurrent_dropout=0.5), weights)
    plain = from_keras(layer(kind, **KINDS[name]), weights)
    x = sequence()
    assert torch.equal(module.eval()(x)[0], plain(x)[0])
    torch.manual_seed(1)
    dropped = module.train()(x)[0]
    torch.manual_seed(1)
    factor = nn.functional.dropout(torch.ones(3, 3, dtype=F64), 0.5)
    for b in range(3):  # A factor on rows of the recurrent kernel is one on the h that enters the product.
        scaled = [weights[0], weights[1] * factor[b].numpy()[:, None], weights[2]]
        row = from_keras(layer(kind, **KINDS[name]), scaled)(x[b : b + 1])[0]
        torch.testing.assert_close(dropped[b : b + 1], row)


# torch.nn -------------------------------------------------------------------------------------------------


def test_keras_lstm_equals_torch_lstm() -> None:
    weights, x = arrays_for("LSTM"), sequence()
    theirs = nn.LSTM(2, 3, batch_first=True, dtype=F64)
    kernel, recurrent, bias = (torch.tensor(w) for w in weights)
    theirs.load_state_dict(
        {
            "weight_ih_l0": kernel.t(),
            "weight_hh_l0": recurrent.t(),
            "bias_ih_l0": bias,
            "bias_hh_l0": torch.zeros(12),
        }
    )
    out, (h, c) = from_keras(layer("LSTM"), weights)(x)
    wanted, (h_n, c_n) = theirs(x)
    torch.testing.assert_close((out, h, c), (wanted, h_n[0], c_n[0]))


def test_keras_gru_with_reset_after_equals_torch_gru() -> None:
    weights, x = arrays_for("GRU"), sequence()
    theirs = nn.GRU(2, 3, batch_first=True, dtype=F64)
    columns = [3, 4, 5, 0, 1, 2, 6, 7, 8]
    kernel, recurrent, bias = (torch.tensor(w)[:, columns] for w in weights)
    theirs.load_state_dict(
        {
            "weight_ih_l0": kernel.t(),
            "weight_hh_l0": recurrent.t(),
            "bias_ih_l0": bias[0],
            "bias_hh_l0": bias[1],
        }
    )
    out, (h,) = from_keras(layer("GRU"), weights)(x)
    wanted, h_n = theirs(x)
    torch.testing.assert_close((out, h), (wanted, h_n[0]))


def test_keras_gru_with_reset_before_equals_tensorflows_cell() -> None:
    weights, x = arrays_for("GRU", reset_after=False), sequence()
    kernel, recurrent, bias = (torch.tensor(w) for w in weights)
    both = torch.cat([kernel, recurrent])
    cell = torchrnn.rnn_cell.GRUCell(3)
    torchrnn.interop.load_tf_variables(
        cell,
        {
            "gru_cell/gates/kernel": both[:, [3, 4, 5, 0, 1, 2]],
            "gru_cell/gates/bias": bias[[3, 4, 5, 0, 1, 2]],
            "gru_cell/candidate/kernel": both[:, 6:],
            "gru_cell/candidate/bias": bias[6:],
        },
    )
    out, (h,) = from_keras(layer("GRU", reset_after=False), weights)(x)
    torch.testing.assert_close((out, h), torchrnn.dynamic_rnn(cell, x, dtype=F64))


# Weights --------------------------------------------------------------------------------------------------

SPECS = {
    "LSTM": (layer("LSTM"), arrays_for("LSTM")),
    "GRU": (layer("GRU"), arrays_for("GRU")),
    "GRU reset before": (layer("GRU", reset_after=False), arrays_for("GRU", reset_after=False)),
    "without bias": (layer("SimpleRNN", use_bias=False), arrays_for("SimpleRNN", use_bias=False)),
    "Bidirectional": (bidirectional(layer("LSTM")), arrays_for("LSTM") + arrays_for("LSTM")),
    "RNN": (
        stack(
            {"class_name": "LSTMCell", "config": {"units": 3}},
            {"class_name": "GRUCell", "config": {"units": 4}},
        ),
        arrays_for("LSTM") + arrays_for("GRU", 3, 4),
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_weights_come_back_as_they_were(name: str) -> None:
    config, weights = SPECS[name]
    back = to_keras(from_keras(config, weights))
    assert len(back) == len(weights)
    for ours, given in zip(back, weights, strict=True):
        np.testing.assert_array_equal(ours, given)


def test_weights_are_copied_both_ways() -> None:
    given = arrays_for("LSTM")
    module = from_keras(layer("LSTM"), given)
    before = to_keras(module)
    given[0][:] = 0
    with torch.no_grad():
        module.cells[0].recurrent_kernel.zero_()
    after = to_keras(module)
    np.testing.assert_array_equal(before[0], after[0])
    assert before[1].any()
    assert not after[1].any()


def test_weights_may_be_tensors_and_arrays_that_cannot_be_written() -> None:
    given = arrays_for("LSTM")
    for array in given:
        array.flags.writeable = False
    x = sequence()
    from_arrays = from_keras(layer("LSTM"), given)(x)[0]
    from_tensors = from_keras(layer("LSTM"), [torch.tensor(array) for array in given])(x)[0]
    assert torch.equal(from_arrays, from_tensors)


def test_module_computes_in_the_dtype_of_the_weights() -> None:
    module = from_keras(layer("LSTM"), [w.astype(np.float32) for w in arrays_for("LSTM")])
    assert module(sequence().float())[0].dtype == torch.float32
    assert all(array.dtype == np.float32 for array in to_keras(module))


def test_gradient_of_weight_without_one_is_none() -> None:
    module = from_keras(layer("LSTM"), arrays_for("LSTM"))
    assert keras_gradients(module) == [None, None, None]
    module.cells[0].bias.requires_grad_(False)
    module(sequence())[0].sum().backward()
    kernel, recurrent, bias = keras_gradients(module)
    assert kernel.shape == (2, 12)
    assert recurrent.shape == (3, 12)
    assert bias is None


def test_state_dict_carries_the_weights() -> None:
    config, weights = SPECS["Bidirectional"]
    one, other = from_keras(config, weights), from_keras(config, [w + 1 for w in weights])
    other.load_state_dict(one.state_dict())
    x = sequence()
    assert torch.equal(one(x)[0], other(x)[0])


# Mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "weights", "text"),
    [
        (layer("LSTM", stateful=True), arrays_for("LSTM"), "LSTM: stateful=True is not supported"),
        (layer("LSTM", time_major=True), arrays_for("LSTM"), "LSTM: time_major=True is not supported"),
        (layer("LSTM", activation="nosuch"), arrays_for("LSTM"), "activation='nosuch' is not supported"),
        (layer("LSTM", units=0), arrays_for("LSTM"), "LSTMCell: units must be a positive int, got 0"),
        (
            layer("LSTM", dropout=1.5),
            arrays_for("LSTM"),
            "dropout must be at least 0 and less than 1, got 1.5",
        ),
        (layer("CuDNNLSTM"), arrays_for("LSTM"), "class_name must be one of .* got 'CuDNNLSTM'"),
        (stack({"class_name": "LSTM", "config": {"units": 3}}), arrays_for("LSTM"), "got 'LSTM'"),
        (stack(), [], "at least one cell"),
        (
            layer("LSTM"),
            arrays_for("LSTM")[:2],
            "must have the weights kernel, recurrent_kernel, bias, got 2",
        ),
        (layer("LSTM"), 2 * arrays_for("LSTM"), "LSTM: must have 3 weights, got 6"),
        (layer("LSTM", 4), arrays_for("LSTM"), r"kernel must be \[2, 16\], got \[2, 12\]"),
        (
            layer("GRU"),
            arrays_for("GRU", reset_after=False),
            r"GRUCell: bias must be \[2, 9\], got \[9\]",
        ),
        (layer("LSTM"), [np.ones((2, 12), int)] * 3, "weight 0: must hold floating point numbers"),
        (
            bidirectional(layer("LSTM"), merge_mode="max"),
            2 * arrays_for("LSTM"),
            "merge_mode must be one of .* got 'max'",
        ),
        (
            bidirectional(layer("LSTM", go_backwards=True)),
            2 * arrays_for("LSTM"),
            "go_backwards must differ between the two layers",
        ),
        (
            bidirectional(
                layer("LSTM"), backward_layer=layer("LSTM", go_backwards=True, return_sequences=False)
            ),
            2 * arrays_for("LSTM"),
            "return_sequences must be that of both layers",
        ),
        (bidirectional(bidirectional(layer("LSTM"))), 4 * arrays_for("LSTM"), "must not be a Bidirectional"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_layer_is_refused(config: dict[str, Any], weights: list[Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        from_keras(config, weights)


def test_wrong_call_is_refused() -> None:
    module = from_keras(layer("LSTM"), arrays_for("LSTM"))
    x = sequence()
    with pytest.raises(ValueError, match=r"x must be \[B, T, I\] with I=2, got \[3, 5, 4\]"):
        module(sequence(inputs=4))
    with pytest.raises(ValueError, match=r"x must have the dtype of the weights torch.float64, got"):
        module(x.float())
    with pytest.raises(ValueError, match=r"mask must be \[B, T\] = \[3, 5\], got \[5, 3\]"):
        module(x, torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"initial_state must be \[\[3, 3\], \[3, 3\]\], got \[3, 3\]"):
        module(x, None, torch.zeros(3, 3, dtype=F64))


def test_what_is_no_layer_is_refused() -> None:
    with pytest.raises(TypeError, match="a layer must be"):
        from_keras({"units": 3}, [])
    for function in (to_keras, keras_gradients):
        with pytest.raises(TypeError, match="module must be one of from_keras, got LSTM"):
            function(nn.LSTM(2, 3))


def test_keys_without_effect_are_accepted() -> None:
    written = {
        "name": "lstm",
        "trainable": True,
        "dtype": {"class_name": "DTypePolicy", "config": {"name": "float32"}},
        "stateful": False,
        "unroll": True,
        "unit_forget_bias": True,
        "kernel_initializer": {"class_name": "GlorotUniform", "config": {"seed": None}},
        "kernel_regularizer": {"class_name": "L2", "config": {"l2": 0.1}},
        "bias_constraint": None,
        "quantization_config": None,
        "implementation": 2,
        "seed": None,
    }
    x, weights = sequence(), arrays_for("LSTM")
    module = from_keras(layer("LSTM", **written), weights)
    assert torch.equal(module(x)[0], from_keras(layer("LSTM"), weights)(x)[0])
