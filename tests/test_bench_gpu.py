"""The bench on a GPU: its whole command with the CPU in the place of the GPU. No timing is asserted.

One file, as all sections run the command on the same stand-in for the device, and share the rows it makes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import one_thread

import torchrnn
from bench import gpu, gpu_cases, gpu_dispatch, gpu_floors, report, results, timing
from bench.cases import GATES, Case
from bench.gpu_cases import LEAST, PERSISTENT, SMALL, STANDARD
from bench.gpu_device import Cuda
from bench.gpu_peers import COMPILE_SECONDS, Ours, TorchLayer, make_peers, size_of
from bench.peers import Problem, Run
from bench.results import Gpu, GpuRow

TINY = Case("lstm", "infer", 4, 1, 8, 8, dtype="bfloat16")


class StandIn:
    """The CPU, behind the interface of a GPU."""

    name = "cpu"
    tf32 = False

    def __init__(self) -> None:
        self.captured = self.released = 0
        self.lost = False

    def why_not(self) -> str | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"name": "stand-in", "cuda": "0", "cudnn": 0}

    def synchronise(self) -> None:
        if self.lost:
            raise RuntimeError("an illegal memory access was encountered")

    def sample(self, function: Callable[[], object], calls: int) -> float:
        return timing.sample(function, calls)

    def capture(self, function: Run) -> Run:
        self.captured += 1
        return function

    def release(self) -> None:
        self.released += 1


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(timing, "MOST_REPEATS", timing.LEAST_REPEATS)
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)  # A tenth of a second for each row.
    with one_thread():
        yield


def bench_of(device: StandIn) -> gpu.Bench:
    return gpu.Bench(device, make_peers(device), 1e-9)


def row_of(case: Case, device: StandIn | None = None, remaining: float = 0.0) -> GpuRow:
    device = device or StandIn()
    row = gpu.new_row(case, device)
    bench_of(device).measure(row, case, remaining)
    return row


def load(folder: Path) -> Gpu:
    found = results.load(folder / "bench.json").gpu
    assert found is not None
    return found


# The command.


def test_quick_run_writes_rows_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = StandIn()
    assert gpu.main(["--quick", "--out", str(tmp_path / "new")], device) == 0
    content = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert {"date", "commit", "machine", "torch", "versions", "options"} <= content.keys()
    result = results.load(tmp_path / "new" / "bench.json")
    assert (result.suites, result.full) == ({"gpu"}, False)
    assert json.loads(results.dumps(result)) == content
    measured = load(tmp_path / "new")
    assert [row.id for row in measured.rows] == [case.id for case in gpu_cases.quick()]
    assert device.released == len(measured.rows) == 2 * 2 * 6
    assert not measured.not_run
    for row in measured.rows:
        case = Case(**row.case)
        wanted = {"torchrnn", "torchrnn step", "torchrnn cluster", "torchrnn graph", "torch.nn"}
        wanted |= set() if case.ragged else {"torch.nn graph"}
        half = gpu_cases.algorithm(dataclasses.replace(case, dtype="float16"))
        wanted |= {"torch.nn fp16"} if half != STANDARD and row.algorithm == STANDARD else set()
        assert row.times.keys() == row.us.keys() == row.errors.keys() == wanted, row.id
        assert row.ratios.keys() == wanted - {"torchrnn"}
        for name, us in row.us.items():
            assert us == pytest.approx(1e3 * row.times[name].median / case.steps)
        for name, ratio in row.ratios.items():
            assert ratio == pytest.approx(row.us[name] / row.us["torchrnn"])
        if case.dtype == "float32":  # Without TF32, of which alone the model knows.
            assert row.floor is row.floor_fraction is None
        else:
            assert row.floor == gpu_floors.microseconds(case)
            assert row.floor_fraction == pytest.approx(row.floor / row.us["torchrnn"])
    text = capsys.readouterr().out
    assert {line.split()[0] for line in text.splitlines() if " of " in line and line[0] == "R"} == {
        bar.name for bar in measured.bars
    }
    assert [(bar.name, bar.peer) for bar in measured.bars if bar.name in ("R6", "R8")] == [
        ("R6", "torch.nn"),
        ("R6", "torch.nn graph"),
        ("R8", "torch.nn"),
    ]
    assert gpu_floors.SOURCE in text
    assert "24 rows measured, 0 not run" in text


def test_run_stops_at_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(gpu.Bench, "measure", lambda *_: None)
    arguments = ["--quick", "--budget", "6", "--out", str(tmp_path)]
    assert gpu.main(arguments, StandIn()) == 0
    measured = load(tmp_path)
    ids = [case.id for case in gpu_cases.quick()]
    assert 0 < len(measured.rows) < len(ids)
    assert [row.id for row in measured.rows] + measured.not_run == ids


def test_killed_run_leaves_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = iter(range(3))

    def measure(*_: Any) -> None:
        if next(rows) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu.Bench, "measure", measure)
    monkeypatch.setattr(gpu, "SAVE_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--quick", "--out", str(tmp_path)], StandIn())
    measured = load(tmp_path)
    assert len(measured.rows) == 2
    assert len(measured.rows) + len(measured.not_run) == len(gpu_cases.quick())


def test_command_needs_only_torch_and_says_so_without_a_gpu(tmp_path: Path) -> None:
    script = f"""
        import runpy, sys
        for name in ("rich", "numpy", "matplotlib", "onnx", "onnxruntime", "openvino", "flashrnn"):
            sys.modules[name] = None  # An import raises ImportError.
        sys.argv = ["bench", "gpu", "--quick", "--out", {str(tmp_path)!r}]
        runpy.run_module("bench", run_name="__main__")
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        cwd=results.ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "bench gpu: torch finds no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_gpu_without_our_kernels_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    why = torchrnn.info() | {"why_not_cuda": "not built"}
    monkeypatch.setattr(torchrnn, "info", lambda: why)
    assert Cuda().why_not() == "torchrnn has no CUDA kernels: not built"


def test_copy_without_a_repository_is_of_the_commit_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--quick", "--filter", "gru-b2-t4-h8-bf16-infer", "--out", str(tmp_path), "--commit", "abc"]
    assert gpu.main(arguments, StandIn()) == 0
    assert results.load(tmp_path / "bench.json").commit != "abc"
    monkeypatch.setattr(results, "git", lambda *_, **__: "")
    assert gpu.main(arguments, StandIn()) == 0
    found = results.load(tmp_path / "bench.json")
    assert (found.commit, found.dirty) == ("abc", False)


def test_bad_filter_and_budget_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--filter", "no such case"], StandIn()) == 2
    assert "no case matches" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.parse(["--budget", "0"])


# What fails.


def spoil(monkeypatch: pytest.MonkeyPatch, kind: type[TorchLayer], change: Callable[[Any, Any], Any]) -> None:
    """Makes a peer return something else."""
    prepare = kind.prepare

    def spoiled(self: Any, problem: Problem) -> Run:
        run = prepare(self, problem)
        return lambda: change(self, run)

    monkeypatch.setattr(kind, "prepare", spoiled)


@pytest.mark.parametrize("value", [2.0, float("nan")])
@pytest.mark.parametrize("mode", gpu_cases.MODES)
def test_wrong_number_fails_the_row_and_is_not_timed(
    mode: str, value: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def last_is_wrong(_: Any, run: Run) -> Sequence[Any]:
        *others, last = run()
        return [*others, last * value]

    spoil(monkeypatch, Ours, last_is_wrong)
    row = row_of(dataclasses.replace(TINY, mode=mode))
    assert "torchrnn" in row.failed
    assert "wrong: tensor" in row.failed["torchrnn"]
    assert not row.times
    assert "torchrnn" not in row.errors
    arguments = ["--quick", "--filter", f"lstm-b2-t4-h8-bf16-{mode}", "--out", str(tmp_path)]
    assert gpu.main(arguments, StandIn()) == 1
    measured = load(tmp_path)
    assert [bool(row.failed) for row in measured.rows] == [True]


def test_wrong_forced_path_fails_the_row_but_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def step_is_wrong(ours: Any, run: Run) -> Sequence[Any]:
        return [2 * value for value in run()] if ours.path == "step" else run()

    spoil(monkeypatch, Ours, step_is_wrong)
    row = row_of(TINY)
    assert row.failed.keys() == {"torchrnn step"}
    assert {"torchrnn", "torch.nn"} <= row.times.keys()
    assert "torchrnn step" not in row.times
    assert f"{row.id}: torchrnn step failed: wrong" in gpu.line(row)


def test_path_that_is_not_served_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_auto(ours: Any, run: Run) -> Sequence[Any]:
        if ours.path != "auto":
            raise RuntimeError("the path does not serve this call: it is small\nand more")
        return run()

    spoil(monkeypatch, Ours, only_auto)
    row = row_of(TINY)
    assert not row.failed
    assert row.skipped["torchrnn cluster"] == "RuntimeError: the path does not serve this call: it is small"
    assert "torchrnn cluster" not in row.times
    assert row.times


def test_ours_that_does_not_run_fails_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise ValueError("no")

    monkeypatch.setattr(Ours, "prepare", refuse)
    row = row_of(TINY)
    # Nor is it a skip if a path or a graph raises anything else than that it does not serve the call.
    names = ("torchrnn", "torchrnn step", "torchrnn cluster", "torchrnn graph")
    assert row.failed == dict.fromkeys(names, "ValueError: no")
    assert not row.times


def test_peer_that_is_wrong_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(
        monkeypatch,
        TorchLayer,
        lambda peer, run: [2 * v for v in run()] if peer.name == "torch.nn fp16" else run(),
    )
    row = row_of(dataclasses.replace(TINY, batch=8, dtype="bfloat16"))
    assert "wrong" in row.skipped["torch.nn fp16"]
    assert not row.failed
    assert "torch.nn" in row.times


def test_run_stops_when_the_device_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = StandIn()

    def crash(*_: Any) -> Any:
        device.lost = True
        raise RuntimeError("an illegal memory access was encountered")

    spoil(monkeypatch, Ours, crash)
    assert gpu.main(["--quick", "--out", str(tmp_path)], device) == 1
    measured = load(tmp_path)
    assert len(measured.rows) == 1
    assert "by torchrnn: RuntimeError: an illegal memory access" in measured.rows[0].failed["torchrnn"]
    assert "the device was lost" in measured.stopped
    assert len(measured.not_run) == len(gpu_cases.quick()) - 1


def test_run_is_resumed_without_what_lost_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = StandIn()

    def cluster_crashes(ours: Any, run: Run) -> Sequence[Any]:
        if ours.path == "cluster":
            device.lost = True
            raise RuntimeError("unspecified launch failure")
        return run()

    spoil(monkeypatch, Ours, cluster_crashes)
    arguments = ["--quick", "--out", str(tmp_path)]
    assert gpu.main(arguments, device) == 1
    (lost,) = load(tmp_path).rows
    assert lost.failed.keys() == {"torchrnn cluster"}
    device.lost = False  # As in a new process.
    assert gpu.main([*arguments, "--resume"], device) == 1
    measured = load(tmp_path)
    assert [row.id for row in measured.rows] == [case.id for case in gpu_cases.quick()]
    assert (measured.rows[0], measured.stopped, measured.not_run) == (lost, "", [])
    assert all({"torchrnn", "torchrnn step"} <= row.us.keys() for row in measured.rows[1:])
    assert not any("torchrnn cluster" in row.us for row in measured.rows)
    assert "skipped: torchrnn cluster, the device was lost" in capsys.readouterr().out


def test_long_case_is_checked_on_fewer_steps_and_timed_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CHECK_FLOPS", 0.0)
    case = dataclasses.replace(TINY, steps=9, mode="train", ragged=True, batch=3)
    steps: list[int] = []
    spoil(monkeypatch, Ours, lambda _, run: steps.append(len((values := run())[0])) or values)
    row = row_of(case)
    assert row.check_steps == 4
    assert {4, 9} == set(steps)
    assert steps[-1] == 9
    assert row.us["torchrnn"] == pytest.approx(1e3 * row.times["torchrnn"].median / 9)


# The grid and its order.


def test_grid_has_every_row_once() -> None:
    cases = gpu_cases.grid()
    assert len({case.id for case in cases}) == len(cases) == 2 * 2 * 7 * 8 * 3 * 4
    assert {case.steps for case in cases} == {512}
    assert {case.hidden for case in cases} == {64, 128, 192, 256, 384, 512, 768, 1024}
    assert {case.batch for case in cases} == {1, 8, 16, 32, 64, 128, 256}
    assert {case.dtype for case in cases} == {"bfloat16", "float16", "float32"}
    assert [case.id for case in gpu_cases.grid()] == [case.id for case in cases]


def test_rows_of_the_bars_come_first_and_in_turns() -> None:
    cases = gpu_cases.grid()
    matter = [gpu_cases.decides(case) or any(bar.covers(case) for bar in gpu_cases.BARS) for case in cases]
    assert matter == sorted(matter, reverse=True)
    rest = [case.hidden > 512 for case, first in zip(cases, matter, strict=True) if not first]
    assert rest == sorted(rest)
    for bar in gpu_cases.BARS:
        assert sum(bar.covers(case) for case in cases[:100]) >= 6, bar.name


def test_rows_that_decide_the_table_of_paths_come_early() -> None:
    cases = gpu_cases.grid()
    count = sum(map(gpu_cases.decides, cases))
    assert count == 2 * 2 * 2 * 6 * 3
    assert sum(map(gpu_cases.decides, cases[:100])) >= 50
    assert sum(map(gpu_cases.decides, cases[: 2 * count])) == count


def test_bars_cover_what_they_name() -> None:
    def names(case: Case) -> list[str]:
        return [bar.name for bar in gpu_cases.BARS if bar.covers(case)]

    def case(cell: str, mode: str, batch: int, hidden: int, dtype: str, **others: Any) -> Case:
        return Case(cell, mode, 512, batch, hidden, hidden, dtype=dtype, **others)

    assert names(case("lstm", "infer", 8, 256, "bfloat16")) == ["R1"]
    assert names(case("lstm", "infer", 16, 256, "bfloat16")) == []
    assert names(case("lstm", "infer", 1, 256, "float32")) == ["R1"]
    assert names(case("lstm", "infer", 8, 256, "float32")) == []
    assert names(case("gru", "infer", 1, 256, "float16")) == ["R1", "R7"]
    assert names(case("lstm", "infer", 8, 128, "float16")) == ["R1'"]
    assert names(case("lstm", "infer", 64, 192, "float32")) == ["R9"]
    assert names(case("lstm", "train", 16, 128, "float32")) == ["R3"]
    assert names(case("gru", "train", 64, 512, "bfloat16")) == ["R3", "R7"]
    assert names(case("lstm", "train", 64, 512, "float16")) == []
    assert names(case("gru", "train", 256, 192, "bfloat16")) == []
    assert names(case("lstm", "train", 64, 512, "float16", directions=2)) == ["R6"]
    assert names(case("lstm", "infer", 64, 128, "float16", layers=2)) == []  # Not STANDARD.
    assert names(case("gru", "infer", 64, 384, "float16", ragged=True)) == ["R8"]
    for variant in gpu_cases.VARIANTS:
        assert names(case("gru", "train", 32, 768, "bfloat16", **variant)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, PERSISTENT),
        ({"batch": 12}, STANDARD),
        ({"batch": 136}, STANDARD),
        ({"hidden": 320, "inputs": 320}, STANDARD),
        ({"hidden": 192, "inputs": 192}, SMALL),
        ({"hidden": 192, "inputs": 192, "mode": "train"}, STANDARD),
        ({"hidden": 128, "inputs": 128, "mode": "train", "layers": 2}, SMALL),
        ({"cell": "gru"}, STANDARD),
        ({"dtype": "float32"}, STANDARD),
        ({"dtype": "bfloat16"}, STANDARD),
        ({"ragged": True}, STANDARD),
        ({"directions": 2}, STANDARD),
        ({"hidden": 128, "inputs": 128, "dtype": "float32"}, SMALL),
        ({"hidden": 128, "inputs": 128, "dtype": "bfloat16"}, STANDARD),
    ],
)
def test_algorithm_follows_the_conditions_of_torch(changes: dict[str, Any], expected: str) -> None:
    case = Case("lstm", "infer", 512, 16, 512, 512, dtype="float16")
    assert gpu_cases.algorithm(dataclasses.replace(case, **changes)) == expected


def test_compiling_peers_have_few_rows_and_need_time(monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = {peer.name: peer for peer in make_peers(StandIn())}
    counts = {
        name: sum(by_name[name].supports(case) for case in gpu_cases.grid())
        for name in ("compiled loop", "flashrnn", "torch.nn fp16", "torch.nn")
    }
    assert counts == {
        "compiled loop": 2 * 2 * 2,
        "flashrnn": 2 * 3,
        "torch.nn fp16": counts["torch.nn fp16"],
        "torch.nn": len(gpu_cases.grid()),
    }
    assert 0 < counts["torch.nn fp16"] < len(gpu_cases.grid()) / 3
    loop = by_name["compiled loop"]
    monkeypatch.setattr("bench.gpu_peers.COMPILED_SIZES", (size_of(TINY),))
    monkeypatch.setattr(type(loop), "available", lambda self: None)
    assert loop.supports(TINY)
    row = row_of(TINY, remaining=COMPILE_SECONDS - 1)
    assert row.skipped["compiled loop"] == "no time to compile"


# The bars.


def a_row(case: Case, ratios: dict[str, float], **changes: Any) -> GpuRow:
    bars = [bar.name for bar in gpu_cases.BARS if bar.covers(case)]
    us = {"torchrnn": 2.0} | {name: 2 * ratio for name, ratio in ratios.items()}
    row = GpuRow(case.id, dataclasses.asdict(case), bars, STANDARD, us=us, ratios=ratios)
    return dataclasses.replace(row, **changes)


def bars_of(*rows: GpuRow) -> dict[tuple[str, str], results.GpuBar]:
    return {(bar.name, bar.peer): bar for bar in gpu_cases.check_bars(rows, gpu_cases.grid())}


def test_bars_are_judged_by_their_worst_row() -> None:
    cases = [case for case in gpu_cases.grid() if gpu_cases.r1(case)]
    rows = [a_row(case, {"torch.nn": 5.0 + i, "torch.nn graph": 3.0 - i}) for i, case in enumerate(cases[:3])]
    bars = bars_of(*rows)
    eager, graphed = bars["R1", "torch.nn"], bars["R1", "torch.nn graph"]
    assert (eager.must, eager.worst, eager.median, eager.met) == (5.0, 5.0, 6.0, True)
    assert (eager.worst_id, eager.measured, eager.cases) == (cases[0].id, 3, len(cases))
    assert (graphed.must, graphed.worst, graphed.median, graphed.met) == (2.5, 1.0, 2.0, False)
    assert bars["R8", "torch.nn"].met is None
    assert [bars[key].verdict for key in bars][:3] == ["so far", "no", "not run"]
    assert dataclasses.replace(eager, cases=3).verdict == "yes"
    rows[0].ratios["torch.nn"] = 4.99
    assert bars_of(*rows)["R1", "torch.nn"].met is False


def test_failed_row_fails_its_bar() -> None:
    case = next(case for case in gpu_cases.grid() if gpu_cases.r8(case))
    row = a_row(case, {}, us={}, failed={"torchrnn": "wrong"})
    bar = bars_of(row)["R8", "torch.nn"]
    assert (bar.met, bar.failed, bar.measured, bar.worst) == (False, [case.id], 0, None)
    assert any(line.startswith("R8") and " no" in line for line in gpu.columns(gpu.table([bar])).splitlines())
    assert ("R8", "torch.nn graph") not in bars_of(row)


def test_rows_slower_than_torch_are_listed() -> None:
    slow = a_row(gpu_cases.grid()[0], {"torch.nn": 0.969})
    fair = a_row(gpu_cases.grid()[1], {"torch.nn": LEAST})
    assert gpu_cases.below([slow, fair, a_row(TINY, {})]) == [slow.id]


# The table of paths.


def test_summary_says_where_which_path_is_the_fastest() -> None:
    def row(batch: int, us: dict[str, float], **changes: Any) -> GpuRow:
        return a_row(Case("gru", "train", 512, batch, 256, 256, **changes), {}, us={"torchrnn": 9.0, **us})

    step, cluster, theirs = "torchrnn step", "torchrnn cluster", "torch.nn"
    rows = [
        row(64, {step: 8.0, cluster: 9.0, theirs: 4.0}),
        row(8, {step: 8.0, cluster: 2.0, theirs: 4.0}),
        row(1, {step: 8.0, theirs: 8.0}),
        row(
            16, {cluster: 1.0, theirs: 8.0}
        ),  # Without the step path, which is always there, it says nothing.
        row(128, {step: 8.0, cluster: 2.0}, layers=2),
        row(8, {step: 6.0, cluster: 3.0, theirs: 2.0}, dtype="bfloat16"),
    ]
    assert gpu_dispatch.table(rows) == [
        ("dtype", "cell", "pass", "H", "at B", "cluster / step", "torch.nn / best of ours"),
        ("bfloat16", "gru", "train", "256", "8", "8: 2.00", "8: 1.50"),
        ("float32", "gru", "train", "256", "1 8 64", "8: 4.00", "64: 2.00"),
    ]


# The floors: tables of the notes on CUDA kernels, forward/backward in microseconds per step.

ROWS = (8, 16, 32, 64, 128, 256)
TABLES = {
    ("lstm", "bfloat16"): """
        128  0.42/0.48  0.42/0.48  0.42/0.48  0.42/0.49  0.43/0.49  0.43/0.49
        256  0.49/0.62  0.49/0.62  0.49/0.62  0.52/0.65  0.64/0.77  0.64/0.77
        512  0.76/1.03  0.76/1.03  0.76/1.03  0.94/1.25  1.34/2.24  2.15/3.76
        768  0.89/1.58  0.95/1.58  1.04/1.58  1.31/2.02  2.07/3.50  3.61/6.47
        1024 1.00/1.99  1.09/2.08  1.32/2.29  2.11/4.06  3.68/7.58  6.83/14.63""",
    ("lstm", "float32"): """
        128  0.48/0.48  0.48/0.48  0.48/0.48  0.48/0.49  0.50/0.51  0.50/0.51
        256  0.64/0.65  0.64/0.65  0.64/0.65  0.75/0.76  0.96/0.98  0.96/0.98
        512  1.00/1.25  1.00/1.25  1.09/1.25  1.31/2.23  2.09/3.74  3.64/6.23
        768  1.23/2.71  1.36/2.83  1.53/2.99  2.52/5.43  4.51/10.32 8.49/20.12
        1024 1.47/3.44  1.63/3.60  2.74/6.67  4.94/12.80 9.36/25.07 18.18/49.61""",
    ("gru", "float16"): """
        128  0.42/0.47  0.42/0.47  0.42/0.47  0.42/0.47  0.43/0.47  0.43/0.47
        256  0.49/0.62  0.49/0.62  0.49/0.62  0.50/0.63  0.59/0.71  0.59/0.71
        512  0.71/0.97  0.71/0.97  0.71/0.97  0.88/1.14  1.23/1.87  1.93/3.22
        768  0.89/1.38  0.91/1.41  0.98/1.45  1.18/1.66  1.83/2.79  3.12/5.05
        1024 1.00/1.66  1.04/1.70  1.21/1.86  1.89/3.20  3.25/5.86  5.96/11.19""",
}
# LSTM bf16, T=512, I=H: forward ms / training ms, with the products outside of the recurrence and launches.
TOTAL_ROWS = (1, 8, 32, 64, 128, 256)
TOTALS = """
    128  0.22/0.49 0.23/0.49 0.23/0.50 0.23/0.52 0.24/0.55 0.26/0.60
    256  0.26/0.60 0.26/0.61 0.27/0.65 0.30/0.73 0.39/0.96 0.45/1.17
    512  0.40/0.95 0.41/1.00 0.45/1.16 0.59/1.57 0.91/2.71 1.53/4.74
    768  0.47/1.30 0.49/1.41 0.66/1.84 0.92/2.68 1.55/4.78 2.81/8.99
    1024 0.53/1.59 0.58/1.77 0.90/2.72 1.51/4.87 2.74/9.17 5.20/17.78"""


def entries(text: str, batches: Sequence[int]) -> list[tuple[int, int, float, float]]:
    """Returns H, B and the two numbers of each cell of a table."""
    found = []
    for line in text.split("\n")[1:]:
        hidden, *cells = line.split()
        for batch, cell in zip(batches, cells, strict=True):
            first, second = map(float, cell.split("/"))
            found.append((int(hidden), batch, first, second))
    return found


@pytest.mark.parametrize(("cell", "dtype"), TABLES)
def test_floor_of_a_step_is_that_of_the_notes(cell: str, dtype: str) -> None:
    for hidden, batch, forward, backward in entries(TABLES[cell, dtype], ROWS):
        case = Case(cell, "train", 512, batch, hidden, hidden, dtype=dtype)
        assert gpu_floors.recurrence(case, False) == pytest.approx(forward, rel=0.15), case.id
        assert gpu_floors.recurrence(case, True) == pytest.approx(backward, rel=0.15), case.id


def test_floor_of_a_case_is_that_of_the_notes() -> None:
    for hidden, batch, infer, train in entries(TOTALS, TOTAL_ROWS):
        for mode, total in (("infer", infer), ("train", train)):
            case = Case("lstm", mode, 512, batch, hidden, hidden, dtype="bfloat16")
            assert 512e-3 * gpu_floors.microseconds(case) == pytest.approx(total, rel=0.15), case.id


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        ("bfloat16", {64: 1, 128: 2, 256: 4, 384: 8, 512: 16}),
        ("float32", {64: 1, 128: 2, 256: 8}),
    ],
)
@pytest.mark.parametrize("cell", GATES)
def test_floor_knows_the_clusters_of_the_kernels(cell: str, dtype: str, sizes: dict[int, int]) -> None:
    for hidden, blocks in sizes.items():
        case = Case(cell, "train", 512, 8, hidden, hidden, dtype=dtype)
        ours = gpu_floors.Layout(True, blocks, hidden // blocks, 8)
        assert ours in gpu_floors.layouts(case)
        for backward in (False, True):
            assert gpu_floors.recurrence(case, backward) <= gpu_floors.step(case, ours, backward)


def test_every_row_of_the_grid_has_a_floor() -> None:
    floors = {case: gpu_floors.microseconds(case) for case in (*gpu_cases.grid(), *gpu_cases.quick())}
    assert all(floor > 0 for floor in floors.values())
    for case, floor in floors.items():
        if case.layers == 2:
            assert floor == pytest.approx(2 * floors[dataclasses.replace(case, layers=1)])


# The report.


def test_report_writes_a_section_only_for_a_gpu_result(tmp_path: Path) -> None:
    quick = dataclasses.replace(results.describe({"quick": False, "filter": ""}), dirty=False)
    (case, *others) = (case for case in gpu_cases.grid() if gpu_cases.r1(case))
    rows = [a_row(case, {"torch.nn": 4.5, "torch.nn graph": 2.75}, floor=1.0, floor_fraction=0.5)]
    measured = Gpu(StandIn().describe(), rows, ["rest"], gpu_cases.check_bars(rows, [case, *others]))
    path = tmp_path / "gpu-1.json"
    path.write_text(results.dumps(dataclasses.replace(quick, gpu=measured)))
    picked = report.pick([path], full=True, dirty=False)
    assert picked.keys() == {"gpu"}
    text = report.section(picked, [])
    words = " ".join(text.split())
    assert "On one stand-in: " in words
    assert "Of 2 rows 1 were run; 0 of them" in words
    kind = "R1: inference B<=8 H<=256 bf16; fp16, fp32 at H=256 B=1"
    assert f"| {kind} | torch.nn | no | 5.00 | 4.50 | 4.50 | 1 of {len(others) + 1} |" in text
    assert f"| {kind} | torch.nn graph | so far | 2.50 | 2.75 | 2.75 | 1 of {len(others) + 1} |" in text
    assert f"| {case.id} | 2.00 | 4.50 | 2.75 | 50% |" in text
    assert "`gpu-1.json` (gpu): stand-in, CUDA 0, cuDNN 0, " in words
    (tmp_path / "cpu.json").write_text(results.dumps(dataclasses.replace(quick, runs=[])))
    assert "On one" not in report.section(report.pick([tmp_path / "cpu.json"], full=True, dirty=False), [])


# The device, where there is one.


@pytest.mark.gpu  # Which is what has it skipped elsewhere.
@pytest.mark.parametrize("cell", GATES)
def test_graph_replays_a_call_and_events_time_it(cell: str) -> None:
    device = Cuda()
    case = Case(cell, "train", 4, 2, 8, 8)
    bench = gpu.Bench(device, make_peers(device), 1e-9)
    row = gpu.new_row(case, device)
    bench.measure(row, case, 0.0)
    assert not row.failed
    assert {"torchrnn", "torchrnn graph", "torch.nn", "torch.nn graph"} <= row.times.keys()
    assert all(time.median > 0 for time in row.times.values())
