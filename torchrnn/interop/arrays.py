"""Between tensors and NumPy arrays, for code that runs without NumPy as long as it is given tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def as_tensor(value: Any, name: str) -> Tensor:
    """Returns a floating tensor of an array or tensor: a copy of an array, a tensor without its graph.

    Raises:
        ValueError: If what it holds is not floating; ``name`` says what it is.
    """
    if isinstance(value, Tensor):
        tensor = value.detach()
    else:
        import numpy as np

        # A copy of its own: torch warns of arrays that must not be written to and refuses negative strides.
        tensor = torch.from_numpy(np.array(value, order="C"))
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: must hold floating point numbers, got {tensor.dtype}")
    return tensor


def as_array(tensor: Tensor) -> Any:
    """Returns a NumPy array with a copy of a tensor; of bfloat16, which NumPy lacks, as float32."""
    copied = tensor.detach().to("cpu", copy=True)
    return (copied.float() if copied.dtype == torch.bfloat16 else copied).numpy()
