"""What all tests share: reproducible state, the tolerance rule, and the paths a call can take."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import torchrnn
from torchrnn import _native, ops
from torchrnn.differentiable import DifferentiableOp
from torchrnn.reference import Arguments

try:
    import numpy as np
except ImportError:  # A machine with a GPU may have no more than torch and pytest.
    np = None

SEED = 20240229
NEEDS_CUDA = os.environ.get("FAIL_WITHOUT_CUDA", "0") not in ("", "0")
"""Whether a test that is marked gpu fails where it would be skipped."""


def pytest_configure(config: pytest.Config) -> None:
    for text in (
        "RNN module weights are not part of single contiguous",  # Of torch.nn, about its speed.
        "Attempting to run cuBLAS, but there was no current CUDA context",  # Of a thread's first product.
        "Please use the new API settings to control TF32",  # torch.backends has both forms.
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{text}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests that need CUDA where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not NEEDS_CUDA or not item.get_closest_marker("gpu"):
        return report
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"FAIL_WITHOUT_CUDA is set, and this is skipped: {reason}"
    elif report.failed and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:  # No later test of this process can run; xdist starts another one.
            os._exit(1)
    return report


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seeds every generator, and restores them and the number of threads."""
    states = torch.get_rng_state(), random.getstate(), np and np.random.get_state()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(SEED)
    random.seed(SEED)
    if np:
        np.random.seed(SEED)
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    if np:
        np.random.set_state(states[2])
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _one_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives all that writes text, child processes too, one terminal and language, whatever the user's."""
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "PYTHON_COLORS", "LANGUAGE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"COLUMNS": "80", "LINES": "24", "TERM": "dumb", "LC_ALL": "C.UTF-8"}.items():
        monkeypatch.setenv(name, value)


needs_kernels = pytest.mark.skipif(_native.WHY_NOT is not None, reason="needs the kernels")

# Without kernels the ops themselves fall back to the reference; with them it is reached around the ops.
PATHS = ["reference", *_native.ISAS] if _native.WHY_NOT is None else ["fallback"]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on the plain-torch reference and on the CPU kernels of every instruction set."""
    with use_cpu_path(request.param):
        yield request.param


@pytest.fixture(params=[*PATHS, CUDA])
def any_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``path``, and on the CUDA kernels too, where all that the test makes without a device is on CUDA."""
    with use_device("cuda") if request.param == "cuda" else use_cpu_path(request.param):
        yield request.param


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Runs the test on CPU and CUDA: all that it makes without a device is there."""
    with use_device(request.param) as device:
        yield device


@contextlib.contextmanager
def use_cpu_path(name: str) -> Iterator[None]:
    """Runs what calls the ops on one of ``PATHS``."""
    if name not in ("reference", "fallback"):
        if name not in _native.isas():
            pytest.skip(f"{name}: this machine cannot run it")
        with _native.use_isa(name):
            yield
        return
    with pytest.MonkeyPatch.context() as patch, one_thread():
        if name == "reference":
            patch.setattr(DifferentiableOp, "__call__", lambda op, *args: op.reference(*op._split(args)))
            patch.setattr(ops, "infers", lambda *_: False)
        yield


@contextlib.contextmanager
def use_device(name: str) -> Iterator[torch.device]:
    """Makes a device that of all new tensors, with full float32 products; skips where it has no kernels."""
    if name == "cuda":
        if "cuda" not in torchrnn.info()["kernels"]:
            pytest.skip(f"no kernels for CUDA: {torchrnn.info()['why_not_cuda']}")
        # Memory that torch gives out after this holds NaN, as does then what a kernel leaves unwritten.
        freed = [torch.full((size,), float("nan"), device=name) for size in (2**24, *[2**16] * 16)]
        del freed
    with torch.device(name) as device, use_tf32(False):
        yield device


@contextlib.contextmanager
def use_tf32(allowed: bool) -> Iterator[None]:
    """Lets products of float32 on CUDA be rounded to TF32 or not: ours, cuDNN's and cuBLAS's."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def leaves(value: Any) -> list[Any]:
    """Returns what nested tuples, lists and dicts hold; a PackedSequence is a tuple."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def assert_close_to_f64(
    ours: Any, theirs: Any, f64: Any, dtype: torch.dtype, label: str = "", eps: float | None = None
) -> None:
    """Asserts ``max|ours - f64| <= 2 max|theirs - f64| + 8 eps(dtype) max|f64|``, the rule of all tests.

    Args:
        ours: What is tested: a tensor, or nested tuples, lists or dicts of tensors and None.
        theirs: The same from ``torch.nn`` in the same dtype.
        f64: The same from ``torch.nn`` in float64.
        dtype: The dtype that ``ours`` and ``theirs`` must have; tensors of integers must be equal.
        label: What is compared, for the message.
        eps: Replaces that of dtype where products are rounded to less, as to TF32.
    """
    eps = eps or torch.finfo(dtype).eps
    triples = list(zip(leaves(ours), leaves(theirs), leaves(f64), strict=True))
    for i, (our, their, exact) in enumerate(triples):
        name = f"{label or 'tensor'} {i + 1} of {len(triples)}"
        if our is None or their is None or exact is None:
            assert our is None and their is None and exact is None, f"{name}: ours {our}, theirs {their}"
            continue
        assert our.shape == their.shape == exact.shape, f"{name}: ours {our.shape}, theirs {their.shape}"
        assert our.dtype == their.dtype, f"{name}: ours {our.dtype}, theirs {their.dtype}"
        if not our.is_floating_point():
            assert torch.equal(our, their), name
            continue
        assert our.dtype == dtype, f"{name}: {our.dtype}, wanted {dtype}"
        assert exact.dtype == torch.float64, f"{name}: the exact result is {exact.dtype}"
        if our.numel() == 0:
            continue
        our_error, their_error = (
            (result.detach().double() - exact.detach()).abs().max().item() for result in (our, their)
        )
        scale = exact.detach().abs().max().item()
        bound = 2 * their_error + 8 * eps * scale
        # Written so that a NaN fails.
        assert our_error <= bound, (
            f"{name}, {list(our.shape)} {dtype}: max error {our_error:.3e} of ours is above {bound:.3e}; "
            f"torch's is {their_error:.3e}, the largest value {scale:.3e}"
        )


def gradients(module: nn.Module, results: Any, *inputs: Any) -> dict[str, Tensor | None]:
    """Returns the gradients of a fixed random functional of ``results`` by parameters and inputs."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    outputs = [leaf for leaf in leaves(results) if isinstance(leaf, Tensor) and leaf.requires_grad]
    # Rounded to bfloat16, so that the gradients that go in are the same numbers in every dtype.
    weights = [
        torch.randn(leaf.shape, generator=generator, device="cpu").bfloat16().double().to(leaf.device)
        for leaf in outputs
    ]
    wanted = dict(module.named_parameters())
    for i, leaf in enumerate(leaves(inputs)):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            wanted[f"input {i}"] = leaf
    total = sum((leaf.double() * weight).sum() for leaf, weight in zip(outputs, weights, strict=True))
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def doubled(value: Any) -> Any:
    """Returns nested tensors, PackedSequences too, as float64 leaves that require what the originals do."""
    return _mapped(value, Tensor.double)


def nudged(value: Any) -> Any:
    """Returns nested float64 tensors as leaves that are off by up to 8 eps.

    Nothing more exact is there to measure torch's own float64 error by. What the rule's 8 eps do to the
    results when they come in with weights and inputs is an error that no algorithm can be blamed for.
    """
    eps = torch.finfo(torch.float64).eps
    return _mapped(value, lambda tensor: tensor * (1 + 8 * eps * torch.randint_like(tensor, -1, 2)))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        return change(value.detach()).requires_grad_(value.requires_grad)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, change) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_mapped(item, change) for item in value)
    return value


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread: on a busy machine, more cost each product of MKL a slice of time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def rebuild(a: Arguments, values: Sequence[Any]) -> Arguments:
    """Puts values into the places of the tensors that are in ``a.differentiable``."""
    it = iter(values)
    x = next(it)
    lists = [[next(it) for _ in tensors] for tensors in a.lists]
    h0, c0 = (None if state is None else next(it) for state in (a.h0, a.c0))
    return Arguments._make([x, *lists, h0, c0, *a[11:]])


class Trio(NamedTuple):
    """One module three times with the same parameters: ours, torch.nn's, and torch.nn's in float64."""

    ours: nn.Module
    theirs: nn.Module
    exact: nn.Module

    def check(
        self,
        *inputs: Any,
        dtype: torch.dtype = torch.float32,
        through: Callable[..., Any] = lambda module, *inputs: module(*inputs),
        eps: float | None = None,
        **extras: Any,
    ) -> Any:
        """Asserts that results and all gradients agree, and returns ours.

        Args:
            *inputs: Of the call; leaves that require a gradient are compared too.
            dtype: Of the module and the inputs.
            through: How torch.nn's modules come to what ours returns at once.
            eps: As of ``assert_close_to_f64``.
            **extras: Keyword arguments for ours only.
        """
        exact_inputs = doubled(inputs)
        their_inputs = nudged(inputs) if dtype == torch.float64 else inputs
        result = self.ours(*inputs, **extras)
        ours = gradients(self.ours, result, *inputs)
        with one_thread():
            their_result, exact = through(self.theirs, *their_inputs), through(self.exact, *exact_inputs)
            theirs = gradients(self.theirs, their_result, *their_inputs)
            doubles = gradients(self.exact, exact, *exact_inputs)
        assert_close_to_f64(result, their_result, exact, dtype, "result", eps)
        with torch.no_grad():
            inferred = self.ours(*inputs, **extras)
        assert_close_to_f64(inferred, their_result, exact, dtype, "result of inference", eps)
        assert list(ours) == list(theirs) == list(doubles)
        for name in ours:
            assert_close_to_f64(ours[name], theirs[name], doubles[name], dtype, f"gradient of {name}", eps)
        return result


def trio(make: Callable[[ModuleType], nn.Module], dtype: torch.dtype = torch.float32) -> Trio:
    """Builds a module from ``torchrnn`` and from ``torch.nn``; ``make`` gets the namespace."""
    ours, theirs, exact = make(torchrnn).to(dtype), make(nn).to(dtype), make(nn).double()
    ours.load_state_dict(theirs.state_dict())
    exact.load_state_dict(theirs.state_dict())
    if dtype == torch.float64:
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(nudged(parameter))
    return Trio(ours, theirs, exact)
