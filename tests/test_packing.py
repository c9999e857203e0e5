"""Packed weights: never stale, never copied along, and the same numbers as without them."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import assert_close_to_f64
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

import torchrnn
from torchrnn import _native, ops, packing

pytestmark = pytest.mark.skipif(_native.WHY_NOT is not None, reason="needs the kernels")

MODULES: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: torchrnn.LSTM(7, 33),
    "gru": lambda: torchrnn.GRU(7, 33),
    "gru-before": lambda: torchrnn.GRU(7, 33, reset_after=False),
    "rnn": lambda: torchrnn.RNN(7, 33, nonlinearity="relu"),
    "no-bias": lambda: torchrnn.GRU(7, 33, bias=False),
    "projected": lambda: torchrnn.LSTM(7, 33, proj_size=5),
    "two-way": lambda: torchrnn.LSTM(7, 33, bidirectional=True),
    "stacked": lambda: torchrnn.GRU(7, 33, num_layers=3, bidirectional=True, batch_first=True),
    "lstm-cell": lambda: torchrnn.LSTMCell(7, 33),
    "gru-cell": lambda: torchrnn.GRUCell(7, 33),
}


def example(module: nn.Module, batch: int = 5) -> Tensor:
    return torch.randn(batch, 7) if isinstance(module, nn.RNNCellBase) else torch.randn(6, batch, 7)


def packed_layers(module: nn.Module) -> list[packing.PackedLayer | None]:
    """Returns what each layer of a module has packed."""
    return [kept._packed for kept in module.__dict__.get("_packed_weights", {}).values()]


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [leaf for result in results for leaf in flat(result)]


def fresh(module: nn.Module) -> nn.Module:
    """Returns a copy that has packed nothing yet."""
    found = copy.deepcopy(module)
    assert not any(packed_layers(found))
    return found


@torch.no_grad()
def warm(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Calls a module until its weights are packed, and returns the results."""
    for _ in range(3):
        results = flat(module(x))
    assert packed_layers(module) and all(packed_layers(module))
    return results


def assert_sees_the_change(module: nn.Module, change: Callable[[], object]) -> None:
    x = example(module)
    before = warm(module, x)
    change()
    with torch.no_grad():
        for _ in range(3):
            after = flat(module(x))
            # Below grad mode nothing is packed.
            with torch.enable_grad():
                expected = flat(module(x))
            for ours, exact in zip(after, expected, strict=True):
                torch.testing.assert_close(ours, exact)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def fill(module: nn.Module) -> None:
    """Changes all parameters in place, by torch's operators."""
    for parameter in module.parameters():
        parameter.mul_(0.5).add_(0.01)


@torch.no_grad()
def in_place(module: nn.Module) -> None:
    fill(module)


@torch.inference_mode()
def in_place_in_inference_mode(module: nn.Module) -> None:
    fill(module)


def load_state_dict(module: nn.Module) -> None:
    module.load_state_dict({name: value * 0.5 for name, value in module.state_dict().items()})


def load_state_dict_by_assignment(module: nn.Module) -> None:
    module.load_state_dict({k: v * 0.5 for k, v in module.state_dict().items()}, assign=True)


def replace_parameters(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(parameter.detach() * 0.5))


def replace_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * 0.5


def replace_data_by_used_memory(module: nn.Module) -> None:
    # Each new tensor is likely to be where the one before the last was.
    for factor in (0.9, 0.8, 0.7, 0.6):
        for parameter in module.parameters():
            parameter.data = parameter.data * factor


def transpose_square_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() == 2 and parameter.size(0) == parameter.size(1):
            parameter.data = parameter.data.t()  # The same memory and version.


def step_of_an_optimizer(module: nn.Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    sum(out.square().sum() for out in flat(module(example(module)))).backward()
    optimizer.step()


def vector_to_parameters(module: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 0.5, module.parameters())


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    "change",
    [
        in_place,
        in_place_in_inference_mode,
        load_state_dict,
        load_state_dict_by_assignment,
        replace_parameters,
        replace_data,
        replace_data_by_used_memory,
        step_of_an_optimizer,
        vector_to_parameters,
    ],
    ids=lambda change: change.__name__.replace("_", "-"),
)
def test_a_changed_weight_is_seen(name: str, change: Callable[[nn.Module], None]) -> None:
    module = MODULES[name]()
    assert_sees_the_change(module, lambda: change(module))


def test_a_transposed_weight_is_seen() -> None:
    module = torchrnn.RNN(7, 7)
    assert_sees_the_change(module, lambda: transpose_square_data(module))


@pytest.mark.parametrize("field", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
def test_each_weight_is_watched(field: str) -> None:
    module = torchrnn.LSTM(7, 33)
    assert_sees_the_change(module, lambda: getattr(module, field).detach().mul_(0.5))


def test_parametrized_weights_are_seen() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = 1.0

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.factor

    module, scaled = torchrnn.LSTM(7, 33), Scaled()
    x = example(module)
    warm(module, x)
    parametrize.register_parametrization(module, "weight_hh_l0", scaled)
    with torch.no_grad():
        for factor in (1.0, 0.5, 0.25):
            scaled.factor = factor
            expected = fresh(module)(x)
            for _ in range(3):
                assert all(map(torch.equal, flat(module(x)), flat(expected)))


def test_functional_call_uses_what_it_is_given() -> None:
    module = torchrnn.GRU(7, 33)
    x = example(module)
    before = warm(module, x)
    other = {name: value * 0.5 for name, value in module.state_dict().items()}
    twin = torchrnn.GRU(7, 33)
    twin.load_state_dict(other)
    with torch.no_grad():
        found, expected = torch.func.functional_call(module, other, (x,)), twin(x)
        assert all(map(torch.equal, flat(found), flat(expected)))
        assert all(map(torch.equal, flat(module(x)), before))


def test_dropping_shows_what_torch_does_not_count() -> None:
    module = torchrnn.LSTM(7, 33)
    x = example(module)
    before = warm(module, x)
    module.weight_hh_l0.data.numpy()[:] *= 0.5
    with torch.no_grad():
        assert all(map(torch.equal, flat(module(x)), before))  # As documented.
        module.drop_packed_weights()
        after = flat(module(x))
        expected = flat(fresh(module)(x))
    assert all(map(torch.equal, after, expected))
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "pickle"]
)
def test_copies_come_empty_and_go_their_own_way(name: str, copier: Callable[[Any], Any]) -> None:
    module = MODULES[name]()
    x = example(module)
    before = warm(module, x)
    twin = copier(module)
    assert not any(packed_layers(twin))
    in_place(twin)
    assert not torch.equal(warm(twin, x)[0], before[0])
    assert torch.equal(warm(module, x)[0], before[0])


@pytest.mark.parametrize("isa", _native.isas())
def test_the_instruction_set_may_change(isa: str) -> None:
    module = torchrnn.LSTM(7, 33)
    x = example(module)
    warm(module, x)
    with _native.use_isa(isa):
        results = warm(module, x)
        with torch.enable_grad():
            expected = flat(module(x))
    for ours, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, exact)


def test_weights_of_another_layer_are_refused() -> None:
    lstm, longer = torchrnn.LSTM(7, 33), torchrnn.LSTM(8, 33)
    warm(lstm, example(lstm))
    packed = packed_layers(lstm)[0]
    assert packed is not None
    with pytest.raises(RuntimeError, match="packed for another layer"):
        ops.layer_packed(packed, torch.randn(2, 3, longer.input_size), None, None)


def test_few_rows_pack_at_the_second_call_only() -> None:
    module = torchrnn.LSTM(7, 33)
    x = torch.randn(1, 1, 7)
    with torch.no_grad():
        module(x)
        assert packed_layers(module) == [None]
        module(x)
    assert all(packed_layers(module))


def test_training_packs_nothing() -> None:
    module = torchrnn.LSTM(7, 33)
    module(example(module))
    assert not any(packed_layers(module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "gru-before"])
def test_steps_add_up_to_the_sequence(name: str, dtype: torch.dtype) -> None:
    module = MODULES[name]().to(dtype)
    exact = fresh(module).double()
    x = torch.randn(6, 2, 7).to(dtype)
    outputs, state = [], None
    with torch.inference_mode():
        for step in x:
            y, state = module(step.unsqueeze(0), state)
            outputs.append(y)
        assert all(packed_layers(module))
        whole, true = module(x), exact(x.double())
    assert_close_to_f64((torch.cat(outputs), state), whole, true, dtype)


def test_lengths_and_resets_go_with_packed_weights() -> None:
    module = torchrnn.GRU(7, 33, bidirectional=True)
    x, lengths, resets = torch.randn(6, 5, 7), torch.tensor([6, 0, 3, 1, 5]), torch.rand(6, 5) < 0.3
    warm(module, x)
    expected = flat(module(x, lengths=lengths, resets=resets))
    with torch.no_grad():
        found = flat(module(x, lengths=lengths, resets=resets))
        with pytest.raises(ValueError, match=r"lengths must be in 0\.\.T with T=6, got 1\.\.7"):
            module(x, lengths=lengths + 1)
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize(
    ("x", "state", "error"),
    [
        (torch.randn(2, 3, 8), None, RuntimeError),
        (torch.randn(2, 3, 7).double(), None, ValueError),
        (torch.randn(2, 3, 7, 1), None, ValueError),
        (torch.randn(0, 3, 7), None, RuntimeError),
        (torch.randn(2, 3, 7), torch.randn(1, 4, 33), RuntimeError),
        (torch.randn(2, 3, 7), torch.randn(1, 3, 33).double(), RuntimeError),
        (torch.randn(2, 3, 7), torch.randn(3, 33), RuntimeError),
        ([[1.0]], None, AttributeError),
    ],
    ids=["inputs", "dtype", "rank", "no-steps", "batch", "state-dtype", "state-rank", "list"],
)
def test_mistakes_read_the_same_once_weights_are_packed(x: Any, state: Any, error: type[Exception]) -> None:
    module = torchrnn.GRU(7, 33)
    with torch.no_grad():
        with pytest.raises(error) as first:
            module(x, state)
        warm(module, example(module))
        with pytest.raises(error) as second:
            module(x, state)
    assert str(first.value) == str(second.value)


def test_threads_share_a_module() -> None:
    module = torchrnn.LSTM(7, 33)
    x = example(module)
    expected = warm(fresh(module), x)
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.inference_mode():
            for _ in range(50):
                if not torch.equal(module(x)[0], expected[0]):
                    wrong.append(number)
                module.drop_packed_weights()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_transforms_and_autocast_do_without() -> None:
    module = torchrnn.LSTM(7, 33)
    x = example(module)
    warm(module, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, _ = module(x)
    assert y.dtype == torch.bfloat16
    with torch.no_grad():
        mapped = torch.vmap(lambda row: module(row.unsqueeze(1))[0], in_dims=1)(x)
        torch.testing.assert_close(mapped.squeeze(2).transpose(0, 1), module(x)[0])


def test_op_keeps_the_dispatchers_contract() -> None:
    module = torchrnn.LSTM(7, 33)
    x = example(module)
    warm(module, x)
    packed = packed_layers(module)[0]
    assert packed is not None
    args = (x, packed.data, torch.randn(1, 5, 33), torch.randn(1, 5, 33), None, None, *packed.scalars)
    torch.library.opcheck(torch.ops.torchrnn.layer_packed.default, args)


# torch.jit.trace is deprecated and warns of each size that is compared; but while it is there it must not
# hold stale weights.
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracers_and_fake_tensors_see_the_weights() -> None:
    module = torchrnn.LSTM(7, 33)
    x = example(module)
    warm(module, x)
    with torch.no_grad():
        graph = make_fx(lambda value: module(value)[0])(x)
        traced = torch.jit.trace(module, x)
        names = [str(node.target) for node in graph.graph.nodes]
        assert "torchrnn.layer_infer.default" in names
        assert not any("packed" in name for name in names)
        assert "layer_packed" not in str(traced.inlined_graph)
        with FakeTensorMode():
            fake = torchrnn.LSTM(7, 33)
            for _ in range(3):
                y, _ = fake(torch.randn(6, 5, 7))
    assert y.shape == (6, 5, 33)
    assert not any(packed_layers(fake))
