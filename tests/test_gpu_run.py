"""The driver of what needs a GPU, as far as it can be tried without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu import run

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
MACHINE = {"capability": [9, 0], "why_not": None}


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

    monkeypatch.setattr(
        run, "describe", lambda: {"driver": "", "nvcc": "", "commit": "", "changed": True, **MACHINE}
    )
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


@pytest.mark.parametrize("options", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_results_of_pytest_are_read(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', ['a b', '(1, 2) - c'])\n"
        "def test_good(x): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_none(): pytest.skip('no reason')\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-rf", "-p", "no:cacheprovider", *options, "tests"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    found = run.test_results(output)
    assert found["counts"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert found["failures"] == {"tests/test_some.py::test_bad": "assert 1 == 2"}
    # Cut off before the summary, the reason is lost but not the name.
    cut = run.test_results(output.partition("= FAILURES =")[0])
    assert cut["counts"] == found["counts"]
    assert cut["failures"] == {"tests/test_some.py::test_bad": ""}


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
        ("echo '========= ERROR SUMMARY: 0 errors'", run.PASSED),
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


def test_without_a_sanitizer_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "other", "", monkeypatch)
    assert run.sanitize(MACHINE, 3, tmp_path)["outcome"] == run.UNAVAILABLE


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
