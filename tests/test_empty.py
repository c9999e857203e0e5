"""Sizes of 0: no rows, no inputs, no units, no projected outputs. What torch.nn gives, and the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import leaves, one_thread
from test_ops import arguments
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import torchrnn
from torchrnn import ops, recompute, reference, scan
from torchrnn.options import CELLS, Options
from torchrnn.reference import Arguments

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def outcome(call: Callable[..., Any], *args: Any) -> list[Tensor] | tuple[type, str]:
    """Returns the tensors that a call gives, or what it raises."""
    try:
        return leaves(call(*args))
    except Exception as error:
        return type(error), str(error)


def with_gradients(results: Any, wanted: Sequence[Tensor]) -> list[Tensor]:
    """Returns results and gradients; where there is none, zeros."""
    outputs = [out for out in leaves(results) if out.requires_grad]
    weights = [torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype) for out in outputs]
    found = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
    grads = [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]
    return [*leaves(results), *grads]


def assert_same(ours: Any, theirs: Any, label: str) -> None:
    """Asserts that two outcomes are the same numbers or the same error."""
    if isinstance(ours, tuple) or isinstance(theirs, tuple):
        assert ours == theirs, label
        return
    # torch.nn rounds to bfloat16 within a step, where ours does so at the end of the call.
    is_half = any(t.dtype == torch.bfloat16 for t in ours)
    near = {"rtol": 2**-5, "atol": 2**-5} if is_half else {}
    torch.testing.assert_close(ours, theirs, msg=lambda text: f"{label}: {text}", **near)


# The modules ----------------------------------------------------------------------------------------------


def random_state(name: str, *shape: int, dtype: torch.dtype) -> Any:
    h = torch.randn(shape, dtype=dtype, requires_grad=True)
    return (h, torch.randn_like(h, requires_grad=True)) if name.startswith("LSTM") else h


def _learnt(module: nn.Module, x: Any, hx: Any, wanted: Sequence[Tensor]) -> list[Tensor]:
    return with_gradients(module(x, hx), wanted)


def assert_like_torch(ours: nn.Module, theirs: nn.Module, x: Any, hx: Any, label: str) -> None:
    """Asserts results of both grad modes, and all gradients."""
    data = x.data if isinstance(x, PackedSequence) else x
    wanted = [data.requires_grad_(), *([] if hx is None else leaves(hx))]
    found = []
    for module in (ours, theirs):
        with torch.no_grad():
            inferred = outcome(module, x, hx)
        learnt = outcome(_learnt, module, x, hx, [*wanted, *module.parameters()])
        found.append((inferred, learnt))
    assert_same(found[0][0], found[1][0], f"{label} without gradients")
    assert_same(found[0][1], found[1][1], label)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell", "relu"])
def test_cells_give_what_torch_gives(path: str, name: str, dtype: torch.dtype) -> None:
    extras = {"nonlinearity": "relu"} if name == "relu" else {}
    kind = "RNNCell" if name == "relu" else name
    for batch, inputs, hidden, bias in itertools.product((0, 2, None), (0, 3), (0, 4), (True, False)):
        theirs = getattr(nn, kind)(inputs, hidden, bias, dtype=dtype, **extras)
        ours = getattr(torchrnn, kind)(inputs, hidden, bias, dtype=dtype, **extras)
        ours.load_state_dict(theirs.state_dict())
        rows = () if batch is None else (batch,)
        for hx in (None, random_state(name, *rows, hidden, dtype=dtype)):
            label = f"B={batch} I={inputs} H={hidden} bias={bias} state={hx is not None}"
            assert_like_torch(ours, theirs, torch.randn(*rows, inputs, dtype=dtype), hx, label)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_without_units_refuse_what_torch_refuses(name: str) -> None:
    for ours, theirs in ((getattr(lib, name)(3, 0) for lib in (torchrnn, nn)),):
        for x, rows in ((torch.randn(2, 5), 2), (torch.randn(2, 3), 3), (torch.randn(5), 1)):
            hx = random_state(name, rows, 0, dtype=torch.float32)
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    assert_same(*(outcome(m, x, hx) for m in (ours, theirs)), f"{rows} {grad}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["LSTM", "projected LSTM", "GRU", "RNN"])
def test_layers_give_what_torch_gives(path: str, name: str, dtype: torch.dtype) -> None:
    kind = name.rpartition(" ")[2]
    extras = {"proj_size": 2} if name.startswith("projected") else {}
    for layers, both, first, steps in itertools.product((1, 3), (False, True), (False, True), (0, 4)):
        options = {"num_layers": layers, "bidirectional": both, "batch_first": first, **extras}
        theirs = getattr(nn, kind)(3, 5, dtype=dtype, **options)
        ours = getattr(torchrnn, kind)(3, 5, dtype=dtype, **options)
        ours.load_state_dict(theirs.state_dict())
        h = torch.randn(layers * (1 + both), 0, 2 if extras else 5, dtype=dtype, requires_grad=True)
        c = torch.randn(layers * (1 + both), 0, 5, dtype=dtype, requires_grad=True)
        shape = (0, steps) if first else (steps, 0)
        for hx in (None, (h, c) if kind == "LSTM" else h):
            label = f"{options} T={steps} state={hx is not None}"
            assert_like_torch(ours, theirs, torch.randn(*shape, 3, dtype=dtype), hx, label)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_sizes_of_0_are_refused_as_by_torch(name: str) -> None:
    for call in (
        lambda lib: getattr(lib, name)(0, 4),
        lambda lib: getattr(lib, name)(3, 0),
        lambda lib: getattr(lib, name)(3, 4, 0),
        lambda lib: getattr(lib, name)(3, 4)(torch.zeros(0, 2, 3)),
        lambda lib: getattr(lib, name)(3, 4)(torch.zeros(0, 3)),
        lambda lib: getattr(lib, name)(3, 4)(torch.zeros(2, 0)),
        lambda lib: getattr(lib, name)(3, 4)(torch.zeros(2, 2, 0)),
        lambda lib: getattr(lib, name)(3, 4)(
            PackedSequence(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
        ),
        lambda lib: pack_padded_sequence(torch.zeros(3, 0, 3), torch.zeros(0, dtype=torch.int64)),
    ):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                ours, theirs = (outcome(call, lib) for lib in (torchrnn, nn))
            assert isinstance(theirs, tuple)
            assert ours == theirs


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("again", [False, True], ids=["", "recompute"])
def test_no_rows_with_lengths_and_resets(path: str, name: str, again: bool) -> None:
    layer = getattr(torchrnn, name)(3, 5, 2, bidirectional=True, recompute=again)
    x = torch.randn(4, 0, 3, requires_grad=True)
    extras = {"lengths": torch.zeros(0, dtype=torch.int64), "resets": torch.zeros(4, 0, dtype=torch.bool)}
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, hx = layer(x, **extras)
        assert y.shape == (4, 0, 10)
        assert all(state.shape == (4, 0, 5) for state in leaves(hx))
    found = with_gradients(layer(x, **extras), [x, *layer.parameters()])
    assert not any(tensor.any() for tensor in found)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_rows_of_no_steps(path: str, name: str) -> None:
    layer = getattr(torchrnn, name)(3, 5, bidirectional=True)
    hx = random_state(name, 2, 2, 5, dtype=torch.float32)
    y, ended = layer(torch.full((4, 2, 3), torch.nan), hx, lengths=[0, 0])
    assert not y.any()
    assert all(map(torch.equal, leaves(ended), leaves(hx)))
    grads = with_gradients((y, ended), [*leaves(hx), *layer.parameters()])
    assert not any(grad.isnan().any() for grad in grads)


# The ops --------------------------------------------------------------------------------------------------

# Inputs as wide as several panels too: what is full is multiplied as it lies.
SIZES = [s for s in itertools.product((1, 3), (0, 2), (0, 3, 130), (0, 5), (None, 0, 2)) if 0 in s]
VARIATIONS: list[tuple[str, ...]] = [(), ("peephole", "cell_clip"), ("mask_h", "mask_c"), ("norm",)]


def of_sizes(
    cell: str, sizes: tuple[int, int, int, int, int | None], directions: int, dtype: torch.dtype
) -> Arguments:
    """As ``arguments``, where the projection may be of size 0."""
    steps, batch, inputs, hidden, outputs = sizes
    a = arguments(cell, (steps, batch, inputs, hidden), directions, 0, dtype)
    if outputs is None:
        return a

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    rows, each = CELLS[cell].gates * hidden, range(directions)
    return a._replace(
        weight_hh=[new(rows, outputs) for _ in each],
        weight_hr=[new(outputs, hidden) for _ in each],
        h0=new(directions, batch, outputs),
    )


def varied(a: Arguments, names: Sequence[str], cell: str) -> tuple[Arguments, Options]:
    steps, batch, _ = a.x.shape
    directions, outputs = len(a.weight_hh), a.weight_hh[0].size(1)
    hidden = a.weight_hh[0].size(0) // CELLS[cell].gates

    def new(*shape: int) -> list[Tensor]:
        return [torch.rand(shape, dtype=a.x.dtype).requires_grad_() for _ in range(directions)]

    options = Options(cell)
    for name in names:
        if name == "peephole":
            a = a._replace(peephole=new(3, hidden))
        elif name == "norm":
            a = a._replace(norm_gain=new(5, hidden), norm_shift=new(5, hidden))
        elif name == "cell_clip":
            options = replace(options, cell_clip=0.5)
        elif name == "mask_h":
            a = a._replace(mask_h=torch.rand(directions, steps, batch, outputs, dtype=a.x.dtype))
        elif CELLS[cell].memory:
            a = a._replace(mask_c=torch.rand(directions, 1, batch, hidden, dtype=a.x.dtype))
    return a, options


def served(cell: str, sizes: Sequence[int | None], names: Sequence[str]) -> bool:
    if not CELLS[cell].memory and (sizes[-1] is not None or "peephole" in names):
        return False
    return cell == "lstm" or "norm" not in names


def check_op(cell: str, sizes: Any, names: Sequence[str], directions: int, ragged: bool, dtype: Any) -> None:
    a, options = varied(of_sizes(cell, sizes, directions, dtype), names, cell)
    if ragged:
        steps, batch, _ = a.x.shape
        a = a._replace(lengths=torch.randint(0, steps + 1, (batch,)), resets=torch.rand(steps, batch) < 0.3)
    found = []
    for layer in (ops.layer, reference.layer, recompute.layer):
        is_recomputed = layer is recompute.layer
        with torch.no_grad():
            inferred = layer(a, options) if is_recomputed else layer(a, options, True)
        outputs = layer(a, options) if is_recomputed else layer(a, options, True)
        # What stands for an absent result has one dimension; recomputed, there are no states of each step.
        present = [
            [out for i, out in enumerate(outs) if out is not None and out.dim() > 1 and i != 1]
            for outs in (inferred, outputs)
        ]
        found.append([*present[0], *with_gradients(present[1], a.differentiable)])
        if not is_recomputed and CELLS[cell].memory:
            found[-1] += [inferred[1]]
    label = f"{cell} {sizes} {names} D={directions} ragged={ragged} {dtype}"
    assert_same(found[0], found[1], label)
    assert_same(found[2], found[1][: len(found[2])], f"recomputed {label}")


@pytest.mark.parametrize("names", VARIATIONS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_op_gives_what_the_reference_gives(path: str, cell: str, names: tuple[str, ...]) -> None:
    forms = itertools.cycle(itertools.product((1, 2), (False, True), DTYPES))
    for sizes in SIZES:
        if served(cell, sizes, names):
            check_op(cell, sizes, names, *next(forms))


@pytest.mark.slow
@pytest.mark.parametrize("names", VARIATIONS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_op_gives_what_the_reference_gives_in_every_form(
    path: str, cell: str, names: tuple[str, ...]
) -> None:
    for sizes, *form in itertools.product(SIZES, (1, 2), (False, True), DTYPES):
        if served(cell, sizes, names):
            check_op(cell, sizes, names, *form)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_without_rows_or_outputs_are_zero_and_not_left_unwritten(path: str, cell: str) -> None:
    # Memory that torch gives out again after this holds NaN.
    with one_thread():
        for sizes in ((3, 0, 4, 5), (3, 2, 0, 5)):
            a = arguments(cell, sizes, 2)
            del_me = [torch.full_like(v, torch.nan) for v in a.differentiable]
            del del_me
            y, *_ = ops.layer(a, Options(cell))
            grads = torch.autograd.grad(y.sum(), a.differentiable, allow_unused=True)
            assert all(g is None or g.isfinite().all() for g in grads)
            assert sizes[1] or not any(g is not None and g.any() for g in grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", scan.CELLS)
def test_scan_gives_what_its_reference_gives(path: str, cell: str, dtype: torch.dtype) -> None:
    info = scan.CELLS[cell]
    sizes = [s for s in itertools.product((0, 3), (0, 2), (0, 5)) if 0 in s]
    for (steps, batch, units), ragged, masked in itertools.product(sizes, (False, True), (False, True)):

        def new(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype, requires_grad=True)

        wx = new(steps, batch, info.gates * units)
        u, h0, mask_h = (
            (new(info.gates * units), new(batch, units), torch.rand(steps, batch, units, dtype=dtype))
            if info.carries_h
            else (None, None, None)
        )
        c0, mask_c = (
            (new(batch, units), torch.rand(1, batch, units, dtype=dtype)) if info.carries_c else (None, None)
        )
        lengths = torch.randint(0, steps + 1, (batch,)) if ragged else None
        masks = (mask_h, mask_c) if masked else (None, None)
        inputs, code = (wx, u, h0, c0, lengths, *masks), (info.code, 0, False)
        wanted = [v for v in (wx, u, h0, c0) if v is not None]
        found = []
        for op, args in ((scan.SCAN, (*inputs, *code)), (scan.reference, (inputs, code))):
            with torch.no_grad():
                inferred = op(*args)
            found.append([*inferred, *with_gradients(op(*args), wanted)])
        assert_same(found[0], found[1], f"T={steps} B={batch} U={units} {ragged} {masked}")
