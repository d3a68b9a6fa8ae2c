"""Captions with words left out or exchanged: views of a text, as crops are views of a picture."""

from __future__ import annotations

from random import Random

# Of English, as they stand in captions; none of them names, counts or places a thing.
_WORDS = """a an the this that these those some it its he she they his her their him them i you we my your our is are
was were be been being am has have had having do does did of to and or as at by for with from which who whom while there
here so then than also very just"""
STOP_WORDS = frozenset(_WORDS.split())
SHARE = 0.1  # of the words that a distortion concerns, at least one


class DistortedCaptions:
    """How texts of a sample are distorted.

    Method: Fini et al. (2023, arXiv 2305.08675, section 3), without their synonyms, for which there is no dictionary
    here. Which words it concerns is a function of the run's seed, the epoch and the row.

    Args:
        count: so many distorted captions of each sample are in ``batch["texts"]``, each of a caption that is drawn on
            its own.
        stop_prob: probability that a caption, also the one in ``batch["text"]``, loses its stop words.
        swap_prob: probability that words of a distorted caption change places; else some are left out.

    Raises:
        ValueError: an option outside of its range.
    """

    def __init__(self, *, count: int, stop_prob: float = 0.8, swap_prob: float = 2 / 3) -> None:
        if count < 1:
            raise ValueError(f"distorted_captions.count={count}; set it to 1 or more, or distorted_captions=none")
        for name, value in (("stop_prob", stop_prob), ("swap_prob", swap_prob)):
            if not 0 <= value <= 1:
                raise ValueError(f"distorted_captions.{name}={value}; set it to a probability, from 0 to 1")
        self.count, self.stop_prob, self.swap_prob = count, stop_prob, swap_prob

    def shortened(self, caption: str, random: Random) -> str:
        """The caption, perhaps without its stop words; one that has no others stays."""
        if random.random() >= self.stop_prob:
            return caption
        kept = [word for word in caption.split() if word.lower().strip(".,;:!?") not in STOP_WORDS]
        return " ".join(kept) or caption

    def distorted(self, caption: str, random: Random) -> str:
        """A shortened caption whose words have changed places, or of which some are left out; one word stays."""
        words = self.shortened(caption, random).split()
        swaps, num = random.random() < self.swap_prob, max(1, round(SHARE * len(words)))
        for _ in range(num if len(words) > 1 else 0):
            place = int(random.random() * len(words))
            if swaps:
                other = (place + 1 + int(random.random() * (len(words) - 1))) % len(words)
                words[place], words[other] = words[other], words[place]
            else:
                del words[place]
        return " ".join(words) or caption
