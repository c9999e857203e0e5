"""Exchange of models with ``torch.nn``."""

from torchrnn.interop.convert import convert as convert
