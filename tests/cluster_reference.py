"""What the cluster path's kernels keep and read, from the reference. Letters as in its module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchrnn import _native, reference
from torchrnn.options import Options

GATES = {"lstm": 4, "gru": 3}

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Those of the kernels; float32 is rounded to TF32."""

SIZES = [
    *((torch.float16, hidden) for hidden in (64, 128, 250, 383, 512)),
    *((torch.float32, hidden) for hidden in (64, 127, 256)),
]
"""Each size of the kernels; those of bfloat16 are float16's."""


def code(dtype: torch.dtype) -> int:
    """Returns the code of ``enum class Dtype`` in ``csrc/cuda/scan.h``."""
    return _native.DTYPES.index(dtype)


def eps(dtype: torch.dtype) -> float:
    """Returns the unit in the last place of 1, of what the kernels multiply."""
    return 2**-10 if dtype == torch.float32 else torch.finfo(dtype).eps


def walk(
    a: reference.Arguments, options: Options
) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Runs the layer forward.

    Returns:
        Per direction [T, B, kTape*H + H], each step's tape and the h that it started from; and what
        ``reference.layer`` returns.
    """
    seen: list[Tensor] = []
    walked = reference._Direction.step

    def step(
        cell: reference._Direction, wx: Tensor, h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        h_new, c_new = walked(cell, wx, h, c)
        rh = F.linear(h, cell.weight_hh, cell.bias_hh)
        if c_new is not None:
            i, f, g, o = (wx + rh).chunk(4, -1)
            tape = [torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o), c_new]
        else:
            (r, z, n), (rh_r, rh_z, rh_n) = wx.chunk(3, -1), rh.chunk(3, -1)
            r = torch.sigmoid(r + rh_r)
            tape = [r, torch.sigmoid(z + rh_z), torch.tanh(n + r * rh_n), rh_n, h_new]
        seen.append(torch.cat([*tape, h], -1).detach())
        return h_new, c_new

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference._Direction, "step", step)
        outputs = reference.layer(a, options, all_states=options.cell == "lstm")
    steps = a.x.size(0)
    walks = [seen[d * steps : (d + 1) * steps] for d in range(len(a.weight_hh))]
    return [
        torch.stack(steps[::-1] if options.reverse or d == 1 else steps) for d, steps in enumerate(walks)
    ], outputs
