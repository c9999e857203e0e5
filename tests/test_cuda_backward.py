"""The backward kernel of the CUDA cluster path without a GPU: its source on the emulated device.

Letters as in ``torchrnn/reference.py``: T steps, B batch rows, D directions, H hidden units, G gates.
"""

from __future__ import annotations

import struct
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


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the program that runs the kernel."""
    return emulated(tmp_path_factory.mktemp("backward"), "cluster_backward_test.cpp")


@dataclass
class Call:
    """One backward call: what the kernel reads, and what it must give, exact to float64."""

    cell: str
    dtype: torch.dtype
    reverse: bool
    pair: bool
    sizes: tuple[int, int, int, int]
    """T, B, H, D."""
    arrays: list[Tensor | None]
    """Contiguous, in the order of the program."""
    strides: tuple[int, ...]
    """Of dy."""
    expected: dict[str, Tensor]
    alive: Tensor
    """[T, B] bool."""

    def run(
        self, program: Path, folder: Path, seed: int, fault: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Runs the kernel, which leaves its results in ``folder``."""
        head = [self.cell == "gru", code(self.dtype), self.reverse, self.pair, *self.sizes, *self.strides]
        parts = [struct.pack(f"{len(head)}q", *head)]
        for array in self.arrays:
            data = b"" if array is None else array.flatten().view(torch.uint8).numpy().tobytes()
            parts += [struct.pack("q", len(data)), data]
        (folder / "in").write_bytes(b"".join(parts))
        command = [str(program), str(folder / "in"), str(folder / "out"), str(seed), fault]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def results(self, folder: Path) -> dict[str, Tensor]:
        """Returns what the kernel has written, by the names of ``expected``."""
        data = bytearray((folder / "out").read_bytes())
        results: dict[str, Tensor] = {}
        for name, tensor in self.expected.items():
            dtype = torch.float32 if name in ("dh0", "dc0") else self.dtype
            size = tensor.numel() * dtype.itemsize
            results[name] = torch.frombuffer(data[:size], dtype=dtype).view(tensor.shape)
            del data[:size]
        assert not data
        return results


def make_arguments(
    cell: str, dtype: torch.dtype, sizes: tuple[int, int, int, int], lengths: bool, resets: bool, absent: bool
) -> reference.Arguments:
    """Returns a layer call with random numbers, rounded to dtype, in float64."""
    steps, batch, hidden, directions = sizes
    rows = GATES[cell] * hidden

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype).double()

    def state() -> Tensor:
        value = random(directions, batch, hidden)
        return (torch.zeros_like(value) if absent else value).requires_grad_()

    ends = None
    if lengths:
        # All but the last row end early; of many rows, those of the first cluster at once.
        ends = torch.randint(0, steps, (batch,))
        ends[: 8 if batch > 16 else 1] = 0
        ends[-1] = steps
    return reference.Arguments(
        # One block for each direction, and weights that pick it out: its gradient is that by the gates.
        x=random(steps, batch, directions * rows).requires_grad_(),
        weight_ih=list(torch.eye(directions * rows, dtype=torch.float64).chunk(directions)),
        weight_hh=[(random(rows, hidden) / hidden**0.5).to(dtype).double() for _ in range(directions)],
        bias_ih=[],
        bias_hh=[random(rows) for _ in range(directions)],
        weight_hr=[],
        peephole=[],
        norm_gain=[],
        norm_shift=[],
        h0=state(),
        c0=state() if cell == "lstm" else None,
        lengths=ends,
        resets=torch.rand(steps, batch) < 0.4 if resets else None,
    )


def make_call(
    cell: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    reverse: bool = False,
    lengths: bool = False,
    resets: bool = False,
    absent: bool = False,
    pair: bool = True,
) -> Call:
    """Returns a call with random inputs of these sizes (T, B, H, D).

    Args:
        cell: "lstm" or "gru".
        dtype: What y, dy, dc_all and the weights are rounded to.
        sizes: T, B, H, D.
        reverse: Whether direction 0 runs backwards.
        lengths: Whether rows end early.
        resets: Whether the state is forgotten now and then.
        absent: Whether initial states and all gradients but dy are null pointers.
        pair: Whether to run a small cluster of two, and not the one that serves the call.
    """
    steps, batch, hidden, directions = sizes
    a = make_arguments(cell, dtype, sizes, lengths, resets, absent)
    walks, outputs = walk(a, Options(cell=cell, reverse=reverse))
    gradients = [torch.randn_like(t).to(dtype) for t in outputs]
    used = [i for i in range(1 if absent else 4) if outputs[i].requires_grad]
    torch.autograd.backward([outputs[i] for i in used], [gradients[i].double() for i in used])

    alive = torch.arange(steps)[:, None] < (torch.full((batch,), steps) if a.lengths is None else a.lengths)
    expected = {}
    assert a.x.grad is not None
    for d, dgates in enumerate(a.x.grad.chunk(directions, -1)):
        expected[f"dgates_x {d}"] = dgates
        if cell == "gru":
            # n's part of R h goes through r.
            factor = torch.cat([torch.ones_like(dgates[..., : 2 * hidden]), walks[d][..., :hidden]], -1)
            expected[f"dgates_h {d}"] = dgates * factor
        expected[f"h_prev {d}"] = walks[d][..., -hidden:] * alive[..., None]
    for name, state in (("dh0", a.h0), ("dc0", a.c0)):
        if state is not None:
            assert state.grad is not None
            expected[name] = state.grad

    # What is not to be read is NaN: a gap after each row of dy, and the tape past the end.
    y, (dy, dc_all, dh_n, dc_n) = outputs[0].detach(), gradients
    spread = torch.full((steps, batch, y.size(-1) + 3), torch.nan, dtype=dtype)
    spread[..., : y.size(-1)] = dy
    tape = torch.stack(walks)[..., :-hidden].where(alive[..., None], torch.nan).float()

    def optional(t: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return None if absent or t is None else t.detach().to(dtype)

    states = [optional(a.h0), optional(a.c0)]
    arrays = [*(w.to(dtype) for w in a.weight_hh), y.to(dtype), tape, *states, a.lengths, a.resets, spread]
    arrays += [optional(dc_all, dtype), optional(dh_n), optional(dc_n)]
    return Call(cell, dtype, reverse, pair, sizes, arrays, spread.stride()[:2], expected, alive)


def check(call: Call, folder: Path) -> None:
    """Asserts that the results are those expected, to 2 units in the last place of the largest."""
    for name, result in call.results(folder).items():
        exact = call.expected[name]
        error = (result.double() - exact).abs().max()
        bound = 2 * eps(call.dtype) * exact.abs().max()
        assert error <= bound, f"{name}: off by {error:.3g}, allowed are {bound:.3g}"
        if name not in ("dh0", "dc0"):
            assert not result[~call.alive].any(), f"{name}: not zero past the end"


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 1, 17, 1), {}),
        ((5, 7, 32, 1), {"resets": True}),
        ((5, 9, 33, 2), {"lengths": True, "resets": True}),
        ((5, 9, 64, 2), {"lengths": True, "resets": True, "reverse": True}),
        ((5, 9, 64, 1), {"absent": True}),
        ((4, 7, 90, 2), {"lengths": True}),
        ((3, 17, 16, 1), {"lengths": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_reference(
    program: Path,
    tmp_path: Path,
    cell: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    options: dict[str, bool],
) -> None:
    call = make_call(cell, dtype, sizes, **options)
    done = call.run(program, tmp_path, seed=int(torch.randint(1 << 31, ())))
    assert done.returncode == 0, done.stderr
    check(call, tmp_path)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(("dtype", "hidden"), SIZES, ids=str)
def test_each_size_of_the_kernel_runs(
    program: Path, tmp_path: Path, cell: str, dtype: torch.dtype, hidden: int
) -> None:
    call = make_call(cell, dtype, (3, 3, hidden, 1), resets=True, pair=False)
    done = call.run(program, tmp_path, seed=int(torch.randint(1 << 31, ())))
    assert done.returncode == 0, done.stderr
    check(call, tmp_path)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_order_of_events_changes_no_bit(
    program: Path, tmp_path: Path, cell: str, dtype: torch.dtype
) -> None:
    call = make_call(cell, dtype, (6, 9, 20, 2), lengths=True, resets=True)
    seen = set()
    for seed in range(8):
        done = call.run(program, tmp_path, seed)
        assert done.returncode == 0, done.stderr
        seen.add((tmp_path / "out").read_bytes())
    assert len(seen) == 1
    check(call, tmp_path)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_protocol_is_found(program: Path, tmp_path: Path, fault: str) -> None:
    call = make_call("lstm", torch.float16, (6, 8, 20, 1))
    assert call.run(program, tmp_path, seed=0).returncode == 0
    right = (tmp_path / "out").read_bytes()
    found = 0
    for seed in range(8):
        done = call.run(program, tmp_path, seed, fault)
        found += done.returncode != 0 or (tmp_path / "out").read_bytes() != right
    assert found > 0
