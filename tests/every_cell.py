"""Every cell and wrapper of ``torchrnn.rnn_cell``, for what all of them have to do alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

import torchrnn
from torchrnn.rnn_cell import (
    AttentionCellWrapper,
    BasicLSTMCell,
    BasicRNNCell,
    BidirectionalGridLSTMCell,
    CFNCell,
    Conv1DLSTMCell,
    Conv2DLSTMCell,
    Conv3DLSTMCell,
    ConvLSTMCell,
    CoupledInputForgetGateLSTMCell,
    CudnnCompatibleGRUCell,
    CudnnCompatibleLSTMCell,
    DeviceWrapper,
    DropoutWrapper,
    EmbeddingWrapper,
    GLSTMCell,
    GridLSTMCell,
    GRUBlockCell,
    GRUBlockCellV2,
    GRUCell,
    HighwayWrapper,
    IndRNNCell,
    IndyGRUCell,
    IndyLSTMCell,
    InputProjectionWrapper,
    IntersectionRNNCell,
    LayerNormBasicLSTMCell,
    LayerNormLSTMCell,
    LSTMBlockCell,
    LSTMCell,
    MinimalRNNCell,
    MultiRNNCell,
    NASCell,
    OutputProjectionWrapper,
    PhasedLSTMCell,
    ResidualWrapper,
    SRUCell,
    TimeFreqLSTMCell,
    UGRNNCell,
    WeightNormLSTMCell,
)

Make = Callable[[int], Any]
"""Makes a cell of U units; wrappers put out 4 numbers where they must put out what they take in."""

CONV = {"conv": 1, "conv1": 1, "conv2": 2, "conv3": 3}
CELLS: dict[str, Make] = {
    "rnn": BasicRNNCell,
    "lstm": BasicLSTMCell,
    "lstm concatenated": lambda u: BasicLSTMCell(u, state_is_tuple=False),
    "lstm varied": lambda u: LSTMCell(u, True, 0.5, num_proj=3, proj_clip=0.3),
    "gru": GRUCell,
    "gru softsign": lambda u: GRUCell(u, activation="softsign"),
    "lstm block": lambda u: LSTMBlockCell(u, cell_clip=0.5, use_peephole=True),
    "lstm cudnn": CudnnCompatibleLSTMCell,
    "gru block": GRUBlockCell,
    "gru block 2": GRUBlockCellV2,
    "gru cudnn": CudnnCompatibleGRUCell,
    "layer norm basic": LayerNormBasicLSTMCell,
    "layer norm": lambda u: LayerNormLSTMCell(u, layer_norm=True),
    "weight norm": lambda u: WeightNormLSTMCell(u, num_proj=3),
    "coupled": lambda u: CoupledInputForgetGateLSTMCell(u, True, num_proj=3),
    "coupled norm": lambda u: CoupledInputForgetGateLSTMCell(u, layer_norm=True),
    "grouped": lambda u: GLSTMCell(u, number_of_groups=2),
    "grouped projected": lambda u: GLSTMCell(u, num_proj=2, number_of_groups=2),
    "ugrnn": UGRNNCell,
    "indrnn": IndRNNCell,
    "indy lstm": IndyLSTMCell,
    "indy gru": IndyGRUCell,
    "sru": SRUCell,
    "nas": lambda u: NASCell(u, num_proj=3, use_bias=True),
    "intersection": lambda u: IntersectionRNNCell(u, num_in_proj=u),
    "minimal": MinimalRNNCell,
    "cfn": CFNCell,
    "phased": lambda u: PhasedLSTMCell(u, use_peepholes=True),
    "conv": lambda u: ConvLSTMCell(1, [3, 2], u, [2]),
    "conv1": lambda u: Conv1DLSTMCell([3, 2], u, [3]),
    "conv2": lambda u: Conv2DLSTMCell([3, 3, 2], u, [3, 2]),
    "conv3": lambda u: Conv3DLSTMCell([3, 3, 3, 2], u, [3, 1, 2]),
    "time and frequency": lambda u: TimeFreqLSTMCell(u, True, feature_size=2),
    "grid": lambda u: GridLSTMCell(
        u, True, feature_size=2, frequency_skip=2, num_frequency_blocks=[2], state_is_tuple=False
    ),
    "grid both": lambda u: BidirectionalGridLSTMCell(
        u, feature_size=2, frequency_skip=2, num_frequency_blocks=[2]
    ),
    "stack": lambda u: MultiRNNCell([LSTMCell(u), GRUCell(u)]),
    "dropout": lambda u: DropoutWrapper(LSTMCell(u), 0.9, 0.9, 0.9).eval(),
    "residual": lambda u: ResidualWrapper(OutputProjectionWrapper(GRUCell(u), 4)),
    "highway": lambda u: HighwayWrapper(OutputProjectionWrapper(GRUCell(u), 4)),
    "input projection": lambda u: InputProjectionWrapper(GRUCell(u), 3, "relu"),
    "output projection": lambda u: OutputProjectionWrapper(GRUCell(u), 3, "tanh"),
    "embedding": lambda u: EmbeddingWrapper(GRUCell(u), 5, 3),
    "attention": lambda u: AttentionCellWrapper(LSTMCell(u), 2, attn_size=3),
    "device": lambda u: DeviceWrapper(GRUCell(u), "cpu"),
}


def sequence(name: str, batch: int = 2, steps: int = 3, size: int = 4) -> Any:
    """Returns inputs of a cell, [B, T, I] or what it reads in their place."""
    if name in CONV:
        return torch.randn(batch, steps, *[3] * CONV[name], 2)
    if name == "embedding":
        return torch.randint(0, 5, (batch, steps, 1))
    x = torch.randn(batch, steps, size)
    return (torch.rand(batch, steps, 1), x) if name == "phased" else x


def run(cell: Any, x: Any, lengths: Any = None) -> Any:
    """Returns what ``dynamic_rnn`` does, from zeros."""
    return torchrnn.dynamic_rnn(cell, x, lengths, dtype=torch.get_default_dtype())


def run_by_calls(cell: Any, x: Any) -> Any:
    """Returns what a loop of the user's own over the steps computes."""
    first = pytree.tree_leaves(x)[0]
    state = cell.zero_state(first.size(0), torch.get_default_dtype())
    outputs = []
    for t in range(first.size(1)):
        output, state = cell(pytree.tree_map(lambda v, t=t: v[:, t], x), state)
        outputs.append(output)
    return torch.stack(outputs, 1), state
