"""Rows of a source -> whole batches; torch's fetcher hands ``__getitems__`` the list a batch sampler gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from repr.batch import Batch, sample_seed, uniform
from repr.data.sources import Source
from repr.data.views import Purpose, View, crop_views, draw, evaluation_view, stream

Tokenizer = Callable[[list[str]], Tensor]  # B texts -> (B, L) int64


class TrainDataset(Dataset[Batch]):
    """Whole training batches from rows ``(epoch, index)``, drawn vectorised over the batch.

    Args:
        source: the pictures.
        views: V views, expanded.
        labels: (N, A) int64, -1 where there is none; A may be 0.
        tokenizer: None for images only.
        seed: the run's seed.
    """

    def __init__(
        self, source: Source, views: Sequence[View], labels: Tensor, tokenizer: Tokenizer | None, seed: int
    ) -> None:
        self.source, self.views, self.labels = source, views, labels
        self.tokenizer, self.seed = tokenizer, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, rows: list[tuple[int, int]]) -> Batch:
        """The batch of these rows, all of one epoch; views are uint8.

        Raises:
            OSError: a picture cannot be decoded; the message names it.
            ValueError: a row has no caption.
        """
        epoch = rows[0][0]
        index = torch.tensor([row for _, row in rows])  # (B,)
        seed = sample_seed(self.seed, epoch, index)
        crops, colour = draw(seed, self.views)
        # A policy for damaged samples (say, the next row that can be read) belongs around this generator.
        images = (self.source.image(row) for row in index.tolist())
        views, boxes = crop_views(images, crops, self.views)
        batch = Batch(index=index, seed=seed, views=views, boxes=boxes, colour=colour)
        if self.tokenizer is not None:
            batch["text"] = self.tokenizer(draw_captions(self.source, seed, index))
        if self.labels.shape[1]:
            batch["label"] = self.labels[index]
        return batch


class EvalDataset(Dataset[Batch]):
    """Evaluation batches: ``index``, ``image`` (uint8), first caption, label; nothing random.

    Args:
        source: the pictures.
        rows: (M,) int64, the rows of the source that are evaluated; ``index`` is the source's.
        image_size: side in pixels.
        labels: (N, A) int64 of the whole source.
        tokenizer: None leaves ``text`` out.
    """

    def __init__(
        self, source: Source, rows: Tensor, image_size: int, labels: Tensor, tokenizer: Tokenizer | None
    ) -> None:
        self.source, self.rows, self.image_size = source, rows, image_size
        self.labels, self.tokenizer = labels, tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: list[int]) -> Batch:
        """The batch of these positions in ``rows``."""
        index = self.rows[positions]
        images = torch.stack([evaluation_view(self.source.image(row), self.image_size) for row in index.tolist()])
        batch = Batch(index=index, image=images.contiguous())
        if self.tokenizer is not None:
            captions = [self.source.captions(row) for row in index.tolist()]
            batch["text"] = self.tokenizer([texts[0] if texts else "" for texts in captions])
        if self.labels.shape[1]:
            batch["label"] = self.labels[index]
        return batch


def draw_captions(source: Source, seed: Tensor, index: Tensor) -> list[str]:
    """One of each row's captions, drawn uniformly from the sample's seed.

    Raises:
        ValueError: a row has none.
    """
    draws = uniform(stream(seed, Purpose.CAPTION), 1)[:, 0].tolist()
    drawn = []
    for row, number in zip(index.tolist(), draws, strict=True):
        captions = source.captions(row)
        if not captions:
            raise ValueError(f"{source.key(row)}: no caption; add one, or set data.tokenizer=null for images only")
        drawn.append(captions[int(number * len(captions))])
    return drawn


def vocabulary(sources: Sequence[Source]) -> dict[str, list[str]]:
    """Attribute -> sorted class names over all sources, without ''."""
    names: dict[str, set[str]] = {}
    for source in sources:
        for attribute, labels in source.attributes.items():
            names.setdefault(attribute, set()).update(labels)
    return {attribute: sorted(found - {""}) for attribute, found in names.items()}


def class_ids(source: Source, attributes: Mapping[str, Sequence[str]]) -> Tensor:
    """Labels of a source: (N, A) int64, the position of the class name, -1 for '' or a missing attribute."""
    columns = []
    for attribute, names in attributes.items():
        ids = {name: position for position, name in enumerate(names)} | {"": -1}
        columns.append([ids[name] for name in source.attributes.get(attribute, [""] * len(source))])
    return torch.tensor(columns, dtype=torch.int64).reshape(len(attributes), len(source)).T.contiguous()
