"""prepack: the numbers of a model as it is, from weights that are constants; and what ends it.

One file, as all sections count the calls that run on what was packed.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import assert_close_to_f64, leaves, needs_kernels
from every_layer import CELLS, LAYERS, MODULES, example, state
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import torchrnn
from torchrnn import _native, ops, prepack

KERNELS = _native.WHY_NOT is None
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REFUSED = "the weights are prepacked, and constants, so there is no gradient"


class Model(nn.Module):
    """Recurrent layers below other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([torchrnn.GRU(3, 5), nn.Sequential(torchrnn.LSTM(5, 5, 2))])
        self.cell, self.last = torchrnn.LSTMCell(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[1](self.layers[0](x)[0])[0]
        return self.last(self.cell(y[-1])[0])


class Calls:
    """Counts the calls that run on packed weights."""

    def __init__(self) -> None:
        self.count = 0

    def made(self) -> int:
        """Returns how many there were since the last question."""
        count, self.count = self.count, 0
        return count


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found, original = Calls(), ops.layer_packed

    def counted(*args: Any) -> Any:
        found.count += 1
        return original(*args)

    monkeypatch.setattr(ops, "layer_packed", counted)
    return found


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def scale(module: nn.Module, factor: float = 0.5) -> None:
    for p in module.parameters():
        p.mul_(factor)


def frozen(name: str, *args: Any) -> nn.Module:
    return MODULES[name](*(args or (3, 5))).eval().requires_grad_(False)


def results(module: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    with torch.no_grad():
        return leaves(module(*args, **kwargs))


# Numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_numbers_are_those_without(calls: Calls, name: str, dtype: torch.dtype) -> None:
    module = MODULES[name](3, 33).to(dtype).eval()
    exact = copy.deepcopy(module).double()
    for steps, batch in ((1, 1), (5, 3), (12, 40)):
        x = example(module, steps, batch, dtype=dtype)
        hx = state(module, batch, dtype=dtype)
        for given in ((x,), (x, hx)):
            plain, f64 = results(module, *given), results(exact, *_double(given))
            assert calls.made() == 0
            with prepack(module):
                found = [results(module, *given) for _ in range(2)]
            assert (calls.made() > 0) == KERNELS
            assert_close_to_f64(found[0], plain, f64, dtype)
            assert all(map(torch.equal, *found))


def _double(value: Any) -> Any:
    return tuple(map(_double, value)) if isinstance(value, tuple) else value.double()


@pytest.mark.parametrize("name", LAYERS)
def test_numbers_of_every_form_of_a_call(calls: Calls, name: str) -> None:
    layer = LAYERS[name](3, 17).eval()
    x, lengths = example(layer, 6, 4), torch.tensor([3, 0, 6, 1])
    resets = torch.rand(x.shape[:2]) < 0.3
    packed = pack_padded_sequence(x, lengths.clamp(1), layer.batch_first, enforce_sorted=False)
    of_one = leaves(state(layer, 1))
    forms: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {"lengths": lengths}),
        ((x,), {"lengths": lengths.tolist()}),
        ((x,), {"resets": resets}),
        ((x, state(layer, 4)), {"lengths": lengths, "resets": resets}),
        ((packed,), {}),
        ((packed, state(layer, 4)), {}),
        ((x[0],), {}),
        ((x[0], tuple(s.squeeze(1) for s in of_one) if len(of_one) == 2 else of_one[0].squeeze(1)), {}),
        ((x.flip(0)[:, ::2],), {}),
    ]
    for args, kwargs in forms:
        plain = results(layer, *args, **kwargs)
        assert calls.made() == 0
        with prepack(layer):
            found = results(layer, *args, **kwargs)
        assert (calls.made() == layer.num_layers) == KERNELS
        assert_close(found, plain)


@pytest.mark.parametrize("name", CELLS)
def test_numbers_of_a_row_without_a_batch(calls: Calls, name: str) -> None:
    cell = CELLS[name](3, 17)
    x, hx = torch.randn(3), state(cell, 1)
    hx = tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0]
    for given in ((x,), (x, hx)):
        plain = results(cell, *given)
        with prepack(cell):
            assert_close(results(cell, *given), plain)
        assert (calls.made() == 1) == KERNELS


def test_mistakes_read_the_same() -> None:
    layer, cell = torchrnn.GRU(3, 5), torchrnn.LSTMCell(3, 5)
    wrong = [
        (layer, torch.randn(2, 3, 4), None),
        (layer, torch.randn(2, 3, 3).double(), None),
        (layer, torch.randn(2, 3, 3, 1), None),
        (layer, torch.randn(0, 3, 3), None),
        (layer, torch.randn(2, 3, 3), torch.randn(1, 4, 5)),
        (layer, torch.randn(2, 3, 3), torch.randn(1, 3, 5).double()),
        (layer, torch.randn(2, 3, 3), torch.randn(3, 5)),
        (layer, [[1.0]], None),
        (cell, torch.randn(2, 4), None),
        (cell, torch.randn(2, 3), (torch.randn(2, 5), torch.randn(3, 5))),
    ]
    for module, x, hx in wrong:
        texts = []
        with torch.no_grad():
            with pytest.raises(Exception) as plain:
                module(x, hx)
            with prepack(module), pytest.raises(type(plain.value)) as packed:
                module(x, hx)
        texts = [str(plain.value), str(packed.value)]
        assert texts[0] == texts[1]


# Constants ------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("name", MODULES)
def test_weights_are_constants(name: str) -> None:
    module = frozen(name)
    x = example(module)
    expected = results(module, x)
    prepack(module)
    scale(module)
    assert_close(results(module, x), expected)
    assert_close(leaves(module(x)), expected)  # In grad mode too, where nothing requires a gradient.
    with torch.inference_mode():
        assert_close(leaves(module(x)), expected)
    prepack(module)  # Anew, which sees the weights as they are then.
    after = results(module, x)
    assert_close(after, results(copy.deepcopy(module), x))
    assert not torch.allclose(after[0], expected[0])


@needs_kernels
@pytest.mark.parametrize("name", MODULES)
def test_a_gradient_is_refused(name: str) -> None:
    module = frozen(name)
    prepack(module)
    x, hx = example(module), state(module)
    assert not any(result.requires_grad for result in leaves(module(x, hx)))
    for leaf in leaves((x, hx)):
        leaf.requires_grad_()
        with pytest.raises(RuntimeError, match=REFUSED):
            module(x, hx)
        assert not any(result.requires_grad for result in results(module, x, hx))
        leaf.requires_grad_(False)
    for p in module.parameters():
        p.requires_grad_()
        with pytest.raises(RuntimeError, match=REFUSED):
            module(x, hx)
        p.requires_grad_(False)
    module(x, hx)
    module.requires_grad_().train()
    sum(result.sum() for result in leaves(module(x, hx))).backward()
    assert all(p.grad is not None for p in module.parameters())


@needs_kernels
def test_a_gradient_is_refused_whatever_the_layer_does_in_training() -> None:
    for module in (torchrnn.LSTM(3, 5, recompute=True), torchrnn.GRU(3, 5, 2, dropout=0.5)):
        with prepack(module.eval()):
            for kwargs in ({}, {"lengths": [1, 2, 4]}, {"resets": torch.ones(4, 3, dtype=torch.bool)}):
                with pytest.raises(RuntimeError, match=REFUSED):
                    module(example(module), **kwargs)


@needs_kernels
def test_only_the_layers_given_are_constants() -> None:
    model = Model()
    prepack(model.layers[0])
    model.layers[0].requires_grad_(False)
    x = torch.randn(4, 2, 3)
    model(x).sum().backward()  # A frozen encoder below a head that is trained.
    assert all((p.grad is None) == (not p.requires_grad) for p in model.parameters())


# What makes the copy anew, and what drops it --------------------------------------------------------------


def _assign(model: nn.Module, values: dict[str, Tensor]) -> None:
    model.load_state_dict(values, assign=True)


def _some(model: nn.Module, values: dict[str, Tensor]) -> None:
    model.load_state_dict({k: v for k, v in values.items() if "hh" in k}, strict=False)


def _one_by_one(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            own = {k.removeprefix(f"{name}."): v for k, v in values.items() if k.startswith(f"{name}.")}
            module.load_state_dict(own)


def _some_of_one_layer(model: nn.Module, values: dict[str, Tensor]) -> None:
    name = "layers.1.0.weight_ih_l1"
    model.load_state_dict({name: values[name]}, strict=False)


def _swapping(model: nn.Module, values: dict[str, Tensor]) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(values)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize(
    "load",
    [nn.Module.load_state_dict, _assign, _some, _one_by_one, _some_of_one_layer, _swapping],
    ids=lambda load: load.__name__.strip("_"),
)
def test_loading_makes_the_copy_anew(calls: Calls, load: Callable[..., None]) -> None:
    model = Model().eval()
    x = torch.randn(4, 2, 3)
    prepack(model)
    before = results(model, x)
    load(model, {name: value * 2 for name, value in model.state_dict().items()})
    calls.made()
    after = results(model, x)
    assert (calls.made() == 4) == KERNELS  # One, two and one.
    assert_close(after, results(copy.deepcopy(model), x))
    assert not torch.allclose(after[0], before[0])


DROPS: dict[str, Callable[[nn.Module], object]] = {
    "train": lambda model: model.train(),
    "train a part": lambda model: [part.train() for part in model.children()],
    "double": lambda model: model.double(),
    "half": lambda model: model.half(),
    "to dtype": lambda model: model.to(torch.bfloat16),
    "to device": lambda model: model.to("cpu"),
    "cpu": lambda model: model.cpu(),
    "share memory": lambda model: model.share_memory(),
    "to torch": lambda model: torchrnn.convert(model, to="torch"),
    "to torch and back": lambda model: torchrnn.convert(torchrnn.convert(model, to="torch")),
}


@pytest.mark.parametrize("drop", DROPS)
def test_what_drops_the_copy(calls: Calls, drop: str) -> None:
    model = Model().eval()
    prepack(model)
    x = torch.randn(4, 2, 3)
    results(model, x)
    assert (calls.made() > 0) == KERNELS
    DROPS[drop](model)
    scale(model)
    x = x.to(model.last.weight.dtype)
    assert_close(results(model, x), results(copy.deepcopy(model), x))
    assert calls.made() == 0
    assert not any("_prepacked" in vars(module) for module in model.modules())
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_evaluation_does_not_drop_it(calls: Calls) -> None:
    model = Model()
    prepack(model)
    model.eval()
    model.requires_grad_(False)
    model(torch.randn(4, 2, 3))
    assert (calls.made() > 0) == KERNELS


def _saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copy": copy.copy,
    "deep copy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "saved": _saved,
    "averaged": lambda module: torch.optim.swa_utils.AveragedModel(module).module,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["lstm", "gru stacked", "lstm projected", "gru cell", "model"])
def test_copies_come_without(calls: Calls, name: str, how: str) -> None:
    model = Model() if name == "model" else MODULES[name](3, 5)
    prepack(model)
    x = torch.randn(4, 2, 3) if name == "model" else example(model)
    before = results(model, x)
    calls.made()
    twin = COPIES[how](model)
    if name != "model" or how != "copy":  # A shallow copy has the very same modules below it.
        assert_close(results(twin, x), before)
        assert calls.made() == 0
        if how != "copy":
            scale(twin)
            assert not torch.allclose(results(twin, x)[0], before[0])
    assert_close(results(model, x), before)
    assert (calls.made() > 0) == KERNELS


def test_state_dict_and_repr_do_not_show_it() -> None:
    model = Model()
    keys, text = list(model.state_dict()), repr(model)
    prepack(model)
    assert list(model.state_dict()) == keys and repr(model) == text
    assert len(list(model.buffers())) == 0


def test_a_block_ends_it(calls: Calls) -> None:
    model = Model()
    x = torch.randn(4, 2, 3)
    with prepack(model), torch.no_grad():
        model(x)
    assert (calls.made() > 0) == KERNELS
    with pytest.raises(ZeroDivisionError), prepack(model):
        results(model, x)
        raise ZeroDivisionError
    assert (calls.made() > 0) == KERNELS
    scale(model)
    assert_close(results(model, x), results(copy.deepcopy(model), x))
    assert calls.made() == 0
    model(x).sum().backward()
    assert model.cell.weight_hh.grad is not None


def test_blocks_within_blocks(calls: Calls) -> None:
    model = Model()
    x = torch.randn(4, 2, 3)
    expected = results(model, x)
    with prepack(model):
        with prepack(model.layers[1]):
            assert_close(results(model, x), expected)
        assert_close(results(model, x), expected)  # The inner one has ended for the layers of both.
        calls.made()
        scale(model.layers[1])
        after = results(model, x)
        assert (calls.made() == 2) == KERNELS
        assert not torch.allclose(after[0], expected[0])
    assert_close(results(model, x), after)


def test_models_that_hold_no_layer_are_refused() -> None:
    for model in (nn.Linear(3, 3), nn.Sequential(), nn.LSTM(3, 3), torchrnn.rnn_cell.GRUCell(3)):
        name = type(model).__name__
        with pytest.raises(ValueError, match=f"must hold a layer or cell of torchrnn, {name} holds none"):
            prepack(model)


# Weights that are others than those that were packed ------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "gru stacked", "lstm projected", "gru cell"])
def test_functional_call_uses_what_it_is_given(name: str) -> None:
    module = MODULES[name](3, 5)
    x = example(module)
    given = {key: torch.randn_like(value) for key, value in module.state_dict().items()}
    plain, other = results(module, x), MODULES[name](3, 5)
    other.load_state_dict(given)
    with prepack(module):
        assert_close(leaves(functional_call(module, given, (x,))), results(other, x))
        some = dict(list(given.items())[:1])  # One new weight among those that were packed.
        merged = {**module.state_dict(), **some}
        other.load_state_dict(merged)
        with torch.no_grad():
            assert_close(leaves(functional_call(module, some, (x,))), results(other, x))
        assert_close(results(module, x), plain)
        for value in given.values():  # And they may be trained.
            value.requires_grad_()
        sum(y.sum() for y in leaves(functional_call(module, given, (x,)))).backward()
        assert all(value.grad is not None for value in given.values())


@pytest.mark.parametrize("first", [True, False], ids=["packed first", "packed last"])
@pytest.mark.parametrize("how", ["parametrize", "prune", "weight_norm", "replace", "assign", "delete"])
@pytest.mark.parametrize("name", ["lstm", "gru stacked", "gru cell"])
def test_computed_and_replaced_weights_are_used(name: str, how: str, first: bool) -> None:
    class Scaled(nn.Module):
        factor = 0.5

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.factor

    module = MODULES[name](3, 5)
    x, hx, key = example(module), state(module), "weight_hh" if name in CELLS else "weight_hh_l0"
    before, scaled = results(module, x, hx), Scaled()
    if first:
        prepack(module)
    if how == "parametrize":
        parametrize.register_parametrization(module, key, scaled)
    elif how == "prune":
        prune.random_unstructured(module, key, amount=0.5)
    elif how == "weight_norm":
        nn.utils.parametrizations.weight_norm(module, key)
        scale(module.parametrizations, 2)
    elif how in ("replace", "assign"):
        new = nn.Parameter(torch.randn_like(getattr(module, key)))
        if how == "replace":
            setattr(module, key, new)
        else:
            module._parameters[key] = new
    else:
        value = getattr(module, key).detach() * 0.5
        delattr(module, key)
        setattr(module, key, value)
    if not first:
        prepack(module)
    plain = MODULES[name](3, 5)
    for factor in (0.5, 2.0):
        scaled.factor = factor
        values = {k: getattr(module, k).detach() for k in plain.state_dict()}
        plain.load_state_dict(values)
        after = results(module, x, hx)
        assert_close(after, results(plain, x, hx))
        assert not torch.allclose(after[0], before[0])
    if name != "gru stacked" and (first or how in ("parametrize", "prune", "weight_norm")):
        y = leaves(module(x, hx))[0]  # Other weights than those that were packed have a gradient.
        assert y.requires_grad


def test_a_user_s_subclass(calls: Calls) -> None:
    class Doubled(torchrnn.LSTM):
        def forward(self, input: Any, hx: Any = None, **kwargs: Any) -> Any:
            y, hx = super().forward(input * 2, hx, **kwargs)
            return y + 1, hx

    class Cell(torchrnn.GRUCell):
        def __init__(self) -> None:
            super().__init__(3, 5)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, input: Tensor, hx: Any = None) -> Tensor:
            return super().forward(input, hx) * self.scale

    for module in (Doubled(3, 5, 2), Cell()):
        x = example(module)
        plain = results(module, x)
        with prepack(module):
            assert_close(results(module, x), plain)
            assert (calls.made() > 0) == KERNELS
        scale(module)
        assert_close(results(module, x), results(copy.deepcopy(module), x))


def test_autocast_does_without(calls: Calls) -> None:
    layer = torchrnn.LSTM(3, 5)
    x = example(layer)
    with torch.autocast("cpu", torch.bfloat16):
        plain = results(layer, x)
        with prepack(layer):
            found = results(layer, x)
    assert_close(found, plain, rtol=0, atol=0)
    assert calls.made() == 0


@needs_kernels
def test_weights_of_another_instruction_set_are_refused() -> None:
    layer = torchrnn.LSTM(3, 33)
    others = [isa for isa in _native.isas() if isa != _native.isa()]
    if not others:
        return
    prepack(layer)
    with torch.no_grad(), _native.use_isa(others[0]):
        with pytest.raises(RuntimeError, match="packed for another layer, dtype or instruction set"):
            layer(example(layer))
        prepack(layer)
        layer(example(layer))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_mode_that_it_is_made_in_does_not_matter(mode: Any) -> None:
    module = frozen("gru stacked")
    x = example(module)
    expected = results(module, x)
    with mode():
        prepack(module)
    for run in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with run():
            assert_close(leaves(module(x)), expected)
    assert_close(leaves(torch.compile(module, backend="aot_eager")(x)), expected)
    module.train()
    x.requires_grad_()
    leaves(module(x))[0].sum().backward()
    assert x.grad is not None


# Transforms, which the copy has no part in ----------------------------------------------------------------


def transforms(module: Any, v: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Returns functions of an input of a module that differentiate or map it."""

    def output(x: Tensor) -> Tensor:
        return leaves(module(x))[0]

    return {
        "jvp": lambda x: jvp(output, (x,), (v,))[1],
        "grad": grad(lambda x: output(x).square().sum()),
        "jacrev": jacrev(output),
        "vmap": lambda x: vmap(output)(torch.stack([x, v])),
        "grad of vmap": grad(lambda x: vmap(output)(torch.stack([x, 2 * x])).square().sum()),
    }


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["lstm", "gru cell"])
def test_transforms_give_what_they_give_without(name: str, compiled: bool) -> None:
    module = frozen(name).double()
    x, v = (example(module, 2, 2, dtype=torch.float64) for _ in range(2))
    for key, use in transforms(module, v).items():
        expected = use(x)
        assert expected.any()
        with prepack(module):
            torch._dynamo.reset()
            run = torch.compile(use, backend="aot_eager", fullgraph=True) if compiled else use
            assert_close(run(x), expected, msg=lambda text, key=key: f"{key}: {text}")


def test_dual_numbers_give_what_they_give_without() -> None:
    module = frozen("lstm")
    x, v = example(module), example(module)

    def tangent() -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            y = module(torch.autograd.forward_ad.make_dual(x, v))[0]
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    expected = tangent()
    with prepack(module):
        assert_close(tangent(), expected)


# Compilers and recorders ----------------------------------------------------------------------------------


class Graphs:
    """A backend that keeps the names of our ops in the graphs that it gets."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names = [str(node.target) for node in graph.graph.nodes]
        self.found += [name.split(".")[-2] for name in names if name.startswith("torchrnn.")]
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def new(self) -> set[str]:
        """Returns which ops there were since the last question."""
        names, self.found = set(self.found), []
        return names


PACKED = {"layer_packed"} if KERNELS else {"layer"}


@pytest.mark.parametrize("name", MODULES)
def test_a_compiled_model_uses_it_until_it_ends(name: str) -> None:
    module, graphs = MODULES[name](3, 5), Graphs()
    x = example(module)
    compiled = torch.compile(module, backend=graphs, fullgraph=True)
    assert_close(results(compiled, x), results(module, x))
    assert graphs.new() == {"layer"}
    with prepack(module):
        expected = results(module, x)
        assert_close(results(compiled, x), expected)
        assert graphs.new() == PACKED
        module.load_state_dict({key: value * 2 for key, value in module.state_dict().items()})
        expected = results(module, x)
        assert_close(results(compiled, x), expected)
        assert_close(expected, results(copy.deepcopy(module), x))
    scale(module)
    assert_close(results(compiled, x), results(copy.deepcopy(module), x))
    prepack(module)
    assert_close(results(compiled, x), results(copy.deepcopy(module), x))
    module.train()
    scale(module)
    assert_close(results(compiled, x), results(copy.deepcopy(module), x))
    leaves(compiled(x))[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_compiled_model_of_many_layers() -> None:
    model, graphs = Model(), Graphs()
    x = torch.randn(4, 2, 3)
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    for block in range(3):
        with prepack(model):
            for steps, batch in ((4, 2), (6, 3)):
                x = torch.randn(steps, batch, 3)
                assert_close(results(compiled, x), results(copy.deepcopy(model), x))
            if block == 0:
                assert graphs.new() == PACKED
            scale(model)
        assert_close(results(compiled, x), results(copy.deepcopy(model), x))


def test_a_compiled_block() -> None:
    # The block itself is a part of what is compiled.
    layer = torchrnn.GRU(3, 5)
    x = example(layer)

    def use(x: Tensor) -> Tensor:
        with torch.no_grad():
            before = layer(x)[0]
            with prepack(layer):
                inside = layer(x)[0]
            return before + 2 * inside + layer(x)[0]

    compiled = torch.compile(use, backend="aot_eager")
    for _ in range(2):
        assert_close(compiled(x), 4 * results(layer, x)[0])
        scale(layer)
    assert "_prepacked" not in vars(layer)


def test_one_function_compiled_for_models_with_and_without() -> None:
    models = [torchrnn.GRU(3, 5) for _ in range(3)]
    x = example(models[0])

    @torch.compile(backend="aot_eager", fullgraph=True)
    def use(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)[0]

    prepack(models[1])
    for _ in range(2):
        for model in models:
            expected = results(copy.deepcopy(model), x)[0]
            with torch.no_grad():
                assert_close(use(model, x), expected)
        prepack(models[2])
        models[1].train()
        for model in models[:2]:
            scale(model)


@pytest.mark.parametrize("name", ["lstm", "gru stacked", "gru cell"])
def test_functional_call_in_a_compiled_function(name: str) -> None:
    module, other = MODULES[name](3, 5), MODULES[name](3, 5)
    x = example(module)
    prepack(module)
    mine = results(module, x)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def use(weights: dict[str, Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return leaves(functional_call(module, weights, (x,))), leaves(module(x))

    for _ in range(2):
        with torch.no_grad():
            given, own = use(dict(other.state_dict()), x)
        assert_close(given, results(other, x))
        assert_close(own, mine)
        scale(other)


@needs_kernels
def test_a_compiled_model_refuses_a_gradient() -> None:
    layer = torchrnn.LSTM(3, 5)
    compiled = torch.compile(layer, backend="aot_eager")
    x = example(layer)
    with prepack(layer), pytest.raises(RuntimeError, match="the weights are prepacked, and constants"):
        compiled(x)
    compiled(x)[0].sum().backward()
    assert layer.weight_hh_l0.grad is not None


# torch.jit.trace is deprecated and warns of each size that is compared.
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["lstm", "gru stacked", "gru cell"])
def test_recorded_programs_do_not_hold_it(name: str) -> None:
    module = MODULES[name](3, 5)
    x = example(module)
    prepack(module)
    with torch.no_grad():
        exported = torch.export.export(module, (x,), strict=False)
        strict = torch.export.export(module, (x,), strict=True)
        traced, graph = torch.jit.trace(module, (x,)), make_fx(lambda x: leaves(module(x)))(x)
    for nodes in (exported.graph.nodes, strict.graph.nodes, graph.graph.nodes):
        names = {str(node.target) for node in nodes if "torchrnn" in str(node.target)}
        assert names and names <= {"torchrnn.layer.default", "torchrnn.layer_infer.default"}
    assert "layer_packed" not in str(traced.inlined_graph)
    scale(module)
    plain = results(copy.deepcopy(module), x)
    assert_close(results(traced, x), plain)
    for program in (exported, strict):
        own = program.module()
        own.load_state_dict(module.state_dict())
        assert_close(results(own, x), plain)


def test_op_keeps_the_dispatchers_contract() -> None:
    if not KERNELS:
        return
    for name in ("lstm", "gru stacked", "lstm projected"):
        layer = LAYERS[name](3, 5)
        directions = 2 if layer.bidirectional else 1
        prepack(layer)
        packed = layer._prepacked[0]
        h, c = (*leaves(state(layer)), None)[:2]
        states = [None if s is None else s[:directions].contiguous() for s in (h, c)]
        args = (torch.randn(4, 3, 3), packed.data, *states, torch.tensor([4, 0, 2]), None, *packed.scalars)
        torch.library.opcheck(torch.ops.torchrnn.layer_packed.default, args)


# Without kernels ------------------------------------------------------------------------------------------


def test_without_kernels_nothing_changes() -> None:
    program = """
import torch, torchrnn
assert torchrnn.info()["why_not"] == "TORCHRNN_PURE is set"
for module in (torchrnn.LSTM(3, 5, 2, recompute=True), torchrnn.GRUCell(3, 5)):
    x = torch.randn(4, 2, 3)[: 4 if isinstance(module, torch.nn.RNNBase) else 1].squeeze(0)
    with torch.no_grad():
        before = module(x)[0]
        with torchrnn.prepack(module):
            assert torch.equal(module(x)[0], before)
            for p in module.parameters():
                p.mul_(2)
            assert not torch.equal(module(x)[0], before)
    torchrnn.prepack(module)
    y = module(x)[0]
    assert isinstance(module, torch.nn.RNNCellBase) or "Recomputed" in y.grad_fn.name()
    y.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    module.load_state_dict(module.state_dict())
    assert not any(vars(module).get("_prepacked", ()))
"""
    subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "TORCHRNN_PURE": "1"}, check=True, timeout=240
    )


def test_weights_on_another_device_stay_as_they_are() -> None:
    layer = torchrnn.LSTM(3, 5, device="meta")
    prepack(layer)
    y, _ = layer(torch.randn(4, 2, 3, device="meta"))
    assert y.requires_grad
