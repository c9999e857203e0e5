"""The bench: its cases, peers, statistics and floors, and a quick run. No timing is asserted.

One file, as most sections run the same few cases.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import torchrnn
from bench import compare, contention, floors, memory, options, peers, results, timing, worker
from bench import run as bench_run
from bench.adapters import before
from bench.adapters.cells import CELLS, make_cell
from bench.adapters.loop import CompiledLoop
from bench.adapters.onnx import OnnxRuntime, OpenVino, missing
from bench.adapters.problem import make_call
from bench.cases import GATES, QUICK, QUICK_SUITES, SMALL_GATES, STEP_GATES, SUITES, TF_PRODUCTS, Case
from bench.remote import Remote

SMALL = [
    Case(cell, "infer", 5, 3, 7, 8, directions, layers, ragged, streaming=streaming)
    for cell in GATES
    for directions in (1, 2)
    for layers in (1, 3)
    for ragged in (False, True)
    for streaming in (False, True)
]


def by_id(case: Case) -> str:
    return case.id


def test_cases_have_distinct_ids() -> None:
    for suite in (*SUITES.values(), QUICK, *QUICK_SUITES.values()):
        assert len({case.id for case in suite.cases}) == len(suite.cases) > 0


def test_suites_name_peers_that_exist() -> None:
    names = {peer.name for peer in peers.PEERS}
    assert len(names) == len(peers.PEERS)
    for suite in (*SUITES.values(), QUICK, *QUICK_SUITES.values()):
        assert names.issuperset(suite.peers)


def test_case_id_names_what_is_measured() -> None:
    assert Case("lstm", "train", 128, 32, 512, 512).id == "lstm-b32-t128-h512-fp32-train"
    assert Case("gru", "infer", 28, 150, 28, 150, dtype="bfloat16").id == "gru-b150-t28-i28-h150-bf16-infer"
    assert Case("lstm", "infer", 4, 2, 8, 8, 2, 3, True).id == "lstm-b2-t4-h8-bi-l3-ragged-fp32-infer"
    assert Case("gru", "infer", 1, 1, 8, 8, streaming=True).id == "gru-b1-t1-h8-stream-fp32-infer"
    assert Case("sru", "train", 4, 2, 8, 8, layers=2, keep=0.8).id == "sru-b2-t4-h8-l2-keep0.8-fp32-train"
    assert Case("lstmcell", "nograd", 4, 2, 8, 8).id == "lstmcell-b2-t4-h8-fp32-nograd"


def test_small_calls_are_every_class_and_size_without_and_with_a_state() -> None:
    sizes = (1, 4, 16), (1, 8, 32, 128), (16, 64, 256, 512)
    every = set(itertools.product(SMALL_GATES, *sizes, (False, True)))
    for name, mode in (("small", "nograd"), ("small-grad", "grad")):
        cases = SUITES[name].cases
        assert {(case.cell, case.steps, case.batch, case.hidden, case.streaming) for case in cases} == every
        assert {case.mode for case in cases} == {mode}
    assert {(case.steps, case.batch, case.streaming) for case in SUITES["stream"].cases} == {(1, 1, True)}


def test_case_counts_operations() -> None:
    infer = Case("lstm", "infer", 5, 3, 7, 11)
    assert infer.flops == 2 * 5 * 3 * 44 * (7 + 11)
    train = dataclasses.replace(infer, mode="train")
    assert train.flops == 3 * infer.flops
    assert train.scan_flops == 2 * infer.scan_flops == 2 * 2 * 5 * 3 * 44 * 11
    for mode in ("nograd", "grad"):
        bare = dataclasses.replace(infer, mode=mode)
        assert (bare.flops, bare.scan_flops) == (infer.flops, infer.scan_flops)
        assert bare.recurrent_reads == infer.recurrent_reads
    assert dataclasses.replace(infer, cell="gru").recurrent_bytes == 4 * 33 * 11
    assert dataclasses.replace(infer, dtype="bfloat16").recurrent_bytes == 2 * 44 * 11
    stacked = dataclasses.replace(infer, directions=2, layers=3)
    assert stacked.flops == 2 * 5 * 3 * 2 * 44 * ((7 + 11) + 2 * (22 + 11))
    assert stacked.recurrent_reads == 5 * 2 * 3


@pytest.mark.parametrize("name", TF_PRODUCTS)
def test_case_of_a_cell_counts_the_products_of_its_matrices(name: str) -> None:
    case = Case(name, "infer", 5, 3, 7, 11, layers=2)
    matrices = [p for p in make_cell(case).parameters() if p.dim() == 2 and p.size(0) > 1]
    assert case.flops == 2 * 5 * 3 * sum(p.numel() for p in matrices)


def test_ragged_case_counts_half_of_the_tokens_in_no_order() -> None:
    case = Case("gru", "infer", 128, 32, 8, 8, ragged=True)
    assert (min(case.lengths), max(case.lengths), len(case.lengths)) == (1, 128, 32)
    assert sum(case.lengths) == pytest.approx(128 * 32 / 2, rel=0.02)
    assert list(case.lengths) not in (sorted(case.lengths), sorted(case.lengths, reverse=True))
    full = dataclasses.replace(case, ragged=False)
    assert case.flops * 128 * 32 == full.flops * sum(case.lengths)
    assert Case("gru", "infer", 4, 1, 8, 8, ragged=True).lengths == (4,)


def check_errors(case: Case, peer: peers.Peer) -> None:
    errors = peers.errors(case, [peers.PEERS[0], peer])
    assert errors[peer.name] <= 2 * errors["torch.nn"] + 8 * torch.finfo(getattr(torch, case.dtype)).eps


BARE = [case for name in ("small", "small-grad") for case in QUICK_SUITES[name].cases]


@pytest.mark.parametrize("case", [*QUICK.cases, *SMALL, *BARE], ids=by_id)
def test_our_layer_computes_the_same(case: Case) -> None:
    check_errors(case, peers.OURS)


@pytest.mark.parametrize("case", SMALL, ids=by_id)
def test_onnxruntime_computes_the_same(case: Case) -> None:
    check_errors(case, OnnxRuntime())


@pytest.mark.parametrize("case", SMALL, ids=by_id)
def test_openvino_computes_the_same(case: Case) -> None:
    pytest.importorskip("openvino", reason="openvino is in no extra of the tests, because of its size")
    check_errors(case, OpenVino())


@pytest.mark.parametrize("mode", ["nograd", "grad"])
@pytest.mark.parametrize("cell", SMALL_GATES)
def test_bare_call_records_gradients_or_not(cell: str, mode: str) -> None:
    case = Case(cell, mode, 4, 2, 8, 8, streaming=True)
    with peers.grad_mode(case):
        leaves = pytree.tree_leaves(peers.OURS.prepare(peers.make_problem(case))())
    assert {leaf.requires_grad for leaf in leaves} == {mode == "grad"}


def test_bare_call_is_nothing_but_the_call() -> None:
    layer, x, state = torch.nn.GRU(7, 8), torch.randn(5, 3, 7), torch.zeros(1, 3, 8)
    run = make_call(Case("gru", "nograd", 5, 3, 7, 8), layer, x, None)
    assert isinstance(run, functools.partial)
    assert (run.func, len(run.args), run.keywords) == (layer, 1, {})
    run = make_call(Case("gru", "nograd", 5, 3, 7, 8, streaming=True), layer, x, state)
    assert isinstance(run, functools.partial)
    assert run.args[1] is state


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("cell", STEP_GATES)
def test_class_of_one_step_is_called_once_per_step(cell: str, streaming: bool) -> None:
    calls = []

    class Counting(torch.nn.Module):
        def forward(self, x: torch.Tensor, hx: object = None) -> int:
            calls.append((tuple(x.shape), hx))
            return len(calls)

    run = make_call(
        Case(cell, "nograd", 3, 2, 7, 8), Counting(), torch.randn(3, 2, 7), "given" if streaming else None
    )
    assert run() == 3
    assert calls == [((2, 7), "given" if streaming else None), ((2, 7), 1), ((2, 7), 2)]


# torch 2.13 itself, when it traces a step whose state is the result of another.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("cell", GATES)
def test_compiled_loop_computes_the_same(cell: str, mode: str) -> None:
    # Traced but not compiled, which would take seconds.
    check_errors(Case(cell, mode, 5, 3, 7, 8), CompiledLoop("eager"))


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("name", CELLS)
def test_our_cell_computes_the_same_as_the_generic_loop(name: str, mode: str) -> None:
    case = Case(name, mode, 5, 3, 7, 8, layers=2, ragged=True, keep=0.5)
    errors = peers.errors(case, [peers.ours(case), *peers.select(case, ["generic loop", "torchrnn plain"])])
    assert errors.keys() == {"torchrnn", "generic loop"}
    assert errors["torchrnn"] <= 4 * errors["generic loop"] + 8 * torch.finfo(torch.float32).eps


def test_dropout_acts_in_training() -> None:
    train = Case("peephole-lstm", "train", 5, 3, 7, 8, keep=0.5)
    for case, acts in ((train, True), (dataclasses.replace(train, mode="infer"), False)):
        run = peers.ours(case).prepare(peers.make_problem(case))
        first, second = run()[0], run()[0]
        assert bool((first != second).any()) == acts


def test_half_precision_is_compared_with_float32_on_the_same_values() -> None:
    case = Case("lstm", "infer", 5, 3, 7, 8, dtype="bfloat16")
    assert peers.make_problem(case).x.dtype == torch.bfloat16
    errors = peers.errors(case, [peers.OURS, *peers.select(case, ["torchrnn fp32"])])
    assert errors["torchrnn fp32"] <= 8 * torch.finfo(torch.float32).eps < errors["torchrnn"]


def test_problem_has_what_a_case_asks_for() -> None:
    exact = peers.EXACT.prepare(peers.make_problem(Case("lstm", "train", 5, 3, 7, 8, 2, 3, True)))()
    shapes = [tuple(value.shape) for value in exact[:4]]
    assert shapes == [(5, 3, 16), (6, 3, 8), (6, 3, 8), (5, 3, 7)]
    assert len(exact) == 4 + 2 * 3 * 4  # Gradients of two weights and two biases.
    streaming = peers.make_problem(Case("gru", "infer", 1, 3, 7, 8, streaming=True))
    assert [tuple(part.shape) for part in streaming.state] == [(1, 3, 8)]


def test_peers_are_selected_by_name_and_case(monkeypatch: pytest.MonkeyPatch) -> None:
    infer, train = Case("gru", "infer", 1, 1, 8, 8), Case("gru", "train", 128, 8, 256, 256)

    def names(case: Case) -> list[str]:
        return [peer.name for peer in peers.select(case, ["torch.nn", "compiled loop", "onnxruntime"])]

    monkeypatch.setattr(CompiledLoop, "available", lambda self: None)
    assert names(infer) == ["torch.nn", "onnxruntime"]
    assert names(train) == ["torch.nn", "compiled loop"]
    assert peers.skipped(["torch.nn", "onnxruntime"]) == {}
    for name in TF_PRODUCTS:
        assert not names(dataclasses.replace(infer, cell=name))
    monkeypatch.setattr(OnnxRuntime, "available", lambda self: missing("onnx", "no_such_module"))
    assert names(infer) == ["torch.nn"]
    assert peers.skipped(["torch.nn", "onnxruntime"]) == {"onnxruntime": "no_such_module not installed"}


def test_errors_are_seen() -> None:
    case = QUICK.cases[0]

    class Wrong(peers.TorchLayer):
        def prepare(self, problem: peers.Problem) -> peers.Run:
            run = super().prepare(problem)
            return lambda: [2 * value for value in run()]

    wrong = Wrong("wrong", peers.TORCH_LAYERS, peers.packed_forward)
    assert peers.errors(case, [wrong])["wrong"] == pytest.approx(1.0)


def test_long_cases_are_shortened_for_float64() -> None:
    for case in (case for suite in SUITES.values() for case in suite.cases):
        short = peers.shortened(case)
        assert min(case.steps, peers.ERROR_STEPS) <= short.steps <= case.steps
        assert dataclasses.replace(short, steps=case.steps) == case


def test_stats_are_milliseconds_of_one_call() -> None:
    stats = timing.stats([0.005, 0.001, 0.002, 0.003, 0.004], calls=2, ratio=0.5)
    assert dataclasses.astuple(stats) == pytest.approx((3.0, 1.0, 2.0, 5, 2, 0.5))


def test_plan_is_odd_and_within_its_bounds() -> None:
    for budget in (0.0, 0.1, 0.9, 1.0, 2.0, 1e6):
        rounds = timing.plan(0.1, budget)
        assert rounds % 2 == 1
        assert timing.LEAST_REPEATS <= rounds <= timing.MOST_REPEATS
    assert timing.plan(0.1, 0.95) == 9


class Elsewhere:
    """A function that says how long it takes, and notes how often it has been called."""

    def __init__(self, name: str, log: list[tuple[str, int]], *seconds: float) -> None:
        self.name, self.log, self.seconds = name, log, itertools.cycle(seconds)

    def __call__(self) -> None:
        raise AssertionError("it runs elsewhere")

    def sample(self, calls: int, clock: timing.Clock) -> float:
        self.log.append((self.name, calls))
        return calls * next(self.seconds)


def test_interleave_takes_turns_in_another_order_each_time() -> None:
    log: list[tuple[str, int]] = []
    times = timing.interleave([Elsewhere(name, log, 1.0) for name in "abc"], budget=150.0)
    assert [time.repeats for time in times] == [49] * 3
    turns = [name for name, _ in log[-3 * 49 :]]
    rounds = {"".join(turns[i : i + 3]) for i in range(0, len(turns), 3)}
    assert rounds == set(map("".join, itertools.permutations("abc")))


def test_interleave_compares_times_of_the_same_round() -> None:
    log: list[tuple[str, int]] = []
    # Two calls before the first round.
    a, b = Elsewhere("a", log, 9, 9, 9, 1, 2, 4, 8, 16), Elsewhere("b", log, 9, 9, 9, 2, 3, 8, 12, 8)
    times = timing.interleave([a, b], budget=1e-9)
    assert [time.median for time in times] == [4e3, 8e3]
    assert [time.ratio for time in times] == [1.0, 1.5]  # Median of 2, 1.5, 2, 1.5 and 0.5.


def test_interleave_batches_short_calls_after_some_that_do_not_count() -> None:
    log: list[tuple[str, int]] = []
    functions = Elsewhere("short", log, 1e-4), Elsewhere("long", log, 2e-3)
    times = timing.interleave(functions, budget=1e-9)
    assert [time.calls for time in times] == [30, 2]
    assert sorted(log[-15:]) == sorted([("short", 10), ("short", 30), ("long", 2)] * 5)


def test_interleave_pauses_before_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, int]] = []
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: log.append(("pause", 0)))
    functions = Elsewhere("short", log, 1e-4), Elsewhere("long", log, 2e-3), Elsewhere("longer", log, 1.0)
    times = timing.interleave(functions, budget=1e-9, pause=4e-2)
    assert [time.calls for time in times] == [100, 5, 1]
    text = "".join(f"{name} {calls}, " for name, calls in log[-40:])
    turns = ["short 10, short 100, ", "long 1, long 5, ", "longer 1, "]
    assert sorted(text.split("pause 0, ")) == sorted(["", *turns * 5])


ECHO = """
import sys
from bench import remote
def fail(): raise ValueError
remote.serve({"double": lambda x: print("of a call") or 2 * x, "fail": fail})
"""


def start_echo() -> Remote:
    command = [sys.executable, "-c", ECHO]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return Remote(subprocess.Popen(command, cwd=results.ROOT, **pipes))


def test_remote_answers_what_it_is_asked() -> None:
    with start_echo() as remote:
        assert [remote.ask("double", x) for x in (1, [2])] == [2, [2, 2]]
        remote.tell("double", 3)
        assert remote.answer() == 6
    assert remote.process.returncode == 0


def test_remote_that_fails_is_an_error() -> None:
    with start_echo() as remote:
        for what in ("fail", "double"):
            with pytest.raises(RuntimeError, match="failed with status 1"):
                remote.ask(what)


@pytest.mark.parametrize(
    ("threads", "own_threads", "clock", "pause"),
    [
        (1, False, time.process_time, 0.0),
        (1, True, time.perf_counter, 0.0),
        (2, False, time.perf_counter, 0.0),
        (2, True, time.perf_counter, timing.PAUSE),
    ],
)
def test_one_thread_is_measured_by_the_time_it_runs(
    threads: int, own_threads: bool, clock: timing.Clock, pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def interleave(functions: list[Any], budget: float, pause: float, sample: Any) -> list[timing.Stats]:
        found.append((sample.keywords["clock"], pause))
        return [timing.stats([1.0, 1.0])] * len(functions)

    monkeypatch.setattr(worker, "interleave", interleave)
    monkeypatch.setattr(worker.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(peers.PEERS[0], "own_threads", own_threads)
    case = Case("gru", "nograd", 4, 2, 8, 8)
    times, _ = worker.measure(case, peers.PEERS[:1], budget=1.0)
    assert list(times) == ["torchrnn", "torch.nn"]
    assert list(worker.compare(case, [peers.OURS, peers.PEERS[0]], budget=1.0)) == ["torch.nn"]
    apart = (timing.clock_of(threads), timing.PAUSE if threads > 1 else 0.0)
    assert found == [(clock, pause), *[apart] * worker.PREPARATIONS]


def test_checkouts_are_compared_by_the_median_of_some_preparations(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = iter((0.5, 0.9, 0.8))
    found = []

    def interleave(functions: list[Any], budget: float, *_: Any) -> list[timing.Stats]:
        found.append(budget)
        return [timing.stats([1.0, 1.0], ratio=ratio) for ratio in (1.0, next(ratios))]

    monkeypatch.setattr(worker, "interleave", interleave)
    case = Case("gru", "nograd", 4, 2, 8, 8)
    assert worker.compare(case, [peers.OURS, peers.OURS], budget=9.0)["torchrnn"].ratio == 0.8
    assert found == [3.0] * 3
    ratios = iter((0.5,))  # One that takes all of the budget is not repeated.
    assert worker.compare(case, [peers.OURS, peers.OURS], budget=1e-9)["torchrnn"].ratio == 0.5


def test_another_checkout_is_left_out_where_it_has_no_such_cell() -> None:
    case = Case("sru", "infer", 4, 2, 8, 8)
    assert worker.compare(case, [peers.OURS, peers.OURS], budget=1.0) == {}
    assert worker.compare(QUICK.cases[0], [], budget=1.0) == {}


LEVELS = [
    floors.Level("L2", 1 << 20, False, 200.0),
    floors.Level("L3", 4 << 20, True, 100.0),
    floors.Level("memory", None, True, 10.0),
]


def test_floor_of_many_rows_is_arithmetic() -> None:
    limits = floors.Floors(100.0, "test", LEVELS)
    for mode in ("infer", "train"):
        case = Case("lstm", mode, 10, 1024, 256, 256)
        assert limits.milliseconds(case, 1) == pytest.approx(case.flops / 100e9 * 1e3)


def test_floor_of_one_row_is_reading_and_the_projection() -> None:
    limits = floors.Floors(100.0, "test", LEVELS)
    for hidden, threads, bandwidth in ((256, 1, 200), (360, 1, 100), (360, 2, 200), (1024, 4, 10)):
        case = Case("lstm", "infer", 10, 1, hidden, hidden)
        reading = 10 * case.recurrent_bytes / (bandwidth * 1e9)
        projection = max(case.projection_flops / 100e9, case.recurrent_bytes / (bandwidth * 1e9))
        assert limits.milliseconds(case, threads) == pytest.approx(1e3 * (reading + projection))


def test_floor_reads_half_precision_in_half_the_time() -> None:
    limits = floors.Floors(1e9, "test", LEVELS)
    case = Case("lstm", "infer", 10, 1, 256, 256)
    narrow = dataclasses.replace(case, dtype="float16")
    assert limits.milliseconds(narrow, 1) == pytest.approx(limits.milliseconds(case, 1) / 2)


def test_floor_without_bandwidths_is_arithmetic() -> None:
    case = Case("gru", "infer", 10, 1, 256, 256)
    assert floors.Floors(100.0, "test", []).milliseconds(case, 1) == pytest.approx(case.flops / 100e9 * 1e3)


def test_shared_cache_is_measured_within_this_machine() -> None:
    l2 = floors.Level("L2", 2 << 20, False, 200.0)
    assert floors.read_size(2 << 20, False, [], 2) == 1 << 20
    assert floors.read_size(260 << 20, True, [l2], 2) == 32 << 20
    assert floors.read_size(32 << 20, True, [l2], 2) == 16 << 20
    assert floors.read_size(None, True, [dataclasses.replace(l2, size=32 << 20, shared=True)], 2) == 128 << 20


def test_floors_are_measured() -> None:
    limits = floors.measure(threads=1, seconds=0.002, most=1 << 22)
    assert limits.gflops > 0
    assert limits.peak_source
    assert all(level.bandwidth > 0 for level in limits.levels)
    assert floors.matmul_gflops() > 0


def test_floors_merge_to_the_higher_rates() -> None:
    a, b = (
        floors.Floors(peak, "test", [floors.Level("L1", 1024, False, rate)])
        for peak, rate in ((1.0, 4.0), (2.0, 3.0))
    )
    assert floors.merged(a, b) == floors.Floors(2.0, "test", a.levels)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threads", "0"],
        ["--budget", "nan"],
        ["--isa", "none"],
        ["--filter", "("],
        ["--peers", "torch.nn,nobody"],
        ["--before", "bench"],
    ],
)
def test_bad_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_run.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_filter_without_cases_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_run.main(["--filter", "no such case"]) == 2
    assert "no case matches" in capsys.readouterr().err


def test_bench_runs_as_a_file() -> None:
    command = [sys.executable, "bench/run.py", "--filter", "no such case"]
    done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, "no case matches" in done.stderr) == (2, True)


def test_quick_run_writes_a_result(tmp_path: Path) -> None:
    arguments = ["--quick", "--filter", "gru-b2.*(train|ragged)", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=results.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "geometric mean of torch.nn / torchrnn" in done.stdout
    (path,) = tmp_path.iterdir()
    result = results.load(path)
    train, ragged = result.rows
    assert train.id == "gru-b2-t4-i8-h16-fp32-train"
    assert Case(**train.case).id == train.id
    assert train.ratios["torch.nn"] == train.peers["torch.nn"].ratio
    assert {"torch.nn", "onnxruntime"} <= ragged.ratios.keys()
    assert all(name in done.stdout for name in result.skipped)
    for row in result.rows:
        assert row.errors.keys() == {"torchrnn", *row.ratios}
        assert all(math.isfinite(error) for error in row.errors.values())


def test_quick_run_of_cells_writes_a_result(tmp_path: Path) -> None:
    arguments = ["--suite", "tf", "--quick", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments, "--filter", "l2|sru"],
        cwd=results.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    result = results.load(path)
    assert result.suites == {"tf"}
    *stacks, sru = result.rows
    assert [row.case["keep"] for row in stacks] == [0.8, 1, 1]
    assert all(row.ratios.keys() == {"generic loop", "torchrnn plain"} for row in stacks)
    assert sru.ratios.keys() == {"generic loop"}
    for row in result.rows:
        assert row.errors.keys() == {"torchrnn", "generic loop"}
        assert all(math.isfinite(error) for error in row.errors.values())


def test_memory_counts_at_least_what_a_step_returns() -> None:
    case = Case("gru", "train", 256, 8, 64, 64)
    if not memory.CLEAR.exists():  # Not Linux.
        assert memory.main([]) == 2
        return
    measured = memory.measure(case, threads=1, budget=0.02)
    assert measured.peaks.keys() == measured.times.keys() >= {"torchrnn", "torch.nn"}
    output_and_gradient = 2 * 4 * 256 * 8 * 64
    assert all(output_and_gradient <= peak < 50 * output_and_gradient for peak in measured.peaks.values())


def test_memory_includes_recomputation_where_a_layer_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recomputing(torchrnn.GRU):
        def __init__(self, *args: Any, recompute: bool = False, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    class Plain(torchrnn.GRU):
        def __init__(self, input_size: int, hidden_size: int) -> None:
            super().__init__(input_size, hidden_size)

    monkeypatch.setitem(peers.LAYERS, "gru", Recomputing)
    assert list(memory.variants("gru")) == ["torch.nn", "torchrnn", memory.RECOMPUTE]
    monkeypatch.setitem(peers.LAYERS, "gru", Plain)
    assert list(memory.variants("gru")) == ["torch.nn", "torchrnn"]


def test_contention_measures_beside_everything_at_once() -> None:
    situation = contention.Situation("all", True, 1, ("onnxruntime",), ("onnxruntime",))
    case = Case("lstm", "infer", 4, 2, 8, 8)
    rows = contention.measure(situation, [case], threads=1, budget=0.02)
    assert [(row.name, row.threads) for row in rows] == [("torchrnn", 1), ("torch.nn", 1)]
    for row in rows:
        assert (row.id, row.situation) == (case.id, "all")
        assert row.time.repeats >= 2 * contention.TURNS
        assert row.time.minimum <= row.time.median <= row.p99 <= row.maximum
    assert contention.table(rows, cores=1).row_count == 1


def test_contention_knows_which_situations_are_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVino, "available", lambda self: "openvino not installed")
    assert contention.Situation("", alive=("onnxruntime", "openvino")).possible() == contention.Situation(
        "", alive=("onnxruntime",)
    )
    assert contention.Situation("", alive=("openvino",)).possible() is None
    assert contention.Situation("", working=("openvino",)).possible() is None
    alone = contention.Situation("", multiplying=1)
    assert alone.possible() == alone


def test_quick_contention_writes_a_result(tmp_path: Path) -> None:
    arguments = ["--quick", "--situations", "alone", "--filter", "gru-b1-t1", "--out", str(tmp_path)]
    assert contention.main(arguments) == 0
    (path,) = tmp_path.iterdir()
    result = results.load(path)
    assert result.suites == {"contention"}
    assert not dataclasses.replace(result, options=result.options | {"quick": False}).full
    steps = [(row.situation, row.name, row.threads) for row in result.contention]
    assert steps == [("alone", "torchrnn", 2), ("alone", "torchrnn", 1), ("alone", "torch.nn", 2)]
    assert [v.against for v in result.verdicts] == [compare.ONE_THREAD, compare.ONE_THREAD_P99]


def test_contention_without_situations_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert contention.main(["--situations", "no such situation"]) == 2
    assert "no situation matches" in capsys.readouterr().err


OTHER = """
import torch
from torch.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
info = lambda: {"isa": ISA}
"""


def make_checkout(folder: Path, isa: str | None = "other") -> Path:
    """Makes what has no more of torchrnn than its layers, and a bench of its own that does not work."""
    for name, text in (("torchrnn", OTHER.replace("ISA", repr(isa))), ("bench", "1 / 0")):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
    return folder


def test_another_checkout_runs_the_same_case(tmp_path: Path) -> None:
    case = Case("lstm", "nograd", 4, 2, 7, 8, streaming=True)
    with before.start(make_checkout(tmp_path), threads=1) as other:
        errors = peers.errors(case, [peers.PEERS[0], other])
        assert errors["before"] == errors["torch.nn"]
        (time,) = timing.interleave([other.prepare(peers.make_problem(case))], budget=1e-9)
    assert time.repeats == timing.LEAST_REPEATS
    assert time.minimum > 0


def test_quick_run_against_another_checkout_writes_a_verdict(tmp_path: Path) -> None:
    folder = make_checkout(tmp_path / "other")
    arguments = ["--suite", "small", "--quick", "--filter", "gru-b2.*stream", "--threads", "1", "--peers", ""]
    command = [sys.executable, "-m", "bench", *arguments, "--before", folder, "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").iterdir()
    result = results.load(path)
    assert result.before == {"commit": "unknown", "dirty": True, "isa": "other", "torch": torch.__version__}
    (row,) = result.rows
    assert row.ratios.keys() == {"before"}
    assert row.errors.keys() == {"torchrnn", "before"}
    (verdict,) = result.verdicts
    assert (verdict.suite, verdict.against, verdict.rows, verdict.most_mean) == ("small", "before", 1, 1.3)
    assert verdict.mean == pytest.approx(1 / row.ratios["before"])


def test_another_checkout_must_be_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkout(tmp_path, isa=None)
    assert bench_run.main(["--before", str(folder), "--quick"]) == 2
    assert "build it there first" in capsys.readouterr().err


def test_another_checkout_runs_in_its_own_python(tmp_path: Path) -> None:
    assert before.interpreter(tmp_path) == sys.executable
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    assert before.interpreter(tmp_path) == str(own)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux keeps a process on a core")
def test_two_checkouts_on_one_thread_share_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    cores: list[set[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, chosen: cores.append(chosen))
    monkeypatch.setattr(before, "start", lambda folder, *_: contextlib.nullcontext(folder))
    for folder, threads, count in ((None, 1, 0), ("other", 2, 0), ("other", 1, 1)):
        with worker.pair(folder, threads) as found:
            assert found == ([results.ROOT, Path("other")] if folder else [])
        assert [len(chosen) for chosen in cores] == [1] * count


@pytest.mark.parametrize("command", ["memory", "contention"])
def test_command_without_cases_is_an_error(command: str) -> None:
    module = importlib.import_module(f"bench.{command}")
    assert module.main(["--filter", "no such case"]) == 2


def test_a_measuring_process_takes_requests_of_any_length() -> None:
    # As an argument, 128 KB are the most that Linux takes; a suite of small calls has more.
    asked = {"threads": 1, "rows": "x" * 300_000}
    assert options.answer(options.process("json.tool", asked)) == asked
