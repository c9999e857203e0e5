"""``convert`` swaps layers and cells in place and leaves everything else as it is."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from conftest import leaves, one_thread
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import torchrnn

NAMES = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]


class OwnLSTM(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return super().forward(input * 2, hx)


def run(module: Any, x: Tensor) -> list[Tensor]:
    with one_thread():
        return [leaf.detach() for leaf in leaves(module(x))]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_itself_and_back(name: str) -> None:
    module = getattr(nn, name)(3, 5).eval()
    x = torch.randn(2, 3) if name.endswith("Cell") else torch.randn(4, 2, 3)
    expected, parameters = run(module, x), list(module.parameters())
    keys, text = list(module.state_dict()), repr(module)
    assert torchrnn.convert(module) is module
    assert type(module) is getattr(torchrnn, name)
    assert_close(run(module, x), expected)
    assert_close(run(pickle.loads(pickle.dumps(module)), x), expected)
    assert torchrnn.convert(module, to="torchrnn") is module
    assert torchrnn.convert(module, to="torch") is module
    assert type(module) is getattr(nn, name)
    assert all(torch.equal(a, b) for a, b in zip(run(module, x), expected, strict=True))
    assert_close(run(pickle.loads(pickle.dumps(module)), x), expected)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert list(module.state_dict()) == keys
    assert repr(module) == text
    assert not module.training
    assert not {"forget_bias", "reset_after"} & set(vars(module))


def test_nested_shared_and_contained_modules() -> None:
    shared = nn.GRU(3, 3)
    model = nn.Module()
    model.first = nn.Sequential(nn.Linear(3, 3), nn.ModuleList([shared, nn.LSTM(3, 3)]))
    model.second = nn.ModuleDict({"cell": nn.GRUCell(3, 3), "again": shared})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parameters = dict(model.named_parameters())
    assert torchrnn.convert(model) is model
    kinds = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
    assert kinds["first.0"] is nn.Linear
    assert kinds["first.1.0"] is kinds["second.again"] is torchrnn.GRU
    assert model.first[1][0] is model.second["again"] is shared
    assert kinds["first.1.1"] is torchrnn.LSTM
    assert kinds["second.cell"] is torchrnn.GRUCell
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    shared(torch.randn(4, 2, 3))[0].sum().backward()
    before = shared.weight_ih_l0.detach().clone()
    optimizer.step()
    assert not torch.equal(shared.weight_ih_l0, before)


def test_hooks_buffers_and_modes_are_kept() -> None:
    lstm = nn.LSTM(3, 5, batch_first=True)
    lstm.register_buffer("mark", torch.ones(2))
    lstm.note = "kept"
    calls = []
    handle = lstm.register_forward_hook(lambda *_: calls.append("forward"))
    lstm.register_forward_pre_hook(lambda *_: calls.append("before"))
    lstm.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    lstm.weight_hh_l0.requires_grad_(False)
    torchrnn.convert(lstm)
    lstm(torch.randn(2, 4, 3))
    lstm.load_state_dict(lstm.state_dict())
    assert calls == ["before", "forward", "load"]
    handle.remove()
    lstm(torch.randn(2, 4, 3))
    assert calls == ["before", "forward", "load", "before"]
    assert lstm.note == "kept"
    assert "mark" in lstm.state_dict()
    assert lstm.training
    assert not lstm.weight_hh_l0.requires_grad


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_parametrized_modules(name: str) -> None:
    module = getattr(nn, name)(3, 5)
    weight = "weight_hh" if name.endswith("Cell") else "weight_hh_l0"
    parametrizations.weight_norm(module, weight)
    x = torch.randn(2, 3) if name.endswith("Cell") else torch.randn(4, 2, 3)
    expected, parameters = run(module, x), list(module.parameters())
    torchrnn.convert(module)
    assert isinstance(module, getattr(torchrnn, name))
    assert type(module).__name__ == f"Parametrized{name}"
    assert_close(run(module, x), expected)
    assert_close(run(copy.deepcopy(module), x), expected)
    torchrnn.convert(module, to="torch")
    assert not isinstance(module, getattr(torchrnn, name))
    assert_close(run(module, x), expected)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    torchrnn.convert(module)
    parametrize.remove_parametrizations(module, weight)
    assert type(module) is getattr(torchrnn, name)
    assert_close(run(module, x), expected)


def test_weights_replaced_before_and_after_are_seen() -> None:
    lstm = nn.LSTM(3, 5)
    torchrnn.convert(lstm)
    for name in list(lstm.state_dict()):
        setattr(lstm, name, nn.Parameter(torch.zeros_like(getattr(lstm, name))))
    assert not lstm(torch.randn(4, 2, 3))[0].any()
    torchrnn.convert(lstm, to="torch")
    assert not lstm(torch.randn(4, 2, 3))[0].any()


def test_subclasses_of_users_are_left_alone_and_named() -> None:
    model = nn.Sequential(OwnLSTM(3, 5), nn.GRU(3, 5), nn.Sequential(OwnLSTM(3, 5)), nn.RNN(3, 5))
    model[3].forward = lambda x: x
    with pytest.warns(UserWarning) as caught:
        torchrnn.convert(model)
    assert len(caught) == 1
    text = str(caught[0].message)
    own = f"{OwnLSTM.__module__}.OwnLSTM"
    assert f"0 ({own}), 2.0 ({own}), 3 (torch.nn.modules.rnn.RNN)" in text
    assert caught[0].filename == __file__
    assert [type(module) for module in model] == [OwnLSTM, torchrnn.GRU, nn.Sequential, nn.RNN]

    class OwnGRU(torchrnn.GRU):
        pass

    model = nn.Sequential(OwnGRU(3, 5), torchrnn.GRU(3, 5), OwnLSTM(3, 5))
    with pytest.warns(UserWarning, match=r"0 \(.*OwnGRU\)$"):
        torchrnn.convert(model, to="torch")
    assert [type(module) for module in model] == [OwnGRU, nn.GRU, OwnLSTM]
    with pytest.warns(UserWarning, match=r"\(root\) \(.*OwnLSTM\)"):
        torchrnn.convert(OwnLSTM(3, 5))


@pytest.mark.parametrize("kind", [torchrnn.GRU, torchrnn.GRUCell])
def test_what_torch_cannot_express_changes_nothing(kind: Any) -> None:
    model = nn.Sequential(torchrnn.LSTM(3, 5), nn.Sequential(kind(3, 5, reset_after=False)))
    with pytest.raises(ValueError, match=r"cannot express reset_after=False, as 1\.0 has"):
        torchrnn.convert(model, to="torch")
    assert type(model[0]) is torchrnn.LSTM
    assert type(model[1][0]) is kind


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="to must be 'torchrnn' or 'torch', got 'keras'"):
        torchrnn.convert(nn.LSTM(3, 5), to="keras")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got type"):
        torchrnn.convert(nn.LSTM)


def test_script_modules_are_left_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.script(nn.Sequential(nn.LSTM(3, 5)))
        kinds = [type(module) for module in script.modules()]
        model = torchrnn.convert(nn.Sequential(script, nn.LSTM(3, 5)))
        assert [type(module) for module in script.modules()] == kinds
    assert type(model[1]) is torchrnn.LSTM
