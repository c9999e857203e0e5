"""Compares what ptxas says of every CUDA kernel with registers.json, which is the table of the last change.

    python tests/cuda/registers.py FOLDER [--update]

FOLDER has the compiler's logs, which setup.py leaves in folder nvcc of the build. Errors are a warning, a
spill, a kernel that takes more than in the table, and one that the table lacks or has in vain. --update
writes the table. Another nvcc's numbers are not compared.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

TABLE = Path(__file__).with_name("registers.json")
COLUMNS = ("registers", "bytes of static shared memory", "bytes of stack", "bytes of spills")

# kernel -> architecture -> a number for each of COLUMNS.
Kernels = dict[str, dict[str, list[int]]]


def read(log: str) -> Kernels:
    """Returns what a log says of each kernel, by its mangled name."""
    kernels: Kernels = {}
    name, numbers = "", [0] * len(COLUMNS)
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            name, numbers = found[1], [0] * len(COLUMNS)
            kernels.setdefault(name, {})[found[2]] = numbers
        elif found := re.search(r"Function properties for (\w+)", line):
            name = found[1]
        # Device functions that are not inlined have such lines too; their stack is not the kernel's.
        elif name in kernels and (found := re.search(r"(\d+) bytes stack.* (\d+) bytes spill st", line)):
            numbers[2:] = int(found[1]), int(found[2])
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            numbers[:2] = int(found[1]), int(shared[1]) if shared else 0
    return kernels


def readable(names: list[str]) -> list[str]:
    """Returns the names of kernels without return type, parameters and our namespaces."""
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    result = []
    for line in lines.stdout.splitlines():
        end, depth = len(line), 0
        if line.endswith(")"):  # Back to where the parameters open; template arguments may have brackets too.
            for end in range(len(line) - 1, -1, -1):
                depth += {")": 1, "(": -1}.get(line[end], 0)
                if depth == 0:
                    break
        short = line[:end].removeprefix("void ")
        result.append(re.sub(r"\(anonymous namespace\)::|torchrnn::(cuda::)?", "", short))
    return result


def collect(folder: Path) -> tuple[Kernels, list[str]]:
    """Returns the kernels of all logs, by file and readable name, and the compiler's warnings."""
    kernels: Kernels = {}
    warnings = []
    for path in sorted(folder.glob("*.log")):
        log = path.read_text()
        found = read(log)
        names = readable(list(found)) if found else []
        kernels |= {f"{path.stem}.cu {name}": item for name, item in zip(names, found.values(), strict=True)}
        # Spills are told of by the numbers, with readable names.
        warnings += [
            line for line in log.splitlines() if re.search(r"warning(?!.* are spilled )", line, re.I)
        ]
    return kernels, warnings


def growth(kernels: Kernels, table: Kernels) -> list[str]:
    """Returns a line for each way in which the kernels are not those of the table, or take more."""
    lines = [f"{name}: not in the table" for name in sorted(kernels.keys() - table.keys())]
    lines += [f"{name}: in the table, but not compiled" for name in sorted(table.keys() - kernels.keys())]
    for name in sorted(kernels.keys() & table.keys()):
        if kernels[name].keys() != table[name].keys():
            lines.append(f"{name}: sm {', '.join(kernels[name])}, in the table {', '.join(table[name])}")
            continue
        for arch, numbers in kernels[name].items():
            for column, now, before in zip(COLUMNS, numbers, table[name][arch], strict=True):
                if now > before:
                    lines.append(f"{name}, sm_{arch}: {now} {column}, in the table {before}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--nvcc", default="nvcc", help="the compiler that wrote the logs")
    parser.add_argument("--update", action="store_true", help="write the table")
    arguments = parser.parse_args()

    kernels, errors = collect(arguments.folder)
    if not kernels:
        errors.append(f"{arguments.folder} has no log with kernels")
    for name, archs in kernels.items():
        errors += [f"{name}, sm_{arch}: {row[3]} {COLUMNS[3]}" for arch, row in archs.items() if row[3]]

    version = subprocess.run([arguments.nvcc, "--version"], capture_output=True, text=True, check=True)
    nvcc = re.findall(r"release ([\d.]+)", version.stdout)[0]
    note = ""
    if arguments.update:
        rows = [f"    {json.dumps(name)}: {json.dumps(kernels[name])}" for name in sorted(kernels)]
        head = f'{{\n  "nvcc": "{nvcc}",\n  "columns": {json.dumps(COLUMNS)},\n  "kernels": {{\n'
        arguments.table.write_text(head + ",\n".join(rows) + "\n  }\n}\n")
        note = "; table written"
    else:
        table = json.loads(arguments.table.read_text())
        if table["nvcc"] == nvcc:
            errors += growth(kernels, table["kernels"])
        else:
            note = f"; not compared with the table, which is of nvcc {table['nvcc']} and not {nvcc}"
    for line in errors:
        print(f"registers: {line}", file=sys.stderr)
    if errors:
        print("registers: what is meant to change can be written to the table with --update", file=sys.stderr)
        return 1
    most = max(row[0] for archs in kernels.values() for row in archs.values())
    print(f"registers: {len(kernels)} kernels, at most {most} registers, no spills{note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
