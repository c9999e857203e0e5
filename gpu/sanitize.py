"""A few small calls of every CUDA kernel, forward and backward, to be run under compute-sanitizer."""

from __future__ import annotations

import torch

import torchrnn
from torchrnn import cuda

STEPS, BATCH, INPUTS, HIDDEN = 5, 9, 6, 33
"""None fills a tile."""
LAYERS = {
    "step": [
        torchrnn.LSTM(INPUTS, HIDDEN, bidirectional=True),
        torchrnn.LSTM(INPUTS, HIDDEN, proj_size=7),
        torchrnn.GRU(INPUTS, HIDDEN, bidirectional=True),
        torchrnn.GRU(INPUTS, HIDDEN, reset_after=False),
        torchrnn.RNN(INPUTS, HIDDEN, nonlinearity="relu"),
    ],
    "cluster": [
        torchrnn.LSTM(INPUTS, HIDDEN, bidirectional=True),
        torchrnn.GRU(INPUTS, HIDDEN, bidirectional=True),
        torchrnn.LSTM(INPUTS, 256),
    ],
}


def main() -> None:
    """Makes the calls."""
    clusters = torch.cuda.get_device_capability() >= (9, 0)
    lengths = torch.tensor([5, 0, 3, 1, 5, 2, 4, 5, 1], device="cuda")
    resets = torch.arange(STEPS * BATCH, device="cuda").view(STEPS, BATCH) % 4 == 0
    calls = 0
    for path in ("step", "cluster") if clusters else ("step",):
        for layer in LAYERS[path]:
            for dtype in (
                (torch.float32, torch.bfloat16) if path == "step" else (torch.bfloat16, torch.float16)
            ):
                layer.to("cuda", dtype)
                x = torch.randn(STEPS, BATCH, INPUTS, device="cuda", dtype=dtype, requires_grad=True)
                with cuda.use_path(path):
                    layer(x)[0].sum().backward()
                    layer(x, lengths=lengths, resets=resets)[0].sum().backward()
                    with torch.no_grad():
                        layer(x)
                calls += 3
    torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
