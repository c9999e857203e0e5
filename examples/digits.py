"""Trains a classifier of handwritten digits on torchrnn.LSTM and on torch.nn.LSTM, and compares the two.

Each row of a picture is one time step of three stacked LSTM layers; a linear layer on the last output names
the digit. Both models start from the same weights, see the same batches and take turns epoch by epoch, so
that their losses and their times can be compared.

    python examples/digits.py                # the 8x8 digits that come with scikit-learn
    python examples/digits.py --mnist DIR    # the original MNIST files
"""

from __future__ import annotations

import argparse
import gzip
import math
import statistics
import struct
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn
from rich.table import Table
from torch import Tensor, nn

import torchrnn

LAYERS = 3
ACCURACY = 0.96  # Required on the held-out digits of scikit-learn.
# The two layers round differently, and training makes the difference grow from step to step: the losses agree
# to 1e-8 at first and, depending on the seed, to 1e-5 or 1e-3 after 900 steps. SGD keeps it at that; with
# Adam, whose step does not shrink with the gradient, they part after 200 steps.
TOLERANCE = 5e-3
CHECKED_STEPS = 900


class Digits(NamedTuple):
    """Pictures and what they show."""

    images: Tensor  # [N, rows, columns], float32
    labels: Tensor  # [N], int64


def scikit_digits() -> tuple[Digits, Digits]:
    """Returns the training part and a held-out fifth of the 1797 digits in scikit-learn, both stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32), torch.tensor(digits.target)
    parts = train_test_split(range(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
    train, held_out = (Digits(images[part], labels[part]) for part in parts)
    return train, held_out


def mnist_digits(folder: Path) -> tuple[Digits, Digits]:
    """Returns the 60000 training and 10000 test digits of the original MNIST files, gzipped or not.

    Raises:
        FileNotFoundError: If one of the four files is not there.
        ValueError: If one of them is damaged, or images and labels differ in number.
    """
    parts = []
    for part in ("train", "t10k"):
        images = read_idx(folder, f"{part}-images-idx3-ubyte", 3).float()
        labels = read_idx(folder, f"{part}-labels-idx1-ubyte", 1).long()
        if len(images) != len(labels):
            raise ValueError(f"{folder}: {len(images)} {part} images but {len(labels)} labels")
        parts.append(Digits(images, labels))
    return parts[0], parts[1]


def read_idx(folder: Path, name: str, dims: int) -> Tensor:
    """Returns what ``folder/name`` or ``folder/name.gz``, an idx file of unsigned bytes, holds."""
    path = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: there is no {name} and no {name}.gz")
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from None
    start, magic = 4 + 4 * dims, 0x0800 + dims  # 08: unsigned bytes.
    if content[:4] != struct.pack(">I", magic):
        raise ValueError(f"{path}: magic number must be 0x{magic:08x}, got 0x{content[:4].hex()}")
    if len(content) < start:
        raise ValueError(f"{path}: truncated inside its header of {start} bytes")
    shape = struct.unpack_from(f">{dims}I", content, 4)
    if len(content) != start + math.prod(shape):
        size = "x".join(map(str, shape))
        raise ValueError(f"{path}: {size} bytes must follow the header, got {len(content) - start}")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)


class Classifier(nn.Module):
    """Reads a picture from its first row to its last and scores the ten digits."""

    def __init__(self, lstm: type[nn.LSTM], columns: int, hidden: int) -> None:
        super().__init__()
        self.lstm = lstm(columns, hidden, num_layers=LAYERS, batch_first=True)
        self.score = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        output, _ = self.lstm(images)
        return self.score(output[:, -1])


class Training:
    """A model in training, and the loss, the seconds and the held-out accuracy of each epoch so far."""

    def __init__(self, model: Classifier, lr: float, steps: int) -> None:
        self.model = model
        self.optimiser = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, lr, steps, cycle_momentum=False)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.accuracies: list[float] = []

    def epoch(self, digits: Digits, batches: Sequence[Tensor], advance: Callable[[], None]) -> None:
        """Trains on the batches, which are given as indices, and calls ``advance`` after each."""
        self.model.train()
        total = 0.0
        start = time.perf_counter()
        for batch in batches:
            loss = nn.functional.cross_entropy(self.model(digits.images[batch]), digits.labels[batch])
            self.optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.schedule.step()
            total += loss.item() * len(batch)
            advance()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(total / sum(map(len, batches)))

    @torch.inference_mode()
    def test(self, digits: Digits) -> None:
        """Notes the share of the digits that the model names rightly."""
        self.model.eval()
        parts = zip(digits.images.split(1000), digits.labels.split(1000), strict=True)
        right = sum(int((self.model(images).argmax(1) == labels).sum()) for images, labels in parts)
        self.accuracies.append(right / len(digits.labels))


def compare(train: Digits, held_out: Digits, args: argparse.Namespace, console: Console) -> list[Training]:
    """Trains the classifier on torchrnn.LSTM and on torch.nn.LSTM, epoch by epoch in turns."""
    mean, deviation = train.images.mean(), train.images.std()
    train, held_out = (Digits((images - mean) / deviation, labels) for images, labels in (train, held_out))
    generator = torch.manual_seed(args.seed)
    count, _, width = train.images.shape
    steps = args.epochs * math.ceil(count / args.batch)
    model, peer_model = (Classifier(lstm, width, args.hidden) for lstm in (torchrnn.LSTM, nn.LSTM))
    model.load_state_dict(peer_model.state_dict())
    ours, peer = Training(model, args.lr, steps), Training(peer_model, args.lr, steps)

    columns = "{task.description}", BarColumn(12), TaskProgressColumn(), "{task.fields[text]}"
    for epoch in range(args.epochs):
        batches = torch.randperm(count, generator=generator).split(args.batch)
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task(f"epoch {epoch + 1:2}/{args.epochs}", total=2 * len(batches), text="")
            # The order alternates, so that neither layer always finds the warmer caches.
            for training in (ours, peer) if epoch % 2 == 0 else (peer, ours):
                training.epoch(train, batches, partial(progress.advance, bar))
                training.test(held_out)
            text = f"loss {ours.losses[-1]:.4f} (torch.nn {peer.losses[-1]:.4f})"
            text += f" accuracy {ours.accuracies[-1]:.2%}"
            progress.update(bar, text=text)
        if not console.is_terminal:
            console.print(f"epoch {epoch + 1:2}/{args.epochs} {text}")
    return [ours, peer]


def report(ours: Training, peer: Training, checked: int, required: float | None, console: Console) -> bool:
    """Prints both trainings; returns whether accuracy and the losses of the ``checked`` epochs pass."""
    table = Table("layer", title="The same model on both layers")
    for title in ("first loss", "last loss", "accuracy", "s per epoch"):
        table.add_column(title, justify="right")
    seconds = [statistics.median(training.seconds) for training in (ours, peer)]
    for name, training, median in zip(("torchrnn.LSTM", "torch.nn.LSTM"), (ours, peer), seconds, strict=True):
        losses = f"{training.losses[0]:.6f}", f"{training.losses[-1]:.6f}"
        table.add_row(name, *losses, f"{training.accuracies[-1]:.2%}", f"{median:.3f}")
    console.print(table)
    console.print(
        f"speed: torch.nn takes {seconds[1] / seconds[0]:.2f} times as long (medians of the epochs)"
    )
    pairs = zip(ours.losses[:checked], peer.losses, strict=False)
    difference = torch.tensor([abs(a - b) / b for a, b in pairs]).max().item()  # NaN, if there is one.
    text = (
        f"losses of epochs 1-{checked} differ by at most {difference:.1e} (relative, allowed {TOLERANCE:.0e})"
    )
    checks = {text: difference <= TOLERANCE}
    if required is not None:
        checks[f"accuracy {ours.accuracies[-1]:.2%} (required {required:.0%})"] = (
            ours.accuracies[-1] >= required
        )
    for text, good in checks.items():
        console.print("ok:" if good else "FAILED:", text, style=None if good else "red")
    return all(checks.values())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    parser = argparse.ArgumentParser(
        description="Trains a row-by-row LSTM classifier of handwritten digits on torchrnn and on torch.nn, "
        "and compares losses, accuracy and time. Defaults stand in brackets, those with --mnist second.",
        epilog=f"Exit status: 1 if the losses differ by more than {TOLERANCE:.0e} in {CHECKED_STEPS} steps, "
        f"or if less than {ACCURACY:.0%} of the held-out digits of scikit-learn are recognised.",
    )
    add = parser.add_argument
    add("--mnist", metavar="DIR", type=Path, help="folder of the four MNIST files, gzipped or not")
    add("--epochs", metavar="N", type=positive, help="passes over the training digits [20, 3]")
    add("--batch", metavar="N", type=positive, help="digits per step [32, 128]")
    add("--hidden", metavar="N", type=positive, default=128, help="units per layer [%(default)s]")
    add("--lr", type=float, default=0.15, help="highest learning rate of the schedule [%(default)s]")
    add("--seed", type=int, default=0, help="seed of the weights and the batches [%(default)s]")
    add("--threads", metavar="N", type=positive, help="threads that torch uses [its default]")
    args = parser.parse_args(argv)
    args.epochs = args.epochs or (3 if args.mnist else 20)
    args.batch = args.batch or (128 if args.mnist else 32)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and returns its exit status."""
    args, console = parse(argv), Console(highlight=False)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        train, held_out = mnist_digits(args.mnist) if args.mnist else scikit_digits()
    except (OSError, ValueError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    kernels, threads = torchrnn.info()["isa"] or "no", torch.get_num_threads()
    console.print(
        f"{len(train.labels)} digits, {len(held_out.labels)} held out; {kernels} kernels, {threads} threads"
    )
    ours, peer = compare(train, held_out, args, console)
    checked = min(args.epochs, max(1, CHECKED_STEPS // math.ceil(len(train.labels) / args.batch)))
    return 0 if report(ours, peer, checked, None if args.mnist else ACCURACY, console) else 1


if __name__ == "__main__":
    sys.exit(main())
