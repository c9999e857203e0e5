"""``LSTMCell``, ``GRUCell`` and ``RNNCell``: drop-ins for the cells of ``torch.nn``.

Letters: B batch rows, I inputs, H hidden units.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchrnn import ops
from torchrnn._layer import OPTIONS, dtypes_differ, scalar_type
from torchrnn._tools import script
from torchrnn.differentiable import plain
from torchrnn.layers import check_forget_bias, set_forget_bias
from torchrnn.options import Options
from torchrnn.prepacking import Packed, Prepackable, pack
from torchrnn.reference import Arguments


class Cell(Prepackable, nn.RNNCellBase):
    """What the three cells share: everything but the form of the state and the gates' options."""

    __prepare_scriptable__ = script.refuse

    def _options(self) -> Options:
        raise NotImplementedError

    def _states(self, hx: Any, batched: bool) -> tuple[Tensor, ...]:
        """Returns the initial states as a tuple, empty if there are none."""
        if hx is None:
            return ()
        if hx.dim() not in (1, 2):
            raise ValueError(f"{self._name()}: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        return (hx,)

    def _pack(self) -> tuple[Packed | None, ...]:
        weights = [self._parameters.get(name) for name in _NAMES]
        return (pack(weights if self.bias else weights[:2], self._options(), self.bias, False),)

    def _hidden(self, h: Tensor, c_n: Tensor) -> Any:
        """Returns h and c_n [1, B, H] in the form that the caller has."""
        return h

    def _name(self) -> str:
        return "RNNCell"

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Runs one step.

        Args:
            input: [B, I], or [I] without a batch. The dtype of the weights: float32, float64, bfloat16 or
                float16.
            hx: The state before the step, zeros by default: h [B, H], for an LSTM ``(h, c)`` of that shape;
                without B for an unbatched input.

        Returns:
            The state after the step, in the form of ``hx``.

        Raises:
            ValueError: If a rank does not fit, as in ``torch.nn``.
            RuntimeError: Where ``torch.nn`` raises it: if a size, dtype or device does not fit.
        """
        if not self._prepacked and plain():
            state = self._infer(input, hx)
            if state is not None:
                return state
        if input.dim() not in (1, 2):
            raise ValueError(f"{self._name()}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        batched = input.dim() == 2
        states = self._states(hx, batched)
        x = input.unsqueeze(0)  # [T=1, B, I] or, without a batch, [B=1, I]
        first = [state.unsqueeze(0) for state in states]
        if not batched:
            x, first = x.unsqueeze(0), [state.unsqueeze(0) for state in first]
        h0, c0 = (*first, None, None)[:2]
        b_ih: list[Tensor] = [] if self.bias_ih is None else [self.bias_ih]
        b_hh: list[Tensor] = [] if self.bias_hh is None else [self.bias_hh]
        a = Arguments(x, [self.weight_ih], [self.weight_hh], b_ih, b_hh, h0=h0, c0=c0)
        options = self._options()
        # As in torch.nn: under autocast only what a product gives as it is has its dtype.
        state_dtype = None if options.cell == "rnn" else (x if h0 is None else h0).dtype
        try:
            _, _, h_n, c_n = ops.layer(
                a, options, packed=(*self._prepacked, None)[0], state_dtype=state_dtype
            )
        except ValueError:
            problem = _torch_problem(a)
            if problem is None:
                raise
            raise RuntimeError(problem) from None
        return self._hidden(h_n.view(h_n.shape[-input.dim() :]), c_n)

    def _infer(self, input: Any, hx: Any) -> Any:
        """The short way of a plain inference call, as in the layers; None where it does not lead."""
        h0, c0 = hx, None
        if self._options() is OPTIONS["LSTM"] and hx is not None:
            if type(hx) is not tuple or len(hx) != 2 or hx[0] is None or hx[1] is None:
                return None
            h0, c0 = hx
        get = self._parameters.get
        weights = [get(name) for name in _NAMES]
        if not ops.infers(input, weights if self.bias else weights[:2], h0, c0):
            return None
        try:
            h, c = ops.plain_cell(input, *weights, h0, c0, *self._options().codes)
        except RuntimeError:
            return None
        return self._hidden(h, c)


_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _torch_problem(a: Arguments) -> str | None:
    """Returns ATen's text for the mistakes that it finds in these arguments, None if it would run them."""
    x, weight_ih, weight_hh = a.x[0], a.weight_ih[0], a.weight_hh[0]
    if x.size(1) != weight_ih.size(1):
        return f"input has inconsistent input_size: got {x.size(1)} expected {weight_ih.size(1)}"
    states = [state[0] for state in (a.h0, a.c0) if state is not None]
    for i, state in enumerate(states):
        if x.size(0) != state.size(0):
            return f"Input batch size {x.size(0)} doesn't match hidden{i} batch size {state.size(0)}"
        size = weight_hh.size(1)
        if state.size(1) != size:
            return f"hidden{i} has inconsistent hidden_size: got {state.size(1)}, expected {size}"
    for given, weight in zip((x, *states[:1]), (weight_ih, weight_hh), strict=False):
        if given.device != weight.device:
            found = f"but found at least two devices, {given.device} and {weight.device}!"
            return f"Expected all tensors to be on the same device, {found}"
        if dtypes_differ(given, weight):
            names = f"{scalar_type(given.dtype)} and {scalar_type(weight.dtype)}"
            return f"mat1 and mat2 must have the same dtype, but got {names}"
    return None


class LSTMCell(Cell, nn.LSTMCell):
    """One step of an LSTM, a drop-in for ``torch.nn.LSTMCell``; for the equations see ``torchrnn.LSTM``.

    Args:
        *args: As of ``torch.nn.LSTMCell``: ``input_size, hidden_size, bias=True, device=None, dtype=None``.
        forget_bias: Initial bias of the forget gate: that part of ``bias_ih`` starts at this value, that of
            ``bias_hh`` at 0. None for the initialisation of ``torch.nn``, uniform in +-1/sqrt(H).
        **kwargs: As ``args``.

    Raises:
        TypeError: If ``forget_bias`` is no number, or as in ``torch.nn``.
        ValueError: If ``forget_bias`` comes with ``bias=False``.

    Example:
        >>> cell = torchrnn.LSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10))
        >>> h.shape
        torch.Size([3, 20])
    """

    forget_bias: float | None = None  # On the class: pickles of torch.nn cells do not have it.

    def __init__(self, *args: Any, forget_bias: float | None = None, **kwargs: Any) -> None:
        check_forget_bias(forget_bias, True)
        self.forget_bias = forget_bias
        super().__init__(*args, **kwargs)
        check_forget_bias(forget_bias, self.bias)

    def reset_parameters(self) -> None:
        """Draws all parameters, uniform in +-1/sqrt(H), then sets the forget gate's bias if asked to."""
        super().reset_parameters()
        if self.forget_bias is not None and self.bias:
            set_forget_bias(self, ("bias_ih", "bias_hh"), self.hidden_size, self.forget_bias)

    def extra_repr(self) -> str:
        """Returns the arguments that differ from their defaults."""
        text = super().extra_repr()
        return text if self.forget_bias is None else f"{text}, forget_bias={self.forget_bias}"

    def _name(self) -> str:
        return "LSTMCell"

    def _options(self) -> Options:
        return OPTIONS["LSTM"]

    def _states(self, hx: Any, batched: bool) -> tuple[Tensor, ...]:
        if hx is None:
            return ()
        for i, state in enumerate(hx):
            if state.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{i}] to be 1D or 2D, got {state.dim()}D instead")
        if batched and isinstance(hx, Tensor):
            raise TypeError("lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
        if batched and len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        return hx[0], hx[1]

    def _hidden(self, h: Tensor, c_n: Tensor) -> tuple[Tensor, Tensor]:
        return h, c_n.view_as(h)


class GRUCell(Cell, nn.GRUCell):
    """One step of a GRU, a drop-in for ``torch.nn.GRUCell``; for the equations see ``torchrnn.GRU``.

    Args:
        *args: As of ``torch.nn.GRUCell``: ``input_size, hidden_size, bias=True, device=None, dtype=None``.
        reset_after: False for the reset before the product, as in Cho et al. 2014 and TensorFlow.
        **kwargs: As ``args``.

    Raises:
        TypeError: As in ``torch.nn``.

    Example:
        >>> cell = torchrnn.GRUCell(10, 20)
        >>> cell(torch.randn(3, 10)).shape
        torch.Size([3, 20])
    """

    reset_after: bool = True  # On the class: pickles of torch.nn cells do not have it.

    def __init__(self, *args: Any, reset_after: bool = True, **kwargs: Any) -> None:
        self.reset_after = reset_after
        super().__init__(*args, **kwargs)

    def extra_repr(self) -> str:
        """Returns the arguments that differ from their defaults."""
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")

    def _name(self) -> str:
        return "GRUCell"

    def _options(self) -> Options:
        return OPTIONS["GRU" if self.reset_after else "GRU_RESET_BEFORE"]


class RNNCell(Cell, nn.RNNCell):
    """One step of an Elman network, tanh or relu, a drop-in for ``torch.nn.RNNCell``.

    Args:
        *args: As of ``torch.nn.RNNCell``: ``input_size, hidden_size, bias=True, nonlinearity="tanh",
            device=None, dtype=None``.
        **kwargs: As ``args``.

    Raises:
        TypeError: As in ``torch.nn``.

    Example:
        >>> cell = torchrnn.RNNCell(10, 20, nonlinearity="relu")
        >>> cell(torch.randn(3, 10)).shape
        torch.Size([3, 20])
    """

    def _options(self) -> Options:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return OPTIONS[f"RNN_{self.nonlinearity.upper()}"]
