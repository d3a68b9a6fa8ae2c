"""Rows of a source -> whole batches; torch's fetcher hands ``__getitems__`` the list a batch sampler gives.

A row that cannot be read (``OSError``) does not end training: another stands in for it, and the batch says so under
``bad``. In evaluation it is left out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from repr.batch import Batch
from repr.data.samplers import Place
from repr.data.sources.columns import Labels
from repr.data.sources.numeric_tables import rows_of
from repr.data.sources.source import Source
from repr.data.views import Purpose, View, crop_views, draw, evaluation_view, stream
from repr.seeds import sample_seed, uniform

Tokenizer = Callable[[list[str]], Tensor]  # B texts -> (B, L) int64

# Some tokenizers need a minute for 100,000 letters without a space; no text tower reads as many as these.
MAX_CAPTION_CHARS = 2048
_BLANK = Image.new("RGB", (1, 1))  # holds the place of a picture until another stands in for it


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
            batch["tables"] = rows_of(self.tables, index)
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
                image = self.source.image(row) if self.views else _BLANK
            except OSError as error:
                caption, image = "", _BLANK
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


class EvalDataset(Dataset[Batch]):
    """Evaluation batches: ``index``, ``image`` (uint8), first caption, label; nothing random.

    A row that cannot be read has the index ``-1 - row`` and a black image, so that every rank has as many rows
    and whoever collects them can leave it out.

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
                image = _BLANK if self.image_size is None else self.source.image(row)
            except OSError as error:
                texts, image = [], _BLANK
                bad[row] = one_line(error)
            captions.append(texts[0][:MAX_CAPTION_CHARS] if texts else "")
            if self.image_size is not None:
                images.append(self.transform(image))
        batch = Batch(index=index)
        if images:
            batch["image"] = torch.stack(images).contiguous()
        if self.tables:
            batch["tables"] = rows_of(self.tables, index)
        if self.tokenizer is not None:
            batch["text"] = self.tokenizer(captions)
        if self.labels.shape[1]:
            batch["label"] = self.labels[index]
        if bad:
            batch["index"] = torch.tensor([-1 - row if row in bad else row for row in index.tolist()])
            batch["bad"] = list(bad.items())
        return batch


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
    weigh = getattr(source, "caption_weights", None)
    weights = weigh(row) if weigh is not None and len(captions) > 1 else None
    totals = list(accumulate(weights or [1.0] * len(captions)))
    return captions[min(bisect_right(totals, number * totals[-1]), len(captions) - 1)][:MAX_CAPTION_CHARS]


def vocabulary(sources: Sequence[Source]) -> dict[str, list[str]]:
    """Attribute -> sorted class names over all sources, without ''."""
    names: dict[str, set[str]] = {}
    for source in sources:
        for attribute, labels in source.attributes.items():
            found = labels.present() if isinstance(labels, Labels) else set(labels) - {""}
            names.setdefault(attribute, set()).update(found)
    return {attribute: sorted(found) for attribute, found in names.items()}


def class_ids(source: Source, attributes: Mapping[str, Sequence[str]]) -> Tensor:
    """Labels of a source: (N, A) int64, the position of the class name, -1 for '' or a missing attribute."""
    ids = torch.full((len(source), len(attributes)), -1)
    for column, (attribute, names) in enumerate(attributes.items()):
        if (labels := source.attributes.get(attribute)) is not None:
            positions = {name: position for position, name in enumerate(names)}
            labels = labels if isinstance(labels, Labels) else Labels.of(labels)
            table = torch.tensor([positions.get(name, -1) for name in labels.names])
            ids[:, column] = table[torch.from_numpy(labels.codes).long()]
    return ids
