"""Classifies handwritten digits row by row with three LSTM layers, by the last state of the top one.

python examples/digit_rows.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchrnn
from torchrnn.rnn_cell import LSTMCell, MultiRNNCell

LAYERS = 3


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns the training part and a held-out fifth of scikit-learn's digits.

    Both are images [N, 8, 8] of values in -1..1, and labels [N].
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    x, held_out_x = (torch.tensor(part, dtype=torch.float32).view(-1, 8, 8) / 8 - 1 for part in parts[:2])
    y, held_out_y = map(torch.tensor, parts[2:])
    return (x, y), (held_out_x, held_out_y)


class Classifier(nn.Module):
    """Reads a picture from its first row to its last and scores the ten digits."""

    def __init__(self, columns: int, hidden: int) -> None:
        super().__init__()
        self.cell = MultiRNNCell([LSTMCell(hidden) for _ in range(LAYERS)])
        self.score = nn.Linear(hidden, 10)  # tf.layers.dense
        self.cell.build(columns)  # An optimizer wants the variables before the first call.

    def forward(self, images: Tensor) -> Tensor:
        """Returns scores [B, 10] for images [B, rows, columns]."""
        # In place of dtype: initial_state=self.cell.zero_state(len(images), images.dtype)
        _, states = torchrnn.dynamic_rnn(self.cell, images, dtype=images.dtype)
        # A state (c, h) for each layer. The last one's h is what it put out last: outputs[:, -1].
        scores: Tensor = self.score(states[-1].h)
        return scores


def train(
    model: Classifier, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, batch: int
) -> float:
    """Trains for one pass over the digits; returns the loss."""
    total = 0.0
    for part in torch.randperm(len(labels)).split(batch):
        loss = F.cross_entropy(model(images[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item() * len(part)
    return total / len(labels)


def picture(image: Tensor) -> list[str]:
    """Returns an image [rows, columns] of values in -1..1 as lines of text."""
    return ["".join(" .:-=+*#@"[round(4 * value + 4)] * 2 for value in row) for row in image.tolist()]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    parser = argparse.ArgumentParser(
        description="Trains three LSTM layers to name handwritten digits that they read row by row. "
        "Defaults stand in brackets."
    )
    add = parser.add_argument
    add("--epochs", metavar="N", type=positive, default=20, help="passes over the digits [%(default)s]")
    add("--batch", metavar="N", type=positive, default=32, help="digits per step [%(default)s]")
    add("--hidden", metavar="N", type=positive, default=64, help="units per layer [%(default)s]")
    add("--lr", type=float, default=0.005, help="learning rate [%(default)s]")
    add("--seed", type=int, default=0, help="seed of the weights and the batches [%(default)s]")
    add("--threads", metavar="N", type=positive, default=1, help="threads of torch [%(default)s]")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> float:
    """Runs the example; returns the held-out accuracy."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)  # One by default: on a busy machine, more wait for each other.
    (images, labels), (held_out, truth) = digits()
    model = Classifier(images.size(2), args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    print(f"{len(labels)} digits to train on, {len(truth)} held out")
    print(torchrnn.explain(model.cell))
    for epoch in range(args.epochs):
        loss = train(model, images, labels, optimizer, args.batch)
        print(f"epoch {epoch + 1:2}/{args.epochs} loss {loss:.4f}")

    with torch.inference_mode():
        named: Tensor = model(held_out).argmax(1)
    accuracy = float((named == truth).double().mean())
    baseline = (truth == labels.mode().values).double().mean()
    print(f"held-out accuracy {accuracy:.1%}; always the most frequent digit: {baseline:.1%}")
    wrong = (named != truth).nonzero().flatten().tolist()
    shown = [*wrong[:2], *(i for i in range(4) if i not in wrong)][:4]
    print("  ".join(f"{f'{named[i]}, is {truth[i]}':16}" for i in shown))
    for line in zip(*(picture(held_out[i]) for i in shown), strict=True):
        print("  ".join(line))
    return accuracy


if __name__ == "__main__":
    main()
