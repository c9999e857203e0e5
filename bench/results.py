"""Results and their files: JSON in ``bench/results``, one file per run of the bench, never written twice."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import torchrnn
from bench.floors import Floors, Level
from bench.timing import Stats

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results"
ALONE, SAME = "alone", "beside the same"  # Situations of contention.
VERSIONS = ("numpy", "onnx", "onnxruntime", "openvino", "triton", "flashrnn")


@dataclass(frozen=True)
class Row:
    """One case on one number of threads."""

    id: str
    threads: int
    ours: Stats
    peers: dict[str, Stats]
    # Peer's time / ours, see Stats.ratio; in older files of the medians. That of another checkout is to ours
    # in a process like its own.
    ratios: dict[str, float]
    gflops: float
    peak_fraction: float  # Of the measured peak of multiply-adds, see ``peak``.
    floor: float  # Milliseconds, see Floors.
    floor_fraction: float  # Floor / our median.
    errors: dict[str, float]  # Against float64, ours and the peers'.
    suite: str = ""  # Older files lack this and what follows.
    case: dict[str, Any] = field(default_factory=dict)  # The fields of Case.
    peak: float | None = None  # GFLOP/s, measured in turns with the layers; None is that of the run's floors.

    @property
    def group(self) -> str:
        """Returns the suite; a row without one is inference or training."""
        return self.suite or self.id.rsplit("-", 1)[1]


@dataclass(frozen=True)
class Run:
    """All rows of one process, that is of one number of threads."""

    threads: int
    isa: str | None
    floors: Floors
    rows: list[Row]


@dataclass(frozen=True)
class Memory:
    """One training step: the memory at its peak beyond what was there before, and its time, by name."""

    id: str
    threads: int
    peaks: dict[str, int]  # Bytes.
    times: dict[str, float]  # Milliseconds, medians.


@dataclass(frozen=True)
class Contention:
    """The steps of a layer beside what else runs, of all processes that are measured. Milliseconds."""

    id: str
    situation: str
    name: str
    threads: int  # Of each process.
    time: Stats
    p99: float | None  # Older files lack it.
    maximum: float


@dataclass(frozen=True)
class Verdict:
    """Our time over another's in the rows of a suite, so that below 1 we are faster, and what it must be."""

    suite: str
    threads: int
    against: str
    rows: int
    mean: float  # Geometric.
    most_mean: float | None
    worst: float
    most: float | None  # In each row.
    above: dict[str, float]  # The rows above that, or above 1 where nothing is said of them; worst first.
    met: bool | None  # None where nothing is said.


@dataclass
class GpuRow:
    """One case on a GPU, filled while it is measured. Names are those of the peers; "torchrnn" is ours."""

    id: str
    case: dict[str, Any]  # The fields of Case.
    bars: list[str]  # That it belongs to.
    algorithm: str  # That torch.nn is expected to ask of cuDNN.
    times: dict[str, Stats] = field(default_factory=dict)
    us: dict[str, float] = field(default_factory=dict)  # Microseconds per step, medians.
    ratios: dict[str, float] = field(default_factory=dict)  # Median of each other / that of "torchrnn".
    floor: float | None = None  # Microseconds per step, from a model; None where the model does not reach.
    floor_fraction: float | None = None  # Floor / ours.
    errors: dict[str, float] = field(default_factory=dict)  # Against float64, on ``check_steps`` steps.
    check_steps: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # What of ours is wrong or does not run, and why.
    skipped: dict[str, str] = field(default_factory=dict)  # What else was not timed, and why.


@dataclass(frozen=True)
class GpuBar:
    """What the rows of a bar have reached against a peer."""

    name: str
    regime: str
    peer: str
    must: float
    measured: int
    cases: int  # That belong to it, run or not.
    failed: list[str]
    worst: float | None
    worst_id: str | None
    median: float | None
    met: bool | None  # By what was measured; None where nothing was.

    @property
    def verdict(self) -> str:
        """Returns whether it is met, in words: not by a part of the rows alone."""
        if self.met is None:
            return "not run"
        return "no" if not self.met else "yes" if self.measured == self.cases else "so far"


@dataclass
class Gpu:
    """What was measured on a GPU, filled while it is."""

    device: dict[str, Any]
    rows: list[GpuRow] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)  # For want of time.
    bars: list[GpuBar] = field(default_factory=list)
    below: list[str] = field(default_factory=list)  # Rows that are slower than torch.nn.
    stopped: str = ""  # Why before the end, if not for want of time.


@dataclass(frozen=True)
class Result:
    """Everything one call of the bench measured, and on what."""

    date: str
    commit: str
    dirty: bool
    machine: str
    cores: int
    load: float  # Average number of other processes that ran in the minute before.
    torch: str
    torchrnn: str
    options: dict[str, Any]
    runs: list[Run]
    versions: dict[str, str] = field(
        default_factory=dict
    )  # Of what the peers need. Older files lack this ...
    skipped: dict[str, str] = field(default_factory=dict)  # Peer -> why it did not run.
    memory: list[Memory] = field(default_factory=list)
    contention: list[Contention] = field(default_factory=list)  # ... and all before.
    gpu: Gpu | None = None
    before: dict[str, Any] = field(default_factory=dict)  # The other checkout that was measured.
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def suites(self) -> set[str]:
        """Returns what has been measured."""
        extra = {name for name in ("memory", "contention", "gpu") if getattr(self, name)}
        return {row.group for row in self.rows} | extra

    @property
    def full(self) -> bool:
        """Returns whether it is neither a trial nor a part."""
        return not self.options.get("quick") and not self.options.get("filter")

    @property
    def rows(self) -> list[Row]:
        return [row for run in self.runs for row in run.rows]


def describe(options: dict[str, Any]) -> Result:
    """Returns a result without runs: what is measured where, and when."""
    return Result(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **revision(ROOT),
        machine=machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        load=os.getloadavg()[0],
        torch=torch.__version__,
        torchrnn=torchrnn.__version__,
        options=options,
        runs=[],
        versions={"python": platform.python_version(), **installed(VERSIONS)},
    )


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    versions = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def revision(folder: Path) -> dict[str, Any]:
    """Returns the commit of a checkout, and whether something differs from it."""
    commit = git("rev-parse", "HEAD", folder=folder)
    # Results that earlier runs have left do not change what is measured.
    dirty = bool(git("status", "--porcelain", "--", ".", ":!bench/results", folder=folder))
    return {"commit": commit or "unknown", "dirty": dirty or not commit}


def git(*arguments: str, folder: Path = ROOT) -> str:
    """Returns what git prints, or nothing where there is no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def machine() -> str:
    """Returns the processor, as exactly as the system tells it, and the system."""
    info = Path("/proc/cpuinfo")
    fields = {}
    if info.exists():
        pairs = (line.partition(":") for line in info.read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in pairs}
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [
        f"{key} {fields[name]}"
        for key, name in (("family", "cpu family"), ("model", "model"))
        if name in fields
    ]
    return ", ".join([name, *numbers, platform.system()])


def dumps(result: Result) -> str:
    """Returns the text of a result's file."""
    return json.dumps(dataclasses.asdict(result), indent=1) + "\n"


def save(result: Result, folder: Path = FOLDER) -> Path:
    """Writes a result to a new file named by date and commit, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    date = result.date[:16].replace(":", "")
    stem = f"{date}-{result.commit[:8]}{'-dirty' if result.dirty else ''}"
    text = dumps(result)
    for number in range(1, 1000):
        path = folder / f"{stem}{'' if number == 1 else f'-{number}'}.json"
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"{folder}: {stem}.json and 998 more are there already")


def load(path: Path) -> Result:
    """Returns the result that ``save`` has written."""
    content = json.loads(path.read_text())
    lists = {
        "runs": [run(r) for r in content["runs"]],
        "memory": [Memory(**m) for m in content.get("memory", [])],
        "contention": [row for c in content.get("contention", []) for row in contention(c)],
        "verdicts": [Verdict(**v) for v in content.get("verdicts", [])],
    }
    gpu_content = content.get("gpu")
    return Result(**{**content, **lists, "gpu": gpu_content and gpu(gpu_content)})


def contention(content: dict[str, Any]) -> list[Contention]:
    """Returns a row; two of an older file, in which a step alone and one beside the same were together."""
    if "situation" in content:
        return [Contention(**{**content, "time": Stats(**content["time"])})]
    case, name, threads = (content[field] for field in ("id", "name", "threads"))
    return [
        Contention(case, situation, name, threads, Stats(**content[key]), None, content[f"{key}_maximum"])
        for situation, key in ((ALONE, "alone"), (SAME, "together"))
    ]


def usable(files: Iterable[Path], *, full: bool, dirty: bool) -> list[tuple[Path, Result]]:
    """Returns results, the newest last.

    Args:
        files: Results.
        full: Whether to leave out trials and parts.
        dirty: Whether to take results of code that was not committed.
    """
    loaded = sorted(((path, load(path)) for path in files), key=lambda pair: pair[1].date)
    return [(path, r) for path, r in loaded if (dirty or not r.dirty) and (r.full or not full)]


def gpu(content: dict[str, Any]) -> Gpu:
    rows = [
        GpuRow(**{**row, "times": {name: Stats(**stats) for name, stats in row["times"].items()}})
        for row in content["rows"]
    ]
    return Gpu(**{**content, "rows": rows, "bars": [GpuBar(**bar) for bar in content["bars"]]})


def run(content: dict[str, Any]) -> Run:
    floors = content["floors"]
    levels = [Level(**level) for level in floors["levels"]]
    return Run(
        **{
            **content,
            "floors": Floors(**{**floors, "levels": levels}),
            "rows": [row(r) for r in content["rows"]],
        }
    )


def row(content: dict[str, Any]) -> Row:
    peers = {name: Stats(**stats) for name, stats in content["peers"].items()}
    return Row(**{**content, "ours": Stats(**content["ours"]), "peers": peers})


def geometric_means(rows: Sequence[Row], peer: str) -> dict[str, float]:
    """Returns the geometric means of the ratios to a peer: of all rows, of each mode and of each cell."""
    groups = {"all": "", "inference": "-infer", "training": "-train", "LSTM": "lstm-", "GRU": "gru-"}
    means = {}
    for name, part_of_id in groups.items():
        ratios = [row.ratios[peer] for row in rows if part_of_id in row.id and peer in row.ratios]
        if ratios:
            means[name] = statistics.geometric_mean(ratios)
    return means
