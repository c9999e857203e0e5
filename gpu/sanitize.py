"""A few small calls of every CUDA kernel, forward and backward, to be run under compute-sanitizer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import torchrnn
from torchrnn import cuda

STEPS, BATCH, INPUTS, HIDDEN = 5, 9, 6, 33
"""None fills a tile."""
HALVES = (torch.bfloat16, torch.float16)


def layers(clusters: bool) -> Iterator[tuple[str, torch.dtype, nn.Module]]:
    """Yields (path, dtype, layer)."""
    for dtype in (torch.float32, torch.bfloat16):
        yield "step", dtype, torchrnn.LSTM(INPUTS, HIDDEN, bidirectional=True)
        yield "step", dtype, torchrnn.LSTM(INPUTS, HIDDEN, proj_size=7)
        yield "step", dtype, torchrnn.GRU(INPUTS, HIDDEN, bidirectional=True)
        yield "step", dtype, torchrnn.GRU(INPUTS, HIDDEN, reset_after=False)
        yield "step", dtype, torchrnn.RNN(INPUTS, HIDDEN, nonlinearity="relu")
    # Of float32 the products are in TF32, by torch's default; its largest clusters are those of H = 256.
    for dtype in (torch.float32, *HALVES) if clusters else ():
        yield "cluster", dtype, torchrnn.LSTM(INPUTS, HIDDEN, bidirectional=True)
        yield "cluster", dtype, torchrnn.GRU(INPUTS, HIDDEN, bidirectional=True)
        yield "cluster", dtype, torchrnn.LSTM(INPUTS, 250)
        yield "cluster", dtype, torchrnn.GRU(INPUTS, 250 if dtype == torch.float32 else 500)


def main() -> None:
    """Makes the calls."""
    info = torchrnn.info()
    if "cuda" not in info["kernels"]:
        raise SystemExit(f"nothing to check: {info['why_not_cuda']}")
    lengths = torch.tensor([5, 0, 3, 1, 5, 2, 4, 5, 1], device="cuda")
    resets = torch.arange(STEPS * BATCH, device="cuda").view(STEPS, BATCH) % 4 == 0
    calls, left_out = 0, list[str]()
    for path, dtype, layer in layers(torch.cuda.get_device_capability() >= (9, 0)):
        layer.to("cuda", dtype)
        x = torch.randn(STEPS, BATCH, INPUTS, device="cuda", dtype=dtype, requires_grad=True)
        try:
            with cuda.use_path(path):
                layer(x)[0].sum().backward()
                layer(x, lengths=lengths, resets=resets)[0].sum().backward()
                with torch.no_grad():
                    layer(x)
        except RuntimeError as error:
            if "a cluster does not fit" not in str(error):
                raise
            left_out.append(f"{layer} in {dtype}")  # A tool takes registers and memory of its own.
            continue
        calls += 3
    torch.cuda.synchronize()
    print(f"{calls} calls" + "".join(f", without {name}" for name in left_out))


if __name__ == "__main__":
    main()
