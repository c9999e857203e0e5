"""Makes ``torch.ao.quantization`` quantize the layers and cells as those of ``torch.nn``.

It goes by exact classes, in its own tables and in those that callers pass, and leaves alone in silence what
it does not find there. Two of its functions are wrapped. All its ways (dynamic, static, quantization-aware,
of modules or graphs) begin with the one that gives a qconfig to each module that is to be quantized; the
other swaps a module for its quantized form. There one of ours with a qconfig gives way to one of ``torch.nn``
with the same tensors. Where another version of torch does not have them, nothing is wrapped.
"""

from __future__ import annotations

import functools
from typing import Any, TypeGuard

from torch import nn
from torch.fx import GraphModule
from torch.nn.utils.parametrize import type_before_parametrizations

from torchrnn._tools.imports import when_imported
from torchrnn.interop.convert import THEIRS, as_torch


def _patch(quantize: Any) -> None:
    propagate = getattr(quantize, "_propagate_qconfig_helper", None)
    swap_module = getattr(quantize, "swap_module", None)
    if propagate is None or swap_module is None:
        return

    @functools.wraps(propagate)
    def propagate_and_replace(
        module: nn.Module, qconfig_dict: dict[Any, Any], *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(module, GraphModule):
            _prepare_graph(module, qconfig_dict)
        kind = type_before_parametrizations(module)
        if THEIRS.get(kind) in qconfig_dict:
            qconfig_dict = {kind: qconfig_dict[THEIRS[kind]], **qconfig_dict}
        propagate(module, qconfig_dict, *args, **kwargs)
        for name, child in module._modules.items():
            # In static ways torch.ao leaves alone what it has no form of; in dynamic ones that is an error.
            if _is_to_be_quantized(child) and (_has_form(child) or _is_dynamic(child.qconfig)):
                module._modules[name] = _quantizable(child)

    @functools.wraps(swap_module)
    def replace_and_swap(mod: nn.Module, mapping: dict[Any, Any], *args: Any, **kwargs: Any) -> nn.Module:
        if _is_to_be_quantized(mod):
            kind = type_before_parametrizations(mod)
            if kind not in mapping and THEIRS[kind] in mapping:
                mod = _quantizable(mod)
        swapped: nn.Module = swap_module(mod, mapping, *args, **kwargs)
        return swapped

    quantize._propagate_qconfig_helper = propagate_and_replace
    quantize.swap_module = replace_and_swap


def _is_to_be_quantized(module: nn.Module | None) -> TypeGuard[nn.Module]:
    if module is None or getattr(module, "qconfig", None) is None:
        return False
    return type_before_parametrizations(module) in THEIRS


def _is_dynamic(qconfig: Any) -> bool:
    return getattr(qconfig.activation(), "is_dynamic", False)


def _quantizable(module: nn.Module) -> nn.Module:
    """Returns the module of ``torch.nn`` in the place of one of ours; ValueError if none will do."""
    if not _has_form(module):
        raise ValueError(
            f"quantization: torch.ao has no quantized form of {module}; "
            "to leave it as it is, set its qconfig to None"
        )
    return as_torch(module)


def _has_form(module: nn.Module) -> bool:
    """Whether torch.ao has a quantized form of what one of our modules computes."""
    return bool(getattr(module, "reset_after", True)) and getattr(module, "proj_size", 0) == 0


def _prepare_graph(model: GraphModule, qconfig_dict: dict[Any, Any]) -> None:
    """Puts modules of ``torch.nn`` into a graph, in which qconfigs are looked for once more and in more ways.

    Those that the graph calls with what ``torch.nn`` does not take stay.
    """
    if not THEIRS.keys().isdisjoint(qconfig_dict):
        raise ValueError("quantization: name classes of torch.nn, which stand for those of torchrnn too")
    for node in model.graph.nodes:
        if node.op == "call_module" and node.kwargs.keys().isdisjoint(("lengths", "resets")):
            module = model.get_submodule(node.target)
            if type_before_parametrizations(module) in THEIRS and _has_form(module):
                model.set_submodule(node.target, as_torch(module))


when_imported("torch.ao.quantization.quantize", _patch)
