"""Compares the C++ functions of the CUDA library's ops with the schemas of torchrnn, without running them.

    python tests/cuda/schemas.py LIBRARY SOURCE...

torch's stable ABI hands arguments over as untyped words, and a function of other types than its schema
crashes at best. The types are in the names of the library's symbols; SOURCE, the files that register ops, say
which function is which op. That the library registers these ops and no others is seen by loading it. torch
without CUDA will do: what it lacks is left unresolved, and never called.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

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


def load(library: Path) -> set[str]:
    """Loads the library, resolving only what is called; returns the ops that torchrnn then has for CUDA."""
    sys.setdlopenflags(os.RTLD_LAZY)
    loader = importlib.machinery.ExtensionFileLoader("torchrnn._C_cuda", str(library))
    spec = importlib.util.spec_from_loader("torchrnn._C_cuda", loader)
    assert spec is not None
    importlib.util.module_from_spec(spec)
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    return {name.removeprefix("torchrnn::") for name in names if name.startswith("torchrnn::")}


def main(library: Path, sources: list[Path]) -> int:
    registered = {}
    for source in sources:
        text = source.read_text()
        registered |= dict(re.findall(r'm\.impl\("(\w+)",\s*TORCH_BOX\(&(?:\w+::)*(\w+)\)\)', text))
    signatures = compiled(library)
    loaded = load(library)
    errors = [] if loaded else ["no op is registered"]
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
