"""A plugin of pytest for processes that share the tests, write down each step, and may end at any time.

    pytest -p gpu.shard --shard INDEX/COUNT --record FILE

An error on the device spoils all that its process does later, and a kernel that hangs stops it. So a process
ends with the first test that does either; one that is started in its place runs those that are left. There is
no pytest-xdist and no pytest-timeout in this: neither need be installed.
"""

from __future__ import annotations

import faulthandler
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.run import read_lines

SECONDS = 90.0  # Of one test; then all stacks are printed and the process ends.
REASON = 400  # Characters of a reason that are kept.
STDERR = os.dup(2)  # pytest takes the other one away.


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the two options of the plugin."""
    parser.addoption("--shard", required=True, help="which part of how many, such as 0/6")
    parser.addoption("--record", required=True, type=Path, help="JSON lines of all processes")


def pytest_configure(config: pytest.Config) -> None:
    """Starts to write down what happens."""
    index, count = map(int, config.getoption("--shard").split("/"))
    config.pluginmanager.register(Shard(index, count, config.getoption("--record")))


class Shard:
    """One part of the tests."""

    def __init__(self, index: int, count: int, path: Path) -> None:
        self.index, self.count, self.path = index, count, path

    def write(self, **fields: Any) -> None:
        """Appends a line, at once."""
        with self.path.open("a") as file:
            file.write(json.dumps({"shard": self.index, **fields}) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keeps every count-th test that no process has begun; last those of the newest kernels."""
        lines = read_lines(self.path)
        begun = {line.get("test") for line in lines}
        mine = sorted(items[self.index :: self.count], key=lambda item: "cluster" in item.nodeid)
        if not any(line["shard"] == self.index and "tests" in line for line in lines):
            self.write(tests=len(mine))
        items[:] = [item for item in mine if item.nodeid not in begun]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Notes which test is running, should nothing more come."""
        self.write(test=nodeid, outcome="cut off")
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=STDERR)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes a result, and ends the process if the device did not survive the test."""
        if report.outcome == "passed" and report.when != "teardown":
            return
        lost = report.failed and device_is_lost()
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = ("the device was lost: " if lost else "") + (crash.message if crash else report.longreprtext)
        self.write(test=report.nodeid, outcome=report.outcome, reason=reason[:REASON])
        if lost:
            os._exit(1)

    def pytest_runtest_logfinish(self) -> None:
        """Stops the clock."""
        faulthandler.cancel_dump_traceback_later()

    def pytest_warning_recorded(self, warning_message: Any) -> None:
        """Notes a warning: another version of torch has others, which are no failures."""
        self.write(warning=f"{warning_message.category.__name__}: {warning_message.message}"[:REASON])

    def pytest_sessionfinish(self) -> None:
        """Notes that no test is left."""
        self.write(finished=True)


def device_is_lost() -> bool:
    """Returns whether no later call on the device can be trusted."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
