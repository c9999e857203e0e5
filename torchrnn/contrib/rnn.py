"""What ``tf.contrib.rnn`` has: all cells of ``torchrnn.rnn_cell`` and the unrolling functions."""

from torchrnn.rnn_cell import *  # noqa: F403  All of them, as there; a list would be a second one.
from torchrnn.unroll import stack_bidirectional_dynamic_rnn as stack_bidirectional_dynamic_rnn
from torchrnn.unroll import stack_bidirectional_rnn as stack_bidirectional_rnn
from torchrnn.unroll import static_bidirectional_rnn as static_bidirectional_rnn
from torchrnn.unroll import static_rnn as static_rnn
from torchrnn.unroll import static_state_saving_rnn as static_state_saving_rnn
from torchrnn.unroll import transpose_batch_time as transpose_batch_time
