"""Random calls of every op: valid ones, and what spoils their arguments.

A call follows from a seed and its number alone, so that each can be made again. One file, as the valid
arguments of the ops and what spoils them go through the same schemas.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from torchrnn import _native, ops, scan
from torchrnn.options import ACTIVATIONS, CELLS
from torchrnn.reference import PARTS

Arguments = dict[str, Any]
"""By the names of a schema, in its order."""
Random = random.Random

OPS = {
    name.removeprefix("torchrnn::").partition(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("torchrnn::")
}
CONTEXTS = ("", "", "", "grad", "no_grad", "inference", "vmap", "meta", "autocast")


class Call(NamedTuple):
    """One call of an op."""

    op: str
    arguments: Arguments
    valid: Arguments
    """What the arguments were before they were changed."""
    changes: dict[str, str]
    """What was done to which argument."""
    context: str
    isa: str | None
    weights: list[Tensor]
    """What was packed, for layer_packed."""

    def __str__(self) -> str:
        given = ", ".join(f"{name}={text_of(value)}" for name, value in self.arguments.items())
        changed = ", ".join(f"{how} {name}" for name, how in self.changes.items()) or "valid"
        return f"{self.op}({given}) [{', '.join(filter(None, (changed, self.context, self.isa)))}]"


def text_of(value: Any) -> str:
    """Returns a short text for an argument."""
    if isinstance(value, list):
        return f"[{', '.join(map(text_of, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)
    if value.is_nested:
        return f"nested {value.size(0)}"
    kind = "" if type(value) is Tensor else f"{type(value).__name__} "
    layout = "" if value.layout == torch.strided else f" {value.layout}".replace("torch.", "")
    device = "" if value.device.type == "cpu" else f" {value.device}"
    return f"{kind}{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{layout}{device}"


def schema(op: str) -> dict[str, str]:
    """Returns the types of an op's arguments by their names."""
    found = getattr(torch.ops.torchrnn, op).default._schema.arguments
    return {argument.name: str(argument.type) for argument in found}


def make_call(op: str | None, seed: int, number: int) -> Call:
    """Makes one call: of an op, or of any, as it comes."""
    rng = Random(f"{seed} {number}")
    torch.manual_seed(rng.getrandbits(60))
    op = op or rng.choice(sorted(OPS))
    isas = _native.isas()
    isa = rng.choice(isas) if isas else None
    if isa is not None:
        torch.ops.torchrnn.set_isa(_native.ISAS.index(isa))
    valid = VALID[op](rng)
    weights = valid.pop("weights of", [])
    assert list(valid) == list(schema(op)), f"{op}: {list(valid)}"
    changes: dict[str, str] = {}
    spoilt = spoil(rng, op, valid, changes)
    if op.endswith("_backward"):
        _complete(op, spoilt, changes)
    context = rng.choice(CONTEXTS) if any("Tensor" in kind for kind in schema(op).values()) else ""
    if context == "vmap" and not _can_be_mapped(next(iter(spoilt.values()))):
        context = ""
    if context == "meta" and "meta" in changes.values():
        context = ""
    return Call(op, spoilt, valid, changes, context, isa, weights)


def _can_be_mapped(value: Any) -> bool:
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    return is_plain and not value.is_quantized and value.numel() < 1 << 24 and not _lacks_memory(value)


def _lacks_memory(t: Tensor) -> bool:
    return t.device.type == "cpu" and type(t) is Tensor and t.numel() > 0 and not _has_memory(t)


def _has_memory(t: Tensor) -> bool:
    return t._is_zerotensor() or t.untyped_storage().nbytes() > 0


# Valid calls ----------------------------------------------------------------------------------------------


def tensor(rng: Random, dtype: torch.dtype, *shape: int) -> Tensor:
    """Returns random numbers, such as a layer has, somewhere in memory."""
    scale = max(shape[-1], 1) ** -0.5 if len(shape) == 2 else 1.0
    return placed(rng, (torch.randn(shape) * scale).to(dtype))


def placed(rng: Random, values: Tensor) -> Tensor:
    """Returns the same numbers in another place: strided, or where a read or write past them is fatal."""
    where = rng.choice(("as it is", "last", "last", "first", "strided", "turned"))
    if where in ("last", "first") and values.numel() > 0:
        return guarded(values, where == "last")
    if where == "strided":
        wide = torch.empty((*values.shape, 2), dtype=values.dtype)
        wide[..., 0] = values
        return wide[..., 0]
    if where == "turned" and values.dim() > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    return values


def guarded(values: Tensor, last: bool) -> Tensor:
    """Returns a copy that nobody's memory comes after, or before."""
    size = values.numel() * values.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    closed = start + (pages * mmap.PAGESIZE if last else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(closed), mmap.PAGESIZE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = pages * mmap.PAGESIZE - size if last else mmap.PAGESIZE
    flat = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
    return flat.view(values.shape).copy_(values)


def maybe(rng: Random, make: Callable[[], Tensor], there: bool = True) -> Tensor | None:
    return make() if there and rng.random() < 0.4 else None


def sizes(rng: Random) -> tuple[int, int, int, int]:
    """Returns T, B, I and H; one in ten is large enough for a team of threads."""
    if rng.random() < 0.1:
        return 5, 40, 8, 64
    size = rng.choice
    return size((1, 1, 2, 3, 9)), size((0, 1, 2, 3, 7)), size((0, 1, 3, 5, 17)), size((0, 1, 4, 7, 16, 33))


def lengths_of(rng: Random, steps: int, batch: int) -> Tensor:
    return placed(rng, torch.randint(0, steps + 1, (batch,), dtype=rng.choice((torch.int64, torch.int32))))


def layer(rng: Random) -> Arguments:
    """All that layer, layer_infer and layer_train have."""
    cell = rng.choice(list(CELLS))
    info, dtype, directions = CELLS[cell], rng.choice(_native.DTYPES), rng.choice((1, 2))
    steps, batch, inputs, hidden = sizes(rng)
    projects = info.memory and rng.random() < 0.3
    outputs = rng.choice((0, 1, 3, 19)) if projects else hidden
    varies = rng.random() < 0.5
    norm = varies and cell == "lstm" and rng.random() < 0.3
    parts = {
        "bias": rng.random() < 0.7,
        "projection": projects,
        "peephole": varies and info.memory and rng.random() < 0.4,
        "norm": norm,
    }
    mask_steps = rng.choice((1, steps))

    def new(*shape: int) -> Tensor:
        return tensor(rng, dtype, *shape)

    weights = [
        new(*shape)
        for _ in range(directions)
        for part, shape in _shapes(info.gates, inputs, hidden, outputs)
        if has(part, parts)
    ]
    return {
        "x": new(steps, batch, inputs),
        "weights": weights,
        "h0": maybe(rng, lambda: new(directions, batch, outputs)),
        "c0": maybe(rng, lambda: new(directions, batch, hidden), info.memory),
        "lengths": maybe(rng, lambda: lengths_of(rng, steps, batch)),
        "resets": maybe(rng, lambda: placed(rng, torch.rand(steps, batch) < 0.3)),
        "mask_h": maybe(rng, lambda: new(directions, mask_steps, batch, outputs), varies),
        "mask_c": maybe(rng, lambda: new(directions, mask_steps, batch, hidden), varies and info.memory),
        "cell": info.code,
        "activation": rng.choice(list(ACTIVATIONS.values())) if varies else 0,
        **parts,
        "cell_clip": rng.choice((None, 0.5, math.inf, 0.0)) if varies and info.memory else None,
        "proj_clip": rng.choice((None, 0.1, math.inf)) if varies and projects else None,
        "norm_eps": rng.choice((1e-5, 1e-3)),
        "reverse": rng.random() < 0.3,
        "tf32": rng.random() < 0.5,
        "path": rng.choice((0, 1, 2)),
        "all_states": rng.random() < 0.5,
    }


def has(part: str, parts: Mapping[str, bool]) -> bool:
    """Whether a layer with these groups of parts has one of ``PARTS``."""
    groups = {"weight_hr": "projection", "peephole": "peephole"}
    group = groups.get(part, part.partition("_")[0])
    return parts.get(group, True)


def _shapes(gates: int, inputs: int, hidden: int, outputs: int) -> list[tuple[str, tuple[int, ...]]]:
    rows = gates * hidden
    shapes: list[tuple[int, ...]] = [(rows, inputs), (rows, outputs), (rows,), (rows,)]
    shapes += [(outputs, hidden), (3, hidden), (5, hidden), (5, hidden)]
    return list(zip(PARTS, shapes, strict=True))


def plain_arguments(rng: Random) -> Arguments:
    """A layer without variations."""
    while True:
        found = layer(rng)
        names = ("mask_h", "mask_c", "cell_clip", "proj_clip")
        if not (found["peephole"] or found["norm"]) and all(found[name] is None for name in names):
            return found


def plain_layer(rng: Random) -> Arguments:
    found = plain_arguments(rng)
    names = ("x", "weights", "h0", "c0", "cell", "activation", "bias", "projection")
    return {name: found[name] for name in names}


def plain_cell(rng: Random) -> Arguments:
    while True:
        found = plain_arguments(rng)
        if len(found["weights"]) == (4 if found["bias"] else 2) and not found["projection"]:
            break
    w_ih, w_hh, b_ih, b_hh = [*found["weights"], None, None][:4]
    return {
        "x": found["x"][0],
        "weight_ih": w_ih,
        "weight_hh": w_hh,
        "bias_ih": b_ih,
        "bias_hh": b_hh,
        "h0": None if found["h0"] is None else found["h0"][0],
        "c0": None if found["c0"] is None else found["c0"][0],
        "cell": found["cell"],
        "activation": found["activation"],
    }


def pack(rng: Random) -> Arguments:
    found = plain_arguments(rng)
    return {name: found[name] for name in ("weights", "cell", "bias", "projection")}


def layer_packed(rng: Random) -> Arguments:
    found = plain_arguments(rng)
    weights = found["weights"]
    gates = CELLS[list(CELLS)[found["cell"]]].gates
    data = torch.ops.torchrnn.pack(weights, found["cell"], found["bias"], found["projection"])
    count = 2 + 2 * found["bias"] + found["projection"]
    return {
        "x": found["x"],
        "packed": guarded(data, rng.random() < 0.5),
        **{name: found[name] for name in ("h0", "c0", "lengths", "resets", "cell", "activation")},
        "hidden": weights[1].size(0) // gates,
        "outputs": weights[1].size(1),
        "directions": len(weights) // count,
        "projection": found["projection"],
        "reverse": found["reverse"],
        "weights of": weights,
    }


def scan_arguments(rng: Random) -> Arguments:
    cell = rng.choice(list(scan.CELLS))
    info, dtype = scan.CELLS[cell], rng.choice(_native.DTYPES)
    steps, batch, _, units = sizes(rng)
    steps = rng.choice((0, steps, steps, steps))
    mask_steps = rng.choice((1, steps))

    def new(*shape: int) -> Tensor:
        return tensor(rng, dtype, *shape)

    return {
        "wx": new(steps, batch, info.gates * units),
        "u": new(info.gates * units) if info.carries_h else None,
        "h0": maybe(rng, lambda: new(batch, units), info.carries_h),
        "c0": maybe(rng, lambda: new(batch, units), info.carries_c),
        "lengths": maybe(rng, lambda: lengths_of(rng, steps, batch)),
        "mask_h": maybe(rng, lambda: new(mask_steps, batch, units), info.carries_h),
        "mask_c": maybe(rng, lambda: new(mask_steps, batch, units), info.carries_c),
        "cell": info.code,
        "activation": rng.choice(list(ACTIVATIONS.values())),
        "reverse": rng.random() < 0.3,
    }


def backward(family: Any, forward: Callable[[Random], Arguments]) -> Callable[[Random], Arguments]:
    """Returns what makes the arguments of a family's backward op."""

    def make(rng: Random) -> Arguments:
        given = forward(rng)
        names = list(schema(family.backward_op._schema.name.partition("::")[2]))
        if "all_states" in given:
            given["all_states"] = True
        *outputs, tape = family.train_op(*given.values())
        douts = [
            None if out.dim() == 1 else maybe(rng, lambda out=out: tensor(rng, out.dtype, *out.shape))
            for out in outputs
        ]
        kept = {"y": outputs[0], "tape": tape}
        needs = {name: rng.random() < 0.7 for name in names if name.startswith("need_")}
        return {**dict(zip(names, douts, strict=False)), **given, **kept, **needs}

    return make


def _complete(op: str, spoilt: Arguments, changes: dict[str, str]) -> None:
    """Makes y and tape anew for a forward call that was changed to another valid one."""
    train = f"{op.removesuffix('_backward')}_train"
    names = list(schema(train))
    if not any(name in changes for name in names):
        return
    try:
        y, *_, tape = getattr(torch.ops.torchrnn, train)(*(spoilt[name] for name in names))
    except Exception:
        return  # The backward call must be refused too.
    for name, value in (("y", y), ("tape", tape)):
        spoilt[name] = value
        changes.pop(name, None)


def dropout(rng: Random) -> Arguments:
    shape = tuple(rng.choice((0, 1, 3, 40)) for _ in range(rng.randrange(4)))
    return {
        "x": tensor(rng, rng.choice(_native.DTYPES), *shape) if shape else torch.tensor(1.5),
        "seed": torch.tensor(rng.randrange(-(2**63), 2**63)),
        "keep": rng.choice((0.8, 0.5, 1.0, 2**-32)),
    }


def isa_number(rng: Random) -> Arguments:
    return {"isa": rng.randrange(len(_native.ISAS))}


VALID: dict[str, Callable[[Random], Arguments]] = {
    "layer": layer,
    "layer_infer": layer,
    "layer_train": layer,
    "layer_backward": backward(ops.LAYER, layer),
    "plain_layer": plain_layer,
    "plain_cell": plain_cell,
    "pack": pack,
    "layer_packed": layer_packed,
    "scan": scan_arguments,
    "scan_infer": scan_arguments,
    "scan_train": scan_arguments,
    "scan_backward": backward(scan.SCAN, scan_arguments),
    "dropout": dropout,
    "isa": lambda _: {},
    "isa_supported": isa_number,
    "set_isa": isa_number,
    "fma_peak": lambda rng: {**isa_number(rng), "seconds": 1e-4, "threads": rng.choice((1, 2))},
    "read_bandwidth": lambda rng: {"bytes": 1 << 16, "seconds": 1e-4, "threads": rng.choice((1, 2))},
}


# What spoils an argument ----------------------------------------------------------------------------------


class Plain(Tensor):
    """A subclass that changes nothing."""


HUGE = (2**31, 2**33 + 1, 2**40, 2**62)
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.int32,
    torch.uint8, torch.bool, torch.float8_e4m3fn,
)  # fmt: skip


def _other_size(rng: Random, t: Tensor) -> Tensor:
    shape = list(t.shape)
    d = rng.randrange(len(shape))
    shape[d] = max(0, shape[d] + rng.choice((-1, 1)))
    return _filled(t, shape)


def _size_0(rng: Random, t: Tensor) -> Tensor:
    shape = list(t.shape)
    shape[rng.randrange(len(shape))] = 0
    return _filled(t, shape)


def _filled(t: Tensor, shape: list[int]) -> Tensor:
    return torch.rand(shape).to(t.dtype)


def _other_rank(rng: Random, t: Tensor) -> Tensor:
    return rng.choice((t.unsqueeze(0), t.unsqueeze(-1), t.flatten(), t[0] if len(t) else t.squeeze()))


def _huge(rng: Random, t: Tensor) -> Tensor:
    shape = list(t.shape)
    d = rng.randrange(len(shape))
    others = math.prod(shape[:d] + shape[d + 1 :])
    shape[d] = min(rng.choice(HUGE), (2**63 - 1) // others)  # A tensor cannot be larger.
    return t.narrow(d, 0, 1).expand(shape)


def _without_memory(rng: Random, t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def _expanded(rng: Random, t: Tensor) -> Tensor:
    d = rng.randrange(t.dim())
    return t.narrow(d, 0, 1).expand(t.shape) if t.size(d) else t


def _values(rng: Random, t: Tensor) -> Tensor:
    t = t.clone(memory_format=torch.contiguous_format)
    numbers = (
        (0.0, math.inf, -math.inf, math.nan, 1e30, 1e-40) if t.is_floating_point() else (-1, 1, 9, 2**62)
    )
    for _ in range(rng.choice((1, t.numel()))):
        number = rng.choice(numbers)
        if not t.is_floating_point():
            number = bool(number) if t.dtype == torch.bool else min(number, torch.iinfo(t.dtype).max)
        t.view(-1)[rng.randrange(t.numel())] = number
    return t


TENSOR: dict[str, tuple[Callable[[Tensor], bool], Callable[[Random, Tensor], Any]]] = {
    # What is done, to which tensors, and how.
    "other size": (lambda t: t.dim() > 0, _other_size),
    "another size": (lambda t: t.dim() > 0, _other_size),
    "size 0": (lambda t: t.dim() > 0, _size_0),
    "other rank": (lambda t: t.dim() > 0, _other_rank),
    "other dtype": (lambda t: True, lambda rng, t: t.to(rng.choice(DTYPES))),
    "meta": (lambda t: True, lambda _, t: t.to("meta")),
    "strided": (lambda t: t.dim() > 0, lambda rng, t: torch.stack((t, t), -1)[..., rng.randrange(2)]),
    "expanded": (lambda t: t.dim() > 0, _expanded),
    "huge": (lambda t: t.dim() > 0 and t.numel() > 0, _huge),
    "no memory": (lambda t: t.numel() > 0, _without_memory),
    "values": (lambda t: t.numel() > 0, _values),
    "sparse": (lambda t: t.dim() > 0, lambda _, t: t.to_sparse()),
    "mkldnn": (lambda t: t.dtype == torch.float32 and t.dim() > 0, lambda _, t: t.to_mkldnn()),
    "quantized": (
        lambda t: t.dtype == torch.float32,
        lambda _, t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    ),
    "nested": (lambda t: t.dim() > 1, lambda _, t: torch.nested.as_nested_tensor(list(t), dtype=t.dtype)),
    "negative view": (lambda t: t.is_floating_point(), lambda _, t: torch._neg_view(t)),
    "zero tensor": (
        lambda t: t.is_floating_point(), lambda _, t: torch._efficientzerotensor(t.shape, dtype=t.dtype)
    ),
    "subclass": (lambda t: True, lambda _, t: t.as_subclass(Plain)),
    "wrapper": (lambda t: True, lambda _, t: TwoTensor(t, t)),
    "parameter": (lambda t: t.is_floating_point(), lambda _, t: nn.Parameter(t)),
    "other type": (lambda t: True, lambda rng, t: rng.choice((None, 1.0, "x", [1.0], [t], True))),
    "none": (lambda t: True, lambda *_: None),
}  # fmt: skip

OTHER_NUMBERS = {"values", "expanded", "negative view", "zero tensor"}

LIST: dict[str, Callable[[Random, list[Any]], Any]] = {
    "one less of": lambda rng, v: v[: rng.randrange(len(v))],
    "one twice in": lambda rng, v: [*v, rng.choice(v)],
    "twice": lambda _, v: v * 2,
    "32 times": lambda _, v: v * 32,
    "other order of": lambda rng, v: rng.sample(v, len(v)),
    "none of": lambda *_: [],
    "other type": lambda rng, v: rng.choice((None, v[0], "x", [*v[:-1], None], [1.0, 2.0])),
}

INT = (-1, 0, 1, 2, 3, 4, 5, 99, 2**31, 2**32 + 1, 2**63 - 1, -(2**63), 2**64, 1.5, None, "x")
FLOAT = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300, 1e-300, 61.0, None, 1, "x")
BOOL = (True, False, None, 2, "x")


def spoil(rng: Random, op: str, valid: Arguments, changes: dict[str, str]) -> Arguments:
    """Returns the arguments of a valid call with up to three changed; notes in ``changes`` what was done."""
    types, spoilt = schema(op), dict(valid)
    names = rng.sample(list(valid), min(len(valid), rng.choice((0, 1, 1, 1, 2, 3))))
    for name in names:
        kind, value = types[name], valid[name]
        if kind.startswith("List") and rng.random() < 0.5 and value:
            how = rng.choice(list(LIST))
            spoilt[name] = LIST[how](rng, value)
        elif "Tensor" in kind:
            candidates: Iterator[Any] = iter(value if isinstance(value, list) else [value])
            given = [t for t in candidates if t is not None] or [_any_tensor(rng, valid)]
            at = rng.randrange(len(given))
            kept = name in ("y", "tape", "packed")  # Whose numbers are those of another call.
            hows = [how for how, (fits, _) in TENSOR.items() if fits(given[at])]
            how = rng.choice([how for how in hows if not kept or how not in OTHER_NUMBERS])
            changed = TENSOR[how][1](rng, given[at])
            spoilt[name] = [*value[:at], changed, *value[at + 1 :]] if isinstance(value, list) else changed
        else:
            how = "set"
            numbers: tuple[Any, ...] = INT if "int" in kind else FLOAT if "float" in kind else BOOL
            spoilt[name] = rng.choice(numbers)
            if name == "bytes" and spoilt[name] in (2**31, 2**32 + 1):
                spoilt[name] = 2**20  # There is as much memory, and it takes long to read.
            if name == "seconds" and spoilt[name] == 1:
                spoilt[name] = 0  # A second is long for a test.
        changes[name] = how
    return spoilt


def _any_tensor(rng: Random, valid: Arguments) -> Tensor:
    """Returns what may stand in the place of an absent tensor."""
    there = [t for value in valid.values() for t in (value if isinstance(value, list) else [value])]
    return rng.choice([t for t in there if isinstance(t, Tensor)])
