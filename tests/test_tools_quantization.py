"""``torch.ao.quantization`` makes of our layers and cells what it makes of those of ``torch.nn``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization as ao
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.nn.utils import parametrizations

import torchrnn
from torchrnn import rnn_cell

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (  # Of torch.ao.quantization, about itself.
        "torch.ao.quantization is deprecated",
        "torch.quantize_per_tensor",
        "To copy construct from a tensor",
        "Please use quant_min and quant_max",
    )
]

NAMES = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, 2, bidirectional=True)
        self.inner = nn.Sequential(nn.Linear(8, 4), nn.GRU(4, 4))
        self.rnn = nn.RNN(4, 4)
        self.cells = nn.ModuleList(
            [nn.LSTMCell(4, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4, nonlinearity="relu")]
        )

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.inner(self.lstm(x)[0])
        y, _ = self.rnn(y)
        h, _ = self.cells[0](y[-1])
        return self.cells[2](self.cells[1](h))


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def check(quantize: Callable[[nn.Module], nn.Module], left: set[str] | None = None) -> dict[str, type]:
    """Asserts that a converted model is quantized as before, to the last bit, and returns the classes.

    Args:
        quantize: What is done to each model.
        left: Which modules stay ours; None if what is not quantized need not.
    """
    theirs = Model().eval()
    ours = torchrnn.convert(copy.deepcopy(theirs))
    before = kinds(ours)
    expected, found = quantize(theirs), quantize(ours)
    assert found is ours or kinds(ours) == before
    for name, kind in kinds(expected).items():
        ours_too = kind.__module__ == "torch.nn.modules.rnn" and kinds(found)[name].__name__ == kind.__name__
        assert name == "" or kinds(found)[name] is kind or ours_too
    if left is not None:
        assert {
            name for name, module in found.named_modules() if "torchrnn" in type(module).__module__
        } == left
    # Back to torch.nn's, so that what was not quantized rounds alike.
    x = torch.randn(5, 2, 3)
    assert torch.equal(torchrnn.convert(found, to="torch")(x), expected(x))
    return kinds(found)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_dynamic_by_default(dtype: torch.dtype, inplace: bool) -> None:
    found = check(lambda model: ao.quantize_dynamic(model, dtype=dtype, inplace=inplace), {"rnn"})
    dynamic = torch.ao.nn.quantized.dynamic
    assert found["lstm"] is dynamic.LSTM
    assert found["inner.1"] is dynamic.GRU
    assert [found[f"cells.{i}"] for i in range(3)] == [dynamic.LSTMCell, dynamic.GRUCell, dynamic.RNNCell]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("library", [nn, torchrnn])
def test_dynamic_by_class(name: str, library: Any) -> None:
    """A class of torch.nn stands for ours too; one of ours only for itself."""

    def quantize(model: nn.Module) -> nn.Module:
        kind = getattr(library if type(model.lstm) is torchrnn.LSTM else nn, name)
        return ao.quantize_dynamic(model, {kind})

    found = check(quantize)
    assert ("quantized" in str(list(found.values()))) is (name != "RNN")
    mixed = nn.Sequential(getattr(nn, name)(3, 4), getattr(torchrnn, name)(3, 4))
    quantized = ao.quantize_dynamic(mixed, {getattr(torchrnn, name): ao.default_dynamic_qconfig})
    assert type(quantized[0]) is getattr(nn, name)
    both = {getattr(torchrnn, name): None, getattr(nn, name): ao.default_dynamic_qconfig}
    assert type(ao.quantize_dynamic(mixed, both)[1]) is getattr(torchrnn, name)


@pytest.mark.parametrize(
    "spec",
    [
        {"lstm", "cells.1"},
        {"inner": ao.default_dynamic_qconfig, "inner.1": ao.float16_dynamic_qconfig},
        {"": ao.default_dynamic_qconfig, "lstm": None},
        {nn.LSTM: ao.default_dynamic_qconfig, "lstm": None},
    ],
    ids=["names", "inherited", "all but", "class but"],
)
def test_dynamic_by_name(spec: Any) -> None:
    check(lambda model: ao.quantize_dynamic(model, spec))


def test_dynamic_with_a_mapping() -> None:
    class Mine(torch.ao.nn.quantized.dynamic.LSTM):
        pass

    found = check(lambda model: ao.quantize_dynamic(model, {nn.LSTM}, mapping={nn.LSTM: Mine}))
    assert found["lstm"] is torch.ao.nn.quantized.dynamic.LSTM


def test_conversion_of_what_has_a_qconfig_already() -> None:
    def quantize(model: nn.Module) -> nn.Module:
        model.lstm.qconfig = model.cells[1].qconfig = ao.default_dynamic_qconfig
        return ao.convert(model, ao.get_default_dynamic_quant_module_mappings(), inplace=True)

    check(quantize, {"inner.1", "rnn", "cells.0", "cells.2"})
    refused = nn.Sequential(torchrnn.GRU(3, 4, reset_after=False))
    refused[0].qconfig = ao.default_dynamic_qconfig
    with pytest.raises(ValueError, match="no quantized form"):
        ao.convert(refused, ao.get_default_dynamic_quant_module_mappings())


def test_a_mapping_of_ours() -> None:
    class Mine(nn.Module):
        @classmethod
        def from_float(cls, module: nn.Module) -> nn.Module:
            assert type(module) is torchrnn.LSTM
            return cls()

    model = nn.Sequential(torchrnn.LSTM(3, 4))
    model[0].qconfig = ao.default_dynamic_qconfig
    assert type(ao.convert(model, {torchrnn.LSTM: Mine})[0]) is Mine


def test_a_shared_module_and_hooks() -> None:
    shared = torchrnn.LSTM(3, 4).eval()
    calls: list[str] = []
    shared.register_forward_pre_hook(lambda *_: calls.append("before"))
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    quantized = ao.quantize_dynamic(model)
    x = torch.randn(5, 2, 3)
    assert type(quantized["a"]) is type(quantized["b"][0]) is torch.ao.nn.quantized.dynamic.LSTM
    assert torch.equal(quantized["a"](x)[0], quantized["b"](x)[0])
    assert calls == ["before", "before"]
    assert "qconfig" not in vars(shared)


def test_static_preparation() -> None:
    def prepare(model: nn.Module) -> nn.Module:
        model.qconfig = ao.get_default_qconfig("x86")
        model.rnn.qconfig = None
        return ao.prepare(model)

    theirs = prepare(Model().eval())
    ours = prepare(torchrnn.convert(Model()).eval())
    assert {**kinds(ours), "rnn": nn.RNN} == kinds(theirs)
    assert type(ours.lstm) is torch.ao.nn.quantizable.LSTM


def test_quantization_aware_training() -> None:
    def prepare(model: nn.Module) -> nn.Module:
        model.qconfig = ao.get_default_qat_qconfig("x86")
        return ao.prepare_qat(model.train())

    assert kinds(prepare(torchrnn.convert(Model()))) == kinds(prepare(Model()))


_DYNAMIC = ao.default_dynamic_qconfig


@pytest.mark.parametrize(
    "mapping",
    [
        ao.get_default_qconfig_mapping("x86"),
        ao.QConfigMapping().set_global(_DYNAMIC),
        ao.QConfigMapping().set_object_type(nn.LSTM, _DYNAMIC).set_object_type(nn.GRUCell, _DYNAMIC),
        ao.QConfigMapping().set_module_name("inner.1", _DYNAMIC),
        ao.QConfigMapping().set_module_name_regex("cells.*", _DYNAMIC),
    ],
    ids=["static", "global", "class", "name", "regex"],
)
def test_graphs(mapping: ao.QConfigMapping) -> None:
    x = torch.randn(5, 2, 3)

    def quantize(model: nn.Module) -> nn.Module:
        prepared = prepare_fx(model, mapping, (x,))
        prepared(x)
        return convert_fx(prepared)

    check(quantize, set())


def test_graphs_with_cells_of_tensorflow() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = rnn_cell.GRUCell(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torchrnn.dynamic_rnn(self.cell, x, dtype=torch.float32)[0])

    model, x = Tagger().eval(), torch.randn(2, 5, 3)
    quantized = convert_fx(prepare_fx(model, ao.QConfigMapping().set_global(_DYNAMIC), (x,)))
    assert "quantized" in type(quantized.out).__module__
    y, _ = torchrnn.dynamic_rnn(model.cell, x, dtype=x.dtype)
    assert torch.equal(quantized(x), quantized.out(y))


def test_graphs_keep_what_torch_does_not_take() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.gru = torchrnn.LSTM(3, 4), torchrnn.GRU(4, 4, reset_after=False)
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.out(self.gru(self.rnn(x, lengths=lengths)[0])[0])

    model, args = Tagger().eval(), (torch.randn(5, 2, 3), torch.tensor([5, 2]))
    mapping = ao.QConfigMapping().set_object_type(nn.Linear, _DYNAMIC)
    quantized = convert_fx(prepare_fx(model, mapping, args))
    assert type(quantized.rnn) is torchrnn.LSTM
    assert type(quantized.gru) is torchrnn.GRU
    assert "quantized" in type(quantized.out).__module__
    y, _ = model.gru(model.rnn(args[0], lengths=args[1])[0])
    assert torch.equal(quantized(*args), quantized.out(y))
    with pytest.raises(ValueError, match=r"name classes of torch\.nn, which stand for those of torchrnn too"):
        prepare_fx(model, ao.QConfigMapping().set_object_type(torchrnn.LSTM, _DYNAMIC), args)


@pytest.mark.parametrize(
    "module",
    [
        torchrnn.GRU(3, 4, reset_after=False),
        torchrnn.GRUCell(3, 4, reset_after=False),
        torchrnn.LSTM(3, 4, proj_size=2),
    ],
    ids=str,
)
def test_what_has_no_quantized_form_is_refused(module: nn.Module) -> None:
    model = nn.Sequential(nn.Sequential(copy.deepcopy(module)))
    with pytest.raises(
        ValueError, match=r"no quantized form of \w+\(3, 4, .*; to leave it as it is, set its qconfig"
    ):
        ao.quantize_dynamic(model)
    assert type(model[0][0]) is type(module)
    model[0][0].qconfig = None
    assert type(ao.quantize_dynamic(model)[0][0]) is type(module)
    models, x = [nn.Sequential(copy.deepcopy(module)) for _ in range(2)], torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match="no quantized form"):
        prepare_fx(models[0], ao.QConfigMapping().set_global(_DYNAMIC), (x,))
    prepared = prepare_fx(models[1], ao.get_default_qconfig_mapping("x86"), (x,))
    assert type(prepared.get_submodule("0")) is type(module)


def test_what_only_training_knows_is_left_out() -> None:
    lstm = torchrnn.LSTM(3, 4, recompute=True, forget_bias=1.0)
    x = torch.randn(5, 2, 3)
    plain = nn.LSTM(3, 4)
    plain.load_state_dict(lstm.state_dict())
    ours, theirs = (ao.quantize_dynamic(nn.Sequential(each)) for each in (lstm, plain))
    assert torch.equal(ours(x)[0], theirs(x)[0])


def test_subclasses_and_parametrized_modules_are_treated_as_those_of_torch() -> None:
    class Own(torchrnn.LSTM):
        pass

    assert type(ao.quantize_dynamic(nn.Sequential(Own(3, 4)))[0]) is Own
    for library in (nn, torchrnn):
        model = nn.Sequential(library.LSTM(3, 4))
        parametrizations.weight_norm(model[0], "weight_hh_l0")
        with pytest.raises(AssertionError, match=r"only works for nn\.LSTM"):
            ao.quantize_dynamic(model)
