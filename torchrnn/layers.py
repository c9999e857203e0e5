"""``LSTM``, ``GRU`` and ``RNN``: drop-ins for the layers of ``torch.nn``."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrnn._layer import OPTIONS, Layer
from torchrnn.options import Options


def check_forget_bias(forget_bias: object, bias: bool) -> None:
    """Raises TypeError for what is no number, ValueError where there is no bias to set."""
    if forget_bias is None:
        return
    if not isinstance(forget_bias, numbers.Real) or isinstance(forget_bias, bool):
        raise TypeError(f"forget_bias should be a number or None, got: {type(forget_bias).__name__}")
    if not bias:
        raise ValueError(f"forget_bias needs bias=True, got forget_bias={forget_bias} with bias=False")


def set_forget_bias(module: nn.Module, names: Iterable[str], hidden: int, forget_bias: float) -> None:
    """Sets the forget gate's part of each bias: to ``forget_bias`` in ``bias_ih``, to 0 in ``bias_hh``."""
    with torch.no_grad():
        for name in names:
            if name.startswith("bias_"):
                value = forget_bias if name.startswith("bias_ih") else 0.0
                getattr(module, name)[hidden : 2 * hidden].fill_(value)


class LSTM(Layer, nn.LSTM):
    """Long short-term memory layers, a drop-in for ``torch.nn.LSTM``.

    Constructor, parameters, ``state_dict``, results and errors are those of ``torch.nn.LSTM``. With W, R, b,
    b' for ``weight_ih``, ``weight_hh``, ``bias_ih``, ``bias_hh``, and their rows in the order i, f, g, o::

        i, f, o = sigmoid(W x + b + R h + b')
        g = tanh(W x + b + R h + b')
        c = f * c + i * g
        h = o * tanh(c)

    Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000. With ``proj_size``, h is projected
    (Sak et al. 2014, arXiv:1402.1128).

    Args:
        *args: As of ``torch.nn.LSTM``: ``input_size, hidden_size, num_layers=1, bias=True, batch_first=False,
            dropout=0.0, bidirectional=False, proj_size=0, device=None, dtype=None``.
        forget_bias: Initial bias of the forget gate: that part of ``bias_ih`` starts at this value, that of
            ``bias_hh`` at 0. None for the initialisation of ``torch.nn``, uniform in +-1/sqrt(H).
        recompute: True to keep little for backward: only inputs, outputs and a few states. The gates are then
            computed again, which makes training slower by a third to a half. Not under ``torch.compile`` or a
            transform, which keep everything.
        **kwargs: As ``args``.

    Raises:
        TypeError: If ``forget_bias`` is no number, or as in ``torch.nn``.
        ValueError: If ``forget_bias`` comes with ``bias=False``, or as in ``torch.nn``.

    Example:
        >>> lstm = torchrnn.LSTM(10, 20, num_layers=2, forget_bias=1.0)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10), lengths=[2, 5, 4])
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    forget_bias: float | None = None  # On the class: pickles of torch.nn layers do not have it.

    def __init__(self, *args: Any, forget_bias: float | None = None, **kwargs: Any) -> None:
        check_forget_bias(forget_bias, True)
        self.forget_bias = forget_bias
        super().__init__(*args, **kwargs)
        check_forget_bias(forget_bias, self.bias)

    def reset_parameters(self) -> None:
        """Draws all parameters, uniform in +-1/sqrt(H), then sets the forget gate's bias if asked to."""
        super().reset_parameters()
        if self.forget_bias is not None and self.bias:
            set_forget_bias(self, self._flat_weights_names, self.hidden_size, self.forget_bias)

    def extra_repr(self) -> str:
        """Returns the arguments that differ from their defaults."""
        text = super().extra_repr()
        return text if self.forget_bias is None else f"{text}, forget_bias={self.forget_bias}"

    def _states(self, hx: Any) -> tuple[Tensor, ...]:
        if hx is None:
            return ()
        states = (hx[0], hx[1])
        if not isinstance(hx, Tensor) and len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
        return states

    def _hidden(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(states)


class GRU(Layer, nn.GRU):
    """Gated recurrent units, a drop-in for ``torch.nn.GRU``.

    Constructor, parameters, ``state_dict``, results and errors are those of ``torch.nn.GRU``. With W, R, b,
    b' for ``weight_ih``, ``weight_hh``, ``bias_ih``, ``bias_hh``, and their rows in the order r, z, n::

        r, z = sigmoid(W x + b + R h + b')
        n = tanh(W x + b + r * (R h + b'))
        h = (1 - z) * n + z * h

    Cho et al. 2014, arXiv:1406.1078, with the reset after the product, as cuDNN and ``torch.nn`` have it.

    Args:
        *args: As of ``torch.nn.GRU``: ``input_size, hidden_size, num_layers=1, bias=True, batch_first=False,
            dropout=0.0, bidirectional=False, device=None, dtype=None``.
        reset_after: False for the reset before the product, ``n = tanh(W x + b + R (r * h) + b')``, as in
            the paper and in TensorFlow.
        recompute: True to keep little for backward: only inputs, outputs and a few states. The gates are then
            computed again, which makes training slower by a third to a half. Not under ``torch.compile`` or a
            transform, which keep everything.
        **kwargs: As ``args``.

    Raises:
        TypeError: As in ``torch.nn``.
        ValueError: As in ``torch.nn``.

    Example:
        >>> gru = torchrnn.GRU(10, 20, reset_after=False)
        >>> output, h_n = gru(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    reset_after: bool = True  # On the class: pickles of torch.nn layers do not have it.

    def __init__(self, *args: Any, reset_after: bool = True, **kwargs: Any) -> None:
        self.reset_after = reset_after
        super().__init__(*args, **kwargs)

    def extra_repr(self) -> str:
        """Returns the arguments that differ from their defaults."""
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")

    def _options(self) -> Options:
        return OPTIONS["GRU" if self.reset_after else "GRU_RESET_BEFORE"]


class RNN(Layer, nn.RNN):
    """Elman layers (Elman 1990), a drop-in for ``torch.nn.RNN``.

    Constructor, parameters, ``state_dict``, results and errors are those of ``torch.nn.RNN``. With W, R, b,
    b' for ``weight_ih``, ``weight_hh``, ``bias_ih``, ``bias_hh``: ``h = tanh(W x + b + R h + b')``, or with
    relu in place of tanh.

    Args:
        *args: As of ``torch.nn.RNN``: ``input_size, hidden_size, num_layers=1, nonlinearity="tanh",
            bias=True, batch_first=False, dropout=0.0, bidirectional=False, device=None, dtype=None``.
        recompute: True to keep little for backward: only inputs, outputs and a few states. The gates are then
            computed again, which makes training slower by a third to a half. Not under ``torch.compile`` or a
            transform, which keep everything.
        **kwargs: As ``args``.

    Raises:
        TypeError: As in ``torch.nn``.
        ValueError: As in ``torch.nn``.

    Example:
        >>> rnn = torchrnn.RNN(10, 20, nonlinearity="relu")
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """
