"""Captions with words left out or exchanged: what is done to a caption, and which ones are in a batch."""

from collections import Counter
from random import Random

import pytest
import torch

from repr.data.distorted_captions import DistortedCaptions
from repr.data.epoch_order import Place
from repr.data.hard_captions import Distractors
from tests.data.conftest import Noise

CAPTION = "the red cat that sees two large dogs on a lid"
CONTENT = ["red", "cat", "sees", "two", "large", "dogs", "on", "lid"]


def tokenize(texts: list[str]) -> torch.Tensor:
    """Letters as tokens."""
    return torch.tensor([[ord(letter) for letter in text.ljust(20)[:20]] for text in texts])


def test_stop_words_go_with_their_probability() -> None:
    how = DistortedCaptions(count=1, stop_prob=0.8)
    found = Counter(how.shortened(CAPTION, Random(seed)) for seed in range(1000))
    assert found.keys() == {CAPTION, " ".join(CONTENT)}
    assert found[CAPTION] == pytest.approx(200, abs=50)
    always = DistortedCaptions(count=1, stop_prob=1)
    assert always.shortened("This is it.", Random(0)) == "This is it."
    assert always.shortened("A cat, the end", Random(0)) == "cat, end"
    assert always.shortened("", Random(0)) == ""


def test_two_words_change_places_or_one_is_left_out() -> None:
    how = DistortedCaptions(count=1, stop_prob=1, swap_prob=0.6)
    found = [how.distorted(CAPTION, Random(seed)).split() for seed in range(1000)]
    swapped = [words for words in found if len(words) == len(CONTENT)]
    assert len(swapped) == pytest.approx(600, abs=60)
    assert all(sum(a != b for a, b in zip(words, CONTENT, strict=True)) == 2 for words in swapped)
    assert len({tuple(words) for words in swapped}) == 8 * 7 // 2
    shorter = {tuple(words) for words in found if len(words) < len(CONTENT)}
    assert shorter == {(*CONTENT[:place], *CONTENT[place + 1 :]) for place in range(8)}
    for caption in ("cat", "the", ""):
        assert {how.distorted(caption, Random(seed)) for seed in range(20)} == {caption}
    assert all(sorted(how.distorted("a cat", Random(seed)).split()) == ["cat"] for seed in range(20))
    many = " ".join(f"word{i}" for i in range(40))  # a tenth of them
    assert {len(how.distorted(many, Random(seed)).split()) for seed in range(20)} == {36, 40}


def test_a_batch_has_some_of_each_sample_the_same_each_time(make_datamodule) -> None:
    how = DistortedCaptions(count=3, stop_prob=0)
    source = Noise(31)
    source.captions = lambda index: [f"red cat {index:02}", f"big dog {index:02}"]
    datamodule = make_datamodule(train=source, tokenizer=tokenize, distorted_captions=how)
    dataset = datamodule.train_dataloader().dataset

    def batch(rows: range | list[int], epoch: int = 0) -> dict:
        return dataset.__getitems__([Place(epoch, 0, epoch, row) for row in rows])

    drawn = batch(range(31))
    assert drawn["texts"].shape == (31, 3, 20)
    right = [tokenize(source.captions(row)) for row in range(31)]
    assert all(any(torch.equal(text, own) for own in right[row]) for row, text in enumerate(drawn["text"]))
    words = ["".join(map(chr, text)).split() for text in drawn["texts"].flatten(0, 1).tolist()]
    assert all({"red", "cat"} & set(own) or {"big", "dog"} & set(own) for own in words)
    assert {"red", "big"} <= {word for own in words[:3] + words[3:6] + words[6:9] for word in own}  # drawn anew each
    again = batch([9, 4])
    assert torch.equal(again["texts"], drawn["texts"][[9, 4]])
    assert not torch.equal(batch(range(31), epoch=1)["texts"], drawn["texts"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenizer": None}, "set a tokenizer"),
        ({"num_texts": 2}, "set it to none, or data.num_texts=0"),
        ({"hard_captions": Distractors(count=1)}, "set it to none, or hard_captions=none"),
    ],
)
def test_what_excludes_them_is_named(options: dict, words: str, make_datamodule) -> None:
    source = Noise(31)
    source.distractors = lambda index: ["no"]
    with pytest.raises(ValueError, match=words):
        make_datamodule(train=source, distorted_captions=DistortedCaptions(count=2), **options)


@pytest.mark.parametrize("options", [{"count": 0}, {"count": 1, "stop_prob": 1.5}, {"count": 1, "swap_prob": -0.1}])
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="set it to"):
        DistortedCaptions(**options)
