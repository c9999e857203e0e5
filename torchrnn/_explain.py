"""What ``explain`` says of layers and devices: which kernels a call runs on, and why."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchrnn import _native, cuda, ops
from torchrnn._layer import Layer
from torchrnn.cells import Cell
from torchrnn.checks import transformed
from torchrnn.packing import PACK_FROM
from torchrnn.reference import Arguments
from torchrnn.rnn_cell.dropout import DropoutWrapper


def explain_layer(module: Layer | Cell, input: object) -> str:
    """Returns how a call of a layer, or of a ``torch.nn`` cell, with an input would run.

    Raises:
        TypeError: If the input is not a tensor.
        ValueError: If the module would not take it.
    """
    name = type(module).__name__
    if not isinstance(input, Tensor):
        raise TypeError(f"explain: input must be a tensor for {name}, got {type(input).__name__}")
    x, weight, size = _sequence(module, input), next(module.parameters()), module.input_size
    if x.size(2) != size:
        raise ValueError(f"explain: input must be [..., I] with I={size}, got {list(input.shape)}")
    if x.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(f"explain: input must have {name}'s dtype {weight.dtype}, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"explain: input must be on {name}'s device {weight.device}, got {x.device}")
    x = ops.autocast(Arguments(x, [], [], [], [], [], [], [], [])).x
    return f"{name}({module.extra_repr()}): {_way(module, x)}"


def explain_ops(cell: object, x: Tensor) -> str:
    """Returns where the ops of ``rnn_cell``'s cells run for inputs like x."""
    device, where = x.device, f"ops on {x.device}"
    if torch.is_grad_enabled() and isinstance(cell, nn.Module) and any(map(_learns_masks, cell.modules())):
        return f"{where}: reference in plain torch, where the state is dropped; a keep probability is learnt"
    why = _why_no_kernels(device)
    if why is not None:
        return f"{where}: {why}"
    if device.type == "cpu":
        return f"{where}: {_cpu_kernels()}"
    capability = torch.cuda.get_device_capability(device)
    paths = "; ".join(f"{row.path} path: {row.why}" for row in cuda.rows(capability, x.dtype))
    return f"{where}: {_cuda_kernels(capability)}, {paths}"


def _sequence(module: Layer | Cell, input: Tensor) -> Tensor:
    """Returns an input as [T, B, I]."""
    batched = 3 if isinstance(module, Layer) else 2
    if input.dim() not in (batched - 1, batched):
        raise ValueError(f"explain: input must be {batched - 1}D or {batched}D, got {list(input.shape)}")
    if isinstance(module, Cell):
        return input.view(1, -1, input.size(-1)) if input.dim() == 1 else input.unsqueeze(0)
    if input.dim() == 2:
        return input.unsqueeze(1)
    return input.transpose(0, 1) if module.batch_first else input


def _way(module: Layer | Cell, x: Tensor) -> str:
    why = _why_no_kernels(x.device)
    if why is not None:
        return why
    if x.device.type == "cpu":
        return f"{_cpu_kernels()}, {_packed(x)}"
    options = module._options()
    projected = isinstance(module, Layer) and module.proj_size > 0
    variation = {"activation": options.activation != "tanh", "projection": projected}
    capability = torch.cuda.get_device_capability(x.device)
    path, reason = cuda.choose(
        capability,
        x.dtype,
        options.cell,
        hidden=module.hidden_size,
        batch=x.size(1),
        steps=x.size(0),
        variation=frozenset(name for name, there in variation.items() if there),
    )
    return f"{_cuda_kernels(capability)}, {path} path: {reason}"


def _why_no_kernels(device: torch.device) -> str | None:
    """Returns what runs where no kernel does, and why; None where kernels do."""
    if device.type == "meta":
        return "shapes only: the device meta has no values"
    if transformed():
        why: str | None = "a transform (vmap, grad, jvp or the like) is active"
    elif device.type == "cpu":
        why = _native.WHY_NOT
    elif device.type == "cuda":
        why = _native.WHY_NOT_CUDA
    else:
        why = f"there are no kernels for {device.type}"
    return None if why is None else f"reference in plain torch, step by step: {why}"


def _cpu_kernels() -> str:
    return f"CPU kernels ({_native.isa()})"


def _cuda_kernels(capability: tuple[int, int]) -> str:
    return f"CUDA kernels (capability {capability[0]}.{capability[1]})"


def _packed(x: Tensor) -> str:
    """Returns whether a call on the CPU runs on packed weights, which it does if they are plain tensors."""
    if torch.is_grad_enabled():
        return "weights not packed: gradients are recorded"
    if not ops.runs_packed():
        return "weights not packed: autocast, a compiler or a tracer is active"
    rows = x.size(0) * x.size(1)
    since = "" if rows >= PACK_FROM else f" from the second call on: {rows} rows are fewer than {PACK_FROM}"
    return f"weights packed and kept{since}"


def _learns_masks(module: nn.Module) -> bool:
    """Whether a module makes masks of the state that have a gradient."""
    keep = module.state_keep_prob if isinstance(module, DropoutWrapper) and module.training else None
    return isinstance(keep, Tensor) and keep.requires_grad
