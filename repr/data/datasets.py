"""Rows of a source -> whole training batches; torch's fetcher hands ``__getitems__`` the list a batch sampler gives.

A row that cannot be read (``OSError``) does not end training: another stands in for it, and the batch says so under
``bad``. Evaluation (:mod:`repr.data.eval_datasets`) leaves it out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from random import Random
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from repr.batch import Batch
from repr.data.bad_rows import read_each, too_many_bad
from repr.data.distorted_captions import DistortedCaptions
from repr.data.epoch_order import Order, Place
from repr.data.hard_captions import HardCaptions
from repr.data.sources.columns import Labels
from repr.data.sources.source import Source, caption_weights, is_remote, picture_hashes, prefetch, reduced
from repr.data.views import Purpose, View, crop_views, draw, reduction, stream
from repr.seeds import sample_seed, uniform

Tokenizer = Callable[[list[str]], Tensor]  # B texts -> (B, L) int64

# Some tokenizers need a minute for 100,000 letters without a space; no text tower reads as many as these.
MAX_CAPTION_CHARS = 2048
BLANK = Image.new("RGB", (1, 1))  # holds the place of a picture that cannot be read


@dataclass(eq=False)
class TrainDataset(Dataset[Batch]):
    """Whole training batches from places of an epoch, drawn vectorised over the batch."""

    source: Source
    views: Sequence[View]  # V views, expanded; without any, no pictures are read
    labels: Tensor  # (N, A) int64, -1 where there is none; A may be 0
    tokenizer: Tokenizer | None  # None for images only
    seed: int  # the run's seed
    replacement: Callable[[Place, int], Place]  # (place of a bad row, attempt from 1) -> the place that stands in
    max_bad: int  # so many rows may be bad; a batch that meets more by itself ends the run
    tables: Sequence[Tensor] = ()  # T blocks of numbers, (N, F) each
    scaled: bool = True  # pictures are decoded for their views, see `decode` of the DataModule
    coming: Callable[[Sequence[Place]], list[int]] | None = None  # places -> rows of the worker's next batch
    num_texts: int = 0  # C of `texts`
    hard_captions: HardCaptions | None = None
    distorted_captions: DistortedCaptions | None = None  # makes `texts`
    mated: Callable[[Tensor], Tensor] | None = None  # (B,) rows -> (B,) bool, where they stand beside a neighbour

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, places: Sequence[Place]) -> Batch:
        """The batch of these places, all of one epoch; views are uint8.

        Raises:
            ValueError: more than ``max_bad`` rows were bad, or all that there are.
        """
        stands, slots = list(places), list(range(len(places)))  # whose row is in each slot; slots that are bad
        coming = self.coming(places) if self.coming is not None and is_remote(self.source) else []
        prefetch(self.source, [place.row for place in places], coming)
        batch, faults = self._load(stands)
        bad, attempt = dict[int, str](), 0
        while faults:
            slots = [slot for slot in slots if stands[slot].row in faults]
            bad |= faults
            attempt += 1
            if len(bad) > self.max_bad or attempt > len(self):
                raise ValueError(too_many_bad("train", bad, len(self)))
            for slot in slots:
                stands[slot] = self.replacement(places[slot], attempt)
            again, faults = self._load([stands[slot] for slot in slots])
            _put(batch, slots, again)
        if self.mated is not None:
            batch["mated"] = self.mated(batch["index"])
        if bad:
            batch["bad"] = list(bad.items())
        return batch

    def _load(self, places: Sequence[Place]) -> tuple[Batch, dict[int, str]]:
        """The batch of these places, and why rows of them are bad; the pictures of those are black."""
        index = torch.tensor([place.row for place in places])  # (B,)
        seed = sample_seed(self.seed, torch.tensor([place.visit for place in places]), index)
        rows, faults, batch = index.tolist(), dict[int, str](), Batch(index=index, seed=seed)
        if self.tokenizer is not None:
            draws = uniform(stream(seed, Purpose.CAPTION), 1)[:, 0].tolist()
            captions = list(read_each(partial(draw_caption, self.source), "", faults, rows, draws))
            if self.distorted_captions is not None:
                captions, batch["texts"] = self._distorted(self.distorted_captions, captions, rows, seed, faults)
            if self.hard_captions is None:
                batch["text"] = self.tokenizer(captions)
            else:
                batch["text"], batch["hard_text"] = self._with_hard(self.hard_captions, captions, rows, seed, faults)
            if self.num_texts:
                num = self.num_texts
                several = read_each(partial(first_captions, self.source), [""] * num, faults, rows, [num] * len(rows))
                tokens = self.tokenizer([text for texts in several for text in texts])
                batch["texts"] = tokens.unflatten(0, (len(rows), num))  # (B, C, L)
        if self.views:
            batch["picture"] = torch.from_numpy(picture_hashes(self.source, rows))
            crops, batch["colour"] = draw(seed, self.views)
            if self.scaled:
                reductions = (partial(reduction, sample, self.views) for sample in crops.tolist())
                images = read_each(partial(reduced, self.source), BLANK, faults, rows, reductions)
            else:
                images = read_each(self.source.image, BLANK, faults, rows)
            batch["views"], batch["boxes"] = crop_views(images, crops, self.views)
        if self.tables:
            batch["tables"] = [table[index] for table in self.tables]
        if self.labels.shape[1]:
            batch["label"] = self.labels[index]
        return batch, faults

    def _distorted(
        self, how: DistortedCaptions, captions: list[str], rows: list[int], seed: Tensor, faults: dict[int, str]
    ) -> tuple[list[str], Tensor]:
        """The captions, some without stop words, and the tokens (B, C, L) of distorted ones."""
        assert self.tokenizer is not None

        def several(row: int, random: Random) -> list[str]:
            drawn = (draw_caption(self.source, row, random.random()) for _ in range(how.count))
            return [how.distorted(caption, random) for caption in drawn]

        draws = [Random(number) for number in stream(seed, Purpose.DISTORTION).tolist()]
        captions = [how.shortened(caption, random) for caption, random in zip(captions, draws, strict=True)]
        texts = list(read_each(several, [""] * how.count, faults, rows, draws))
        return captions, self.tokenizer([text for own in texts for text in own]).unflatten(0, (len(rows), how.count))

    def _with_hard(
        self, hard: HardCaptions, captions: list[str], rows: list[int], seed: Tensor, faults: dict[int, str]
    ) -> tuple[Tensor, Tensor]:
        """The tokens (B, L) of captions, and (B, K, L) of wrong ones: 0 where there are fewer than K."""
        assert self.tokenizer is not None
        draws = uniform(stream(seed, Purpose.HARD_CAPTION), hard.count).tolist()
        wrong = list(read_each(partial(hard.drawn, self.source), list[str](), faults, rows, captions, draws))
        filled = [text[:MAX_CAPTION_CHARS] for texts in wrong for text in [*texts, *[""] * (hard.count - len(texts))]]
        text, tokens = self.tokenizer([*captions, *filled]).tensor_split([len(rows)])
        tokens = tokens.unflatten(0, (len(rows), hard.count))
        there = torch.tensor([len(texts) for texts in wrong])[:, None] > torch.arange(hard.count)
        there &= (tokens != text[:, None]).any(2)  # what differs behind the last token alone is the right one
        return text, tokens * there[..., None]


def rows_further_on(places: Sequence[Place], order: Order, distance: int) -> list[int]:
    """The rows that stand so many places after these of one epoch; none behind its end."""
    positions = torch.tensor([place.position for place in places]) + distance
    return order.rows(places[0].epoch, positions[positions < len(order)])[:, 1].tolist()


def _put(batch: Batch, slots: list[int], part: Batch) -> None:
    """Write the rows of ``part`` into these rows of ``batch``."""
    for key, value in cast(dict, part).items():
        places = cast(dict, batch)[key]
        for place, new in zip(places, value, strict=True) if isinstance(places, list) else [(places, value)]:
            place[slots] = new


def draw_caption(source: Source, row: int, number: float) -> str:
    """One of a row's captions by a ``number`` in [0, 1): uniformly, or with the weights that the source gives.

    Raises:
        OSError: the row has none, or they cannot be read.
    """
    captions = source.captions(row)
    if not captions:
        raise OSError(f"{source.key(row)}: no caption; add one, or set data.tokenizer=null for images only")
    weights = caption_weights(source, row) if len(captions) > 1 else None
    totals = list(accumulate(weights or [1.0] * len(captions)))
    return captions[min(bisect_right(totals, number * totals[-1]), len(captions) - 1)][:MAX_CAPTION_CHARS]


def first_captions(source: Source, row: int, num: int) -> list[str]:
    """The first captions of a row; where it has fewer, the last one stands in.

    Raises:
        OSError: the row has none, or they cannot be read.
    """
    captions = source.captions(row)[:num]
    if not captions:
        raise OSError(f"{source.key(row)}: no caption; add one, or set data.num_texts=0")
    return [text[:MAX_CAPTION_CHARS] for text in captions + captions[-1:] * (num - len(captions))]


def vocabulary(sources: Iterable[Source]) -> dict[str, list[str]]:
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
