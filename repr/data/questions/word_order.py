"""The same words in another order: the four ways in which ARO's sets of order make wrong captions.

Source: Yuksekgonul et al., 2023, arXiv 2210.01936, section 2.2. Their code tags and splits words with spaCy and NLTK;
here a caption is split at its spaces, and the caller brings a tagger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Tag = tuple[str, str]  # a word and its Penn Treebank tag, such as ("dogs", "NNS")
Tagger = Callable[[str], Sequence[Tag]]

TRIES = 20  # draws of a shuffle until it gives something new


def _among(tags: Sequence[Tag], rng: np.random.Generator, *groups: Callable[[str], bool]) -> list[str]:
    """The words, those of each group of tags exchanged among themselves."""
    words = [word for word, _ in tags]
    for belongs in groups:
        places = [place for place, (_, tag) in enumerate(tags) if belongs(tag)]
        for place, source in zip(places, rng.permutation(places).tolist(), strict=True):
            words[place] = tags[source][0]
    return words


def nouns_and_adjectives(tags: Sequence[Tag], rng: np.random.Generator) -> list[str]:
    """Nouns change places with nouns, adjectives with adjectives."""
    return _among(tags, rng, lambda tag: tag.startswith("NN"), lambda tag: tag.startswith("JJ"))


def all_but_nouns_and_adjectives(tags: Sequence[Tag], rng: np.random.Generator) -> list[str]:
    """All other words change places."""
    return _among(tags, rng, lambda tag: not tag.startswith(("NN", "JJ")))


def within_trigrams(tags: Sequence[Tag], rng: np.random.Generator) -> list[str]:
    """Words change places within each three that follow each other."""
    return [three[i] for three in _threes(tags) for i in rng.permutation(len(three))]


def trigrams(tags: Sequence[Tag], rng: np.random.Generator) -> list[str]:
    """Threes of words change places."""
    threes = _threes(tags)
    return [word for i in rng.permutation(len(threes)) for word in threes[i]]


def _threes(tags: Sequence[Tag]) -> list[list[str]]:
    words = [word for word, _ in tags]
    return [words[start : start + 3] for start in range(0, len(words), 3)]


def shuffled(caption: str, rng: np.random.Generator, tagger: Tagger | None) -> list[str]:
    """At most four wrong captions of the same words, all different: one of each way that can give a new one.

    A way that gives none in ``TRIES`` draws is left out; ARO's code keeps such captions, and counts them as successes.

    Args:
        caption: words with single spaces between them.
        rng: where orders are drawn from.
        tagger: caption -> its words with tags; None leaves out the two ways that need them.
    """
    tags = [(word, "") for word in caption.split()] if tagger is None else tagger(caption)
    by_tag = () if tagger is None else (nouns_and_adjectives, all_but_nouns_and_adjectives)
    taken = {" ".join(word for word, _ in tags)}
    texts = []
    for way in (*by_tag, within_trigrams, trigrams):
        for _ in range(TRIES):
            text = " ".join(way(tags, rng))
            if text not in taken:
                taken.add(text)
                texts.append(text)
                break
    return texts
