"""The CUDA library without a GPU: its sources, built for the host, run the suite of the ops.

The step path's kernels are loops there and matrix products too (``tests/cuda/host_device.h``), those of the
cluster path run on the emulated device; all else is what runs on CUDA.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host_build import CSRC, TESTS, build
from torch.utils.cpp_extension import include_paths

SUITE = (
    "test_ops.py",
    "test_parity.py",
    "test_modules.py",
    "test_sequences.py",
    "test_recompute.py",
    "test_dropout.py",
)
FLAGS = [
    "-O2",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DTORCH_STABLE_ONLY",
    "-DRNN_ON_HOST",
    "-DRNN_EMULATE",
]
KERNELS = ("step_forward", "step_backward", "cluster_forward", "cluster_backward", "rows", "dropout")


@pytest.fixture(scope="module")
def host_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the library that the CUDA sources make on the host."""
    return build(
        tmp_path_factory.mktemp("host"),
        *FLAGS,
        *(f"-isystem{path}" for path in include_paths()),
        *(CSRC / "cuda" / name for name in ("ops.cpp", "cluster_rules.cpp")),
        *("-x", "c++", *(CSRC / "cuda" / f"{name}.cu" for name in KERNELS), "-x", "none"),
        f"-L{Path(torch.__file__).parent / 'lib'}",
        *("-ltorch", "-ltorch_cpu", "-lc10"),
    )


def run_suite(library: Path, plugin: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "TORCHRNN_PURE": "1",  # Else the CPU kernels would serve the ops.
        "TORCHRNN_HOST_BUILD": str(library),
        "PYTHONPATH": str(TESTS / "cuda"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", plugin, *arguments]
    return subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(1200)
def test_suite_of_the_ops(host_build: Path) -> None:
    result = run_suite(host_build, "load_host_build", *SUITE, "-k", "not 1025")  # Loops would take long.
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.timeout(1200)
def test_parity_of_the_cluster_path(host_build: Path) -> None:
    result = run_suite(host_build, "host_cluster", "test_cuda_parity.py")
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout


def test_the_suite_runs_on_the_host_build(host_build: Path) -> None:
    # Of the test above: a step path that is not there, or not called, would pass it by the fallback.
    script = (
        "import load_host_build, torch\n"
        "x, w, none = torch.zeros(1, 1, 1), [torch.zeros(4, 1)] * 2, [None] * 6\n"
        "options = 0, 0, *[False] * 4, None, None, 1e-5, False, False, 2, False\n"  # Cluster, without TF32.
        "torch.ops.torchrnn.layer_infer(x, w, *none, *options)\n"
    )
    environment = {**os.environ, "TORCHRNN_PURE": "1", "TORCHRNN_HOST_BUILD": str(host_build)}
    environment["PYTHONPATH"] = f"{TESTS / 'cuda'}{os.pathsep}{TESTS.parent}"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "the cluster path does not serve this call: the dtype is float32 and TF32" in result.stderr
