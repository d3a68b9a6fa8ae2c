"""The protocol of a source: everything that a data set must offer, and everything that it may offer, is in this file.

A source says where the pictures, captions, class names or numbers of a data set come from. It is map-style, and it
knows nothing of views, batches or ranks. The config names its class by ``_target_``; the class inherits from nothing
and is registered nowhere. :class:`Source` has the members that training needs. The others are optional, and only the
functions of this file look them up:

====================  =======================================================================================
``image``             the pictures; a source of numbers alone leaves out ``image`` and ``encoded``
``reduced``           (row, reduction) -> the picture, perhaps smaller: see :func:`repr.data.sources.pictures.decode`
``caption_weights``   row -> one positive weight for each of its captions, or None: all are drawn equally often
``mask_classes``      and ``masks``: see :class:`MaskedSource`
``tables``            block -> (N, F) float32; all sets of a run have the same blocks with as many columns
``columns``           block -> the names of its F columns, which must agree between the sets that name them
``parts``             (number of rows, weight) of each part, in the order of the rows: an epoch shows weight times
                      the rows
``row_weights``       (N,) float64, how often an epoch shows each row, in place of ``parts``; None: rows are alike
``blocks``            the number of rows of each shard, in the order of the rows, for an order that reads shard by shard
``prefetch``          (rows, coming rows) -> None: what they need is fetched from afar, while the first of them are read
``is_remote``         whether reading a row asks a store, so that the data check reads some of them alone
``distractors``       and ``items`` and ``split``: see :class:`QuestionSource`
``tags``              caption -> its words with Penn Treebank tags, for wrong captions made of their exchange
====================  =======================================================================================
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, cast

import numpy as np
from PIL import Image

from repr.batch import NO_CLASS
from repr.data.sources.pictures import Reduction

if TYPE_CHECKING:
    from torch import Tensor


class Source(Protocol):
    """A data set of N rows. Every member may be called in any worker process, in any order.

    What cannot be read of a row, its masks included, raises ``OSError`` with a message that names it: training replaces
    the row and counts it. Any other error ends the run.
    """

    @property
    def attributes(self) -> Mapping[str, Sequence[str]]:
        """Attribute -> N class names, ``''`` where a row has no label.

        Any sequence will do; :class:`repr.data.sources.columns.Labels` takes 4 bytes a row, which workers share.
        """
        ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """A name of the row that does not change between runs; rows of one picture may share theirs."""
        ...

    def encoded(self, index: int) -> bytes:
        """The picture's file, unchanged. The data check, shards and stored features need it; training does not."""
        ...

    def image(self, index: int) -> Image.Image:
        """The picture in RGB, upright, alpha composited on white."""
        ...

    def captions(self, index: int) -> list[str]:
        """The texts that the row offers, the main one first, without empty ones; the list may be empty.

        Training draws one of them for each sample and epoch, evaluation takes the first.
        """
        ...


class MaskedSource(Source, Protocol):
    """A source that knows the classes of its pixels, which dense evaluation asks for."""

    @property
    def mask_classes(self) -> Mapping[str, Sequence[str]]:
        """Mask -> its class names; the position of a name is its value in :meth:`masks`."""
        ...

    def masks(self, index: int) -> np.ndarray:
        """Masks of the upright picture: (M, H, W) uint8 in the order of ``mask_classes``; 255 for none."""
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


def reduced(source: Source, row: int, reduction: Reduction) -> Image.Image:
    """The picture of a row, at the scale that ``reduction`` allows where its source can decode so."""
    owner = next((kind for kind in type(source).__mro__ if {"image", "reduced"} & vars(kind).keys()), object)
    if "reduced" not in vars(owner):  # also of a subclass that changes `image` alone
        return source.image(row)
    return cast(Any, source).reduced(row, reduction)


def has_captions(source: Source) -> bool:
    """Whether one of the first 100 rows of a source has a caption; some of them may be damaged."""
    for row in range(min(len(source), 100)):
        with suppress(OSError):
            if source.captions(row):
                return True
    return False


def picture_name(source: Source, row: int) -> str:
    """What rows of one picture have in common: their key, in one spelling if it is a path. A question is by itself."""
    return str(row) if has_questions(source) else os.path.normpath(source.key(row))


def first_rows(source: Source, rows: Tensor) -> Tensor:
    """The first of ``rows`` (N,), int64 and rising, of each picture."""
    return rows[np.sort(np.unique(picture_hashes(source, rows.tolist()), return_index=True)[1])]


def picture_hashes(source: Source, rows: Iterable[int]) -> np.ndarray:
    """A number for the picture of each of N rows, the same for rows of one picture: (N,) int64."""
    names = (picture_name(source, row).encode(errors="surrogateescape") for row in rows)
    return np.frombuffer(bytearray().join(blake2b(name, digest_size=8).digest() for name in names), np.int64)


def prefetch(source: Source, rows: Sequence[int], coming: Sequence[int] = ()) -> None:
    """Tell a source which rows are read next, and which thereafter, so that they may be fetched together."""
    if hasattr(source, "prefetch"):
        source.prefetch(rows, coming)


def is_remote(source: Source) -> bool:
    """Whether reading a row of a source asks a store."""
    return getattr(source, "is_remote", False)


def has_masks(source: Source) -> TypeGuard[MaskedSource]:
    """Whether a source has masks; a mixture may have none in spite of its members."""
    return bool(getattr(source, "mask_classes", None))


def has_questions(source: Source) -> TypeGuard[QuestionSource]:
    """Whether the rows of a source are questions."""
    return hasattr(source, "distractors")


def tags_of(source: Source) -> Callable[[str], Sequence[tuple[str, str]]] | None:
    """The tagger of a source's captions; None where it has none."""
    return getattr(source, "tags", None)


def caption_weights(source: Source, row: int) -> Sequence[float] | None:
    """The weights with which a row's captions are drawn; None: all are drawn equally often."""
    weigh = getattr(source, "caption_weights", None)
    return None if weigh is None else weigh(row)


def tables_of(source: Source) -> Mapping[str, np.ndarray]:
    """The blocks of numbers; empty where a source has none."""
    return getattr(source, "tables", {})


def columns_of(source: Source) -> Mapping[str, Sequence[str]]:
    """The names of the columns of each block, as far as a source tells them."""
    return getattr(source, "columns", {})


def parts_of(source: Source) -> Sequence[tuple[int, float]]:
    """The parts of a source; a source without parts is one part of weight 1."""
    return getattr(source, "parts", [(len(source), 1.0)])


def row_weights_of(source: Source) -> np.ndarray | None:
    """How often an epoch shows each row, (N,) float64; None where the weights of parts decide alone."""
    return getattr(source, "row_weights", None)


def blocks_of(source: Source) -> Sequence[int] | np.ndarray | None:
    """The number of rows of each shard; None where a source, or a part of it, has no shards."""
    return getattr(source, "blocks", None)


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
