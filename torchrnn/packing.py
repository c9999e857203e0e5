"""Weights in the layout of the CPU kernels, kept from one inference call to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchrnn import _native
from torchrnn.options import ACTIVATIONS, CELLS, Options
from torchrnn.reference import Arguments

PACK_FROM = 24
"""T*B from which packing pays back within one call, kPackFrom of ``csrc/cpu/forward.h``."""


class Sources:
    """Weights as they were at one time."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.changes = len(_native.CHANGES)
        # Each with its version, its address, and an alias without which the address could be used again.
        self.weights = [(w, w._version, w.data_ptr(), w.detach()) for w in weights]

    def are(self, weights: Sequence[Tensor | None]) -> bool:
        """Whether these are the same tensors, with the same memory and unchanged since."""
        if self.changes != len(_native.CHANGES) or len(weights) != len(self.weights):
            return False
        for weight, (source, version, address, _) in zip(weights, self.weights, strict=True):
            if (
                weight is not source
                or source._version != version
                or source.data_ptr() != address
                or not source.is_contiguous()  # Transposed in its place, say.
            ):
                return False
        return True


class PackedLayer:
    """The packed weights of a layer, what they were made from, and what a call must be to run on them."""

    def __init__(self, a: Arguments, options: Options, sources: Sources) -> None:
        self.sources = sources
        cell, (rows, outputs), directions = CELLS[options.cell], a.weight_hh[0].shape, len(a.weight_hh)
        hidden = rows // cell.gates
        self.options, self.dtype, self.inputs = options, a.x.dtype, a.weight_ih[0].size(1)
        self.directions, self.hidden, self.outputs = directions, hidden, outputs
        self.data: Tensor = torch.ops.torchrnn.pack(*a[1:6], cell.code)
        # The arguments of the op ``layer_packed`` from ``cell`` on.
        self.scalars = (
            cell.code,
            ACTIVATIONS[options.activation],
            hidden,
            outputs,
            directions,
            bool(a.weight_hr),
            options.reverse,
        )

    def fits(self, x: Tensor, h0: Tensor | None, c0: Tensor | None) -> bool:
        """Whether a call needs no other check; if not, ``checks.check`` knows why.

        In haste, since this is a good part of what a small step costs beside its kernel.
        """
        if type(x) is not Tensor or x.dtype != self.dtype or not x.is_cpu:
            return False
        shape = x.shape
        if len(shape) != 3 or shape[0] < 1 or shape[2] != self.inputs:
            return False
        for state, size in ((h0, self.outputs), (c0, self.hidden)):
            if state is not None and (
                type(state) is not Tensor
                or state.shape != (self.directions, shape[1], size)
                or state.dtype != self.dtype
                or not state.is_cpu
            ):
                return False
        return True


class PackedWeights:
    """Keeps one layer's packed weights, made when they are needed and again when the weights have changed.

    A weight has changed if it is another tensor, has other memory or another version (torch counts up at each
    in-place operation). What torch does not count is not seen, see ``drop``. Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self.drop()

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        return PackedWeights, ()

    def drop(self) -> None:
        """Forgets the packed weights.

        To be called after writing to a weight behind torch's back: through ``weight.data`` or a NumPy view of
        it, or by a pointer.
        """
        self._packed: PackedLayer | None = None
        self._seen: Sources | None = None  # Of the call before, if it packed nothing.

    def find(self, weights: Sequence[Tensor | None], options: Options) -> PackedLayer | None:
        """Returns what was packed from these very weights, direction by direction, or None."""
        packed = self._packed  # Read once: another thread may put another one there.
        if packed is None or packed.options is not options or not packed.sources.are(weights):
            return None
        return packed

    def make(self, a: Arguments, options: Options) -> PackedLayer | None:
        """Packs the weights of a checked call, if that will pay back; returns None if not.

        A call of few rows is the first of many only if the same weights were there at the call before.
        """
        weights, seen = in_order(a), self._seen
        if a.x.device.type != "cpu" or _native.WHY_NOT is not None:
            return None
        if any(type(w) not in (Tensor, nn.Parameter) for w in weights):  # A subclass has its own ways.
            return None
        if any(w.is_inference() or not w.is_contiguous() for w in weights):  # Without version; not dense.
            return None
        self._packed, self._seen = None, Sources(weights)
        if a.x.size(0) * a.x.size(1) < PACK_FROM and (seen is None or not seen.are(weights)):
            return None
        packed = self._packed = PackedLayer(a, options, self._seen)
        return packed


def in_order(a: Arguments) -> list[Tensor]:
    """Returns all weights and biases, direction by direction."""
    return [weight for one in zip(*filter(None, a[1:6]), strict=True) for weight in one]


def packed_weights(module: nn.Module, layer: int = 0) -> PackedWeights | None:
    """Returns where a module keeps the packed weights of one of its layers; None under a compiler.

    A graph that outlives the call would not look at versions.
    """
    if torch.compiler.is_compiling():
        return None
    kept: dict[int, PackedWeights] = module.__dict__.setdefault("_packed_weights", {})
    found = kept.get(layer)
    if found is None:
        found = kept[layer] = PackedWeights()
    return found


def drop_packed_weights(module: nn.Module) -> None:
    """Forgets the packed weights of all layers of a module, see ``PackedWeights.drop``."""
    module.__dict__.pop("_packed_weights", None)
