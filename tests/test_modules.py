"""The layers keep the contract of the torch.nn layers: parameters, pickling, parametrization, layouts."""

from __future__ import annotations

import copy
import doctest
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from conftest import assert_close_to_f64, gradients, leaves, one_thread, trio
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import torchrnn

LAYERS = ["LSTM", "GRU", "RNN"]
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "batch_first": True},
    {"num_layers": 2, "batch_first": True, "bidirectional": True},
]


def state(name: str, *shape: int, **kwargs: Any) -> Any:
    """A random initial state in the form that the layer takes."""
    h = torch.randn(*shape, **kwargs)
    return (h, torch.randn(*shape, **kwargs)) if name.startswith("LSTM") else h


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_state_dict_goes_both_ways(name: str, options: dict[str, Any]) -> None:
    ours, theirs = getattr(torchrnn, name)(3, 5, **options), getattr(nn, name)(3, 5, **options)
    assert isinstance(ours, type(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for source, target in ((theirs, ours), (ours, theirs)):
        source.reset_parameters()
        target.load_state_dict(source.state_dict(), strict=True)
        for key, value in source.state_dict().items():
            assert torch.equal(value, target.state_dict()[key])


@pytest.mark.parametrize("name", LAYERS)
def test_a_seed_gives_the_parameters_of_torch(name: str) -> None:
    torch.manual_seed(7)
    theirs = getattr(nn, name)(3, 5, 2)
    torch.manual_seed(7)
    ours = getattr(torchrnn, name)(3, 5, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    torch.manual_seed(8)
    theirs.reset_parameters()
    torch.manual_seed(8)
    ours.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_constructor_takes_positional_arguments_and_dtype(name: str) -> None:
    args: tuple[Any, ...] = (3, 5, 2, True, True, 0.25, True)
    if name == "RNN":
        args = (*args[:3], "relu", *args[3:])
    ours, theirs = (getattr(library, name)(*args, dtype=torch.float64) for library in (torchrnn, nn))
    assert repr(ours) == repr(theirs)
    for attribute in ("mode", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert {p.dtype for p in ours.parameters()} == {torch.float64}


def test_flat_weights_and_all_weights_are_the_parameters() -> None:
    lstm = torchrnn.LSTM(3, 5, 2, bidirectional=True, proj_size=2)
    names = [name for name, _ in lstm.named_parameters()]
    assert lstm._flat_weights_names == names
    assert all(a is b for a, b in zip(lstm._flat_weights, lstm.parameters(), strict=True))
    flat = [weight for weights in lstm.all_weights for weight in weights]
    assert all(a is b for a, b in zip(flat, lstm.parameters(), strict=True))
    replaced = nn.Parameter(torch.zeros(20, 3))
    lstm.weight_ih_l0 = replaced
    assert lstm._flat_weights[0] is replaced
    assert lstm.all_weights[0][0] is replaced
    assert lstm.flatten_parameters() is None
    lstm.double()
    assert {weight.dtype for weight in lstm._flat_weights} == {torch.float64}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_compute_the_same_and_are_independent(name: str, how: str) -> None:
    layer = getattr(torchrnn, name)(3, 5, 2, bidirectional=True)
    layer.eval()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert type(other) is type(layer)
    assert not other.training
    x = torch.randn(4, 2, 3)
    expected = [leaf.clone() for leaf in leaves(layer(x))]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    for result, value in zip(leaves(other(x)), expected, strict=True):
        assert torch.equal(result, value)


@pytest.mark.parametrize("name", LAYERS)
def test_state_of_a_pickled_torch_layer_is_accepted(name: str) -> None:
    theirs = getattr(nn, name)(3, 5, 2)
    ours = getattr(torchrnn, name).__new__(getattr(torchrnn, name))
    ours.__setstate__(copy.deepcopy(theirs).__getstate__())
    x, exact = torch.randn(4, 2, 3), copy.deepcopy(theirs).double()
    with one_thread():
        assert_close_to_f64(ours(x), theirs(x), exact(x.double()), x.dtype)
    assert "_flat_weights" not in vars(ours)
    assert repr(ours) == repr(theirs)
    ours.reset_parameters()
    assert type(pickle.loads(pickle.dumps(ours))) is type(ours)


def test_state_of_old_torch_versions_is_accepted() -> None:
    lstm = torchrnn.LSTM(3, 5, 2, bidirectional=True)
    expected = lstm(torch.ones(4, 2, 3))[0]
    old = lstm.__getstate__()
    for key in ("proj_size", "_flat_weights_names", "forget_bias"):  # Before 1.8; before 1.4; before ours.
        old.pop(key)
    old["_all_weights"] = [[p.data for p in lstm.parameters()]]
    loaded = torchrnn.LSTM.__new__(torchrnn.LSTM)
    loaded.__setstate__(old)
    assert loaded.proj_size == 0
    assert loaded.forget_bias is None
    assert torch.equal(loaded(torch.ones(4, 2, 3))[0], expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_results_and_gradients_are_those_of_torch(any_path: str, name: str, options: dict[str, Any]) -> None:
    modules = trio(lambda library: getattr(library, name)(3, 5, **options))
    rows = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    x = torch.randn(2, 4, 3) if options.get("batch_first") else torch.randn(4, 2, 3)
    modules.check(x.requires_grad_())
    modules.check(x, state(name, rows, 2, 5, requires_grad=True))


def test_projection_and_relu_are_those_of_torch(any_path: str) -> None:
    x = torch.randn(4, 2, 3, requires_grad=True)
    lstm = trio(lambda library: library.LSTM(3, 5, 2, bidirectional=True, proj_size=2))
    lstm.check(x, (torch.randn(4, 2, 2, requires_grad=True), torch.randn(4, 2, 5, requires_grad=True)))
    trio(lambda library: library.RNN(3, 5, 2, nonlinearity="relu")).check(x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_input(name: str, batch_first: bool) -> None:
    modules = trio(lambda library: getattr(library, name)(3, 5, 2, batch_first=batch_first))
    x = torch.randn(4, 3, requires_grad=True)
    y, _ = modules.check(x)
    assert y.shape == (4, 5)
    modules.check(x, state(name, 2, 5, requires_grad=True))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_batch_of_no_rows(any_path: str, name: str, batch_first: bool) -> None:
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    modules = trio(lambda library: getattr(library, name)(3, 5, **options))
    x = torch.randn((0, 4, 3) if batch_first else (4, 0, 3), requires_grad=True)
    results = modules.ours(x), modules.theirs(x)
    assert [leaf.shape for leaf in leaves(results[0])] == [leaf.shape for leaf in leaves(results[1])]
    for name_, grad in gradients(modules.ours, results[0], x).items():
        assert grad is not None and not grad.any(), name_


@pytest.mark.parametrize("name", LAYERS)
def test_strides_do_not_matter(any_path: str, name: str) -> None:
    modules = trio(lambda library: getattr(library, name)(3, 5, 1, bidirectional=True))
    x = torch.randn(3, 9, 4)[:, ::2].permute(2, 1, 0)[:, :2].requires_grad_()
    h = torch.randn(5, 2, 2).permute(1, 2, 0).requires_grad_()
    assert not x.is_contiguous()
    modules.check(x, (h, h.detach().flip(0).requires_grad_()) if name == "LSTM" else h)
    expanded = torch.randn(1, 1, 3).expand(4, 2, 3)
    modules.check(expanded, modules.theirs(x)[1])


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_of_the_caller_is_modified(any_path: str, name: str) -> None:
    layer = getattr(torchrnn, name)(3, 5, 2, bidirectional=True)
    x, hx = torch.randn(4, 2, 3, requires_grad=True), state(name, 4, 2, 5, requires_grad=True)
    lengths, resets = torch.tensor([2, 4]), torch.rand(4, 2) < 0.5
    tensors = [x, *leaves(hx), lengths, resets, *layer.parameters()]
    before = [tensor.detach().clone() for tensor in tensors]
    gradients(layer, layer(x, hx, lengths=lengths, resets=resets), x, hx)
    for tensor, value in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["parametrize", "new weight_norm", "old weight_norm"])
def test_computed_weights_are_seen_at_every_call(name: str, kind: str) -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    def make(library: Any) -> nn.Module:
        layer = getattr(library, name)(3, 5, 2)
        if kind == "parametrize":
            parametrize.register_parametrization(layer, "weight_hh_l0", Halved())
            parametrize.register_parametrization(layer, "bias_ih_l1", Halved())
        elif kind == "new weight_norm":
            parametrizations.weight_norm(layer, "weight_hh_l0")
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                nn.utils.weight_norm(layer, "weight_hh_l0")
        return layer

    modules = trio(make)
    x = torch.randn(4, 2, 3, requires_grad=True)
    before = modules.check(x)[0]
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.mul_(1.5)
    assert not torch.equal(modules.check(x)[0], before)
    if kind != "old weight_norm":
        torch.testing.assert_close(copy.deepcopy(modules.ours)(x), modules.ours(x), rtol=0, atol=0)


def test_dropped_weights_are_seen_and_get_gradients() -> None:
    lstm = torchrnn.LSTM(3, 5)
    raw = nn.Parameter(lstm.weight_hh_l0.detach().clone())
    del lstm.weight_hh_l0
    lstm.weight_hh_l0_raw = raw
    lstm.weight_hh_l0 = raw * 0.5
    x = torch.randn(4, 2, 3)
    halved = lstm(x)[0]
    halved.sum().backward()
    assert raw.grad is not None and raw.grad.any()
    lstm.weight_hh_l0 = raw * 1.0
    assert not torch.equal(lstm(x)[0], halved)


@pytest.mark.parametrize("name", LAYERS)
def test_functional_call_uses_the_given_parameters(name: str) -> None:
    modules = trio(lambda library: getattr(library, name)(3, 5))
    given = {key: torch.randn_like(value) for key, value in modules.theirs.state_dict().items()}
    x = torch.randn(4, 2, 3)
    before = modules.ours(x)[0]
    ours, theirs = (torch.func.functional_call(module, given, (x,)) for module in modules[:2])
    doubles = {key: value.double() for key, value in given.items()}
    exact = torch.func.functional_call(modules.exact, doubles, (x.double(),))
    assert_close_to_f64(ours, theirs, exact, x.dtype)
    assert torch.equal(modules.ours(x)[0], before)
    assert not torch.equal(ours[0], before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_other_dtypes(any_path: str, name: str, dtype: torch.dtype) -> None:
    modules = trio(lambda library: getattr(library, name)(3, 5), dtype)
    y, _ = modules.check(torch.randn(4, 2, 3, dtype=dtype), dtype=dtype)
    assert y.dtype == dtype


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_autocast_have_the_dtype_of_the_weights(name: str) -> None:
    layer, x = getattr(torchrnn, name)(3, 5), torch.randn(4, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x)
        with pytest.raises(ValueError, match=r"lengths must be \[B\]"):
            layer(x.bfloat16(), lengths=[1])
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_forget_bias_sets_the_forget_gate_only() -> None:
    lstm = torchrnn.LSTM(3, 5, 2, bidirectional=True, forget_bias=1.5)
    torch.manual_seed(0)
    lstm.reset_parameters()
    torch.manual_seed(0)
    plain = torchrnn.LSTM(3, 5, 2, bidirectional=True)
    for (name, ours), theirs in zip(lstm.named_parameters(), plain.parameters(), strict=True):
        expected = theirs.detach().clone()
        if name.startswith("bias"):
            expected[5:10] = 1.5 if name.startswith("bias_ih") else 0
        assert torch.equal(ours, expected), name
    assert repr(lstm) == "LSTM(3, 5, num_layers=2, bidirectional=True, forget_bias=1.5)"
    assert pickle.loads(pickle.dumps(lstm)).forget_bias == 1.5


def test_reset_before_is_the_equation_of_the_paper(any_path: str) -> None:
    gru = torchrnn.GRU(3, 5, reset_after=False).double()
    x, h = torch.randn(4, 2, 3, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)
    y, h_n = gru(x)
    w, r = (weight.chunk(3) for weight in (gru.weight_ih_l0, gru.weight_hh_l0))
    b, b_hh = (bias.chunk(3) for bias in (gru.bias_ih_l0, gru.bias_hh_l0))
    for t in range(4):
        reset, z = (torch.sigmoid(x[t] @ w[k].T + b[k] + h @ r[k].T + b_hh[k]) for k in (0, 1))
        n = torch.tanh(x[t] @ w[2].T + b[2] + (reset * h) @ r[2].T + b_hh[2])
        h = (1 - z) * n + z * h
        torch.testing.assert_close(y[t], h)
    torch.testing.assert_close(h_n[0], h)
    assert "reset_after=False" in repr(gru)


@pytest.mark.parametrize("name", [*LAYERS, "LSTMCell", "GRUCell", "RNNCell", "convert"])
def test_docstring_examples_run(name: str) -> None:
    subject = getattr(torchrnn, name)
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    (example,) = finder.find(subject, name, globs={"torch": torch, "torchrnn": torchrnn})
    assert example.examples
    assert runner.run(example).failed == 0
