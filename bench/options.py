"""What the commands of the bench share: their options, and the processes that measure."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import results

if TYPE_CHECKING:  # Imported where it is needed: a GPU machine may not have it.
    from rich.console import Console
    from rich.progress import Progress

WIDTH = 160  # Where there is no terminal to ask.


def count(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def counts(text: str) -> list[int]:
    return [count(number) for number in text.split(",")]


def regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from None


def seconds(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


def parser(command: str, description: str, out: Path = results.FOLDER) -> argparse.ArgumentParser:
    """Returns a parser with the options of every command that measures."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {command}".strip(), description=description)
    add = parser.add_argument
    add("--filter", metavar="REGEX", type=regex, default="", help="only cases whose id it is found in")
    add("--quick", action="store_true", help="tiny cases and few repeats, to see whether the bench works")
    folder = f"folder of the JSON file [{out.relative_to(results.ROOT)}]"
    add("--out", metavar="DIR", type=Path, default=out, help=folder)
    return parser


def console() -> Console:
    """Returns where to print, wide enough for a row of a table."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def progress(console: Console) -> Progress:
    """Returns a progress bar, which is not there without a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def process(
    module: str,
    asked: dict[str, Any],
    variables: Mapping[str, str] | None = None,
    *,
    python: str = sys.executable,
    text: bool = True,
) -> subprocess.Popen[Any]:
    """Starts a module with what it is asked, a line of JSON, and its number of threads in the environment.

    The line goes to its standard input, since an argument of a program cannot be as long as a suite.
    """
    count = str(asked["threads"])
    environment = os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count} | dict(variables or {})
    process = subprocess.Popen(
        [python, "-m", module],
        cwd=results.ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=text,
    )
    line = f"{json.dumps(asked)}\n"
    assert process.stdin is not None
    process.stdin.write(line if text else line.encode())
    process.stdin.flush()
    return process


def answer(process: subprocess.Popen[str]) -> Any:
    """Waits for the end of a process, and returns the JSON that it prints."""
    text, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a measuring process failed with status {process.returncode}")
    return json.loads(text)
