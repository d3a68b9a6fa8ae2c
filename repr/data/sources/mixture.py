"""Several sources as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from repr.data.dense import mask_vocabulary, named_masks
from repr.data.sources.columns import Labels
from repr.data.sources.source import Source


class Mixture:
    """The rows of several sources, one source after the other.

    Args:
        sources: two or more.
        weights: how often an epoch shows the rows of each source: 1 once, 2 twice (as different views), 0.5 half of
            them, the other half in the next epoch. None: all once. Evaluation reads every row once.

    Attributes:
        parts: (number of rows, weight) of each source, which the order of training follows.
        attributes: those of all sources; a row has ``''`` where its source lacks one.
        mask_classes: those of all sources that have masks.

    Raises:
        ValueError: no source, weights that do not fit, or masks of one name that differ in their classes.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None) -> None:
        self.sources = list(sources)
        weights = [1.0] * len(self.sources) if weights is None else list(weights)
        if not self.sources or len(weights) != len(self.sources) or not all(0 < w < float("inf") for w in weights):
            raise ValueError(
                f"Mixture: {len(self.sources)} sources, weights={weights}; give each source one positive weight"
            )
        self.parts = [(len(source), float(weight)) for source, weight in zip(self.sources, weights, strict=True)]
        self._ends = np.cumsum([len(source) for source in self.sources])
        names = dict.fromkeys(name for source in self.sources for name in source.attributes)
        self.attributes = {
            name: Labels.join([s.attributes.get(name) or Labels.constant("", len(s)) for s in self.sources])
            for name in names
        }
        self.mask_classes = mask_vocabulary(self.sources)

    def _find(self, index: int) -> tuple[int, int]:
        """The source of a row, and the row's position in it."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number - 1] if number else 0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, index: int) -> str:
        """The number of the source, and the row's key in it."""
        number, row = self._find(index)
        return f"{number}:{self.sources[number].key(row)}"

    def encoded(self, index: int) -> bytes:
        """The picture's file, unchanged."""
        number, row = self._find(index)
        return self.sources[number].encoded(row)

    def image(self, index: int) -> Image.Image:
        """The picture, RGB, upright."""
        number, row = self._find(index)
        return self.sources[number].image(row)

    def captions(self, index: int) -> list[str]:
        """The texts that the row's source offers."""
        number, row = self._find(index)
        return self.sources[number].captions(row)

    def caption_weights(self, index: int) -> list[float] | None:
        """The weights that the row's source gives to its texts, if it does."""
        number, row = self._find(index)
        weights = getattr(self.sources[number], "caption_weights", None)
        return weights(row) if weights else None

    def masks(self, index: int) -> np.ndarray:
        """The masks of all names, 255 where the row's source lacks one."""
        number, row = self._find(index)
        return named_masks(self.sources[number], row, self.mask_classes)
