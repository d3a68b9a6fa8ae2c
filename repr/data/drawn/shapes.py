"""Shapes and textures as signed distances, from which coverage, edges and shadows follow.

Lengths are in radii of the object, ``y`` points down. A shape is negative inside; a texture is negative where the
object has its first colour, positive where it has the second.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Field = np.ndarray  # (h, w) float32

PERIOD = 0.62  # of textures


def _crescent(x: Field, y: Field) -> Field:
    """A disc without another one; beyond the tips, where both circles are too near, the distance to the tip."""
    y, tip_x, tip_y = np.abs(y), 0.602, 0.773
    beyond = x * tip_y - y * tip_x > 0.5 * np.maximum(tip_y - y, 0)
    both = np.maximum(np.hypot(x, y) - 0.98, 0.78 - np.hypot(x - 0.5, y))
    return np.where(beyond, np.hypot(x - tip_x, y - tip_y), both)


def _cross(x: Field, y: Field) -> Field:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 0.95, y - 0.33), np.maximum(x - 0.33, y - 0.95))


def _star(x: Field, y: Field) -> Field:
    """Five points: folded to half a point, it is the distance to one line."""
    turn = np.pi / 5
    angle, radius = np.abs(np.arctan2(y, x) % (2 * turn) - turn), np.hypot(x, y)
    inner, tip_x, tip_y = 0.44, np.cos(turn), np.sin(turn)
    length = np.hypot(tip_x - inner, tip_y)
    return ((radius * np.cos(angle) - inner) * tip_y - radius * np.sin(angle) * (tip_x - inner)) / length


def _dots(x: Field, y: Field) -> Field:
    x, y = (x / PERIOD) % 1 - 0.5, (y / PERIOD) % 1 - 0.5
    return PERIOD * (np.hypot(x, y) - 0.32)


def _checks(x: Field, y: Field) -> Field:
    x, y = 0.25 - np.abs((x / PERIOD) % 1 - 0.5), 0.25 - np.abs((y / PERIOD) % 1 - 0.5)
    return PERIOD * np.sign(x * y) * np.minimum(np.abs(x), np.abs(y))


SHAPES: dict[str, Callable[[Field, Field], Field]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.7) - 0.26,
    "crescent": _crescent,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.8,
    "bar": lambda x, y: np.maximum(np.abs(x) - 1.0, np.abs(y) - 0.36),
    "triangle": lambda x, y: np.maximum(y - 0.52, np.abs(x) * 0.866 - y * 0.5 - 0.52),
    "cross": _cross,
    "star": _star,
}
TEXTURES: dict[str, Callable[[Field, Field], Field]] = {
    "plain": lambda x, y: np.full_like(x, -1.0),
    "striped": lambda x, y: PERIOD * (0.25 - np.abs((x / PERIOD) % 1 - 0.5)),
    "dotted": _dots,
    "checked": _checks,
    "halved": lambda x, y: y,
}
