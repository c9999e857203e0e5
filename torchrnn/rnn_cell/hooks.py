"""Hooks of modules, for sequences over which a module is not called at each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree


def is_plain(module: nn.Module) -> bool:
    """Whether a call of a module does what its class says, and nothing else."""
    return not (why_called(module) or pre_hooks(module) or "forward" in vars(module))


def why_called(module: nn.Module) -> str | None:
    """Returns which hooks must see each call of a module; None if no others than forward pre-hooks."""
    if module._forward_hooks:
        return "a forward hook sees each step"
    if module._backward_hooks or module._backward_pre_hooks:
        return "a backward hook sees each step"
    return "a global hook of modules sees each step" if _has_any_global_hook() else None


def pre_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Returns the forward pre-hooks, without that by which torch builds a lazy module at its first call."""
    return {
        key: hook
        for key, hook in module._forward_pre_hooks.items()
        if getattr(hook, "__func__", None) is not LazyModuleMixin._infer_parameters
    }


def before_sequence(module: nn.Module, *given: Any) -> Callable[..., Any] | None:
    """Runs the forward pre-hooks as the call for the first step of a sequence does.

    Args:
        module: Has no hooks that must see each call.
        *given: The arguments of the first step, which stay as they are.

    Returns:
        None if the hooks leave the arguments as they are: then any way over the sequence does. Else what to
        call for each step, from the first one on, whose hooks have run.
    """
    args = _copied(given)
    kwargs: dict[str, Any] = {}
    before = pytree.tree_leaves(args)
    versions = [_version(leaf) for leaf in before]
    for key, hook in pre_hooks(module).items():
        if key in module._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(module, args, kwargs) or (args, kwargs)
        elif (result := hook(module, args)) is not None:
            args = result if isinstance(result, tuple) else (result,)
    after = pytree.tree_leaves(args)
    same = len(after) == len(before) and all(a is b for a, b in zip(after, before, strict=True))
    if same and not kwargs and [_version(leaf) for leaf in before] == versions:
        return None
    first = [(args, kwargs)]

    def step(*args: Any) -> Any:
        if not first:
            return module(*args)
        changed, kwargs = first.pop()
        return module.forward(*changed, **kwargs)

    return step


def _copied(nest: Any) -> Any:
    """Returns copies that count how often they are written to, which tensors of inference mode do not."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return _copied(nest)
    return pytree.tree_map_only(Tensor, Tensor.clone, nest)


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) else 0
