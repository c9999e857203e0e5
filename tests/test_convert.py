"""``convert`` swaps layers and cells in place and leaves everything else as it is."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import leaves, one_thread
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import torchrnn
from torchrnn import rnn_cell

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


def use(module: nn.Module, x: Tensor) -> None:
    """Trains and infers, whereby a module may keep something."""
    sum(leaf.sum() for leaf in leaves(module(x))).backward()
    module.zero_grad()
    with torch.no_grad():
        for _ in range(2):
            module(x)


def saved(module: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(module, file)
    return file.getvalue()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["converted", "built"])
def test_nothing_of_ours_is_left(name: str, how: str) -> None:
    plain = getattr(nn, name)(3, 5)
    module, x = getattr(nn, name)(3, 5), torch.randn(30, 3) if name.endswith("Cell") else torch.randn(9, 4, 3)
    if how == "built":
        extras = {"forget_bias": 1.0} if name.startswith("LSTM") else {}
        extras |= {} if name.endswith("Cell") else {"recompute": True}
        module = getattr(torchrnn, name)(3, 5, **extras)
    else:
        torchrnn.convert(module)
    use(module, x)
    torchrnn.convert(module, to="torch")
    assert vars(module).keys() == vars(plain).keys()
    assert repr(module) == repr(plain)
    assert b"torchrnn" not in saved(nn.Sequential(module))
    use(module, x)
    before = dict(vars(module))
    use(torchrnn.convert(module), x)
    torchrnn.convert(module, to="torch")
    assert vars(module) == before


def test_what_was_saved_loads_without_torchrnn(tmp_path: Path) -> None:
    model = torchrnn.convert(nn.ModuleList([nn.LSTM(3, 5, 2, bidirectional=True), nn.GRUCell(3, 5)]))
    inputs = torch.randn(9, 4, 3), torch.randn(4, 3)
    for module, x in zip(model, inputs, strict=True):
        use(module, x)
    torchrnn.convert(model, to="torch")
    torch.save(
        (model, inputs, [run(module, x) for module, x in zip(model, inputs, strict=True)]), tmp_path / "all"
    )
    code = """
import sys, torch
sys.modules["torchrnn"] = None
torch.set_num_threads(1)
model, inputs, expected = torch.load(sys.argv[1], weights_only=False)
(y, (h, c)), state = (module(x) for module, x in zip(model, inputs))
assert all(torch.equal(a, b) for a, b in zip((y, h, c, state), sum(expected, [])))
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path / "all")], check=True)


def old_weight_norm(module: nn.Module, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module, name)


@pytest.mark.parametrize(
    "change",
    [
        prune.identity,
        lambda module, name: prune.l1_unstructured(module, name, amount=0.3),
        old_weight_norm,
        nn.utils.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.orthogonal,
    ],
    ids=["identity", "pruned", "old weight_norm", "spectral_norm", "weight_norm", "orthogonal"],
)
@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_changed_weights_survive_both_ways(name: str, change: Callable[[nn.Module, str], object]) -> None:
    module = getattr(nn, name)(3, 5).eval()
    change(module, "weight_hh" if name.endswith("Cell") else "weight_hh_l0")
    x = torch.randn(30, 3) if name.endswith("Cell") else torch.randn(9, 4, 3)
    expected, keys, state = run(module, x), vars(module).keys(), list(module.state_dict())
    torchrnn.convert(module)
    use(module, x)
    assert_close(run(module, x), expected)
    torchrnn.convert(module, to="torch")
    assert vars(module).keys() == keys
    assert list(module.state_dict()) == state
    assert_close(run(module, x), expected)
    if not parametrize.is_parametrized(module):  # Which torch does not pickle.
        assert b"torchrnn" not in saved(module)


@pytest.mark.parametrize("name", NAMES[:3])
def test_what_torch_keeps_of_its_layers_is_there_again(name: str) -> None:
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    x = torch.randn(4, 9, 3)
    layer, plain = getattr(torchrnn, name)(3, 5, **options), getattr(nn, name)(3, 5, **options)
    plain.load_state_dict(layer.state_dict())
    use(layer, x)
    torchrnn.convert(layer, to="torch")
    for module in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(a is b for a, b in zip(module._flat_weights, module.parameters(), strict=True))
        assert all(ref() is p for ref, p in zip(module._flat_weight_refs, module.parameters(), strict=True))
        assert module._all_weights == plain._all_weights
        module.flatten_parameters()
        assert all(torch.equal(a, b) for a, b in zip(run(module, x), run(plain, x), strict=True))
        module.double().float()
        assert all(torch.equal(a, b) for a, b in zip(run(module, x), run(plain, x), strict=True))
        zeros = {key: torch.zeros_like(value) for key, value in plain.state_dict().items()}
        assert not torch.func.functional_call(module, zeros, (x,))[0].any()
        module.weight_ih_l0 = nn.Parameter(torch.zeros_like(module.weight_ih_l0))
        assert module._flat_weights[0] is module.weight_ih_l0


def test_cells_of_tensorflow_are_named() -> None:
    model = nn.Sequential(torchrnn.GRU(3, 5), rnn_cell.LSTMCell(5))
    torchrnn.convert(model)
    with pytest.warns(UserWarning, match=r"no sure counterpart: 1 \(torchrnn\.rnn_cell\.\w+\.LSTMCell\)$"):
        torchrnn.convert(model, to="torch")
    assert type(model[0]) is nn.GRU


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
