"""All that needs a GPU, in one command: builds, tests, runs sanitizers, probes the hardware and benches.

    python3 gpu/run.py --out DIR [--stage build|parity|sanitize|bench|all] [--limit SECONDS]

Each stage writes DIR/<stage>.json, also where it fails, runs out of time, or finds no GPU; the next one runs
all the same. DIR/tests.jsonl and DIR/layers/bench.json grow while tests and bench run. The exit status is 0
if all stages passed, 1 if one did not, and 2 if none failed but one could not run. Needs python3 with torch,
pytest and setuptools, nvcc, ninja, and no network; the build is in place, for the GPU at hand only.

One file, as all stages run commands, and tell what became of them, in the same way.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0))
TESTS = [f"tests/test_{name}.py" for name in ("cuda_parity", "parity", "ops", "modules", "bench_gpu")]
NUMPY_TESTS = ["tests/test_rnn_wrappers.py"]
SHARES = {"build": 0.45, "parity": 0.5, "sanitize": 0.3, "bench": 1.0}
"""What a stage may take of the time that is left when it starts."""
WORKERS = 6  # Processes that share the GPU in tests.
RESTARTS = 4  # Processes that follow one which was lost, in tests and in the bench.
TAIL, LISTED = 6000, 60  # Characters of output, and failures or warnings, that a file keeps.
SHOWN = 20  # Lines of a stage's output that are printed where it did not pass.
TOOLS = ("memcheck", "racecheck", "synccheck")

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
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | dict(variables or {})
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


def python(code: str, seconds: float = 180) -> Done:
    """Runs Python code; the first import of torch on a machine reads gigabytes."""
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


def describe(commit: str | None = None) -> Results:
    """Returns what the results depend on; ``why_not`` says why nothing can run.

    Args:
        commit: What this is a copy of, where there is no repository.
    """
    commit = first_line("git", "rev-parse", "HEAD") or commit
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
        return machine | {
            "why_not": f"no torch ({done.outcome}): {done.output.strip().rpartition(chr(10))[2]}"
        }
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
    # Without force the library would not be linked again where only a .cu file, or the flags, have changed.
    command = [sys.executable, "setup.py", "egg_info", "build_ext", "--inplace", "--force"]
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


def parity(_machine: Results, seconds: float, out: Path) -> Results:
    """Runs the tests that need CUDA, none of which may skip, in several processes: see gpu/shard.py."""
    end, record = time.monotonic() + seconds, out / "tests.jsonl"
    record.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "gpu and not slow"]
    command += ["-p", "gpu.shard", "--record", str(record), "--continue-on-collection-errors"]
    # The options and warnings in pyproject.toml are for plugins and a torch that may not be those here.
    command += ["-o", "addopts=", "-W", "default", "-W", "ignore::pytest.PytestConfigWarning"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:timeout"]
    command += TESTS + (NUMPY_TESTS if importlib.util.find_spec("numpy") else [])
    count = min(CORES, WORKERS)
    with ThreadPoolExecutor(count) as pool:
        commands = [[*command, "--shard", f"{i}/{count}"] for i in range(count)]
        futures = [pool.submit(shard, one, record, i, end) for i, one in enumerate(commands)]
    ends = [done for future in futures for done in future.result()]
    found = test_results(read_lines(record))
    worst = next((done for done in ends if done.status), None) or ends[-1]
    outcome = OUT_OF_TIME if any(done.status is None for done in ends) else FAILED
    if found["failures"] or not found["counts"]:
        outcome = FAILED
    elif all(done.status == 0 for done in ends) and not found["not run"]:
        outcome = PASSED
    names = [f"{name}: {reason.partition(chr(10))[0]}" for name, reason in found["failures"].items()]
    output = "" if outcome == PASSED else "\n".join([tail(worst.output), *names[:SHOWN]])
    return {**found, "outcome": outcome, "output": output}


def shard(command: Sequence[str], record: Path, index: int, end: float) -> list[Done]:
    """Runs a part of the tests, with another process for the rest where one has not come to the end."""
    ends: list[Done] = []
    for _ in range(RESTARTS + 1):
        before = len(read_lines(record))
        ends.append(run(command, end - time.monotonic(), {"FAIL_WITHOUT_CUDA": "1"}))
        lines = [line for line in read_lines(record)[before:] if line["shard"] == index]
        # One that began no test would not begin one again.
        over = ends[-1].status is None or not any("test" in line for line in lines)
        if over or any("finished" in line for line in lines):
            break
    return ends


def read_lines(record: Path) -> list[Results]:
    """Returns the lines that gpu/shard.py has written, but for one that the end of a process cut off."""
    text = record.read_text() if record.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def test_results(lines: Sequence[Results]) -> Results:
    """Returns counts and failures from the lines of processes that ended or were cut off."""
    outcomes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for line in lines:
        name, outcome = line.get("test"), line.get("outcome", "")
        if name is not None and outcomes.get(name) != "failed":  # What follows a failure is its teardown.
            # That the teardown went well says nothing about a test that was skipped.
            outcomes[name] = "skipped" if outcomes.get(name) == "skipped" != outcome else outcome
            reasons[name] = line.get("reason", "")
    left = sum(line.get("tests", 0) for line in lines) - len(outcomes)
    counts = Counter(outcomes.values())
    bad = {name: reasons[name] or word for name, word in outcomes.items() if word in ("failed", "cut off")}
    warnings = Counter(line["warning"] for line in lines if "warning" in line)
    words = [f"{count} {word}" for word, count in counts.most_common()]
    words += [f"{left} not run"] if left else []
    return {
        "summary": ", ".join(words) or "no test has run",
        "counts": counts,
        "not run": left,
        "failures": dict(list(bad.items())[:LISTED]),
        "warnings": dict(warnings.most_common(LISTED)),
    }


def sanitize(_machine: Results, seconds: float, _out: Path) -> Results:
    """Runs a few small calls of our kernels under each tool of compute-sanitizer, all at the same time."""
    sanitizer = cuda_tool("compute-sanitizer")
    if sanitizer is None:
        return {"outcome": UNAVAILABLE, "summary": "no compute-sanitizer: no kernel was checked"}
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        tools = dict(zip(TOOLS, pool.map(lambda tool: checked(sanitizer, tool, seconds), TOOLS), strict=True))
    outcomes = [tool["outcome"] for tool in tools.values()]
    worst = next(word for word in (FAILED, OUT_OF_TIME, UNAVAILABLE, PASSED) if word in outcomes)
    summary = "; ".join(f"{name} {tool['outcome']}" for name, tool in tools.items())
    said = [f"{name}: {', '.join(tool['said'])}" for name, tool in tools.items()]
    output = "\n".join(tool.get("output", "") for tool in tools.values()).strip()
    return {"outcome": worst, "summary": summary, "tools": tools, "report": "\n".join(said), "output": output}


def checked(sanitizer: str, tool: str, seconds: float) -> Results:
    """Returns the verdict of one tool."""
    # Only our kernels: all of torch's take minutes. Without torch's cache each tensor has bounds.
    command = [sanitizer, "--tool", tool, "--kernel-name", "kns=torchrnn", "--error-exitcode", "86"]
    if tool == "memcheck":  # Libraries ask the driver for what it may not have, and do without.
        command += ["--report-api-errors", "no"]
    command += ["--print-limit", "20", sys.executable, "gpu/sanitize.py"]
    done = run(command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    outcome = UNAVAILABLE if "Device not supported" in done.output else done.outcome
    said = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.output)
    if outcome == PASSED and not said:
        outcome = FAILED  # It did not come to a verdict.
    calls = re.findall(r"^\d+ calls.*", done.output, re.M)
    result = {"outcome": outcome, "said": said + calls, "seconds": round(done.seconds, 1)}
    return result if outcome == PASSED else result | {"output": tail(done.output)}


def bench(machine: Results, seconds: float, out: Path) -> Results:
    """Measures the hardware's latencies, then the layers, whose results are a file of their own."""
    end = time.monotonic() + seconds
    probed = probe(machine)
    done = layers(end, out / "layers", machine["commit"] or "")
    outcome = done.outcome if probed["outcome"] in (PASSED, UNAVAILABLE) else probed["outcome"]
    summary = f"probes {probed['outcome']}, layers {done.outcome}"
    found = [f"{name}: {measured}" for name, measured in probed.get("measured", {}).items()]
    rows, ratios, text = done.output.rpartition("\nratios: ")
    report = "\n".join([*found, ratios.strip() + " " + text.strip()] if ratios else found)
    output = "\n".join([probed.get("output", ""), rows if ratios else done.output]).strip()
    return {
        "outcome": outcome,
        "summary": summary,
        "probes": probed,
        "report": report,
        "output": tail(output),
    }


def layers(end: float, out: Path, commit: str) -> Done:
    """Runs the bench, and again for the rest where a call has taken the device with it."""
    written, resume = out / "bench.json", list[str]()
    written.unlink(missing_ok=True)
    for _ in range(RESTARTS + 1):
        left = end - time.monotonic()
        # The bench ends by itself within its budget, but for the row that it is at.
        budget = f"{max(left - 30, left / 2, 1):.0f}"
        command = [sys.executable, "-m", "bench", "gpu", "--out", str(out), "--commit", commit]
        command += ["--budget", budget, *resume]
        # torch.compile has one small kernel for each row, not worth a pool of processes.
        done = run(command, left, {"TORCHINDUCTOR_COMPILE_THREADS": "1"})
        stopped = written.exists() and json.loads(written.read_text())["gpu"]["stopped"]
        if done.status is None or not stopped:
            break
        resume = ["--resume"]
    return done


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
    """Returns the stages to run: the asked one after the build, which is quick where nothing has changed."""
    if asked == "all":
        return list(STAGES)
    return [asked] if asked == "build" or machine["why_not"] else ["build", asked]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results")
    add("--stage", choices=[*STAGES, "all"], default="all", help="what to run [all]")
    add("--limit", type=float, default=520, help="seconds for all stages together [520]")
    add("--commit", help="what this is a copy of, where there is no repository")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if ROOT in out.parents:
        (out / ".gitignore").write_text(
            "*\n"
        )  # Else the results would count as a change of what is measured.
    end = time.monotonic() + args.limit
    # Where tools are that an image may have and not name: beside Python, and in CUDA's usual place.
    places = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent), "/usr/local/cuda/bin"]
    os.environ["PATH"] = os.pathsep.join(places)
    machine = describe(args.commit)
    rows, reports = [], []
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
        if found["outcome"] not in (PASSED, UNAVAILABLE):
            print("".join(f"  {line}\n" for line in found.get("output", "").splitlines()[-SHOWN:]), end="")
        reports += [found["report"]] if found.get("report") else []
    print("".join(f"\n{report}\n" for report in reports), end="")
    print(f"\n{', '.join(machine.get('gpus') or ['no GPU'])}; driver {machine['driver']}; {machine['nvcc']}")
    changes = " and changes" if machine["changed"] else ""
    print(f"torch {machine.get('torch')}; commit {machine['commit']}{changes}")
    for name, outcome, seconds_, summary in rows:
        print(f"  {name:<9} {outcome:<14} {seconds_:>8}  {summary}")
    outcomes = {row[1] for row in rows}
    return 0 if outcomes <= {PASSED} else 2 if outcomes <= {PASSED, UNAVAILABLE} else 1


if __name__ == "__main__":
    sys.exit(main())
