"""Recurrent layers for PyTorch: drop-ins for ``torch.nn.LSTM``, ``GRU`` and ``RNN`` on fused kernels."""

import importlib.metadata

from torchrnn import ops as _ops  # noqa: F401  Registers the ops.
from torchrnn._native import info as info
from torchrnn.cells import GRUCell as GRUCell
from torchrnn.cells import LSTMCell as LSTMCell
from torchrnn.cells import RNNCell as RNNCell
from torchrnn.interop import convert as convert
from torchrnn.layers import GRU as GRU
from torchrnn.layers import LSTM as LSTM
from torchrnn.layers import RNN as RNN

__version__ = importlib.metadata.version("torchrnn")
