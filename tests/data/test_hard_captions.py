"""Wrong captions that training samples get: which there are, and which of them a sample draws."""

from collections.abc import Sequence

import pytest
import torch

from repr.data.drawn.composition import DrawnComposition
from repr.data.epoch_order import Place
from repr.data.hard_captions import Distractors, Exchange
from repr.data.word_order import exchanged
from tests.data.conftest import Noise

TAGS = {"cat": "NN", "lid": "NN", "dogs": "NNS", "red": "JJ", "big": "JJ", "sits": "VBZ", "sees": "VBZ"}


def tokenize(texts: list[str]) -> torch.Tensor:
    """The first 14 letters as tokens."""
    return torch.tensor([[ord(letter) for letter in text.ljust(14)[:14]] for text in texts])


class Words(Noise):
    """A source with captions and up to four wrong ones of its own; in row 7 it is the right one."""

    def captions(self, index: int) -> list[str]:
        return [f"row {index:02}"] if index else ["a cat on a lid"]

    def distractors(self, index: int) -> list[str]:
        wrong = [f"not {letter} {index:02}" for letter in "abcdef"]
        return [f"row {index:02}"] if index == 7 else wrong[: index % 5]

    def tags(self, caption: str) -> list[tuple[str, str]]:
        return [(word, TAGS.get(word.strip(".,").lower(), "IN")) for word in caption.split()]


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("A cat on the lid.", {"A lid on the cat."}),
        ("red cat on big lid", {"big cat on red lid", "red lid on big cat"}),
        ("a cat and a lid", set()),
        ("a Cat, two dogs OR a lid", set()),
        ("a cat that sees red dogs and a lid", {"a dogs that sees red cat and a lid"}),
        ("a cat sees a Cat", set()),
        ("a cat sits", set()),
        ("...", set()),
        ("", set()),
    ],
)
def test_two_words_of_one_kind_are_exchanged(caption: str, wrong: set[str]) -> None:
    found = exchanged(Words(1).tags(caption))
    assert len(found) == len(wrong)
    assert set(found) == wrong


def rows(datamodule: object, index: Sequence[int], epoch: int = 0) -> dict[int, torch.Tensor]:
    """The wrong captions (K, L) of some rows."""
    batch = datamodule.train_dataloader().dataset.__getitems__([Place(epoch, 0, epoch, row) for row in index])
    assert torch.equal(batch["text"], tokenize([datamodule.train.captions(row)[0] for row in index]))
    return dict(zip(index, batch["hard_text"], strict=True))


def test_a_sample_draws_among_its_wrong_captions(make_datamodule) -> None:
    datamodule = make_datamodule(train=Words(31), hard_captions=Distractors(count=3), tokenizer=tokenize)
    drawn = rows(datamodule, range(31))
    for row, tokens in drawn.items():
        known = [tokenize([text])[0].tolist() for text in datamodule.train.distractors(row)] if row != 7 else []
        told = [tuple(text) for text in tokens.tolist() if any(text)]
        assert len(told) == len(set(told)) == min(3, len(known))
        assert set(told) <= set(map(tuple, known))
    again = rows(datamodule, [9, 30, 4])
    assert all(torch.equal(again[row], drawn[row]) for row in again)  # whatever stands beside it
    others = rows(datamodule, range(31), epoch=1)
    assert not any(torch.equal(others[row], drawn[row]) for row in drawn if row % 5 == 4 and row)


def test_what_a_tower_would_not_see_is_left_out(make_datamodule) -> None:
    source = Words(31)
    source.captions = lambda index: ["a cat that sees a lid on a big dog"]
    source.distractors = lambda index: ["a cat that sees a dog on a big lid"]
    datamodule = make_datamodule(train=source, hard_captions=Distractors(count=2), tokenizer=tokenize)
    assert not rows(datamodule, [3])[3].any()


def test_words_are_exchanged_by_the_tags_of_the_source(make_datamodule) -> None:
    datamodule = make_datamodule(train=Words(31), hard_captions=Exchange(count=1), tokenizer=tokenize)
    drawn = rows(datamodule, [0, 1])
    assert torch.equal(drawn[0], tokenize(["a lid on a cat"]))
    assert not drawn[1].any()


def test_the_drawn_set_knows_its_tags() -> None:
    source = DrawnComposition(num_items=3, kinds=["relation"])
    for row in range(len(source)):
        wrong = Exchange(count=1).wrong(source, row, source.captions(row)[0])
        assert len(wrong) == 2  # the colours, or the shapes
        assert all(sorted(text.split()) == sorted(source.captions(row)[0].split()) for text in wrong)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: Distractors(count=0), {}, "hard_captions.count=0; set it to 1 or more"),
        (
            lambda: Distractors(count=1),
            {"train": Noise(31)},
            r"\(Noise\) has no wrong captions; set hard_captions=exchange",
        ),
        (lambda: Exchange(count=1), {"train": Words(31), "tokenizer": None}, "no captions are read: set a tokenizer"),
    ],
)
def test_what_gives_none_is_refused(make, options, words, make_datamodule) -> None:
    with pytest.raises(ValueError, match=words):
        make_datamodule(hard_captions=make(), **options)


def test_captions_without_words_to_exchange_are_refused(make_datamodule) -> None:
    source = Words(31)
    source.captions = lambda index: [f"row {index}"]
    with pytest.raises(
        ValueError, match=r"none of the first 31 captions .* such as 'row 0', .*: set hard_captions=none"
    ):
        make_datamodule(train=source, hard_captions=Exchange(count=1))


def test_textblob_tags_words_without_their_punctuation() -> None:
    pytest.importorskip("textblob")
    wrong = {
        text: Exchange(count=1).wrong(Noise(1), 0, text) for text in ("a tall, red cat on a lid.", "", "?", "a\u00a0b")
    }
    assert wrong == {"a tall, red cat on a lid.": ["a tall, red lid on a cat."], "": [], "?": [], "a\u00a0b": []}
