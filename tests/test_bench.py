"""The bench: its cases, peers, statistics and floors, and a quick run. No timing is asserted."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torchrnn
from bench import contention, floors, memory, peers, results, timing
from bench import run as bench_run
from bench.adapters.cells import CELLS, make_cell
from bench.adapters.loop import CompiledLoop
from bench.adapters.onnx import OnnxRuntime, OpenVino, missing
from bench.cases import GATES, QUICK, QUICK_TF, SUITES, TF_PRODUCTS, Case

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
    for suite in (*SUITES.values(), QUICK, QUICK_TF):
        assert len({case.id for case in suite.cases}) == len(suite.cases) > 0


def test_suites_name_peers_that_exist() -> None:
    names = {peer.name for peer in peers.PEERS}
    assert len(names) == len(peers.PEERS)
    for suite in (*SUITES.values(), QUICK, QUICK_TF):
        assert names.issuperset(suite.peers)


def test_case_id_names_what_is_measured() -> None:
    assert Case("lstm", "train", 128, 32, 512, 512).id == "lstm-b32-t128-h512-fp32-train"
    assert Case("gru", "infer", 28, 150, 28, 150, dtype="bfloat16").id == "gru-b150-t28-i28-h150-bf16-infer"
    assert Case("lstm", "infer", 4, 2, 8, 8, 2, 3, True).id == "lstm-b2-t4-h8-bi-l3-ragged-fp32-infer"
    assert Case("gru", "infer", 1, 1, 8, 8, streaming=True).id == "gru-b1-t1-h8-stream-fp32-infer"
    assert Case("sru", "train", 4, 2, 8, 8, layers=2, keep=0.8).id == "sru-b2-t4-h8-l2-keep0.8-fp32-train"


def test_case_counts_operations() -> None:
    infer = Case("lstm", "infer", 5, 3, 7, 11)
    assert infer.flops == 2 * 5 * 3 * 44 * (7 + 11)
    train = dataclasses.replace(infer, mode="train")
    assert train.flops == 3 * infer.flops
    assert train.scan_flops == 2 * infer.scan_flops == 2 * 2 * 5 * 3 * 44 * 11
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


@pytest.mark.parametrize("case", [*QUICK.cases, *SMALL], ids=by_id)
def test_our_layer_computes_the_same(case: Case) -> None:
    check_errors(case, peers.OURS)


@pytest.mark.parametrize("case", SMALL, ids=by_id)
def test_onnxruntime_computes_the_same(case: Case) -> None:
    check_errors(case, OnnxRuntime())


@pytest.mark.parametrize("case", SMALL, ids=by_id)
def test_openvino_computes_the_same(case: Case) -> None:
    pytest.importorskip("openvino", reason="openvino is in no extra of the tests, because of its size")
    check_errors(case, OpenVino())


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
    stats = timing.stats([0.005, 0.001, 0.002, 0.003, 0.004], calls=2)
    assert dataclasses.astuple(stats) == pytest.approx((1.5, 0.5, 1.0, 5, 2))


def test_plan_is_odd_and_within_its_bounds() -> None:
    for budget in (0.0, 0.1, 0.9, 1.0, 2.0, 1e6):
        rounds = timing.plan(0.1, budget)
        assert rounds % 2 == 1
        assert timing.LEAST_REPEATS <= rounds <= timing.MOST_REPEATS
    assert timing.plan(0.1, 0.95) == 9


def test_interleave_takes_turns_in_alternating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0.0)
    a, b = timing.interleave([lambda: log.append("a"), lambda: log.append("b")], budget=1e-9)
    assert a.repeats == b.repeats == timing.LEAST_REPEATS
    assert "".join(log[-2 * a.repeats :]) == "abbaabbaab"
    assert min(a.minimum, a.iqr) >= 0
    assert a.minimum <= a.median


def test_interleave_pauses_and_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: log.append("."))
    a, b = timing.interleave([lambda: log.append("a"), lambda: log.append("b")], budget=1e-9, pause=1e-3)
    turns = re.findall(r"\.(a+|b+)", "".join(log))
    assert [turn[0] for turn in turns] == list("abbaabbaab")
    assert [len(turn) for turn in turns[:2]] == [a.calls + 1, b.calls + 1]  # And one that does not count.


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
    "arguments", [["--threads", "0"], ["--budget", "nan"], ["--isa", "none"], ["--filter", "("]]
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
    assert train.ratios["torch.nn"] == pytest.approx(train.peers["torch.nn"].median / train.ours.median)
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


def test_contention_measures_two_processes() -> None:
    row = contention.measure(Case("lstm", "infer", 4, 2, 8, 8), "torchrnn", threads=1, budget=0.01)
    assert row.together.repeats >= 2 * timing.LEAST_REPEATS
    assert row.alone_maximum >= row.alone.median
    assert row.together_maximum >= row.together.median
    assert contention.table([row], cores=1).row_count == 1


@pytest.mark.parametrize("command", ["memory", "contention"])
def test_command_without_cases_is_an_error(command: str) -> None:
    module = importlib.import_module(f"bench.{command}")
    assert module.main(["--filter", "no such case"]) == 2
