"""TensorFlow 1's cells: ``tf.nn.rnn_cell``, and the cells of ``tf.contrib.rnn``."""

from torchrnn.rnn_cell.base import LSTMStateTuple as LSTMStateTuple
from torchrnn.rnn_cell.base import RNNCell as RNNCell
from torchrnn.rnn_cell.core import BasicLSTMCell as BasicLSTMCell
from torchrnn.rnn_cell.core import BasicRNNCell as BasicRNNCell
from torchrnn.rnn_cell.core import GRUCell as GRUCell
from torchrnn.rnn_cell.core import LSTMCell as LSTMCell
from torchrnn.rnn_cell.core import MultiRNNCell as MultiRNNCell
