"""TensorFlow's path to the contrib cells: ``torchrnn.contrib.rnn`` for ``tf.contrib.rnn``."""

from torchrnn.contrib import rnn as rnn
