"""CUDA: both paths against float64, and what only a GPU has: graphs, streams, devices, waiting.

The cases run on CUDA; a few of each test run on the CPU too, where they test the test itself. One file, as
all sections share the cases and the two paths.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import CUDA, assert_close_to_f64, doubled, gradients, leaves, rebuild, use_device, use_tf32
from test_ops import SERVED, arguments, results, vary
from test_parity import DTYPES, LAYERS, build, run_padded, states
from torch import Tensor, nn

import torchrnn
from torchrnn import cuda, ops, reference
from torchrnn.options import CELLS, Options
from torchrnn.reference import Arguments

HALVES = (torch.bfloat16, torch.float16)
CLUSTER_DTYPES = (torch.float32, *HALVES)
CLUSTER_CELLS = ("lstm", "gru")
SIZES = ((1, 1, 1, 1), (7, 3, 7, 7), (5, 33, 130, 33), (9, 7, 33, 130), (4, 130, 7, 64))
CLUSTER_SIZES = (
    *SIZES,
    (200, 9, 16, 64),
    (6, 9, 16, 97),
    (5, 16, 16, 128),
    (6, 9, 16, 192),
    (5, 8, 16, 256),
    (6, 17, 16, 384),
    (7, 23, 16, 512),
    (4, 250, 16, 512),
)
"""T, B, I, H. The cluster path cuts H and B into tiles: some sizes fill them and some do not. The last one is
more than a device runs at once.
"""
CLUSTER_HIDDEN = {torch.float32: 256, torch.bfloat16: 512, torch.float16: 512}
"""The largest H of the cluster path, by the dtypes that it serves: float32 only in TF32."""
REPEATS = 20
TF32_EPS = 2.0**-10

# A GPU without clusters has no such cases; where there is no GPU at all they are left to be skipped.
CLUSTERS = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)
PATHS = ("step", "cluster") if CLUSTERS else ("step",)


@pytest.fixture
def route(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """Forces a path, on the device; the CPU has no other. float32 has the cluster path only in TF32."""
    with cuda.use_path(request.param), use_tf32(request.param == "cluster"):
        yield request.param


def eps_of(dtype: torch.dtype) -> float | None:
    """Returns what products are rounded to, where that is not dtype."""
    return TF32_EPS if dtype == torch.float32 and cuda.allows_tf32() else None


def on_devices(names: str, cases: Iterable[tuple[Any, ...]], every: int) -> pytest.MarkDecorator:
    """Parametrizes by ``device, route, names``: all on CUDA, one in ``every`` of the step path on the CPU."""
    kept = [case for case in cases if CLUSTERS or case[0] != "cluster"]
    on_cpu = [case for case in kept if case[0] == "step"][::every]
    rows = [("cuda", *case) for case in kept] + [("cpu", *case) for case in on_cpu]
    return pytest.mark.parametrize(
        ["device", "route", *names.split()],
        [
            pytest.param(*row, id="-".join(map(str, row)), marks=CUDA.marks if row[0] == "cuda" else ())
            for row in rows
        ],
        indirect=["device", "route"],
    )


def layer_cases() -> Iterator[tuple[Any, ...]]:
    """Yields (route, name, dtype, sizes, bidirectional)."""
    ways = (False, True)
    yield from itertools.product(("step",), LAYERS, DTYPES, SIZES, ways)
    for dtype, most in CLUSTER_HIDDEN.items():
        served = [sizes for sizes in CLUSTER_SIZES if sizes[-1] <= most]
        yield from itertools.product(("cluster",), CLUSTER_CELLS, (dtype,), served, ways)


@on_devices("name dtype sizes bidirectional", layer_cases(), every=23)
def test_layer_matches_torch(
    device: torch.device,
    route: str,
    name: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    bidirectional: bool,
) -> None:
    steps, batch, inputs, hidden = sizes
    three = build(name, inputs, hidden + (name == "lstm-proj"), dtype, bidirectional=bidirectional)
    x = torch.randn(steps, batch, inputs, dtype=dtype, requires_grad=True)
    hx, eps = states(three.theirs, batch, dtype), eps_of(dtype)
    three.check(x, hx, dtype=dtype, eps=eps)
    lengths = torch.randint(1, steps + 1, (batch,))
    through = functools.partial(run_lengths, lengths)
    three.check(x, hx, dtype=dtype, eps=eps, lengths=lengths, through=through)


def run_lengths(lengths: Tensor, layer: nn.Module, *inputs: Any) -> Any:
    return run_padded(layer, *inputs, lengths)


@on_devices("name sizes", itertools.product(("step",), LAYERS, SIZES), every=11)
def test_layer_matches_torch_in_tf32(
    device: torch.device, route: str, name: str, sizes: tuple[int, int, int, int]
) -> None:
    # That nothing is rounded so without leave is what all other tests of float32 show.
    steps, batch, inputs, hidden = sizes
    three = build(name, inputs, hidden + (name == "lstm-proj"), torch.float32)
    x = torch.randn(steps, batch, inputs, requires_grad=True)
    with use_tf32(True):
        three.check(x, states(three.theirs, batch, torch.float32), eps=TF32_EPS)


@pytest.mark.gpu
def test_the_flag_of_tf32_is_obeyed() -> None:
    with use_device("cuda"), torch.no_grad():
        lstm, x = torchrnn.LSTM(64, 64), torch.randn(4, 32, 64)
        full = lstm(x)[0]
        with use_tf32(True):
            rounded = lstm(x)[0]
    assert torch.equal(full, rounded) == (torch.cuda.get_device_capability() < (8, 0))


def outputs_of(layer: Callable[..., Any], route: str) -> Callable[..., tuple[Tensor, ...]]:
    """Returns a layer that gives all that a path has: the cluster path does not keep the c of every step."""

    def call(a: Arguments, options: Options, _: bool = True) -> tuple[Tensor, ...]:
        y, c_all, h_n, c_n = layer(a, options, route == "step")
        return (y, c_all, h_n, c_n) if route == "step" else (y, h_n, c_n)

    return call


def with_gradients(a: Arguments, options: Options, layer: Callable[..., Any]) -> list[Tensor | None]:
    """Returns all outputs and all gradients, of a functional that is the same in every dtype."""
    outputs = layer(a, options)
    return [*outputs, *gradients(nn.Module(), outputs, a.differentiable).values()]


def ragged(a: Arguments) -> Arguments:
    """Returns the arguments with lengths from 0 to T and with resets."""
    steps, batch, _ = a.x.shape
    lengths, resets = torch.randint(0, steps + 1, (batch,)), torch.rand(steps, batch) < 0.3
    return a._replace(lengths=lengths, resets=resets)


def variation_cases() -> Iterator[tuple[Any, ...]]:
    """Yields (route, cell, variations, projection, dtype, hidden, form)."""
    forms = ("one way", "reverse", "both ways")
    for (cell, *variations), dtype in itertools.product([*SERVED, *((cell,) for cell in CELLS)], HALVES):
        for projection in (0, 19) if cell.startswith("lstm") else (0,):
            for form in forms:
                yield "step", cell, tuple(variations), projection, dtype, 33, form
    # Of each size of the clusters one.
    for dtype, most in CLUSTER_HIDDEN.items():
        sizes = [hidden for hidden in (33, 100, 250, 380, 500) if hidden <= most]
        yield from itertools.product(("cluster",), CLUSTER_CELLS, ((),), (0,), (dtype,), sizes, forms)


@on_devices("cell variations projection dtype hidden form", variation_cases(), every=37)
def test_what_torch_has_not_matches_the_reference(
    device: torch.device,
    route: str,
    cell: str,
    variations: tuple[str, ...],
    projection: int,
    dtype: torch.dtype,
    hidden: int,
    form: str,
) -> None:
    # float32 and float64 of the step path are in test_ops.py. Here rounding moves values across kinks, where
    # gradients jump.
    smooth = not {"relu", "cell_clip"} & {*variations} and not projection
    a = ragged(arguments(cell, (6, 9, 3, hidden), 2 if form == "both ways" else 1, projection, dtype, smooth))
    a, options = vary(a, *variations, *(["proj_clip"] if projection else []))
    options = replace(options, cell=cell, reverse=form == "reverse")
    ours, theirs = outputs_of(ops.layer, route), outputs_of(reference.layer, route)
    with torch.no_grad():
        expected = [theirs(b, options) for b in (a, doubled(a))]
        assert_close_to_f64(ours(a, options), *expected, dtype, eps=eps_of(dtype))
    if smooth:
        expected = [with_gradients(b, options, theirs) for b in (a, doubled(a))]
        assert_close_to_f64(with_gradients(a, options, ours), *expected, dtype, eps=eps_of(dtype))


def call_cases() -> list[tuple[Any, ...]]:
    """Returns (route, cell, dtype), one of each kind of kernel."""
    cases = [("step", cell, torch.float32) for cell in CELLS] + [("step", "lstm", torch.bfloat16)]
    return cases + list(itertools.product(("cluster",), CLUSTER_CELLS, CLUSTER_DTYPES))


@on_devices("cell dtype", call_cases(), every=3)
def test_results_repeat_to_the_bit(device: torch.device, route: str, cell: str, dtype: torch.dtype) -> None:
    # H and B are those of the largest clusters of the dtype, and of several.
    hidden = CLUSTER_HIDDEN[dtype] - 6 if route == "cluster" else 130
    a = ragged(arguments(cell, (9, 33, 16, hidden), 2, dtype=dtype))
    layer = outputs_of(ops.layer, route)

    def both_passes() -> tuple[Tensor, ...]:
        with torch.no_grad():  # Which has kernels of its own.
            inferred = layer(a, Options(cell))
        return (*inferred, *results(a, Options(cell), layer))

    first = both_passes()
    for _ in range(REPEATS if device.type == "cuda" else 2):
        assert all(map(torch.equal, first, both_passes()))


@on_devices("cell dtype", call_cases(), every=4)
def test_strides_do_not_matter(device: torch.device, route: str, cell: str, dtype: torch.dtype) -> None:
    def strided(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype)
        wide[..., 0] = t.detach()
        return wide[..., 0].requires_grad_()

    a = ragged(arguments(cell, (5, 9, 7, 33), 2, dtype=dtype))
    expected = results(a, Options(cell), outputs_of(ops.layer, route))
    b = rebuild(a, [strided(t) for t in a.differentiable])
    turned = a._replace(x=a.x.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_())
    for other in (b, turned):
        assert all(map(torch.equal, expected, results(other, Options(cell), outputs_of(ops.layer, route))))


@on_devices("cell dtype", call_cases(), every=4)
def test_a_batch_of_no_rows(device: torch.device, route: str, cell: str, dtype: torch.dtype) -> None:
    a = arguments(cell, (4, 0, 5, 33), 2, dtype=dtype)
    y, _, h_n, *_ = outputs = ops.layer(a, Options(cell))
    assert y.shape == (4, 0, 66)
    assert h_n.shape == (2, 0, 33)
    for gradient in gradients(nn.Module(), outputs[0], a.differentiable).values():
        assert gradient is None or not gradient.any()


only_cuda = pytest.mark.parametrize(
    ("device", "route", "cell", "dtype"),
    [
        pytest.param("cuda", *case, id="-".join(map(str, case)), marks=pytest.mark.gpu)
        for case in call_cases()
        if CLUSTERS or case[0] != "cluster"
    ],
    indirect=["device", "route"],
)


def queue_a_long_wait() -> torch.cuda.Event:
    """Keeps the current stream busy for half a second; returns an event at its end."""
    torch.cuda._sleep(1_000_000_000)
    event = torch.cuda.Event()
    event.record()
    return event


@only_cuda
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_graph_replays_on_new_inputs(
    device: torch.device, route: str, cell: str, dtype: torch.dtype, training: bool
) -> None:
    a, layer = ragged(arguments(cell, (6, 9, 8, 33), 2, dtype=dtype)), outputs_of(ops.layer, route)

    def run() -> tuple[Tensor, ...]:
        if training:
            return results(a, Options(cell), layer)
        with torch.no_grad():
            return layer(a, Options(cell))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # What is made once must not be made during the capture.
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for tensor in a.differentiable:
            tensor.copy_(torch.randn_like(tensor) / 4)
        a.lengths.copy_(torch.randint(0, 7, (9,)))
        a.resets.copy_(torch.rand(6, 9) < 0.3)
    graph.replay()
    assert all(map(torch.equal, captured, run()))


@only_cuda
def test_the_current_stream_is_used(device: torch.device, route: str, cell: str, dtype: torch.dtype) -> None:
    a = ragged(arguments(cell, (6, 9, 8, 33), 2, dtype=dtype))
    expected = results(a, Options(cell), outputs_of(ops.layer, route))
    late = torch.zeros_like(a.x, requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        queue_a_long_wait()
        with torch.no_grad():
            late.copy_(a.x)  # What does not wait for this stream reads zeros.
        found = results(a._replace(x=late), Options(cell), outputs_of(ops.layer, route))
    stream.synchronize()
    assert all(map(torch.equal, expected, found))


@only_cuda
def test_no_call_waits_for_the_device(
    device: torch.device, route: str, cell: str, dtype: torch.dtype
) -> None:
    a = ragged(arguments(cell, (6, 9, 8, 33), 2, dtype=dtype))

    def run() -> None:
        outputs = ops.layer(a, Options(cell))
        torch.autograd.grad(outputs[0].sum(), a.differentiable, allow_unused=True)
        with torch.no_grad():
            ops.layer(a, Options(cell))

    run()
    torch.cuda.synchronize()
    busy = queue_a_long_wait()
    with no_waiting():
        run()
    assert not busy.query(), "the call came back after the device had caught up"


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Makes torch raise where it would stop the host until the device has caught up."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # That it does not see all of them.
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@only_cuda
def test_every_device_whichever_is_the_current_one(
    device: torch.device, route: str, cell: str, dtype: torch.dtype
) -> None:
    for index in range(torch.cuda.device_count()):
        with torch.device("cuda", index):
            a = ragged(arguments(cell, (6, 9, 8, 33), 2, dtype=dtype))
            found = with_gradients(a, Options(cell), outputs_of(ops.layer, route))
            theirs = outputs_of(reference.layer, route)
            expected = [with_gradients(b, Options(cell), theirs) for b in (a, doubled(a))]
        assert {t.device.index for t in found if t is not None} == {index}
        assert_close_to_f64(found, *expected, dtype, eps=eps_of(dtype))
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CLUSTER_CELLS)
@pytest.mark.parametrize("forward", PATHS)
def test_either_path_goes_back_from_the_tape_of_the_other(cell: str, forward: str) -> None:
    # Calls that want every c are not the cluster path's, but their backward calls can be.
    all_states = forward == "step" and cell == "lstm"
    with use_device("cuda"):
        a = ragged(arguments(cell, (5, 9, 7, 33), 2, dtype=torch.bfloat16, requires_grad=False))
        with cuda.use_path(forward):
            *outputs, tape = torch.ops.torchrnn.layer_train(*ops.flat(a, Options(cell), all_states))
        given = [torch.randn_like(out) if out.numel() else None for out in outputs]
        found = []
        for path in PATHS:
            with cuda.use_path(path):
                told = ops.flat(a, Options(cell), all_states)
            needs = [True] * 4
            back = torch.ops.torchrnn.layer_backward(*given, *told, outputs[0], tape, *needs)
            found.append([back[0], *back[1], *back[2:]])
    for one, other in zip(found[0], found[-1], strict=True):
        worst = torch.finfo(torch.bfloat16).eps * one.abs().max() if one.numel() else 0
        torch.testing.assert_close(one, other, rtol=0, atol=float(2 * worst))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("cell", "dtype", "hidden", "variation", "why"),
    [
        ("lstm", torch.float64, 33, None, "the dtype is float64"),
        ("lstm", torch.float32, 33, None, "the dtype is float32 and TF32 is not allowed"),
        ("lstm", torch.bfloat16, 513, None, "the hidden size is above 512"),
        ("rnn", torch.bfloat16, 33, None, "the cell is not lstm or gru"),
        ("gru_reset_before", torch.bfloat16, 33, None, "the cell is not lstm or gru"),
        ("lstm", torch.bfloat16, 33, "peephole", "there are peepholes"),
        ("lstm", torch.bfloat16, 33, "mask_h", "there are masks on the state"),
        ("gru", torch.bfloat16, 33, "relu", "the activation is not tanh"),
    ],
    ids=str,
)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_the_cluster_path_says_what_it_does_not_serve(
    cell: str, dtype: torch.dtype, hidden: int, variation: str | None, why: str, grad: bool
) -> None:
    with use_device("cuda"), cuda.use_path("cluster"):
        a = arguments(cell, (3, 2, 4, hidden), dtype=dtype, requires_grad=grad)
        a, options = vary(a, *([variation] if variation else []))
        with pytest.raises(RuntimeError, match=f"the cluster path does not serve this call: {why}"):
            ops.layer(a, replace(options, cell=cell))


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CLUSTER_CELLS)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_the_cluster_path_serves_float32_up_to_its_own_size(cell: str, grad: bool) -> None:
    with use_device("cuda"), use_tf32(True), cuda.use_path("cluster"):
        a = arguments(cell, (3, 2, 4, 257), dtype=torch.float32, requires_grad=grad)
        with pytest.raises(RuntimeError, match="does not serve this call: the hidden size is above 256"):
            ops.layer(a, Options(cell))


@pytest.mark.gpu
@pytest.mark.parametrize("field", ["h0", "weight_hh", "resets", "x"])
def test_tensors_of_two_devices_are_refused(field: str) -> None:
    with use_device("cuda"):
        a = arguments(dtype=torch.float32, requires_grad=False)
        a = a._replace(resets=torch.zeros(a.x.shape[:2], dtype=torch.bool))
    value = getattr(a, field)
    moved = [tensor.cpu() for tensor in value] if isinstance(value, list) else value.cpu()
    with pytest.raises(ValueError, match="must be on x's device"):
        ops.layer(a._replace(**{field: moved}), Options())


@pytest.mark.gpu
def test_lengths_may_be_on_the_cpu() -> None:
    with use_device("cuda"):
        lstm, x = torchrnn.LSTM(5, 7, bidirectional=True), torch.randn(4, 3, 5)
        expected = lstm(x, lengths=torch.tensor([2, 0, 4]))
        for lengths in ([2, 0, 4], torch.tensor([2, 0, 4], device="cpu")):
            assert all(map(torch.equal, leaves(expected), leaves(lstm(x, lengths=lengths))))
