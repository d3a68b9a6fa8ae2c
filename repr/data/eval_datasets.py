"""Rows of a source -> whole batches of evaluation, the same in every run.

A row that cannot be read has the index ``-1 - row``, so that every rank has as many rows and whoever collects them can
leave it out; the batch says under ``bad`` why.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from repr.batch import NO_CLASS, Batch
from repr.data.bad_rows import read_each
from repr.data.datasets import BLANK, MAX_CAPTION_CHARS, Tokenizer
from repr.data.sources.source import Source, has_masks, named_masks, prefetch
from repr.data.views import View, crop_views, draw, evaluation_masks, evaluation_view
from repr.seeds import sample_seed


@dataclass(eq=False)
class EvalDataset(Dataset[Batch]):
    """Batches of ``index``, ``image`` (black where it cannot be read), first caption and label."""

    source: Source
    rows: Tensor  # (M,) int64, the rows of the source that are evaluated; `index` is the source's
    transform: Callable[[Image.Image], Tensor] | None  # RGB -> (3, S, S), uint8 or normalised; None: no pictures
    labels: Tensor  # (N, A) int64 of the whole source
    tokenizer: Tokenizer | None  # None leaves `text` out
    tables: Sequence[Tensor] = ()  # T blocks of numbers of the whole source, (N, F) each

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: list[int]) -> Batch:
        """The batch of these positions in ``rows``."""
        index = self.rows[positions]
        rows, bad, batch = index.tolist(), dict[int, str](), Batch(index=index)
        prefetch(self.source, rows)
        if self.tokenizer is not None:
            batch["text"] = self.tokenizer(list(read_each(self._caption, "", bad, rows)))
        if self.transform is not None:
            images = map(self.transform, read_each(self.source.image, BLANK, bad, rows))
            batch["image"] = torch.stack(list(images)).contiguous()
        if self.tables:
            batch["tables"] = [table[index] for table in self.tables]
        if self.labels.shape[1]:
            batch["label"] = self.labels[index]
        return _marked(batch, index, bad)

    def _caption(self, row: int) -> str:
        return next(iter(self.source.captions(row)), "")[:MAX_CAPTION_CHARS]


@dataclass(eq=False)
class TextDataset(Dataset[Batch]):
    """Batches of texts: ``index``, their positions, and ``text``, their tokens."""

    texts: Sequence[str]
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.texts)

    def __getitems__(self, positions: list[int]) -> Batch:
        """The batch of these positions."""
        texts = [self.texts[position][:MAX_CAPTION_CHARS] for position in positions]
        return Batch(index=torch.tensor(positions), text=self.tokenizer(texts))


@dataclass(eq=False)
class CandidateDataset(Dataset[Batch]):
    """Batches of pictures with texts that may be true of them: ``candidates``."""

    pictures: EvalDataset
    texts: Sequence[str]
    places: Tensor  # (N, P) int64 of the whole source, positions in `texts`; -1: an empty text
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, positions: list[int]) -> Batch:
        """The batch of these positions."""
        batch, places = self.pictures.__getitems__(positions), self.places[self.pictures.rows[positions]]
        texts = ["" if place < 0 else self.texts[place] for place in places.flatten().tolist()]
        batch["candidates"] = self.tokenizer(texts).unflatten(0, tuple(places.shape))
        return batch


@dataclass(eq=False)
class DenseDataset(Dataset[Batch]):
    """Batches of dense evaluation: ``index``, ``image``, ``crops`` (uint8), ``boxes`` and, where known, ``mask``.

    The crops of a row are the same in every run.
    """

    source: Source
    rows: Tensor  # (M,) int64, the rows of the source that are evaluated; `index` is the source's
    image_size: int  # side in pixels of `image` and `mask`
    views: Sequence[View]  # how the two crops are drawn
    mask_names: Collection[str]  # in the order of the planes; a source without masks leaves `mask` out

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: list[int]) -> Batch:
        """The batch of these positions in ``rows``."""
        index, bad = self.rows[positions], dict[int, str]()
        rows = index.tolist()
        prefetch(self.source, rows)
        pictures = list(read_each(self.source.image, BLANK, bad, rows))
        images = [evaluation_view(picture, self.image_size) for picture in pictures]
        crops, boxes = crop_views(pictures, draw(sample_seed(0, 0, index), self.views)[0], self.views)
        batch = Batch(index=index, image=torch.stack(images).contiguous(), crops=crops, boxes=boxes)
        if has_masks(self.source):
            blank = np.full((len(self.mask_names), 1, 1), NO_CLASS, np.uint8)
            masks = read_each(partial(named_masks, self.source, names=self.mask_names), blank, bad, rows)
            batch["mask"] = torch.stack([evaluation_masks(planes, self.image_size) for planes in masks])
        return _marked(batch, index, bad)


@dataclass(eq=False)
class RepeatedViews(Dataset[Batch]):
    """Batches of several augmented views of each row, as LiDAR wants them: position ``i * Q + q`` is view q of row i.

    A view is that of visit q in training with ``seed``. ``index`` is the position, ``-1 - position`` where the row
    cannot be read.
    """

    source: Source
    rows: Tensor  # (M,) int64, rows of the source
    num_views: int  # Q
    view: View  # how each is drawn
    seed: int

    def __len__(self) -> int:
        return len(self.rows) * self.num_views

    def __getitems__(self, positions: list[int]) -> Batch:
        """The batch of these positions: ``views``, one (B, 3, S, S) uint8, and its ``colour``."""
        place, bad = torch.tensor(positions), dict[int, str]()
        rows = self.rows[place // self.num_views]
        crops, colour = draw(sample_seed(self.seed, place % self.num_views, rows), [self.view])
        distinct, counts = rows.unique_consecutive(return_counts=True)  # the views of a row follow each other
        prefetch(self.source, distinct.tolist())
        pictures = read_each(self.source.image, BLANK, bad, distinct.tolist())
        repeated = chain.from_iterable(map(repeat, pictures, counts.tolist()))
        views, boxes = crop_views(repeated, crops, [self.view])
        return _marked(Batch(index=place, views=views, boxes=boxes, colour=colour), rows, bad)


def _marked(batch: Batch, rows: Tensor, bad: Mapping[int, str]) -> Batch:
    """The batch of these rows of the source (B,), those marked that cannot be read."""
    if bad:
        unread = torch.isin(rows, torch.tensor(list(bad)))
        batch["index"] = torch.where(unread, -1 - batch["index"], batch["index"])
        batch["bad"] = list(bad.items())
    return batch
