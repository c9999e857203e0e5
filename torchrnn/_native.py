"""Loads the compiled kernels and tells what is loaded.

There are two libraries: ``_C`` for the CPU, and ``_C_cuda``, which only a torch with CUDA can load.

Environment, read once at import: ``TORCHRNN_PURE=1`` leaves the kernels unloaded; ``TORCHRNN_ISA`` (generic,
avx2 or avx512) forces the instruction set of the CPU kernels.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch

ISAS = ("generic", "avx2", "avx512")
"""In the order of ``enum class Isa`` in ``csrc/cpu/kernels.h``, weakest first."""

CHANGES: list[str] = []
"""The instruction sets that were set after the first one. Each has its own layout of packed weights."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What every path computes with, in the order of ``enum class Dtype`` in ``csrc/cuda/scan.h``."""


def _load(library: str, device: str) -> str | None:
    """Loads ``_C`` or ``_C_cuda``; returns None, or the reason why it is not there."""
    if os.environ.get("TORCHRNN_PURE", "0") not in ("", "0"):
        return "TORCHRNN_PURE is set"
    if device == "cuda" and (torch.version.cuda is None or not torch.backends.cuda.is_built()):
        return "torch is without CUDA"
    try:
        importlib.import_module(f"torchrnn.{library}")
    except ImportError as error:  # Not built, built for another platform, or its symbols do not resolve.
        # torch comes with CUDA to many machines that have no GPU and need no kernels for one.
        if device == "cpu" or torch.cuda.device_count() > 0:
            warnings.warn(
                f"torchrnn runs on its pure-torch reference on {device}, which is slow: the kernels are not "
                f"loaded ({error}). torchrnn.info() tells more.",
                RuntimeWarning,
                stacklevel=2,
            )
        return f"{type(error).__name__}: {error}"
    return None


def isa() -> str | None:
    """Returns the instruction set in use, or None without kernels."""
    return ISAS[torch.ops.torchrnn.isa()] if WHY_NOT is None else None


def isas() -> list[str]:
    """Returns the instruction sets that this build and machine can run, weakest first."""
    if WHY_NOT is not None:
        return []
    return [name for code, name in enumerate(ISAS) if torch.ops.torchrnn.isa_supported(code)]


def set_isa(name: str) -> None:
    """Makes the CPU kernels use one instruction set, for the whole process.

    Raises:
        ValueError: If the name is not known or the machine cannot run it.
    """
    if name not in isas():
        raise ValueError(f"isa must be one of {', '.join(isas()) or '(no kernels are loaded)'}, got {name!r}")
    torch.ops.torchrnn.set_isa(ISAS.index(name))
    CHANGES.append(name)


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Makes the CPU kernels use one instruction set inside a ``with`` block; not for several threads."""
    before = isa()
    set_isa(name)
    try:
        yield
    finally:
        assert before is not None
        set_isa(before)


def cuda_path(*, device: int, **call: int) -> tuple[int, str, str | None]:
    """Returns the path that a call on CUDA takes, why, and why that does not serve it if so, which raises.

    Args:
        device: Its index.
        **call: As ``path`` of ``csrc/cuda/module.cpp`` has them.
    """
    with torch.cuda.device(device):
        found: tuple[int, str, str | None] = _cuda_module().path(device=device, **call)
    return found


def cuda_rows(device: int, dtype: int) -> list[tuple[int, str]]:
    """Returns the rows of the table of paths that a device and a dtype lie within: path and why, in order."""
    rows: list[tuple[int, str]] = _cuda_module().rows(device, dtype)
    return rows


def _cuda_module() -> Any:
    return importlib.import_module("torchrnn._C_cuda")  # Which is loaded: WHY_NOT_CUDA is None.


def info() -> dict[str, Any]:
    """Returns what is loaded, as a dict made for reading.

    Returns:
        ``version``, ``torch``, ``kernels`` (types of devices with compiled kernels), ``why_not`` and
        ``why_not_cuda`` (the reason if there are none for the CPU or for CUDA), ``isa`` (instruction set in
        use), ``isas`` (those this machine can run), ``dtypes`` and ``threads``.
    """
    return {
        "version": importlib.metadata.version("torchrnn"),
        "torch": torch.__version__,
        "kernels": [name for name, why in (("cpu", WHY_NOT), ("cuda", WHY_NOT_CUDA)) if why is None],
        "why_not": WHY_NOT,
        "why_not_cuda": WHY_NOT_CUDA,
        "isa": isa(),
        "isas": isas(),
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in DTYPES],
        "threads": torch.get_num_threads(),
    }


WHY_NOT = _load("_C", "cpu")
"""Why the kernels for the CPU are not loaded, or None if they are."""

WHY_NOT_CUDA = _load("_C_cuda", "cuda")
"""Why the kernels for CUDA are not loaded, or None if they are."""

if WHY_NOT is None and os.environ.get("TORCHRNN_ISA"):
    try:
        set_isa(os.environ["TORCHRNN_ISA"])
    except ValueError as error:
        raise ValueError(f"TORCHRNN_ISA: {error}") from None
