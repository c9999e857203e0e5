"""Training with little memory: a layer that keeps its inputs and a few states, and computes the rest again.

The gates of every step, which backward needs, take five times the memory of an LSTM's output. Here they are
made anew, some steps at a time, from the states at which these steps begin (Chen et al. 2016,
arXiv:1604.06174).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchrnn import ops
from torchrnn.differentiable import transformed
from torchrnn.options import CELLS, Options
from torchrnn.reference import Arguments

CHUNK_ROWS = 1024
"""Rows (T*B) computed again at a time: enough for large products, and little beside a long sequence."""


def layer(
    a: Arguments, options: Options, *, state_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Does what ``ops.layer`` does; gradients cost one more forward pass and a fraction of the memory.

    A second derivative keeps everything, as ``ops.layer`` does; so does a call under a transform, tracer or
    compiler.
    """
    if (
        not torch.is_grad_enabled()
        or transformed()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
    ):
        return ops.layer(a, options, state_dtype=state_dtype)
    a = ops.checked(a, options, state_dtype)
    # Of the variations only peepholes and activations are known below.
    varied = a.norm_gain or a[13:] != (None,) * 4 or (options.cell_clip, options.proj_clip) != (None, None)
    variables = a.differentiable
    if varied or not any(variable.requires_grad for variable in variables):
        return ops.layer(a, options)
    apply = _Recomputed.apply  # torch leaves it without annotations.
    y, h_n, c_n = apply(a, options, *variables)  # type: ignore[no-untyped-call]
    return y, None, h_n, c_n


class _Recomputed(torch.autograd.Function):
    """``variables`` are the tensors in ``a`` that have a gradient."""

    @staticmethod
    def forward(
        ctx: Any, a: Arguments, options: Options, *variables: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, c_all, h_n, c_n = ops.LAYER(*ops.flat(a, options, CELLS[options.cell].memory))
        chunk = max(1, -(-CHUNK_ROWS // max(1, a.x.size(1))))
        directions = [_Direction(a, options, d, chunk) for d in range(len(a.weight_hh))]
        states = [state for one in directions for state in one.first_states(y, c_all)]
        ctx.options, ctx.chunk = options, chunk
        # Every tensor is saved, none kept aside: autograd notices then that one was written to meanwhile.
        sequences = [tensor for tensor in (a.lengths, a.resets) if tensor is not None]
        ctx.save_for_backward(*variables, *sequences, *states)
        ctx.layout = [len(tensors) for tensors in a.lists], a.h0 is not None, a.c0 is not None
        ctx.sequences = a.lengths is not None, a.resets is not None
        ctx.set_materialize_grads(False)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None) -> tuple[Any, ...]:
        # Unpacked once: what stands behind a saved tensor may give it only once.
        saved, count = ctx.saved_tensors, len(ctx.needs_input_grad) - 2
        variables, rest = saved[:count], iter(saved[count:])
        lengths, resets = (next(rest) if there else None for there in ctx.sequences)
        a = _filled(ctx.layout, variables, lengths, resets)
        if torch.is_grad_enabled():  # For a second derivative.
            return None, None, *_differentiable_again(a, ctx.options, variables, (dy, dh_n, dc_n))
        memory, outputs = CELLS[ctx.options.cell].memory, a.weight_hh[0].size(1)
        grads: Arguments | None = None
        for d in range(len(a.weight_hh)):
            one = _Direction(a, ctx.options, d, ctx.chunk)
            part = one.backward(
                [(next(rest), next(rest) if memory else None) for _ in one.chunks],
                # Not by brackets, which the vmap of batched backward passes does not know for a whole axis.
                None if dy is None else dy.narrow(2, d * outputs, outputs),
                None if dh_n is None else dh_n.narrow(0, d, 1),
                None if dc_n is None or not memory else dc_n.narrow(0, d, 1),
                need_x=ctx.needs_input_grad[2],
            )
            grads = part if grads is None else _joined(grads, part)
        assert grads is not None
        wanted = zip(grads.differentiable, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(grad if need else None for grad, need in wanted)


def _filled(
    layout: tuple[list[int], bool, bool],
    variables: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
) -> Arguments:
    """Puts the variables back into the places that they had."""
    it = iter(variables)
    x = next(it)
    counts, *states = layout
    lists = [[next(it) for _ in range(count)] for count in counts]
    h0, c0 = (next(it) if there else None for there in states)
    return Arguments._make([x, *lists, h0, c0, lengths, resets, *[None] * 4])


def _joined(a: Arguments, b: Arguments) -> Arguments:
    """Returns the gradients of two directions as those of both."""
    both = [x + y for x, y in zip(a.lists, b.lists, strict=True)]
    pairs = ((a.h0, b.h0), (a.c0, b.c0))
    h0, c0 = (None if x is None or y is None else torch.cat((x, y)) for x, y in pairs)
    return Arguments._make([a.x + b.x, *both, h0, c0, *a[11:]])


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
        need_x: bool,
    ) -> Arguments:
        """Returns the gradients by this direction's arguments, chunk by chunk from the last to the first."""
        a = self.a
        dx: list[Tensor] = []
        total: list[Tensor] = []
        for (begin, end), state in zip(self.chunks[::-1], states[::-1], strict=True):
            keeps = self.keeps(end)
            h0, c0 = (_where(keeps, s) for s in state)
            lengths = None if a.lengths is None else (a.lengths - begin).clamp(0, end - begin)
            resets = None if a.resets is None else a.resets[begin:end]
            part = a._replace(x=a.x[begin:end], h0=h0, c0=c0, lengths=lengths, resets=resets)
            flat = ops.flat(part, self.options)
            y, *_, tape = ops.LAYER.train_op(*flat)
            here = None if dy is None else dy.narrow(0, begin, end - begin)
            dpart, dweights, dh, dc = ops.LAYER.backward_op(
                here, None, dh, dc, *flat, y, tape, need_x, True, True, c0 is not None
            )
            dx.append(dpart)
            dh, dc = _where(keeps, dh), None if c0 is None else _where(keeps, dc)
            total = [t.add_(d) for t, d in zip(total, dweights, strict=True)] if total else dweights
        x = torch.cat(dx if self.reverse else dx[::-1]) if need_x else a.x.new_empty(0)
        it = iter(total)  # One direction, so the weights are in the order of the lists.
        lists = [[next(it) for _ in tensors] for tensors in a.lists]
        return Arguments._make(
            [x, *lists, None if a.h0 is None else dh, None if a.c0 is None else dc, *a[11:]]
        )


def _where(keeps: Tensor | None, state: Tensor | None) -> Tensor | None:
    """Returns a state with zeros where it is not kept: a product would carry over what is not finite."""
    return state if keeps is None or state is None else torch.where(keeps, state, 0)
