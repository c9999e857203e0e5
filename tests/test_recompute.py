"""recompute=True: the same results and gradients from a fraction of the saved memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import rebuild, trio
from test_ops import arguments, vary
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import torchrnn
from torchrnn import ops, recompute
from torchrnn.options import CELLS, Options


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "CHUNK_ROWS", 7)


def both(a: Any, options: Options) -> list[list[Tensor]]:
    """Returns outputs and all gradients, computed without and with recomputation."""
    found = []
    for layer in (ops.layer, recompute.layer):
        outputs = [out for out in layer(a, options) if out is not None and out.numel() > 0]
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(out.shape, generator=generator, dtype=out.dtype) for out in outputs]
        loss = sum((out * w).sum() for out, w in zip(outputs, weights, strict=True))
        wanted = [v for v in a.differentiable if v.requires_grad]
        found.append([*outputs, *torch.autograd.grad(loss, wanted)])
    return found


@pytest.mark.parametrize("resets", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("lengths", [None, [11, 0, 5]], ids=["", "lengths"])
@pytest.mark.parametrize("directions", [1, 2, -1], ids=["forward", "both", "reverse"])
@pytest.mark.parametrize("cell", [*CELLS, "projected"])
def test_results_and_gradients_are_those_of_the_plain_layer(
    cell: str, directions: int, lengths: list[int] | None, resets: bool
) -> None:
    projection, cell = (2, "lstm") if cell == "projected" else (0, cell)
    a = arguments(
        cell,
        (11, 3, 5, 4),
        abs(directions),
        projection,
        lengths=None if lengths is None else torch.tensor(lengths),
        resets=torch.rand(11, 3) < 0.3 if resets else None,
    )
    for plain, again in zip(*both(a, Options(cell, reverse=directions < 0)), strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize(
    "variation",
    ["peephole", "sigmoid", "norm", "cell_clip", "proj_clip", "mask_h", "mask_c once", "zoneout_h"],
)
def test_no_variation_is_lost(variation: str) -> None:
    a, options = vary(arguments("lstm", (11, 3, 5, 4), 1, 3 if variation == "proj_clip" else 0), variation)
    for plain, again in zip(*both(a, options), strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("without", ["x", "h0", "c0", "weight_hh"])
def test_inputs_may_be_constant_or_absent(without: str) -> None:
    a = arguments("lstm", (11, 3, 5, 4))
    if without in {"h0", "c0"}:
        a = a._replace(**{without: None})
    elif without == "x":
        a = a._replace(x=a.x.detach())
    else:
        a = a._replace(weight_hh=[a.weight_hh[0].detach()])
    for plain, again in zip(*both(a, Options("lstm")), strict=True):
        torch.testing.assert_close(again, plain)


def test_second_derivatives_are_right() -> None:
    a = arguments("gru", (9, 2, 3, 2))

    def layer(*values: Tensor) -> tuple[Tensor, ...]:
        y, _, h_n, _ = recompute.layer(rebuild(a, values), Options("gru"))
        return y, h_n

    assert torch.autograd.gradcheck(layer, a.differentiable, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, a.differentiable, fast_mode=True)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_module_matches_torch(name: str, dtype: torch.dtype) -> None:
    def make(namespace: Any) -> torch.nn.Module:
        extra = {"recompute": True} if namespace is torchrnn else {}
        return getattr(namespace, name)(5, 33, num_layers=2, bidirectional=True, **extra)

    found = trio(make, dtype)
    assert "recompute=True" in repr(found.ours)
    found.check(torch.randn(13, 4, 5).to(dtype).requires_grad_(), dtype=dtype)


def test_little_is_kept_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "CHUNK_ROWS", 64)
    x = torch.randn(256, 4, 16)

    def kept(module: torch.nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            alive = module(x)  # As long as it lives, no two tensors have the same address.
        assert alive[0].requires_grad
        return sum(sizes.values())

    assert 3 * kept(torchrnn.LSTM(16, 32, recompute=True)) < kept(torchrnn.LSTM(16, 32))


def test_compilers_and_transforms_go_the_plain_way() -> None:
    module = torchrnn.GRU(3, 4, recompute=True)
    x = torch.randn(5, 2, 3)
    y = module(x)[0]
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], y)
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (row.unsqueeze(1),))[0].sum()

    single = torch.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, x)
    whole = torch.autograd.grad(y.sum(), list(parameters.values()))
    for name, gradient in zip(parameters, whole, strict=True):
        torch.testing.assert_close(single[name].sum(0), gradient)


@pytest.mark.parametrize("number", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_what_is_not_finite_does_not_cross_a_reset(name: str, number: float) -> None:
    """Of both directions and at every place of the reset within the chunks of steps."""
    for at in range(1, 9):
        # The resets cut off step `at`, and the backward direction those before it.
        resets = torch.zeros(9, 3, dtype=torch.bool)
        resets[at] = True
        for bad, read in ((at - 1, slice(at, None)), (at, slice(0, at))):
            x = torch.randn(9, 3, 3)
            x[bad, 1] = number
            found = []
            for again in (False, True):
                torch.manual_seed(0)
                layer = getattr(torchrnn, name)(3, 4, bidirectional=True, recompute=again)
                wanted = x.clone().requires_grad_()
                y, _ = layer(wanted, resets=resets)
                (dx,) = torch.autograd.grad(y[read].sum(), wanted)
                assert y[read].isfinite().all()
                assert dx[read].isfinite().all()
                found.append(dx[read])
            torch.testing.assert_close(*found)


@pytest.mark.parametrize("again", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("state", ["training", "evaluation", "prepacked"])
@pytest.mark.parametrize("form", ["batch", "one row", "packed", "lengths"])
def test_a_state_that_is_none_is_refused_as_by_torch(form: str, state: str, again: bool) -> None:
    shape = (3,) if form == "one row" else (2, 3)
    x: Any = torch.randn(5, *shape)
    extras = {"lengths": [5, 2]} if form == "lengths" else {}
    if form == "packed":
        x = pack_padded_sequence(x, torch.tensor([5, 2]))
    h = torch.zeros(1, *shape[:-1], 4)
    ours = torchrnn.LSTM(3, 4, recompute=again).train(state == "training")
    theirs = torch.nn.LSTM(3, 4)
    if state == "prepacked":
        torchrnn.prepack(ours.requires_grad_(False))
    for hx, grad in itertools.product(((h, None), (None, h), (None, None)), (True, False)):
        with torch.set_grad_enabled(grad and state != "prepacked"):
            problems = []
            for layer, given in ((ours, extras), (theirs, {})):
                with pytest.raises((AttributeError, TypeError)) as problem:
                    layer(x, hx, **given)
                problems.append(problem)
        assert problems[0].type is problems[1].type
        assert str(problems[0].value) == str(problems[1].value)


def test_mistakes_are_named_as_in_the_plain_layer() -> None:
    with pytest.raises(TypeError, match="recompute should be a bool, got: int"):
        torchrnn.LSTM(3, 4, recompute=1)
    module = torchrnn.LSTM(3, 4, recompute=True)
    with pytest.raises(
        RuntimeError, match=r"input\.size\(-1\) must be equal to input_size\. Expected 3, got 5"
    ):
        module(torch.randn(2, 3, 5))
