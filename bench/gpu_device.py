"""What the bench needs of a GPU, in one place, so that its tests can put the CPU there."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

import torchrnn
from torchrnn.cuda import allows_tf32

Run = Callable[[], Sequence[Any]]

WARM_UPS = 3  # Before a capture, as torch's manual asks.


class Device(Protocol):
    name: str
    """As torch has it."""

    @property
    def tf32(self) -> bool:
        """Whether products of float32 layers are rounded to TF32."""

    def why_not(self) -> str | None:
        """Returns why nothing can be measured, or None."""

    def describe(self) -> dict[str, Any]:
        """Returns what is measured on."""

    def synchronise(self) -> None:
        """Waits for all work; raises if any has failed."""

    def sample(self, function: Callable[[], object], calls: int) -> float:
        """Returns the seconds that ``calls`` calls take."""

    def capture(self, function: Run) -> Run:
        """Returns what replays a call as one graph. Results lie in the same tensors each time."""

    def release(self) -> None:
        """Gives back memory that nothing needs any more."""


class Cuda:
    """The current CUDA device."""

    name = "cuda"

    @property
    def tf32(self) -> bool:
        return allows_tf32()

    def why_not(self) -> str | None:
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        why: str | None = torchrnn.info()["why_not_cuda"]
        return why and f"torchrnn has no CUDA kernels: {why}"

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.name)
        return {
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability()),
            "processors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": self.tf32,
            "torchrnn": torchrnn.info(),
        }

    def synchronise(self) -> None:
        torch.cuda.synchronize()

    def sample(self, function: Callable[[], object], calls: int) -> float:
        # From the first launch to the end of the last kernel: a host that is too slow counts, as for a user.
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def capture(self, function: Run) -> Run:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function()

        def replay() -> Sequence[Any]:
            graph.replay()
            return results

        return replay

    def release(self) -> None:
        gc.collect()
        gc.freeze()  # What is alive between rows stays, so the next collection looks only at what is new.
        torch.cuda.empty_cache()
