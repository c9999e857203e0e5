"""Which path a call takes on CUDA, what the ops are told of it, and what ``explain`` says; without a GPU.

One file, as what ``explain`` says must be what the table chooses and the ops are told.
"""

from __future__ import annotations

import contextlib
import runpy
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import needs_kernels
from host_build import CSRC, TESTS, build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchrnn
from torchrnn import _native, cuda, explain, rnn_cell
from torchrnn.rnn_cell import DropoutWrapper, LSTMCell, MultiRNNCell

KERNELS = f"CPU kernels ({_native.isa()})"
HOPPER = (9, 0)


@pytest.fixture(autouse=True)
def _nothing_is_forced() -> Iterator[None]:
    """Undoes what the environment forces."""
    with cuda.use_path("auto"):
        yield


# The table ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dispatch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dispatch"), TESTS / "cuda" / "dispatch_test.cpp")


@pytest.mark.parametrize(
    "test", ["table", "bounds", "plain", "first_row", "not_served", "forced", "admits", "per_device"]
)
def test_the_table_chooses(dispatch: Path, test: str) -> None:
    done = subprocess.run([dispatch, test], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Returns ``torchrnn._C_cuda`` without ops, on the device of ``dispatch_test.cpp``."""
    sources = (CSRC / "cuda" / "module.cpp", TESTS / "cuda" / "dispatch_test.cpp")
    flags = ("-shared", "-fPIC", "-DPy_LIMITED_API=0x030A0000", f"-isystem{sysconfig.get_path('include')}")
    path = build(tmp_path_factory.mktemp("library"), *flags, *sources)
    loader = ExtensionFileLoader("torchrnn._C_cuda", str(path))
    spec = spec_from_loader("torchrnn._C_cuda", loader)
    assert spec is not None
    return module_from_spec(spec)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, library: ModuleType) -> None:
    """The library seems to be that of torchrnn."""
    monkeypatch.setitem(sys.modules, "torchrnn._C_cuda", library)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)


CALL = {
    "device": 90,
    "forced": 2,
    "dtype": 3,
    "cell": 1,
    "activation": 2,
    "steps": 2**40,
    "batch": 2**41,
    "hidden": 2**42,
    "directions": 2,
    "projected": True,
    "tf32": True,
}


@pytest.mark.usefixtures("loaded")
def test_the_library_tells_what_the_table_says() -> None:
    path, why, why_not = _native.cuda_path(**CALL)
    assert (cuda.PATHS[path], why) == ("cluster", "it is forced")
    assert why_not == (
        f"cell 1, activation 2, dtype 3, T {2**40}, B {2**41}, H {2**42}, D 2, projected 1, clipped 0, "
        "tf32 1, device 90, capability 90"
    )
    path, why, why_not = _native.cuda_path(**CALL | {"forced": 0})
    assert (cuda.PATHS[path], why_not) == ("step", None)
    assert (path, why) in _native.cuda_rows(device=90, dtype=3)
    float64 = _native.DTYPES.index(torch.float64)
    assert _native.cuda_path(**CALL | {"dtype": float64})[2] == "the dtype is float64"
    assert _native.cuda_path(**CALL | {"forced": 1}) == (1, "it is forced", None)
    for wrong in (CALL | {"peephole": True}, {name: n for name, n in CALL.items() if name != "tf32"}):
        with pytest.raises(TypeError):
            _native.cuda_path(**wrong)


# What is forced -------------------------------------------------------------------------------------------


def test_a_path_is_forced_inside_the_block() -> None:
    def forced() -> str:
        return cuda.PATHS[cuda.forced()]

    with cuda.use_path("cluster"):
        assert forced() == "cluster"
        with pytest.raises(ZeroDivisionError), cuda.use_path("step"):
            assert forced() == "step"
            _ = 1 / 0
        with cuda.use_path("auto"):
            assert forced() == "auto"
        assert forced() == "cluster"
    assert forced() == "auto"


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
        assert train() == [("layer_train", allowed, code), ("layer_backward", allowed, code)]
        assert infer() == [("layer_infer", allowed, code)]
        names = [name for name, *told in train(recompute=True) if told == [allowed, code]]
    assert names == ["layer_infer", "layer_train", "layer_backward"]


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
        assert train(device="cpu") == [("layer_train", False, 0), ("layer_backward", False, 0)]


def test_compiled_calls_follow_flag_and_path(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[tuple[bool, int]] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        (node,) = [node for node in module.graph.nodes if "torchrnn.layer" in str(node.target)]
        names = [a.name for a in torch.ops.torchrnn.layer.default._schema.arguments]
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
    for base in (nn.RNNBase, nn.RNNCellBase):
        monkeypatch.setattr(base, "reset_parameters", lambda _: None)  # Fake CUDA draws no numbers.
    return FakeTensorMode()


@needs_kernels
def test_explain_says_what_runs_on_the_cpu() -> None:
    layer, x = torchrnn.LSTM(4, 5, num_layers=2, batch_first=True), torch.randn(6, 30, 4)
    name = "LSTM(4, 5, num_layers=2, batch_first=True)"
    assert explain(layer, x) == explain(layer, x[0]) == f"{name}: {KERNELS}"
    with torchrnn.prepack(layer):
        assert explain(layer, x) == f"{name}: {KERNELS}, on prepacked weights"
    cell = torchrnn.GRUCell(4, 5)
    for one in (torch.randn(4), torch.randn(2, 4)):
        assert explain(cell, one) == f"GRUCell(4, 5): {KERNELS}"


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


@pytest.mark.usefixtures("loaded")
def test_explain_says_which_path_runs_on_cuda_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = LSTMCell(3)
    step = "step path: it serves every call, and no committed result shows a faster path"
    with on_cuda(monkeypatch):
        layer, x = torchrnn.GRU(4, 64, device="cuda"), torch.empty(16, 3, 4, device="cuda")
        kernels = "CUDA kernels (capability 9.0)"
        assert explain(layer, x) == f"GRU(4, 64): {kernels}, {step}"
        assert explain(cell, x).splitlines()[-1] == f"ops on cuda:0: {kernels}, {step}"
        with cuda.use_path("step"):
            assert explain(layer, x).endswith(", step path: it is forced")
            assert explain(cell, x).endswith(", step path: it is forced")
        with cuda.use_path("cluster"):
            raises = "cluster path: it is forced, but the call raises: cell 1, "
            assert f"{kernels}, {raises}" in explain(layer, x)
            assert explain(cell, x).endswith("path: it is forced, and a call that it does not serve raises")


@pytest.mark.parametrize(
    ("make", "sizes", "changes"),
    [
        (lambda: torchrnn.LSTM(4, 5), (7, 3, 4), {}),
        (lambda: torchrnn.LSTM(4, 5, batch_first=True), (3, 7, 4), {}),
        (lambda: torchrnn.LSTM(4, 5), (7, 4), {"batch": 1}),
        (lambda: torchrnn.LSTM(4, 6, proj_size=2), (7, 3, 4), {"hidden": 6, "projected": True}),
        (lambda: torchrnn.LSTM(4, 5, dtype=torch.float16), (7, 3, 4), {"dtype": 3}),
        (lambda: torchrnn.GRU(4, 5, bidirectional=True), (7, 3, 4), {"cell": 1, "directions": 2}),
        (lambda: torchrnn.GRU(4, 5, reset_after=False), (7, 3, 4), {"cell": 2}),
        (lambda: torchrnn.RNN(4, 5, nonlinearity="relu"), (7, 3, 4), {"cell": 3, "activation": 1}),
        (lambda: torchrnn.LSTMCell(4, 5), (3, 4), {"steps": 1}),
    ],
)
def test_explain_asks_for_the_call_that_a_layer_makes(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Any],
    sizes: tuple[int, ...],
    changes: dict[str, int],
) -> None:
    asked: list[dict[str, int]] = []

    def path(**call: int) -> tuple[int, str, None]:
        asked.append(call)
        return 2, "it is told so", None

    monkeypatch.setattr(_native, "cuda_path", path)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with on_cuda(monkeypatch), torch.device("cuda"):
        layer = make()
        x = torch.empty(sizes, dtype=next(layer.parameters()).dtype)
        assert explain(layer, x).endswith(", cluster path: it is told so")
    usual = {"device": 0, "forced": 0, "dtype": 0, "cell": 0, "activation": 0, "steps": 7, "batch": 3}
    usual |= {"hidden": 5, "directions": 1, "projected": False, "tf32": False}
    assert asked == [usual | changes]


def test_explain_lists_the_rows_for_the_dtype_of_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {_native.DTYPES.index(torch.float16): [(2, "it is narrow"), (1, "it is wide")]}
    monkeypatch.setattr(_native, "cuda_rows", lambda _, dtype: rows.get(dtype, [(1, "it is alone")]))
    cell = LSTMCell(3)

    def says(dtype: torch.dtype) -> str:
        return explain(cell, torch.empty(16, 3, 4, device="cuda", dtype=dtype)).rsplit("), ")[-1]

    with on_cuda(monkeypatch):
        assert says(torch.float16) == "cluster path: it is narrow; step path: it is wide"
        assert says(torch.float32) == says(torch.int64) == "step path: it is alone"
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
        assert says(torch.float32) == says(torch.float16) != says(torch.int64)


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
COMPLEX = torchrnn.LSTM(4, 5, dtype=torch.complex64)


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
        (
            ValueError,
            "must be float32, float64, .* got torch.complex64",
            lambda: explain(COMPLEX, X.cfloat()),
        ),
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
