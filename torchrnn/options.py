"""The cells that the engine knows, and the variations that a layer can ask for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Cell(NamedTuple):
    """What the boundary must know of a cell; its equations are in ``reference.py`` and ``csrc/cells``."""

    code: int
    """Value of the ``cell`` argument of the ops, equal to ``enum class Cell`` in ``csrc/params.h``."""
    gates: int
    """Row blocks of ``weight_ih`` and ``weight_hh``."""
    tape: int
    """Values per hidden unit and step that a kernel keeps for the backward pass."""
    memory: bool
    """Whether the state has a memory ``c`` beside the output ``h``."""
    keeps_output: bool
    """Whether ``h`` is on the tape too, so that backward needs no outputs."""


CELLS = {
    "lstm": Cell(0, gates=4, tape=5, memory=True, keeps_output=False),
    "gru": Cell(1, gates=3, tape=5, memory=False, keeps_output=True),
    "gru_reset_before": Cell(2, gates=3, tape=4, memory=False, keeps_output=True),
    "rnn": Cell(3, gates=1, tape=1, memory=False, keeps_output=True),
    "lstm_coupled": Cell(4, gates=3, tape=4, memory=True, keeps_output=False),
}

ACTIVATIONS = {"tanh": 0, "relu": 1, "sigmoid": 2, "identity": 3}
"""Name -> ``activation`` argument of the ops, equal to ``enum class Activation`` in ``csrc/params.h``."""


@dataclass(frozen=True)
class Options:
    """Everything about a layer that is neither a tensor nor a size.

    Args:
        cell: A key of ``CELLS``. ``gru`` applies the reset gate after the recurrent product, as ``torch.nn``
            and cuDNN do; ``gru_reset_before`` before it, as Cho et al. 2014 and TensorFlow do.
            ``lstm_coupled`` has 1 - f for an input gate.
        activation: A key of ``ACTIVATIONS``: of the candidate, and in an LSTM also of the cell output.
        cell_clip: Bound on ``|c|`` of an LSTM, applied before the output gate; None for no bound.
        proj_clip: Bound on the projected output; None for no bound.
        norm_eps: Added to the variance by layer normalisation.
        reverse: Whether the first direction runs from the last step to the first.

    Raises:
        ValueError: If a name is not known, a bound is negative or NaN, or a bound does not apply to the cell.
    """

    cell: str = "lstm"
    activation: str = "tanh"
    cell_clip: float | None = None
    proj_clip: float | None = None
    norm_eps: float = 1e-5
    reverse: bool = False
    codes: tuple[int, int] = field(init=False, repr=False, compare=False)
    """Cell and activation as the ops have them; a field, since small calls would feel a property."""

    def __post_init__(self) -> None:
        """Refuses what no path can run; sets ``codes``."""
        if self.cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {self.cell!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        for name in ("cell_clip", "proj_clip"):
            bound = getattr(self, name)
            if bound is not None and not bound >= 0:
                raise ValueError(f"{name} must be None or at least 0, got {bound}")
            if bound is not None and not CELLS[self.cell].memory:
                raise ValueError(f"{name} applies to cells with memory only, got cell {self.cell!r}")
        if not self.norm_eps >= 0:
            raise ValueError(f"norm_eps must be at least 0, got {self.norm_eps}")
        object.__setattr__(self, "codes", (CELLS[self.cell].code, ACTIVATIONS[self.activation]))
