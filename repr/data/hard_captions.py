"""Captions that are wrong for a picture and hard to tell from the right one, to train on.

Method: NegCLIP (Yuksekgonul et al., 2023, arXiv 2210.01936). Which of them a sample gets is a function of the run's
seed, the epoch and the row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from string import punctuation

from repr.data.sources.source import Source, has_questions, tags_of
from repr.data.word_order import Tag, exchanged


class HardCaptions(ABC):
    """Where wrong captions of a row come from, and which of them a sample gets.

    Args:
        count: how many of them a sample gets at most; where there are more, it draws among them, each at most once.

    Raises:
        ValueError: there would be none.
    """

    def __init__(self, *, count: int) -> None:
        if count < 1:
            raise ValueError(f"hard_captions.count={count}; set it to 1 or more, or hard_captions=none")
        self.count = count

    @abstractmethod
    def wrong(self, source: Source, row: int, caption: str) -> Sequence[str]:
        """All wrong captions of a row with this right one."""

    @abstractmethod
    def check(self, source: Source) -> None:
        """Refuse a source that gives none, by a ValueError."""

    def drawn(self, source: Source, row: int, caption: str, draws: Sequence[float]) -> list[str]:
        """Different wrong captions of a row, by ``count`` numbers in [0, 1); none of a row without a right one."""
        left, texts = list(self.wrong(source, row, caption)) if caption else [], []
        for number in draws[: len(left)]:
            texts.append(left.pop(int(number * len(left))))
        return texts


class Distractors(HardCaptions):
    """The wrong captions that a set of questions has, its ``distractors``. Arguments as :class:`HardCaptions`."""

    def check(self, source: Source) -> None:  # noqa: D102
        if not has_questions(source):
            raise ValueError(
                f"hard_captions=distractors: data.train ({type(source).__name__}) has no wrong captions; set "
                "hard_captions=exchange, which makes some of the right ones, or hard_captions=none"
            )

    def wrong(self, source: Source, row: int, caption: str) -> Sequence[str]:  # noqa: D102
        assert has_questions(source)
        return source.distractors(row)


class Exchange(HardCaptions):
    """The right captions with two words of one kind exchanged (:func:`repr.data.word_order.exchanged`).

    The source tags the words by ``tags`` if it has it; else the lexicon of the package textblob does. A caption in
    which nothing can be exchanged has no wrong ones. Arguments as :class:`HardCaptions`.
    """

    def check(self, source: Source) -> None:  # noqa: D102
        captions = [text for row in range(min(len(source), 100)) for text in source.captions(row)[:1]]
        if captions and not any(self.wrong(source, row, caption) for row, caption in enumerate(captions)):
            raise ValueError(
                f"hard_captions=exchange: none of the first {len(captions)} captions of data.train, such as "
                f"{captions[0]!r:.60}, has two words of one kind to exchange: set hard_captions=none"
            )

    def wrong(self, source: Source, row: int, caption: str) -> Sequence[str]:  # noqa: D102
        return exchanged((tags_of(source) or textblob_tags)(caption))


def textblob_tags(caption: str) -> list[Tag]:
    """The words of a caption with their tags, by the lexicon that is part of the package textblob.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from textblob.en import tag
    except ImportError as error:
        raise ValueError(f"hard_captions=exchange: {error}; pip install 'repr-pretrain[words]'") from error
    words = caption.split()
    bare = " ".join(word.strip(punctuation) or word for word in words)  # with punctuation each would be a noun
    return [(word, kind) for word, (_, kind) in zip(words, tag(bare, tokenize=False), strict=False)]  # "" has a tag
