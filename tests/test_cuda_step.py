"""The CUDA step path without a GPU: its sources, built for the host, run the suite of the ops.

Kernels are loops there and matrix products too (``tests/cuda/host_device.h``); all else is what runs on CUDA.
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
]


@pytest.fixture(scope="module")
def host_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the library that the CUDA sources of the step path make on the host."""
    kernels = [
        CSRC / "cuda" / name for name in ("step_forward.cu", "step_backward.cu", "rows.cu", "dropout.cu")
    ]
    return build(
        tmp_path_factory.mktemp("host"),
        *FLAGS,
        *(f"-isystem{path}" for path in include_paths()),
        CSRC / "cuda" / "ops.cpp",
        *("-x", "c++", *kernels, "-x", "none"),
        f"-L{Path(torch.__file__).parent / 'lib'}",
        *("-ltorch", "-ltorch_cpu", "-lc10"),
    )


def run_suite(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "TORCHRNN_PURE": "1",  # Else the CPU kernels would serve the ops.
        "TORCHRNN_HOST_BUILD": str(library),
        "PYTHONPATH": str(TESTS / "cuda"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "load_host_build", *arguments]
    return subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(1200)
def test_suite_of_the_ops(host_build: Path) -> None:
    result = run_suite(host_build, *SUITE, "-k", "not 1025")  # Loops would take long for that size.
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def test_the_suite_runs_on_the_host_build(host_build: Path) -> None:
    # Of the test above: a step path that is not there, or not called, would pass it by the fallback.
    script = (
        "import load_host_build, torch\n"
        "x, w, none = torch.zeros(1, 1, 1), [torch.zeros(4, 1)], [None] * 8\n"
        "options = 0, 0, None, None, 1e-5, False, False, 2, False\n"  # The path is cluster.
        "torch.ops.torchrnn.layer_infer(x, w, w, *[[]] * 6, *none, *options)\n"
    )
    environment = {**os.environ, "TORCHRNN_PURE": "1", "TORCHRNN_HOST_BUILD": str(host_build)}
    environment["PYTHONPATH"] = f"{TESTS / 'cuda'}{os.pathsep}{TESTS.parent}"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "the cluster path does not serve this call: this is the host" in result.stderr
