"""Measures torchrnn on a GPU against torch.nn and others: ``python -m bench gpu --out DIR --budget SECONDS``.

The grid takes half an hour; a run stops at its budget, after the rows that matter most. Every row is checked
against float64 before it is timed, and what is wrong is not timed. Needs nothing but torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from bench import gpu_cases, gpu_dispatch, gpu_floors, options, peers, results
from bench.cases import Case
from bench.gpu_cases import BARS, EAGER, LEAST, algorithm
from bench.gpu_device import Cuda, Device
from bench.gpu_peers import COMPILE_SECONDS, COMPILING, is_ours, make_peers, unavailable
from bench.peers import EXACT, OURS, Peer, Problem, Run
from bench.results import Gpu, GpuBar, GpuRow, Result
from bench.timing import Stats, interleave

ROW_SECONDS, QUICK_ROW_SECONDS = 0.3, 0.005  # Of timing; slow rows take longer.
CHECK_FLOPS = 1e12  # In float64, whose products a data centre's GPU computes at tens of TFLOP/s.
TF32_EPS = 2.0**-10
SAVE_SECONDS = 10.0  # Between files, so that a run that is killed leaves one.
LISTED = 8  # Names of rows in a line of the report; the file has all.
LOST = "the device was lost"
NOT_SERVED = "does not serve this call"  # What a forced path says.

T = TypeVar("T")


class Failed(Exception):
    """One measurement cannot be made."""


class DeviceLost(Exception):
    """No later call on the device can be trusted; ``peer`` is what has done it, as far as that is known."""

    peer = OURS.name


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser("gpu", __doc__.split("\n", maxsplit=1)[0], results.ROOT / "build" / "gpu")
    add = parser.add_argument
    add("--budget", metavar="S", type=options.seconds, default=240.0, help="seconds of the whole run [240]")
    add("--commit", default="", help="what is measured, where that is a copy without its repository")
    add("--resume", action="store_true", help="go on in DIR where the device was lost, without what lost it")
    return parser.parse_args(argv)


class Bench(NamedTuple):
    """What all rows share."""

    device: Device
    peers: list[Peer]
    seconds: float  # Of timing a row.

    def attempt(self, call: Callable[[], T]) -> T:
        """Returns what a call returns; raises Failed, or DeviceLost if the device did not survive it."""
        try:
            result = call()
            self.device.synchronise()
        except Exception as error:  # Whatever a library raises costs one entry, not the run.
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            try:
                self.device.synchronise()
            except RuntimeError:
                raise DeviceLost(reason) from error
            raise Failed(reason) from error
        return result

    def prepare(self, peer: Peer, problem: Problem) -> tuple[Run, Sequence[Any]]:
        """Returns a run and its first results."""

        def first() -> tuple[Run, Sequence[Any]]:
            run = peer.prepare(problem)
            return run, run()

        try:
            return self.attempt(first)
        except DeviceLost as error:
            error.peer = peer.name
            raise

    def measure(self, row: GpuRow, case: Case, remaining: float) -> None:
        """Fills the row of a case; without times if ours is wrong. Raises DeviceLost."""
        able = [peer for peer in self.peers if peer.available() is None and peer.supports(case)]
        if remaining < COMPILE_SECONDS:
            row.skipped.update({peer.name: "no time to compile" for peer in able if peer.name in COMPILING})
            able = [peer for peer in able if peer.name not in row.skipped]
        try:
            runs = self.check(row, case, able)
            if OURS.name in runs:
                clock = partial(interleave, list(runs.values()), self.seconds, sample=self.device.sample)
                fill(row, dict(zip(runs, self.attempt(clock), strict=True)), max(case.lengths))
        except Failed as error:
            row.failed[OURS.name] = str(error)

    def check(self, row: GpuRow, case: Case, able: Sequence[Peer]) -> dict[str, Run]:
        """Returns the runs of the case that compute what float64 does; notes why others do not."""
        short = peers.shortened(case, CHECK_FLOPS)
        problem = peers.make_problem(short, self.device.name)
        row.check_steps = short.steps
        _, exact = self.prepare(EXACT, problem)
        runs, theirs = dict[str, Run](), [0.0] * len(exact)
        for peer in sorted(able, key=lambda peer: peer.name != EAGER):  # It is the measure of all others.
            try:
                runs[peer.name], values = self.prepare(peer, problem)
                found = self.attempt(partial(peers.deviations, values, exact))
            except Failed as error:
                runs.pop(peer.name, None)
                note(row, peer.name, str(error))
                continue
            eps = self.eps(peer, case)
            bounds = [sys.float_info.max if peer.name == EAGER else 2 * x + 8 * eps for x in theirs]
            if wrong := excess(found, bounds):
                del runs[peer.name]
                note(row, peer.name, wrong)
                continue
            row.errors[peer.name] = max(found)
            theirs = found if peer.name == EAGER else theirs
        if short == case or OURS.name not in runs:
            return runs
        problem = peers.make_problem(case, self.device.name)
        for peer in [peer for peer in able if peer.name in runs]:
            try:
                runs[peer.name], _ = self.prepare(peer, problem)
            except Failed as error:
                del runs[peer.name]
                note(row, peer.name, str(error))
        return runs

    def eps(self, peer: Peer, case: Case) -> float:
        """Returns the distance of numbers near 1 in what a peer computes with."""
        dtype = getattr(peer, "dtype", None) or getattr(torch, case.dtype)
        return TF32_EPS if dtype == torch.float32 and self.device.tf32 else torch.finfo(dtype).eps


def excess(found: Sequence[float], bounds: Sequence[float]) -> str:
    """Returns which error is above its bound, in words, or nothing."""
    for i, (error, bound) in enumerate(zip(found, bounds, strict=True)):
        if not error <= bound:  # Written so that a NaN is wrong.
            return f"wrong: tensor {i + 1} of {len(found)} has error {error:.1e}, above {bound:.1e}"
    return ""


def note(row: GpuRow, name: str, reason: str) -> None:
    """Notes why something is not timed: a failure if it is ours, but for a path that does not serve it."""
    fails = is_ours(name) and NOT_SERVED not in reason
    (row.failed if fails else row.skipped)[name] = reason


def fill(row: GpuRow, times: dict[str, Stats], steps: int) -> None:
    """Adds the times to a row."""
    row.times = times
    row.us = {name: 1e3 * time.median / steps for name, time in times.items()}
    ours = row.us[OURS.name]
    row.ratios = {name: us / ours for name, us in row.us.items() if name != OURS.name}
    row.floor_fraction = row.floor and row.floor / ours


def new_row(case: Case, device: Device) -> GpuRow:
    """Returns the row of a case with what is known before it is measured."""
    modelled = case.dtype != "float32" or device.tf32
    return GpuRow(
        id=case.id,
        case=dataclasses.asdict(case),
        bars=[bar.name for bar in BARS if bar.covers(case)],
        algorithm=algorithm(case),
        floor=gpu_floors.microseconds(case) if modelled else None,
    )


def load_rows(folder: Path) -> list[GpuRow]:
    """Returns the rows that an earlier run has written."""
    gpu = results.load(folder / "bench.json").gpu
    return gpu.rows if gpu else []


def write(result: Result, folder: Path) -> Path:
    """Writes the result such that a killed run leaves the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bench.json"
    part = path.with_suffix(".part")
    part.write_text(results.dumps(result))
    return part.replace(path)


def lost_peers(rows: Sequence[GpuRow]) -> set[str]:
    """Returns the peers that have lost the device; ours as a user calls it is the one that all rows need."""
    failed = [item for row in rows for item in row.failed.items()]
    return {name for name, reason in failed if reason.startswith(LOST)} - {OURS.name}


def run(bench: Bench, gpu: Gpu, cases: Sequence[Case], budget: float, save: Callable[[], object]) -> None:
    """Measures cases until the budget is spent, and fills ``gpu``; saves it from time to time."""
    start = saved = time.monotonic()
    for i, case in enumerate(cases):
        gpu.not_run = [case.id for case in cases[i:]]
        remaining = budget - (time.monotonic() - start)
        if remaining <= 0:
            break
        row = new_row(case, bench.device)
        try:
            bench.measure(row, case, remaining)
            bench.device.release()
        except DeviceLost as error:
            gpu.stopped = f"{LOST} in {case.id} by {error.peer}: {error}"
            row.failed[error.peer] = gpu.stopped
        gpu.rows.append(row)
        gpu.not_run = gpu.not_run[1:]
        print(line(row), flush=True)
        if gpu.stopped:
            break
        if time.monotonic() - saved > SAVE_SECONDS:
            save()
            saved = time.monotonic()


def line(row: GpuRow) -> str:
    """Returns a row as text."""
    parts = [f"{name} failed: {reason}" for name, reason in row.failed.items()]
    if OURS.name in row.us:
        parts.append(f"{row.us[OURS.name]:.2f} us/step")
        parts += [f"{name} {ratio:.2f}" for name, ratio in row.ratios.items()]
    if row.floor_fraction:
        parts.append(f"{row.floor_fraction:.0%} of the floor {gpu_floors.SOURCE}")
    return f"{row.id}: {', '.join(parts)}"


def table(bars: Sequence[GpuBar]) -> list[tuple[str, ...]]:
    """Returns the bars as text in columns, the first line their heads."""
    lines: list[tuple[str, ...]] = [("bar", "against", "must", "rows", "worst", "median", "met", "worst row")]
    for bar in bars:
        numbers = [f"{x:.2f}" if x is not None else "" for x in (bar.worst, bar.median)]
        rows = f"{bar.measured} of {bar.cases}"
        lines.append((bar.name, bar.peer, f"{bar.must:.2f}", rows, *numbers, bar.verdict, bar.worst_id or ""))
    return lines


def columns(lines: Sequence[tuple[str, ...]]) -> str:
    """Returns lines of text with their columns aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in lines)


def report(gpu: Gpu) -> None:
    """Prints the bars, and how many rows there are of what kind."""
    print("\nratios: time per step of a peer / that of torchrnn, medians of interleaved calls")
    print(columns(table(gpu.bars)))
    print("\nfor the table of paths, by B: how many times as fast, where it is the faster one")
    print(columns(gpu_dispatch.table(gpu.rows)) + "\n")
    failed = [row.id for row in gpu.rows if row.failed]
    for label, names in (("failed", failed), (f"below {LEAST} of {EAGER}", gpu.below)):
        dots = ", ..." if len(names) > LISTED else ""
        print(f"{label}: {len(names)} rows{': ' * bool(names)}{', '.join(names[:LISTED])}{dots}")
    print(f"{len(gpu.rows)} rows measured, {len(gpu.not_run)} not run")
    if gpu.stopped:
        print(f"stopped: {gpu.stopped}")


def main(argv: Sequence[str] | None = None, device: Device | None = None) -> int:
    """Runs the command and returns its exit status: 1 if a row failed, 2 if nothing can be measured."""
    args, device = parse(argv), device or Cuda()
    if why := device.why_not():
        print(f"bench gpu: {why}", file=sys.stderr)
        return 2
    every = gpu_cases.quick() if args.quick else gpu_cases.grid()
    before = load_rows(args.out) if args.resume else []
    done = {row.id for row in before}
    cases = [case for case in every if args.filter.search(case.id) and case.id not in done]
    if not cases:
        print(f"bench gpu: no case matches {args.filter.pattern!r}", file=sys.stderr)
        return 2
    lost = lost_peers(before)
    makes = [peer for peer in make_peers(device) if peer.name not in lost]
    bench = Bench(device, makes, QUICK_ROW_SECONDS if args.quick else ROW_SECONDS)
    asked = {"budget": args.budget, "quick": args.quick, "filter": args.filter.pattern}
    gpu = Gpu(device.describe(), before)
    skipped = unavailable(bench.peers) | dict.fromkeys(lost, LOST)
    result = dataclasses.replace(results.describe(asked), gpu=gpu, skipped=skipped)
    if args.commit and not results.git("rev-parse", "HEAD"):
        result = dataclasses.replace(result, commit=args.commit, dirty=False)
    print(f"{gpu.device['name']}; torch {result.torch}, torchrnn {result.torchrnn}; {len(cases)} rows")
    for name, reason in result.skipped.items():
        print(f"skipped: {name}, {reason}")

    def save() -> Path:
        gpu.bars, gpu.below = gpu_cases.check_bars(gpu.rows, every), gpu_cases.below(gpu.rows)
        return write(result, args.out)

    run(bench, gpu, cases, args.budget, save)
    path = save()
    report(gpu)
    print(f"written to {path}")
    return 1 if any(row.failed for row in gpu.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
