"""How a step slows down beside what else runs: ``python -m bench contention``.

Where there are fewer cores than threads that want one, a step whose threads wait for each other can take far
longer than its share of the machine would make it. Each step is measured in processes that are kept warm and
take turns, one process per layer and number of threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import random
import select
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table

from bench import compare, options, peers, remote, results, timing
from bench.cases import Case
from bench.remote import Remote
from bench.results import Contention

SMALL_SIZE = (1, 1, 256, 256)
SIZES = ((128, 8, 256, 256), (128, 32, 256, 256))
QUICK_SIZES = ((4, 2, 8, 8),)
WARM_UP = 3
TURNS = 5  # Of each process.
MATRIX_SIZE = 1024
# What an engine works at: a few milliseconds.
ENGINE_CASE = Case("lstm", "infer", 32, 8, 256, 256)


@dataclass(frozen=True)
class Situation:
    """What else runs while a step is measured.

    Args:
        name: In the results.
        same: Whether another process runs the same steps at the same time.
        multiplying: Processes that multiply matrices, on as many threads as the step.
        alive: Engines in the process of the step that are called before each step, so that their threads are
            still awake.
        working: Engines there that work at the same time, called by another thread.
    """

    name: str
    same: bool = False
    multiplying: int = 0
    alive: tuple[str, ...] = ()
    working: tuple[str, ...] = ()

    @property
    def engines(self) -> tuple[str, ...]:
        return self.alive + self.working

    def possible(self) -> Situation | None:
        """Returns the situation with those engines that are there; None if one should work that is not."""
        missing = peers.skipped(self.engines)
        alive = tuple(name for name in self.alive if name not in missing)
        if missing.keys() & set(self.working) or (self.alive and not alive):
            return None
        return dataclasses.replace(self, alive=alive)


SITUATIONS = (
    Situation(results.ALONE),
    Situation(results.SAME, same=True),
    Situation("beside 1 multiplying", multiplying=1),
    Situation("beside 3 multiplying", multiplying=3),
    Situation("onnxruntime at work", working=("onnxruntime",)),
    Situation("engines alive", alive=("onnxruntime", "openvino")),
)


def grid(quick: bool) -> list[Case]:
    """Returns the cases: what is too small to be shared among threads, and what is shared."""
    small = [Case(cell, "infer", *SMALL_SIZE, streaming=True) for cell in ("lstm", "gru", "rnn")]
    sizes = QUICK_SIZES if quick else SIZES
    return [*small, *(Case("lstm", mode, *size) for mode in ("infer", "train") for size in sizes)]


def compared(threads: int) -> list[tuple[str, int]]:
    """Returns what is compared: names of peers, and their numbers of threads."""
    return list(dict.fromkeys([(peers.OURS.name, threads), (peers.OURS.name, 1), (compare.TORCH, threads)]))


class Steps:
    """What a measuring process may be asked."""

    def __init__(self, asked: dict[str, Any]) -> None:
        everything = {peer.name: peer for peer in (peers.OURS, *peers.PEERS)}
        self.peer = everything[asked["name"]]
        torch.set_num_threads(asked["team"])  # Of the engines, whose number is that of the situation.
        problem = peers.make_problem(ENGINE_CASE)
        self.alive, self.working = (
            [everything[name].prepare(problem) for name in asked[kind]] for kind in ("alive", "working")
        )
        torch.set_num_threads(asked["threads"])

    def prepare(self, case: dict[str, Any]) -> None:
        self.step = self.peer.prepare(peers.make_problem(Case(**case)))
        for _ in range(WARM_UP):
            self.step()

    def run(self, seconds: float) -> list[float]:
        """Returns the seconds of each step within that time."""
        with at_work(self.working):
            self.step()  # It wakes the threads.
            taken: list[float] = []
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or not taken:
                for engine in self.alive:
                    engine()
                taken.append(timing.sample(self.step, 1))
        return taken


@contextlib.contextmanager
def at_work(functions: Sequence[Callable[[], object]]) -> Iterator[None]:
    """Calls functions in another thread, one after the other, until the end."""
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            for function in functions:
                function()

    thread = threading.Thread(target=work)
    if functions:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if functions:
            thread.join()


def multiply() -> None:
    """Multiplies matrices until the other side closes the input."""
    a, b = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE)
    a @ b
    print("at work", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        a @ b


@contextlib.contextmanager
def multiplying(processes: int, threads: int) -> Iterator[None]:
    """Runs processes that multiply matrices, from when they have started until the end."""
    asked = {"what": "multiply", "threads": threads}
    started = [options.process("bench.contention", asked) for _ in range(processes)]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in started:
            process.communicate()


def in_turns(groups: Sequence[Sequence[Remote]], budget: float) -> list[list[float]]:
    """Returns the seconds of each step of groups of processes; those of a group run at the same time."""
    taken: list[list[float]] = [[] for _ in groups]
    order, shuffler = list(range(len(groups))), random.Random(0)
    for _ in range(TURNS):
        shuffler.shuffle(order)
        for i in order:
            time.sleep(timing.PAUSE)
            for process in groups[i]:
                process.tell("run", budget / TURNS)
            for process in groups[i]:
                taken[i] += process.answer()
    return taken


def measure(
    situation: Situation,
    cases: Sequence[Case],
    threads: int,
    budget: float,
    on_case: Callable[[], object] = lambda: None,
) -> list[Contention]:
    """Measures the cases in a situation, each for ``budget`` seconds of all that is compared."""
    asked = {"team": threads, "alive": situation.alive, "working": situation.working}
    found = []
    with contextlib.ExitStack() as stack:

        def start(name: str, count: int) -> Remote:
            what = asked | {"name": name, "threads": count}
            process = options.process("bench.contention", what, text=False)
            return stack.enter_context(Remote(process))

        groups = [[start(*each) for _ in range(1 + situation.same)] for each in compared(threads)]
        stack.enter_context(multiplying(situation.multiplying, threads))
        for case in cases:
            for process in itertools.chain(*groups):
                process.ask("prepare", dataclasses.asdict(case))
            for (name, count), seconds in zip(compared(threads), in_turns(groups, budget), strict=True):
                found.append(describe(case, situation, name, count, seconds))
            on_case()
    return found


def describe(
    case: Case, situation: Situation, name: str, threads: int, seconds: Sequence[float]
) -> Contention:
    p99 = statistics.quantiles(seconds, n=100, method="inclusive")[-1]
    high = 1e3 * p99, 1e3 * max(seconds)
    return Contention(case.id, situation.name, name, threads, timing.stats(seconds), *high)


def table(rows: Sequence[Contention], cores: int) -> Table:
    """Returns the times of what is compared, side by side."""
    compared = list(dict.fromkeys((row.name, row.threads) for row in rows))
    found = {(row.id, row.situation, row.name, row.threads): row for row in rows}
    out = Table(title=f"ms of a step on {cores} cores: median, 99th percentile")
    for title in ("case", "situation"):
        out.add_column(title, no_wrap=True)
    for name, threads in compared:
        out.add_column(f"{name}, {threads} thread{'s'[: threads > 1]}", justify="right")
    for case, situation in dict.fromkeys((row.id, row.situation) for row in rows):
        cells = (found.get((case, situation, *each)) for each in compared)
        numbers = (f"{row.time.median:.3f} {row.p99:8.3f}" if row else "" for row in cells)
        out.add_row(case, situation, *numbers)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = options.parser("contention", "Measures a step beside what else runs.")
    add = parser.add_argument
    add("--threads", metavar="N", type=options.count, default=2, help="number of threads of a team [2]")
    add("--budget", metavar="S", type=options.seconds, help="seconds of each measurement [3]")
    beside = "only situations whose name it is found in"
    add("--situations", metavar="REGEX", type=options.regex, default="", help=beside)
    args, console = parser.parse_args(argv), options.console()
    chosen = [case for case in grid(args.quick) if args.filter.search(case.id)]
    if not chosen:
        print(f"bench contention: no case matches {args.filter.pattern!r}", file=sys.stderr)
        return 2
    asked = {"suite": "contention", "quick": args.quick, "threads": args.threads}
    pattern = "|".join(filter(None, (args.filter.pattern, args.situations.pattern)))
    result = results.describe(asked | {"filter": pattern})
    situations = [situation for situation in SITUATIONS if args.situations.search(situation.name)]
    if not situations:
        print(f"bench contention: no situation matches {args.situations.pattern!r}", file=sys.stderr)
        return 2
    result.skipped.update(peers.skipped({name for situation in situations for name in situation.engines}))
    for name, reason in result.skipped.items():
        console.print(f"without {name}: {reason}", style="yellow")
    possible = [found for situation in situations if (found := situation.possible())]
    budget = args.budget or (0.02 if args.quick else 3.0)
    with options.progress(console) as progress:
        bar = progress.add_task("starting", total=len(possible) * len(chosen))
        for situation in possible:
            progress.update(bar, description=situation.name)
            step = partial(progress.advance, bar)
            result.contention.extend(measure(situation, chosen, args.threads, budget, step))
    result.verdicts.extend(compare.judge(result))
    console.print(table(result.contention, result.cores))
    compare.report(result.verdicts, console)
    console.print(f"written to {results.save(result, args.out)}")
    return 0


def child(asked: dict[str, Any]) -> None:
    if asked.get("what") == "multiply":
        multiply()
        return
    steps = Steps(asked)
    gc.disable()
    remote.serve({"prepare": steps.prepare, "run": steps.run})


if __name__ == "__main__":
    child(json.loads(sys.stdin.buffer.readline()))
