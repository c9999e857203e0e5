"""The process that measures another checkout of torchrnn, of which it needs no more than the layers' classes.

Called by ``bench.adapters.before``. ``bench`` is that of this checkout: Python has loaded it before it looks
for torchrnn.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bench import remote, timing
from bench.adapters.layers import TorchLayer, lengths_forward
from bench.adapters.problem import Run, grad_mode, kinds, make_problem
from bench.cases import Case


class Checkout:
    """What the other process may be asked."""

    def __init__(self, checkout: str) -> None:
        sys.path.insert(0, checkout)
        self.torchrnn = importlib.import_module("torchrnn")
        self.peer = TorchLayer("before", kinds(self.torchrnn), lengths_forward)

    def describe(self) -> dict[str, Any]:
        """Returns what is measured, and by which libraries."""
        isa = self.torchrnn.info()["isa"]
        return {"file": self.torchrnn.__file__, "isa": isa, "torch": torch.__version__}

    def prepare(self, case: dict[str, Any]) -> None:
        """Makes all that the steps of a case need."""
        self.case = Case(**case)
        self.run: Run = self.peer.prepare(make_problem(self.case))
        gc.collect()

    def sample(self, calls: int, clock: timing.Clock) -> float:
        """Returns the seconds of that many steps of the case that was prepared last."""
        with grad_mode(self.case):
            return timing.sample(self.run, calls, clock)

    def values(self) -> list[torch.Tensor]:
        """Returns what a step computes."""
        with grad_mode(self.case):
            return [value.detach() for value in pytree.tree_leaves(self.run())]


def main(asked: dict[str, Any]) -> None:
    torch.set_num_threads(asked["threads"])
    checkout = Checkout(asked["checkout"])
    gc.disable()
    gc.freeze()  # So that collecting what a case leaves does not look at all modules.
    remote.serve({name: getattr(checkout, name) for name in ("describe", "prepare", "sample", "values")})


if __name__ == "__main__":
    main(json.loads(sys.stdin.buffer.readline()))
