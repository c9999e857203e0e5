"""Trains a language model of words, a stacked LSTM, with and without DropoutWrapper.

The sentences of Python's documentation are few enough for an LSTM to learn them by heart: trained for long,
it gets worse on others. Dropout between the layers keeps it from that (Zaremba et al. 2014, arXiv:1409.2329).
Sentences have their own lengths: ``dynamic_rnn`` gets them, and the loss leaves the padding out.

    python examples/stacked_lstm.py
    python examples/stacked_lstm.py --keep 0.3 --layers 3
"""

from __future__ import annotations

import argparse
import math
import random
import re
import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchrnn
from torchrnn.rnn_cell import BasicLSTMCell, DropoutWrapper, MultiRNNCell

END, UNKNOWN = 0, 1  # Of a sentence, which also starts one; words that are seen less than --seen times.


def sentences() -> list[list[str]]:
    """Returns the words of every sentence of Python's help texts, each sentence once, 3 to 40 words long."""
    from pydoc_data.topics import topics

    paragraphs = [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")]
    found = dict.fromkeys(line for part in paragraphs for line in re.split(r"(?<=[.:?!]) (?=[A-Z])", part))
    whole = [line for line in found if line.endswith((".", ":", "?", "!"))]  # No headings, no code.
    words = [re.findall(r"\w+|[^\w\s]", line.lower()) for line in whole]
    return [line for line in words if 3 <= len(line) <= 40]


def padded(lines: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns inputs and targets [B, T], and lengths [B]; inputs start with END, targets end with it."""
    rows = nn.utils.rnn.pad_sequence([F.pad(line, (1, 1), value=END) for line in lines], batch_first=True)
    return rows[:, :-1], rows[:, 1:], torch.tensor([len(line) + 1 for line in lines])


class WordRNN(nn.Module):
    """Scores the next word, after each word of a sentence."""

    def __init__(self, vocabulary: int, hidden: int, layers: int, keep: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)  # tf.nn.embedding_lookup
        # A cell for each layer: [cell] * layers is one cell, whose weights all layers share.
        cells = [DropoutWrapper(BasicLSTMCell(hidden), output_keep_prob=keep) for _ in range(layers)]
        # The keep probabilities are numbers, no placeholders: model.eval() turns dropout off.
        self.cell = DropoutWrapper(MultiRNNCell(cells), input_keep_prob=keep)
        self.score = nn.Linear(hidden, vocabulary)
        self.cell.build(hidden)  # An optimizer wants the variables before the first call.

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns scores [B, T, V] for ids [B, T] and lengths [B]."""
        x = self.embed(ids)
        outputs, _ = torchrnn.dynamic_rnn(self.cell, x, sequence_length=lengths, dtype=x.dtype)
        scores: Tensor = self.score(outputs)
        return scores

    def loss(self, lines: Sequence[Tensor]) -> tuple[Tensor, int]:
        """Returns the sum over all words of -log p, and their number."""
        inputs, targets, lengths = padded(lines)
        there = torch.arange(inputs.size(1)) < lengths[:, None]  # tf.sequence_mask
        scores = self(inputs, lengths)[there]
        return F.cross_entropy(scores, targets[there], reduction="sum"), len(scores)


def train(model: WordRNN, lines: Sequence[Tensor], optimizer: torch.optim.Optimizer, batch: int) -> float:
    """Trains for one pass over the sentences; returns the perplexity."""
    model.train()
    total, count = 0.0, 0
    for part in torch.randperm(len(lines)).split(batch):
        loss, words = model.loss([lines[i] for i in part])
        optimizer.zero_grad()
        (loss / words).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total, count = total + loss.item(), count + words
    return math.exp(total / count)


@torch.inference_mode()
def test(model: WordRNN, lines: Sequence[Tensor]) -> float:
    """Returns the perplexity."""
    model.eval()
    losses = [model.loss(lines[i : i + 100]) for i in range(0, len(lines), 100)]
    return math.exp(sum(loss.item() for loss, _ in losses) / sum(words for _, words in losses))


def unigram_perplexity(known: Sequence[Tensor], lines: Sequence[Tensor], vocabulary: int) -> float:
    """Returns the perplexity of a model that knows only how often each word is in ``known``."""
    known_words, words = (
        torch.cat([F.pad(line, (0, 1), value=END) for line in part]) for part in (known, lines)
    )
    counts = known_words.bincount(minlength=vocabulary) + 1
    return (counts / counts.sum())[words].log().mean().neg().exp().item()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    parser = argparse.ArgumentParser(
        description="Trains a language model of words on sentences of Python's documentation, without "
        "dropout and with it, and measures both on a tenth that is held out. Defaults stand in brackets."
    )
    add = parser.add_argument
    add("--keep", metavar="P", type=float, default=0.7, help="probability to keep a value [%(default)s]")
    add("--epochs", metavar="N", type=positive, default=16, help="passes over the sentences [%(default)s]")
    add("--batch", metavar="N", type=positive, default=32, help="sentences per step [%(default)s]")
    add("--hidden", metavar="N", type=positive, default=128, help="units per layer [%(default)s]")
    add("--layers", metavar="N", type=positive, default=2, help="LSTM layers [%(default)s]")
    add("--seen", metavar="N", type=positive, default=5, help="how often a known word is there [%(default)s]")
    add("--sentences", metavar="N", type=positive, default=1500, help="how many to use [%(default)s]")
    add("--lr", type=float, default=0.01, help="learning rate at the start [%(default)s]")
    add("--seed", type=int, default=0, help="seed of weights, batches and dropout [%(default)s]")
    add("--threads", metavar="N", type=positive, default=1, help="threads of torch [%(default)s]")
    args = parser.parse_args(argv)
    if not 0 < args.keep < 1:
        parser.error(f"--keep must be between 0 and 1, got {args.keep}")
    return args


def main(argv: Sequence[str] | None = None) -> dict[float, float]:
    """Runs the example; returns the held-out perplexity by the probability to keep a value."""
    args = parse(argv)
    torch.set_num_threads(args.threads)  # One by default: on a busy machine, more wait for each other.
    lines = sentences()
    random.Random(args.seed).shuffle(lines)
    lines = lines[: args.sentences]
    cut = len(lines) - len(lines) // 10
    counts = Counter(word for line in lines[:cut] for word in line)
    known_words = [word for word, count in counts.items() if count >= args.seen]
    ids = {word: i for i, word in enumerate(known_words, 2)}
    rows = [torch.tensor([ids.get(word, UNKNOWN) for word in line]) for line in lines]
    known, held_out = rows[:cut], rows[cut:]
    unigram = unigram_perplexity(known, held_out, len(ids) + 2)
    print(f"{len(known)} sentences to train on, {len(held_out)} held out, {len(ids)} known words")

    results: dict[float, list[float]] = {1.0: [], args.keep: []}
    for keep, values in results.items():
        torch.manual_seed(args.seed)
        model = WordRNN(len(ids) + 2, args.hidden, args.layers, keep)
        optimizer = torch.optim.Adam(model.parameters(), args.lr)
        print(f"keep {keep}\n{torchrnn.explain(model.cell)}")
        for epoch in range(args.epochs):
            start = time.perf_counter()
            trained = train(model, known, optimizer, args.batch)
            seconds = time.perf_counter() - start
            values.append(test(model, held_out))
            figures = f"perplexity {trained:.1f}, held out {values[-1]:.1f}"
            print(f"epoch {epoch + 1:2}/{args.epochs} {figures}, {seconds:.1f} s")
    print(f"held-out perplexity; by frequency alone {unigram:.1f}")
    for keep, values in results.items():
        print(f"keep {keep}: {values[-1]:.1f} after the last epoch, {min(values):.1f} after the best one")
    return {keep: values[-1] for keep, values in results.items()}


if __name__ == "__main__":
    main()
