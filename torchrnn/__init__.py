"""Recurrent layers for PyTorch: drop-ins for ``torch.nn.LSTM``, ``GRU`` and ``RNN`` on fused kernels."""

import importlib.metadata

from torchrnn import contrib as contrib
from torchrnn import ops as _ops  # noqa: F401  Registers the ops.
from torchrnn import rnn_cell as rnn_cell
from torchrnn._native import info as info
from torchrnn._tools import counters as _counters  # noqa: F401  These three enter the layers with tools.
from torchrnn._tools import fx as _fx  # noqa: F401
from torchrnn._tools import quantization as _quantization  # noqa: F401
from torchrnn.cells import GRUCell as GRUCell
from torchrnn.cells import LSTMCell as LSTMCell
from torchrnn.cells import RNNCell as RNNCell
from torchrnn.interop import convert as convert
from torchrnn.layers import GRU as GRU
from torchrnn.layers import LSTM as LSTM
from torchrnn.layers import RNN as RNN
from torchrnn.prepacking import prepack as prepack
from torchrnn.unroll import bidirectional_dynamic_rnn as bidirectional_dynamic_rnn
from torchrnn.unroll import bidirectional_rnn as bidirectional_rnn
from torchrnn.unroll import dynamic_rnn as dynamic_rnn
from torchrnn.unroll import explain as explain
from torchrnn.unroll import raw_rnn as raw_rnn
from torchrnn.unroll import rnn as rnn
from torchrnn.unroll import stack_bidirectional_dynamic_rnn as stack_bidirectional_dynamic_rnn
from torchrnn.unroll import stack_bidirectional_rnn as stack_bidirectional_rnn
from torchrnn.unroll import state_saving_rnn as state_saving_rnn
from torchrnn.unroll import static_bidirectional_rnn as static_bidirectional_rnn
from torchrnn.unroll import static_rnn as static_rnn
from torchrnn.unroll import static_state_saving_rnn as static_state_saving_rnn
from torchrnn.unroll import stepwise as stepwise
from torchrnn.unroll import transpose_batch_time as transpose_batch_time

__version__ = importlib.metadata.version("torchrnn")
