"""Rows of a source -> whole batches of evaluation, the same in every run.

A row that cannot be read has the index ``-1 - row``, so that every rank has as many rows and whoever collects them can
leave it out; the batch says under ``bad`` why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from repr.batch import NO_CLASS, Batch
from repr.data.datasets import BLANK, MAX_CAPTION_CHARS, Tokenizer, one_line
from repr.data.sources.source import Source, has_masks, named_masks
from repr.data.views import View, crop_views, draw, evaluation_masks, evaluation_view
from repr.seeds import sample_seed

_NO_MASKS = np.empty((0, 1, 1), np.uint8)


class EvalDataset(Dataset[Batch]):
    """Batches of ``index``, ``image`` (uint8; black where it cannot be read), first caption and label.

    Args:
        source: the pictures.
        rows: (M,) int64, the rows of the source that are evaluated; ``index`` is the source's.
        image_size: side in pixels; None: no pictures are read.
        labels: (N, A) int64 of the whole source.
        tokenizer: None leaves ``text`` out.
        transform: RGB picture -> (3, S, S) uint8 or normalised float; None: :func:`repr.data.views.evaluation_view`.
        tables: T blocks of numbers of the whole source, (N, F) each.
    """

    def __init__(
        self,
        source: Source,
        rows: Tensor,
        image_size: int | None,
        labels: Tensor,
        tokenizer: Tokenizer | None,
        transform: Callable[[Image.Image], Tensor] | None = None,
        tables: Sequence[Tensor] = (),
    ) -> None:
        self.source, self.rows, self.image_size = source, rows, image_size
        self.labels, self.tokenizer, self.tables = labels, tokenizer, tables
        self.transform = transform or partial(evaluation_view, size=cast(int, image_size))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: list[int]) -> Batch:
        """The batch of these positions in ``rows``."""
        index = self.rows[positions]
        images, captions, bad = [], [], {}
        for row in index.tolist():
            try:
                texts = [] if self.tokenizer is None else self.source.captions(row)
                image = BLANK if self.image_size is None else self.source.image(row)
            except OSError as error:
                texts, image = [], BLANK
                bad[row] = one_line(error)
            captions.append(texts[0][:MAX_CAPTION_CHARS] if texts else "")
            if self.image_size is not None:
                images.append(self.transform(image))
        batch = Batch(index=index)
        if images:
            batch["image"] = torch.stack(images).contiguous()
        if self.tables:
            batch["tables"] = [table[index] for table in self.tables]
        if self.tokenizer is not None:
            batch["text"] = self.tokenizer(captions)
        if self.labels.shape[1]:
            batch["label"] = self.labels[index]
        return _marked(batch, index, bad)


class TextDataset(Dataset[Batch]):
    """Batches of texts: ``index``, their positions, and ``text``, their tokens.

    Args:
        texts: of any length.
        tokenizer: what makes tokens of them.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        self.texts, self.tokenizer = texts, tokenizer

    def __len__(self) -> int:
        return len(self.texts)

    def __getitems__(self, positions: list[int]) -> Batch:
        """The batch of these positions."""
        texts = [self.texts[position][:MAX_CAPTION_CHARS] for position in positions]
        return Batch(index=torch.tensor(positions), text=self.tokenizer(texts))


class DenseDataset(Dataset[Batch]):
    """Batches of dense evaluation: ``index``, ``image``, ``crops`` (uint8), ``boxes`` and, where known, ``mask``.

    The crops of a row are the same in every run.

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
                picture, planes = BLANK, np.full((len(self.mask_names), 1, 1), NO_CLASS, np.uint8)
                bad[row] = one_line(error)
            pictures.append(picture)
            masks.append(evaluation_masks(planes, self.image_size))
        crops, boxes = crop_views(pictures, draw(sample_seed(0, 0, index), self.views)[0], self.views)
        images = [evaluation_view(picture, self.image_size) for picture in pictures]
        batch = Batch(index=index, image=torch.stack(images).contiguous(), crops=crops, boxes=boxes)
        if self.mask_names:
            batch["mask"] = torch.stack(masks)
        return _marked(batch, index, bad)


class RepeatedViews(Dataset[Batch]):
    """Batches of several augmented views of each row, as LiDAR wants them: position ``i * Q + q`` is view q of row i.

    A view is that of visit q in training with ``seed``. ``index`` is the position, ``-1 - position`` where the row
    cannot be read.

    Args:
        source: the pictures.
        rows: (M,) int64, rows of the source.
        num_views: Q.
        view: how each is drawn.
        seed: of the draws.
    """

    def __init__(self, source: Source, rows: Tensor, num_views: int, view: View, seed: int) -> None:
        self.source, self.rows, self.num_views, self.view, self.seed = source, rows, num_views, view, seed

    def __len__(self) -> int:
        return len(self.rows) * self.num_views

    def __getitems__(self, positions: list[int]) -> Batch:
        """The batch of these positions: ``views``, one (B, 3, S, S) uint8, and its ``colour``."""
        place = torch.tensor(positions)
        rows = self.rows[place // self.num_views]
        crops, colour = draw(sample_seed(self.seed, place % self.num_views, rows), [self.view])
        pictures, bad, last = [], dict[int, str](), -1
        for row in rows.tolist():
            if row != last:  # the views of a row follow each other
                last, picture = row, BLANK
                try:
                    picture = self.source.image(row)
                except OSError as error:
                    bad[row] = one_line(error)
            pictures.append(picture)
        views, boxes = crop_views(pictures, crops, [self.view])
        return _marked(Batch(index=place, views=views, boxes=boxes, colour=colour), rows, bad)


def _marked(batch: Batch, rows: Tensor, bad: Mapping[int, str]) -> Batch:
    """The batch of these rows of the source (B,), those marked that cannot be read."""
    if bad:
        unread = torch.tensor([row in bad for row in rows.tolist()])
        batch["index"] = torch.where(unread, -1 - batch["index"], batch["index"])
        batch["bad"] = list(bad.items())
    return batch
