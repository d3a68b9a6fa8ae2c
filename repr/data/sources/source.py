"""The protocol of a source: everything that a data set must offer, and everything that it may offer, is in this file.

A source says where the pictures, captions, class names or numbers of a data set come from. It is map-style, and it
knows nothing of views, batches or ranks. The config names its class by ``_target_``; the class inherits from nothing
and is registered nowhere. :class:`Source` has the members that training needs. The others are optional, and each is
recognised by one member, which only the functions of this file look up:

=======================  =====================================  ===============================
a source with            offers                                 and is recognised by
=======================  =====================================  ===============================
``image``                pictures; without them ``views=none``  :func:`has_pictures`
``caption_weights``      how often each caption is drawn        :func:`caption_weights`
``mask_classes``         :class:`MaskedSource`                  :func:`has_masks`
``tables``               :class:`NumericSource`                 :func:`tables_of`
``parts``                :class:`SourceInParts`                 :func:`parts_of`
``distractors``          :class:`QuestionSource`                :func:`has_questions`
=======================  =====================================  ===============================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol, TypeGuard

import numpy as np
from PIL import Image

from repr.batch import NO_CLASS


class Source(Protocol):
    """A data set of N rows. Every member may be called in any worker process, in any order.

    A row that cannot be read raises ``OSError`` with a message that names it: training replaces the row and counts it.
    Any other error ends the run. A source of numbers alone leaves out ``encoded`` and ``image``.
    """

    @property
    def attributes(self) -> Mapping[str, Sequence[str]]:
        """Attribute -> N class names, one a row, ``''`` where a row has no label.

        Any sequence will do; :class:`repr.data.sources.columns.Labels` is one that takes 4 bytes a row, which worker
        processes share.
        """
        ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """A name of the row that does not change between runs."""
        ...

    def encoded(self, index: int) -> bytes:
        """The picture's file, unchanged. The data check, shards and stored features need it; training does not.

        Raises:
            OSError: it cannot be read; the message names it.
        """
        ...

    def image(self, index: int) -> Image.Image:
        """The picture in RGB, upright, alpha composited on white.

        Raises:
            OSError: it cannot be decoded; the message names it.
        """
        ...

    def captions(self, index: int) -> list[str]:
        """The texts that the row offers, the main one first, without empty ones; the list may be empty.

        Training draws one of them for each sample and epoch, evaluation takes the first.

        Raises:
            OSError: they cannot be read; the message names the row.
        """
        ...


class WeightedSource(Source, Protocol):
    """A source that says how often training draws each of a row's captions."""

    def caption_weights(self, index: int) -> Sequence[float] | None:
        """One positive weight for each text of :meth:`captions`; None: all are drawn equally often."""
        ...


class MaskedSource(Source, Protocol):
    """A source that knows the classes of its pixels, which dense evaluation asks for."""

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


class NumericSource(Source, Protocol):
    """A source of numbers, in one block or several. Batches have the rows of every block under ``tables``."""

    @property
    def tables(self) -> Mapping[str, np.ndarray]:
        """Block -> (N, F) float32. All sets of a run have the same blocks with the same numbers of columns."""
        ...

    @property
    def columns(self) -> Mapping[str, Sequence[str]]:
        """Block -> the names of its F columns, which must agree between sets. A source may leave this member out."""
        ...


class SourceInParts(Source, Protocol):
    """A source of several parts, which an epoch shows with different frequency."""

    @property
    def parts(self) -> Sequence[tuple[int, float]]:
        """(number of rows, weight) of each part, in the order of the rows; an epoch shows weight times the rows."""
        ...


class QuestionSource(Source, Protocol):
    """A source whose rows are questions: which caption is true of a picture, or of which picture a caption is true."""

    @property
    def items(self) -> np.ndarray:
        """(I, G) int64: the rows of each item, -1 where it has fewer than G."""
        ...

    @property
    def split(self) -> str:
        """The attribute that names the part of the benchmark that an item belongs to."""
        ...

    def distractors(self, index: int) -> Sequence[str]:
        """Captions that are wrong for the row's picture; the right one is the first of ``captions``."""
        ...


def has_pictures(source: Source) -> bool:
    """Whether a source has pictures."""
    return hasattr(source, "image")


def has_captions(source: Source) -> bool:
    """Whether a source offers captions, told by its first 100 rows, some of which may be damaged."""
    for row in range(min(len(source), 100)):
        with suppress(OSError):
            if source.captions(row):
                return True
    return False


def has_masks(source: Source) -> TypeGuard[MaskedSource]:
    """Whether a source has masks; a mixture may have none in spite of its members."""
    return bool(getattr(source, "mask_classes", None))


def has_questions(source: Source) -> TypeGuard[QuestionSource]:
    """Whether the rows of a source are questions."""
    return hasattr(source, "distractors")


def caption_weights(source: Source, row: int) -> Sequence[float] | None:
    """The weights with which a row's captions are drawn; None: all alike."""
    weigh = getattr(source, "caption_weights", None)
    return None if weigh is None else weigh(row)


def tables_of(source: Source) -> Mapping[str, np.ndarray]:
    """Block -> (N, F) float32; empty where a source has no numbers."""
    return getattr(source, "tables", {})


def columns_of(source: Source) -> Mapping[str, Sequence[str]]:
    """Block -> the names of its columns, as far as a source names them."""
    return getattr(source, "columns", {})


def parts_of(source: Source) -> Sequence[tuple[int, float]]:
    """(number of rows, weight) of each part of a source; a source without parts is one part of weight 1."""
    return getattr(source, "parts", [(len(source), 1.0)])


def mask_vocabulary(sources: Sequence[Source]) -> dict[str, list[str]]:
    """Mask -> class names, over all sources that have masks.

    Raises:
        ValueError: two sources have a mask of one name with other classes.
    """
    vocabulary: dict[str, list[str]] = {}
    for source in filter(has_masks, sources):
        for name, classes in source.mask_classes.items():
            if (known := vocabulary.setdefault(name, list(classes))) != list(classes):
                raise ValueError(
                    f"masks named {name!r} have the classes {known} in one source and {list(classes)} in another: give "
                    "both one list, or the masks two names"
                )
    return vocabulary


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
