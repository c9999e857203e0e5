"""The forward kernel of the CUDA cluster path without a GPU: index maps, and its source emulated.

Letters as in ``torchrnn/reference.py``: T steps, B batch rows, D directions, H hidden units, G gates.
"""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cluster_reference import DTYPES, GATES, SIZES, code, eps, walk
from host_build import FAULTS, emulated
from torch import Tensor

from torchrnn import reference
from torchrnn.options import Options

TAPE = {"lstm": 5, "gru": 5}
GUARD = 64  # Elements before and after an array, to see accesses out of bounds.
MAPS = ["buckets", "weights", "operand", "sums", "owners", "backward_sums", "batch_tails", "parities"]


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated(tmp_path_factory.mktemp("maps"), "maps_test.cpp")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = emulated(tmp_path_factory.mktemp("forward"), "cluster_forward_test.cpp", "-fPIC", "-shared")
    library = ctypes.CDLL(str(path))
    library.run_cluster_forward.restype = ctypes.c_char_p
    pointer = ctypes.c_void_p
    library.run_cluster_forward.argtypes = [pointer, pointer, ctypes.c_uint64, ctypes.c_char_p]
    return library


@pytest.mark.parametrize("test", MAPS)
def test_maps_give_each_thing_to_one(maps: Path, test: str) -> None:
    done = subprocess.run([maps, test], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def guarded(array: Tensor) -> Tensor:
    """Returns a copy that lies between NaNs."""
    memory = torch.full((array.numel() + 2 * GUARD,), torch.nan, dtype=array.dtype)
    copy = memory[GUARD : GUARD + array.numel()].view(array.shape)
    return copy.copy_(array)


def is_guarded(array: Tensor) -> bool:
    """Returns whether the NaNs around a guarded array are still there."""
    memory = torch.empty(0, dtype=array.dtype).set_(array.untyped_storage())
    return bool(memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all())


@dataclass
class Call:
    """One call of the kernel, and what it must give, exact to float64."""

    arguments: reference.Arguments
    """In float64, of numbers that the kernel's dtypes have."""
    options: Options
    dtype: torch.dtype
    sizes: tuple[int, int, int, int]
    """T, B, H, D."""
    pair: bool = False
    """Whether a cluster of two runs, which H needs not."""
    training: bool = True

    def run(self, kernel: ctypes.CDLL, seed: int, fault: str = "") -> tuple[str, dict[str, Tensor]]:
        """Returns what the emulator found wrong, and y, h_n, c_n and tape as the kernel left them."""
        (steps, batch, hidden, directions), a, cell = self.sizes, self.arguments, self.options.cell
        arrays: list[Tensor | None] = []
        for d in range(directions):
            bias = a.bias_ih[d] + a.bias_hh[d] if a.bias_ih else None
            bias_h = None
            if cell == "gru" and bias is not None:
                bias[2 * hidden :] = a.bias_ih[d][2 * hidden :]
                bias_h = guarded(a.bias_hh[d][2 * hidden :].float())
            wx = a.x.chunk(directions, -1)[d].float()
            wx = guarded(wx if a.lengths is None else wx.where(self.alive[..., None], torch.nan))
            arrays += [
                guarded(a.weight_hh[d].to(self.dtype)),
                None if bias is None else guarded(bias.float()),
                bias_h,
                wx,
            ]
        arrays += [None if s is None else guarded(s.float()) for s in (a.h0, a.c0)]
        arrays += [a.lengths, a.resets]

        def output(dtype: torch.dtype, *shape: int) -> Tensor:
            return guarded(torch.full(shape, torch.nan, dtype=dtype))

        results = {"y": output(self.dtype, steps, batch, directions * hidden)}
        if self.training:
            results["tape"] = output(torch.float32, directions, steps, batch, TAPE[cell] * hidden)
        results["h_n"] = output(torch.float32, directions, batch, hidden)
        if cell == "lstm":
            results["c_n"] = output(torch.float32, directions, batch, hidden)
        arrays += [results.get(name) for name in ("y", "tape", "h_n", "c_n")]

        numbers = torch.tensor(
            [cell == "gru", code(self.dtype), self.options.reverse, self.pair, *self.sizes]
        )
        pointers = (ctypes.c_void_p * len(arrays))(*(None if t is None else t.data_ptr() for t in arrays))
        message = kernel.run_cluster_forward(numbers.data_ptr(), pointers, seed, fault.encode())
        for name, result in results.items():
            assert is_guarded(result), f"{name}: written out of bounds"
        return message.decode(), results

    @property
    def alive(self) -> Tensor:
        """Which steps the rows have, [T, B]."""
        steps, batch = self.sizes[:2]
        lengths = self.arguments.lengths
        return torch.arange(steps)[:, None] < (torch.full((batch,), steps) if lengths is None else lengths)

    def expected(self) -> dict[str, Tensor]:
        """Returns the reference's results."""
        walks, (y, _, h_n, c_n) = walk(self.arguments, self.options)
        tape = torch.stack([each[..., : -self.sizes[2]] for each in walks])  # Without the h before the step.
        return {"y": y, "tape": tape, "h_n": h_n, "c_n": c_n}

    def check(self, results: dict[str, Tensor]) -> None:
        """Asserts that the results are the reference's, to two units in the last place of the largest."""
        expected = self.expected()
        assert not results["y"][~self.alive].any(), "y: not zero past the end"
        for name, result in results.items():
            # Past the end the tape holds anything.
            seen = (slice(None), self.alive) if name == "tape" else ()
            exact = expected[name][seen]
            if exact.numel() == 0:
                continue
            bound = 2 * eps(self.dtype) * exact.abs().max()
            error = (result[seen].double() - exact).abs().max()
            assert error <= bound, f"{name}: off by {error:.3g}, allowed are {bound:.3g}"


def make_call(
    cell: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    *,
    reverse: bool = False,
    lengths: bool = False,
    resets: bool = False,
    absent: bool = False,
    pair: bool = False,
    training: bool = True,
) -> Call:
    """Returns a call with random inputs of these sizes (T, B, H, D).

    Args:
        cell: "lstm" or "gru".
        dtype: That of the weights and y.
        sizes: T, B, H, D.
        reverse: Whether direction 0 runs backwards.
        lengths: Whether rows end early; the first has no step.
        resets: Whether the state is forgotten now and then.
        absent: Whether biases and initial states are null pointers.
        pair: Whether to run a cluster of two where one CTA would do.
        training: Whether a tape is wanted.
    """
    (steps, batch, hidden, directions), gates = sizes, GATES[cell]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).double()

    def recurrent() -> Tensor:
        weight: Tensor = random(gates * hidden, hidden) / hidden**0.5
        return weight.to(dtype).double()

    a = reference.Arguments(
        # One block for each direction, and weights that pick it out.
        x=random(steps, batch, directions * gates * hidden),
        weight_ih=list(torch.eye(directions * gates * hidden, dtype=torch.float64).chunk(directions)),
        weight_hh=[recurrent() for _ in range(directions)],
        bias_ih=[] if absent else [random(gates * hidden) for _ in range(directions)],
        bias_hh=[] if absent else [random(gates * hidden) for _ in range(directions)],
        weight_hr=[],
        peephole=[],
        norm_gain=[],
        norm_shift=[],
        h0=None if absent else random(directions, batch, hidden),
        c0=random(directions, batch, hidden) if cell == "lstm" and not absent else None,
        lengths=torch.randint(0, steps + 1, (batch,)) if lengths else None,
        resets=torch.rand(steps, batch) < 0.4 if resets else None,
    )
    if a.lengths is not None:
        a.lengths[0] = 0
    return Call(a, Options(cell=cell, reverse=reverse), dtype, sizes, pair, training)


def any_seed() -> int:
    return int(torch.randint(1 << 31, ()))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 1, 33, 1), {"pair": True}),
        ((5, 7, 64, 1), {"pair": True, "resets": True, "training": False}),
        ((5, 9, 33, 2), {"pair": True, "lengths": True, "resets": True}),
        ((5, 9, 64, 2), {"pair": True, "lengths": True, "resets": True, "reverse": True}),
        ((5, 9, 40, 1), {"pair": True, "absent": True}),
        ((5, 9, 33, 2), {"lengths": True}),
        ((5, 8, 1, 1), {"reverse": True, "resets": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_those_of_the_reference(
    kernel: ctypes.CDLL,
    cell: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    options: dict[str, bool],
) -> None:
    call = make_call(cell, dtype, sizes, **options)
    message, results = call.run(kernel, any_seed())
    assert not message
    call.check(results)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(("dtype", "hidden"), SIZES, ids=str)
def test_each_size_of_the_kernel_runs(
    kernel: ctypes.CDLL, cell: str, dtype: torch.dtype, hidden: int
) -> None:
    call = make_call(cell, dtype, (3, 3, hidden, 1), resets=True)
    message, results = call.run(kernel, any_seed())
    assert not message
    call.check(results)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("absent", [False, True])
def test_without_a_step_the_states_stay(kernel: ctypes.CDLL, cell: str, lengths: bool, absent: bool) -> None:
    sizes = (3 if lengths else 0, 9, 33, 2)
    call = make_call(cell, torch.float16, sizes, pair=True, resets=True, absent=absent)
    if lengths:
        call.arguments = call.arguments._replace(lengths=torch.zeros(9, dtype=torch.int64))
    message, results = call.run(kernel, any_seed())
    assert not message
    assert not results["y"].any()
    for result, state in ((results["h_n"], call.arguments.h0), (results.get("c_n"), call.arguments.c0)):
        if result is not None:
            assert result.equal(torch.zeros_like(result) if state is None else state.float())


def test_what_a_row_must_not_see_may_be_anything(kernel: ctypes.CDLL) -> None:
    # Infinity and NaN stay in their row, and a reset forgets them.
    call = make_call("lstm", torch.float16, (4, 3, 33, 2), pair=True)
    a = call.arguments
    assert a.h0 is not None and a.c0 is not None
    clean = [state.clone() for state in (a.h0, a.c0)]
    for state in (a.h0, a.c0):
        state[:, 1] = torch.inf
        state[:, 2] = torch.nan
    resets = torch.zeros(4, 3, dtype=torch.bool)
    resets[0, 2] = True  # Before the first step of direction 0.
    call.arguments = a._replace(resets=resets)
    message, results = call.run(kernel, any_seed())
    assert not message
    expected = call.expected()
    assert torch.equal(results["y"].isnan(), expected["y"].isnan())
    assert not results["y"][:, 0].isnan().any()
    assert not results["y"][:, 2, :33].isnan().any()
    call.arguments = call.arguments._replace(h0=clean[0], c0=clean[1])
    rows = call.run(kernel, any_seed())[1]["y"]
    assert results["y"][:, 0].equal(rows[:, 0])
    assert results["y"][:, 2, :33].equal(rows[:, 2, :33])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_order_of_events_changes_no_bit(kernel: ctypes.CDLL, cell: str, dtype: torch.dtype) -> None:
    call = make_call(cell, dtype, (6, 9, 33, 2), pair=True, lengths=True, resets=True)
    message, first = call.run(kernel, 0)
    assert not message
    call.check(first)
    for seed in range(1, 8):
        message, results = call.run(kernel, seed)
        assert not message
        for name, result in results.items():
            assert result.view(torch.uint8).equal(first[name].view(torch.uint8)), name


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_protocol_is_found(kernel: ctypes.CDLL, fault: str) -> None:
    call = make_call("lstm", torch.float16, (6, 8, 33, 1), pair=True)
    message, right = call.run(kernel, 0)
    assert not message
    found = 0
    for seed in range(8):
        message, results = call.run(kernel, seed, fault)
        found += bool(message) or not results["y"].equal(right["y"])
    assert found > 0
