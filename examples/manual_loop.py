"""Reads handwritten digits row by row in a loop of its own, and guesses the digit after every row.

``dynamic_rnn`` runs a cell over a sequence; a loop can do the same and look at each step, or change what
comes next. All steps share the weights, because all call one cell.

    python examples/manual_loop.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchrnn
from torchrnn.rnn_cell import GRUCell


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


class EarlyReader(nn.Module):
    """Scores the ten digits after each row of a picture."""

    def __init__(self, columns: int, hidden: int) -> None:
        super().__init__()
        self.cell = GRUCell(hidden)
        self.score = nn.Linear(hidden, 10)  # tf.layers.dense
        self.cell.build(columns)  # An optimizer wants the variables before the first call.

    def forward(self, images: Tensor) -> Tensor:
        """Returns scores [rows, B, 10] for images [B, rows, columns]."""
        state = self.cell.zero_state(len(images), images.dtype)
        scores = []
        for row in images.unbind(1):
            # Early TF needed `if t > 0: tf.get_variable_scope().reuse_variables()` here. A cell owns its
            # variables, so that all who call it share them.
            output, state = self.cell(row, state)
            scores.append(self.score(output))
        return torch.stack(scores)

    def unrolled(self, images: Tensor) -> Tensor:
        """Returns the same from one call of ``dynamic_rnn``, which is faster where no step is special."""
        outputs, _ = torchrnn.dynamic_rnn(self.cell, images, dtype=images.dtype)
        scores: Tensor = self.score(outputs)
        return scores.transpose(0, 1)


def train(
    model: EarlyReader, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, batch: int
) -> float:
    """Trains for one pass over the digits; returns the loss, a mean over pictures and rows."""
    total = 0.0
    for part in torch.randperm(len(labels)).split(batch):
        scores = model(images[part])
        # Each row is asked, so that the first ones learn to guess.
        loss = F.cross_entropy(scores.flatten(0, 1), labels[part].repeat(len(scores)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item() * len(part)
    return total / len(labels)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    parser = argparse.ArgumentParser(
        description="Trains a GRU in a loop of its own to name a handwritten digit after each of its rows. "
        "Defaults stand in brackets."
    )
    add = parser.add_argument
    add("--epochs", metavar="N", type=positive, default=20, help="passes over the digits [%(default)s]")
    add("--batch", metavar="N", type=positive, default=32, help="digits per step [%(default)s]")
    add("--hidden", metavar="N", type=positive, default=64, help="units [%(default)s]")
    add("--lr", type=float, default=0.01, help="learning rate [%(default)s]")
    add("--seed", type=int, default=0, help="seed of the weights and the batches [%(default)s]")
    add("--threads", metavar="N", type=positive, default=1, help="threads of torch [%(default)s]")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Runs the example; returns the held-out accuracy after each row."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)  # One by default: on a busy machine, more wait for each other.
    (images, labels), (held_out, truth) = digits()
    model = EarlyReader(images.size(2), args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    print(f"{len(labels)} digits to train on, {len(truth)} held out")
    for epoch in range(args.epochs):
        loss = train(model, images, labels, optimizer, args.batch)
        print(f"epoch {epoch + 1:2}/{args.epochs} loss {loss:.4f}")

    with torch.inference_mode():
        scores = model(held_out)
        difference = (scores - model.unrolled(held_out)).abs().max()
    right: list[float] = (scores.argmax(2) == truth).double().mean(1).tolist()
    baseline = (truth == labels.mode().values).double().mean()
    print(f"held-out accuracy by rows read; always the most frequent digit: {baseline:.1%}")
    for row, share in enumerate(right, 1):
        print(f"{row:3} {'#' * round(50 * share):50} {share:.1%}")
    print(f"dynamic_rnn on the same cell: scores differ by at most {difference:.1e}")
    return right


if __name__ == "__main__":
    main()
