"""Calls the ops at random and counts what becomes of it: python tests/fuzz_ops.py --calls 20000 --seed 1

The ops are public to compiled and exported programs. Whatever they are given, a call must raise an error
that names an argument, or give what the reference gives. Calls are made in child processes: one that ends its
process, does not come to an end or damages the heap is counted as crashed, and those after it go on in
another.
"""

from __future__ import annotations

import argparse
import ctypes.util
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from fuzz_calls import OPS, make_call
from fuzz_verdict import judge

import torchrnn

OUTCOMES = ("accepted", "refused", "crashed", "wrong")
BATCH = 500
"""Calls that a child makes."""
SECONDS = 60
"""After which a call is one that does not come to an end."""
MEMORY = 12 << 30
"""Of a child's addresses: what asks for more is to be refused, not swapped."""


class Result(NamedTuple):
    number: int
    op: str
    call: str
    outcome: str
    why: str


# The child ------------------------------------------------------------------------------------------------


def make_calls(op: str | None, seed: int, first: int, count: int) -> None:
    """Makes calls and prints a line before each and one after it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number in range(first, first + count):
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # Which ends the process.
        print(f"{number}\t{op or 'any'}\twhile it was made", flush=True)
        call = make_call(op, seed, number)
        print(f"{number}\t{call.op}\t{call}", flush=True)
        outcome, why = judge(call)
        print(f"={outcome}\t{why}", flush=True)


# The parent -----------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Returns the variables under which damage to the heap is noticed, where the C library can."""
    here = str(Path(torchrnn.__file__).parents[1])
    found = {**os.environ, "MALLOC_PERTURB_": "165", "MALLOC_CHECK_": "3", "PYTHONPATH": here}
    library = ctypes.util.find_library("c_malloc_debug")  # Without it MALLOC_CHECK_ has no effect.
    if library is not None:
        found["LD_PRELOAD"] = library
    return found


def results_of(output: str, status: int, errors: str) -> list[Result]:
    """Reads what a child has printed; a call without an outcome is the one that ended it."""
    found: list[Result] = []
    for line in output.splitlines():
        if line.startswith("="):
            outcome, _, why = line[1:].partition("\t")
            found[-1] = found[-1]._replace(outcome=outcome, why=why)
        elif line.count("\t") >= 2:
            number, op, call = line.split("\t", 2)
            if found and found[-1].number == int(number):
                found.pop()
            name = signal.Signals(-status).name if status < 0 else f"status {status}"
            name = f"no end in {SECONDS} s" if name == "SIGALRM" else name
            found.append(Result(int(number), op, call, "crashed", f"{name} {errors.strip()[-200:]}".strip()))
    return found


def run_child(op: str | None, seed: int, first: int, count: int) -> list[Result]:
    """Makes calls in a child, and in another one those that are left when it ends early."""
    found: list[Result] = []
    end = first + count
    while first < end:
        numbers = [f"--first={first}", f"--calls={end - first}", f"--seed={seed}"]
        command = [sys.executable, __file__, "--child", *numbers, *([f"--op={op}"] if op else [])]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment(), check=False
        )
        part = results_of(done.stdout, done.returncode, done.stderr)
        is_cut = part and part[-1].outcome == "crashed"
        if done.returncode > 0 or not part or (done.returncode < 0 and not is_cut):
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stderr[-2000:]}")
        found += part
        first = part[-1].number + 1
    return found


def fuzz(op: str | None, seed: int, first: int, count: int, jobs: int = 1) -> Iterator[Result]:
    """Makes calls in ``jobs`` children at a time; yields their results in order."""
    starts = range(first, first + count, BATCH)
    with ThreadPoolExecutor(jobs) as pool:
        parts = [pool.submit(run_child, op, seed, at, min(BATCH, first + count - at)) for at in starts]
        for part in parts:
            yield from part.result()


def table(results: list[Result]) -> str:
    """Returns the counts of each op."""
    counts = Counter((result.op, outcome) for result in results for outcome in ("calls", result.outcome))
    names = ("calls", *OUTCOMES)
    lines = [f"{'op':16}{''.join(f'{name:>10}' for name in names)}"]
    for op in sorted({result.op for result in results}):
        lines.append(f"{op:16}{''.join(f'{counts[op, name]:10}' for name in names)}")
    totals = Counter(result.outcome for result in results)
    totals["calls"] = len(results)
    return "\n".join([*lines, f"{'all':16}{''.join(f'{totals[name]:10}' for name in names)}"])


def main() -> int:
    """Returns the exit status: 1 if a call crashed or was wrong."""
    parser = argparse.ArgumentParser(description="Calls the ops at random and counts what becomes of it.")
    parser.add_argument("--calls", type=int, default=20000, help="how many, 20000 by default")
    parser.add_argument("--seed", type=int, help="what they follow from; the time by default")
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    parser.add_argument("--op", choices=sorted(OPS), help="calls of this op only")
    parser.add_argument("--jobs", type=int, default=2, help="child processes at a time, 2 by default")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    seed = int(time.time()) if args.seed is None else args.seed
    if args.child:
        make_calls(args.op, seed, args.first, args.calls)
        return 0
    results = []
    for result in fuzz(args.op, seed, args.first, args.calls, args.jobs):
        results.append(result)
        if result.outcome in ("crashed", "wrong"):
            again = f"--seed {seed} --first {result.number} --calls 1{f' --op {args.op}' if args.op else ''}"
            print(f"{result.outcome}: {result.call}: {result.why}\n  again: {again}", flush=True)
    print(f"{table(results)}\nseed {seed}")
    return int(any(result.outcome in ("crashed", "wrong") for result in results))


if __name__ == "__main__":
    sys.exit(main())
