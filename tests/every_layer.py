"""Every layer and cell of ``torchrnn``, for what all of them have to do alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import torchrnn

Make = Callable[[int, int], nn.Module]
"""Makes a module of I inputs and H hidden units."""

LAYERS: dict[str, Make] = {
    "lstm": torchrnn.LSTM,
    "gru": torchrnn.GRU,
    "gru before": lambda i, h: torchrnn.GRU(i, h, reset_after=False),
    "rnn": torchrnn.RNN,
    "rnn relu": lambda i, h: torchrnn.RNN(i, h, nonlinearity="relu"),
    "lstm projected": lambda i, h: torchrnn.LSTM(i, h, 2, bidirectional=True, proj_size=2),
    "lstm two-way": lambda i, h: torchrnn.LSTM(i, h, bidirectional=True),
    "gru stacked": lambda i, h: torchrnn.GRU(i, h, num_layers=3, bidirectional=True, batch_first=True),
    "gru without bias": lambda i, h: torchrnn.GRU(i, h, bias=False),
    "rnn stacked": lambda i, h: torchrnn.RNN(i, h, num_layers=2, bias=False),
}
CELLS: dict[str, Make] = {
    "lstm cell": torchrnn.LSTMCell,
    "lstm cell without bias": lambda i, h: torchrnn.LSTMCell(i, h, bias=False),
    "gru cell": torchrnn.GRUCell,
    "gru cell before": lambda i, h: torchrnn.GRUCell(i, h, reset_after=False),
    "rnn cell": torchrnn.RNNCell,
    "rnn cell relu": lambda i, h: torchrnn.RNNCell(i, h, nonlinearity="relu"),
}
MODULES: dict[str, Make] = {**LAYERS, **CELLS}


def example(module: Any, steps: int = 4, batch: int = 3, **kwargs: Any) -> Tensor:
    """Returns an input of a module: of one step for a cell."""
    if isinstance(module, nn.RNNCellBase):
        return torch.randn(batch, module.input_size, **kwargs)
    sizes = (batch, steps) if module.batch_first else (steps, batch)
    return torch.randn(*sizes, module.input_size, **kwargs)


def state(module: Any, batch: int = 3, **kwargs: Any) -> Any:
    """Returns a state of a module, in the form that it takes."""
    sizes = [module.hidden_size]
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        sizes.insert(0, getattr(module, "proj_size", 0) or module.hidden_size)
    first = []
    if isinstance(module, nn.RNNBase):
        first = [module.num_layers * (2 if module.bidirectional else 1)]
    states = tuple(torch.randn(*first, batch, size, **kwargs) for size in sizes)
    return states if len(states) == 2 else states[0]
