"""From a cell's variables, in TensorFlow's layout, to one call of the engine over a whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchrnn import ops
from torchrnn.options import Options
from torchrnn.reference import Arguments
from torchrnn.rnn_cell.base import Run


def gate_columns(kernel: Tensor, order: Sequence[int]) -> Tensor:
    """Brings the blocks of U columns of [I, G*U] into the order that the engine has them in."""
    blocks = kernel.chunk(len(order), 1)
    return torch.cat([blocks[i] for i in order], 1)


def gate_vector(bias: Tensor, order: Sequence[int]) -> Tensor:
    """Turns [G*U] into the engine's order of blocks."""
    blocks = bias.chunk(len(order))
    return torch.cat([blocks[i] for i in order])


def run_layer(
    options: Options,
    run: Run,
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    h0: Tensor,
    c0: Tensor | None = None,
    *,
    projection: Tensor | None = None,
    peephole: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one direction over x [T, B, I]; returns ``(y [T, B, R], h_n [B, R], c_n [B, H] or empty)``.

    Args:
        options: The cell and its variations, without the direction.
        run: Lengths and direction.
        x: [T, B, I]
        kernel: [I + R, G*H], what [x, h] is multiplied by, the gates in the engine's order.
        bias: [G*H] or None.
        h0: [B, R]
        c0: [B, H] for a cell with memory.
        projection: [R, H]
        peephole: [3, H]
        norm: Gain and shift of the layer normalisation, [G + 1, H] each, and what is added to the variance.
        masks: Factors on the h and the c that are carried on, [T or 1, B or 1, R] and [T or 1, B or 1, H].
        hidden_bias: [G*H], added to what is applied to h, for a cell that keeps it apart; zeros by default.
    """
    batch = x.size(1)
    # Split before they are transposed: torch has a fast way for a whole matrix, but not for a part of one.
    weight_ih, weight_hh = (part.t().contiguous() for part in kernel.split([x.size(2), h0.size(1)]))

    def listed(tensor: Tensor | None) -> list[Tensor]:
        return [] if tensor is None else [tensor]

    if bias is None and hidden_bias is not None:
        bias = torch.zeros_like(hidden_bias)
    elif bias is not None and hidden_bias is None:
        hidden_bias = torch.zeros_like(bias)

    def spread(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask.expand(-1, batch, -1).unsqueeze(0)

    gain, shift, epsilon = norm or (None, None, options.norm_eps)
    a = Arguments(
        x,
        [weight_ih],
        [weight_hh],
        listed(bias),
        listed(hidden_bias),
        listed(projection),
        listed(peephole),
        listed(gain),
        listed(shift),
        h0=h0.unsqueeze(0),
        c0=None if c0 is None else c0.unsqueeze(0),
        lengths=run.lengths,
        mask_h=spread(masks[0]),
        mask_c=spread(masks[1]),
    )
    options = replace(options, reverse=run.reverse, norm_eps=epsilon)
    # As step by step, where sums with the state or a bias are wider than autocast's products.
    y, _, h_n, c_n = ops.layer(a, options, state_dtype=h0.dtype)
    return y, h_n[0], c_n if c0 is None else c_n[0]
