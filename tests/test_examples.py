"""The examples: small runs that must learn, their options, and what prepares their texts."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from examples import char_rnn, digit_rows, manual_loop, sentences, stacked_lstm

NAMES = ["char_rnn", "digit_rows", "manual_loop", "sentences", "stacked_lstm"]


@pytest.mark.parametrize("name", NAMES)
def test_example_explains_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        importlib.import_module(f"examples.{name}").main(["--help"])
    assert exit_info.value.code == 0
    output = " ".join(capsys.readouterr().out.split())  # However wide the terminal is.
    assert "Defaults stand in brackets" in output
    for option in ("--epochs", "--hidden", "--seed", "--threads"):
        assert option in output


@pytest.mark.parametrize("name", NAMES)
def test_example_refuses_no_epochs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        importlib.import_module(f"examples.{name}").main(["--epochs", "0"])
    assert exit_info.value.code == 2
    assert "argument --epochs: invalid positive value: '0'" in capsys.readouterr().err


def test_manual_loop_learns_and_equals_dynamic_rnn(capsys: pytest.CaptureFixture[str]) -> None:
    right = manual_loop.main(["--epochs", "4", "--hidden", "32", "--threads", "1"])
    assert len(right) == 8
    assert right[-1] > 0.5  # One digit in ten is right by chance.
    assert right[-1] > right[0]
    assert "held-out accuracy by rows read; always the most frequent digit: 10" in capsys.readouterr().out
    model = manual_loop.EarlyReader(8, 16).double()
    images = torch.randn(5, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(images), model.unrolled(images))


def test_digit_rows_learns(capsys: pytest.CaptureFixture[str]) -> None:
    assert digit_rows.main(["--epochs", "4", "--hidden", "32", "--threads", "1"]) > 0.5
    output = capsys.readouterr().out
    assert "LSTMCell(32)" in output
    assert len(output.splitlines()[-8]) > 64  # Four pictures side by side.


def test_digit_rows_reads_the_last_state() -> None:
    model, images = digit_rows.Classifier(8, 6), torch.randn(3, 8, 8)
    outputs, _ = digit_rows.torchrnn.dynamic_rnn(model.cell, images, dtype=images.dtype)
    torch.testing.assert_close(model(images), model.score(outputs[:, -1]))


def test_sentences_learns(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = sentences.main(["--epochs", "8", "--hidden", "32", "--lr", "0.01", "--threads", "1"])
    assert accuracy > 0.5  # The longest chapter has less than a third.
    assert "always the longest chapter" in capsys.readouterr().out


def test_sentences_of_one_batch_do_not_depend_on_padding() -> None:
    model = sentences.Classifier(9, 4).eval()
    lines = [torch.tensor([2, 3, 4]), torch.tensor([5, 6, 7, 8, 2])]
    together = model(*sentences.padded(lines))
    alone = torch.cat([model(*sentences.padded([line])) for line in lines])
    torch.testing.assert_close(together, alone)


def test_sentences_stand_once_and_in_one_chapter() -> None:
    texts = [text for text, _ in sentences.sentences()]
    assert len(texts) == len(set(texts)) > 500
    assert {chapter for _, chapter in sentences.sentences()} == set(range(len(sentences.CHAPTERS)))


def test_stacked_lstm_learns_with_and_without_dropout(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--epochs 6 --batch 16 --hidden 32 --sentences 600 --keep 0.8 --threads 1"
    results = stacked_lstm.main(options.split())
    output = capsys.readouterr().out
    unigram = float(output.partition("by frequency alone ")[2].split()[0])
    assert list(results) == [1.0, 0.8]
    assert max(results.values()) < 0.8 * unigram


def test_stacked_lstm_drops_in_training_only() -> None:
    model = stacked_lstm.WordRNN(9, 16, layers=2, keep=0.5)
    lines = [torch.tensor([2, 3, 4]), torch.tensor([5, 6])]
    assert model.loss(lines)[0] != model.loss(lines)[0]
    model.eval()
    loss, words = model.loss(lines)
    torch.testing.assert_close(model.loss(lines)[0], loss, rtol=0, atol=0)
    assert words == 7  # And an end for each.


@pytest.mark.parametrize("keep", ["0", "1", "-0.5"])
def test_stacked_lstm_names_a_bad_probability(keep: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        stacked_lstm.main([f"--keep={keep}"])
    assert f"--keep must be between 0 and 1, got {float(keep)}" in capsys.readouterr().err


SMALL = [
    "--rows",
    "8",
    "--steps",
    "32",
    "--hidden",
    "32",
    "--layers",
    "1",
    "--length",
    "50",
    "--threads",
    "1",
]


def test_char_rnn_learns_a_text_given_by_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    path.write_text(char_rnn.python_documentation()[:30_000], encoding="utf-8")
    bits = char_rnn.main([str(path), "--epochs", "4", "--start", "Python", *SMALL])
    output = capsys.readouterr().out
    unigram = float(output.partition("by frequency alone ")[2].split()[0])
    assert bits < 0.85 * unigram
    written = output.partition("\n\n")[2]
    assert written.startswith("Python")
    assert len(written) == len("Python") + 50 + 1  # And the line end of print.
    assert char_rnn.UNKNOWN not in written


def test_char_rnn_reads_the_documentation_by_default() -> None:
    _, known, held_out, vocabulary = char_rnn.parse([])
    assert len(known) > 100_000
    assert len(held_out) == (len(known) + len(held_out)) // 10
    assert (held_out == 0).double().mean() < 0.01
    assert 60 < len(vocabulary.chars) < 300


def test_char_rnn_documentation_has_no_paragraph_twice() -> None:
    paragraphs = char_rnn.python_documentation().split("\n\n")
    assert len(paragraphs) == len(set(paragraphs))


def test_char_rnn_vocabulary_knows_what_is_there_twice() -> None:
    vocabulary = char_rnn.Vocabulary("ab\u00e4ab\u00e4c")
    assert vocabulary.chars == [char_rnn.UNKNOWN, "a", "b", "\u00e4"]
    assert vocabulary.encode("\u00e4cz\u20aca").tolist() == [3, 0, 0, 0, 1]
    assert vocabulary.decode([1, 3, 2]) == "a\u00e4b"
    assert vocabulary.encode("").dtype == torch.int64


def test_char_rnn_batches_continue_each_other() -> None:
    ids = torch.arange(2 * 3 * 4 + 5)
    parts = list(char_rnn.batches(ids, rows=2, steps=4))
    assert len(parts) == 3
    for inputs, targets in parts:
        assert inputs.shape == targets.shape == (2, 4)
        assert torch.equal(targets, inputs + 1)
    rows = torch.cat([inputs for inputs, _ in parts], 1)
    assert torch.equal(rows, ids[:24].view(2, 12))


def test_char_rnn_batches_need_one_character_more_than_they_hold() -> None:
    assert len(list(char_rnn.batches(torch.arange(13), rows=3, steps=4))) == 1
    with pytest.raises(ValueError, match="batches of 3 x 4 need at least 13 characters to train on, got 12"):
        next(char_rnn.batches(torch.arange(12), rows=3, steps=4))


def test_char_rnn_test_carries_the_state_over_its_parts() -> None:
    model, ids = char_rnn.CharRNN(5, 8, layers=2), torch.randint(5, (2500,))
    scores, _ = model(ids[None, :-1], model.zero_state(1))
    bits = torch.nn.functional.cross_entropy(scores[0], ids[1:]).item() / torch.tensor(2.0).log().item()
    assert char_rnn.test(model, ids) == pytest.approx(bits, rel=1e-4)


def test_char_rnn_writes_the_same_from_the_same_seed() -> None:
    vocabulary = char_rnn.Vocabulary("abcabc")
    model, written = char_rnn.CharRNN(4, 8, layers=2), []
    for _ in range(2):
        torch.manual_seed(1)
        written.append(char_rnn.write(model, vocabulary, "b\u00df", 30, temperature=1.0))
    assert written[0] == written[1]
    assert written[0][:2] == "b\u00df"
    assert set(written[0][2:]) <= set("abc")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "No such file or directory"),
        (b"", [], "batches of 16 x 64 need at least 1025 characters to train on, got 0"),
        (b"too short", [], "batches of 16 x 64 need at least 1025 characters to train on, got 9"),
        (b"abcabcabc", ["--rows", "2", "--steps", "2"], "a text needs at least 20 characters, got 9"),
        (b"caf\xe9" * 1000, [], "'utf-8' codec can't decode byte 0xe9"),
        (b"text" * 1000, ["--encoding", "nosuch"], "unknown encoding: nosuch"),
        (b"text" * 1000, ["--start", ""], "--start needs at least one character"),
        (b"text" * 1000, ["--temperature", "0"], "--temperature must be above 0, got 0.0"),
    ],
)
def test_char_rnn_names_what_is_wrong(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    options: list[str],
    message: str,
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as exit_info:
        char_rnn.main([str(path), *options])
    assert exit_info.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_char_rnn_reads_other_encodings(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("caf\u00e9 ".encode("latin-1") * 500)
    _, known, held_out, vocabulary = char_rnn.parse([str(path), "--encoding", "latin-1"])
    assert vocabulary.chars[1:] == sorted("caf\u00e9 ")
    assert (len(known), len(held_out)) == (2250, 250)
