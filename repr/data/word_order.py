"""The same words in another order: the four ways in which ARO's sets of order make wrong captions, and NegCLIP's.

Source: Yuksekgonul et al., 2023, arXiv 2210.01936, sections 2.2 and 4. Their code tags and splits words with spaCy and
NLTK; here a caption is split at its spaces, and the caller brings a tagger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import punctuation

import numpy as np

Tag = tuple[str, str]  # a word and its Penn Treebank tag, such as ("dogs", "NNS")
Tagger = Callable[[str], Sequence[Tag]]

TRIES = 20  # draws of a shuffle until it gives something new
KINDS = ("NN", "JJ", "RB", "VB")  # of words that are exchanged: nouns, adjectives, adverbs, verbs


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


def exchanged(tags: Sequence[Tag]) -> list[str]:
    """All captions in which two words of one kind have changed places: other things are said in the same words.

    Punctuation stays in its place. Words with "and", "or" or a comma between them are left alone, since what these join
    is as true the other way round.

    NegCLIP's captions are of this kind, 88 % of them by two words, the rest by longer phrases, which are not made here.
    """
    words, kinds = [word for word, _ in tags], [tag[:2] for _, tag in tags]
    bare = [word.strip(punctuation) for word in words]
    texts = dict[str, None]()
    for first in range(len(words)):
        for second in range(first + 1, len(words)):
            before = words[second - 1]
            if before.endswith((",", ";")) or before.lower() in ("and", "or", "&"):
                break
            a, b = bare[first], bare[second]
            if kinds[first] == kinds[second] in KINDS and a and b and a.lower() != b.lower():
                new = {first: words[first].replace(a, b, 1), second: words[second].replace(b, a, 1)}
                texts[" ".join(new.get(place, word) for place, word in enumerate(words))] = None
    return list(texts)


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
