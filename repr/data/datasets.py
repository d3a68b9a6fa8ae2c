"""Rows of a source -> whole training batches; torch's fetcher hands ``__getitems__`` the list a batch sampler gives.

A row that cannot be read (``OSError``) does not end training: another stands in for it, and the batch says so under
``bad``. Evaluation (:mod:`repr.data.eval_datasets`) leaves it out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from repr.batch import Batch
from repr.data.epoch_order import Place
from repr.data.sources.columns import Labels
from repr.data.sources.source import Source, caption_weights
from repr.data.views import Purpose, View, crop_views, draw, stream
from repr.seeds import sample_seed, uniform

Tokenizer = Callable[[list[str]], Tensor]  # B texts -> (B, L) int64

# Some tokenizers need a minute for 100,000 letters without a space; no text tower reads as many as these.
MAX_CAPTION_CHARS = 2048
BLANK = Image.new("RGB", (1, 1))  # holds the place of a picture that cannot be read


class TrainDataset(Dataset[Batch]):
    """Whole training batches from places of an epoch, drawn vectorised over the batch.

    Args:
        source: the pictures.
        views: V views, expanded; without any, no pictures are read.
        labels: (N, A) int64, -1 where there is none; A may be 0.
        tokenizer: None for images only.
        seed: the run's seed.
        replacement: (place, attempt from 1) -> the place whose row stands in for its own, if that cannot be read.
        max_bad: so many rows may be bad; a batch that finds more by itself ends the run.
        tables: T blocks of numbers, (N, F) each.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[View],
        labels: Tensor,
        tokenizer: Tokenizer | None,
        seed: int,
        *,
        replacement: Callable[[Place, int], Place],
        max_bad: int,
        tables: Sequence[Tensor] = (),
    ) -> None:
        self.source, self.views, self.labels = source, views, labels
        self.tokenizer, self.seed = tokenizer, seed
        self.replacement, self.max_bad, self.tables = replacement, max_bad, tables

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, places: Sequence[Place]) -> Batch:
        """The batch of these places, all of one epoch; views are uint8.

        Raises:
            ValueError: more than ``max_bad`` rows were bad, or all that there are.
        """
        stands = list(places)  # whose row is in each slot
        batch, faults = self._load(stands)
        slots, bad, attempt = list(range(len(places))), dict[int, str](), 0
        while faults:
            slots = [slots[position] for position in faults]
            bad |= {stands[slot].row: fault for slot, fault in zip(slots, faults.values(), strict=True)}
            attempt += 1
            if len(bad) > self.max_bad or attempt > len(self):
                raise ValueError(too_many_bad("train", bad, len(self)))
            for slot in slots:
                stands[slot] = self.replacement(places[slot], attempt)
            again, faults = self._load([stands[slot] for slot in slots])
            _put(batch, slots, again)
        if bad:
            batch["bad"] = list(bad.items())
        return batch

    def _load(self, places: Sequence[Place]) -> tuple[Batch, dict[int, str]]:
        """The batch of these places, and which of them (by position) are bad, and why; those are black."""
        index = torch.tensor([place.row for place in places])  # (B,)
        seed = sample_seed(self.seed, torch.tensor([place.visit for place in places]), index)
        captions: list[str] = []
        faults: dict[int, str] = {}
        images, batch = self._images(index, seed, captions, faults), Batch(index=index, seed=seed)
        if self.views:
            crops, batch["colour"] = draw(seed, self.views)
            batch["views"], batch["boxes"] = crop_views(images, crops, self.views)
        elif self.tokenizer is not None:
            deque(images, maxlen=0)  # the captions alone
        if self.tables:
            batch["tables"] = [table[index] for table in self.tables]
        if self.tokenizer is not None:
            batch["text"] = self.tokenizer(captions)
        if self.labels.shape[1]:
            batch["label"] = self.labels[index]
        return batch, faults

    def _images(
        self, index: Tensor, seed: Tensor, captions: list[str], faults: dict[int, str]
    ) -> Iterator[Image.Image]:
        """The pictures, one at a time; fills ``captions`` and ``faults`` on the way."""
        draws = uniform(stream(seed, Purpose.CAPTION), 1)[:, 0].tolist()
        for position, (row, number) in enumerate(zip(index.tolist(), draws, strict=True)):
            try:
                caption = "" if self.tokenizer is None else draw_caption(self.source, row, number)
                image = self.source.image(row) if self.views else BLANK
            except OSError as error:
                caption, image = "", BLANK
                faults[position] = one_line(error)
            captions.append(caption)
            yield image


def _put(batch: Batch, slots: list[int], part: Batch) -> None:
    """Write the rows of ``part`` into these rows of ``batch``."""
    for key, value in cast(dict, part).items():
        places = cast(dict, batch)[key]
        for place, new in zip(places, value, strict=True) if isinstance(places, list) else [(places, value)]:
            place[slots] = new


def one_line(error: OSError) -> str:
    """What an error says, so that it stays the last line of a worker's traceback."""
    return " ".join(str(error).split())


def too_many_bad(name: str, bad: Mapping[int, str], num_rows: int) -> str:
    """The message that ends a run whose data are too damaged."""
    return (
        f"{len(bad)} of {num_rows} samples of {name} cannot be read, more than data.max_bad_fraction allows; "
        f"the last: {list(bad.values())[-1]}. Mend or remove them (python -m repr.check lists all), "
        "or set a larger data.max_bad_fraction"
    )


def draw_caption(source: Source, row: int, number: float) -> str:
    """One of a row's captions: uniformly, or with the weights that the source gives.

    Args:
        source: the captions.
        row: of the source.
        number: uniform in [0, 1).

    Raises:
        OSError: the row has none, or they cannot be read.
    """
    captions = source.captions(row)
    if not captions:
        raise OSError(f"{source.key(row)}: no caption; add one, or set data.tokenizer=null for images only")
    weights = caption_weights(source, row) if len(captions) > 1 else None
    totals = list(accumulate(weights or [1.0] * len(captions)))
    return captions[min(bisect_right(totals, number * totals[-1]), len(captions) - 1)][:MAX_CAPTION_CHARS]


def vocabulary(sources: Sequence[Source]) -> dict[str, list[str]]:
    """Attribute -> sorted class names over all sources, without ''."""
    names: dict[str, set[str]] = {}
    for source in sources:
        for attribute, labels in source.attributes.items():
            names.setdefault(attribute, set()).update(Labels.of(labels).present())
    return {attribute: sorted(present) for attribute, present in names.items()}


def class_ids(source: Source, attributes: Mapping[str, Sequence[str]]) -> Tensor:
    """Labels of a source: (N, A) int64, the position of the class name, -1 for '' or a missing attribute."""
    ids = torch.full((len(source), len(attributes)), -1)
    for column, (attribute, names) in enumerate(attributes.items()):
        if (own := source.attributes.get(attribute)) is not None:
            positions, labels = {name: position for position, name in enumerate(names)}, Labels.of(own)
            known = torch.tensor([positions.get(name, -1) for name in labels.names])
            ids[:, column] = known[torch.from_numpy(labels.codes).long()]
    return ids
