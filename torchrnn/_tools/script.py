"""What ``torch.jit.script`` says of our modules, whose source is not in the Python that it compiles."""

from __future__ import annotations

from typing import NoReturn

from torch import nn


def refuse(self: nn.Module) -> NoReturn:
    """Raises what to do instead. As ``__prepare_scriptable__``, which torch calls for what to compile.

    To return a ``torch.nn`` module would do, but torch leaves that in the caller's model, in our place.
    """
    way = ""
    if isinstance(self, nn.RNNBase | nn.RNNCellBase):
        way = 'convert the model before, torchrnn.convert(model, to="torch"), or '
    raise RuntimeError(
        f"torch.jit.script cannot compile {type(self).__name__}, whose source is not TorchScript: {way}use "
        "torch.jit.trace or torch.export"
    )
