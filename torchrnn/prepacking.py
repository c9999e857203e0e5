"""Weights in the layout of the CPU kernels, kept for a model whose weights do not change any more."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchrnn import _native
from torchrnn.differentiable import check_plain, transformed
from torchrnn.options import CELLS, Options

_LIBRARY = torch.library.Library("torchrnn", "FRAGMENT")
# H, R and D are arguments because the layout is the kernels' own affair.
_LIBRARY.define("pack(Tensor[] weights, int cell, bool bias, bool projection) -> Tensor")
_LIBRARY.define(
    "layer_packed(Tensor x, Tensor packed, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? resets, "
    "int cell, int activation, int hidden, int outputs, int directions, bool projection, bool reverse) "
    "-> (Tensor y, Tensor h_n, Tensor c_n)"
)
layer_packed = torch.ops.torchrnn.layer_packed.default
_MEMORY = {cell.code: cell.memory for cell in CELLS.values()}


def _layer_packed_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, cell, hidden, outputs, directions = args[0], args[6], *args[8:11]
    for name, tensor in zip(("x", "packed", "h0", "c0", "lengths", "resets"), args, strict=False):
        if tensor is not None:
            check_plain("layer_packed", name, tensor, x)
    if x.dim() != 3:
        raise ValueError(f"layer_packed: x must be [T, B, I], got {list(x.shape)}")
    if cell not in _MEMORY:
        raise ValueError(f"layer_packed: cell {cell} is not known")
    if hidden < 0 or outputs < 0 or directions not in (1, 2):
        raise ValueError(
            "layer_packed: hidden, outputs and directions must be those of a layer, "
            f"got {hidden}, {outputs} and {directions}"
        )
    steps, batch, _ = x.shape
    new = x.new_empty
    return (
        new(steps, batch, directions * outputs),
        new(directions, batch, outputs),
        new(directions, batch, hidden) if _MEMORY[cell] else new(0),
    )


torch.library.register_fake("torchrnn::layer_packed", _layer_packed_fake, lib=_LIBRARY)


class Packed(NamedTuple):
    """One layer's weights."""

    weights: tuple[Tensor, ...]
    """What was packed, direction by direction."""
    data: Tensor
    """[n], for one instruction set."""
    scalars: tuple[Any, ...]
    """The arguments of ``layer_packed`` from ``cell`` on."""


class Prepackable(nn.Module):
    """A module that ``prepack`` keeps weights of: what holds for layers and cells alike."""

    _prepacked: tuple[Packed | None, ...] = ()

    def _pack(self) -> tuple[Packed | None, ...]:
        """Returns each layer's weights packed; None where no kernel would read them."""
        raise NotImplementedError

    def _drop_packed(self) -> None:
        self.__dict__.pop("_prepacked", None)

    def train(self, mode: bool = True) -> Any:
        """Sets the mode; for training, drops what ``prepack`` keeps."""
        if mode:
            self._drop_packed()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._drop_packed()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._prepacked:
            self._prepacked = self._pack()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_prepacked"}


class prepack:
    """Keeps a copy of the recurrent weights of a model in the layout of the CPU kernels, for inference.

    **The weights are constants from then on**: calls run on the copy, and do not see what is written to a
    weight afterwards. ``load_state_dict`` makes the copy anew. It is dropped by ``.train()``, ``.to()`` and
    its like, ``torchrnn.convert(model, to="torch")``, copies and pickles of the model, and at the end of a
    ``with`` block. ``torch.compile`` uses it; exported and traced programs do not hold it.

    What it saves is the time to lay the weights out at each call, and takes is their memory a second time, in
    float32 for a model in half precision. On other devices than the CPU, and without kernels, nothing is kept
    and nothing changes.

    Args:
        model: A module that is or holds ``torchrnn.LSTM``, ``GRU``, ``RNN`` or their cells, on which it acts
            in place.

    Raises:
        ValueError: If it holds none.
        RuntimeError: When the model is called and a gradient is wanted by what it computes.

    Example:
        >>> model = torchrnn.LSTM(10, 20).eval()
        >>> torchrnn.prepack(model)  # From now on, or for a while: with torchrnn.prepack(model): ...
        >>> with torch.no_grad():
        ...     output, _ = model(torch.randn(1, 1, 10))
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [module for module in model.modules() if isinstance(module, Prepackable)]
        if not self.modules:
            raise ValueError(
                f"prepack: model must hold a layer or cell of torchrnn, {type(model).__name__} holds none"
            )
        for module in self.modules:
            module._prepacked = module._pack()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module in self.modules:
            module._drop_packed()


def pack(weights: Sequence[Any], options: Options, bias: bool, projection: bool) -> Packed | None:
    """Packs a layer's weights, direction by direction; None if no kernel would read them."""
    if _native.WHY_NOT is not None:
        return None
    if any(type(w) not in (Tensor, nn.Parameter) or w.device.type != "cpu" for w in weights):
        return None
    with torch.no_grad():
        data = torch.ops.torchrnn.pack(list(weights), options.codes[0], bias, projection)
    rows, outputs = weights[1].shape  # weight_hh
    hidden = rows // CELLS[options.cell].gates
    directions = len(weights) // (2 + 2 * bias + projection)
    scalars = (*options.codes, hidden, outputs, directions, projection, options.reverse)
    return Packed(tuple(weights), data, scalars)


def usable(packed: Packed | None, weights: Sequence[Any]) -> bool:
    """Whether a call is to run on what was packed, if it was packed of these very weights.

    Other weights come by functional_call, say; they are as good as not packed.
    """
    return (
        packed is not None
        and len(weights) == len(packed.weights)
        and all(given is kept for given, kept in zip(weights, packed.weights, strict=True))
        and _computes()
    )


def refuse_gradient(name: str, tensors: Sequence[Tensor]) -> None:
    """Raises RuntimeError if a gradient is wanted."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{name}: the weights are prepacked, and constants, so there is no gradient: call it under "
            "torch.no_grad(), or drop them by .train()"
        )


def _computes() -> bool:
    """Whether a call computes, and is not transformed or recorded for another time and machine."""
    return not (
        torch.compiler.is_exporting()
        or torch._C._is_any_autocast_enabled()
        or transformed()  # Also inside what is compiled, where it is a constant of the graph.
        or (
            not torch.compiler.is_compiling()
            and (torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0)
        )
    )
