"""Tensors that are written to between forward and backward: gradients as torch.nn's, or its error."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import leaves, trio
from every_cell import CELLS as EVERY_CELL
from every_cell import CONV, sequence
from test_ops import arguments, loss, vary
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import torchrnn
from torchrnn import ops, recompute, scan
from torchrnn.options import CELLS, Options

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MODIFIED = "modified by an inplace operation"
LAYERS = ["LSTM", "GRU", "RNN"]

CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "relu": lambda y: y.relu_(),
    "product": lambda y: y.mul_(torch.linspace(-1, 2, y.size(-1))),
    "sum": lambda y: y.add_(1),
    "padding": lambda y: y.masked_fill_(torch.arange(y.size(0)).view(-1, *[1] * (y.dim() - 1)) > 1, 0.0),
    "a part": lambda y: y[..., 1:].zero_(),
    "dropout": lambda y: nn.functional.dropout(y, 0.5, True, inplace=True),
    "copy": lambda y: y.copy_(torch.ones_like(y)),
}


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "CHUNK_ROWS", 7)


# Outputs --------------------------------------------------------------------------------------------------


def changed_gradients(
    call: Callable[[], Any], change: Callable[[Tensor], Any], wanted: list[Tensor], copied: bool
) -> list[Tensor]:
    """Returns all gradients of what becomes of the results, which are written to, or copies of them."""
    torch.manual_seed(1)
    results = [leaf for leaf in leaves(call()) if leaf is not None and leaf.requires_grad]
    if copied:
        results = [leaf.clone() for leaf in results]
    for leaf in results:
        change(leaf)
    total = sum(leaf.square().sum() for leaf in results)
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


def assert_free(call: Callable[[], Any], wanted: list[Tensor], label: str = "") -> None:
    """Asserts that writing to results does to the gradients what writing to copies does."""
    for how, change in CHANGES.items():
        ours, copies = (changed_gradients(call, change, wanted, copied) for copied in (False, True))
        torch.testing.assert_close(ours, copies, msg=lambda text, how=how: f"{label} {how}: {text}")


FORMS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bidirectional": True, "batch_first": True},
    {"bias": False},
]


@pytest.mark.parametrize("again", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("name", ["GRU", "RNN", "relu"])
def test_outputs_of_layers_may_be_written_to(
    path: str, name: str, options: dict[str, Any], again: bool
) -> None:
    extras = {"nonlinearity": "relu"} if name == "relu" else {}
    kind = "RNN" if name == "relu" else name
    modules = trio(lambda library: getattr(library, kind)(3, 5, **options, **extras), torch.float64)
    modules.ours.recompute = again
    x = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    for how, change in CHANGES.items():
        found = [
            changed_gradients(lambda m=m: m(x), change, [x, *m.parameters()], copied)
            for m, copied in ((modules.ours, False), (modules.exact, True))
        ]
        torch.testing.assert_close(*found, msg=lambda text, how=how: f"{how}: {text}")


@pytest.mark.parametrize("again", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("name", ["GRU", "reset before", "RNN"])
def test_outputs_with_lengths_resets_and_states(path: str, name: str, again: bool) -> None:
    kind = "GRU" if name == "reset before" else name
    extras = {"reset_after": False} if name == "reset before" else {}
    layer = getattr(torchrnn, kind)(3, 5, 2, bidirectional=True, recompute=again, **extras)
    x, h = torch.randn(4, 3, 3, requires_grad=True), torch.randn(4, 3, 5, requires_grad=True)
    lengths, resets = torch.tensor([4, 0, 2]), torch.rand(4, 3) < 0.3
    wanted = [x, h, *layer.parameters()]
    assert_free(lambda: layer(x, h, lengths=lengths, resets=resets), wanted)

    def packed() -> list[Tensor]:
        y, h_n = layer(pack_padded_sequence(x, torch.tensor([4, 3, 1])), h)
        return [y.data, h_n]

    assert_free(packed, wanted)
    assert_free(lambda: layer(x[:, 0], h[:, 0]), wanted)


@pytest.mark.parametrize("cell", CELLS)
def test_outputs_of_the_op(path: str, cell: str) -> None:
    a = arguments(cell, (4, 3, 3, 5), 2)
    if CELLS[cell].keeps_output:
        assert_free(lambda: ops.layer(a, Options(cell)), a.differentiable)
        return
    # y is read again; the states that come out are not.
    assert_free(lambda: ops.layer(a, Options(cell))[2:], a.differentiable)
    if path == "reference":  # torch's operators keep their own.
        return
    y, *_ = ops.layer(a, Options(cell))
    y.mul_(2)
    with pytest.raises(RuntimeError, match=MODIFIED):
        y.sum().backward()


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_states_of_cells_are_as_free_as_those_of_torch(path: str, name: str) -> None:
    modules = trio(lambda library: getattr(library, name)(3, 5), torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for how, change in CHANGES.items():
        found: list[Any] = []
        for module, copied in ((modules.ours, False), (modules.exact, False), (modules.exact, True)):
            wanted = [x, *module.parameters()]
            try:
                found.append(changed_gradients(lambda m=module: m(x), change, wanted, copied))
            except RuntimeError as error:
                assert MODIFIED in str(error)
                found.append(None)
        if found[0] is None:
            assert found[1] is None, f"{how}: torch.nn takes it"
        else:
            torch.testing.assert_close(found[0], found[2], msg=lambda text, how=how: f"{how}: {text}")


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_loop_that_writes_to_its_state(path: str, name: str) -> None:
    """As at the end of an episode: the state is zeroed in place where a row has ended."""
    modules = trio(lambda library: getattr(library, name)(3, 5), torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    ended = torch.rand(4, 2, 1) < 0.3

    def run(cell: nn.Module, copied: bool) -> list[Tensor]:
        state, outputs = None, []
        for t in range(4):
            state = cell(x[t], state)
            outputs.append(leaves(state)[0].clone())
            if name == "LSTMCell":
                h, c = state
                state = h.masked_fill(ended[t], 0), c.masked_fill(ended[t], 0)
            else:
                state = state.clone() if copied else state
                state.masked_fill_(ended[t], 0)
        return list(torch.autograd.grad(torch.stack(outputs).square().sum(), list(cell.parameters())))

    torch.testing.assert_close(run(modules.ours, False), run(modules.exact, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [*FORMS, {"num_layers": 2}, {"proj_size": 2}], ids=str)
def test_outputs_of_an_lstm_are_as_free_as_those_of_torch(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    # Only of these torch.nn keeps the output itself; its text is ours too.
    is_kept = dtype in (torch.float32, torch.bfloat16) and options.keys() <= {"bias", "num_layers"}
    for library in (torchrnn, nn):
        lstm = library.LSTM(3, 5, **options, dtype=dtype)
        y, _ = lstm(torch.randn(4, 3, 3, dtype=dtype))
        y.relu_()
        with pytest.raises(RuntimeError, match=MODIFIED) if is_kept else contextlib.nullcontext():
            y.sum().backward()
    if not is_kept:
        lstm = torchrnn.LSTM(3, 5, **options, dtype=dtype)
        x = torch.randn(4, 3, 3, dtype=dtype, requires_grad=True)
        assert_free(lambda: lstm(x), [x, *lstm.parameters()])


def test_lstm_that_computes_again_does_not_read_its_output(path: str) -> None:
    lstm = torchrnn.LSTM(3, 5, 1, bidirectional=True, recompute=True)
    x = torch.randn(9, 3, 3, requires_grad=True)
    assert_free(lambda: lstm(x), [x, *lstm.parameters()])


@pytest.mark.parametrize("name", ["rnn", "gru", "gru block", "gru cudnn", "lstm", "layer norm", "sru", "nas"])
def test_outputs_of_the_unrolling_functions(name: str) -> None:
    cell = EVERY_CELL[name](4)
    x = sequence(name).requires_grad_()
    torchrnn.dynamic_rnn(cell, x, dtype=x.dtype)
    wanted = [x, *cell.parameters()]

    def run() -> Any:
        outputs, state = torchrnn.dynamic_rnn(cell, x, [3, 1], dtype=x.dtype)
        return outputs, state

    with torchrnn.stepwise():
        expected = {how: changed_gradients(run, change, wanted, True) for how, change in CHANGES.items()}
    for how, change in CHANGES.items():
        try:
            found = changed_gradients(run, change, wanted, False)
        except RuntimeError as error:
            # As in the loop where h and c are read again.
            assert MODIFIED in str(error)
            assert name in ("lstm", "layer norm", "sru", "nas")
            continue
        torch.testing.assert_close(found, expected[how], msg=lambda text, how=how: f"{how}: {text}")
    assert name not in CONV


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_outputs_in_a_compiled_model(name: str, backend: str) -> None:
    layer = getattr(torchrnn, name)(3, 5, 2)

    class Model(nn.Module):
        def __init__(self, change: Callable[[Tensor], Any], copied: bool) -> None:
            super().__init__()
            self.layer, self.change, self.copied = layer, change, copied

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, h = self.layer(x)
            if self.copied:
                y, h = y.clone(), h.clone()
            self.change(y)
            self.change(h)
            return y, h

    x = torch.randn(4, 3, 3, requires_grad=True)
    for how in ("relu", "product", "padding", "a part"):
        torch._dynamo.reset()
        compiled = torch.compile(Model(CHANGES[how], False), backend=backend, fullgraph=True)
        found = [
            torch.autograd.grad(sum(r.square().sum() for r in m(x)), [x, *layer.parameters()])
            for m in (compiled, Model(CHANGES[how], True))
        ]
        torch.testing.assert_close(*found)
        # And after the graph, where the caller writes.
        torch._dynamo.reset()
        whole = torch.compile(layer, backend=backend, fullgraph=True)
        ours, copies = (
            changed_gradients(lambda m=m: m(x), CHANGES[how], [x, *layer.parameters()], m is layer)
            for m in (whole, layer)
        )
        torch.testing.assert_close(ours, copies)
    torch._dynamo.reset()


# Inputs ---------------------------------------------------------------------------------------------------

INPUTS = ["input", "hx", "lengths", "resets", "weight_ih_l0", "weight_hh_l1", "bias_ih_l0_reverse"]


@pytest.mark.parametrize("again", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("which", INPUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_inputs_that_are_written_to_are_noticed(name: str, which: str, again: bool) -> None:
    layer = getattr(torchrnn, name)(3, 5, 2, bidirectional=True, recompute=again)
    x, h, c = torch.randn(9, 3, 3), torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    given = {
        "input": x, "hx": h, "lengths": torch.tensor([9, 1, 5]), "resets": torch.rand(9, 3) < 0.3,
        **dict(layer.named_parameters()),
    }  # fmt: skip
    extras = {name: given[name] for name in ("lengths", "resets")}
    loss_of = leaves(layer(x, (h, c) if name == "LSTM" else h, **extras))[0].sum()
    with torch.no_grad():
        value = given[which]
        value.copy_(value)
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss_of.backward()


@pytest.mark.parametrize("which", ["weight_ih", "weight_hh", "input", "hx"])
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_inputs_of_cells_that_are_written_to_are_noticed(name: str, which: str) -> None:
    for library in (torchrnn, nn):
        cell = getattr(library, name)(3, 5)
        x, h = torch.randn(2, 3, requires_grad=True), torch.randn(2, 5, requires_grad=True)
        hx = (h, torch.randn(2, 5)) if name == "LSTMCell" else h
        total = leaves(cell(x, hx))[0].sum()
        with torch.no_grad():
            {"input": x, "hx": h, **dict(cell.named_parameters())}[which].mul_(2)
        with pytest.raises(RuntimeError, match=MODIFIED):
            total.backward()


@pytest.mark.parametrize("again", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("variation", ["mask_h", "mask_c", "peephole", "norm", "zoneout_h", "zoneout_c"])
def test_variations_that_are_written_to_are_noticed(variation: str, again: bool) -> None:
    a, options = vary(arguments("lstm", (9, 3, 3, 5)), variation)
    total = loss((recompute if again else ops).layer(a, options)[:1])
    with torch.no_grad():
        value = {"peephole": a.peephole, "norm": a.norm_gain}.get(variation) or [getattr(a, variation)]
        value[0].mul_(2)
    with pytest.raises(RuntimeError, match=MODIFIED):
        total.backward()


@pytest.mark.parametrize("which", ["wx", "u", "h0", "c0", "lengths", "mask_h", "mask_c", "y"])
def test_inputs_of_a_scan_that_are_written_to_are_noticed(which: str) -> None:
    given = {
        "wx": torch.randn(4, 3, 20), "u": torch.randn(20), "h0": torch.randn(3, 5), "c0": torch.randn(3, 5),
        "lengths": torch.tensor([4, 1, 0]), "mask_h": torch.rand(4, 3, 5), "mask_c": torch.rand(1, 3, 5),
    }  # fmt: skip
    given["wx"].requires_grad_()
    y, *_ = scan.scan("indy_lstm", **given)
    total = y.sum()
    with torch.no_grad():
        {**given, "y": y}[which].mul_(2)
    with pytest.raises(RuntimeError, match=MODIFIED):
        total.backward()


def test_dropout_reads_nothing_but_its_seed() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    seed = torch.tensor(7)
    y = torch.ops.torchrnn.dropout(x * 1, seed, 0.5)
    kept = y.detach() != 0
    total = y.mul_(3).sum()
    with torch.no_grad():
        x.zero_()
    (grad,) = torch.autograd.grad(total, x, retain_graph=True)
    torch.testing.assert_close(grad, kept * 6.0)
    seed.add_(1)
    with pytest.raises(RuntimeError, match=MODIFIED):
        total.backward()


def test_a_copy_of_a_layer_shares_nothing() -> None:
    gru = torchrnn.GRU(3, 5)
    total = gru(torch.randn(4, 2, 3))[0].sum()
    with torch.no_grad():
        copy.deepcopy(gru).weight_hh_l0.zero_()
    total.backward()
