"""The op family: gradients of every order, the dispatcher's contract, and every slot of the schema.

One file for the one family of ops, whose arguments the sections share.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import assert_close_to_f64, one_thread, rebuild
from torch import Tensor

from torchrnn import _native, ops, reference
from torchrnn.options import ACTIVATIONS, CELLS, Options
from torchrnn.reference import Arguments

VARIATIONS = ("peephole", "norm", "mask_h", "mask_c", "zoneout_h", "zoneout_c", "cell_clip", "proj_clip")


def arguments(
    cell: str = "lstm",
    sizes: tuple[int, int, int, int] = (4, 3, 5, 7),
    directions: int = 1,
    projection: int = 0,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = True,
    **extras: Any,
) -> Arguments:
    """Returns random tensors of a layer; extras replace fields."""
    steps, batch, inputs, hidden = sizes
    rows, outputs = CELLS[cell].gates * hidden, projection or hidden

    def new(*shape: int) -> Tensor:
        scale = max(shape[-1], 1) ** -0.5 if len(shape) == 2 else 1.0
        return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_(requires_grad)

    def each(*shape: int) -> list[Tensor]:
        return [new(*shape) for _ in range(directions)]

    a = Arguments(
        new(steps, batch, inputs),
        each(rows, inputs),
        each(rows, outputs),
        each(rows),
        each(rows),
        each(projection, hidden) if projection else [],
        [],
        [],
        [],
        new(directions, batch, outputs),
        new(directions, batch, hidden) if CELLS[cell].memory else None,
    )
    return a._replace(**extras)


def loss(outputs: tuple[Tensor, ...]) -> Tensor:
    """Returns a functional that gives every output value another weight."""
    used = [out for out in outputs if out.requires_grad]
    return sum((out * torch.linspace(-1, 1, out.numel()).view_as(out).to(out)).sum() for out in used)


def results(a: Arguments, options: Options, layer: Any) -> tuple[Tensor, ...]:
    """Returns all outputs and all gradients."""
    outputs = layer(a, options, True)
    return (*outputs, *torch.autograd.grad(loss(outputs), a.differentiable))


def cases() -> list[Any]:
    """Returns (cell, directions, ragged, reverse, projection) that differ in what a kernel does."""
    grid = itertools.product(CELLS, (1, 2), (False, True), (False, True))
    rows = [(*row, 0) for row in grid if not (row[1] == 2 and row[3])]
    return rows + [("lstm", d, ragged, False, 4) for d in (1, 2) for ragged in (False, True)]


@pytest.mark.parametrize(("cell", "directions", "ragged", "reverse", "projection"), cases())
@pytest.mark.parametrize("sizes", [(1, 5, 1, 9), (7, 5, 33, 17), (9, 66, 3, 33)], ids=str)
def test_kernels_match_reference(
    any_path: str,
    cell: str,
    directions: int,
    ragged: bool,
    reverse: bool,
    projection: int,
    sizes: tuple[int, int, int, int],
) -> None:
    # torch.nn has no resets and no reset-before GRU, so the reference is the peer; test_reference_* check it.
    a = arguments(cell, sizes, directions, projection)
    if ragged:
        steps, batch, *_ = sizes
        a = a._replace(lengths=torch.randint(0, steps + 1, (batch,)), resets=torch.rand(steps, batch) < 0.3)
    options = Options(cell, reverse=reverse)
    exact = results(a, options, reference.layer)
    # In float32 the reference is measured as torch.nn is elsewhere.
    single = Arguments._make(_cast(value, torch.float32) for value in a)
    ours, theirs = results(single, options, ops.layer), results(single, options, reference.layer)
    assert_close_to_f64(ours, theirs, exact, torch.float32)
    with torch.no_grad():
        assert_close_to_f64(ops.layer(single, options, True), theirs[:4], exact[:4], torch.float32)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(dtype).requires_grad_() if value.is_floating_point() else value
    return value if value is None else [_cast(tensor, dtype) for tensor in value]


@pytest.mark.parametrize(("cell", "directions", "ragged", "reverse", "projection"), cases())
def test_gradients_are_right_to_second_order(
    any_path: str, cell: str, directions: int, ragged: bool, reverse: bool, projection: int
) -> None:
    a = arguments(cell, (3, 2, 2, 5), directions, projection)
    if ragged:
        a = a._replace(lengths=torch.tensor([2, 3]), resets=torch.rand(3, 2) < 0.3)
    options = Options(cell, reverse=reverse)

    def layer(*values: Tensor) -> tuple[Tensor, ...]:
        outputs = ops.layer(rebuild(a, values), options, True)
        return tuple(out for out in outputs if out.numel())

    assert torch.autograd.gradcheck(layer, a.differentiable, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, a.differentiable, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_each_input_is_right(any_path: str, cell: str) -> None:
    # All at once, as above, a fast check could let two errors cancel; and each alone takes other branches.
    a = arguments(cell, (2, 2, 3, 4), 2)
    variables = a.differentiable
    for i, variable in enumerate(variables):
        constant = [v.detach() for v in variables]

        def layer(value: Tensor, i: int = i, constant: list[Tensor] = constant) -> tuple[Tensor, ...]:
            outputs = ops.layer(rebuild(a, [*constant[:i], value, *constant[i + 1 :]]), Options(cell))
            return tuple(out for out in outputs if out is not None and out.requires_grad)

        assert torch.autograd.gradcheck(layer, [variable]), f"variable {i}"


EVERYTHING = ("norm", "peephole", "cell_clip", "proj_clip", "mask_h", "mask_c once", "sigmoid")


@pytest.mark.parametrize("requires_grad", [False, True], ids=["constant", "grad"])
@pytest.mark.parametrize(
    ("cell", "dtype", "variations"),
    [
        *((cell, torch.float32, ()) for cell in CELLS),
        ("lstm", torch.bfloat16, ()),
        ("lstm", torch.float32, EVERYTHING),
    ],
    ids=str,
)
def test_ops_keep_the_dispatchers_contract(
    cell: str, dtype: torch.dtype, variations: tuple[str, ...], requires_grad: bool
) -> None:
    # Tracing the variations' second gradient takes long: fewer steps then, and one direction.
    steps, directions, projection = (2, 1, 5) if variations else (4, 2, 0)
    extras = {"lengths": torch.tensor([2, 0, steps]), "resets": torch.rand(steps, 3) < 0.3}
    a = arguments(cell, (steps, 3, 5, 7), directions, projection, dtype, requires_grad, **extras)
    a, options = vary(a, *variations)
    call = ops.flat(a, replace(options, cell=cell), True)
    torch.library.opcheck(torch.ops.torchrnn.layer.default, call)
    with torch.no_grad():
        y, c_all, h_n, c_n, tape = torch.ops.torchrnn.layer_train(*call)
    if not requires_grad:
        torch.library.opcheck(torch.ops.torchrnn.layer_train.default, call)
    # An incoming gradient is often an expanded scalar.
    douts = [torch.ones((), dtype=dtype).expand_as(y), *map(torch.randn_like, (c_all, h_n, c_n))]
    tensors = [t.detach().requires_grad_(requires_grad) for t in douts]
    if not CELLS[cell].memory:
        tensors[1] = tensors[3] = None
    torch.library.opcheck(
        torch.ops.torchrnn.layer_backward.default,
        (*tensors, *call, y, tape, True, True, True, True),
    )


@pytest.mark.parametrize("variation", VARIATIONS)
def test_no_slot_is_ignored(any_path: str, variation: str) -> None:
    a = arguments("lstm", projection=4 if variation == "proj_clip" else 0)
    plain = ops.layer(a, Options(proj_clip=None), True)
    varied, options = vary(a, variation)
    outputs = ops.layer(varied, options, True)
    assert not torch.allclose(plain[0], outputs[0]) or not torch.allclose(plain[3], outputs[3])
    expected = reference.layer(varied, options, True)
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def vary(a: Arguments, *variations: str) -> tuple[Arguments, Options]:
    steps, batch, _ = a.x.shape
    directions, outputs = len(a.weight_hh), a.weight_hh[0].size(1)
    hidden = a.weight_hr[0].size(1) if a.weight_hr else outputs
    options: dict[str, Any] = {}
    for variation in variations:
        name, _, steps_of = variation.partition(" ")
        if name == "peephole":
            peephole = [torch.randn(3, hidden, dtype=a.x.dtype) for _ in range(directions)]
            a = a._replace(peephole=[p.requires_grad_(a.x.requires_grad) for p in peephole])
        elif name == "norm":
            gain = [torch.rand(5, hidden, dtype=a.x.dtype) + 0.5 for _ in range(directions)]
            shift = [torch.randn(5, hidden, dtype=a.x.dtype) for _ in range(directions)]
            a = a._replace(
                norm_gain=[g.requires_grad_(a.x.requires_grad) for g in gain],
                norm_shift=[s.requires_grad_(a.x.requires_grad) for s in shift],
            )
        elif name.endswith("clip"):
            options[name] = 0.5 if name == "cell_clip" else 0.1
        elif name in ACTIVATIONS:
            options["activation"] = name
        else:
            size = hidden if name.endswith("_c") else outputs
            shape = (directions, 1 if steps_of else steps, batch, size)
            value = torch.rand(shape, dtype=a.x.dtype)
            a = a._replace(**{name: value if name.startswith("zoneout") else (value > 0.4) * (2 * value)})
    return a, Options(**options)


# What the kernels serve, alone and together; "once" is one mask for all steps.
SERVED = [
    *(
        ("lstm", name)
        for name in ("peephole", "cell_clip", "mask_h", "mask_c", "relu", "sigmoid", "identity")
    ),
    ("lstm", "mask_h once", "mask_c"),
    ("lstm", "norm"),
    ("lstm", "norm", "peephole", "cell_clip", "mask_h", "mask_c", "sigmoid"),
    ("lstm_coupled", "peephole", "cell_clip", "mask_h", "mask_c", "relu"),
    ("lstm", "mask_h", "mask_c once", "peephole", "cell_clip", "relu"),
    *((cell, name) for cell in ("gru", "gru_reset_before", "rnn") for name in ("mask_h", "relu", "sigmoid")),
    *((cell, "mask_h once", "identity") for cell in ("gru", "gru_reset_before", "rnn")),
]


@pytest.mark.parametrize("form", ["one way", "reverse", "both ways", "ragged"])
@pytest.mark.parametrize(
    ("cell", "projection", "variations"),
    [(row[0], p, row[1:]) for row in SERVED for p in ((0, 4, 19) if row[0].startswith("lstm") else (0,))],
    ids=str,
)
def test_variations_match_reference(
    any_path: str, cell: str, variations: tuple[str, ...], projection: int, form: str
) -> None:
    steps, batch = 6, 5
    a = arguments(cell, (steps, batch, 3, 17), 2 if form == "both ways" else 1, projection)
    if form in ("ragged", "both ways"):
        a = a._replace(lengths=torch.randint(0, steps + 1, (batch,)), resets=torch.rand(steps, batch) < 0.3)
    a, options = vary(a, *variations, *(["proj_clip"] if projection else []))
    options = replace(options, cell=cell, reverse=form == "reverse")
    exact = results(a, options, reference.layer)
    for ours, theirs in zip(results(a, options, ops.layer), exact, strict=True):
        torch.testing.assert_close(ours, theirs)  # In float64 no value is at a kink or a bound.
    with torch.no_grad():
        for ours, theirs in zip(ops.layer(a, options, True), exact, strict=False):
            torch.testing.assert_close(ours, theirs)
    single = Arguments._make(_cast(value, torch.float32) for value in a)
    with torch.no_grad():
        theirs = reference.layer(single, options, True)
        assert_close_to_f64(ops.layer(single, options, True), theirs, exact[:4], torch.float32)


@pytest.mark.parametrize("variation", ["mask_h", "mask_c once"])
def test_gradients_by_masks(path: str, variation: str) -> None:
    a, options = vary(arguments("lstm"), variation)
    mask = a.mask_h if a.mask_c is None else a.mask_c
    mask.requires_grad_()
    found = [
        torch.autograd.grad(loss(run(a, options, True)), mask)[0] for run in (ops.layer, reference.layer)
    ]
    torch.testing.assert_close(*found)
    assert found[0].any()


def test_variations_do_not_depend_on_the_team(path: str) -> None:
    # 130 units and 40 rows are shared out by rows or units; the sums are the same to the bit.
    a = arguments("lstm", (5, 40, 8, 130), 1, 50, lengths=torch.randint(0, 6, (40,)))
    a, options = vary(a, "mask_h", "mask_c", "peephole", "cell_clip", "proj_clip")
    many = results(a, options, ops.layer)
    with one_thread():
        for ours, theirs in zip(many, results(a, options, ops.layer), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_gradient_passes_a_clip_at_its_bound(any_path: str) -> None:
    # c is 0 in every step, and so is the bound: the clamp of torch lets the gradient through.
    a = arguments("lstm", (3, 2, 4, 5))
    a = Arguments._make(torch.zeros_like(v).requires_grad_() if isinstance(v, Tensor) else v for v in a)
    a = a._replace(weight_ih=[torch.zeros(20, 4, dtype=torch.float64, requires_grad=True)])
    a = a._replace(
        bias_ih=[torch.zeros(20, dtype=torch.float64, requires_grad=True)],
        bias_hh=[torch.zeros(20, dtype=torch.float64, requires_grad=True)],
    )
    options = Options(cell_clip=0.0)
    exact = results(a, options, reference.layer)
    assert exact[8].any()
    for ours, theirs in zip(results(a, options, ops.layer), exact, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_peephole_and_clip_follow_the_equations() -> None:
    # By hand, one unit, one step: c = 0.5 * (-1) and clipped; i and f see the old c, o the new, clipped one.
    def tensor(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    a = Arguments(
        torch.zeros(1, 1, 1, dtype=torch.float64),
        [torch.zeros(4, 1, dtype=torch.float64)],
        [torch.zeros(4, 1, dtype=torch.float64)],
        [tensor(0.1, 0.2, 0.3, 0.4)],
        [torch.zeros(4, dtype=torch.float64)],
        [],
        [tensor(1.0, 2.0, 3.0).view(3, 1)],
        [],
        [],
        torch.zeros(1, 1, 1, dtype=torch.float64),
        tensor(-1.0).view(1, 1, 1),
    )
    _, _, h_n, c_n = ops.layer(a, Options(cell_clip=0.05))
    i, f = torch.sigmoid(tensor(0.1 - 1.0)), torch.sigmoid(tensor(0.2 - 2.0))
    c = (f * -1.0 + i * torch.tanh(tensor(0.3))).clamp(-0.05, 0.05)
    o = torch.sigmoid(0.4 + 3.0 * c)
    torch.testing.assert_close(c_n.flatten(), c)
    torch.testing.assert_close(h_n.flatten(), o * torch.tanh(c))


@pytest.mark.parametrize("cell", CELLS)
def test_states_and_outputs_past_the_end(any_path: str, cell: str) -> None:
    a = arguments(cell, directions=2, lengths=torch.tensor([0, 4, 1]))
    y, c_all, h_n, c_n = ops.layer(a, Options(cell), True)
    assert not y[:, 0].any()
    assert not y[1:, 2].any()
    assert torch.equal(h_n[:, 0], a.h0[:, 0])
    assert torch.equal(h_n[0, 2], y[0, 2, :7])
    if a.c0 is not None:
        assert torch.equal(c_n[:, 0], a.c0[:, 0])
        assert torch.equal(c_all[0, 2, 7:], c_n[1, 2])
        assert not c_all[1:, 2].any()


@pytest.mark.parametrize("cell", CELLS)
def test_resets_part_the_sequence(any_path: str, cell: str) -> None:
    a = arguments(cell, (6, 1, 3, 5), 2)
    resets = torch.zeros(6, 1, dtype=torch.bool)
    resets[2] = resets[3] = True
    y, *_ = ops.layer(a._replace(resets=resets), Options(cell))
    parts = []
    for begin, end in ((0, 2), (2, 3), (3, 6)):
        states = {}
        for field in ("h0", "c0"):
            state = getattr(a, field)
            if state is not None:
                # Forwards only the first part sees the initial state, backwards only the last.
                sees = torch.tensor([begin == 0, end == 6]).view(2, 1, 1)
                states[field] = torch.where(sees, state, 0)
        parts.append(ops.layer(a._replace(x=a.x[begin:end], **states), Options(cell))[0])
    assert torch.allclose(y, torch.cat(parts), rtol=0, atol=16 * torch.finfo(y.dtype).eps)


@pytest.mark.parametrize("cell", CELLS)
def test_any_strides_give_the_same_numbers(any_path: str, cell: str) -> None:
    a = arguments(cell, (5, 4, 3, 9), 2)
    expected = results(a, Options(cell), ops.layer)
    # Kernels compute the same to the bit; MKL, below the reference, takes another way.
    same = torch.equal if any_path in _native.ISAS else torch.allclose

    def strided(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype)
        wide[..., 0] = t.detach()
        return wide[..., 0].requires_grad_()

    b = rebuild(a, [strided(v) for v in a.differentiable])
    assert all(map(same, expected, results(b, Options(cell), ops.layer)))
    turned = a._replace(x=a.x.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_())
    assert all(map(same, expected, results(turned, Options(cell), ops.layer)))


@pytest.mark.parametrize("cell", CELLS)
def test_transforms_take_part(cell: str) -> None:
    a = arguments(cell, (3, 2, 4, 5), requires_grad=False)
    options = Options(cell)
    batch = torch.randn(6, *a.x.shape, dtype=a.x.dtype)
    expected = torch.stack([ops.layer(a._replace(x=x), options)[0] for x in batch])
    mapped = torch.func.vmap(lambda x: ops.layer(a._replace(x=x), options)[0])(batch)
    assert torch.allclose(mapped, expected)
    tangent = torch.randn_like(a.x)
    _, forward = torch.func.jvp(lambda x: ops.layer(a._replace(x=x), options)[0], (a.x,), (tangent,))
    step = 1e-6
    ahead, behind = (ops.layer(a._replace(x=a.x + s * tangent), options)[0] for s in (step, -step))
    assert torch.allclose(forward, (ahead - behind) / (2 * step), atol=1e-8)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: ops.layer(a._replace(x=x), options)[0].sum()))(
        batch
    )
    x = batch[2].clone().requires_grad_()
    (one,) = torch.autograd.grad(ops.layer(a._replace(x=x), options)[0].sum(), x)
    assert torch.allclose(per_sample[2], one)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"x": torch.zeros(3, 2)}, r"lstm: x must be \[T, B, I\], got \[3, 2\]"),
        ({"x": torch.zeros(0, 3, 5)}, "lstm: x must have at least 1 step"),
        ({"x": torch.zeros(4, 3, 5, dtype=torch.int64)}, "lstm: x must be float32"),
        ({"weight_hh": []}, "weight_hh must have 1 or 2 entries, one per direction, got 0"),
        ({"weight_hh": [torch.zeros(30, 7)]}, r"weight_hh must be \[4H, R\] with .*H=7, .*got \[30, 7\]"),
        ({"weight_ih": [torch.zeros(28, 6)]}, r"weight_ih must be \[4H, I\] with .*I=5, .*got \[28, 6\]"),
        ({"bias_hh": []}, "bias_hh must have 1 entries, one per direction, got 0"),
        ({"h0": torch.zeros(1, 2, 7)}, r"h0 must be \[D, B, R\] with .*B=3, .*got \[1, 2, 7\]"),
        (
            {"c0": torch.zeros(1, 3, 7, dtype=torch.float64)},
            "c0 must have x's dtype torch.float32, got torch.float64",
        ),
        ({"c0": torch.zeros(1, 3, 7, device="meta")}, "c0 must be on x's device cpu, got meta"),
        ({"lengths": torch.tensor([1, 2])}, r"lengths must be \[B\] with B=3, got \[2\]"),
        ({"lengths": torch.tensor([1, 2, 5])}, r"lengths must be in 0\.\.T with T=4, got 1\.\.5"),
        ({"lengths": torch.tensor([-1, 2, 4])}, r"lengths must be in 0\.\.T with T=4, got -1\.\.4"),
        ({"lengths": torch.ones(3)}, "lengths must be int64 or int32, got torch.float32"),
        (
            {"resets": torch.zeros(3, 4, dtype=torch.bool)},
            r"resets must be \[T, B\] with T=4, B=3, got \[3, 4\]",
        ),
        ({"resets": torch.zeros(4, 3)}, "resets must be bool, got torch.float32"),
        ({"mask_h": torch.zeros(1, 2, 3, 7)}, r"mask_h must be \[D, T or 1, B, R\]"),
        ({"peephole": [torch.zeros(2, 7)]}, r"peephole must be \[3, H\]"),
        ({"norm_gain": [torch.zeros(5, 7)]}, "norm_shift must have 1 entries"),
    ],
)
def test_mistakes_are_named(path: str, changes: dict[str, Any], text: str) -> None:
    a = arguments(dtype=torch.float32)._replace(**changes)
    with pytest.raises(ValueError, match=text):
        ops.layer(a, Options())


@pytest.mark.parametrize("field", ["x", "h0", "lengths", "resets"])
def test_arguments_that_are_not_tensors_are_named(field: str) -> None:
    with pytest.raises(TypeError, match=f"lstm: {field} must be a tensor, got list"):
        ops.layer(arguments()._replace(**{field: [1, 2, 3]}), Options())


@pytest.mark.parametrize("field", ["c0", "mask_c", "peephole", "weight_hr", "norm_gain"])
def test_what_needs_a_memory_is_refused_without_one(field: str) -> None:
    value = torch.zeros(1, 4, 3, 7, dtype=torch.float64)
    a = arguments("gru")._replace(**{field: value if field in ("c0", "mask_c") else [value]})
    with pytest.raises(ValueError, match=f"gru: {field} must be absent, it applies to"):
        ops.layer(a, Options("gru"))


def test_options_refuse_what_no_path_runs() -> None:
    for changes, text in (
        ({"cell": "mgu"}, "cell must be one of lstm, gru, gru_reset_before, rnn, lstm_coupled, got 'mgu'"),
        ({"activation": "gelu"}, "activation must be one of"),
        ({"cell_clip": -1.0}, "cell_clip must be None or at least 0, got -1.0"),
        ({"cell_clip": float("nan")}, "cell_clip must be None or at least 0, got nan"),
        ({"cell": "gru", "cell_clip": 1.0}, "cell_clip applies to cells with memory only"),
        ({"norm_eps": -1.0}, "norm_eps must be at least 0"),
    ):
        with pytest.raises(ValueError, match=text):
            Options(**changes)
    with pytest.raises(ValueError, match="proj_clip must come with weight_hr"):
        ops.layer(arguments(), Options(proj_clip=1.0))


@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_infinity_propagate(any_path: str, cell: str) -> None:
    a = arguments(cell, requires_grad=False)
    for value in (float("nan"), float("inf"), -float("inf"), 1e300):
        x = a.x.clone()
        x[1, 1, 0] = value
        ours, theirs = (layer(a._replace(x=x), Options(cell))[0] for layer in (ops.layer, reference.layer))
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.allclose(ours, theirs, equal_nan=True)


def test_no_rows_give_empty_results_and_zero_gradients(any_path: str) -> None:
    a = arguments("lstm", (4, 0, 5, 7), 2)
    y, _, h_n, c_n = ops.layer(a, Options())
    assert y.shape == (4, 0, 14)
    assert h_n.shape == c_n.shape == (2, 0, 7)
    for gradient, variable in zip(
        torch.autograd.grad(y.sum(), a.differentiable), a.differentiable, strict=True
    ):
        assert gradient.shape == variable.shape
        assert not gradient.any()
