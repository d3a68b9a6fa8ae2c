"""A pen for drawn scenes: filled shapes, lines and words in a square, with smooth edges."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from repr.data.drawn.trifeature import COLOURS, SHAPES

Points = Sequence[tuple[float, float]] | np.ndarray  # (N, 2)
Paint = str | tuple[int, int, int]  # a name of trifeature's colours, or RGB

PAPER, INK = (240, 238, 230), (40, 40, 40)


class Pen:
    """Paints in a square from -1 to 1, x to the right and y down.

    Args:
        size: side of the picture in pixels.
    """

    def __init__(self, size: int) -> None:
        self.fine = max(3, -(-160 // size))  # painted so many times as large, for smooth edges
        self.image = Image.new("RGB", (size * self.fine,) * 2, PAPER)
        self.draw, self.unit = ImageDraw.Draw(self.image), size * self.fine / 2

    def polygon(self, points: Points, colour: Paint) -> None:
        """Fill a polygon."""
        self.draw.polygon(((np.asarray(points) + 1) * self.unit).ravel().tolist(), fill=_rgb(colour))

    def line(self, points: Points, colour: Paint, width: float = 0.05) -> None:
        """Draw a line through points, with round joints."""
        flat = ((np.asarray(points) + 1) * self.unit).ravel().tolist()
        self.draw.line(flat, fill=_rgb(colour), width=max(1, round(width * self.unit)), joint="curve")

    def disc(self, x: float, y: float, radius: float, colour: Paint, height: float = 1.0) -> None:
        """Fill a circle, or an ellipse whose ``height`` is a share of its width."""
        angle = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        self.polygon(np.stack([x + radius * np.cos(angle), y + radius * height * np.sin(angle)], axis=1), colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Paint) -> None:
        """Fill a rectangle."""
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def shape(self, name: str, x: float, y: float, radius: float, colour: Paint, turn: float = 0.0) -> None:
        """Fill one of trifeature's shapes."""
        self.polygon(outline(name, x, y, radius, turn), colour)

    def text(self, word: str, colour: Paint) -> None:
        """Write a word across the middle."""
        font = ImageFont.load_default(round(0.62 * self.unit))
        self.draw.text((self.unit, self.unit), word, fill=_rgb(colour), font=font, anchor="mm")

    def done(self) -> Image.Image:
        """The picture at its size."""
        return self.image.reduce(self.fine)


def outline(name: str, x: float, y: float, radius: float, turn: float = 0.0) -> np.ndarray:
    """The corners (N, 2) of one of trifeature's shapes around (x, y), ``turn`` whole turns clockwise."""
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    return radius * SHAPES[name] @ np.array([[cos, sin], [-sin, cos]]) + [x, y]


def darker(colour: str) -> tuple[int, int, int]:
    """A shade of one of trifeature's colours."""
    red, green, blue = COLOURS[colour]
    return 3 * red // 5, 3 * green // 5, 3 * blue // 5


def _rgb(colour: Paint) -> tuple[int, int, int]:
    return COLOURS[colour] if isinstance(colour, str) else colour
