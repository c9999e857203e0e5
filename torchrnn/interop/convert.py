"""``convert``: swaps the recurrent layers of a model between ``torch.nn`` and ``torchrnn``."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from torchrnn._layer import Layer
from torchrnn.cells import Cell, GRUCell, LSTMCell, RNNCell
from torchrnn.layers import GRU, LSTM, RNN
from torchrnn.rnn_cell.base import RNNCell as TensorFlowCell

_Model = TypeVar("_Model", bound=nn.Module)

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.RNNCell: RNNCell,
}
"""The class of ``torch.nn`` -> ours."""
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


def convert(model: _Model, to: str = "torchrnn") -> _Model:
    """Swaps every recurrent layer and cell of a model for its counterpart, in place, and returns the model.

    A converted module stays the same object with the same parameters, buffers, hooks and training mode: only
    its class changes, so whatever refers to it (an optimizer, a second parent) goes on working. Parametrized
    modules are converted too.

    A module of a class derived from a layer or cell is left alone, since it may rely on its base, and so is a
    module with a ``forward`` set on the instance, and on the way back a cell of ``torchrnn.rnn_cell``; one
    warning names them all. ScriptModules are left alone.

    Args:
        model: Any module, also a layer or cell itself.
        to: ``"torchrnn"``, or ``"torch"`` for the way back, after which nothing of torchrnn is left in the
            modules: copies and pickles of them do not need it. It forgets ``forget_bias`` and ``recompute``.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If ``to`` is neither, or ``torch.nn`` cannot express a module; nothing is changed then.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LSTM(8, 16))
        >>> torchrnn.convert(model)
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
          (1): LSTM(8, 16)
        )
        >>> type(model[1])
        <class 'torchrnn.layers.LSTM'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    if to not in ("torchrnn", "torch"):
        raise ValueError(f"convert: to must be 'torchrnn' or 'torch', got {to!r}")
    targets = OURS if to == "torchrnn" else THEIRS
    kinds = tuple(OURS) if to == "torchrnn" else (*THEIRS, TensorFlowCell)
    swaps, left = [], []
    for name, module in model.named_modules():
        plain = parametrize.type_before_parametrizations(module)
        if plain in targets and "forward" not in module.__dict__:
            swaps.append((name, module, targets[plain]))
        elif isinstance(module, kinds) and (to == "torch" or not isinstance(module, Layer | Cell)):
            left.append(f"{name or '(root)'} ({plain.__module__}.{plain.__qualname__})")
    for name, module, _ in swaps:
        if to == "torch" and not getattr(module, "reset_after", True):
            raise ValueError(f"convert: torch.nn cannot express reset_after=False, as {name or '(root)'} has")
    for _, module, target in swaps:
        _swap(module, target)
    if left:
        warnings.warn(
            f"convert leaves alone what has no sure counterpart: {', '.join(left)}",
            UserWarning,
            stacklevel=2,
        )
    return model


def as_torch(module: nn.Module) -> nn.Module:
    """Returns a module of ``torch.nn`` with all that a layer or cell of ours holds, which stays as it is."""
    # Not copy.copy, which goes through __getstate__; that refuses where weights are parametrized.
    twin = object.__new__(type(module))
    for key, value in vars(module).items():
        vars(twin)[key] = value.copy() if isinstance(value, dict) else value
    return convert(twin, to="torch")


def _swap(module: nn.Module, target: type[nn.Module]) -> None:
    source = type(module)
    if parametrize.is_parametrized(module):
        # parametrize gives each module a class of its own, with the properties that compute its tensors.
        own = {key: value for key, value in vars(source).items() if key != "__weakref__"}
        target = type(source.__name__, (target,), own)
    module.__class__ = target
    # What only one of the two sides knows: what we add has a default on the class.
    for key in [key for key in vars(module) if hasattr(source, key) and not hasattr(target, key)]:
        del vars(module)[key]
    vars(module).pop("_flat_weights", None)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
