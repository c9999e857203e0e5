"""A checkout of torchrnn in a process of its own: another one, as a rule of the commit before, or this one.

Two versions of a library of ops cannot be in one process. A process only works while it is asked to, so two
of them take turns like all that is measured; times are taken where the work is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torchrnn
from bench import options, results
from bench.adapters.problem import CLASSES, Problem, Run
from bench.cases import Case
from bench.remote import Remote
from bench.timing import Clock


class RemoteRun:
    """Steps of the case that was prepared last."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote

    def __call__(self) -> Any:
        return self.remote.ask("values")

    def sample(self, calls: int, clock: Clock) -> float:
        seconds: float = self.remote.ask("sample", calls, clock)
        return seconds


class Before:
    name = "before"
    own_threads = True

    def __init__(self, remote: Remote) -> None:
        self.remote = remote

    def available(self) -> str | None:
        return None

    def supports(self, case: Case) -> bool:
        return case.cell in CLASSES

    def prepare(self, problem: Problem) -> Run:
        self.remote.ask("prepare", dataclasses.asdict(problem.case))
        return RemoteRun(self.remote)


def interpreter(checkout: Path) -> str:
    """Returns the Python of a checkout, this one if it has none of its own."""
    own = checkout / ".venv" / "bin" / "python"
    return str(own) if own.exists() else sys.executable


def describe(checkout: Path) -> dict[str, Any]:
    """Returns what is measured of a checkout; raises RuntimeError if it would not be a fair measure."""
    with start(checkout, threads=1) as before:
        found = before.remote.ask("describe")
    if not Path(found.pop("file")).is_relative_to(checkout):
        raise RuntimeError(f"another torchrnn came before that of {checkout}")
    if found["isa"] is None and torchrnn.info()["isa"]:
        raise RuntimeError(f"torchrnn has no kernels in {checkout}: build it there first")
    return {**results.revision(checkout), **found}


@contextlib.contextmanager
def start(checkout: Path, threads: int, python: str | None = None) -> Iterator[Before]:
    """Starts the process of a checkout, by default in its own Python, and ends it afterwards."""
    asked = {"checkout": str(checkout), "threads": threads}
    python = python or interpreter(checkout)
    # The order of dictionaries and sets of strings, which differs from process to process, costs time too.
    seed = {"PYTHONHASHSEED": "0"}
    with Remote(options.process("bench.checkout_worker", asked, seed, python=python, text=False)) as remote:
        yield Before(remote)
