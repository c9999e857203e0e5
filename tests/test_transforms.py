"""Transforms, forward mode and batched backward passes: the numbers that loops of plain calls give.

One file, as the subjects and what is expected of them serve all sections.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import every_layer
import pytest
import torch
from conftest import leaves
from every_layer import example, state
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as loop_hessian
from torch.autograd.functional import jacobian as loop_jacobian
from torch.func import (
    functional_call,
    grad,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.testing import assert_close

import torchrnn
from torchrnn import recompute
from torchrnn.dropout import dropout
from torchrnn.rnn_cell import (
    DropoutWrapper,
    GRUCell,
    IndRNNCell,
    IndyGRUCell,
    IndyLSTMCell,
    LSTMCell,
    MultiRNNCell,
    SRUCell,
)

Function = Callable[[Tensor], Tensor]

pytestmark = pytest.mark.filterwarnings(
    "ignore:Attempted to insert a get_attr Node"
)  # torch's, of linearize.


class Unrolled(nn.Module):
    """A cell of TensorFlow over a sequence [B, T, I], rows of different lengths."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell = cell
        cell.build(2, torch.float64)
        for p in cell.parameters():
            nn.init.normal_(p)

    def forward(self, x: Tensor) -> Any:
        return torchrnn.dynamic_rnn(self.cell, x, [1, 2], dtype=x.dtype)


class Dropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, 0.6).sin()


def alive(module: nn.Module) -> nn.Module:
    """Returns a module none of whose units a relu turns off."""
    for name, p in module.named_parameters():
        if "bias" in name:
            nn.init.uniform_(p, 0.5, 1)
    return module.double()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda make=make: alive(make(2, 3)) for name, make in every_layer.MODULES.items()},
    "lstm recomputed": lambda: torchrnn.LSTM(2, 3, recompute=True).double(),
    "gru recomputed": lambda: torchrnn.GRU(2, 3, bidirectional=True, recompute=True).double(),
    "lstm with dropout": lambda: torchrnn.LSTM(2, 3, 2, dropout=0.4).double(),
}
UNROLLED: dict[str, Callable[[], nn.Module]] = {
    "tf lstm": lambda: Unrolled(LSTMCell(2, use_peepholes=True, cell_clip=2.0)),
    "tf gru": lambda: Unrolled(GRUCell(2)),
    "tf indrnn": lambda: Unrolled(IndRNNCell(2)),
    "tf indy gru": lambda: Unrolled(IndyGRUCell(2)),
    "tf indy lstm": lambda: Unrolled(IndyLSTMCell(2)),
    "tf sru": lambda: Unrolled(SRUCell(2)),
    "tf dropout": lambda: Unrolled(DropoutWrapper(LSTMCell(2), 0.6, 0.7, 0.8)),
    "tf variational": lambda: Unrolled(
        DropoutWrapper(GRUCell(2), 0.6, 0.7, 0.8, True, input_size=2, dtype=torch.float64)
    ),
    "tf stack": lambda: Unrolled(MultiRNNCell([GRUCell(2), IndRNNCell(2)])),
    "dropout": Dropped,
}
SUBJECTS = {**LAYERS, **UNROLLED}
RANDOM = {"lstm with dropout", "tf dropout", "tf variational", "dropout"}


def subjects(*often: str) -> list[Any]:
    """Returns the names of all subjects; those that are not named here are left to the slow tests."""
    assert SUBJECTS.keys() >= set(often)
    return [name if name in often else pytest.param(name, marks=pytest.mark.slow) for name in SUBJECTS]


MANY = subjects(
    "lstm", "gru", "gru before", "rnn relu", "lstm projected", "lstm cell", "gru cell", "rnn cell",
    "lstm recomputed", "gru recomputed", "tf lstm", "tf gru", "tf indrnn", "tf sru", *RANDOM,
)  # fmt: skip
EACH_MODE = pytest.mark.parametrize(
    ("trainable", "mode"),
    [
        pytest.param(False, torch.no_grad, id="frozen"),
        pytest.param(True, torch.enable_grad, id="trainable"),
        pytest.param(False, torch.enable_grad, id="frozen with grad", marks=pytest.mark.slow),
        pytest.param(True, torch.no_grad, id="trainable without grad", marks=pytest.mark.slow),
    ],
)


def inputs(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns three inputs of a module."""
    if isinstance(module, Unrolled | Dropped):
        return tuple(torch.randn(2, 2, 2, dtype=torch.float64) for _ in range(3))
    return tuple(example(module, 2, 2, dtype=torch.float64) for _ in range(3))


def everything(results: Any) -> Tensor:
    """Returns outputs and states in one vector."""
    return torch.cat([result.flatten() for result in leaves(results)])


def outputs_of(module: nn.Module) -> Function:
    """Returns a module as a function of which each result counts."""
    return lambda x: everything(module(x))


def score(y: Tensor) -> Tensor:
    """Returns a number that depends on everything, each in its own way."""
    return (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sin().sum()


def again(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that draws the same random numbers at every call."""

    def call(*args: Any) -> Any:
        torch.manual_seed(5)
        return function(*args)

    return call


def mapped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    return vmap(function, *args, randomness="same", **kwargs)


# Each transform, of an output or a score, and what loops of plain calls make of the same.
USES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "jvp": (
        lambda f, x, v, w: jvp(f, (x,), (v,))[1],
        lambda f, x, v, w: _product(loop_jacobian(f, x), v),
    ),
    "jacfwd": (
        lambda f, x, v, w: jacfwd(f, randomness="same")(x),
        lambda f, x, v, w: loop_jacobian(f, x),
    ),
    "jacrev": (lambda f, x, v, w: jacrev(f)(x), lambda f, x, v, w: loop_jacobian(f, x)),
    "grad": (
        lambda f, x, v, w: grad(lambda x: score(f(x)))(x),
        lambda f, x, v, w: loop_jacobian(lambda x: score(f(x)), x),
    ),
    "vjp": (
        lambda f, x, v, w: vjp(lambda x: score(f(x)), x)[1](torch.ones((), dtype=x.dtype))[0],
        lambda f, x, v, w: loop_jacobian(lambda x: score(f(x)), x),
    ),
    "linearize": (
        lambda f, x, v, w: linearize(f, x)[1](v),
        lambda f, x, v, w: _product(loop_jacobian(f, x), v),
    ),
    "vmap": (
        lambda f, x, v, w: mapped(f)(torch.stack([x, v, w])),
        lambda f, x, v, w: torch.stack([f(x), f(v), f(w)]),
    ),
    "vmap of vmap": (
        lambda f, x, v, w: mapped(mapped(f), 1)(torch.stack([x, v, w]).unsqueeze(0)),
        lambda f, x, v, w: torch.stack([f(x), f(v), f(w)]).unsqueeze(1),
    ),
    "vmap of grad": (
        lambda f, x, v, w: mapped(grad(lambda x: score(f(x))))(torch.stack([x, v, w])),
        lambda f, x, v, w: torch.stack([loop_jacobian(lambda x: score(f(x)), each) for each in (x, v, w)]),
    ),
    "grad of vmap": (
        lambda f, x, v, w: grad(lambda x: score(mapped(f)(torch.stack([x, 2 * x]))))(x),
        lambda f, x, v, w: loop_jacobian(lambda x: score(torch.stack([f(x), f(2 * x)])), x),
    ),
    "vmap of jvp": (
        lambda f, x, v, w: mapped(lambda x, v: jvp(f, (x,), (v,))[1])(
            torch.stack([x, v]), torch.stack([v, w])
        ),
        lambda f, x, v, w: torch.stack([_product(loop_jacobian(f, a), b) for a, b in ((x, v), (v, w))]),
    ),
    "hessian": (
        lambda f, x, v, w: jacfwd(jacrev(lambda x: score(f(x))), randomness="same")(x),
        lambda f, x, v, w: loop_hessian(lambda x: score(f(x)), x),
    ),
    "jacrev of jacrev": (
        lambda f, x, v, w: jacrev(jacrev(lambda x: score(f(x))))(x),
        lambda f, x, v, w: loop_hessian(lambda x: score(f(x)), x),
    ),
    "jvp of grad": (
        lambda f, x, v, w: jvp(grad(lambda x: score(f(x))), (x,), (v,))[1],
        lambda f, x, v, w: _product(loop_hessian(lambda x: score(f(x)), x), v),
    ),
}


def _product(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix * v).flatten(-v.dim()).sum(-1)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_uses(module: nn.Module, run: Callable[..., Any], names: list[str]) -> None:
    """Asserts that what ``run`` makes of each transform of a module is right."""
    x, v, w = inputs(module)
    f = outputs_of(module)
    for name in names:
        use, loop = USES[name]
        expected = again(lambda *args, loop=loop: loop(again(f), *args))(x, v, w).detach()
        assert expected.any(), name
        found = again(run(lambda *args, use=use: use(f, *args)))(x, v, w)
        assert_close(found.detach(), expected, msg=lambda text, name=name: f"{name}: {text}")


@EACH_MODE
@pytest.mark.parametrize("name", MANY)
def test_transforms(name: str, trainable: bool, mode: Any) -> None:
    uses = [use for use in USES if use != "linearize" or name not in RANDOM]  # Which draws more than once.
    assert_uses(SUBJECTS[name]().requires_grad_(trainable), mode(), uses)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend="aot_eager", fullgraph=True)


COMPILED = ["jvp", "jacfwd", "jacrev", "grad", "vmap", "vmap of grad", "hessian", "jvp of grad"]


@EACH_MODE
@pytest.mark.parametrize("use", COMPILED)
@pytest.mark.parametrize("name", subjects("gru"))
def test_transforms_in_compiled_functions(name: str, use: str, trainable: bool, mode: Any) -> None:
    module = SUBJECTS[name]().requires_grad_(trainable)
    assert_uses(module, lambda function: mode()(compiled(function)), [use])


@EACH_MODE
@pytest.mark.parametrize("name", subjects("lstm", "lstm cell", "lstm with dropout", "tf lstm", "dropout"))
def test_a_compiled_function_of_several_transforms(name: str, trainable: bool, mode: Any) -> None:
    module = SUBJECTS[name]().requires_grad_(trainable)
    x, v, w = inputs(module)
    f = outputs_of(module)

    def several(x: Tensor, v: Tensor, w: Tensor) -> dict[str, Tensor]:
        return {use: USES[use][0](f, x, v, w) for use in ("jvp", "grad", "vmap")}

    # One after the other in both cases, so that random numbers are drawn alike.
    with mode():
        expected, found = again(several)(x, v, w), again(compiled(several))(x, v, w)
    assert_close(found, expected)
    assert all(value.any() for value in found.values())


@pytest.mark.parametrize("name", ["lstm", "gru cell", "tf gru"])
def test_a_mapped_model_compiles_with_dynamic_sizes(name: str) -> None:
    module = SUBJECTS[name]()
    mapped = vmap(outputs_of(module))
    run = torch.compile(mapped, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (3, 5):
        x = torch.stack([inputs(module)[0] for _ in range(count)])
        assert_close(run(x), mapped(x))


# Weights, states, lengths and resets ----------------------------------------------------------------------


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def eager_and_compiled(first: str, *others: str) -> Any:
    """Parametrizes a test by name and way; what takes long to compile is left to the slow tests."""
    rows = [pytest.param(name, eager, id=name) for name in (first, *others)]
    rows += [pytest.param(name, compiled, id=f"{name} compiled", marks=pytest.mark.slow) for name in others]
    return pytest.mark.parametrize(
        ("name", "run"), [*rows, pytest.param(first, compiled, id=f"{first} compiled")]
    )


@eager_and_compiled("lstm", "gru stacked", "rnn", "gru cell", "lstm recomputed", "tf lstm", "tf sru")
def test_gradients_of_each_sample(name: str, run: Callable[..., Any]) -> None:
    module = SUBJECTS[name]()
    if isinstance(module, Unrolled):
        module.forward = lambda x: torchrnn.dynamic_rnn(module.cell, x, dtype=x.dtype)
    at = 1 if isinstance(module, nn.RNNBase) and not module.batch_first else 0
    weights = {key: value.detach() for key, value in module.named_parameters()}

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return score(everything(functional_call(module, weights, (row.unsqueeze(at),))))

    x = inputs(module)[0]
    found = run(vmap(grad(loss), in_dims=(None, at)))(weights, x)
    for i, row in enumerate(x.unbind(at)):
        module.zero_grad()
        score(everything(module(row.unsqueeze(at)))).backward()
        for key, p in module.named_parameters():
            assert_close(found[key][i], p.grad, msg=lambda text, key=key: f"{key}: {text}")


@eager_and_compiled("gru before", "lstm projected", "rnn cell", "tf lstm", "tf indy gru")
def test_derivatives_by_weights(name: str, run: Callable[..., Any]) -> None:
    module = SUBJECTS[name]()
    x = inputs(module)[0]
    weights = {key: value.detach() for key, value in module.named_parameters()}
    direction = {key: torch.randn_like(value) for key, value in weights.items()}

    def output(weights: dict[str, Tensor]) -> Tensor:
        return everything(functional_call(module, weights, (x,)))

    def uses(weights: dict[str, Tensor], direction: dict[str, Tensor]) -> list[Any]:
        by_reverse = jacrev(output)(weights)
        _, tangent = jvp(output, (weights,), (direction,))
        _, product = jvp(grad(lambda weights: score(output(weights))), (weights,), (direction,))
        return [by_reverse, tangent, product]

    by_reverse, tangent, product = run(uses)(weights, direction)
    names = list(weights)

    def of_tuple(*values: Tensor) -> Tensor:
        return output(dict(zip(names, values, strict=True)))

    values = tuple(weights.values())
    jacobian = dict(zip(names, loop_jacobian(of_tuple, values), strict=True))
    _, products = torch.autograd.functional.hvp(
        lambda *values: score(of_tuple(*values)), values, tuple(direction.values())
    )
    assert_close(by_reverse, jacobian)
    assert_close(tangent, sum(_product(jacobian[key], direction[key]) for key in names))
    assert_close(product, dict(zip(names, products, strict=True)))


@eager_and_compiled("lstm", "gru stacked", "gru cell", "tf lstm", "tf indrnn")
def test_an_ensemble(name: str, run: Callable[..., Any]) -> None:
    models = [SUBJECTS[name]() for _ in range(3)]
    weights, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0])

    def call(weights: Any, buffers: Any, x: Tensor) -> Tensor:
        return everything(functional_call(base, (weights, buffers), (x,)))

    xs = torch.stack(inputs(models[0]), 1)
    with torch.no_grad():
        same = run(vmap(call, in_dims=(0, 0, None)))(weights, buffers, xs[:, 0])
        each = run(vmap(call, in_dims=(0, 0, 1), out_dims=1))(weights, buffers, xs)
        for i, model in enumerate(models):
            assert_close(same[i], everything(model(xs[:, 0])))
            assert_close(each[:, i], everything(model(xs[:, i])))


@eager_and_compiled("lstm", "gru stacked", "lstm projected", "rnn")
def test_vmap_over_any_argument(name: str, run: Callable[..., Any]) -> None:
    layer = LAYERS[name]()
    x, hx = example(layer, 3, 2, dtype=torch.float64), state(layer, 2, dtype=torch.float64)
    both = isinstance(hx, tuple)
    full = {
        "x": (x, torch.stack([x, -x, 2 * x], 1), 1),
        "h": (leaves(hx)[0], torch.randn(*leaves(hx)[0].shape, 3, dtype=x.dtype), -1),
        "c": (leaves(hx)[-1], torch.randn(3, *leaves(hx)[-1].shape, dtype=x.dtype), 0),
        "lengths": (torch.tensor([3, 1]), torch.tensor([[3, 1], [0, 2], [2, 3]]), 0),
        "resets": (torch.rand(x.shape[:2]) < 0.5, torch.rand(3, *x.shape[:2]) < 0.5, 0),
    }
    names = [key for key in full if both or key != "c"]

    def call(*args: Tensor) -> Tensor:
        given = dict(zip(names, args, strict=True))
        hx = (given["h"], given["c"]) if both else given["h"]
        return everything(layer(given["x"], hx, lengths=given["lengths"], resets=given["resets"]))

    for chosen in (*([name] for name in names), names) if run is eager else (["h", "lengths"], names):
        dims = tuple(full[name][2] if name in chosen else None for name in names)
        args = [full[name][1 if name in chosen else 0] for name in names]
        found = run(vmap(call, in_dims=dims, out_dims=1))(*args)
        rows = [
            [a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)] for i in range(3)
        ]
        assert_close(found, torch.stack([call(*row) for row in rows], 1))
    if run is eager:
        chunked = vmap(call, in_dims=dims, chunk_size=2)(*args)
        assert_close(chunked, found.T)


def test_vmap_draws_as_it_is_told() -> None:
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    x[:] = x[0]
    for name in ("lstm with dropout", "tf dropout", "dropout"):
        module = SUBJECTS[name]()
        f = outputs_of(module)
        same, different = (vmap(f, randomness=kind)(x[:, :2]) for kind in ("same", "different"))
        assert all(torch.equal(row, same[0]) for row in same), name
        assert not any(torch.equal(row, different[0]) for row in different[1:]), name
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(f)(x[:, :2])
        if name != "dropout":  # Which has no mode.
            assert_close(vmap(outputs_of(module.eval()))(x[:, :2])[1], f(x[1, :2]))


# Dual numbers ---------------------------------------------------------------------------------------------


def tangents(function: Callable[..., Tensor], *pairs: tuple[Tensor, Tensor | None]) -> Tensor:
    """Returns the tangent of a function of numbers, some of which have one."""
    with forward_ad.dual_level():
        args = [value if v is None else forward_ad.make_dual(value, v) for value, v in pairs]
        tangent = forward_ad.unpack_dual(function(*args)).tangent
    assert tangent is not None
    return tangent


@EACH_MODE
@pytest.mark.parametrize("name", MANY)
def test_dual_numbers(name: str, trainable: bool, mode: Any) -> None:
    module = SUBJECTS[name]().requires_grad_(trainable)
    x, v, _ = inputs(module)
    f = again(outputs_of(module))
    expected = _product(loop_jacobian(f, x), v)
    assert expected.any()
    with mode():
        assert_close(tangents(f, (x, v)).detach(), expected)
        x.requires_grad_()
        assert_close(tangents(f, (x, v)).detach(), expected)


@pytest.mark.parametrize("name", MANY)
def test_dual_numbers_of_gradients(name: str) -> None:
    module = SUBJECTS[name]()
    x, v, _ = inputs(module)
    f = again(outputs_of(module))
    expected = _product(loop_hessian(lambda x: score(f(x)), x), v)
    x.requires_grad_()

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(score(f(x)), x)[0]

    assert_close(tangents(gradient, (x, v)), expected)


@pytest.mark.parametrize("name", MANY)
def test_dual_numbers_of_incoming_gradients(name: str) -> None:
    module = SUBJECTS[name]()
    x = inputs(module)[0].requires_grad_()
    y = again(outputs_of(module))(x)
    dy, v = torch.randn_like(y), torch.randn_like(y)
    for create_graph in (False, True):

        def gradient(dy: Tensor, create_graph: bool = create_graph) -> Tensor:
            return torch.autograd.grad(y, x, dy, retain_graph=True, create_graph=create_graph)[0]

        expected = gradient(v)
        assert_close(tangents(gradient, (dy, v)), expected)
        assert expected.any() and expected.requires_grad == create_graph


@pytest.mark.parametrize(
    "name", ["lstm", "gru stacked", "lstm projected", "rnn", "lstm recomputed", "lstm cell", "gru cell"]
)
def test_dual_numbers_of_states_and_weights(name: str) -> None:
    module = LAYERS[name]()
    x, hx = example(module, 2, 2, dtype=torch.float64), state(module, 2, dtype=torch.float64)
    names = [key for key, _ in module.named_parameters()]
    values = [*leaves(hx), *(p.detach() for p in module.parameters())]
    count = len(leaves(hx))

    def call(*values: Tensor) -> Tensor:
        hx = tuple(values[:count]) if count > 1 else values[0]
        weights = dict(zip(names, values[count:], strict=True))
        return everything(functional_call(module, weights, (x, hx)))

    jacobians = loop_jacobian(call, tuple(values))
    directions = [torch.randn_like(value) for value in values]
    products = [_product(j, v) for j, v in zip(jacobians, directions, strict=True)]
    for i in range(len(values)):
        pairs = [(value, directions[j] if j == i else None) for j, value in enumerate(values)]
        assert_close(tangents(call, *pairs), products[i])
    assert_close(tangents(call, *zip(values, directions, strict=True)), sum(products))


# Batched backward passes ----------------------------------------------------------------------------------


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "CHUNK_ROWS", 2)  # One step at a time.


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("name", MANY)
def test_batched_backward_passes(name: str, trainable: bool) -> None:
    module = SUBJECTS[name]().requires_grad_(trainable)
    f = again(outputs_of(module))
    x = inputs(module)[0]
    jacobian = loop_jacobian(f, x)
    assert_close(loop_jacobian(f, x, vectorize=True), jacobian)
    assert_close(loop_jacobian(f, x, vectorize=True, create_graph=True).detach(), jacobian)
    expected, modes = loop_hessian(lambda x: score(f(x)), x), ["reverse-mode"]
    if name not in RANDOM:  # They may not draw inside that vmap.
        assert_close(loop_jacobian(f, x, vectorize=True, strategy="forward-mode"), jacobian)
        modes.append("forward-mode")
    for outer in modes:
        found = loop_hessian(lambda x: score(f(x)), x, vectorize=True, outer_jacobian_strategy=outer)
        assert_close(found, expected)
    x.requires_grad_()
    y = f(x)
    eye = torch.eye(y.numel(), dtype=y.dtype)
    (rows,) = torch.autograd.grad(y, x, eye, is_grads_batched=True, retain_graph=True)
    assert_close(rows, jacobian)
    (rows,) = vmap(lambda row: torch.autograd.grad(y, x, row, retain_graph=True))(eye)
    assert_close(rows, jacobian)
    if trainable and list(module.parameters()):
        weights = list(module.parameters())
        batched = torch.autograd.grad(y, weights, eye, is_grads_batched=True, retain_graph=True)
        for i, row in enumerate(eye):
            single = torch.autograd.grad(y, weights, row, retain_graph=True)
            assert_close([each[i] for each in batched], list(single))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("name", MANY)
def test_gradcheck_with_all_that_it_can_check(name: str) -> None:
    module = SUBJECTS[name]()
    f, x = again(outputs_of(module)), inputs(module)[0].requires_grad_()
    weights = list(module.named_parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        given = {key: value for (key, _), value in zip(weights, values, strict=True)}
        return again(lambda: everything(functional_call(module, given, (x,))))()

    values = (x, *(p.detach().requires_grad_() for _, p in weights))
    may_draw = name not in RANDOM
    assert torch.autograd.gradcheck(
        f, x, check_batched_grad=True, check_forward_ad=True, check_batched_forward_grad=may_draw
    )
    assert torch.autograd.gradcheck(call, values, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(
        f, x, check_batched_grad=True, check_fwd_over_rev=True, check_rev_over_rev=True
    )
