"""All that needs a GPU, in one command: builds, tests, runs sanitizers, probes the hardware and benches.

    python3 gpu/run.py --out DIR [--stage build|parity|sanitize|bench|all] [--limit SECONDS]

Each stage writes DIR/<stage>.json, also where it fails, runs out of time, or finds no GPU; the next one runs
all the same, and the exit status is 0 if none failed. Needs python3 with torch, pytest and setuptools, nvcc,
ninja, and no network; the build is in place, for the GPU at hand only.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0))
TESTS = [f"tests/test_{name}.py" for name in ("cuda_parity", "parity", "ops", "modules")]
NUMPY_TESTS = ["tests/test_rnn_wrappers.py"]
SHARES = {"build": 0.45, "parity": 0.5, "sanitize": 0.3, "bench": 1.0}
"""What a stage may take of the time that is left when it starts."""
WORKERS = 6  # Processes that share the GPU in tests.
TAIL, LISTED = 6000, 60  # Characters of output, and failures or warnings, that a file keeps.

PASSED, FAILED, OUT_OF_TIME, UNAVAILABLE = "passed", "failed", "out of time", "not available"

DESCRIBE = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
capability = torch.cuda.get_device_capability() if gpus else None
cudnn = torch.backends.cudnn.version()
print(json.dumps({"torch": torch.__version__, "cudnn": cudnn, "gpus": gpus, "capability": capability}))
"""
LOADED = "import json, torchrnn; print(json.dumps(torchrnn.info()))"


class Done(NamedTuple):
    """An ended process."""

    status: int | None
    """Exit status; None if its time ran out."""
    output: str
    """Both streams."""
    seconds: float

    @property
    def outcome(self) -> str:
        """What this means for a stage."""
        return OUT_OF_TIME if self.status is None else FAILED if self.status else PASSED

    def json(self) -> Any:
        """Returns the last line of output, as JSON; None if it is something else."""
        lines = self.output.strip().splitlines()
        try:
            return json.loads(lines[-1]) if lines and self.status == 0 else None
        except json.JSONDecodeError:
            return None


Results = dict[str, Any]
"""Of a stage: ``outcome`` (one of the four), ``summary`` (a few words), and what it has found."""


def run(command: Sequence[str], seconds: float, variables: Mapping[str, str] | None = None) -> Done:
    """Runs a command in the project for so many seconds at most, then ends it and all that it started."""
    start = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | dict(variables or {})
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        # A file, not a pipe: what is left of a killed group may hold a pipe open.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return Done(status, output.read(), time.monotonic() - start)


def python(code: str, seconds: float = 60) -> Done:
    """Runs Python code."""
    return run([sys.executable, "-W", "ignore", "-c", code], seconds)


def first_line(*command: str) -> str | None:
    """Returns the first line that a command prints, None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = run(command, 30)
    return done.output.strip().partition("\n")[0] if done.status == 0 else None


def cuda_tool(name: str) -> str | None:
    """Returns the path of a tool of the CUDA toolkit, or None."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which(name, path=f"{home}/bin") if home else None) or shutil.which(name)


def describe() -> Results:
    """Returns what the results depend on; ``why_not`` says why nothing can run."""
    commit = first_line("git", "rev-parse", "HEAD")
    nvcc = cuda_tool("nvcc")
    machine = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "changed": bool(commit and first_line("git", "status", "--porcelain")),
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": nvcc and run([nvcc, "--version"], 30).output.strip().rpartition("\n")[2],
        "python": sys.version.split()[0],
        "cores": CORES,
    }
    done = python(DESCRIBE)
    found: Results | None = done.json()
    if found is None:
        return machine | {"why_not": f"no torch: {done.output.strip().rpartition(chr(10))[2]}"}
    return machine | found | {"why_not": None if found["gpus"] else "no CUDA device"}


def tail(text: str) -> str:
    """Returns the end of an output, from the start of a line."""
    return text if len(text) <= TAIL else text[-TAIL:].partition("\n")[2]


def build(machine: Results, seconds: float, _out: Path) -> Results:
    """Builds both libraries in place, and loads them."""
    major, minor = machine["capability"]
    # The kernels of sm_90 use instructions that only its own, not its successors, have.
    architecture = f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")
    variables = {
        "TORCHRNN_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": architecture,
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(CORES)),
    }
    # The version of a package that is not installed is in its egg_info.
    command = [sys.executable, "setup.py", "egg_info", "build_ext", "--inplace"]
    logs = ROOT / "build"
    start = time.time()
    done = run(command, seconds, variables)
    said = [done.output]
    said += [p.read_text(errors="replace") for p in logs.glob("**/nvcc/*.log") if p.stat().st_mtime >= start]
    warnings = [line for text in said for line in text.splitlines() if re.search(r"\bwarning\b", line, re.I)]
    loaded = python(LOADED)
    info = loaded.json()
    works = bool(info) and "cuda" in info["kernels"]
    outcome = done.outcome if done.status != 0 or works else FAILED
    return {
        "outcome": outcome,
        "summary": f"{architecture}, {len(warnings)} warnings, kernels {info['kernels'] if info else 'none'}",
        "seconds of compilation": round(done.seconds, 1),
        "warnings": warnings[:LISTED],
        "info": info,
        "output": "" if outcome == PASSED else tail(done.output + loaded.output),
    }


def parity(_machine: Results, seconds: float, _out: Path) -> Results:
    """Runs the tests that need CUDA, none of which may skip."""
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-m", "gpu and not slow"]
    # The project's options are those of plugins that may not be there; nor need there be numpy.
    command += ["-o", "addopts=", "-W", "ignore::pytest.PytestConfigWarning", "-p", "no:cacheprovider"]
    command += ["-W", "ignore:Failed to initialize NumPy"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(CORES, WORKERS))]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["-o", "timeout=90"]
    files = TESTS + (NUMPY_TESTS if importlib.util.find_spec("numpy") else [])
    done = run([*command, *files], seconds, {"FAIL_WITHOUT_CUDA": "1", "COLUMNS": "240"})
    return {**test_results(done.output), "outcome": done.outcome, "output": tail(done.output)}


def test_results(output: str) -> Results:
    """Returns counts and failures from what ``pytest -v`` prints, with xdist or without, ended or cut off."""
    words = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
    plain = re.findall(rf"^(tests/.+?::.+?) ({words})\b", output, re.M)
    spread = re.findall(rf"^\[gw\d+\] \[ *\d+%\] ({words}) (tests/.+?::.+?) *$", output, re.M)
    outcomes = [*plain, *((name, word) for word, name in spread)]
    counts = Counter(word.lower() for _, word in outcomes)
    reasons = dict(re.findall(r"^(?:FAILED|ERROR) (tests/.+?::.+?) - (.*)$", output, re.M))
    failures = {name: reasons.get(name, "") for name, word in outcomes if word in ("FAILED", "ERROR")}
    return {
        "summary": ", ".join(f"{count} {word}" for word, count in counts.most_common()) or "no test has run",
        "counts": counts,
        "failures": dict(list(failures.items())[:LISTED]),
    }


def sanitize(_machine: Results, seconds: float, _out: Path) -> Results:
    """Runs a few small calls of our kernels under each tool of compute-sanitizer."""
    sanitizer = cuda_tool("compute-sanitizer")
    if sanitizer is None:
        return {"outcome": UNAVAILABLE, "summary": "no compute-sanitizer"}
    end, tools = time.monotonic() + seconds, {}
    for left, tool in zip((3, 2, 1), ("memcheck", "racecheck", "synccheck"), strict=True):
        # Only our kernels: all of torch's take minutes. Without torch's cache each tensor has bounds.
        command = [sanitizer, "--tool", tool, "--kernel-name", "kns=torchrnn", "--error-exitcode", "86"]
        command += ["--print-limit", "20", sys.executable, "gpu/sanitize.py"]
        done = run(command, (end - time.monotonic()) / left, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        outcome = UNAVAILABLE if "Device not supported" in done.output else done.outcome
        said = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.output)
        if outcome == PASSED and not said:
            outcome = FAILED  # It did not come to a verdict.
        tools[tool] = {"outcome": outcome, "said": said, "seconds": round(done.seconds, 1)}
        if outcome != PASSED:
            tools[tool]["output"] = tail(done.output)
    outcomes = [tool["outcome"] for tool in tools.values()]
    worst = next(word for word in (FAILED, OUT_OF_TIME, UNAVAILABLE, PASSED) if word in outcomes)
    summary = ", ".join(f"{name} {tool['outcome']}" for name, tool in tools.items())
    return {"outcome": worst, "summary": summary, "tools": tools}


def bench(machine: Results, seconds: float, out: Path) -> Results:
    """Measures the hardware's latencies, then the layers, whose results are a file of their own."""
    end = time.monotonic() + seconds
    probed = probe(machine)
    left = end - time.monotonic()
    # The bench ends by itself within its budget, but for the row that it is at.
    budget = max(left - 30, left / 2, 1)
    command = [
        sys.executable,
        "-m",
        "bench",
        "gpu",
        "--out",
        str(out / "layers"),
        "--budget",
        f"{budget:.0f}",
    ]
    done = run(command, left)
    outcome = done.outcome if probed["outcome"] in (PASSED, UNAVAILABLE) else probed["outcome"]
    summary = f"probes {probed['outcome']}, layers {done.outcome}"
    return {"outcome": outcome, "summary": summary, "probes": probed, "layers": tail(done.output)}


def probe(machine: Results) -> Results:
    """Builds and runs gpu/probes.cu; what it prints before a probe fails is kept."""
    nvcc, (major, minor) = cuda_tool("nvcc"), machine["capability"]
    if nvcc is None or major < 9:
        return {"outcome": UNAVAILABLE, "why": "it takes nvcc, and a GPU with clusters"}
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "probes")
        architecture = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
        code = f"arch=compute_{architecture},code=sm_{architecture}"
        built = run(
            [nvcc, "-std=c++20", "-O3", "-Icsrc", "-gencode", code, "gpu/probes.cu", "-o", program], 90
        )
        if built.status != 0:
            return {"outcome": built.outcome, "output": tail(built.output)}
        done = run([program], 60)
    measured: Results = {}
    for line in done.output.splitlines():
        if line.startswith("{"):
            measured |= json.loads(line)
    return {
        "outcome": done.outcome,
        "measured": measured,
        "output": "" if done.status == 0 else tail(done.output),
    }


STAGES: dict[str, Callable[[Results, float, Path], Results]] = {
    "build": build,
    "parity": parity,
    "sanitize": sanitize,
    "bench": bench,
}


def attempt(name: str, machine: Results, seconds: float, out: Path) -> Results:
    """Runs a stage; a mistake in it must not cost the results of the others."""
    if machine["why_not"]:
        return {"outcome": FAILED, "summary": machine["why_not"]}
    if seconds < 1:
        return {"outcome": OUT_OF_TIME, "summary": "no time was left"}
    try:
        return STAGES[name](machine, seconds, out)
    except Exception as error:
        return {"outcome": FAILED, "summary": f"gpu/run.py: {type(error).__name__}: {error}"}


def stages(asked: str, machine: Results) -> list[str]:
    """Returns the stages to run: the asked ones, after the build where that has not been made."""
    if asked == "all":
        return list(STAGES)
    if asked == "build" or machine["why_not"]:
        return [asked]
    info = python(LOADED).json() or {"kernels": []}
    return [asked] if "cuda" in info["kernels"] else ["build", asked]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results")
    add("--stage", choices=[*STAGES, "all"], default="all", help="what to run [all]")
    add("--limit", type=float, default=540, help="seconds for all stages together [540]")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.limit
    machine = describe()
    rows = []
    names = stages(args.stage, machine)
    for name in names:
        start = time.monotonic()
        share = 1.0 if name == names[-1] else SHARES[name]
        found = attempt(name, machine, (end - start) * share, out)
        seconds = round(time.monotonic() - start, 1)
        result = {"stage": name, "machine": machine, "seconds": seconds, **found}
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        rows.append((name, found["outcome"], f"{seconds} s", found["summary"]))
        print(f"{name}: {found['outcome']}, {seconds} s", flush=True)
    print(f"\n{', '.join(machine.get('gpus') or ['no GPU'])}; driver {machine['driver']}; {machine['nvcc']}")
    changes = " and changes" if machine["changed"] else ""
    print(f"torch {machine.get('torch')}; commit {machine['commit']}{changes}")
    for name, outcome, seconds_, summary in rows:
        print(f"  {name:<9} {outcome:<14} {seconds_:>8}  {summary}")
    return 0 if all(row[1] in (PASSED, UNAVAILABLE) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
