"""The demo: its reader of MNIST files, its bookkeeping, and a short run of everything."""

from __future__ import annotations

import gzip
import io
import math
import struct
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from examples import digits


def idx(values: Tensor) -> bytes:
    header = struct.pack(f">{1 + values.dim()}I", 0x0800 + values.dim(), *values.shape)
    return header + values.numpy().tobytes()


def write_mnist(folder: Path, train: int = 48, test: int = 16, size: int = 6) -> None:
    for part, count in (("train", train), ("t10k", test)):
        images = torch.randint(256, (count, size, size), dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))


@pytest.mark.parametrize("packed", [False, True])
def test_idx_round_trip(tmp_path: Path, packed: bool) -> None:
    values = torch.randint(256, (3, 5, 4), dtype=torch.uint8)
    content = idx(values)
    (tmp_path / ("a.gz" if packed else "a")).write_bytes(gzip.compress(content) if packed else content)
    torch.testing.assert_close(digits.read_idx(tmp_path, "a", 3), values)


def test_idx_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no train-images-idx3-ubyte and no .*\.gz"):
        digits.mnist_digits(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "magic number must be 0x00000803, got 0x$"),
        (idx(torch.zeros(2, dtype=torch.uint8)), "magic number must be 0x00000803, got 0x00000801"),
        (idx(torch.zeros(2, 3, 3, dtype=torch.uint8))[:9], "truncated inside its header of 16 bytes"),
        (idx(torch.zeros(2, 3, 3, dtype=torch.uint8))[:-1], "2x3x3 bytes must follow the header, got 17"),
        (idx(torch.zeros(2, 3, 3, dtype=torch.uint8)) + b"\0", "2x3x3 bytes must follow the header, got 19"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_damaged_file_is_refused(tmp_path: Path, content: bytes, message: str, packed: bool) -> None:
    (tmp_path / ("a.gz" if packed else "a")).write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=message):
        digits.read_idx(tmp_path, "a", 3)


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(bytes(100))[:20], gzip.compress(b"")[:10] + bytes([7] * 20)],
    ids=["no gzip", "cut off", "no deflate"],  # gzip writes the time, and all processes must agree on names.
)
def test_idx_damaged_gzip_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(ValueError, match="damaged gzip file"):
        digits.read_idx(tmp_path, "a", 1)


def test_mnist_images_and_labels_must_pair(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(torch.zeros(7, 6, 6, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="7 train images but 48 labels"):
        digits.mnist_digits(tmp_path)


def test_held_out_digits_are_stratified_and_apart() -> None:
    train, held_out = digits.scikit_digits()
    assert (len(train.labels), len(held_out.labels)) == (1437, 360)
    assert train.images.shape[1:] == held_out.images.shape[1:] == (8, 8)
    share = held_out.labels.bincount() / (train.labels.bincount() + held_out.labels.bincount())
    assert share.sub(0.2).abs().max() < 0.01
    both = torch.cat([train.images, held_out.images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797


def test_demo_runs_on_mnist_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mnist(tmp_path)
    arguments = [
        "--mnist",
        str(tmp_path),
        "--epochs",
        "2",
        "--hidden",
        "8",
        "--batch",
        "20",
        "--threads",
        "1",
    ]
    assert digits.main(arguments) == 0
    output = capsys.readouterr().out
    assert "epoch  2/2 loss" in output
    assert "losses of epochs 1-2 differ" in output
    assert "required" not in output  # No bar is set for digits that are not known.


def test_demo_names_unreadable_mnist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert digits.main(["--mnist", str(tmp_path)]) == 2
    assert "there is no train-images-idx3-ubyte" in capsys.readouterr().err


def test_demo_fails_when_accuracy_falls_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert digits.main(["--epochs", "1", "--hidden", "4", "--batch", "512", "--threads", "1"]) == 1
    assert "FAILED: accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("other", [1.01, math.nan])
def test_demo_fails_when_losses_differ(other: float) -> None:
    trainings = []
    for losses in ([1.0, 1.0], [1.0, other]):
        training = digits.Training(digits.Classifier(torch.nn.LSTM, 2, 2), lr=0.1, steps=2)
        training.losses, training.seconds, training.accuracies = losses, [1.0, 1.0], [0.5, 1.0]
        trainings.append(training)
    console = Console(file=io.StringIO())
    assert not digits.report(*trainings, checked=2, required=None, console=console)
    assert digits.report(*trainings, checked=1, required=0.9, console=console)


def test_training_learns_the_digits() -> None:
    train, held_out = digits.scikit_digits()
    few = digits.Digits(train.images[:64], train.labels[:64])
    args = digits.parse(["--epochs", "4", "--hidden", "16", "--batch", "16", "--threads", "1"])
    ours, peer = digits.compare(few, held_out, args, Console(file=io.StringIO(), force_terminal=True))
    assert len(ours.losses) == len(ours.seconds) == len(ours.accuracies) == 4
    difference = max(abs(a - b) for a, b in zip(ours.losses, peer.losses, strict=True))
    assert difference <= digits.TOLERANCE
    assert ours.losses[-1] < ours.losses[0]
