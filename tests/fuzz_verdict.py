"""What becomes of a call of an op, and what must: the reference's results, or an error that names it.

One file, as every op's reference and the rules for its errors read the same call.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fuzz_calls import Arguments, Call, schema
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import _pytree as pytree

from torchrnn import dropout, ops, scan
from torchrnn.differentiable import DifferentiableOp
from torchrnn.options import CELLS
from torchrnn.reference import PARTS

LARGE = 1 << 24
"""Numbers in a tensor that the reference is spared."""
DIFFERENTIABLE = {"layer", "layer_infer", "scan", "scan_infer", "dropout"}
"""The ops with a gradient of their own."""
MAPPED = {*DIFFERENTIABLE, "layer_backward", "scan_backward"}
"""The ops that vmap takes."""
EITHER = {
    "other type", "wrapper", "subclass", "sparse", "mkldnn", "nested", "quantized", "zero tensor", "huge",
}  # fmt: skip
"""What an op may refuse or compute."""
MUST_FAIL = {"no memory"}
WITHOUT_TENSORS = {"isa", "isa_supported", "set_isa", "fma_peak", "read_bandwidth"}
ALIASES = {
    "layer_packed": ("sizes",),
    **dict.fromkeys(("set_isa", "fma_peak", "read_bandwidth", "isa_supported"), ("instruction",)),
}
"""Words that stand for arguments in an error."""
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Over the largest number, of those that are not noise where the rest cancels."""
SMALL = 1e-3


# The reference --------------------------------------------------------------------------------------------


class Refused(Exception):
    """The arguments are none that the op takes."""


def need(holds: bool, name: str) -> None:
    if not holds:
        raise Refused(name)


def layer(a: Arguments) -> Any:
    inputs, options = ops.LAYER._split(list(a.values()))
    ops.LAYER._check(inputs, options)
    return ops.LAYER.reference(inputs, options)


def scanned(a: Arguments) -> Any:
    inputs, options = scan.SCAN._split(list(a.values()))
    scan.SCAN._check(inputs, options)
    return scan.SCAN.reference(inputs, options)


def train(family: DifferentiableOp, forward: Callable[[Arguments], Any]) -> Callable[[Arguments], Any]:
    def reference(a: Arguments) -> Any:
        tape = family.fake(*family._split(list(a.values())))[-1]
        return *forward(a), tape.fill_(math.nan)  # Which stands for anything: backward tells if it is right.

    return reference


def backward(family: DifferentiableOp, forward: Callable[[Arguments], Any]) -> Callable[[Arguments], Any]:
    def reference(a: Arguments) -> Any:
        if "all_states" in a:
            a = {**a, "all_states": True}  # dc_all is the gradient by c_all, whoever asked for that.
        values = list(a.values())
        douts, inputs, options, _ = family._split_backward(values)
        names = list(a)[len(douts) :]
        forward(dict(zip(names, [*inputs, *options], strict=False)))
        *outputs, tape = family.fake(inputs, options)
        for name, given, wanted in zip(a, douts, outputs, strict=False):
            need(given is None or (wanted.dim() != 1 and same_form(given, wanted)), name)
        need(same_form(a["tape"], tape) or tape.dim() == 1, "tape")  # There is nothing to read of such a one.
        need(same_form(a["y"], outputs[0]) if a["y"] is not None else not family.keeps_y(options), "y")
        return family._backward_fallback(*values)

    return reference


def same_form(given: Tensor, wanted: Tensor) -> bool:
    return (given.shape, given.dtype, given.device) == (wanted.shape, wanted.dtype, wanted.device)


def plain_layer(a: Arguments) -> Any:
    fixed = {"peephole": False, "norm": False, "cell_clip": None, "proj_clip": None, "norm_eps": 0.0}
    fixed |= {"tf32": False, "path": 0, "all_states": False}
    absent = dict.fromkeys(("h0", "c0", "lengths", "resets", "mask_h", "mask_c"))
    full = {**fixed, **absent, "activation": 0, "reverse": False, **a}
    y, _, h_n, c_n = layer({name: full[name] for name in schema("layer")})
    return y, h_n, c_n


def plain_cell(a: Arguments) -> Any:
    need(a["x"].dim() == 2, "x")
    need((a["bias_ih"] is None) == (a["bias_hh"] is None), "bias_ih")
    given = {
        "x": a["x"][None],
        "weights": [a[name] for name in PARTS[:4] if a[name] is not None],
        "h0": None if a["h0"] is None else a["h0"][None],
        "c0": None if a["c0"] is None else a["c0"][None],
        "cell": a["cell"],
        "activation": a["activation"],
        "bias": a["bias_ih"] is not None,
        "projection": False,
    }
    _, h_n, c_n = plain_layer(given)
    return h_n[0], c_n if c_n.dim() == 1 else c_n[0]


def pack(a: Arguments) -> Any:
    """What a layer with these weights computes."""
    need(bool(a["weights"]) and a["weights"][0].dim() == 2, "weights")
    return plain_layer({"x": _some_x(a), **a})


def computed_by_packed(a: Arguments, packed: Tensor) -> Any:
    """What a layer computes with what was packed."""
    rows, outputs = a["weights"][1].shape
    directions = len(a["weights"]) // (2 + 2 * a["bias"] + a["projection"])
    sizes = rows // list(CELLS.values())[a["cell"]].gates, outputs, directions
    codes = a["cell"], 0
    packed_op = torch.ops.torchrnn.layer_packed
    return packed_op(_some_x(a), packed, *[None] * 4, *codes, *sizes, a["projection"], False)


def _some_x(a: Arguments) -> Tensor:
    first = a["weights"][0]
    return torch.linspace(-1, 1, 6 * first.size(1)).view(2, 3, -1).to(first.dtype)


def layer_packed(a: Arguments, call: Call) -> Any:
    for name in ("cell", "hidden", "outputs", "directions", "projection"):
        need(a[name] == call.valid[name], name)
    packed, weights = call.valid["packed"], call.weights
    if call.context == "meta":
        packed, weights = _to_meta(packed), [_to_meta(w) for w in weights]
    need(same_form(a["packed"], packed) and a["packed"].is_contiguous(), "packed")
    need(call.context == "meta" or torch.equal(a["packed"], packed), "packed")
    x = a["x"]
    wide = torch.promote_types(x.dtype, torch.float32)
    need(wide == packed.dtype, "packed")
    count = len(weights) // call.valid["directions"]
    a = {name: value for name, value in a.items() if name in schema("layer")}
    # With states in x's dtype, but weights of any that is computed in the same.
    for name in ("h0", "c0"):
        need(a[name] is None or a[name].dtype == x.dtype, name)
        a[name] = None if a[name] is None else a[name].to(wide)
    a |= {"x": x.to(wide), "weights": [w.to(wide) for w in weights]}
    a["bias"] = count - a["projection"] == 4
    return tuple(out.to(x.dtype) for out in plain_layer(a))


def dropped(a: Arguments) -> Any:
    dropout._check_call(a["x"], a["seed"], a["keep"])
    return dropout._reference(a["x"], a["seed"], a["keep"])


def supported(a: Arguments) -> bool:
    return 0 <= a["isa"] < 3 and torch.ops.torchrnn.isa_supported(a["isa"])


def rate(a: Arguments) -> None:
    need("isa" not in a or supported(a), "isa")
    need(0 <= a["seconds"] <= 60, "seconds")
    need(1 <= a["threads"] <= 4096, "threads")


REFERENCES: dict[str, Callable[..., Any]] = {
    "layer": layer,
    "layer_infer": layer,
    "layer_train": train(ops.LAYER, layer),
    "layer_backward": backward(ops.LAYER, layer),
    "plain_layer": plain_layer,
    "plain_cell": plain_cell,
    "pack": pack,
    "layer_packed": layer_packed,
    "scan": scanned,
    "scan_infer": scanned,
    "scan_train": train(scan.SCAN, scanned),
    "scan_backward": backward(scan.SCAN, scanned),
    "dropout": dropped,
    "isa": lambda _: None,
    "isa_supported": lambda _: None,
    "set_isa": lambda a: need(supported(a), "isa"),
    "fma_peak": rate,
    "read_bandwidth": rate,
}


def reference(call: Call) -> Any:
    """Returns what the call must give; raises if it must be refused."""
    a = parsed(call)
    with torch.no_grad():
        if call.op == "layer_packed":
            return layer_packed(a, call)
        return REFERENCES[call.op](a)


def parsed(call: Call) -> Arguments:
    """Returns the arguments as a schema has them, and tensors as plain ones."""
    kinds = schema(call.op)
    found = {
        name: bool(value) if kinds[name] == "bool" else _each(dense, value)
        for name, value in call.arguments.items()
    }
    if call.context == "meta":
        return {name: _each(_to_meta, value) for name, value in found.items()}
    return found


def dense(value: Any) -> Any:
    """Returns the numbers of a tensor as a plain one; others as they are."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, TwoTensor):
        value = value.a
    if value.is_nested:
        value = torch.stack(value.unbind())
    if value.layout != torch.strided:
        value = value.to_dense()
    return value.detach().as_subclass(Tensor).resolve_neg() if not value.is_quantized else value


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    return [change(item) for item in value] if isinstance(value, list) else change(value)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


# The call -------------------------------------------------------------------------------------------------


def run(call: Call) -> Any:
    """Makes the call in its context; returns the results, and the gradients where it has some."""
    op = getattr(torch.ops.torchrnn, call.op).default
    values = list(call.arguments.values())
    if call.context == "vmap":
        return torch.vmap(lambda first: op(first, *values[1:]))(torch.stack((values[0], values[0])))
    if call.context == "meta":
        return op(*[_each(_to_meta, value) for value in values])
    contexts: dict[str, Callable[[], Any]] = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    with contexts.get(call.context, contextlib.nullcontext)():
        return op(*values)


def _to_meta(value: Any) -> Any:
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    is_plain = is_plain and not value.is_quantized
    return value.to("meta") if is_plain else value


def gradients(results: Any, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    outputs = [out for out in _tensors(results) if out.requires_grad]
    weights = [torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype) for out in outputs]
    if not outputs or not inputs:
        return [None] * len(inputs)
    return list(torch.autograd.grad(outputs, inputs, weights, allow_unused=True))


def differentiable(call: Call) -> list[Tensor]:
    """Returns the tensors that the call is differentiated by, if it is."""
    if call.context != "grad" or call.op not in DIFFERENTIABLE:
        return []
    plain = [t for t in _tensors(list(call.arguments.values())) if type(t) in (Tensor, torch.nn.Parameter)]
    return [t for t in plain if t.is_floating_point() and t.layout == torch.strided and not t.is_quantized]


def judge(call: Call) -> tuple[str, str]:
    """Makes the call; returns ``accepted``, ``refused`` or ``wrong``, and why."""
    inputs = _tensors(list(call.arguments.values()))
    small = [t for t in inputs if _is_small(t) and call.context != "vmap"]
    before = [t.clone() for t in small]
    wanted = differentiable(call) if all(map(_is_small, inputs)) else []
    for t in wanted:
        t.requires_grad_()
    try:
        results = run(call)
        found = gradients(results, wanted)
    except Exception as error:
        return _refusal(call, error)
    for t, value in zip(small, before, strict=True):
        if not torch.equal(t.detach().nan_to_num(), value.detach().nan_to_num()):
            return "wrong", "an argument was written to"
    problem = _problem(call, results, wanted, found)
    return ("wrong", problem) if problem else ("accepted", "")


def _is_small(t: Tensor) -> bool:
    """Whether a tensor is one that can be looked at."""
    if type(t) not in (Tensor, torch.nn.Parameter) or t.device.type != "cpu" or t.layout != torch.strided:
        return False
    if t.is_quantized or t.is_nested or t.dtype == torch.float8_e4m3fn or t.numel() > LARGE:
        return False
    return (
        t.numel() == 0 or t._is_zerotensor() or t.untyped_storage().nbytes() >= t.element_size() * t.numel()
    )


def _refusal(call: Call, error: Exception) -> tuple[str, str]:
    text = " ".join(str(error).split())
    said = f"{type(error).__name__}: {text[:300]}"
    # Where memory cannot be allocated, torch's stable ABI says no more than that a call has failed.
    asks_too_much = isinstance(error, MemoryError) or re.search("memory|overflow|API call failed", text)
    if asks_too_much and _is_huge(call):
        return "refused", said
    if not isinstance(error, RuntimeError | ValueError | TypeError):
        return "wrong", f"raises {said}"
    if call.context == "vmap" and call.op not in MAPPED:
        return "refused", said
    # Of the dispatcher, where a layout, a device or an empty list has no kernel; a valid call has one.
    has_no_kernel = bool(call.changes or call.context) and isinstance(error, NotImplementedError)
    has_no_kernel = has_no_kernel and f"torchrnn::{call.op}" in text
    # torch hands over a tensor that is not defined, and has words of its own about it.
    is_of_torch = any(_is_none(value, schema(call.op)[name]) for name, value in call.arguments.items())
    # So it does about two subclasses in one call.
    is_of_torch = is_of_torch or {"wrapper", "subclass"} <= set(call.changes.values())
    names = {*schema(call.op), *PARTS, *ALIASES.get(call.op, ())}
    if not set(re.findall(r"\w+", text)) & names and not has_no_kernel and not is_of_torch:
        return "wrong", f"names no argument: {said}"
    may_refuse = has_no_kernel or set(call.changes.values()) & (EITHER | MUST_FAIL) or not _fit(call)
    if may_refuse or _reference_refuses(call):
        return "refused", said
    return "wrong", f"refuses what the reference takes: {said}"


def _reference_refuses(call: Call) -> bool:
    try:
        reference(call)
    except Exception:  # Of any kind: torch's operators, of which it is made, refuse in many ways.
        return True
    return False


def _is_none(value: Any, kind: str) -> bool:
    """Whether None stands for a tensor that must be there."""
    return value is None if kind == "Tensor" else isinstance(value, list) and None in value


def _is_huge(call: Call) -> bool:
    """Whether a call asks for more memory than there is."""
    numbers = [value for value in call.arguments.values() if isinstance(value, int)]
    return "huge" in call.changes.values() or any(not 0 <= number < 2**31 for number in numbers)


def _fit(call: Call) -> bool:
    """Whether numbers are of the types of the schema."""
    kinds = {"int": int, "float": float | int, "bool": bool}
    for name, kind in schema(call.op).items():
        value, wanted = call.arguments[name], kind.removeprefix("Optional[").removesuffix("]")
        if wanted not in kinds or (value is None and kind.startswith("Optional")):
            continue
        if not isinstance(value, kinds[wanted]) or (isinstance(value, int) and not -(2**63) <= value < 2**63):
            return False
    return True


def _problem(call: Call, results: Any, wanted: list[Tensor], found: list[Tensor | None]) -> str:
    """Returns what is wrong with the results of a call that was accepted, or nothing."""
    failed = [f"{how} {name}" for name, how in call.changes.items() if how in MUST_FAIL]
    if failed and call.context != "meta":
        return f"accepts {', '.join(failed)}"
    if any(not t.is_nested and t.numel() > LARGE for t in _tensors(list(call.arguments.values()))):
        return ""
    try:
        expected = reference(call)
        if call.op == "pack":
            results = computed_by_packed(parsed(call), results)
        theirs: list[Tensor | None] = []
        if wanted:
            theirs = gradients(REFERENCES[call.op](call.arguments), wanted)
    except Exception as error:
        if call.context == "meta" and call.op == "layer_packed":
            return ""  # Without the weights it can tell no more than the sizes.
        text = " ".join(str(error).split())[:300]
        return f"accepts what the reference refuses: {type(error).__name__}: {text}"
    if call.context == "vmap":
        expected = pytree.tree_map(lambda t: torch.stack((t, t)), expected)
    # Gradients of numbers that are not finite become NaN in other ways.
    is_not_compared = call.op in WITHOUT_TENSORS or (
        "values" in call.changes.values() and (call.op.endswith("_backward") or wanted)
    )
    if is_not_compared:
        return ""
    return compare(call, results, expected) or compare(call, found, theirs, "gradient ")


def compare(call: Call, ours: Any, theirs: Any, what: str = "result ") -> str:
    """Returns what is wrong, or nothing."""
    ours, theirs = ([None if t is None else dense(t) for t in _flat(side)] for side in (ours, theirs))
    if len(ours) != len(theirs):
        return f"{what}count: {len(ours)}, wanted {len(theirs)}"
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our is None or their is None:
            if (our if their is None else their) is not None and (our if their is None else their).any():
                return f"{what}{i}: ours {our}, wanted {their}"
            continue
        if not same_form(our, their):
            return f"{what}{i}: {our.dtype} {list(our.shape)}, wanted {their.dtype} {list(their.shape)}"
        is_tape = call.op.endswith("_train") and i == len(ours) - 1
        if our.device.type == "meta" or is_tape or our.numel() == 0:
            continue
        error = _error(our.double(), their.double())
        if error > TOLERANCES[our.dtype]:
            return f"{what}{i}: {our.dtype} {list(our.shape)} off by {error:.2e}"
    return ""


def _flat(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]


def _error(our: Tensor, their: Tensor) -> float:
    """Returns the largest difference over the largest number; infinite where only one is finite.

    NaN and infinity are the same: n + z (h - n) gives the one where z h + (1 - z) n gives the other.
    """
    finite = their.isfinite()
    if not torch.equal(our.isfinite(), finite):
        return math.inf
    if not finite.any():
        return 0.0
    return float((our - their)[finite].abs().max() / max(their[finite].abs().max(), SMALL))
