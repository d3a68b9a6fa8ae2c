"""Sources: where the pictures, captions and class names of a data set come from.

A source is map-style and knows nothing of views, batches or ranks. :class:`Source` is the whole
interface; the config names a class with these members by ``_target_``, and
:class:`repr.data.dense.MaskedSource` is one that has a class for every pixel besides. Tables are in
:mod:`repr.data.sources.table`, tar shards in :mod:`repr.data.sources.shards`, several sources as one in
:mod:`repr.data.sources.mixture`, and drawn scenes in :mod:`repr.data.drawn.scenes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from PIL import Image


class Source(Protocol):
    """A data set of N rows. Every member may be called in any worker process, in any order.

    A row that cannot be read raises ``OSError`` with a message that names it: training replaces and counts it.
    Any other error ends the run.
    """

    @property
    def attributes(self) -> Mapping[str, Sequence[str]]:
        """Attribute -> N class names, one a row; ``''`` where a row has no label."""
        ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """A name of the row that does not change between runs."""
        ...

    def encoded(self, index: int) -> bytes:
        """The picture's file, unchanged.

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
        """The texts the row offers, the main one first, without empty ones; may be empty.

        Training draws one a sample and epoch: uniformly, or, where the source has a method
        ``caption_weights(index)``, with the weights that it gives, one a text.

        Raises:
            OSError: they cannot be read; the message names the row.
        """
        ...
