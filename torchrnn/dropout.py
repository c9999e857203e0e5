"""Dropout as one op: it draws its random numbers and multiplies by them in one pass.

``torch.dropout`` draws numbers one after the other on one thread, and keeps a mask for the backward pass.
Here a number is a function of its place and of a seed, by a counter-based generator: all threads draw at the
same time, and the backward pass draws the same numbers again. The op is linear in x, so it is its own
gradient, to any order.

Like ``ops.py`` this file holds schema, argument errors, fake kernel, gradient and the fallback.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchrnn._native import DTYPES
from torchrnn.differentiable import check_plain, has_tangent, loop_over_batch

_LIBRARY = torch.library.Library("torchrnn", "FRAGMENT")
_LIBRARY.define("dropout(Tensor x, Tensor seed, float keep) -> Tensor")


def dropout(x: Tensor, keep: float, generator: torch.Generator | None = None) -> Tensor:
    """Keeps each number with a probability, divided by it, and makes the others zero.

    The random numbers are those of Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405), whose
    key is one number that torch's generator gives: ``torch.manual_seed`` makes them repeatable, on every
    device and with or without the kernels.

    Args:
        x: A floating tensor of any shape.
        keep: The probability, 2^-32 <= keep <= 1, to 32 bits.
        generator: What draws the key; None for torch's default generator of x's device.

    Returns:
        A tensor like x, contiguous.

    Raises:
        ValueError: If the dtype is not one of the four that torchrnn computes with, or the probability does
            not hold.
    """
    _check(x, keep)
    device = x.device if generator is None else generator.device
    bounds = torch.iinfo(torch.int64)
    seed = torch.randint(bounds.min, bounds.max, (), generator=generator, device=device).to(x.device)
    result: Tensor = torch.ops.torchrnn.dropout(x, seed, keep)
    return result


def _check(x: Tensor, keep: float) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"dropout: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if not 2**-32 <= keep <= 1:
        raise ValueError(f"dropout: keep must be in 2^-32..1, got {keep}")


# Reference ------------------------------------------------------------------------------------------------

_LOW = 0xFFFFFFFF
_COUNTERS = 8


def _random(count: int, seed: Tensor) -> Tensor:
    """Returns [count] random numbers of 32 bits.

    They go in groups of 32. Group g is made of the counters 8g to 8g + 7, each of which gives four words:
    first come words 0 and 1 of each counter, then words 2 and 3 of each.
    """
    counter = torch.arange(_COUNTERS * -(-count // (4 * _COUNTERS)), device=seed.device)
    zero = torch.zeros_like(counter)
    c0, c1, c2, c3 = counter & _LOW, counter >> 32, zero, zero
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # The products of 32-bit numbers wrap as signed ones; the masks make their halves unsigned again.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((product1 >> 32) & _LOW) ^ c1 ^ key0, product1 & _LOW
        c2, c3 = ((product0 >> 32) & _LOW) ^ c3 ^ key1, product0 & _LOW
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    halves = [torch.stack(pair, -1).view(-1, 2 * _COUNTERS) for pair in ((c0, c1), (c2, c3))]
    return torch.cat(halves, -1).view(-1)[:count]


def _reference(x: Tensor, seed: Tensor, keep: float) -> Tensor:
    """Computes the op in plain torch, with differentiable operators only."""
    kept = _random(x.numel(), seed) >= math.ceil((1 - keep) * 2**32)
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = kept.view(x.shape).to(wide) / keep
    return (x.to(wide) * factor).to(x.dtype).contiguous()


# Fallback, fake kernel and gradient -----------------------------------------------------------------------


def _check_call(x: Tensor, seed: Tensor, keep: float) -> None:
    """Raises for a direct call that does not hold; the kernels have checks of their own."""
    for name, tensor in (("x", x), ("seed", seed)):
        check_plain("dropout", name, tensor, x)
    _check(x, keep)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"dropout: seed must be one int64, got {seed.dtype} {list(seed.shape)}")


def _fallback(x: Tensor, seed: Tensor, keep: float) -> Tensor:
    _check_call(x, seed, keep)
    return _reference(x, seed, keep)


def _fake(x: Tensor, seed: Tensor, keep: float) -> Tensor:
    _check_call(x, seed, keep)
    return x.new_empty(x.shape)


class _Gradient(torch.autograd.Function):
    """The gradient of ``dropout``: a call of the same op."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, x: Tensor, seed: Tensor, keep: float) -> Any:
        ctx.save_for_backward(seed)
        ctx.keep = keep
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.torchrnn.dropout.default.redispatch(keyset, x, seed, keep)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (seed,) = ctx.saved_tensors
        return None, torch.ops.torchrnn.dropout(dy, seed, ctx.keep), None, None


def _autograd(keyset: Any, x: Tensor | None, seed: Tensor, keep: float) -> Any:
    if x is not None and has_tangent(x):
        _check_call(x, seed, keep)
        return _reference(x, seed, keep)
    below = keyset & torch._C._after_autograd_keyset
    if x is not None and x.requires_grad and torch.is_grad_enabled():
        apply = _Gradient.apply  # torch leaves it without annotations.
        return apply(below, x, seed, keep)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.torchrnn.dropout.default.redispatch(below, x, seed, keep)


_LIBRARY.impl("dropout", _fallback, "CompositeExplicitAutograd")
torch.library.register_fake("torchrnn::dropout", _fake, lib=_LIBRARY)
_LIBRARY.impl("dropout", _autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("dropout", _fallback, "FuncTorchDynamicLayerFrontMode")
_LIBRARY.impl("dropout", loop_over_batch(torch.ops.torchrnn.dropout.default), "Batched")
