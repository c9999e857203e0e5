"""What ``explain`` says of layers and devices: which kernels a call runs on, and why."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchrnn import _native, cuda, ops
from torchrnn._layer import Layer
from torchrnn._native import DTYPES
from torchrnn.cells import Cell
from torchrnn.differentiable import transformed
from torchrnn.options import ACTIVATIONS, CELLS
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
    x = _autocast(x)
    if x.dtype not in DTYPES:
        raise ValueError(f"explain: input must be float32, float64, bfloat16 or float16, got {x.dtype}")
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
    # Integers are looked up in an embedding first.
    dtype = _autocast(x).dtype if x.dtype in DTYPES else torch.get_default_dtype()
    return f"{where}: {_cuda_kernels(device)}, {'; '.join(_paths(device, dtype))}"


def _autocast(x: Tensor) -> Tensor:
    """Returns x in the dtype that the ops would compute with."""
    return ops.autocast(Arguments(x, [], [], [], [])).x


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
        kept = any(packed is not None for packed in module._prepacked)
        return _cpu_kernels() + (", on prepacked weights" if kept else "")
    return f"{_cuda_kernels(x.device)}, {_path(module, x)}"


def _path(module: Layer | Cell, x: Tensor) -> str:
    """Returns the path of a call on CUDA and why, or that it raises."""
    options = module._options()
    path, why, why_not = _native.cuda_path(
        device=x.device.index,
        forced=cuda.forced(),
        dtype=DTYPES.index(x.dtype),
        cell=CELLS[options.cell].code,
        activation=ACTIVATIONS[options.activation],
        steps=x.size(0),
        batch=x.size(1),
        hidden=module.hidden_size,
        directions=2 if isinstance(module, Layer) and module.bidirectional else 1,
        projected=isinstance(module, Layer) and module.proj_size > 0,
        tf32=cuda.allows_tf32(),
    )
    raises = "" if why_not is None else f", but the call raises: {why_not}"
    return f"{cuda.PATHS[path]} path: {why}{raises}"


def _paths(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Returns the paths that calls with a dtype can take, and why; one where it is forced."""
    if cuda.forced():
        path = cuda.PATHS[cuda.forced()]
        raises = ", and a call that it does not serve raises" if path == "cluster" else ""
        return [f"{path} path: it is forced{raises}"]
    rows = _native.cuda_rows(device.index, DTYPES.index(dtype))
    return [f"{cuda.PATHS[code]} path: {why}" for code, why in rows]


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


def _cuda_kernels(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"CUDA kernels (capability {major}.{minor})"


def _learns_masks(module: nn.Module) -> bool:
    """Whether a module makes masks of the state that have a gradient."""
    keep = module.state_keep_prob if isinstance(module, DropoutWrapper) and module.training else None
    return isinstance(keep, Tensor) and keep.requires_grad
