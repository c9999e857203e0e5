"""Trains a character language model, and lets it write.

The text is cut into N sequences that are read side by side in batches of N x M characters. The state at the
end of a batch is where the next one starts, so that the model remembers more than the M characters through
which gradients flow.

    python examples/char_rnn.py                       # the documentation that comes with Python
    python examples/char_rnn.py TEXT --epochs 20      # any other text
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import torchrnn
from torchrnn.rnn_cell import LSTMCell, MultiRNNCell

UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def python_documentation() -> str:
    """Returns the help texts of Python, each paragraph once: topics repeat each other's sections."""
    from pydoc_data.topics import topics

    return "\n\n".join(dict.fromkeys("\n\n".join(topics.values()).split("\n\n")))


class Vocabulary:
    """The characters of a text and their numbers.

    Number 0 stands for all that is not known. Characters that are there only once count as such, so that a
    model learns how often to expect it.
    """

    def __init__(self, text: str) -> None:
        known = sorted(char for char, count in Counter(text).items() if count > 1 and char != UNKNOWN)
        self.chars = [UNKNOWN, *known]
        self.ids = {char: i for i, char in enumerate(self.chars)}

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.ids.get(char, 0) for char in text], dtype=torch.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.chars[i] for i in ids)


def batches(ids: Tensor, rows: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields inputs and targets [N, M] int64, the targets one character ahead.

    Row n of a batch continues row n of the batch before. Less than N * M characters at the end are left out.

    Raises:
        ValueError: If there is not one whole batch.
    """
    count = (len(ids) - 1) // (rows * steps)
    if count < 1:
        raise ValueError(
            f"batches of {rows} x {steps} need at least {rows * steps + 1} characters to train on, "
            f"got {len(ids)}"
        )
    used = count * rows * steps
    inputs, targets = ids[:used].view(rows, -1), ids[1 : used + 1].view(rows, -1)
    yield from zip(inputs.split(steps, 1), targets.split(steps, 1), strict=True)


class CharRNN(nn.Module):
    """Scores what comes next, after each character."""

    def __init__(self, vocabulary: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)  # tf.nn.embedding_lookup
        self.cell = MultiRNNCell([LSTMCell(hidden) for _ in range(layers)])
        self.score = nn.Linear(hidden, vocabulary)  # tf.layers.dense
        self.cell.build(hidden)  # An optimizer wants the variables before the first call.

    def forward(self, ids: Tensor, state: object) -> tuple[Tensor, object]:
        """Returns scores [N, M, V] and the final state, for ids [N, M] and an initial state."""
        outputs, state = torchrnn.dynamic_rnn(self.cell, self.embed(ids), initial_state=state)
        return self.score(outputs), state

    def zero_state(self, rows: int) -> object:
        return self.cell.zero_state(rows, self.score.weight.dtype)


def train(model: CharRNN, ids: Tensor, optimizer: torch.optim.Optimizer, rows: int, steps: int) -> float:
    """Trains for one pass over the text; returns bits per character."""
    model.train()
    state, total, count = model.zero_state(rows), 0.0, 0
    for inputs, targets in batches(ids, rows, steps):
        # A TF1 loop would fetch the state from session.run and feed it again: its gradient ended there.
        state = pytree.tree_map(Tensor.detach, state)
        scores, state = model(inputs, state)
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total, count = total + loss.item(), count + 1
    return total / count / math.log(2)


@torch.inference_mode()
def test(model: CharRNN, ids: Tensor) -> float:
    """Returns bits per character over a text that is read as one sequence, from its second character on."""
    model.eval()
    state, total = model.zero_state(1), 0.0
    for inputs, targets in zip(ids[:-1].split(1000), ids[1:].split(1000), strict=True):
        scores, state = model(inputs[None], state)
        total += F.cross_entropy(scores[0], targets, reduction="sum").item()
    return total / (len(ids) - 1) / math.log(2)


@torch.inference_mode()
def write(model: CharRNN, vocabulary: Vocabulary, start: str, length: int, temperature: float) -> str:
    """Returns ``start`` and how the model goes on: each character is drawn, and read as the next input."""
    model.eval()
    state, written = model.zero_state(1), []
    for char in vocabulary.encode(start[:-1]):
        _, state = model.cell(model.embed(char[None]), state)
    char = vocabulary.encode(start[-1])
    for _ in range(length):
        output, state = model.cell(model.embed(char), state)  # One step: [1, H].
        scores = model.score(output)[0] / temperature
        scores[0] = -torch.inf  # What is not known cannot be written.
        char = scores.softmax(0).multinomial(1)  # tf.multinomial takes scores, torch.multinomial weights.
        written.append(int(char))
    return start + vocabulary.decode(written)


def unigram_bits(known: Tensor, ids: Tensor, vocabulary: int) -> float:
    """Returns bits per character of a model that knows only how often each one is in ``known``."""
    share = (known.bincount(minlength=vocabulary) + 1) / (len(known) + vocabulary)
    return -share[ids].log2().mean().item()


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Tensor, Tensor, Vocabulary]:
    """Returns the options, the training text, the held-out text and the vocabulary."""

    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    parser = argparse.ArgumentParser(
        description="Trains a character language model on the first nine tenths of a text, measures it on "
        "the rest, and lets it write. Defaults stand in brackets."
    )
    add = parser.add_argument
    add("text", type=Path, nargs="?", help="a text file [the documentation that comes with Python]")
    add("--encoding", default="utf-8", help="of the text file [%(default)s]")
    add("--epochs", metavar="N", type=positive, default=5, help="passes over the text [%(default)s]")
    add("--rows", metavar="N", type=positive, default=16, help="sequences side by side [%(default)s]")
    add("--steps", metavar="M", type=positive, default=64, help="characters of each per batch [%(default)s]")
    add("--hidden", metavar="N", type=positive, default=128, help="units per layer [%(default)s]")
    add("--layers", metavar="N", type=positive, default=2, help="LSTM layers [%(default)s]")
    add("--lr", type=float, default=0.005, help="learning rate at the start [%(default)s]")
    add("--start", metavar="TEXT", default="The ", help="what the written text starts with [%(default)r]")
    add("--length", metavar="N", type=positive, default=400, help="characters to write [%(default)s]")
    add("--temperature", type=float, default=0.7, help="below 1: more likely characters [%(default)s]")
    add("--seed", type=int, default=0, help="seed of the weights and the written text [%(default)s]")
    add("--threads", metavar="N", type=positive, default=1, help="threads of torch [%(default)s]")
    args = parser.parse_args(argv)
    if not args.start:
        parser.error("--start needs at least one character")
    if args.temperature <= 0:
        parser.error(f"--temperature must be above 0, got {args.temperature}")
    try:
        text = args.text.read_text(args.encoding) if args.text else python_documentation()
        cut = len(text) - len(text) // 10
        vocabulary = Vocabulary(text[:cut])  # Of the training part alone: the rest is not known yet.
        known, held_out = vocabulary.encode(text[:cut]), vocabulary.encode(text[cut:])
        next(batches(known, args.rows, args.steps))  # Raises if the text is too short.
        if len(held_out) < 2:
            raise ValueError(f"a text needs at least 20 characters, got {len(text)}")
    except (OSError, ValueError, LookupError) as error:
        parser.error(f"argument text: {error}")
    return args, known, held_out, vocabulary


def main(argv: Sequence[str] | None = None) -> float:
    """Runs the example; returns bits per character of the held-out text."""
    args, known, held_out, vocabulary = parse(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    size = len(vocabulary.chars)
    model = CharRNN(size, args.hidden, args.layers)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    print(f"{len(known)} characters to train on, {len(held_out)} held out, {size} different ones")
    print(torchrnn.explain(model.cell))

    bits = math.inf
    for epoch in range(args.epochs):
        start = time.perf_counter()
        trained = train(model, known, optimizer, args.rows, args.steps)
        schedule.step()
        seconds = time.perf_counter() - start
        bits = test(model, held_out)
        figures = f"bits per character {trained:.3f}, held out {bits:.3f}"
        print(f"epoch {epoch + 1:2}/{args.epochs} {figures}, {seconds:.1f} s")
    unigram = unigram_bits(known, held_out, size)
    print(f"held out: {bits:.3f} bits per character; by frequency alone {unigram:.3f}")
    print(f"\n{write(model, vocabulary, args.start, args.length, args.temperature)}")
    return bits


if __name__ == "__main__":
    main()
