"""The scan op against the equations of its cells, written down anew here, row by row and step by step.

One file: the equations serve all sections.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import assert_close_to_f64, doubled, gradients, needs_kernels, nudged, one_thread
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from torchrnn.scan import CELLS, scan

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}
SIZES = ((5, 3, 7), (2, 1, 33), (1, 3, 1), (4, 2, 130), (3, 5, 16))
"""T, B, U."""
ODD_SIZES = ((19, 33, 7), (19, 1, 33), (2, 33, 130), (1, 1, 1), (2, 3, 0), (2, 0, 3), (3, 2, 2500))


def step(cell: str, act: Callable[[Tensor], Tensor], wx: Tensor, u: Any, h: Any, c: Any) -> tuple[Any, Any]:
    """One step of one row: wx [G*U], h and c [U]. Returns the output and c."""
    s = torch.sigmoid
    if cell == "ind_rnn":
        return act(wx + u * h), None
    if cell == "indy_gru":
        a, b, d = wx.chunk(3)
        ua, ub, ud = u.chunk(3)
        r, z = s(a + ua * h), s(b + ub * h)
        return z * h + (1 - z) * act(d + ud * (r * h)), None
    if cell == "indy_lstm":
        i, g, f, o = (wx + u * torch.cat([h, h, h, h])).chunk(4)
        c = s(f) * c + s(i) * act(g)
        return s(o) * act(c), c
    x, f, r, highway = wx.chunk(4)
    c = s(f) * c + (1 - s(f)) * x
    return s(r) * act(c) + (1 - s(r)) * highway, c


def equations(
    cell: str, tensors: list[Any], activation: str, lengths: Tensor | None, reverse: bool
) -> list[Tensor]:
    """What ``run`` must return."""
    wx, u, h0, c0, mask_h, mask_c = tensors
    steps, batch, sums = wx.shape
    info = CELLS[cell]
    units = sums // info.gates
    zeros = wx.new_zeros(units)
    ys, hs, cs = [], [], []
    for b in range(batch):
        length = steps if lengths is None else int(lengths[b])
        h = zeros if h0 is None else h0[b]
        c = zeros if c0 is None else c0[b]
        y = [zeros] * steps
        for t in reversed(range(length)) if reverse else range(length):
            y[t], c = step(cell, ACTIVATIONS[activation], wx[t, b], u, h, c)
            h = y[t] if mask_h is None else y[t] * mask_h[t % len(mask_h), b]
            c = c if mask_c is None else c * mask_c[t % len(mask_c), b]
        ys.append(torch.stack(y) if y else wx.new_zeros(0, units))
        hs.append(h)
        cs.append(c)
    results = [torch.stack(ys, 1) if ys else wx.new_zeros(steps, 0, units)]
    for carried, values in ((info.carries_h, hs), (info.carries_c, cs)):
        if carried:
            results.append(torch.stack(values) if values else wx.new_zeros(0, units))
    return results


def run(
    cell: str, tensors: list[Any], activation: str, lengths: Tensor | None, reverse: bool
) -> list[Tensor]:
    """Calls ``scan``; returns y and the states that the cell has."""
    *given, mask_h, mask_c = tensors
    y, h_n, c_n = scan(
        cell,
        *given,
        activation=activation,
        lengths=lengths,
        mask_h=mask_h,
        mask_c=mask_c,
        reverse=reverse,
    )
    info = CELLS[cell]
    for carried, state in ((info.carries_h, h_n), (info.carries_c, c_n)):
        assert carried or state.shape == (0,)
    return [y, *([h_n] if info.carries_h else []), *([c_n] if info.carries_c else [])]


def inputs(
    cell: str,
    sizes: tuple[int, int, int],
    dtype: torch.dtype = torch.float64,
    masks: str = "none",
    states: bool = True,
) -> list[Any]:
    """Returns random wx, u, h0, c0, mask_h and mask_c; None for what the cell or the test has not."""
    steps, batch, units = sizes
    info = CELLS[cell]

    def leaf(there: bool, *shape: int) -> Tensor | None:
        return torch.randn(shape, dtype=dtype, requires_grad=True) if there else None

    def mask(there: bool) -> Tensor | None:
        if not there or masks == "none":
            return None
        values = torch.rand(steps if masks == "each step" else 1, batch, units)
        return (values * 2 * (values > 0.3)).to(dtype)

    return [
        leaf(True, steps, batch, info.gates * units),
        leaf(info.carries_h, info.gates * units),
        leaf(info.carries_h and states, batch, units),
        leaf(info.carries_c and states, batch, units),
        mask(info.carries_h),
        mask(info.carries_c),
    ]


def check(cell: str, tensors: list[Any], activation: str, lengths: Any, reverse: bool) -> None:
    """Asserts that results and all gradients are those of the equations, of inference too."""
    dtype = tensors[0].dtype
    their_tensors = nudged(tensors) if dtype == torch.float64 else tensors
    exact_tensors = doubled(tensors)
    options = (activation, lengths, reverse)
    ours = run(cell, tensors, *options)
    with torch.no_grad():
        inferred = run(cell, tensors, *options)
    with one_thread():
        theirs, exact = equations(cell, their_tensors, *options), equations(cell, exact_tensors, *options)
    assert_close_to_f64(ours, theirs, exact, dtype, "result")
    assert_close_to_f64(inferred, theirs, exact, dtype, "result of inference")
    if tensors[0].numel() == 0:
        return
    none = nn.Module()
    assert_close_to_f64(
        gradients(none, ours, *tensors),
        gradients(none, theirs, *their_tensors),
        gradients(none, exact, *exact_tensors),
        dtype,
        "gradient",
    )


def some_lengths(sizes: tuple[int, int, int]) -> Tensor:
    """Returns random lengths, T and, with a second row, zero among them."""
    lengths = torch.randint(0, sizes[0] + 1, (sizes[1],))
    lengths[-1:] = 0
    lengths[:1] = sizes[0]
    return lengths


# The equations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients_are_those_of_the_equations(
    path: str, cell: str, activation: str, dtype: torch.dtype
) -> None:
    forms = itertools.product((False, True), (False, True), ("none", "shared", "each step"))
    for i, (with_lengths, reverse, masks) in enumerate(forms):
        sizes = SIZES[i % len(SIZES)]
        tensors = inputs(cell, sizes, dtype, masks, states=i % 3 != 0)
        check(cell, tensors, activation, some_lengths(sizes) if with_lengths else None, reverse)


@pytest.mark.parametrize("sizes", ODD_SIZES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_odd_sizes(path: str, cell: str, sizes: tuple[int, int, int]) -> None:
    check(cell, inputs(cell, sizes, torch.float32), "tanh", None, False)
    check(cell, inputs(cell, sizes, torch.float64, "each step"), "tanh", some_lengths(sizes), True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_half_precision(path: str, cell: str, dtype: torch.dtype) -> None:
    for activation, reverse, masks in (("tanh", False, "none"), ("sigmoid", True, "each step")):
        sizes = (6, 4, 33)
        check(cell, inputs(cell, sizes, dtype, masks), activation, some_lengths(sizes), reverse)


@pytest.mark.parametrize("cell", CELLS)
def test_no_steps_leave_the_state(path: str, cell: str) -> None:
    tensors = inputs(cell, (0, 2, 3))
    y, *states = run(cell, tensors, "tanh", None, False)
    assert y.shape == (0, 2, 3)
    initial = [state for state in tensors[2:4] if state is not None]
    for state, before in zip(states, initial, strict=True):
        assert torch.equal(state, before)
    grads = torch.autograd.grad(sum((2 * state).sum() for state in states), initial)
    assert all(torch.equal(grad, torch.full_like(grad, 2)) for grad in grads)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_may_be_cut_in_two(path: str, cell: str, reverse: bool) -> None:
    wx, u, *states, _, _ = inputs(cell, (7, 3, 9))
    whole = scan(cell, wx, u, *states, reverse=reverse)
    halves = (wx[3:], wx[:3]) if reverse else (wx[:3], wx[3:])
    ys = []
    for half in halves:
        y, *new = scan(cell, half, u, *states, reverse=reverse)
        states = [state if state.dim() == 2 else None for state in new]
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys[::-1] if reverse else ys), whole[0])
    for state, last in zip(states, whole[1:], strict=True):
        assert state is None or torch.allclose(state, last)


# Lengths and layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_is_never_read(path: str, cell: str, reverse: bool) -> None:
    sizes = (6, 4, 19)
    tensors = inputs(cell, sizes, masks="each step")
    lengths = torch.tensor([6, 0, 4, 1])
    alive = (torch.arange(6)[:, None] < lengths)[:, :, None]
    results = []
    for padding in (0.0, float("nan")):
        wx = torch.where(alive, tensors[0].detach(), padding).requires_grad_()
        filled = [wx, *tensors[1:]]
        found = run(cell, filled, "tanh", lengths, reverse)
        assert not found[0][~alive.expand_as(found[0])].any()
        # Nor are gradients by outputs that are zeros for good.
        weights = torch.where(alive, torch.ones_like(found[0]), padding)
        leaves = [t for t in filled if t is not None and t.requires_grad]
        grads = torch.autograd.grad(found, leaves, [weights, *map(torch.ones_like, found[1:])])
        assert not grads[0][~alive.expand_as(grads[0])].any()
        results.append([*found, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_any_strides(path: str, cell: str) -> None:
    steps, batch, units = 5, 3, 21
    sums = CELLS[cell].gates * units
    tensors = inputs(cell, (steps, batch, units), masks="each step")
    wx, u, h0, c0, mask_h, mask_c = tensors
    strided = [
        None if u is None else torch.stack([u, u], -1).detach()[:, 0],
        *(None if state is None else state.detach().t().contiguous().t() for state in (h0, c0)),
        *(
            None if mask is None else mask.transpose(0, 2).contiguous().transpose(0, 2)
            for mask in (mask_h, mask_c)
        ),
    ]
    for layout in (
        wx.detach().transpose(0, 1).contiguous().transpose(0, 1),
        wx.detach().transpose(0, 2).contiguous().transpose(0, 2),
        torch.cat([wx, wx], -1).detach()[..., :sums],
        wx.detach()[:1].expand(steps, batch, sums),
    ):
        views = [
            layout.requires_grad_(),
            *(v if v is None else v.requires_grad_(i < 3) for i, v in enumerate(strided)),
        ]
        assert not layout.is_contiguous()
        check(cell, views, "tanh", torch.tensor([5, 2, 0], dtype=torch.int32), True)
    # A gradient by y whose layout is not y's.
    ours, theirs = run(cell, tensors, "tanh", None, False), equations(cell, tensors, "tanh", None, False)
    for weight in (
        torch.randn(units, batch, steps).double().permute(2, 1, 0),
        torch.ones(1).double().expand(5, 3, 21),
    ):
        a, b = (torch.autograd.grad(r[0], wx, weight, retain_graph=True)[0] for r in (ours, theirs))
        torch.testing.assert_close(a, b)


@needs_kernels
@pytest.mark.parametrize("cell", CELLS)
def test_results_are_the_same_to_the_bit_on_any_number_of_threads(cell: str) -> None:
    tensors = inputs(cell, (33, 9, 150), torch.float32)
    leaves = [t for t in tensors if t is not None]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = run(cell, tensors, "tanh", None, False)
        results.append([*found, *torch.autograd.grad(sum(r.square().sum() for r in found), leaves)])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


# Transforms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "identity"])
@pytest.mark.parametrize("cell", CELLS)
def test_first_and_second_gradients_are_those_of_finite_differences(
    path: str, cell: str, activation: str
) -> None:
    tensors = inputs(cell, (3, 2, 2), masks="each step")
    lengths = torch.tensor([3, 1])
    leaves = [t for t in tensors if t is not None and t.requires_grad]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        it = iter(leaves)
        values = [next(it) if t is not None and t.requires_grad else t for t in tensors]
        return tuple(run(cell, values, activation, lengths, True))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_by_masks(path: str, cell: str) -> None:
    tensors = inputs(cell, (4, 2, 3), masks="each step")
    for mask in tensors[4:]:
        if mask is not None:
            mask.requires_grad_()
    check(cell, tensors, "tanh", None, False)


@needs_kernels
@pytest.mark.parametrize("cell", CELLS)
def test_any_one_gradient_alone(cell: str) -> None:
    for wanted in range(4):
        tensors = [None if t is None else t.detach() for t in inputs(cell, (4, 3, 5))]
        if tensors[wanted] is not None:
            tensors[wanted].requires_grad_()
            check(cell, tensors, "tanh", None, False)


@pytest.mark.parametrize("cell", CELLS)
def test_vmap_jvp_and_gradients_per_sample(path: str, cell: str) -> None:
    wx, u, h0, c0, _, _ = (None if t is None else t.detach() for t in inputs(cell, (4, 3, 5)))
    lengths = torch.tensor([4, 2, 0])
    many = torch.randn(2, *wx.shape, dtype=wx.dtype)

    def function(wx: Tensor) -> Tensor:
        return scan(cell, wx, u, h0, c0, lengths=lengths)[0]

    torch.testing.assert_close(torch.func.vmap(function)(many), torch.stack([function(one) for one in many]))
    grads = torch.func.vmap(torch.func.grad(lambda wx: function(wx).square().sum()))(many)
    for one, grad in zip(many, grads, strict=True):
        alone = one.clone().requires_grad_()
        torch.testing.assert_close(grad, torch.autograd.grad(function(alone).square().sum(), alone)[0])
    tangent, weight = torch.randn_like(wx), torch.randn(4, 3, 5, dtype=wx.dtype)
    _, along = torch.func.jvp(function, (wx,), (tangent,))
    leaf = wx.clone().requires_grad_()
    (back,) = torch.autograd.grad(function(leaf), leaf, weight)
    torch.testing.assert_close((along * weight).sum(), (back * tangent).sum())


@needs_kernels
@pytest.mark.parametrize("cell", CELLS)
def test_the_ops_are_registered_as_torch_wants_them(cell: str) -> None:
    info = CELLS[cell]
    tensors = inputs(cell, (3, 2, 4), torch.float32, "shared")
    args = (*tensors[:4], torch.tensor([3, 1]), *tensors[4:], info.code, 0, True)
    torch.library.opcheck(torch.ops.torchrnn.scan.default, args)
    constant = tuple(t.detach() if isinstance(t, Tensor) else t for t in args)
    torch.library.opcheck(torch.ops.torchrnn.scan_infer.default, args)
    torch.library.opcheck(torch.ops.torchrnn.scan_train.default, constant)
    y, *_, tape = torch.ops.torchrnn.scan_train(*constant)
    torch.library.opcheck(
        torch.ops.torchrnn.scan_backward.default,
        (torch.randn_like(y), None, None, *args, y, tape, True, True, True, True),
    )


class Model(nn.Module):
    """A layer: the product with the inputs before the scan, something after it."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        info = CELLS[cell]
        self.cell = cell
        self.project = nn.Linear(3, info.gates * 5)
        self.u = nn.Parameter(torch.randn(info.gates * 5)) if info.carries_h else None

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
        return [2 * r for r in scan(self.cell, self.project(x), self.u, lengths=lengths)]


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("cell", CELLS)
def test_compiled_as_one_graph_with_dynamic_sizes(cell: str) -> None:
    model = Model(cell)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    frames = None
    for steps, batch in ((4, 2), (7, 3), (2, 5)):
        x = torch.randn(steps, batch, 3, requires_grad=True)
        lengths = torch.randint(0, steps + 1, (batch,))
        expected, found = model(x, lengths), compiled(x, lengths)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(model, found, x), gradients(model, expected, x))
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("cell", CELLS)
def test_exported_with_dynamic_steps(cell: str) -> None:
    model = Model(cell).eval()
    steps = torch.export.Dim("steps", min=2, max=64)
    program = torch.export.export(model, (torch.randn(4, 2, 3),), dynamic_shapes={"x": {0: steps}})
    for count in (2, 9):
        x = torch.randn(count, 2, 3)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("cell", CELLS)
def test_autocast_computes_in_the_dtype_of_the_state(path: str, cell: str) -> None:
    tensors = inputs(cell, (4, 3, 5), torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        # The sums are what an autocast product gave.
        wx, u, *states = [None if t is None else t.detach().requires_grad_() for t in tensors]
        given = [wx.bfloat16(), u, *(None if state is None else state.to(dtype) for state in states)]
        with torch.autocast("cpu", torch.bfloat16):
            ours = run(cell, given, "tanh", None, False)
        plain = run(cell, [None if t is None else t.detach().to(dtype) for t in given], "tanh", None, False)
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
        assert ours[0].dtype == dtype
        grads = torch.autograd.grad(ours[0].sum(), [t for t in (wx, u, *states) if t is not None])
        assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


# Errors ---------------------------------------------------------------------------------------------------


def call(cell: str = "ind_rnn", **changes: Any) -> Any:
    """Calls a scan of T=3, B=2, U=4 that holds but for the changes."""
    info = CELLS.get(cell, CELLS["ind_rnn"])
    given: dict[str, Any] = {"wx": torch.zeros(3, 2, 4 * info.gates)}
    if info.carries_h:
        given["u"] = torch.zeros(4 * info.gates)
    return scan(cell, **given | changes)


@pytest.mark.parametrize("cell", CELLS)
def test_the_call_of_the_error_tests_holds(cell: str) -> None:
    call(cell)


ABSENT = "must be absent, the cell has no such state or weight"
SIZES_OF_CALL = "with T=3, B=2, U=4"


@pytest.mark.parametrize(
    ("cell", "changes", "message"),
    [
        ("ind_rnn", {"activation": "elu"}, f"activation must be one of {', '.join(ACTIVATIONS)}, got 'elu'"),
        ("ind_rnn", {"wx": torch.zeros(3, 4)}, "wx must be [T, B, U], got [3, 4]"),
        ("sru", {"wx": torch.zeros(3, 2, 6)}, "wx must be [T, B, 4U], got [3, 2, 6]"),
        (
            "sru",
            {"wx": torch.zeros(3, 2, 4, dtype=torch.int64)},
            "wx must be float32, float64, bfloat16 or float16, got torch.int64",
        ),
        ("ind_rnn", {"u": None}, "u must be given, got None"),
        ("ind_rnn", {"u": torch.zeros(5)}, f"u must be [U] {SIZES_OF_CALL}, got [5]"),
        ("indy_gru", {"u": torch.zeros(1, 12)}, f"u must be [3U] {SIZES_OF_CALL}, got [1, 12]"),
        ("sru", {"u": torch.zeros(16)}, f"u {ABSENT}"),
        ("sru", {"h0": torch.zeros(2, 4)}, f"h0 {ABSENT}"),
        ("indy_gru", {"c0": torch.zeros(2, 4)}, f"c0 {ABSENT}"),
        ("ind_rnn", {"mask_c": torch.zeros(1, 2, 4)}, f"mask_c {ABSENT}"),
        ("ind_rnn", {"h0": torch.zeros(1, 4)}, f"h0 must be [B, U] {SIZES_OF_CALL}, got [1, 4]"),
        (
            "indy_lstm",
            {"mask_c": torch.zeros(2, 2, 4)},
            f"mask_c must be [T or 1, B, U] {SIZES_OF_CALL}, got [2, 2, 4]",
        ),
        ("ind_rnn", {"mask_h": torch.ones(())}, f"mask_h must be [T or 1, B, U] {SIZES_OF_CALL}, got []"),
        (
            "ind_rnn",
            {"h0": torch.zeros(2, 4).double()},
            "h0 must have wx's dtype torch.float32, got torch.float64",
        ),
        ("ind_rnn", {"h0": torch.zeros(2, 4, device="meta")}, "h0 must be on wx's device cpu, got meta"),
        ("ind_rnn", {"lengths": torch.tensor([3])}, "lengths must be [B] with B=2, got [1]"),
        ("ind_rnn", {"lengths": torch.tensor([3, 4])}, "lengths must be in 0..T with T=3, got 3..4"),
        ("ind_rnn", {"lengths": torch.ones(2)}, "lengths must be int64 or int32, got torch.float32"),
    ],
)
def test_mistakes_are_refused(cell: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        call(cell, **changes)
    assert str(error.value) == f"{cell}: {message}"


def test_an_unknown_cell_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^cell must be one of ind_rnn, indy_gru, indy_lstm, sru, got 'gru'$"
    ):
        call("gru")


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("field", ["wx", "u", "h0", "lengths"])
def test_arguments_that_are_no_tensors_are_refused(field: str, autocast: bool) -> None:
    with (
        pytest.raises(TypeError, match=f"^ind_rnn: {field} must be a tensor, got list$"),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        call(**{field: [1, 2]})
