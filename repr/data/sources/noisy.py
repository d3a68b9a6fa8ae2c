"""A source whose pictures or captions are made worse, so that neither is enough."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from repr.data.sources.source import Source, caption_weights, is_remote, prefetch


class Noisy:
    """The rows of a source; some have a noisy picture, others noisy words, none has both.

    What happens to a row is a function of (seed, row), so it is the same in every epoch.

    Args:
        source: pictures with captions.
        pictures: share of the rows with noise over the picture.
        captions: share of the rows in whose captions words of other rows stand.
        strength: the weight of the noise against the picture, and the share of words that are exchanged.
        seed: of the noise.

    Raises:
        ValueError: a share outside of its range.
    """

    def __init__(self, source: Source, *, pictures: float, captions: float, strength: float, seed: int) -> None:
        if not (min(pictures, captions) >= 0 and pictures + captions <= 1 and 0 <= strength <= 1):
            raise ValueError(
                f"Noisy: pictures={pictures}, captions={captions}, strength={strength}; set shares from 0 to 1, the "
                "first two together at most 1, since no row has both kinds of noise"
            )
        self.source, self.attributes, self.strength = source, source.attributes, strength
        self._shares, self._seed, self.is_remote = (pictures, captions), seed, is_remote(source)

    def _rng(self, index: int) -> tuple[np.random.Generator, bool, bool]:
        """The noise of a row, and whether its picture and its captions have any."""
        import torch  # here, so that a source can be built without it

        from repr.seeds import sample_seed

        rng = np.random.default_rng(int(sample_seed(self._seed, 0, torch.tensor([index]))) % 2**64)
        draw = rng.random()
        return rng, draw < self._shares[0], self._shares[0] <= draw < sum(self._shares)

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        """The row's key in the source."""
        return self.source.key(index)

    def prefetch(self, rows: Sequence[int], coming: Sequence[int] = ()) -> None:
        """Tell the source which rows are read next, and thereafter."""
        prefetch(self.source, rows, coming)

    def encoded(self, index: int) -> bytes:
        """The picture's file, unchanged and without noise."""
        return self.source.encoded(index)

    def image(self, index: int) -> Image.Image:
        """The picture, RGB; a noisy one is a weighted sum with pixels drawn evenly from 0 to 255."""
        image, (rng, noisy, _) = self.source.image(index), self._rng(index)
        if not noisy:
            return image
        pixels = np.asarray(image, np.float32)
        noise = rng.integers(0, 256, pixels.shape).astype(np.float32)
        return Image.fromarray(((1 - self.strength) * pixels + self.strength * noise).round().astype(np.uint8))

    def captions(self, index: int) -> list[str]:
        """The texts; in a noisy row, words of the main texts of other rows take the place of some."""
        texts, (rng, _, noisy) = self.source.captions(index), self._rng(index)
        return [self._exchanged(text, rng) for text in texts] if noisy else texts

    def _exchanged(self, text: str, rng: np.random.Generator) -> str:
        words = text.split()
        for place in range(len(words)):
            if rng.random() < self.strength:
                others = self.source.captions(int(rng.integers(len(self)))) or [text]
                words[place] = str(rng.choice(others[0].split()))
        return " ".join(words)

    def caption_weights(self, index: int) -> Sequence[float] | None:
        """The weights of the source, if it has any."""
        return caption_weights(self.source, index)
