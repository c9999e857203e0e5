"""Inference engines that read ONNX: ONNX Runtime and OpenVINO, on one model that is built in memory."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from bench.adapters.problem import Problem, Run
from bench.cases import Case

# The gates of ONNX in torch's numbering: i, o, f, c where torch has i, f, g, o; z, r, h where it has r, z, n.
ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}
# What both engines read; a newer one would refuse older engines without a need.
OPSET, IR = 17, 8


def missing(*modules: str) -> str | None:
    """Returns which of the modules are not installed, or None."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def reorder(weight: Tensor, cell: str) -> Tensor:
    """Returns the gates, blocks of the first dimension, in the order of ONNX."""
    blocks = weight.chunk(len(ORDER[cell]))
    return torch.cat([blocks[gate] for gate in ORDER[cell]])


def initializers(problem: Problem, layer: int) -> dict[str, Tensor]:
    """Returns the weights of a layer as ONNX wants them: W [D, G*H, I], R [D, G*H, H], B [D, 2*G*H]."""
    case, weights = problem.case, problem.weights
    suffixes = [f"_l{layer}", f"_l{layer}_reverse"][: case.directions]
    w, r, b, c = (
        torch.stack([reorder(weights[name + suffix], case.cell) for suffix in suffixes])
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    return {f"W{layer}": w, f"R{layer}": r, f"B{layer}": torch.cat([b, c], 1)}


def layer_nodes(case: Case, layer: int, x: str, y: str) -> list[Any]:
    """Returns the nodes of one layer: from input and output [T, B, F] to those of ONNX, [T, D, B, H]."""
    from onnx import helper

    states = ["h", "c"] if case.cell == "lstm" else ["h"]
    first = [f"{s}0_{layer}" if case.streaming else "" for s in states]
    extra = {} if case.cell == "lstm" else {"linear_before_reset": 1}
    raw = f"raw{layer}"
    recurrent = helper.make_node(
        case.cell.upper(),
        [x, f"W{layer}", f"R{layer}", f"B{layer}", "lengths" if case.ragged else "", *first],
        [raw, *(f"{s}{layer}" for s in states)],
        hidden_size=case.hidden,
        direction="bidirectional" if case.directions == 2 else "forward",
        **extra,
    )
    if case.directions == 1:
        return [recurrent, helper.make_node("Squeeze", [raw, "direction_axis"], [y])]
    turned = f"turned{layer}"
    return [
        recurrent,
        helper.make_node("Transpose", [raw], [turned], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", [turned, "output_shape"], [y]),
    ]


def state_nodes(case: Case, name: str) -> list[Any]:
    """Returns the nodes between the layers' states [D, B, H] and those of the model, [L*D, B, H]."""
    from onnx import helper

    layers = range(case.layers)
    nodes = [helper.make_node("Concat", [f"{name}{layer}" for layer in layers], [f"{name}_n"], axis=0)]
    if case.streaming:
        parts = [f"{name}0_{layer}" for layer in layers]
        split = helper.make_node("Split", [f"{name}_0"], parts, axis=0)
        return [split, *nodes]
    return nodes


def build(problem: Problem) -> bytes:
    """Returns the model of a case: y, h_n (and c_n) of x, lengths if ragged, and states if streaming."""
    from onnx import TensorProto, helper, numpy_helper

    case = problem.case
    states = ["h", "c"] if case.cell == "lstm" else ["h"]
    outputs = case.directions * case.hidden
    state_shape = [case.layers * case.directions, case.batch, case.hidden]
    reshaping = {"direction_axis": [1]} if case.directions == 1 else {"output_shape": [0, 0, -1]}
    constants = {name: torch.tensor(values) for name, values in reshaping.items()}
    heads: list[Any] = []
    tails: list[Any] = []
    for name in states:
        *head, tail = state_nodes(case, name)
        heads += head
        tails.append(tail)
    body: list[Any] = []
    for layer in range(case.layers):
        constants |= initializers(problem, layer)
        y = "y" if layer == case.layers - 1 else f"y{layer}"
        body += layer_nodes(case, layer, f"y{layer - 1}" if layer else "x", y)

    def value(name: str, shape: list[int], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [value("x", [case.steps, case.batch, case.inputs])]
    inputs += [value("lengths", [case.batch], TensorProto.INT32)] if case.ragged else []
    inputs += [value(f"{name}_0", state_shape) for name in states] if case.streaming else []
    graph = helper.make_graph(
        [*heads, *body, *tails],
        case.id,
        inputs,
        [value("y", [case.steps, case.batch, outputs]), *(value(f"{s}_n", state_shape) for s in states)],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    return bytes(model.SerializeToString())


def feed(problem: Problem) -> dict[str, Any]:
    """Returns the inputs of the model by name."""
    import numpy as np

    inputs = {"x": problem.x.numpy()}
    if problem.lengths is not None:
        inputs["lengths"] = problem.lengths.numpy().astype(np.int32)
    return inputs | {f"{s}_0": part.numpy() for s, part in zip("hc", problem.state, strict=False)}


class OnnxPeer:
    """What both engines have in common."""

    own_threads = True

    def supports(self, case: Case) -> bool:
        return case.cell in ORDER and case.mode == "infer" and case.dtype == "float32"


class OnnxRuntime(OnnxPeer):
    name = "onnxruntime"

    def available(self) -> str | None:
        return missing("onnx", "onnxruntime")

    def prepare(self, problem: Problem) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(build(problem), options, providers=["CPUExecutionProvider"])
        inputs = feed(problem)
        return lambda: session.run(None, inputs)


class OpenVino(OnnxPeer):
    name = "openvino"

    def available(self) -> str | None:
        return missing("onnx", "openvino")

    def prepare(self, problem: Problem) -> Run:
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = core.compile_model(core.read_model(build(problem)), "CPU", settings).create_infer_request()
        inputs = feed(problem)

        def run() -> list[Any]:
            # Without copies, as its users call it where a copy would count.
            return list(request.infer(inputs, share_inputs=True, share_outputs=True).values())

        return run
