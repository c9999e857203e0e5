"""Cells by the specs of the golden files, the files' numbers, and the comparison with TensorFlow's."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import torchrnn
from torchrnn.contrib import rnn
from torchrnn.interop import load_tf_variables
from torchrnn.rnn_cell import base

GOLDEN = Path(__file__).parent / "golden"
TF1 = GOLDEN / "tf1"
ENTRIES: list[dict[str, Any]] = json.loads((TF1 / "index.json").read_text())["cases"]

# Scaled by 1 + |expected|. An independent implementation reaches 2e-14 and 5e-6.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5}

# How the unrolling functions run a cell: by their plan, or step by step.
WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "fused": contextlib.nullcontext,
    "stepwise": torchrnn.stepwise,
}


def classes(spec: Mapping[str, Any]) -> Iterator[str]:
    """Yields the classes of a spec; ``stack`` stands for a list of layers."""
    if spec["class"] != "stack":
        yield spec["class"]
    for inner in [
        *spec.get("cells", []),
        *spec.get("layers", []),
        *([spec["cell"]] if "cell" in spec else []),
    ]:
        yield from classes(inner)


def make(spec: Mapping[str, Any], own: Mapping[str, Callable[..., Any]] | None = None, **kwargs: Any) -> Any:
    """Builds the cell of a spec.

    Args:
        spec: The class with TensorFlow's constructor arguments, and the cells inside.
        own: Classes that are not torchrnn's.
        **kwargs: More arguments for the outermost cell.
    """
    kwargs = {**spec.get("kwargs", {}), **kwargs}
    if "residual_slice" in spec:
        size = spec["residual_slice"]
        kwargs["residual_fn"] = lambda inputs, outputs: inputs[..., :size] + outputs
    inside = [make(spec["cell"], own)] if "cell" in spec else []
    if "cells" in spec:
        inside = [[make(inner, own) for inner in spec["cells"]]]
    known: Any = (own or {}).get(spec["class"]) or getattr(rnn, spec["class"])
    return known(*inside, **kwargs)


def structured(cell: Any, leaves: Sequence[Tensor]) -> Any:
    """Returns the tensors of a state in the structure of the cell's."""
    return pytree.tree_unflatten(leaves, pytree.tree_structure(base.map_sizes(lambda _: 0, cell.state_size)))


def load(variables: Mapping[str, Tensor], cells: Mapping[str, Any]) -> dict[str, Tensor]:
    """Loads variables into cells, which that builds; returns the parameters by the variables' names.

    Args:
        variables: Values by TensorFlow's names; as many as the cells have.
        cells: Cells by the scope in which they stand: one, or the forward and then the backward ones.
    """
    each = list(cells.values())
    layers = len(each) // 2
    target: Any = (each[:layers], each[layers:]) if layers > 1 else tuple(each)
    if layers == 0:
        # A fused cell is no RNNCell, but has one.
        target = each[0].cell if isinstance(each[0], rnn.FusedRNNCell) else each[0]
    load_tf_variables(target, variables)
    found = {}
    for scope, cell in cells.items():
        for name, owner, attribute in cell.tf_names():
            found[scope + name] = getattr(owner, attribute)
    assert sorted(found) == sorted(variables)
    for name, value in variables.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=0, atol=0)
    return found


def assert_close(ours: Tensor, expected: Tensor, label: str, tolerance: float | None = None) -> None:
    """Asserts that ``|ours - expected| <= tolerance * (1 + |expected|)``, by default the dtype's."""
    assert ours.shape == expected.shape, f"{label}: {list(ours.shape)}, expected {list(expected.shape)}"
    assert ours.dtype == expected.dtype, f"{label}: {ours.dtype}, expected {expected.dtype}"
    if not expected.numel():
        return
    error = ((ours.detach() - expected).abs() / (1 + expected.abs())).max().item()
    tolerance = TOLERANCES[expected.dtype] if tolerance is None else tolerance
    # Written so that a NaN fails.
    assert error <= tolerance, f"{label}: scaled error {error:.2e} is above {tolerance:.0e}"


class Case:
    """A case of the index with its numbers.

    Args:
        entry: Of the index.
        dtype: What to compute in; by default what TensorFlow computed in.
    """

    def __init__(self, entry: Mapping[str, Any], dtype: torch.dtype | None = None) -> None:
        self.entry = entry
        self.dtype: torch.dtype = dtype or getattr(torch, entry["dtype"])
        with np.load(TF1 / entry["file"]) as arrays:
            tensors = {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}
        self.arrays = {
            key: value.to(self.dtype) if value.is_floating_point() else value
            for key, value in tensors.items()
        }

    def group(self, prefix: str) -> list[Tensor]:
        """Returns prefix0, prefix1, ... as new leaves."""
        return [self.arrays[f"{prefix}{k}"].clone() for k in range(self._count(prefix))]

    def _count(self, prefix: str) -> int:
        return sum(key.startswith(prefix) for key in self.arrays)

    @property
    def lengths(self) -> Tensor | None:
        """The lengths [B], None if TensorFlow had none."""
        return self.arrays.get("seq_len")

    def variables(self) -> dict[str, Tensor]:
        """Returns the variables' values by TensorFlow's names."""
        return {key[2:]: value for key, value in self.arrays.items() if key.startswith("w.")}

    def expected(self) -> dict[str, Tensor]:
        """Returns what is compared: outputs, final state, gradients."""
        prefixes = ("out.", "state.", "grad.")
        return {key: value for key, value in self.arrays.items() if key.startswith(prefixes)}

    def cells(self) -> dict[str, Any]:
        """Returns new cells by the variable scopes in which they stand."""
        spec, runner = self.entry["cell"], self.entry["runner"]
        if runner == "cell_step" or spec["class"] == "LSTMBlockFusedCell":
            return {"": self._make(spec)}
        if not runner.endswith(("bidirectional_rnn", "bidirectional_dynamic_rnn")):
            return {"rnn/": self._make(spec)}
        inner = "" if runner == "stack_bidirectional_rnn" else "bidirectional_rnn/"
        if spec["class"] != "stack":
            return {f"{inner}{side}/": self._make(spec) for side in ("fw", "bw")}
        return {
            f"stack_bidirectional_rnn/cell_{i}/{inner}{side}/": self._make(layer)
            for side in ("fw", "bw")
            for i, layer in enumerate(spec["layers"])
        }

    def _make(self, spec: Mapping[str, Any]) -> Any:
        kwargs: dict[str, Any] = {}
        if "noise" in self.entry:
            kinds = [name.split(".")[1] for name in self.entry["noise"]]
            kwargs["noise"] = {kind: self.arrays[f"noise.{kind}.0"] for kind in kinds if kind != "state"}
            if "state" in kinds:
                kwargs["noise"]["state"] = self._state_noise()
        if self.entry.get("variational"):
            input_size = self.arrays["x.0"].size(-1)
            kwargs |= {"variational_recurrent": True, "dtype": self.dtype, "input_size": input_size}
        return make(spec, **kwargs)

    def _state_noise(self) -> list[Tensor | None]:
        """Returns the noise of each state tensor; the file may leave out those that are not dropped."""
        noise = self.group("noise.state.")
        if len(noise) == self.entry["n_state"]:
            return list(noise)
        assert self.entry["state_size"]["type"] == "LSTMStateTuple"
        return [None, *noise]

    def run(self, cells: Sequence[Any], x: Sequence[Tensor], init: Sequence[Tensor]) -> tuple[Any, Any]:
        """Calls the case's function; returns nests of outputs and final states."""
        return RUNNERS[self.entry["runner"]](self, cells, x, init)

    def results(self) -> dict[str, Tensor]:
        """Runs new cells with the case's variables; returns what ``expected`` does, of ours."""
        cells = self.cells()
        x, init = self.group("x."), self.group("init.")
        parameters = load(self.variables(), cells)
        leaves = {f"grad.x.{k}": v for k, v in enumerate(x) if v.is_floating_point()}
        leaves |= {f"grad.init.{k}": v for k, v in enumerate(init)}
        for leaf in leaves.values():
            leaf.requires_grad_()
        leaves |= {f"grad.w.{name}": parameter for name, parameter in parameters.items()}
        outputs, states = (pytree.tree_leaves(v) for v in self.run(list(cells.values()), x, init))
        found = {f"out.{k}": v for k, v in enumerate(outputs)}
        found |= {f"state.{k}": v for k, v in enumerate(states)}
        loss = sum((value * self.arrays[f"coef.{key}"]).sum() for key, value in found.items())
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for (key, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            found[key] = torch.zeros_like(leaf) if gradient is None else gradient
        return found


def _only(values: Sequence[Any]) -> Any:
    """Returns the tensor of a list of one, else a tuple."""
    return values[0] if len(values) == 1 else tuple(values)


def _states(cells: Sequence[Any], init: Sequence[Tensor]) -> list[Any]:
    """Returns the initial state of each cell, of the tensors of all; None if there are none."""
    states: list[Any] = []
    rest = list(init)
    for cell in cells:
        count = len(pytree.tree_leaves(cell.state_size, is_leaf=base.is_size))
        states.append(structured(cell, rest[:count]) if init else None)
        rest = rest[count:]
    return states


def _dynamic(case: Case, cells: Sequence[Any], x: Sequence[Tensor], init: Sequence[Tensor]) -> Any:
    return torchrnn.dynamic_rnn(
        cells[0],
        _only(x),
        case.lengths,
        *_states(cells, init),
        case.dtype,
        time_major=case.entry["time_major"],
    )


def _static(case: Case, cells: Sequence[Any], x: Sequence[Tensor], init: Sequence[Tensor]) -> Any:
    steps = list(x[0].unbind())
    outputs, state = torchrnn.static_rnn(cells[0], steps, *_states(cells, init), case.dtype, case.lengths)
    return torch.stack(outputs), state


def _raw(case: Case, cells: Sequence[Any], x: Sequence[Tensor], init: Sequence[Tensor]) -> Any:
    steps, batch = x[0].shape[:2]
    lengths = torch.full((batch,), steps) if case.lengths is None else case.lengths

    def step(time: int, output: Any, state: Any, _: Any) -> Any:
        if time == 0:
            state = _states(cells, init)[0] if init else cells[0].zero_state(batch, case.dtype)
        return time >= lengths, x[0][min(time, steps - 1)], state, output, None

    outputs, state, loop_state = torchrnn.raw_rnn(cells[0], step)
    assert loop_state is None
    return outputs, state


def _step(case: Case, cells: Sequence[Any], x: Sequence[Tensor], init: Sequence[Tensor]) -> Any:
    inputs = _only([each[:, 0] for each in x])
    return cells[0](inputs, structured(cells[0], init))


def _bidirectional(case: Case, cells: Sequence[Any], x: Sequence[Tensor], init: Sequence[Tensor]) -> Any:
    return torchrnn.bidirectional_dynamic_rnn(
        *cells, x[0], case.lengths, *_states(cells, init), case.dtype, time_major=case.entry["time_major"]
    )


def _static_bidirectional(
    case: Case, cells: Sequence[Any], x: Sequence[Tensor], init: Sequence[Tensor]
) -> Any:
    outputs, *states = torchrnn.static_bidirectional_rnn(
        *cells, list(x[0].unbind()), *_states(cells, init), case.dtype, case.lengths
    )
    return torch.stack(outputs), states


def _halves(cells: Sequence[Any], init: Sequence[Tensor]) -> list[Any]:
    """Returns forward cells, backward cells, and the initial states of either."""
    layers, states = len(cells) // 2, _states(cells, init)
    halves = [list(cells[:layers]), list(cells[layers:])]
    return halves + ([states[:layers], states[layers:]] if init else [None, None])


def _stack_bidirectional(
    case: Case, cells: Sequence[Any], x: Sequence[Tensor], init: Sequence[Tensor]
) -> Any:
    fw, bw, *firsts = _halves(cells, init)
    outputs, *states = torchrnn.stack_bidirectional_dynamic_rnn(
        fw, bw, x[0], *firsts, case.dtype, case.lengths, time_major=case.entry["time_major"]
    )
    return outputs, states


def _stack_static_bidirectional(
    case: Case, cells: Sequence[Any], x: Sequence[Tensor], init: Sequence[Tensor]
) -> Any:
    fw, bw, *firsts = _halves(cells, init)
    outputs, *states = torchrnn.stack_bidirectional_rnn(
        fw, bw, list(x[0].unbind()), *firsts, case.dtype, case.lengths
    )
    return torch.stack(outputs), states


def _fused(case: Case, cells: Sequence[Any], x: Sequence[Tensor], init: Sequence[Tensor]) -> Any:
    cell = cells[0]
    if case.entry["cell"]["class"] != "LSTMBlockFusedCell":
        cell = rnn.FusedRNNCellAdaptor(cell, use_dynamic_rnn=True)
    if case.entry["runner"] == "fused_reversed":
        cell = rnn.TimeReversedFusedRNN(cell)
    state = _only(init) if init else None
    return cell(x[0], state, case.dtype, case.lengths)


RUNNERS: dict[str, Callable[[Case, Sequence[Any], Sequence[Tensor], Sequence[Tensor]], Any]] = {
    "dynamic_rnn": _dynamic,
    "static_rnn": _static,
    "raw_rnn": _raw,
    "cell_step": _step,
    "bidirectional_dynamic_rnn": _bidirectional,
    "static_bidirectional_rnn": _static_bidirectional,
    "stack_bidirectional_dynamic_rnn": _stack_bidirectional,
    "stack_bidirectional_rnn": _stack_static_bidirectional,
    "fused": _fused,
    "fused_reversed": _fused,
}
