"""The driver of what needs a GPU, as far as it can be tried without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu import run

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests what is said where there is no GPU")
MACHINE = {"capability": [9, 0], "why_not": None, "commit": None}


@no_gpu
def test_without_a_gpu_every_stage_says_so(tmp_path: Path) -> None:
    done = run.run([sys.executable, "gpu/run.py", "--out", str(tmp_path)], 120)
    assert done.status == 1
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(run.STAGES)
    for name in run.STAGES:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert (found["stage"], found["outcome"], found["summary"]) == (name, "failed", "no CUDA device")
        assert found["machine"]["torch"] == torch.__version__
        assert f"  {name:<9} failed" in done.output.rpartition("commit")[2]


def test_a_mistake_in_one_stage_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def works(*_: Any) -> run.Results:
        return {"outcome": run.PASSED, "summary": "all is well"}

    monkeypatch.setattr(run, "describe", lambda _: {"driver": "", "nvcc": "", "changed": True, **MACHINE})
    monkeypatch.setattr(run, "STAGES", {"build": lambda *_: 1 / 0, "parity": works, "bench": works})
    assert run.main(["--out", str(tmp_path)]) == 1
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[:2] for line in table] == [
        ["build", "failed"],
        ["parity", "passed"],
        ["bench", "passed"],
    ]
    assert "ZeroDivisionError" in json.loads((tmp_path / "build.json").read_text())["summary"]
    monkeypatch.setattr(run, "STAGES", {"build": works})
    assert run.main(["--out", str(tmp_path), "--stage", "build"]) == 0
    assert run.main(["--out", str(tmp_path), "--stage", "build", "--limit", "0"]) == 1
    assert json.loads((tmp_path / "build.json").read_text())["outcome"] == "out of time"


def test_a_command_is_ended_when_its_time_is_up_and_what_it_said_is_kept() -> None:
    # The shell starts a process of its own, which must end too.
    done = run.run(["sh", "-c", "echo begun; sleep 60; echo ended"], 1)
    assert done.status is None
    assert done.outcome == run.OUT_OF_TIME
    assert done.output == "begun\n"
    assert done.seconds < 30


SUITE = """
import os, pytest, torch, warnings

warnings.warn("early")

@pytest.mark.parametrize("x", ["a b", "(1, 2) - c"])
def test_good(x): pass

def test_cluster_comes_last(): pass

def test_bad(): assert 1 == 2

def test_none(): pytest.skip("no reason")

def test_ends(): os._exit(0)

def test_takes_the_device_along():
    def raises(): raise RuntimeError("an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, raises
    assert False

def test_warns(): warnings.warn("late")
"""


def shards(
    folder: Path, suite: str, count: int
) -> tuple[run.Results, list[list[run.Done]], list[run.Results]]:
    """Returns what is found, the ends of the processes of each shard, and the lines they wrote."""
    (folder / "pytest.ini").write_text("[pytest]")
    (folder / "test_some.py").write_text(suite)
    record = folder / "tests.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(folder / "pytest.ini"), "-p", "gpu.shard"]
    command += ["-p", "no:cacheprovider", "--record", str(record), str(folder)]
    end = time.monotonic() + 120
    ends = [run.shard([*command, "--shard", f"{i}/{count}"], record, i, end) for i in range(count)]
    lines = run.read_lines(record)
    return run.test_results(lines), ends, lines


@pytest.mark.parametrize("count", [1, 3])
def test_shards_run_all_tests_whatever_ends_their_processes(tmp_path: Path, count: int) -> None:
    found, ends, lines = shards(tmp_path, SUITE, count)
    assert found["counts"] == {"passed": 4, "failed": 2, "skipped": 1, "cut off": 1}
    assert found["not run"] == 0
    reasons = {name.partition("::")[2]: reason for name, reason in found["failures"].items()}
    assert reasons.keys() == {"test_bad", "test_ends", "test_takes_the_device_along"}
    assert reasons["test_bad"].startswith("assert 1 == 2")
    assert reasons["test_ends"] == "cut off"
    assert reasons["test_takes_the_device_along"].startswith("the device was lost: ")
    assert found["warnings"] == {"UserWarning: early": count + 2, "UserWarning: late": 1}
    assert sum(map(len, ends)) == count + 2
    order = [
        line["test"] for line in lines if line.get("outcome") == "cut off" and line["shard"] == 2 % count
    ]
    assert order[-1].endswith("test_cluster_comes_last")


def test_shards_give_up_in_the_end_and_say_what_has_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "RESTARTS", 1)
    ends_all = "import os\n" + "\n".join(f"def test_{i}(): os._exit(0)" for i in range(run.RESTARTS + 3))
    found, ends, _ = shards(tmp_path, ends_all, 1)
    assert len(ends[0]) == run.RESTARTS + 1
    assert (found["counts"], found["not run"]) == ({"cut off": run.RESTARTS + 1}, 2)
    assert "2 not run" in found["summary"]
    (tmp_path / "tests.jsonl").unlink()
    found, ends, _ = shards(tmp_path, "import nothing_of_this_name", 1)
    assert (found["summary"], len(ends[0])) == ("no test has run", 1)


def test_a_test_that_hangs_ends_its_process(tmp_path: Path) -> None:
    path = tmp_path / "test_some.py"
    path.write_text("import time\ndef test_hangs(): time.sleep(60)\n")
    arguments = [
        "-p",
        "gpu.shard",
        "--shard=0/1",
        f"--record={tmp_path}/tests.jsonl",
        "-c",
        "/dev/null",
        str(path),
    ]
    code = f"import pytest, gpu.shard; gpu.shard.SECONDS = 1; pytest.main({arguments!r})"
    done = run.run([sys.executable, "-c", code], 50)
    assert done.status == 1
    assert "in test_hangs" in done.output
    found = run.test_results(run.read_lines(tmp_path / "tests.jsonl"))
    assert list(found["failures"].values()) == ["cut off"]


@no_gpu
def test_the_stage_of_tests_fails_where_none_could_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "TESTS", ["tests/test_bench_gpu.py"])
    monkeypatch.setattr(run, "NUMPY_TESTS", [])
    found = run.parity(MACHINE, 120, tmp_path)
    assert (found["outcome"], found["summary"]) == (run.FAILED, "2 failed")
    assert all("FAIL_WITHOUT_CUDA is set" in reason for reason in found["failures"].values())


def program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a shell script on PATH, where nothing of CUDA's is found otherwise."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_HOME", raising=False)


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'; echo 9 calls", run.PASSED),
        ("echo '========= ERROR SUMMARY: 1 error'; exit 86", run.FAILED),
        ("echo 9 calls", run.FAILED),
        ("echo '========= Error: Device not supported'; exit 1", run.UNAVAILABLE),
        ("sleep 60", run.OUT_OF_TIME),
    ],
)
def test_verdicts_of_the_sanitizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, outcome: str
) -> None:
    program(tmp_path, "compute-sanitizer", script, monkeypatch)
    found = run.sanitize(MACHINE, 3, tmp_path)
    assert found["outcome"] == outcome
    assert [tool["outcome"] for tool in found["tools"].values()] == [outcome] * 3
    if outcome == run.PASSED:
        assert found["report"].splitlines()[0] == "memcheck: ERROR SUMMARY: 0 errors, 9 calls"


def test_without_a_sanitizer_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(tmp_path, "other", "", monkeypatch)
    monkeypatch.setattr(run, "cuda_tool", lambda _: None)  # Where CUDA usually is there may be one.
    monkeypatch.setattr(run, "describe", lambda _: {"driver": "", "nvcc": "", "changed": True, **MACHINE})
    monkeypatch.setattr(run, "stages", lambda *_: ["sanitize"])
    assert run.main(["--out", str(tmp_path), "--stage", "sanitize"]) == 2
    assert "sanitize  not available" in capsys.readouterr().out.splitlines()[-1]


def test_the_bench_goes_on_where_the_device_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands, ends = [], ["the device was lost in this", "the device was lost in that", ""]

    def bench(command: list[str], *_: Any) -> run.Done:
        commands.append(command)
        (tmp_path / "bench.json").write_text(json.dumps({"gpu": {"stopped": ends[len(commands) - 1]}}))
        return run.Done(1, "", 0.0)

    monkeypatch.setattr(run, "run", bench)
    run.layers(time.monotonic() + 100, tmp_path, "abc")
    assert [command[-1] == "--resume" for command in commands] == [False, True, True]


def test_what_was_measured_is_printed_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "a row: 1.0 us/step\n\nratios: time per step\nR1 yes\n"
    probed = {"outcome": run.PASSED, "measured": {"hop, ns": {"2": 1.5}}}
    monkeypatch.setattr(run, "probe", lambda _: probed)
    monkeypatch.setattr(run, "layers", lambda *_: run.Done(0, said, 1.0))
    found = run.bench(MACHINE, 1.0, tmp_path)
    assert found["report"].splitlines() == ["hop, ns: {'2': 1.5}", "ratios: time per step", "R1 yes"]
    assert (found["outcome"], found["output"]) == (run.PASSED, "a row: 1.0 us/step")
    monkeypatch.setattr(run, "describe", lambda _: {"driver": "", "nvcc": "", "changed": True, **MACHINE})
    monkeypatch.setattr(run, "STAGES", {"bench": lambda *_: {**found, "outcome": run.FAILED}})
    monkeypatch.setattr(run, "stages", lambda *_: ["bench"])
    assert run.main(["--out", str(tmp_path), "--stage", "bench"]) == 1
    text = capsys.readouterr().out
    assert text.index("a row:") < text.index("R1 yes") < text.index("  bench     failed")


def test_what_was_probed_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = tmp_path / "built"
    built.write_text('#!/bin/sh\necho \'{"first": {"2": 1.5}}\'\necho probes: trap\nexit 1\n')
    built.chmod(0o755)
    program(tmp_path, "nvcc", f'for last in "$@"; do :; done; cp {built} $last', monkeypatch)
    found = run.probe(MACHINE)
    assert found["measured"] == {"first": {"2": 1.5}}
    assert found["outcome"] == run.FAILED
    assert "probes: trap" in found["output"]
    assert run.probe({"capability": [8, 0]})["outcome"] == run.UNAVAILABLE


@no_gpu
@pytest.mark.parametrize("fails", [False, True])
def test_no_test_of_cuda_skips_in_silence(fails: bool) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["tests/test_cuda_parity.py", "-k", "lengths_may_be or obeyed"]
    environment = os.environ | {"FAIL_WITHOUT_CUDA": str(int(fails))}
    done = subprocess.run(command, cwd=run.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == fails
    assert ("2 errors" if fails else "2 skipped") in done.stdout  # It is the setup that skips.
    assert ("FAIL_WITHOUT_CUDA is set, and this is skipped: Skipped: needs CUDA" in done.stdout) == fails
