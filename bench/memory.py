"""How much memory a training step takes at its peak, and how long it takes: ``python -m bench memory``.

Each step runs in a process of its own, whose allocator returns to the system at once what is freed. Only
Linux tells the peak.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from bench import options, peers, results, timing
from bench.cases import GATES, Case
from bench.results import Memory

CLEAR = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"  # Linux, Documentation/filesystems/proc.rst.
# Blocks above 64 KiB are mapped, and unmapped when freed: none that was freed before hides a new one.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}

SIZES = ((128, 32, 256, 256), (128, 32, 512, 512), (1024, 32, 256, 256), (64, 128, 1024, 1024))
QUICK_SIZES = ((16, 8, 32, 32),)
WARM_UP = (2, 2, 8, 8)
RECOMPUTE = "torchrnn recompute"


def variants(cell: str) -> dict[str, peers.TorchLayer]:
    """Returns what is compared: torch.nn, ours, and ours with recomputation if it has that."""
    torch_nn = peers.TorchLayer("torch.nn", peers.TORCH_LAYERS, peers.packed_forward)
    layers = {"torch.nn": torch_nn, peers.OURS.name: peers.OURS}
    try:
        peers.LAYERS[cell](1, 1, recompute=True)
    except TypeError:
        return layers
    recompute = peers.TorchLayer(RECOMPUTE, peers.LAYERS, peers.lengths_forward, options={"recompute": True})
    return layers | {RECOMPUTE: recompute}


def status(field: str) -> int:
    """Returns the bytes of a field of this process's status."""
    match = re.search(rf"^{field}:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return 1024 * int(match[1])


def peak(asked: dict[str, Any]) -> int:
    """Returns the bytes that one step of a layer needs beyond inputs and weights."""
    case = Case(**asked["case"])
    layer = variants(case.cell)[asked["name"]]
    layer.prepare(peers.make_problem(Case(case.cell, case.mode, *WARM_UP)))()
    step = layer.prepare(peers.make_problem(case))
    gc.collect()
    CLEAR.write_text(RESET_PEAK)
    before = status("VmRSS")
    step()
    return max(0, status("VmHWM") - before)


def times(asked: dict[str, Any]) -> dict[str, float]:
    """Returns the milliseconds of a step of each layer."""
    case = Case(**asked["case"])
    problem, layers = peers.make_problem(case), variants(case.cell)
    taken = timing.interleave([layer.prepare(problem) for layer in layers.values()], asked["budget"])
    return {name: time.median for name, time in zip(layers, taken, strict=True)}


def measure(case: Case, threads: int, budget: float) -> Memory:
    """Measures the layers one after the other, then their times in turns."""
    asked = {"case": dataclasses.asdict(case), "threads": threads, "budget": budget}
    peaks = {}
    for name in variants(case.cell):
        child = options.process("bench.memory", asked | {"what": "peak", "name": name}, ALLOCATOR)
        peaks[name] = options.answer(child)
    return Memory(case.id, threads, peaks, options.answer(options.process("bench.memory", asked)))


def table(rows: Sequence[Memory]) -> Table:
    """Returns the peaks, and the times relative to ours."""
    names = list(dict.fromkeys(name for row in rows for name in row.peaks))
    out = Table(title="a training step: MiB at the peak beyond inputs and weights; time / that of torchrnn")
    out.add_column("case", no_wrap=True)
    for title in ("thr", *(title for name in names for title in (f"{name} MiB", "time"))):
        out.add_column(title, justify="right")
    for row in rows:
        cells = []
        for name in names:
            known = name in row.peaks
            cells.append(f"{row.peaks[name] / 2**20:.1f}" if known else "")
            cells.append(f"{row.times[name] / row.times[peers.OURS.name]:.2f}" if known else "")
        out.add_row(row.id, str(row.threads), *cells)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = options.parser("memory", "Measures the memory of a training step (Linux only).")
    parser.add_argument("--threads", metavar="N", type=options.count, default=2, help="number of threads [2]")
    args, console = parser.parse_args(argv), options.console()
    if not CLEAR.exists():
        print(f"bench memory: needs {CLEAR}, which only Linux has", file=sys.stderr)
        return 2
    sizes = QUICK_SIZES if args.quick else SIZES
    chosen = [Case(cell, "train", *size) for cell in GATES for size in sizes]
    chosen = [case for case in chosen if args.filter.search(case.id)]
    if not chosen:
        print(f"bench memory: no case matches {args.filter.pattern!r}", file=sys.stderr)
        return 2
    asked = {"suite": "memory", "quick": args.quick, "filter": args.filter.pattern, "threads": args.threads}
    result = results.describe(asked)
    budget = 0.02 if args.quick else 2.0
    for case in track(chosen, "memory", console=console, transient=True, disable=not console.is_terminal):
        result.memory.append(measure(case, args.threads, budget))
    console.print(table(result.memory))
    console.print(f"written to {results.save(result, args.out)}")
    return 0


def child(asked: dict[str, Any]) -> None:
    torch.set_num_threads(asked["threads"])
    print(json.dumps(peak(asked) if asked.get("what") == "peak" else times(asked)))


if __name__ == "__main__":
    child(json.loads(sys.stdin.buffer.readline()))
