"""Teams of threads: results do not depend on who does what, and all end whatever becomes of one member."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import assert_close_to_f64, needs_kernels
from host_build import build
from torch import Tensor, nn

import torchrnn
from torchrnn import _native

pytestmark = needs_kernels

Results = tuple[Tensor, ...]

# Large enough to be shared (team_size in csrc/cpu/ops.cpp), in each of the ways in which that is done.
SHARED: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "lstm, rows": lambda: (torchrnn.LSTM(33, 65), torch.randn(40, 33, 33)),
    "lstm, units": lambda: (torchrnn.LSTM(64, 256), torch.randn(9, 2, 64)),
    "lstm, directions": lambda: (torchrnn.LSTM(64, 130, bidirectional=True), torch.randn(20, 4, 64)),
    "lstm, projected": lambda: (torchrnn.LSTM(33, 130, proj_size=65), torch.randn(20, 7, 33)),
    "gru": lambda: (torchrnn.GRU(33, 130), torch.randn(33, 7, 33)),
    "gru, reset before": lambda: (torchrnn.GRU(33, 130, reset_after=False), torch.randn(33, 7, 33)),
    "rnn": lambda: (torchrnn.RNN(33, 256, bidirectional=True), torch.randn(33, 9, 33)),
    "layer norm": lambda: (Normalised(), torch.randn(33, 9, 33)),
}


class Normalised(nn.Module):
    """An LSTM with layer normalisation, of which one thread needs all units of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = torchrnn.rnn_cell.LayerNormBasicLSTMCell(65)

    def forward(self, x: Tensor) -> tuple[Tensor, object]:
        return torchrnn.dynamic_rnn(self.cell, x, dtype=x.dtype, time_major=True)


def run(module: nn.Module, x: Tensor) -> Results:
    """Returns the output, the gradients and what is put out without gradients."""
    x = x.detach().requires_grad_()
    y = module(x)[0]
    grads = torch.autograd.grad((y * y).sum(), [x, *module.parameters()])
    with torch.no_grad():
        return y.detach(), *grads, module(x)[0]


@pytest.fixture(params=SHARED)
def shared(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    module, x = SHARED[request.param]()
    module(x)  # Cells of TensorFlow make their weights at the first call.
    return module, x


def assert_same(ours: Results, theirs: Results) -> None:
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(our, their), f"result {i}: {(our - their).abs().max()}"


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_run_to_run_results_are_equal_bit_by_bit(shared: tuple[nn.Module, Tensor], threads: int) -> None:
    """Also where there are more threads than cores, so that parts are done by who is not their owner."""
    torch.set_num_threads(threads)
    first = run(*shared)
    for _ in range(10):
        assert_same(run(*shared), first)


def test_the_number_of_threads_changes_last_bits_at_most(shared: tuple[nn.Module, Tensor]) -> None:
    module, x = shared
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(module, x))
    exact = run(module.double(), x.double())
    for result in results:
        assert_close_to_f64(result, results[0], exact, torch.float32)
        for our, their in zip(result, results[0], strict=True):
            assert (our - their).abs().max() <= 32 * torch.finfo(our.dtype).eps * their.abs().max()


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_alone_and_the_instruction_set_change_last_bits_at_most(name: str, dtype: torch.dtype) -> None:
    module, x = SHARED[name]()
    module(x)
    module, x = module.to(dtype), x.to(dtype)
    with torch.no_grad():
        together = module(x)[0]
        bound = 32 * torch.finfo(dtype).eps * together.abs().max()
        for isa in _native.isas():
            with _native.use_isa(isa):
                assert (module(x)[0] - together).abs().max() <= bound, isa
                for b in range(x.size(1)):
                    alone = module(x[:, b : b + 1])[0]
                    assert (alone - together[:, b : b + 1]).abs().max() <= bound, (isa, b)


def test_calls_from_several_threads_of_python(shared: tuple[nn.Module, Tensor]) -> None:
    torch.set_num_threads(2)
    expected = run(*shared)
    found: list[Results] = []
    callers = [threading.Thread(target=lambda: found.append(run(*shared))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == len(callers)
    for results in found:
        # A thread of Python has threads of torch of its own, whose number may differ.
        for our, their in zip(results, expected, strict=True):
            assert (our - their).abs().max() <= 32 * torch.finfo(our.dtype).eps * their.abs().max()


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=dict(os.environ, **environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_flush_denormals(dtype: torch.dtype) -> None:
    layer = torchrnn.RNN(1, 1, nonlinearity="relu", bias=False, dtype=dtype)
    smallest = torch.finfo(dtype).tiny
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1)
        for isa in _native.isas():
            with _native.use_isa(isa):
                y = layer(torch.tensor([smallest, smallest / 2], dtype=dtype).view(1, 2, 1))[0]
                assert y.flatten().tolist() == [smallest, 0.0], isa
    assert (torch.tensor(smallest, dtype=dtype) / 2).item() > 0, "the caller's own flags are as they were"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
def test_small_work_is_done_by_the_thread_of_the_caller() -> None:
    program = """
import os, torch, torchrnn
torch.set_num_threads(2)
count = lambda: len(os.listdir("/proc/self/task"))
small, large = torchrnn.LSTM(256, 256), torchrnn.LSTM(64, 256)
before = count()
with torch.no_grad():
    small(torch.randn(1, 1, 256)), torchrnn.LSTMCell(256, 256)(torch.randn(1, 256))
    between = count()
    large(torch.randn(128, 8, 64))
print(between - before, count() - between)
"""
    done = python(program)
    assert done.stdout.split() == ["0", "1"], done.stdout + done.stderr


FAILING = """
#include <cstddef>
#include <cstdlib>
#include <dlfcn.h>

// Fails the call that `countdown` tells; the kernels take their memory by aligned_alloc alone.
extern "C" {
long countdown = -1;
}
extern "C" void* aligned_alloc(size_t alignment, size_t size) {
  if (countdown >= 0 && countdown-- == 0) return nullptr;
  using Allocate = void* (*)(size_t, size_t);
  static const auto real = reinterpret_cast<Allocate>(dlsym(RTLD_NEXT, "aligned_alloc"));
  return real(alignment, size);
}
"""

FAILURES = """
import ctypes, torch, torchrnn
torch.set_num_threads(3)
countdown = ctypes.c_long.in_dll(ctypes.CDLL(None), "countdown")
failed = 0
for module, T, B in ((torchrnn.LSTM(64, 130, bidirectional=True), 33, 8), (torchrnn.GRU(64, 256), 16, 2)):
    x = torch.randn(T, B, 64, requires_grad=True)
    def run():
        y, _ = module(x)
        return y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])
    expected = run()
    for nth in range(10_000):
        countdown.value = nth
        try:
            run()
        except MemoryError:
            failed += 1
        else:
            break
        finally:
            done = countdown.value >= 0
            countdown.value = -1
        assert all(map(torch.equal, run(), expected))
    assert done, "a failure that nobody told of"
assert failed > 10, failed
print("ended", failed)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
def test_memory_that_is_refused_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    """Each request for memory of forward and backward fails once; all threads go on working."""
    source = tmp_path / "failing.cpp"
    source.write_text(FAILING)
    library = build(tmp_path, "-shared", "-fPIC", source, "-ldl")
    done = python(FAILURES, LD_PRELOAD=str(library))
    assert done.stdout.startswith("ended"), done.stdout + done.stderr
