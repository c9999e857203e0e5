"""Makes the modules of torchrnn leaves of ``torch.fx``, and the unrolling functions single nodes.

A tracer records what modules do by calling them with proxies, on which a recurrent layer cannot run: it looks
at sizes. So the tracer asks its ``is_leaf_module`` which modules are to be nodes of the graph, and that goes
by the namespace of a class, ``torch.nn``. Ours cannot claim to be there, for pickles find classes by it; and
what a module does in ``forward`` comes after its hooks, which would then run twice. So the method is wrapped
where torch defines it. A tracer of the user's that overrides it asks its base or decides alone, as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.fx import Proxy, Tracer
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.overrides import handle_torch_function
from torch.utils import _pytree as pytree

from torchrnn._tools.imports import when_imported

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _allow(tracer: type[Tracer]) -> None:
    """Makes our modules leaves of the graphs of a class of tracers."""
    is_leaf_module = tracer.is_leaf_module

    @functools.wraps(is_leaf_module)
    def wrap(self: Tracer, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_ours(m) or is_leaf_module(self, m, module_qualified_name)

    tracer.is_leaf_module = wrap  # type: ignore[method-assign]


def _is_ours(module: nn.Module) -> bool:
    """Whether the class of a module is one of torchrnn or derives from one."""
    return any(base.__module__.partition(".")[0] == "torchrnn" for base in type(module).__mro__)


def node(function: _Function) -> _Function:
    """Makes calls of a function with proxies nodes of the graph, as those of torch's functions are."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_fx_symbolic_tracing():
            proxies = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Proxy)]
            if proxies:
                return handle_torch_function(call, proxies, *args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


_allow(Tracer)
# This one does not ask its base.
when_imported("torch.ao.quantization.fx.tracer", lambda module: _allow(module.QuantizationTracer))
