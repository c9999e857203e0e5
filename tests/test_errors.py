"""Where torch.nn refuses a mistake, ours refuses it with the same type and text."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import torchrnn

LAYERS = ["LSTM", "GRU", "RNN"]
CELLS = ["LSTMCell", "GRUCell", "RNNCell"]
Call = Callable[[Callable[..., Any], Callable[..., Any]], Any]


def zeros(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(shape, **kwargs)


def packed(inputs: int = 3) -> PackedSequence:
    return pack_padded_sequence(zeros(3, 2, inputs), torch.tensor([2, 3]), enforce_sorted=False)


def error_of(library: ModuleType, name: str, call: Call) -> BaseException:
    def state(*shape: int, **kwargs: Any) -> Any:
        return (zeros(*shape, **kwargs),) * 2 if name.startswith("LSTM") else zeros(*shape, **kwargs)

    with pytest.raises(Exception) as caught:
        call(getattr(library, name), state)
    return caught.value


def assert_same_error(name: str, call: Call, text: bool = True) -> None:
    ours, theirs = error_of(torchrnn, name, call), error_of(nn, name, call)
    assert type(ours) is type(theirs), f"ours {ours!r}, theirs {theirs!r}"
    if text:
        assert str(ours) == str(theirs)


CONSTRUCTORS: dict[str, Call] = {
    "no sizes": lambda layer, _: layer(),
    "no hidden size": lambda layer, _: layer(3),
    "float hidden size": lambda layer, _: layer(3, 4.0),
    "string input size": lambda layer, _: layer("3", 4),
    "zero input size": lambda layer, _: layer(0, 4),
    "negative hidden size": lambda layer, _: layer(3, -4),
    "no layers": lambda layer, _: layer(3, 4, 0),
    "half a layer": lambda layer, _: layer(3, 4, 1.5),
    "bias": lambda layer, _: layer(3, 4, bias=1),
    "batch_first": lambda layer, _: layer(3, 4, batch_first=None),
    "dropout above 1": lambda layer, _: layer(3, 4, dropout=1.5),
    "dropout bool": lambda layer, _: layer(3, 4, dropout=True),
    "dropout string": lambda layer, _: layer(3, 4, dropout="a"),
    "dropout of one layer": lambda layer, _: layer(3, 4, dropout=0.5),  # A warning, hence an error here.
    "projection too large": lambda layer, _: layer(3, 4, proj_size=4),
    "negative projection": lambda layer, _: layer(3, 4, proj_size=-1),
    "unknown keyword": lambda layer, _: layer(3, 4, foo=1),
    "mode twice": lambda layer, _: layer(3, 4, mode="GRU"),
    "too many": lambda layer, _: layer(3, 4, *range(20)),
    "nonlinearity": lambda layer, _: layer(3, 4, nonlinearity="foo"),
    "integers": lambda layer, _: layer(3, 4, dtype=torch.int64),
}

CALLS: dict[str, Call] = {
    "input is a string": lambda layer, _: layer(3, 4)("x"),
    "input is None": lambda layer, _: layer(3, 4)(None),
    "input is a list": lambda layer, _: layer(3, 4)([1.0]),
    "input is 1-D": lambda layer, _: layer(3, 4)(zeros(3)),
    "input is 4-D": lambda layer, _: layer(3, 4)(zeros(1, 3, 2, 3)),
    "input size": lambda layer, _: layer(3, 4)(zeros(3, 2, 5)),
    "input size, unbatched": lambda layer, _: layer(3, 4)(zeros(3, 5)),
    "input size, with a state": lambda layer, state: layer(3, 4)(zeros(3, 2, 5), state(1, 2, 4)),
    "input dtype": lambda layer, _: layer(3, 4)(zeros(3, 2, 3, dtype=torch.float64)),
    "input of integers": lambda layer, _: layer(3, 4)(zeros(3, 2, 3, dtype=torch.int64)),
    "input device": lambda layer, _: layer(3, 4)(zeros(3, 2, 3, device="meta")),
    "no steps": lambda layer, _: layer(3, 4)(zeros(0, 2, 3)),
    "no steps, with a state": lambda layer, state: layer(3, 4)(zeros(0, 2, 3), state(1, 2, 4)),
    "no steps, batch first": lambda layer, _: layer(3, 4, batch_first=True)(zeros(2, 0, 3)),
    "no steps, unbatched": lambda layer, _: layer(3, 4)(zeros(0, 3)),
    "no steps and no rows": lambda layer, _: layer(3, 4)(zeros(0, 0, 3)),
    "state of rank 2": lambda layer, state: layer(3, 4)(zeros(3, 2, 3), state(1, 4)),
    "state of rank 3, unbatched": lambda layer, state: layer(3, 4)(zeros(3, 3), state(1, 1, 4)),
    "state rows": lambda layer, state: layer(3, 4)(zeros(3, 2, 3), state(1, 3, 4)),
    "state rows, batch first": lambda layer, state: layer(3, 4, batch_first=True)(
        zeros(3, 2, 3), state(1, 2, 4)
    ),
    "state layers": lambda layer, state: layer(3, 4, 2, bidirectional=True)(zeros(3, 2, 3), state(2, 2, 4)),
    "state size": lambda layer, state: layer(3, 4)(zeros(3, 2, 3), state(1, 2, 5)),
    "state size, unbatched": lambda layer, state: layer(3, 4)(zeros(3, 3), state(1, 5)),
    "state device": lambda layer, state: layer(3, 4)(zeros(3, 2, 3), state(1, 2, 4, device="meta")),
    "state tuple of one": lambda layer, _: layer(3, 4)(zeros(3, 2, 3), (zeros(1, 2, 4),)),
    "state tuple of three": lambda layer, _: layer(3, 4)(zeros(3, 2, 3), (zeros(1, 2, 4),) * 3),
    "state is a string": lambda layer, _: layer(3, 4)(zeros(3, 2, 3), "ab"),
    "dropout later than the constructor": lambda layer, _: with_dropout(layer(3, 4, 2), 1.5)(zeros(3, 2, 3)),
    "negative dropout later": lambda layer, _: with_dropout(layer(3, 4, 2), -1)(zeros(3, 2, 3)),
    "weight device": lambda layer, _: with_weight(layer(3, 4), zeros(0, device="meta"))(zeros(3, 2, 3)),
    "batch_sizes empty": lambda layer, _: layer(3, 4)(hand_made(zeros(0, 3))),
    "packed with too few states": lambda layer, state: layer(3, 4)(packed(), state(1, 1, 4)),
}

# Refused by Python with the name of the method, or by torch.nn from deep inside, in words about its own
# products and copies, where ours says what is wrong.
TYPES_ONLY: dict[str, Call] = {
    "no input": lambda layer, _: layer(3, 4)(),
    "too many arguments": lambda layer, state: layer(3, 4)(zeros(3, 2, 3), state(1, 2, 4), None, None),
    "unknown keyword": lambda layer, _: layer(3, 4)(zeros(3, 2, 3), foo=1),
    "state dtype": lambda layer, state: layer(3, 4)(zeros(3, 2, 3), state(1, 2, 4, dtype=torch.float64)),
    "weight dtype": lambda layer, _: with_weight(layer(3, 4), zeros(1, 4, dtype=torch.float64))(
        zeros(3, 2, 3)
    ),
    "packed input size": lambda layer, _: layer(3, 4)(packed(5)),
    "packed data of rank 3": lambda layer, _: layer(3, 4)(
        PackedSequence(zeros(3, 2, 3), torch.tensor([2, 1]))
    ),
    "packed state size": lambda layer, state: layer(3, 4)(packed(), state(1, 2, 5)),
    "packed state layers": lambda layer, state: layer(3, 4)(packed(), state(2, 2, 4)),
    "packed state dtype": lambda layer, state: layer(3, 4)(packed(), state(1, 2, 4, dtype=torch.float64)),
    "batch_sizes rise": lambda layer, _: layer(3, 4)(hand_made(zeros(3, 3), 1, 2)),
    "batch_sizes add up to more": lambda layer, _: layer(3, 4)(
        PackedSequence(zeros(3, 3), torch.tensor([2, 2]))
    ),
}


def hand_made(data: Tensor, *batch_sizes: int) -> PackedSequence:
    return PackedSequence(data, torch.tensor(batch_sizes, dtype=torch.int64))


def with_dropout(layer: Any, p: float) -> Any:
    layer.dropout = p
    return layer


def with_weight(layer: Any, like: Tensor) -> Any:
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.to(dtype=like.dtype, device=like.device))
    return layer


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mistake", CONSTRUCTORS)
def test_constructor_refuses_what_torch_refuses(name: str, mistake: str) -> None:
    assert_same_error(name, CONSTRUCTORS[mistake])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mistake", CALLS)
def test_forward_refuses_what_torch_refuses(name: str, mistake: str) -> None:
    assert_same_error(name, CALLS[mistake])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mistake", TYPES_ONLY)
def test_forward_refuses_with_the_type_of_torch(name: str, mistake: str) -> None:
    assert_same_error(name, TYPES_ONLY[mistake], text=False)


def test_lstm_refuses_one_tensor_as_state() -> None:
    assert_same_error("LSTM", lambda layer, _: layer(3, 4)(zeros(3, 2, 3), zeros(1, 2, 4)))
    assert_same_error("LSTM", lambda layer, _: layer(3, 4, 2)(zeros(3, 2, 3), zeros(2, 2, 4)))
    assert_same_error("LSTM", lambda layer, _: layer(3, 4)(zeros(3, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 5))))
    assert_same_error("LSTM", lambda layer, _: layer(3, 4)(zeros(3, 2, 3), (zeros(1, 2, 4), zeros(1, 4))))


def test_state_dtype_has_the_text_of_aten() -> None:
    found = "found input tensor with Float and hidden tensor with Double"
    with pytest.raises(RuntimeError, match=f"^Input and hidden tensors are not the same dtype, {found}$"):
        torchrnn.GRU(3, 4)(zeros(3, 2, 3), zeros(1, 2, 4, dtype=torch.float64))


CELL_MISTAKES: dict[str, Call] = {
    "no sizes": lambda cell, _: cell(),
    "unknown keyword": lambda cell, _: cell(3, 4, foo=1),
    "float hidden size": lambda cell, _: cell(3, 4.0),
    "negative hidden size": lambda cell, _: cell(3, -1),
    "too many": lambda cell, _: cell(3, 4, *range(20)),
    "input is a string": lambda cell, _: cell(3, 4)("x"),
    "input is 0-D": lambda cell, _: cell(3, 4)(zeros()),
    "input is 3-D": lambda cell, _: cell(3, 4)(zeros(2, 2, 3)),
    "input size": lambda cell, _: cell(3, 4)(zeros(2, 5)),
    "input size, unbatched": lambda cell, _: cell(3, 4)(zeros(5)),
    "input dtype": lambda cell, _: cell(3, 4)(zeros(2, 3, dtype=torch.float64)),
    "input of integers": lambda cell, _: cell(3, 4)(zeros(2, 3, dtype=torch.int64)),
    "state of rank 3": lambda cell, state: cell(3, 4)(zeros(2, 3), state(1, 2, 4)),
    "state rows": lambda cell, state: cell(3, 4)(zeros(2, 3), state(3, 4)),
    "one state row": lambda cell, state: cell(3, 4)(zeros(2, 3), state(1, 4)),
    "state size": lambda cell, state: cell(3, 4)(zeros(2, 3), state(2, 5)),
    "state of rank 2, unbatched": lambda cell, state: cell(3, 4)(zeros(3), state(1, 4)),
    "state of rank 1": lambda cell, state: cell(3, 4)(zeros(2, 3), state(4)),
    "state of rank 1, as many rows": lambda cell, state: cell(3, 4)(zeros(4, 3), state(4)),
    "state dtype": lambda cell, state: cell(3, 4)(zeros(2, 3), state(2, 4, dtype=torch.float64)),
    "state and input dtype": lambda cell, state: cell(3, 4)(
        zeros(2, 3, dtype=torch.float64), state(2, 4, dtype=torch.float64)
    ),
    "state tuple of one": lambda cell, _: cell(3, 4)(zeros(2, 3), (zeros(2, 4),)),
    "state tuple of three": lambda cell, _: cell(3, 4)(zeros(2, 3), (zeros(2, 4),) * 3),
    "second state size": lambda cell, _: cell(3, 4)(zeros(2, 3), (zeros(2, 4), zeros(2, 5))),
    "second state rows": lambda cell, _: cell(3, 4)(zeros(2, 3), (zeros(2, 4), zeros(3, 4))),
    "second state of rank 1": lambda cell, _: cell(3, 4)(zeros(2, 3), (zeros(2, 4), zeros(4))),
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("mistake", CELL_MISTAKES)
def test_cells_refuse_what_torch_refuses(name: str, mistake: str) -> None:
    assert_same_error(name, CELL_MISTAKES[mistake])


@pytest.mark.parametrize("name", CELLS)
def test_cells_refuse_devices_with_the_type_of_torch(name: str) -> None:
    assert_same_error(name, lambda cell, _: cell(3, 4)(zeros(2, 3, device="meta")), text=False)
    assert_same_error(
        name, lambda cell, state: cell(3, 4)(zeros(2, 3), state(2, 4, device="meta")), text=False
    )


def test_cells_refuse_single_mistakes() -> None:
    assert_same_error("LSTMCell", lambda cell, _: cell(3, 4)(zeros(2, 3), zeros(2, 4)))
    assert_same_error("RNNCell", lambda cell, _: cell(3, 4, nonlinearity="foo")(zeros(2, 3)))


EXTRAS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "lengths size": (
        ValueError, "gru: lengths must be [B] with B=2, got [3]",
        lambda: torchrnn.GRU(3, 4)(zeros(3, 2, 3), lengths=torch.tensor([1, 2, 3])),
    ),
    "lengths dtype": (
        ValueError, "gru: lengths must be int64 or int32, got torch.float32",
        lambda: torchrnn.GRU(3, 4)(zeros(3, 2, 3), lengths=[1.5, 2]),
    ),
    "lengths above T": (
        ValueError, "lstm: lengths must be in 0..T with T=3, got 1..4",
        lambda: torchrnn.LSTM(3, 4)(zeros(3, 2, 3), lengths=[1, 4]),
    ),
    "negative lengths": (
        ValueError, "rnn: lengths must be in 0..T with T=3, got -1..2",
        lambda: torchrnn.RNN(3, 4)(zeros(3, 2, 3), lengths=[-1, 2]),
    ),
    "lengths without a batch": (
        ValueError, "gru: lengths must come with a batched input, got [3, 3]",
        lambda: torchrnn.GRU(3, 4)(zeros(3, 3), lengths=[3]),
    ),
    "lengths and packed": (
        ValueError, "gru: lengths must be None with a PackedSequence",
        lambda: torchrnn.GRU(3, 4)(packed(), lengths=[2, 3]),
    ),
    "resets size": (
        ValueError, "gru: resets must be [T, B] with T=3, B=2, got [2, 3]",
        lambda: torchrnn.GRU(3, 4)(zeros(3, 2, 3), resets=zeros(2, 3, dtype=torch.bool)),
    ),
    "resets size, batch first": (
        ValueError, "gru: resets must be [B, T] with B=3, T=2, got [2, 3]",
        lambda: torchrnn.GRU(3, 4, batch_first=True)(zeros(3, 2, 3), resets=zeros(2, 3, dtype=torch.bool)),
    ),
    "resets size, unbatched": (
        ValueError, "gru: resets must be [T] with T=3, got [3, 1]",
        lambda: torchrnn.GRU(3, 4)(zeros(3, 3), resets=zeros(3, 1, dtype=torch.bool)),
    ),
    "resets size, packed": (
        ValueError, "gru: resets must be [T, B] with T=3, B=2, got [2, 3]",
        lambda: torchrnn.GRU(3, 4)(packed(), resets=zeros(2, 3, dtype=torch.bool)),
    ),
    "resets dtype": (
        ValueError, "gru: resets must be bool, got torch.float32",
        lambda: torchrnn.GRU(3, 4)(zeros(3, 2, 3), resets=zeros(3, 2)),
    ),
    "resets type": (
        TypeError, "gru: resets must be a tensor, got list",
        lambda: torchrnn.GRU(3, 4)(zeros(3, 2, 3), resets=[[True, False]] * 3),
    ),
    "lengths positional": (
        TypeError, "Layer.forward() takes from 2 to 3 positional arguments but 4 were given",
        lambda: torchrnn.GRU(3, 4)(zeros(3, 2, 3), None, [2, 3]),
    ),
    "forget_bias without bias": (
        ValueError, "forget_bias needs bias=True, got forget_bias=1.0 with bias=False",
        lambda: torchrnn.LSTM(3, 4, bias=False, forget_bias=1.0),
    ),
    "forget_bias without bias, cell": (
        ValueError, "forget_bias needs bias=True, got forget_bias=1.0 with bias=False",
        lambda: torchrnn.LSTMCell(3, 4, bias=False, forget_bias=1.0),
    ),
    "forget_bias type": (
        TypeError, "forget_bias should be a number or None, got: str",
        lambda: torchrnn.LSTM(3, 4, forget_bias="1"),
    ),
    "forget_bias of a GRU": (
        TypeError, "RNNBase.__init__() got an unexpected keyword argument 'forget_bias'",
        lambda: torchrnn.GRU(3, 4, forget_bias=1.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", EXTRAS)
def test_extras_are_refused_with_a_text_that_helps(mistake: str) -> None:
    kind, text, call = EXTRAS[mistake]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text
