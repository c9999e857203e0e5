"""The paths on CUDA, and the ways to force one.

``step`` is a matrix product and one kernel per step, for every cell, variation, dtype and size; ``cluster``
is one kernel for all steps, on thread block clusters. At each call the table in ``csrc/cuda/dispatch.h``
chooses, unless a path is forced; a call that the forced path does not serve raises.

Environment, read once at import: ``TORCHRNN_CUDA_PATH`` (auto, step or cluster) forces a path.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

PATHS = ("auto", "step", "cluster")
"""In the order of ``enum class Path`` in ``csrc/cuda/dispatch.h``; auto leaves the choice to the table."""


def forced() -> int:
    """Returns the code of the path that is forced; 0 if none is."""
    return _FORCED[-1]


@contextlib.contextmanager
def use_path(name: str) -> Iterator[None]:
    """Forces a path inside a ``with`` block, or with auto lets the table choose; not for several threads.

    Raises:
        ValueError: If the name is not one of ``PATHS``.
    """
    _FORCED.append(_code(name))
    try:
        yield
    finally:
        _FORCED.pop()


def allows_tf32() -> bool:
    """Returns whether float32 products of recurrent layers may be rounded to TF32, by torch's flags.

    They are ``torch.backends.cudnn.allow_tf32`` and, newer, ``torch.backends.cudnn.rnn.fp32_precision``. The
    newer is read: where the flags of cuDNN's operators differ, reading the older one raises.
    """
    if torch.compiler.is_compiling():
        # In words that a compiler knows and guards; they take ten times as long.
        precision = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]  # It has no stub.
    else:
        precision = torch._C._get_fp32_precision_getter("cuda", "rnn")
    return bool(precision == "tf32")


def _code(name: str) -> int:
    if name not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {name!r}")
    return PATHS.index(name)


try:
    _FORCED = [_code(os.environ.get("TORCHRNN_CUDA_PATH") or "auto")]
except ValueError as error:
    raise ValueError(f"TORCHRNN_CUDA_PATH: {error}") from None
