"""Several sources as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from PIL import Image

from repr.data.sources.columns import Labels
from repr.data.sources.pictures import Reduction
from repr.data.sources.source import (
    Source,
    blocks_of,
    caption_weights,
    is_remote,
    mask_vocabulary,
    named_masks,
    prefetch,
    reduced,
    row_weights_of,
)


class Mixture:
    """The rows of several sources, one source after the other.

    Args:
        sources: two or more.
        weights: how often an epoch shows the rows of each source: 1 once, 2 twice (as different views), 0.5 half of
            them, the other half in the next epoch. None: all once. Evaluation reads every row once.

    Attributes:
        parts: (number of rows, weight) of each source, which the order of training follows.
        row_weights: those of all rows, times the weight of their source; None if no source has any.
        blocks: the shards of all sources; None if one of them has none.
        attributes: those of all sources; a row has ``''`` where its source lacks one.
        mask_classes: those of all sources that have masks.
        is_remote: whether one of them is.

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
        blocks = [blocks_of(source) for source in self.sources]
        self.blocks = None if any(own is None for own in blocks) else np.concatenate(cast(list[np.ndarray], blocks))
        own = [row_weights_of(source) for source in self.sources]
        self.row_weights = None
        if any(rows is not None for rows in own):
            shown = zip(self.parts, own, strict=True)
            self.row_weights = np.concatenate(
                [w * (np.ones(num) if rows is None else rows) for (num, w), rows in shown]
            )
        self._ends = np.cumsum([len(source) for source in self.sources])
        names = dict.fromkeys(name for source in self.sources for name in source.attributes)
        none = [Labels(np.zeros(len(source), np.int32), [""]) for source in self.sources]
        self.attributes = {
            name: Labels.join([s.attributes.get(name, no) for s, no in zip(self.sources, none, strict=True)])
            for name in names
        }
        self.mask_classes = mask_vocabulary(self.sources)
        self.is_remote = any(map(is_remote, self.sources))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[int, Source, int]:
        """The number of a row's source, the source, and the row's position in it."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[number]
        return number, source, index - int(self._ends[number]) + len(source)

    def key(self, index: int) -> str:
        """The number of the source, and the row's key in it."""
        number, source, row = self._find(index)
        return f"{number}:{source.key(row)}"

    def prefetch(self, rows: Sequence[int], coming: Sequence[int] = ()) -> None:
        """Tell each source which of its rows are read next, and thereafter."""
        both = [[self._find(row) for row in part] for part in (rows, coming)]
        for number, source in enumerate(self.sources):
            prefetch(source, *([row for other, _, row in found if other == number] for found in both))

    def encoded(self, index: int) -> bytes:
        """The picture's file, unchanged."""
        _, source, row = self._find(index)
        return source.encoded(row)

    def image(self, index: int) -> Image.Image:
        """The picture, RGB, upright."""
        _, source, row = self._find(index)
        return source.image(row)

    def reduced(self, index: int, reduction: Reduction) -> Image.Image:
        """The picture, RGB, upright, at the scale that ``reduction`` allows."""
        return reduced(*self._find(index)[1:], reduction)

    def captions(self, index: int) -> list[str]:
        """The texts that the row's source offers."""
        _, source, row = self._find(index)
        return source.captions(row)

    def caption_weights(self, index: int) -> Sequence[float] | None:
        """The weights that the row's source gives to its texts, if it does."""
        return caption_weights(*self._find(index)[1:])

    def masks(self, index: int) -> np.ndarray:
        """The masks of all names, 255 where the row's source lacks one."""
        return named_masks(*self._find(index)[1:], self.mask_classes)
