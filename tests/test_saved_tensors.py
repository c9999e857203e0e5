"""What is kept for backward, under all that stands between: checkpoints, hooks, offloading, policies."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import leaves, one_thread
from every_cell import CELLS as EVERY_CELL
from torch import Tensor, nn
from torch.autograd import graph
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import torchrnn
from torchrnn import recompute
from torchrnn.dropout import dropout

Call = Callable[..., Any]
SEED = 3


@pytest.fixture(autouse=True)
def _short_chunks_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(recompute, "CHUNK_ROWS", 7)
    with one_thread():
        yield


# What is called: each takes x [T, B, 3] and returns tensors.


class Dropped(nn.Module):
    """The op itself, whose seed a checkpoint must give again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x * self.weight, 0.5)


class Unrolled(nn.Module):
    """A cell of TensorFlow."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.cell = EVERY_CELL[name](4)
        self.cell.build(torch.Size([2, 3]))

    def forward(self, x: Tensor) -> Any:
        return torchrnn.dynamic_rnn(self.cell, x, [5, 2], dtype=x.dtype, time_major=True)


class Ragged(nn.Module):
    """A layer with lengths and resets."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.lengths, self.resets = torch.tensor([5, 2]), torch.rand(5, 2) < 0.3

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, lengths=self.lengths, resets=self.resets)


def layer(name: str, again: bool) -> nn.Module:
    return getattr(torchrnn, name)(3, 4, 2, bidirectional=True, recompute=again)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: functools.partial(layer, name, False) for name in ("LSTM", "GRU", "RNN")},
    **{f"{name} again": functools.partial(layer, name, True) for name in ("LSTM", "GRU", "RNN")},
    "ragged": lambda: Ragged(layer("LSTM", False)),
    "ragged again": lambda: Ragged(layer("GRU", True)),
    "sru": lambda: Unrolled("sru"),
    "indy lstm": lambda: Unrolled("indy lstm"),
    "layer norm": lambda: Unrolled("layer norm"),
    "dropout": Dropped,
}


# Ways to keep tensors: each makes a call of one.


class Once:
    """Gives what it holds once, as do tensors that are freed when they are read."""

    def __init__(self, tensor: Tensor) -> None:
        self.held: Tensor | None = tensor.detach().clone()

    def take(self) -> Tensor:
        assert self.held is not None, "unpacked twice"
        held, self.held = self.held, None
        return held


def under(make: Callable[[], contextlib.AbstractContextManager[Any]]) -> Callable[[Call], Call]:
    def way(call: Call) -> Call:
        def run(*args: Any) -> Any:
            with make():
                return call(*args)

        return run

    return way


def checkpointed(**kwargs: Any) -> Callable[[Call], Call]:
    def way(call: Call) -> Call:
        # Flat, since a reentrant checkpoint gives no gradients to what is nested.
        return functools.partial(checkpoint, lambda *args: tuple(leaves(call(*args))), **kwargs)

    return way


def by_policy(policy: CheckpointPolicy) -> Callable[[Call], Call]:
    def decide(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return policy if op.namespace == "torchrnn" else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, decide)
    return checkpointed(use_reentrant=False, context_fn=contexts)


def packed_to_bytes(tensor: Tensor) -> tuple[bytes, Any]:
    """As what is written to a disk."""
    flat = tensor.detach().contiguous().view(-1)
    return bytes(flat.view(torch.uint8).tolist()), (tensor.dtype, tensor.shape)


def unpacked_from_bytes(packed: tuple[bytes, Any]) -> Tensor:
    data, (dtype, shape) = packed
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


WAYS: dict[str, Callable[[Call], Call]] = {
    "checkpoint": checkpointed(use_reentrant=False),
    "checkpoint in checkpoint": lambda call: checkpointed(use_reentrant=False)(
        checkpointed(use_reentrant=False)(call)
    ),
    "reentrant": checkpointed(use_reentrant=True),
    "without early stop": checkpointed(use_reentrant=False, early_stop=False),
    "must save": by_policy(CheckpointPolicy.MUST_SAVE),
    "must recompute": by_policy(CheckpointPolicy.MUST_RECOMPUTE),
    "prefer save": by_policy(CheckpointPolicy.PREFER_SAVE),
    "once": under(lambda: graph.saved_tensors_hooks(Once, Once.take)),
    "on cpu": under(graph.save_on_cpu),
    "bytes": under(lambda: graph.saved_tensors_hooks(packed_to_bytes, unpacked_from_bytes)),
    "once in once": under(
        lambda: _both(graph.saved_tensors_hooks(Once, Once.take), graph.saved_tensors_hooks(Once, Once.take))
    ),
}
ONCE = ("reentrant", "must save", "prefer save", "once", "once in once")
"""Ways by which a graph can be gone through once only, as torch says or as they are made."""


@contextlib.contextmanager
def _both(*contexts: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def run(call: Call, x: Tensor) -> Tensor:
    """Calls with the same masks at each time; returns a number that depends on all results."""
    torch.manual_seed(SEED)
    outputs = [leaf for leaf in leaves(call(x)) if leaf.requires_grad]
    return sum((out.square() * torch.linspace(-1, 2, out.numel()).view_as(out)).sum() for out in outputs)


def gradients(result: Tensor, wanted: list[Tensor], **kwargs: Any) -> list[Tensor | None]:
    # A cell with layer normalisation has a bias that it does not use.
    return list(torch.autograd.grad(result, wanted, allow_unused=True, **kwargs))


def subject(model: str) -> tuple[nn.Module, Tensor, list[Tensor]]:
    """Returns a module, its input, and what gradients are wanted by."""
    module = MODELS[model]()
    x = torch.randn(5, 2, 3, requires_grad=True)
    return module, x, [x, *module.parameters()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_of_the_plain_call(model: str, way: str) -> None:
    module, x, wanted = subject(model)
    expected = gradients(run(module, x), wanted)
    run(WAYS[way](module), x).backward()  # autograd.grad is not for the reentrant way.
    torch.testing.assert_close([w.grad for w in wanted], expected)


@pytest.mark.parametrize("model", MODELS)
def test_weights_may_be_written_to_where_mutation_is_allowed(model: str) -> None:
    module, x, wanted = subject(model)
    expected = gradients(run(module, x), wanted)
    with graph.allow_mutation_on_saved_tensors():
        result = run(module, x)
        with torch.no_grad():
            for w in wanted:
                w.mul_(2)
        torch.testing.assert_close(gradients(result, wanted), expected)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ONCE])
@pytest.mark.parametrize("model", MODELS)
def test_a_graph_that_is_retained(model: str, way: str) -> None:
    module, x, wanted = subject(model)
    result = run(WAYS[way](module), x)
    first = gradients(result, wanted, retain_graph=True)
    torch.testing.assert_close(gradients(result, wanted), first)
    torch.testing.assert_close(first, gradients(run(module, x), wanted))


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ONCE])
@pytest.mark.parametrize("model", MODELS)
def test_second_derivatives(model: str, way: str) -> None:
    module = MODELS[model]().double()
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    wanted = [x, *module.parameters()]

    def second(call: Call) -> list[Tensor | None]:
        first = gradients(run(call, x), wanted, create_graph=True)
        return gradients(sum(g.square().sum() for g in first if g is not None), wanted)

    torch.testing.assert_close(second(WAYS[way](module)), second(module))


@pytest.mark.parametrize("model", MODELS)
def test_a_graph_that_was_freed_is_refused(model: str) -> None:
    module = MODELS[model]()
    result = run(module, torch.randn(5, 2, 3, requires_grad=True))
    result.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        result.backward()


@pytest.mark.parametrize("model", MODELS)
def test_hooks_that_are_disabled_are_not_needed(model: str) -> None:
    module = MODELS[model]()
    x = torch.randn(5, 2, 3, requires_grad=True)
    with graph.disable_saved_tensors_hooks("none here"):
        run(module, x).backward()
    assert x.grad is not None


@pytest.mark.parametrize("model", MODELS)
def test_backward_reads_only_what_hooks_give_it(model: str) -> None:
    module, x, wanted = subject(model)
    expected = gradients(run(module, x), wanted)
    with graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        result = run(module, x)
    for w in wanted:
        w.data.fill_(torch.nan)
    torch.testing.assert_close(gradients(result, wanted), expected)
