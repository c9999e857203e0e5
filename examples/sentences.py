"""Tells from which chapter of Python's documentation a sentence is, by reading it in both directions.

Sentences have their own lengths: ``bidirectional_dynamic_rnn`` gets them, starts the backward cell at the
last word of each, and leaves the padding alone.

    python examples/sentences.py
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchrnn
from torchrnn.rnn_cell import LSTMCell

# Chapters that do not repeat each other's sections.
CHAPTERS = ("compound", "specialnames", "types", "debugger", "string-methods", "formatstrings")
PADDING, UNKNOWN = 0, 1  # Words that are seen less than --seen times are not known.


def sentences() -> list[tuple[str, int]]:
    """Returns sentences of 4 to 50 words and the numbers of their chapters, in the order of the text.

    A sentence that is there twice counts once, so that what is held out has not been trained on.
    """
    from pydoc_data.topics import topics

    found: dict[str, int] = {}
    for chapter, name in enumerate(CHAPTERS):
        for paragraph in topics[name].split("\n\n"):
            for sentence in re.split(r"(?<=[.:?!]) (?=[A-Z])", " ".join(paragraph.split())):
                found.setdefault(sentence, chapter)
    return [
        (sentence, chapter)
        for sentence, chapter in found.items()
        if sentence.endswith((".", ":", "?", "!"))
        and 4 <= len(words(sentence)) <= 50  # No headings, no code.
    ]


def words(sentence: str) -> list[str]:
    """Returns words and signs, in lower case."""
    return re.findall(r"\w+|[^\w\s]", sentence.lower())


def padded(lines: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns ids [B, T] and lengths [B]."""
    ids = nn.utils.rnn.pad_sequence(list(lines), batch_first=True, padding_value=PADDING)
    return ids, torch.tensor([len(line) for line in lines])


class Classifier(nn.Module):
    """Reads a sentence forwards and backwards and scores the chapters."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)  # tf.nn.embedding_lookup
        self.dropout = nn.Dropout(0.5)  # tf.layers.dropout(training=...): model.eval() turns it off.
        self.cell_fw, self.cell_bw = LSTMCell(hidden), LSTMCell(hidden)
        self.score = nn.Linear(2 * hidden, len(CHAPTERS))  # tf.layers.dense
        for cell in (self.cell_fw, self.cell_bw):
            cell.build(hidden)  # An optimizer wants the variables before the first call.

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns scores [B, chapters] for ids [B, T] and lengths [B]."""
        x = self.dropout(self.embed(ids))
        _, (state_fw, state_bw) = torchrnn.bidirectional_dynamic_rnn(
            self.cell_fw, self.cell_bw, x, sequence_length=lengths, dtype=x.dtype
        )
        # The states after the last word forwards and the first word backwards. The outputs of the two are a
        # pair as well, one for every word: torch.cat(outputs, 2) is what a tagger would score.
        both = torch.cat([state_fw.h, state_bw.h], 1)  # tf.concat
        scores: Tensor = self.score(self.dropout(both))
        return scores


def train(
    model: Classifier, lines: Sequence[Tensor], chapters: Tensor, optimizer: torch.optim.Optimizer, batch: int
) -> float:
    """Trains for one pass over the sentences; returns the loss."""
    model.train()
    total = 0.0
    for part in torch.randperm(len(lines)).split(batch):
        loss = F.cross_entropy(model(*padded([lines[i] for i in part])), chapters[part])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item() * len(part)
    return total / len(lines)


@torch.inference_mode()
def name(model: Classifier, lines: Sequence[Tensor]) -> Tensor:
    """Returns the chapters [N] that the model names."""
    model.eval()
    scores: Tensor = model(*padded(lines))
    return scores.argmax(1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    parser = argparse.ArgumentParser(
        description="Trains a bidirectional LSTM to tell from which chapter of Python's documentation a "
        "sentence is. Defaults stand in brackets."
    )
    add = parser.add_argument
    add("--epochs", metavar="N", type=positive, default=15, help="passes over the sentences [%(default)s]")
    add("--batch", metavar="N", type=positive, default=32, help="sentences per step [%(default)s]")
    add("--hidden", metavar="N", type=positive, default=64, help="units per direction [%(default)s]")
    add("--seen", metavar="N", type=positive, default=2, help="how often a known word is there [%(default)s]")
    add("--lr", type=float, default=0.003, help="learning rate [%(default)s]")
    add("--seed", type=int, default=0, help="seed of split, weights, batches [%(default)s]")
    add("--threads", metavar="N", type=positive, default=1, help="threads of torch [%(default)s]")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> float:
    """Runs the example; returns the held-out accuracy."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)  # One by default: on a busy machine, more wait for each other.
    examples = sentences()
    random.Random(args.seed).shuffle(examples)
    texts, chapters = [text for text, _ in examples], torch.tensor([chapter for _, chapter in examples])
    cut = len(texts) * 4 // 5
    counts = Counter(word for text in texts[:cut] for word in words(text))  # Of the training part alone.
    ids = {word: i for i, word in enumerate((w for w, n in counts.items() if n >= args.seen), 2)}
    lines = [torch.tensor([ids.get(word, UNKNOWN) for word in words(text)]) for text in texts]
    print(f"{cut} sentences to train on, {len(texts) - cut} held out, {len(ids)} known words")

    model = Classifier(len(ids) + 2, args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    truth = chapters[cut:]
    named = truth
    for epoch in range(args.epochs):
        loss = train(model, lines[:cut], chapters[:cut], optimizer, args.batch)
        named = name(model, lines[cut:])
        accuracy = (named == truth).double().mean().item()
        print(f"epoch {epoch + 1:2}/{args.epochs} loss {loss:.4f}, held-out accuracy {accuracy:.1%}")
    baseline = (truth == chapters[:cut].mode().values).double().mean()
    print(f"held-out accuracy {accuracy:.1%}; always the longest chapter: {baseline:.1%}\n")
    for text, found, right in list(zip(texts[cut:], named.tolist(), truth.tolist(), strict=True))[:8]:
        mark = "" if found == right else f", is {CHAPTERS[right]}"
        print(f"{CHAPTERS[found]}{mark}: {text}")
    return accuracy


if __name__ == "__main__":
    main()
