"""From a cell's variables, in TensorFlow's layout, to one call of the engine over a whole sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrnn import ops
from torchrnn.options import Options
from torchrnn.reference import Arguments
from torchrnn.rnn_cell.base import Run


def gate_rows(kernel: Tensor, order: Sequence[int]) -> Tensor:
    """Turns [I, G*U] into [G*U, I], the blocks of U columns in the order that the engine has them."""
    inputs, columns = kernel.shape
    blocks = kernel.view(inputs, len(order), columns // len(order))
    if list(order) != sorted(order):
        blocks = blocks[:, list(order)]
    return blocks.reshape(inputs, columns).t()


def gate_vector(bias: Tensor, order: Sequence[int]) -> Tensor:
    """Turns [G*U] into the engine's order of blocks."""
    return bias.view(len(order), -1)[list(order)].reshape(-1)


def run_layer(
    options: Options,
    run: Run,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h0: Tensor,
    c0: Tensor | None = None,
    *,
    projection: Tensor | None = None,
    peephole: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one direction over x [T, B, I]; returns ``(y [T, B, R], h_n [B, R], c_n [B, H] or empty)``.

    Args:
        options: The cell and its variations, without the direction.
        run: Lengths and direction.
        x: [T, B, I]
        weight: [G*H, I + R], what is applied to [x, h].
        bias: [G*H] or None.
        h0: [B, R]
        c0: [B, H] for a cell with memory.
        projection: [R, H]
        peephole: [3, H]
        norm: Gain and shift of the layer normalisation, [G + 1, H] each.
        masks: Factors on the h and the c that are carried on, [T or 1, B or 1, R] and [T or 1, B or 1, H].
        hidden_bias: [G*H], added to what is applied to h, for a cell that keeps it apart; zeros by default.
    """
    inputs, batch = x.size(2), x.size(1)

    def listed(tensor: Tensor | None) -> list[Tensor]:
        return [] if tensor is None else [tensor]

    def spread(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask.expand(-1, batch, -1).unsqueeze(0)

    gain, shift = norm or (None, None)
    a = Arguments(
        x,
        [weight[:, :inputs]],
        [weight[:, inputs:]],
        listed(bias),
        [] if bias is None else [torch.zeros_like(bias) if hidden_bias is None else hidden_bias],
        listed(projection),
        listed(peephole),
        listed(gain),
        listed(shift),
        h0.unsqueeze(0),
        None if c0 is None else c0.unsqueeze(0),
        run.lengths,
        None,
        spread(masks[0]),
        spread(masks[1]),
    )
    if run.reverse:
        options = Options(**{**vars(options), "reverse": True})
    y, _, h_n, c_n = ops.layer(a, options)
    return y, h_n[0], c_n if c0 is None else c_n[0]
