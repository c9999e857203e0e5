"""CUDA sources compiled for the host, for tests that need no GPU."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
FAULTS = ["no_wait", "not_armed_again", "wrong_parity", "one_buffer"]
"""Ways to break the protocol of the cluster path, which its tests must notice."""


def build(folder: Path, *arguments: str | Path) -> Path:
    """Compiles what the arguments name, with ``csrc`` and ``tests/cuda`` to include from."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]}")
    path = folder / "program"
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", f"-I{TESTS / 'cuda'}"]
    subprocess.run([*compiler, *flags, "-o", path, *arguments], check=True)
    return path


def emulated(folder: Path, source: str, *flags: str) -> Path:
    """Compiles a source of tests/cuda with the emulated device."""
    return build(folder, "-O1", "-DRNN_EMULATE", *flags, TESTS / "cuda" / source)
