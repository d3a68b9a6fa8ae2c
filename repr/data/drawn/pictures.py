"""What the sources of drawn pictures share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from io import BytesIO

from PIL import Image


class DrawnPictures(ABC):
    """A base of sources whose subclasses say how to draw a row.

    Args:
        keep: keep every picture once it is drawn, in each process: 3 size² bytes a row (4,000 of 64 pixels: 49 MB).
    """

    def __init__(self, keep: bool = False) -> None:
        self._kept: dict[int, Image.Image] | None = {} if keep else None

    @abstractmethod
    def draw(self, index: int) -> Image.Image:
        """Draw the picture of a row."""

    def image(self, index: int) -> Image.Image:
        """The picture, RGB, ``size`` x ``size``."""
        if self._kept is None:
            return self.draw(index)
        if index not in self._kept:
            self._kept[index] = self.draw(index)
        return self._kept[index]

    def encoded(self, index: int) -> bytes:
        """The picture as PNG."""
        file = BytesIO()
        self.image(index).save(file, "PNG")
        return file.getvalue()
