"""Drawn scenes: several objects with shape, colour and texture on a soft ground, with a class for every pixel.

They need no files: a row is a function of (seed, split, index). Every object is a signed distance function on the
square around it. Its (anti-aliased) coverage of a pixel, its edge and its shadow all come from the distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repr.data.drawn.pictures import DrawnPictures
from repr.data.drawn.shapes import PERIOD, SHAPES, TEXTURES
from repr.data.sources.columns import Labels
from repr.seeds import sample_seed, uniform

SPLITS = ("train", "val")  # the position is part of every row: append, never reorder
COLOURS = {  # RGB of the middle lightness
    "red": (214, 48, 44),
    "orange": (240, 140, 36),
    "yellow": (244, 212, 60),
    "green": (66, 160, 72),
    "blue": (52, 104, 210),
    "purple": (138, 66, 172),
}
MAX_OBJECTS = 8
_SCENE_DRAWS, _OBJECT_DRAWS = 8, 16
_RADIUS, _CLASS, _LOOKS = 6, 7, 10  # of an object's draws: three places, radius, classes, looks
_CLASSES = {"shape": list(SHAPES), "colour": list(COLOURS), "texture": list(TEXTURES)}


@dataclass(frozen=True)
class Thing:
    """One object of a scene; lengths in sides of the picture, ``draws`` are what is left for its looks."""

    classes: tuple[int, int, int]  # shape, colour, texture
    centre: tuple[float, float]  # right and down
    radius: float
    draws: np.ndarray

    @property
    def names(self) -> list[str]:
        """Shape, colour and texture in words."""
        return [names[number] for names, number in zip(_CLASSES.values(), self.classes, strict=True)]


class Scenes(DrawnPictures):
    """Drawn scenes of several objects, with masks.

    The attributes of a row (``shape``, ``colour``, ``texture``) are those of its largest object, which lies in front
    of all others; ``count`` is the number of objects. Masks give every pixel its class in four ways: ``figure``, and
    ``shape``, ``colour`` and ``texture`` of the object in front, 0 for the ground.

    Args:
        split: ``train`` or ``val``. The splits of one seed are drawn independently and have no row in common.
        num_images: how many scenes there are.
        size: side in pixels, 32 to 224.
        num_objects: least and greatest number of objects.
        radius: range of their radii, in sides of the picture.
        seed: decides the scenes. It is not the seed of the run: two seeds are two sets.
        keep: see :class:`repr.data.drawn.pictures.DrawnPictures`.

    Raises:
        ValueError: an option is out of its range.
    """

    mask_classes: ClassVar = {"figure": ["ground", "figure"]} | {
        name: ["ground", *names] for name, names in _CLASSES.items()
    }

    def __init__(
        self,
        split: str,
        *,
        num_images: int = 4000,
        size: int = 64,
        num_objects: tuple[int, int] = (2, 5),
        radius: tuple[float, float] = (0.14, 0.3),
        seed: int = 0,
        keep: bool = False,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"Scenes: no split {split!r}; set split to one of {list(SPLITS)}")
        if num_images < 1 or not 32 <= size <= 224:
            raise ValueError(f"Scenes: num_images={num_images}, size={size}; set num_images >= 1, size from 32 to 224")
        if not 1 <= num_objects[0] <= num_objects[1] <= MAX_OBJECTS:
            raise ValueError(f"Scenes: num_objects={list(num_objects)}; set [low, high] within 1 to {MAX_OBJECTS}")
        if not 0 < radius[0] <= radius[1] <= 0.5:
            raise ValueError(f"Scenes: radius={list(radius)}; set [low, high] with 0 < low <= high <= 0.5")
        super().__init__(keep)
        self.split, self.size, self.radius, self.num_images = split, size, tuple(radius), num_images
        self._num_objects, self._seed = tuple(num_objects), seed
        self._last: tuple[int, Image.Image, np.ndarray] | None = None
        self.attributes = self._attributes()

    def __len__(self) -> int:
        return self.num_images

    def key(self, index: int) -> str:
        """Split and position."""
        return f"{self.split}-{index:06d}"

    def draw(self, index: int) -> Image.Image:
        """Draw the scene of a row."""
        return self._row(index)[0]

    def masks(self, index: int) -> np.ndarray:
        """The class of every pixel: (4, size, size) uint8, in the order of ``mask_classes``."""
        return self._row(index)[1]

    def captions(self, index: int) -> list[str]:
        """What is on the picture, the largest object first."""
        words = ["{2} {1} {0}".format(*thing.names) for thing in reversed(self.things(index))]
        return [" and ".join(f"a {word}" for word in words)]

    def _objects(self, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Draws of the objects of M scenes, (M, MAX_OBJECTS, 16) in [0, 1), and how many objects there are (M,)."""
        seed = sample_seed(self._seed, SPLITS.index(self.split), rows)
        draws = uniform(seed, _SCENE_DRAWS + MAX_OBJECTS * _OBJECT_DRAWS).numpy()
        low, high = self._num_objects
        count = low + (draws[:, 0] * (high - low + 1)).astype(int)
        return draws[:, _SCENE_DRAWS:].reshape(len(draws), MAX_OBJECTS, _OBJECT_DRAWS), count

    def _attributes(self) -> dict[str, Labels]:
        codes = []
        for block in torch.arange(self.num_images).split(4096):
            objects, count = self._objects(block)
            there = np.arange(MAX_OBJECTS) < count[:, None]
            front = objects[np.arange(len(block)), np.where(there, objects[..., _RADIUS], -1).argmax(1)]
            codes.append(np.column_stack([_classes(front), count]).astype(np.int32))
        vocabulary = {**_CLASSES, "count": [str(number) for number in range(MAX_OBJECTS + 1)]}
        columns = np.concatenate(codes).T
        return {name: Labels(column, vocabulary[name]) for name, column in zip(vocabulary, columns, strict=True)}

    def things(self, index: int) -> list[Thing]:
        """The objects of a scene, from the smallest, which lies behind all others, to the largest."""
        objects, count = self._objects(torch.tensor([index]))
        rows = objects[0, : count[0]]
        free = 0.08 + 0.84 * rows[:, :_RADIUS].reshape(-1, 3, 2)
        places = [free[0, 0]]
        for three in free[1:]:  # the one farthest from those that are taken, so that less is hidden
            places.append(three[np.linalg.norm(three[:, None] - np.array(places), axis=2).min(1).argmax()])
        radii = self.radius[0] + (self.radius[1] - self.radius[0]) * rows[:, _RADIUS]
        classes = _classes(rows).tolist()
        return [
            Thing(tuple(classes[i]), tuple(places[i].tolist()), float(radii[i]), rows[i, _LOOKS:])
            for i in np.argsort(radii)
        ]

    def _row(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Picture and masks; those drawn last are kept, since whoever wants the one mostly wants the other."""
        if self._last is not None and self._last[0] == index:
            return self._last[1:]
        seed = sample_seed(self._seed, SPLITS.index(self.split), torch.tensor([index]))
        rng = np.random.Generator(np.random.Philox(key=int(seed) % 2**64))
        canvas = ground(rng, self.size)
        masks = np.zeros((4, self.size, self.size), np.uint8)
        for thing in self.things(index):
            paint(thing, canvas, masks)
        canvas += rng.standard_normal(canvas.shape, np.float32) * 3
        picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
        self._last = (index, picture, masks)
        return picture, masks


def ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """A soft, muted ground: a grid of a few colours about a common one, enlarged: (size, size, 3) float32."""
    middle = 70 + 130 * rng.random() + 36 * (rng.random(3) - 0.5)
    grid = middle + 80 * (rng.random((5, 5, 1)) - 0.5) + 36 * (rng.random((5, 5, 3)) - 0.5)
    small = Image.fromarray(grid.clip(0, 255).astype(np.uint8))
    return np.array(small.resize((size, size), Image.Resampling.BICUBIC), np.float32)


def paint(thing: Thing, canvas: np.ndarray, masks: np.ndarray) -> None:
    """Draw an object and its shadow over what is there.

    Args:
        thing: the object.
        canvas: (S, S, 3) float32, 0 to 255; changed.
        masks: (4, S, S) uint8; changed where the object covers half of a pixel or more.
    """
    side = len(canvas)
    radius, centre = thing.radius * side, np.array(thing.centre) * side
    blur = 0.02 * side + 1.5  # width of the shadow's edge in pixels
    reach = 1.05 * radius + 2 * blur
    (left, top), (right, bottom) = np.maximum(centre - reach, 0).astype(int), np.ceil(centre + reach).astype(int)
    right, bottom = min(right, side), min(bottom, side)
    turn, light, second, phase_x, phase_y, _ = thing.draws.tolist()
    angle = 2 * np.pi * turn
    across = (np.arange(left, right, dtype=np.float32) + 0.5 - centre[0]) / radius
    down = ((np.arange(top, bottom, dtype=np.float32) + 0.5 - centre[1]) / radius)[:, None]
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x, y = cosine * across + sine * down, cosine * down - sine * across  # (h, w), turned with the object
    shape, colour, texture = thing.names
    distance = SHAPES[shape](x, y) * radius  # in pixels
    shift = PERIOD * np.array([phase_x, phase_y], np.float32) * (texture != "halved")
    pattern = TEXTURES[texture](x + shift[0], y + shift[1]) * radius

    first = np.array(COLOURS[colour], np.float32) * (0.8 + 0.4 * light)
    other = first * 0.42 if second < 0.5 else 255 - (255 - first) * 0.3
    mix = (0.5 - pattern).clip(0, 1)[..., None]
    paint_of = mix * first + (1 - mix) * other
    paint_of *= (1 - 0.12 * (x * sine + y * cosine))[..., None]  # lit from above
    paint_of *= (1 - 0.4 * (1 - np.abs(distance + 0.8)).clip(0, 1))[..., None]  # a darker edge
    window = canvas[top:bottom, left:right]
    drop = round(0.5 * blur)
    shadow = 0.45 * (0.5 - distance / (2 * blur)).clip(0, 1)[: len(distance) - drop, : distance.shape[1] - drop]
    window[drop:, drop:] *= 1 - shadow[..., None]
    coverage = (0.5 - distance).clip(0, 1)[..., None]
    window += coverage * (paint_of - window)
    masks[:, top:bottom, left:right][:, distance <= 0] = [[1], *([number + 1] for number in thing.classes)]


def _classes(objects: np.ndarray) -> np.ndarray:
    """Shape, colour and texture of objects, from their draws (M, 16): (M, 3) int."""
    numbers = np.array([len(names) for names in _CLASSES.values()])
    return (objects[:, _CLASS:_LOOKS] * numbers).astype(int)
