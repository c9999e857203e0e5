"""What a call computes is a function of what is in memory then: a weight may be written to in any way.

One file, as every way is tried on the same subjects.
"""

from __future__ import annotations

import copy
import ctypes
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import every_cell
import every_layer
import pytest
import torch
from conftest import gradients, leaves
from every_layer import example
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import torchrnn

MODES = {"grad": torch.enable_grad, "no grad": torch.no_grad, "inference": torch.inference_mode}


class Subject(NamedTuple):
    """A module and how it is called."""

    make: Callable[[], Any]
    inputs: Callable[[Any, int, int], Any]
    """Returns an input of the module, of some steps and rows."""
    call: Callable[[Any, Any], Any] = lambda module, x: module(x)

    def twin(self, module: nn.Module) -> Any:
        """Returns a module that has not been called yet, with the weights that another one has now."""
        fresh = self.make()
        fresh.load_state_dict(module.state_dict())
        return fresh.train(module.training)


def _layers() -> dict[str, Subject]:
    found = {name: Subject(partial(make, 7, 9), example) for name, make in every_layer.MODULES.items()}
    for name, dtype in (
        ("lstm", torch.bfloat16),
        ("gru stacked", torch.float16),
        ("lstm cell", torch.bfloat16),
        ("gru", torch.float64),
    ):
        make = every_layer.MODULES[name]
        found[f"{name} {dtype}"] = Subject(
            lambda make=make, dtype=dtype: make(7, 9).to(dtype),
            lambda module, steps, batch, dtype=dtype: example(module, steps, batch, dtype=dtype),
        )
    return found


def _unrolled() -> dict[str, Subject]:
    return {
        f"tf {name}": Subject(
            partial(make, 4),
            lambda _, steps, batch, name=name: every_cell.sequence(name, batch, steps),
            every_cell.run,
        )
        for name, make in every_cell.CELLS.items()
    }


LAYERS, UNROLLED = _layers(), _unrolled()
SUBJECTS = {**LAYERS, **UNROLLED}


def write(weight: Tensor) -> None:
    """Fills a tensor with other numbers through its address, of which torch learns nothing."""
    numbers = torch.randn(weight.shape).to(weight.dtype)
    assert weight.is_contiguous()
    ctypes.memmove(weight.data_ptr(), numbers.data_ptr(), numbers.nbytes)


def assert_current(subject: Subject, module: Any, x: Any) -> Any:
    """Asserts that a module computes what one with the same weights does, which is new; returns it."""
    results = subject.call(module, x)
    for ours, fresh in zip(leaves(results), leaves(subject.call(subject.twin(module), x)), strict=True):
        assert_close(ours, fresh)
    return results


def assert_changed(before: Any, after: Any) -> None:
    pairs = zip(leaves(before), leaves(after), strict=True)
    assert any(not torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in pairs)


def warm(subject: Subject, module: Any, x: Any) -> Any:
    """Returns the results of a module that has been called more than once."""
    for _ in range(3):
        results = subject.call(module, x)
    return results


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SUBJECTS)
def test_what_is_written_through_a_pointer_is_seen(name: str, mode: str) -> None:
    subject = SUBJECTS[name]
    # One row of one step; few rows; and so many that weights are laid out anew for them.
    for steps, batch in ((1, 1), (4, 3), (9, 8)) if name in LAYERS else ((3, 2),):
        module = subject.make()
        x = subject.inputs(module, steps, batch)
        with MODES[mode]():
            before = warm(subject, module, x)
            # One after the other, since a result that is new may still be made of an old weight.
            for weight in module.parameters():
                write(weight)
                after = assert_current(subject, module, x)
            assert_changed(before, after)
        if mode == "grad":
            twin = subject.twin(module)
            assert_close(
                gradients(module, after, x),
                gradients(twin, subject.call(twin, x), x),
            )


# The ways by which programs write to weights --------------------------------------------------------------


@torch.no_grad()
def in_place(module: nn.Module) -> None:
    for p in module.parameters():
        p.mul_(0.3)


@torch.inference_mode()
def in_place_in_inference_mode(module: nn.Module) -> None:
    in_place(module)


@torch.no_grad()
def all_at_once(module: nn.Module) -> None:
    torch._foreach_mul_([p.data for p in module.parameters()], 0.3)


def steps_on_data(module: nn.Module) -> None:
    # Stochastic gradient descent as scripts write it.
    for p in module.parameters():
        p.data.add_(torch.randn_like(p), alpha=-0.5)


def averages(module: nn.Module) -> None:
    # The target network of an agent follows the one that is trained; a moving average does alike.
    trained = copy.deepcopy(module)
    in_place(trained)
    for target, p in zip(module.parameters(), trained.parameters(), strict=True):
        target.data.copy_(target.data * 0.01 + p.data * 0.99)
        target.data.lerp_(p.data, 0.5)


def clips(module: nn.Module) -> None:
    # The critic of a Wasserstein GAN.
    for p in module.parameters():
        p.data.clamp_(-0.01, 0.01)


def initial_values(module: nn.Module) -> None:
    for p in module.parameters():
        if p.dim() == 2:
            nn.init.orthogonal_(p.data)
        else:
            nn.init.constant_(p.data, 1.0)


def some_weights_of_a_file(module: nn.Module) -> None:
    own = module.state_dict()
    loaded = {name: torch.randn_like(value) for name, value in own.items()}
    for name, value in loaded.items():
        own[name].data.copy_(value)


def load_state_dict(module: nn.Module) -> None:
    module.load_state_dict({name: value * 0.3 for name, value in module.state_dict().items()})


def load_state_dict_by_assignment(module: nn.Module) -> None:
    module.load_state_dict({name: v * 0.3 for name, v in module.state_dict().items()}, assign=True)


def from_a_vector(module: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 0.3, module.parameters())


def other_parameters(module: nn.Module) -> None:
    for name, p in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(p.detach() * 0.3))


def other_memory(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = p.data * 0.3


def other_memory_where_old_memory_was(module: nn.Module) -> None:
    # Each new tensor is likely to lie where the one before the last did.
    for factor in (0.9, 0.8, 0.7, 0.6):
        for p in module.parameters():
            p.data = p.data * factor


@torch.no_grad()
def memory_set(module: nn.Module) -> None:
    for p in module.parameters():
        p.set_(p.detach() * 0.3)


def swapped(module: nn.Module) -> None:
    for p in module.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 0.3))


def storage(module: nn.Module) -> None:
    for p in module.parameters():
        p.untyped_storage().copy_((p.detach() * 0.3).untyped_storage())


def numpy_view(module: nn.Module) -> None:
    for p in module.parameters():
        p.detach().numpy()[:] *= 0.3


def dlpack(module: nn.Module) -> None:
    for p in module.parameters():
        torch.from_dlpack(p.detach()).mul_(0.3)


WAYS: list[Callable[[nn.Module], None]] = [
    in_place,
    in_place_in_inference_mode,
    all_at_once,
    steps_on_data,
    averages,
    clips,
    initial_values,
    some_weights_of_a_file,
    load_state_dict,
    load_state_dict_by_assignment,
    from_a_vector,
    other_parameters,
    other_memory,
    other_memory_where_old_memory_was,
    memory_set,
    swapped,
    storage,
    numpy_view,
    dlpack,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.replace("_", "-"))
@pytest.mark.parametrize("name", ["lstm", "gru before", "rnn stacked", "lstm projected", "gru cell"])
def test_a_change_is_seen(name: str, way: Callable[[nn.Module], None]) -> None:
    subject = LAYERS[name]
    module = subject.make()
    for p in module.parameters():
        nn.init.uniform_(p, -1, 1)
    x = subject.inputs(module, 4, 3)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            before = warm(subject, module, x)
        way(module)
        with mode():
            after = assert_current(subject, module, x)
        if mode is torch.no_grad:
            assert_changed(before, after)


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]
)
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "gru stacked", "lstm cell", "tf lstm varied"])
def test_evaluation_sees_each_step_of_a_fused_optimizer(name: str, optimizer: Any) -> None:
    subject = SUBJECTS[name]
    module = subject.make()
    x = subject.inputs(module, 4, 3)
    subject.call(module, x)
    optimizer = optimizer(module.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        before = warm(subject, module, x)
    for _ in range(3):
        optimizer.zero_grad()
        sum(result.square().sum() for result in leaves(subject.call(module, x))).backward()
        optimizer.step()
        with torch.no_grad():
            after = assert_current(subject, module, x)
        assert_changed(before, after)
        before = after


def test_a_perturbation_is_seen_and_so_is_its_end() -> None:
    # Evolution strategies: noise is added, the model judged, and the noise taken away.
    module = torchrnn.LSTM(7, 9, 2)
    x = example(module)
    with torch.no_grad():
        before = module(x)[0]
        for _ in range(3):
            weights = [p.data.clone() for p in module.parameters()]
            steps_on_data(module)
            assert_changed(
                before,
                assert_current(LAYERS["lstm"]._replace(make=lambda: torchrnn.LSTM(7, 9, 2)), module, x)[0],
            )
            for p, weight in zip(module.parameters(), weights, strict=True):
                p.data.copy_(weight)
            assert torch.equal(module(x)[0], before)


@torch.no_grad()
def test_a_square_weight_that_is_transposed_is_seen() -> None:
    module = torchrnn.RNN(7, 7)
    x = example(module)
    before = module(x)
    for p in module.parameters():
        if p.dim() == 2:
            p.data = p.data.t()  # The same memory and version.
    after = module(x)
    in_order = torchrnn.RNN(7, 7)
    in_order.load_state_dict(module.state_dict())
    assert_close(after, in_order(x))
    assert_changed(before, after)


@torch.no_grad()
def test_a_computed_weight_is_seen() -> None:
    class Scaled(nn.Module):
        factor = 1.0

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.factor

    module, scaled = torchrnn.LSTM(7, 9), Scaled()
    x, plain = example(module), copy.deepcopy(module)
    module(x)
    parametrize.register_parametrization(module, "weight_hh_l0", scaled)
    for factor in (1.0, 0.5, 2.0):
        scaled.factor = factor
        weights = {**plain.state_dict(), "weight_hh_l0": plain.weight_hh_l0 * factor}
        twin = torchrnn.LSTM(7, 9)
        twin.load_state_dict(weights)
        for _ in range(3):
            assert_close(module(x), twin(x))
            assert_close(torch.func.functional_call(plain, weights, (x,)), twin(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("record", ["compile", "trace", "export"])
@pytest.mark.parametrize("name", ["lstm", "gru stacked", "gru cell", "tf lstm varied"])
def test_recorded_programs_read_weights_as_they_are(name: str, record: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = subject.make()

        def forward(self, x: Tensor) -> Any:
            return leaves(subject.call(self.inner, x))

    subject = SUBJECTS[name]
    torch._dynamo.reset()
    for mode in (torch.enable_grad, torch.no_grad):
        model = Model()
        x = subject.inputs(model.inner, 4, 3)
        model(x)
        with mode():
            if record == "compile":
                program = torch.compile(model, backend="aot_eager", fullgraph=True)
            elif record == "trace":
                program = torch.jit.trace(model, (x,))
            else:
                program = torch.export.export(model, (x,)).module()
        own = list(program.parameters())  # An exported program has copies.
        for run_mode in MODES.values():
            with run_mode():
                before = warm(Subject(subject.make, subject.inputs), program, x)
                for weight in own:
                    write(weight)
                twin = Model()
                twin.inner = subject.twin(model.inner)
                if record == "export":
                    twin(x)
                    for p, q in zip(twin.parameters(), own, strict=True):
                        p.data.copy_(q)
                after = program(x)
                assert_close(after, twin(x))
                assert_changed(before, after)


def test_threads_share_a_module() -> None:
    module = torchrnn.LSTM(7, 33)
    inputs = [example(module, batch=batch) for batch in (1, 3, 8, 40)]
    with torch.inference_mode():
        expected = [module(x)[0] for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.inference_mode():
            for _ in range(50):
                if not torch.equal(module(inputs[number])[0], expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Other processes ------------------------------------------------------------------------------------------


def _work(module: nn.Module, x: Tensor, pipe: Any) -> None:
    """Trains a module or evaluates it, as it is told, until it is told to stop."""
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    while (task := pipe.recv()) is not None:
        if task == "train":
            optimizer.zero_grad()
            module(x)[0].square().sum().backward()
            optimizer.step()
            pipe.send(None)
        else:
            with torch.no_grad():
                pipe.send(module(x)[0].tolist())


def test_processes_that_share_weights_see_each_other_write() -> None:
    # Hogwild (Niu et al. 2011), whose processes all train; and actors, which only evaluate.
    subject = LAYERS["lstm"]
    module = subject.make()
    module.share_memory()
    x = subject.inputs(module, 4, 3)
    context = multiprocessing.get_context("spawn")
    pipe, other_end = context.Pipe()
    process = context.Process(target=_work, args=(module, x, other_end), daemon=True)
    process.start()

    def ask(task: str) -> Any:
        pipe.send(task)
        assert pipe.poll(120), "the other process does not answer"
        return pipe.recv()

    with torch.no_grad():
        before = module(x)
        for _ in range(3):
            ask("train")
            after = assert_current(subject, module, x)
            assert_changed(before, after)
            assert_close(torch.tensor(ask("evaluate")), after[0])
            steps_on_data(module)
            assert_close(torch.tensor(ask("evaluate")), subject.twin(module)(x)[0])
            before = module(x)
    pipe.send(None)
    process.join(60)
    assert process.exitcode == 0


def _collect(rank: int, path: str) -> None:
    """Runs collectives on the weights of layers, each after a call and before one."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    with torch.no_grad():
        for name in ("lstm", "gru stacked", "rnn cell", "tf gru"):
            subject = SUBJECTS[name]
            module = subject.make()
            x = subject.inputs(module, 4, 3)
            for collective in (partial(distributed.broadcast, src=0), distributed.all_reduce):
                for data in (False, True):
                    before = warm(subject, module, x)
                    for p in module.parameters():
                        p.mul_(1.5)  # So that there is something to see on both sides.
                        collective(p.data if data else p)
                    assert_changed(before, assert_current(subject, module, x))
    distributed.destroy_process_group()


def test_collectives_on_weights_are_seen(tmp_path: Path) -> None:
    multiprocessing.spawn(_collect, (str(tmp_path / "rendezvous"),), nprocs=2)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torchrnn.LSTM(7, 9, 2), torchrnn.GRU(9, 9)
        self.cell, self.last = torchrnn.LSTMCell(9, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x)[0])[0]
        return self.last(self.cell(y[-1])[0])


def _train_in_shards(rank: int, path: str) -> None:
    """Trains a model whose weights are spread over the processes, and the same model alone."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    alone, x, dtype = Stack().double(), torch.randn(5, 4, 7).double(), torch.float64
    model = copy.deepcopy(alone)
    mesh = distributed.init_device_mesh("cpu", (2,))
    for part in model.children():
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, alone)]
    mine = x[:, 2 * rank : 2 * rank + 2]
    for _ in range(3):
        with torch.no_grad():
            evaluated = model(mine)
            assert evaluated.dtype == dtype
            assert_close(evaluated, alone(mine))
        before = evaluated
        for optimizer, loss in zip(
            optimizers, (model(mine).square().mean(), alone(x).square().mean()), strict=True
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            assert_close(model(mine), alone(mine))
            assert_changed(before, alone(mine))
    distributed.destroy_process_group()


def test_weights_in_shards_train_as_those_of_one_process(tmp_path: Path) -> None:
    multiprocessing.spawn(_train_in_shards, (str(tmp_path / "rendezvous"),), nprocs=2)
