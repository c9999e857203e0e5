"""Training with little memory: a layer that keeps its inputs and a few states, and computes the rest again.

The gates of every step, which backward needs, take five times the memory of an LSTM's output. Here they are
made anew, some steps at a time, from the states at which these steps begin (Chen et al. 2016,
arXiv:1604.06174).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchrnn import ops
from torchrnn.checks import transformed
from torchrnn.options import CELLS, Options
from torchrnn.packing import PackedWeights
from torchrnn.reference import Arguments

CHUNK_ROWS = 1024
"""Rows (T*B) computed again at a time: enough for large products, and little beside a long sequence."""


def layer(
    a: Arguments, options: Options, packed: PackedWeights | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Does what ``ops.layer`` does; gradients cost one more forward pass and a fraction of the memory.

    A second derivative keeps everything, as ``ops.layer`` does; so does a call under a transform or compiler.
    """
    if not torch.is_grad_enabled() or transformed() or torch.compiler.is_compiling():
        return ops.layer(a, options, packed=packed)
    a = ops.checked(a, options)
    # Of the variations only peepholes and activations are known below.
    varied = a.norm_gain or a[13:] != (None,) * 4 or (options.cell_clip, options.proj_clip) != (None, None)
    if varied or ops.reference_only(a, options) or not ops.requires_grad(a):
        return ops.layer(a, options)
    variables = ops.differentiable(a)
    apply = _Recomputed.apply  # torch leaves it without annotations.
    y, h_n, c_n = apply(a, options, *variables)  # type: ignore[no-untyped-call]
    return y, None, h_n, c_n


class _Recomputed(torch.autograd.Function):
    """``variables`` are the tensors in ``a`` that have a gradient, as ``ops.differentiable`` orders them."""

    @staticmethod
    def forward(
        ctx: Any, a: Arguments, options: Options, *variables: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, c_all, h_n, c_n = torch.ops.torchrnn.layer_infer(
            *a, *ops.scalars(options, a.x), CELLS[options.cell].memory
        )
        chunk = max(1, -(-CHUNK_ROWS // max(1, a.x.size(1))))
        directions = [_Direction(a, options, d, chunk) for d in range(len(a.weight_hh))]
        states = [state for one in directions for state in one.first_states(y, c_all)]
        ctx.save_for_backward(*variables, *states)
        ctx.rest, ctx.options, ctx.chunk = a[11:], options, chunk
        # All else in a is in variables; here only which places it has.
        ctx.layout = [len(tensors) for tensors in a.lists], a.h0 is not None, a.c0 is not None
        ctx.set_materialize_grads(False)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None) -> tuple[Any, ...]:
        count = len(ctx.needs_input_grad) - 2
        variables, states = ctx.saved_tensors[:count], iter(ctx.saved_tensors[count:])
        a = _filled(ctx.layout, variables, ctx.rest)
        if torch.is_grad_enabled():  # For a second derivative.
            return None, None, *_differentiable_again(a, ctx.options, variables, (dy, dh_n, dc_n))
        memory = CELLS[ctx.options.cell].memory
        grads: Arguments | None = None
        for d in range(len(a.weight_hh)):
            one = _Direction(a, ctx.options, d, ctx.chunk)
            part = one.backward(
                [(next(states), next(states) if memory else None) for _ in one.chunks],
                None if dy is None else dy.unflatten(2, (len(a.weight_hh), -1))[:, :, d],
                None if dh_n is None else dh_n[d : d + 1],
                None if dc_n is None or not memory else dc_n[d : d + 1],
                need_dx=ctx.needs_input_grad[2],
            )
            grads = part if grads is None else _joined(grads, part)
        assert grads is not None
        return None, None, *ops.differentiable(grads)


def _filled(
    layout: tuple[list[int], bool, bool], variables: tuple[Tensor, ...], rest: tuple[Any, ...]
) -> Arguments:
    """Puts the variables back into the places that they had."""
    it = iter(variables)
    x = next(it)
    counts, *states = layout
    lists = [[next(it) for _ in range(count)] for count in counts]
    return Arguments._make([x, *lists, *(next(it) if there else None for there in states), *rest])


def _joined(a: Arguments, b: Arguments) -> Arguments:
    """Returns the gradients of two directions as those of both."""
    both = [x + y for x, y in zip(a.lists, b.lists, strict=True)]
    pairs = ((a.h0, b.h0), (a.c0, b.c0))
    h0, c0 = (None if x is None or y is None else torch.cat((x, y)) for x, y in pairs)
    return Arguments._make([a.x.add_(b.x), *both, h0, c0, *a[11:]])


def _differentiable_again(
    a: Arguments, options: Options, variables: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """Returns the gradients by the variables as functions that can be differentiated again."""
    y, _, h_n, c_n = ops.layer(a, options)
    pairs = [(out, d) for out, d in zip((y, h_n, c_n), grads, strict=True) if d is not None]
    wanted = [v for v in variables if v.requires_grad]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs], wanted, [d for _, d in pairs], create_graph=True, allow_unused=True
        )
    )
    return [next(found) if v.requires_grad else None for v in variables]


class _Direction:
    """One direction of a layer, as chunks of steps in the order in which it runs."""

    def __init__(self, a: Arguments, options: Options, d: int, chunk: int) -> None:
        self.d, self.reverse = d, options.reverse or d == 1
        self.options = Options(options.cell, options.activation, reverse=self.reverse)
        one = [tensors[d : d + 1] for tensors in a.lists]
        states = [None if state is None else state[d : d + 1] for state in (a.h0, a.c0)]
        self.a = Arguments._make([a.x, *one, *states, *a[11:]])
        steps = a.x.size(0)
        starts = range(0, steps, chunk)
        chunks = [(start, min(start + chunk, steps)) for start in starts]
        self.chunks = chunks[::-1] if self.reverse else chunks

    def first_states(self, y: Tensor, c_all: Tensor) -> list[Tensor]:
        """Returns the states in which the chunks begin: h, and c if the cell has it, of each."""
        a, found = self.a, []
        states = [(y, a.weight_hh[0].size(1), a.h0)]
        if CELLS[self.options.cell].memory:
            states.append((c_all, a.weight_hh[0].size(0) // CELLS[self.options.cell].gates, a.c0))
        for begin, end in self.chunks:
            # The step before the chunk, in the order of this direction.
            before = end if self.reverse else begin - 1
            for outputs, size, initial in states:
                zeros = a.x.new_zeros(1, a.x.size(1), size) if initial is None else initial
                if not 0 <= before < a.x.size(0):
                    found.append(zeros)
                    continue
                state = outputs[before : before + 1, :, self.d * size : (self.d + 1) * size]
                if not self.reverse or a.lengths is None:
                    found.append(state.clone())  # Past a row's end, whose state nobody reads, it is zero.
                else:  # A shorter row has not begun yet.
                    found.append(torch.where((a.lengths > before)[:, None], state, zeros))
        return found

    def keeps(self, end: int) -> Tensor | None:
        """Returns which rows [B, 1] carry a state from step ``end`` down to the chunk that ends there."""
        a = self.a
        if not self.reverse or a.resets is None or end == a.x.size(0):
            return None
        cut = a.resets[end]
        return ~(cut if a.lengths is None else cut & (a.lengths > end))[:, None]

    def backward(
        self,
        states: list[tuple[Tensor, Tensor | None]],
        dy: Tensor | None,
        dh: Tensor | None,
        dc: Tensor | None,
        *,
        need_dx: bool,
    ) -> Arguments:
        """Returns the gradients by this direction's arguments, chunk by chunk from the last to the first."""
        a, total = self.a, None
        dx = a.x.new_empty(a.x.shape if need_dx else 0)
        scalars = ops.scalars(self.options, a.x)
        for (begin, end), state in zip(self.chunks[::-1], states[::-1], strict=True):
            keeps = self.keeps(end)
            h0, c0 = (s if s is None or keeps is None else s * keeps for s in state)
            lengths = None if a.lengths is None else (a.lengths - begin).clamp(0, end - begin)
            resets = None if a.resets is None else a.resets[begin:end]
            part = a._replace(x=a.x[begin:end], h0=h0, c0=c0, lengths=lengths, resets=resets)
            y, _, _, _, tape = torch.ops.torchrnn.layer(*part, *scalars, False)
            here = None if dy is None else dy[begin:end]
            dpart, dh, dc, dweights = torch.ops.torchrnn.layer_backward(
                here, None, dh, dc, *part, *scalars, y, tape, need_dx, True, True
            )
            if need_dx:
                dx[begin:end] = dpart
            if keeps is not None:
                dh, dc = dh * keeps, dc * keeps if c0 is not None else dc
            dc = None if c0 is None else dc
            if total is None:
                total = dweights
            else:
                torch._foreach_add_(total, dweights)
        assert total is not None
        it = iter(total)
        lists = [[next(it) for _ in tensors] for tensors in a.lists]
        return Arguments._make(
            [dx, *lists, None if a.h0 is None else dh, None if a.c0 is None else dc, *a[11:]]
        )
