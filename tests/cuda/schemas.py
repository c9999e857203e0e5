"""Compares the C++ functions of the CUDA library's ops with the schemas of torchrnn, without running them.

    python tests/cuda/schemas.py LIBRARY SOURCE...

torch's stable ABI hands arguments over as untyped words, and a function of other types than its schema
crashes at best. The types are in the names of the library's symbols; SOURCE, the files that register ops, say
which function is which op. That the library registers these ops and no others is seen by loading it. torch
without CUDA will do: what it lacks is left unresolved, and never called. What the library tells of paths is
asked for, since that needs no GPU.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch

import torchrnn  # noqa: F401  Defines the schemas.

SCALARS = {"TensorType": "Tensor", "IntType": "long", "FloatType": "double", "BoolType": "bool"}


def cpp_type(item: torch.Type) -> str:
    """Returns the C++ type of a schema's type."""
    if item.kind() == "OptionalType":
        return f"std::optional<{cpp_type(item.getElementType())}>"
    if item.kind() == "ListType":
        return f"std::vector<{cpp_type(item.getElementType())}>"
    return SCALARS[item.kind()]


def expected(op: str) -> str:
    """Returns the C++ signature that an op's schema asks for."""
    schema = getattr(torch.ops.torchrnn, op).default._schema
    returns = [cpp_type(item.type) for item in schema.returns]
    result = f"std::tuple<{', '.join(returns)}>" if len(returns) > 1 else (returns or ["void"])[0]
    return f"{result} ({', '.join(cpp_type(item.type) for item in schema.arguments)})"


def compiled(library: Path) -> dict[str, str]:
    """Returns the signature of each function that the library registers, by its name."""
    symbols = subprocess.run(["nm", "--demangle", str(library)], capture_output=True, text=True, check=True)
    signatures = {}
    for line in symbols.stdout.splitlines():
        if found := re.search(r"detail::boxer<(.*), &(?:[^<>]*::)?(\w+)>::boxed_fn", line):
            text = re.sub(r"torch::stable::| const&|, std::allocator<[^<>]*>", "", found[1])
            signatures[found[2]] = text.replace(" >", ">")
    return signatures


def load(library: Path) -> tuple[ModuleType, set[str]]:
    """Loads the library, resolving only what is called; returns it, and torchrnn's ops for CUDA."""
    sys.setdlopenflags(os.RTLD_LAZY)
    loader = importlib.machinery.ExtensionFileLoader("torchrnn._C_cuda", str(library))
    spec = importlib.util.spec_from_loader("torchrnn._C_cuda", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    return module, {name.removeprefix("torchrnn::") for name in names if name.startswith("torchrnn::")}


def paths(module: ModuleType) -> list[str]:
    """Returns a line for each answer about paths that is wrong on every device, and where there is none."""
    call = {"device": 0, "dtype": 0, "cell": 0, "activation": 0, "steps": 9, "batch": 9, "hidden": 9}
    call |= {"directions": 1, "projected": False, "tf32": False}
    errors = []
    for name, code in (("step", 1), ("cluster", 2)):
        if module.path(forced=code, **call)[:2] != (code, "it is forced"):
            errors.append(f"the {name} path is not forced")
    if module.path(forced=0, **call)[:2] not in module.rows(0, 0):
        errors.append("the path of a call is not in the table")
    return errors


def main(library: Path, sources: list[Path]) -> int:
    registered = {}
    for source in sources:
        text = source.read_text()
        registered |= dict(re.findall(r'm\.impl\("(\w+)",\s*TORCH_BOX\(&(?:\w+::)*(\w+)\)\)', text))
    signatures = compiled(library)
    module, loaded = load(library)
    errors = paths(module) + ([] if loaded else ["no op is registered"])
    errors += [f"{op} is registered in only one of library and sources" for op in loaded ^ registered.keys()]
    for op in sorted(loaded & registered.keys()):
        if not hasattr(torch.ops.torchrnn, op):
            errors.append(f"{op} has no schema in torchrnn")
        elif (found := signatures.get(registered[op])) != (wanted := expected(op)):
            errors.append(f"{op} is\n  {found}\nbut its schema asks for\n  {wanted}")
    for line in errors:
        print(f"schemas: {line}", file=sys.stderr)
    if not errors:
        print(f"schemas: the library has {', '.join(sorted(loaded))} as torchrnn defines them")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]))
