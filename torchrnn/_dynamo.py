"""Lets ``torch.compile`` trace the layers.

Dynamo breaks the graph at every instance of ``torch.nn.LSTM``, ``GRU`` and ``RNN``, subclasses too, unless
its option ``allow_rnn`` is set (``torch/_dynamo/variables/builder.py``, ``VariableBuilder.wrap_module``). Our
layers are one opaque op and need no break, so the option is set while one of them is wrapped. Setting it for
good would change how the user's own ``torch.nn`` layers compile: they would be unrolled over time.

Dynamo takes a second to import, hence the patch waits until someone else imports it. Where another version of
torch has no ``wrap_module``, nothing is patched and the graph breaks, as it does for ``torch.nn``.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

from torchrnn._tools.imports import when_imported

_BUILDER = "torch._dynamo.variables.builder"


def allow(layer: type) -> None:
    """Makes Dynamo trace instances of the class ``layer`` instead of breaking the graph."""
    when_imported(_BUILDER, functools.partial(_patch, layer=layer))


def _patch(builder: ModuleType, layer: type) -> None:
    wrap_module = getattr(getattr(builder, "VariableBuilder", None), "wrap_module", None)
    if wrap_module is None:
        return

    @functools.wraps(wrap_module)
    def wrap(self: Any, value: Any) -> Any:
        if not isinstance(value, layer):
            return wrap_module(self, value)
        with sys.modules["torch._dynamo.config"].patch(allow_rnn=True):
            return wrap_module(self, value)

    builder.VariableBuilder.wrap_module = wrap
