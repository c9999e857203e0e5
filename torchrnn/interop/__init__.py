"""Exchange of models with ``torch.nn``, TensorFlow 1 and Keras."""

from torchrnn.interop.convert import convert as convert
from torchrnn.interop.keras import from_keras as from_keras
from torchrnn.interop.keras import keras_gradients as keras_gradients
from torchrnn.interop.keras import to_keras as to_keras
from torchrnn.interop.tensorflow import load_tf_variables as load_tf_variables
from torchrnn.interop.tensorflow import tf_gradients as tf_gradients
from torchrnn.interop.tensorflow import tf_variables as tf_variables
