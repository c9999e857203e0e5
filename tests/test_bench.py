"""The bench: its cases, statistics, files, and a quick run of everything. No timing is asserted."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import floors, peers, results, timing
from bench import run as bench_run
from bench.cases import QUICK_SIZES, SIZES, Case, cases


def a_row(name: str = "lstm-b1-t1-h8-fp32-infer", ratio: float = 2.0) -> results.Row:
    time = timing.Stats(median=2.0, minimum=1.0, iqr=0.5, repeats=5, calls=3)
    return results.Row(
        name, 1, time, {"torch.nn": time}, {"torch.nn": ratio}, 1.0, 0.1, 0.2, 0.3, {"torchrnn": 1e-7}
    )


def a_result() -> results.Result:
    levels = [floors.Level("L1", 32768, False, 200.0), floors.Level("memory", None, True, 20.0)]
    run = results.Run(1, "avx2", floors.Floors(100.0, "fma loop, avx2", levels), [a_row()])
    return dataclasses.replace(results.describe({"quick": True}), runs=[run])


def test_cases_have_distinct_ids() -> None:
    for sizes in (SIZES, QUICK_SIZES):
        chosen = cases(sizes)
        assert len({case.id for case in chosen}) == len(chosen) == 4 * len(sizes)


def test_case_id_names_what_is_measured() -> None:
    assert Case("lstm", "train", 128, 32, 512, 512).id == "lstm-b32-t128-h512-fp32-train"
    assert Case("gru", "infer", 4, 2, 8, 16).id == "gru-b2-t4-i8-h16-fp32-infer"


def test_case_counts_operations() -> None:
    infer = Case("lstm", "infer", 5, 3, 7, 11)
    assert infer.flops == 2 * 5 * 3 * 44 * (7 + 11)
    assert dataclasses.replace(infer, mode="train").flops == 3 * infer.flops
    assert dataclasses.replace(infer, cell="gru").recurrent_bytes == 4 * 33 * 11


@pytest.mark.parametrize("case", cases(QUICK_SIZES), ids=lambda case: case.id)
def test_peers_compute_the_same(case: Case) -> None:
    problem = peers.make_problem(case)
    exact = peers.EXACT.prepare(problem)()
    # Output, states and, in training, the gradients of input, two weights and two biases.
    states = 2 if case.cell == "lstm" else 1
    assert len(exact) == 1 + states + (5 if case.mode == "train" else 0)
    eps = torch.finfo(torch.float32).eps
    errors = peers.errors(case, [peers.OURS, *peers.PEERS])
    assert errors["torchrnn"] <= 2 * errors["torch.nn"] + 8 * eps


def test_errors_are_seen() -> None:
    case = cases(QUICK_SIZES)[0]

    class Wrong(peers.TorchLayer):
        def prepare(self, problem: peers.Problem) -> peers.Run:
            run = super().prepare(problem)
            return lambda: [2 * value for value in run()]

    assert peers.errors(case, [Wrong("wrong", peers.TORCH_NN)])["wrong"] == pytest.approx(1.0)


def test_long_cases_are_shortened_for_float64() -> None:
    for case in cases():
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


def test_floor_is_arithmetic_or_reading() -> None:
    levels = [
        floors.Level("L2", 1 << 20, False, 200.0),
        floors.Level("L3", 4 << 20, True, 100.0),
        floors.Level("memory", None, True, 10.0),
    ]
    limits = floors.Floors(100.0, "test", levels)
    wide = Case("lstm", "infer", 10, 1024, 256, 256)
    assert limits.milliseconds(wide, 1) == pytest.approx(wide.flops / 100e9 * 1e3)
    limits = floors.Floors(1e9, "test", levels)
    for hidden, threads, bandwidth in ((256, 1, 200), (360, 1, 100), (360, 2, 200), (1024, 4, 10)):
        case = Case("lstm", "train", 10, 1, 1, hidden)
        expected = 20 * case.recurrent_bytes / (bandwidth * 1e9) * 1e3
        assert limits.milliseconds(case, threads) == pytest.approx(expected)


def test_floors_are_measured() -> None:
    limits = floors.measure(threads=1, seconds=0.002)
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


def test_result_survives_its_file(tmp_path: Path) -> None:
    result = a_result()
    path = results.save(result, tmp_path / "new")
    assert results.load(path) == result
    assert path.name.startswith(f"{result.date[:10]}T")
    assert ("-dirty" in path.name) == result.dirty


def test_result_never_replaces_another(tmp_path: Path) -> None:
    result = a_result()
    first = results.save(result, tmp_path)
    content = first.read_bytes()
    second = results.save(result, tmp_path)
    assert second != first
    assert first.read_bytes() == content


def test_geometric_means_are_per_group() -> None:
    rows = [a_row("lstm-b1-t1-h8-fp32-infer", 4.0), a_row("gru-b1-t1-h8-fp32-train", 1.0)]
    means = results.geometric_means(rows, "torch.nn")
    assert means == pytest.approx({"all": 2, "inference": 4, "training": 1, "LSTM": 4, "GRU": 1})
    assert results.geometric_means(rows[:1], "torch.nn").keys() == {"all", "inference", "LSTM"}


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


@pytest.mark.parametrize("program", [["-m", "bench"], ["bench/run.py"]])
def test_quick_run_writes_a_result(tmp_path: Path, program: list[str]) -> None:
    arguments = ["--quick", "--filter", "gru-b2.*train", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *program, *arguments], cwd=results.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "geometric mean of torch.nn / torchrnn" in done.stdout
    (path,) = tmp_path.iterdir()
    (row,) = results.load(path).rows
    assert row.id == "gru-b2-t4-i8-h16-fp32-train"
    assert row.ratios["torch.nn"] == pytest.approx(row.peers["torch.nn"].median / row.ours.median)
    assert all(math.isfinite(error) for error in row.errors.values())
