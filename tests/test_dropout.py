"""The dropout op: its random numbers, kernels against plain PyTorch, gradients, transforms, errors."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.testing import assert_close

from torchrnn import _native
from torchrnn._native import DTYPES
from torchrnn.dropout import _random, _reference, dropout

SIZES = (0, 1, 7, 31, 32, 33, 63, 64, 65, 130, 1000, 70001)
OP = torch.ops.torchrnn.dropout


def seed_of(number: int) -> torch.Tensor:
    return torch.tensor(number)


def test_random_numbers_are_those_of_philox() -> None:
    # The known answers of Random123's own tests for counter 0 and 1, key 0: words 0 and 1, then 2 and 3.
    numbers = _random(32, seed_of(0)).tolist()
    assert numbers[:2] == [0x6627E8D5, 0xE169C58D]
    assert numbers[16:18] == [0xBC57AC4C, 0x9B00DBD8]


def test_key_is_the_whole_seed() -> None:
    # Both halves and the sign: each is another key.
    keys = (0, 1, 1 << 32, -1, -(1 << 32), (1 << 63) - 1)
    assert len({tuple(_random(8, seed_of(key)).tolist()) for key in keys}) == len(keys)


@pytest.mark.parametrize("isa", _native.isas() or [None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_op_is_the_reference(isa: str | None, dtype: torch.dtype) -> None:
    with contextlib.nullcontext() if isa is None else _native.use_isa(isa):
        for size in SIZES:
            x = torch.randn(size).to(dtype)
            for keep in (0.8, 2**-32, 1.0):
                seed = torch.randint(-(2**63), 2**63 - 1, ())
                y = OP(x, seed, keep)
                assert y.dtype == dtype and y.is_contiguous()
                # Of the product and the quotient, one may be rounded before the other.
                assert_close(y, _reference(x, seed, keep), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_strided_input_and_nan() -> None:
    x = torch.randn(6, 5, 4)[::2].transpose(0, 2)
    x[1, 2, 0] = torch.nan
    y = OP(x, seed_of(3), 0.5)
    assert_close(y, _reference(x, seed_of(3), 0.5), equal_nan=True)
    assert y[1, 2, 0].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number_for_all(dtype: torch.dtype) -> None:
    x = torch.tensor(1.5, dtype=dtype)
    for shape in ((), (1, 1), (0, 3), (130, 7)):
        y = OP(x.expand(shape), seed_of(4), 0.4)
        assert torch.equal(y, OP(x.expand(shape).contiguous(), seed_of(4), 0.4)) and y.is_contiguous()


def test_threads_draw_the_same_numbers() -> None:
    before, x = torch.get_num_threads(), torch.randn(1 << 17)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(OP(x, seed_of(5), 0.3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8, 0.999])
def test_share_that_is_kept(keep: float) -> None:
    count = 1 << 20
    kept = dropout(torch.ones(count), keep, torch.Generator().manual_seed(1)) > 0
    deviation = (keep * (1 - keep) / count) ** 0.5
    assert abs(kept.double().mean().item() - keep) < 5 * deviation
    # Neighbours, and numbers one group apart, know nothing of each other.
    for lag in (1, 2, 16, 32, 64):
        both = (kept[:-lag] & kept[lag:]).double().mean().item()
        assert abs(both - keep**2) < 10 * deviation


def test_generators() -> None:
    x = torch.ones(100)
    torch.manual_seed(0)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(first, dropout(x, 0.5)) and not torch.equal(first, second)
    own = [dropout(x, 0.5, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*own)


def test_gradients() -> None:
    x = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    seed = seed_of(9)
    assert torch.autograd.gradcheck(lambda x: OP(x, seed, 0.7), x)
    assert torch.autograd.gradgradcheck(lambda x: OP(x, seed, 0.7).sin(), x)
    y = OP(x, seed, 0.7)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert_close(y.detach(), x.detach() * dx)  # What is dropped has no gradient.


def test_op_is_registered_well() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    torch.library.opcheck(OP.default, (x, seed_of(1), 0.5))
    torch.library.opcheck(OP.default, (x.detach().bfloat16().t(), seed_of(1), 0.5))


def test_transforms() -> None:
    x = torch.randn(4, 50)
    different = torch.func.vmap(lambda row: dropout(row, 0.5), randomness="different")(torch.ones(4, 50))
    assert len({tuple(row.tolist()) for row in different}) == 4
    same = torch.func.vmap(lambda row: dropout(row, 0.5), randomness="same")(torch.ones(4, 50))
    assert all(torch.equal(row, same[0]) for row in same)
    _, tangent = torch.func.jvp(lambda x: dropout(x, 0.5), (x,), (torch.ones_like(x),))
    assert set(tangent.unique().tolist()) == {0.0, 2.0}


def test_compile() -> None:
    @torch.compile(fullgraph=True, dynamic=True)
    def step(x: torch.Tensor) -> torch.Tensor:
        return dropout(x, 0.5) * 2

    for size in (3, 40):
        x = torch.ones(size, requires_grad=True)
        y = step(x)
        y.sum().backward()
        assert x.grad is not None and torch.equal(x.grad, y)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"dropout: x must be float32, .*, got torch.int64"):
        dropout(torch.ones(3, dtype=torch.int64), 0.5)
    for keep in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"dropout: keep must be in 2\^-32\.\.1, got"):
            dropout(torch.ones(3), keep)
