"""Which path a call takes on CUDA, what the ops are told of it, and what ``explain`` says; without a GPU."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchrnn
from torchrnn import _native, cuda, explain, rnn_cell
from torchrnn.options import CELLS
from torchrnn.rnn_cell import DropoutWrapper, LSTMCell, MultiRNNCell

KERNELS = f"CPU kernels ({_native.isa()})"
HOPPER = (9, 0)
needs_kernels = pytest.mark.skipif(_native.WHY_NOT is not None, reason="needs the kernels")


@pytest.fixture(autouse=True)
def _nothing_is_forced() -> Iterator[None]:
    """Undoes what the environment forces."""
    with cuda.use_path("auto"):
        yield


# The table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (12, 1)], ids=str)
def test_the_table_serves_every_call_by_the_step_path(capability: tuple[int, int], cell: str) -> None:
    for dtype in _native.DTYPES:
        for size in (1, 128, 10**6):
            for variation in (frozenset(), cuda.VARIATIONS):
                path, why = cuda.choose(
                    capability, dtype, cell, hidden=size, batch=size, steps=size, variation=variation
                )
                assert path == "step"
                assert "every call" in why


NARROW = cuda.Row(
    "cluster",
    "it is narrow",
    capability=((9, 0), (10, 3)),
    dtypes=frozenset({torch.bfloat16}),
    cells=frozenset({"gru"}),
    hidden=range(64, 513),
    batch=range(1, 65),
    steps=range(16, 1000),
    variations=frozenset({"lengths", "resets"}),
)
WITHIN: dict[str, Any] = {
    "capability": HOPPER,
    "dtype": torch.bfloat16,
    "cell": "gru",
    "hidden": 512,
    "batch": 64,
    "steps": 16,
    "variation": frozenset({"lengths"}),
}


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({}, "cluster"),
        ({"capability": (10, 3), "variation": frozenset()}, "cluster"),
        ({"capability": (8, 9)}, "step"),
        ({"capability": (10, 4)}, "step"),
        ({"dtype": torch.float16}, "step"),
        ({"cell": "gru_reset_before"}, "step"),
        ({"hidden": 513}, "step"),
        ({"hidden": 63}, "step"),
        ({"batch": 65}, "step"),
        ({"steps": 15}, "step"),
        ({"variation": frozenset({"peephole"})}, "step"),
    ],
    ids=str,
)
def test_a_row_is_chosen_for_the_calls_within_it(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], path: str
) -> None:
    monkeypatch.setattr(cuda, "TABLE", (NARROW, *cuda.TABLE))
    assert cuda.choose(**{**WITHIN, **changes})[0] == path


# What is forced -------------------------------------------------------------------------------------------


def test_a_path_is_forced_inside_the_block() -> None:
    with cuda.use_path("cluster"):
        assert cuda.choose(**WITHIN) == ("cluster", "it is forced")
        with pytest.raises(ZeroDivisionError), cuda.use_path("step"):
            assert cuda.choose(**WITHIN) == ("step", "it is forced")
            _ = 1 / 0
        with cuda.use_path("auto"):
            assert cuda.choose(**WITHIN)[0] == "step"
        assert cuda.PATHS[cuda.forced()] == "cluster"
    assert cuda.forced() == 0


def test_a_path_that_is_not_known_is_refused() -> None:
    forced = cuda.use_path("grid")
    with pytest.raises(ValueError, match="path must be one of auto, step, cluster, got 'grid'"), forced:
        pass
    assert cuda.forced() == 0


@pytest.mark.parametrize(("value", "code"), [("", 0), ("auto", 0), ("step", 1), ("cluster", 2)])
def test_the_environment_forces_a_path(monkeypatch: pytest.MonkeyPatch, value: str, code: int) -> None:
    monkeypatch.setenv("TORCHRNN_CUDA_PATH", value)
    monkeypatch.setattr(torch, "cuda", None)  # Which the import must not ask: that would claim the device.
    assert runpy.run_path(cuda.__file__)["forced"]() == code
    monkeypatch.setenv("TORCHRNN_CUDA_PATH", "Step")
    with pytest.raises(ValueError, match="TORCHRNN_CUDA_PATH: path must be one of auto, step, cluster"):
        runpy.run_path(cuda.__file__)


# What the ops are told ------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Notes name, ``tf32`` and ``path`` of every call of the layer ops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "torchrnn":
            told = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
            self.seen.append((func._schema.name.removeprefix("torchrnn::"), told["tf32"], told["path"]))
        return func(*args, **kwargs or {})


def train(recompute: bool = False, device: str = "meta") -> list[tuple[str, bool, int]]:
    """Returns what the ops were told by one step of training."""
    layer = torchrnn.LSTM(4, 5, device=device, recompute=recompute)
    with Calls() as calls:
        layer(torch.zeros(3, 2, 4, device=device))[0].sum().backward()
    return calls.seen


def infer(device: str = "meta") -> list[tuple[str, bool, int]]:
    """Returns what the op of an inference call was told."""
    layer = torchrnn.GRU(4, 5, device=device)
    with Calls() as calls, torch.no_grad():
        layer(torch.zeros(3, 2, 4, device=device))
    return calls.seen


@pytest.mark.parametrize("path", cuda.PATHS)
@pytest.mark.parametrize("allowed", [False, True])
def test_every_op_is_told_path_and_tf32(monkeypatch: pytest.MonkeyPatch, allowed: bool, path: str) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    code = cuda.PATHS.index(path)
    with cuda.use_path(path):
        assert train() == [("layer", allowed, code), ("layer_backward", allowed, code)]
        assert infer() == [("layer_infer", allowed, code)]
        names = [name for name, *told in train(recompute=True) if told == [allowed, code]]
    assert names == ["layer_infer", "layer", "layer_backward"]


def test_the_newer_flag_of_precision_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Now the older one raises when it is read, since convolutions may still use TF32.
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    assert infer() == [("layer_infer", False, 0)]
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")
    assert infer() == [("layer_infer", True, 0)]


def test_cpu_kernels_are_not_told() -> None:
    layer, x = torchrnn.LSTM(4, 5), torch.randn(3, 2, 4)
    expected = layer(x)[0]
    with cuda.use_path("cluster"):
        torch.testing.assert_close(layer(x)[0], expected)
        assert train(device="cpu") == [("layer", False, 0), ("layer_backward", False, 0)]


def test_compiled_calls_follow_flag_and_path(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[tuple[bool, int]] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        (node,) = [node for node in module.graph.nodes if "layer_infer" in str(node.target)]
        names = [a.name for a in torch.ops.torchrnn.layer_infer.default._schema.arguments]
        told = dict(zip(names, node.args, strict=True))
        graphs.append((told["tf32"], told["path"]))
        return module.forward

    layer, x = torchrnn.LSTM(4, 5, device="meta"), torch.zeros(3, 2, 4, device="meta")
    compiled = torch.compile(lambda x: layer(x)[0], backend=backend, fullgraph=True)
    with torch.no_grad():
        for allowed in (True, False, True):
            monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
            compiled(x)
        with cuda.use_path("step"):
            compiled(x)
    assert graphs == [(True, 0), (False, 0), (True, 1)]


# What explain says ----------------------------------------------------------------------------------------


def on_cuda(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = HOPPER, why_not: str | None = None
) -> FakeTensorMode:
    """Returns a mode in which tensors are on CUDA but have no values; it seems to have kernels."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(_native, "WHY_NOT_CUDA", why_not)
    monkeypatch.setattr(nn.RNNBase, "reset_parameters", lambda _: None)  # Fake CUDA draws no numbers.
    return FakeTensorMode()


@needs_kernels
def test_explain_says_what_runs_on_the_cpu() -> None:
    layer, x = torchrnn.LSTM(4, 5, num_layers=2, batch_first=True), torch.randn(6, 30, 4)
    name = "LSTM(4, 5, num_layers=2, batch_first=True)"
    assert explain(layer, x) == f"{name}: {KERNELS}, weights not packed: gradients are recorded"
    with torch.no_grad():
        assert explain(layer, x) == f"{name}: {KERNELS}, weights packed and kept"
        for few in (x[0, :5], x[:5, :1]):
            assert explain(layer, few).endswith("kept from the second call on: 5 rows are fewer than 24")
        with torch.autocast("cpu"):
            assert "not packed: autocast" in explain(layer, x.double())
    cell = torchrnn.GRUCell(4, 5)
    for one in (torch.randn(4), torch.randn(2, 4)):
        assert explain(cell, one) == f"GRUCell(4, 5): {KERNELS}, weights not packed: gradients are recorded"


@needs_kernels
def test_explain_names_the_instruction_set_and_subclasses() -> None:
    class Mine(torchrnn.RNN):
        pass

    for isa in _native.isas():
        with _native.use_isa(isa):
            assert explain(Mine(4, 5), torch.randn(3, 4)).startswith(f"Mine(4, 5): CPU kernels ({isa})")


def test_explain_says_why_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = torchrnn.GRU(4, 5), torch.randn(2, 3, 1, 4)
    said = []
    torch.vmap(lambda x: said.append(explain(layer, x)) or x)(x)
    assert said[0].endswith("reference in plain torch, step by step: a transform (vmap, grad, jvp or the "
                            "like) is active")  # fmt: skip
    monkeypatch.setattr(_native, "WHY_NOT", "TORCHRNN_PURE is set")
    assert explain(layer, x[0]).endswith("reference in plain torch, step by step: TORCHRNN_PURE is set")
    with on_cuda(monkeypatch, why_not="torch is without CUDA"):
        layer = torchrnn.GRU(4, 5, device="cuda")
        assert explain(layer, torch.empty(2, 3, 4, device="cuda")).endswith(": torch is without CUDA")
    assert "shapes only" in explain(torchrnn.GRU(4, 5, device="meta"), torch.empty(2, 3, 4, device="meta"))


def test_explain_says_which_path_runs_on_cuda_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "TABLE", (NARROW, *cuda.TABLE))
    cell = LSTMCell(3)
    with on_cuda(monkeypatch):
        kind = {"device": "cuda", "dtype": torch.bfloat16}

        def says(*sizes: int, hidden: int = 64, **kwargs: Any) -> str:
            return explain(torchrnn.GRU(4, hidden, **kwargs, **kind), torch.empty(*sizes, 4, **kind))

        assert says(16, 3) == "GRU(4, 64): CUDA kernels (capability 9.0), cluster path: it is narrow"
        assert "cluster path" in says(16)
        assert "cluster path" in says(3, 16, batch_first=True)
        assert "step path: it serves every call" in says(15, 3)
        assert "step path" in says(16, 65)
        assert "step path" in says(16, 3, hidden=63)
        assert "step path" in says(16, 3, reset_after=False)
        with cuda.use_path("step"):
            assert says(16, 3).endswith("step path: it is forced")
        x = torch.empty(16, 3, 4, **kind)
        lines = explain(cell, x).splitlines()
        paths = "cluster path: it is narrow; step path: it serves every call"
        assert lines[1].startswith(f"ops on cuda:0: CUDA kernels (capability 9.0), {paths}")


def test_explain_knows_the_variations_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(NARROW, cells=frozenset(CELLS), hidden=range(9), dtypes=frozenset({torch.float32}))
    monkeypatch.setattr(cuda, "TABLE", (row, *cuda.TABLE))
    with on_cuda(monkeypatch):
        x = torch.empty(16, 3, 4, device="cuda")
        for make, path in (
            (torchrnn.LSTM(4, 5, device="cuda"), "cluster"),
            (torchrnn.LSTM(4, 5, proj_size=2, device="cuda"), "step"),
            (torchrnn.RNN(4, 5, device="cuda"), "cluster"),
            (torchrnn.RNN(4, 5, nonlinearity="relu", device="cuda"), "step"),
        ):
            assert f" {path} path: " in explain(make, x)


@needs_kernels
def test_explain_of_a_cell_ends_with_the_device_of_its_ops() -> None:
    keep = nn.Parameter(torch.tensor(0.5))
    cell = MultiRNNCell([LSTMCell(3), DropoutWrapper(LSTMCell(3), state_keep_prob=keep)])
    x = torch.randn(2, 5, 4)
    *lines, last = explain(cell, x).splitlines()
    assert lines == explain(cell).splitlines()
    learnt = "ops on cpu: reference in plain torch, where the state is dropped; a keep probability is learnt"
    assert last == learnt
    kernels = f"ops on cpu: {KERNELS}"
    with torch.no_grad():
        assert explain(cell, x).splitlines()[-1] == kernels
    assert explain(cell.eval(), [x, x]).splitlines()[-1] == kernels
    said = []
    torch.vmap(lambda x: said.append(explain(cell, x)) or x)(x.expand(2, 2, 5, 4))
    assert said[0].splitlines()[-1].startswith("ops on cpu: reference in plain torch, step by step: a trans")


LAYER, X = torchrnn.LSTM(4, 5), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (TypeError, "input must be a tensor for LSTM, got NoneType", lambda: explain(LAYER)),
        (TypeError, "input must be a tensor for LSTM, got list", lambda: explain(LAYER, [[1.0]])),
        (ValueError, r"input must be 2D or 3D, got \[4\]", lambda: explain(LAYER, X[0])),
        (ValueError, r"must be 1D or 2D, got \[1, 3, 4\]", lambda: explain(torchrnn.RNNCell(4, 5), X[None])),
        (ValueError, r"must be \[\.\.\., I\] with I=4, got \[4, 3\]", lambda: explain(LAYER, X.t())),
        (ValueError, "LSTM's dtype torch.float32, got torch.float64", lambda: explain(LAYER, X.double())),
        (ValueError, "must be on LSTM's device cpu, got meta", lambda: explain(LAYER, X.to("meta"))),
        (TypeError, "'module' .*is not an RNNCell", lambda: explain(nn.LSTM(4, 5), X)),
        (TypeError, "must be a nest of tensors, got int", lambda: explain(rnn_cell.GRUCell(3), 4)),
        (TypeError, "must be a nest of tensors, got list", lambda: explain(rnn_cell.GRUCell(3), [])),
    ],
)
def test_explain_refuses(error: type[Exception], text: str, call: Callable[[], str]) -> None:
    with pytest.raises(error, match=text):
        call()


# Tensors on several devices -------------------------------------------------------------------------------


def every_argument() -> dict[str, Any]:
    """Returns all floating tensors that a layer call can have, of an LSTM with a projection."""
    steps, batch, inputs, hidden, outputs = 4, 3, 5, 7, 6
    return {
        "x": torch.randn(steps, batch, inputs),
        "weight_ih": [torch.randn(4 * hidden, inputs)],
        "weight_hh": [torch.randn(4 * hidden, outputs)],
        "bias_ih": [torch.randn(4 * hidden)],
        "bias_hh": [torch.randn(4 * hidden)],
        "weight_hr": [torch.randn(outputs, hidden)],
        "peephole": [torch.randn(3, hidden)],
        "norm_gain": [torch.randn(5, hidden)],
        "norm_shift": [torch.randn(5, hidden)],
        "h0": torch.randn(1, batch, outputs),
        "c0": torch.randn(1, batch, hidden),
        "lengths": torch.tensor([1, 4, 2]),
        "resets": torch.zeros(steps, batch, dtype=torch.bool),
        "mask_h": torch.ones(1, 1, batch, outputs),
        "mask_c": torch.ones(1, 1, batch, hidden),
        "zoneout_h": torch.ones(1, 1, batch, outputs),
        "zoneout_c": torch.ones(1, 1, batch, hidden),
    }


def to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else [tensor.to("meta") for tensor in value]


@pytest.mark.parametrize("field", [name for name in every_argument() if name not in ("x", "lengths")])
@pytest.mark.parametrize("there", ["cpu", "meta"])
@pytest.mark.parametrize("grad", [False, True])
def test_one_tensor_on_another_device_is_named(field: str, there: str, grad: bool) -> None:
    given = every_argument()
    if there == "meta":
        given = {name: value if name == field else to_meta(value) for name, value in given.items()}
    else:
        given[field] = to_meta(given[field])
    got = "cpu" if there == "meta" else "meta"
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(ValueError, match=f"lstm: {field} must be on x's device {there}, got {got}"),
    ):
        torchrnn.ops.layer(torchrnn.ops.Arguments(**given), torchrnn.ops.Options())


def test_lengths_may_be_on_the_cpu() -> None:
    given = {name: value if name == "lengths" else to_meta(value) for name, value in every_argument().items()}
    a = torchrnn.ops.checked(torchrnn.ops.Arguments(**given), torchrnn.ops.Options())
    assert a.lengths is not None
    assert a.lengths.device.type == "meta"
