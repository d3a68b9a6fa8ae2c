"""What dense evaluation reads: the classes of pixels, and two crops of each picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from repr.batch import NO_CLASS, Batch
from repr.data.datasets import one_line
from repr.data.sources.source import Source
from repr.data.views import View, crop_views, draw, evaluation_masks, evaluation_view
from repr.seeds import sample_seed

_BLANK = Image.new("RGB", (1, 1))  # holds the place of a picture that cannot be read
_NO_MASKS = np.empty((0, 1, 1), np.uint8)


@runtime_checkable
class MaskedSource(Protocol):
    """What a source has besides, if it knows the classes of its pixels."""

    @property
    def mask_classes(self) -> Mapping[str, Sequence[str]]:
        """Mask -> its class names; the position of a name is its value in :meth:`masks`."""
        ...

    def masks(self, index: int) -> np.ndarray:
        """The masks of a row's picture, upright as it is: (M, H, W) uint8 in the order of ``mask_classes``; 255 = none.

        Raises:
            OSError: they cannot be read; the message names the row.
        """
        ...


def mask_vocabulary(sources: Sequence[Source]) -> dict[str, list[str]]:
    """Mask -> class names, over all sources that have masks.

    Raises:
        ValueError: two sources have a mask of one name with other classes.
    """
    found: dict[str, list[str]] = {}
    for source in sources:
        for name, classes in source.mask_classes.items() if isinstance(source, MaskedSource) else ():
            if found.setdefault(name, list(classes)) != list(classes):
                raise ValueError(
                    f"masks named {name!r} have the classes {found[name]} in one source and {list(classes)} in "
                    "another: give both one list, or the masks two names"
                )
    return found


def has_masks(source: Source) -> TypeGuard[MaskedSource]:
    """Whether a source has masks; a mixture may have none in spite of its members."""
    return isinstance(source, MaskedSource) and bool(source.mask_classes)


def named_masks(source: Source, row: int, names: Iterable[str]) -> np.ndarray:
    """The masks of a row in the order of ``names``: (M, H, W) uint8, all ``NO_CLASS`` where the source lacks one.

    Raises:
        OSError: they cannot be read.
    """
    if has_masks(source):
        own = dict(zip(source.mask_classes, source.masks(row), strict=True))
        shape = next(iter(own.values())).shape
    else:
        own, shape = {}, source.image(row).size[::-1]
    blank = np.full(shape, NO_CLASS, np.uint8)
    return np.stack([own.get(name, blank) for name in names])


class DenseDataset(Dataset[Batch]):
    """Batches of dense evaluation: ``index``, ``image``, ``crops`` (uint8), ``boxes`` and, where known, ``mask``.

    The crops of a row are the same in every run. A row that cannot be read has the index ``-1 - row``, as in
    :class:`repr.data.datasets.EvalDataset`.

    Args:
        source: the pictures.
        rows: (M,) int64, the rows of the source that are evaluated; ``index`` is the source's.
        image_size: side in pixels of ``image`` and ``mask``.
        views: how the two crops are drawn.
        mask_names: the masks, in the order of their planes.
    """

    def __init__(
        self, source: Source, rows: Tensor, image_size: int, views: Sequence[View], mask_names: Iterable[str]
    ) -> None:
        self.source, self.rows, self.image_size = source, rows, image_size
        self.views, self.mask_names = list(views), list(mask_names) if has_masks(source) else []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: list[int]) -> Batch:
        """The batch of these positions in ``rows``."""
        index = self.rows[positions]
        pictures, masks, bad = [], [], {}
        for row in index.tolist():
            try:
                picture = self.source.image(row)
                planes = named_masks(self.source, row, self.mask_names) if self.mask_names else _NO_MASKS
            except OSError as error:
                picture, planes = _BLANK, np.full((len(self.mask_names), 1, 1), NO_CLASS, np.uint8)
                bad[row] = one_line(error)
            pictures.append(picture)
            masks.append(evaluation_masks(planes, self.image_size))
        crops, boxes = crop_views(pictures, draw(sample_seed(0, 0, index), self.views)[0], self.views)
        images = [evaluation_view(picture, self.image_size) for picture in pictures]
        batch = Batch(index=index, image=torch.stack(images).contiguous(), crops=crops, boxes=boxes)
        if self.mask_names:
            batch["mask"] = torch.stack(masks)
        if bad:
            batch["index"] = torch.tensor([-1 - row if row in bad else row for row in index.tolist()])
            batch["bad"] = list(bad.items())
        return batch
