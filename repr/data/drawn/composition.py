"""A drawn set of compositional questions: which of two captions of the same words is true of a picture, and vice versa.

It needs no files. The kinds are those of ARO, SugarCrepe and Winoground: attributes, the two sides of a relation, or
numbers change places between two things, or all words change their order. All candidates of a question have the same
words, so that a text encoder which adds up words cannot tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw

from repr.data.drawn.pictures import DrawnPictures
from repr.data.drawn.trifeature import COLOURS, turned
from repr.data.drawn.trifeature import SHAPES as OUTLINES
from repr.data.sources.columns import Labels
from repr.data.word_order import Tag, shuffled
from repr.seeds import sample_seed, uniform

T = TypeVar("T")

PAPER = (240, 238, 230)  # RGB of the ground
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}  # where the first thing is
_NUM_DRAWS = 24  # numbers that an item may draw


class Pick:
    """Draws from an item's own numbers in [0, 1)."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self._numbers = iter(numbers)

    def one(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[int(next(self._numbers) * len(options))]

    def two(self, options: Sequence[T]) -> tuple[T, T]:
        """Two different ones, in random order."""
        first = self.one(options)
        return first, self.one([option for option in options if option != first])


class Pen:
    """Paints in a square from -1 to 1, x to the right and y down, with smooth edges.

    Args:
        size: side of the picture in pixels.
    """

    def __init__(self, size: int) -> None:
        self.fine = max(3, -(-160 // size))  # painted so many times as large, for smooth edges
        self.image = Image.new("RGB", (size * self.fine,) * 2, PAPER)
        self.draw, self.unit = ImageDraw.Draw(self.image), size * self.fine / 2

    def polygon(self, points: np.ndarray, rgb: tuple[int, int, int]) -> None:
        """Fill a polygon with these corners (N, 2)."""
        self.draw.polygon(((points + 1) * self.unit).ravel().tolist(), fill=rgb)

    def shape(self, name: str, x: float, y: float, radius: float, colour: str, turn: float = 0.0) -> None:
        """Fill one of trifeature's shapes around (x, y), ``turn`` whole turns clockwise, with one of its colours."""
        self.polygon(turned(radius * OUTLINES[name], 2 * math.pi * turn) + np.array([x, y]), COLOURS[colour])

    def done(self) -> Image.Image:
        """The picture at its size."""
        return self.image.reduce(self.fine)


Shape = tuple[str, float, float, float, str, float]  # arguments of Pen.shape
Scene = tuple[str, list[Shape]]  # a caption, and what stands on the picture of which it is true


def tags(caption: str) -> list[Tag]:
    """The words of a caption of this set with their tags."""
    kind = {**dict.fromkeys(COLOURS, "JJ"), **dict.fromkeys(SHAPES, "NN")}
    return [(word, kind.get(word, "IN")) for word in caption.split()]


def _a(thing: tuple[str, str]) -> str:
    return f"{'an' if thing[0][0] in 'aeiou' else 'a'} {thing[0]} {thing[1]}"


def _attribute(pick: Pick, colours: Sequence[str], shapes: Sequence[str]) -> list[Scene]:
    """Two things, apart, whose colours change places."""
    pair, names = pick.two(colours), pick.two(shapes)
    angle, turn = pick.one(np.linspace(0, 2 * np.pi, 64, endpoint=False).tolist()), pick.one(range(360)) / 360
    x, y = 0.5 * np.cos(angle), 0.5 * np.sin(angle)

    def scene(first: str, second: str) -> Scene:
        caption = f"{_a((first, names[0]))} and {_a((second, names[1]))}"
        return caption, [(names[0], x, y, 0.4, first, turn), (names[1], -x, -y, 0.4, second, 0)]

    return [scene(*pair), scene(*pair[::-1])]


def _relation(pick: Pick, colours: Sequence[str], shapes: Sequence[str]) -> list[Scene]:
    """Two things that change sides of a relation."""
    things = list(zip(pick.two(colours), pick.two(shapes), strict=True))
    relation = pick.one(list(RELATIONS))
    x, y = (0.46 * side for side in RELATIONS[relation])
    shift = pick.one(range(11)) / 25 - 0.2  # along the other axis

    def scene(first: tuple[str, str], second: tuple[str, str]) -> Scene:
        return f"{_a(first)} {relation} {_a(second)}", [
            (shape, sign * x + shift * (x == 0), sign * y + shift * (y == 0), 0.38, colour, 0)
            for (colour, shape), sign in ((first, 1), (second, -1))
        ]

    return [scene(*things), scene(*things[::-1])]


def _count(pick: Pick, colours: Sequence[str], shapes: Sequence[str]) -> list[Scene]:
    """Two kinds of things whose numbers change places."""
    (first, second), (shape, other), numbers = pick.two(colours), pick.two(shapes), pick.two(list(NUMBERS))
    cells = [(x, y) for y in (-0.62, 0.0, 0.62) for x in (-0.62, 0.0, 0.62)]
    plural = {name: f"{name}es" if name == "cross" else f"{name}s" for name in shapes}
    places = [cells.pop(pick.one(range(len(cells)))) for _ in range(7)]

    def scene(num: int, rest: int) -> Scene:
        things: list[Shape] = [(shape, x, y, 0.27, first, 0) for x, y in places[:num]]
        things += [(other, x, y, 0.27, second, 0) for x, y in places[num : num + rest]]
        return f"{NUMBERS[num]} {first} {plural[shape]} and {NUMBERS[rest]} {second} {plural[other]}", things

    return [scene(*numbers), scene(*numbers[::-1])]


KINDS: dict[str, Callable[[Pick, Sequence[str], Sequence[str]], list[Scene]]] = {
    "attribute": _attribute,
    "relation": _relation,
    "count": _count,
    "order": lambda *choices: _relation(*choices)[:1],  # its wrong captions are its words in another order
}


class DrawnComposition(DrawnPictures):
    """Drawn questions of four kinds; attribute and split: ``kind``.

    Items of ``attribute``, ``relation`` and ``count`` are two pictures and two captions, as in Winoground; those of
    ``order`` are one picture with its caption and four others, as in ARO. An item is a function of (``seed``, kind, its
    number), so two seeds are two sets. The set can be trained on, too, as ``captions`` has the right caption alone.

    Args:
        size: side in pixels.
        num_items: items of each kind.
        seed: decides the scenes.
        kinds: a list out of ``KINDS``.
        colours: how many of the colours of :mod:`repr.data.drawn.trifeature` there are. The fewer colours and shapes,
            the more often two rows of a training batch have the same words, so that it pays to tell them apart.
        shapes: how many of the six shapes.
        keep: see :class:`repr.data.drawn.pictures.DrawnPictures`.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        *,
        size: int = 64,
        num_items: int = 100,
        seed: int = 0,
        kinds: Sequence[str] = tuple(KINDS),
        colours: int = 6,
        shapes: int = 6,
        keep: bool = False,
    ) -> None:
        if size < 32 or num_items < 1:
            raise ValueError(f"DrawnComposition: size={size}, num_items={num_items}; set size >= 32, num_items >= 1")
        if not kinds or not set(kinds) <= set(KINDS):
            raise ValueError(f"DrawnComposition: kinds={list(kinds)}; set a list out of {list(KINDS)}")
        if not (2 <= colours <= len(COLOURS) and 2 <= shapes <= len(SHAPES)):
            raise ValueError(
                f"DrawnComposition: colours={colours}, shapes={shapes}; set colours from 2 to {len(COLOURS)} and "
                f"shapes from 2 to {len(SHAPES)}"
            )
        super().__init__(keep)
        self.size, self.split = size, "kind"
        self._keys, self._scenes, self._distractors = list[str](), list[Scene](), list[list[str]]()
        items = []
        for kind in kinds:
            seeds = sample_seed(seed, list(KINDS).index(kind), torch.arange(num_items))
            for item, draws in enumerate(uniform(seeds, _NUM_DRAWS).tolist()):
                scenes = KINDS[kind](Pick(draws), list(COLOURS)[:colours], SHAPES[:shapes])
                first = len(self._scenes)
                items.append((first, first + 1 if len(scenes) == 2 else -1))
                for half, (caption, _) in enumerate(scenes):
                    rng = np.random.Generator(np.random.Philox(key=[seed, item]))
                    others = [other for other, _ in scenes if other != caption]
                    self._distractors.append(others or shuffled(caption, rng, tags))
                    self._keys.append(f"{kind}/{item}{'ab'[half]}")
                self._scenes += scenes
        self.items = np.array(items)
        self.attributes = {"kind": Labels.of(key.partition("/")[0] for key in self._keys)}

    def __len__(self) -> int:
        return len(self._scenes)

    def key(self, index: int) -> str:
        """The kind, the number of the item and which of its pictures."""
        return self._keys[index]

    def draw(self, index: int) -> Image.Image:
        """Draw the scene of a row."""
        pen = Pen(self.size)
        for shape in self._scenes[index][1]:
            pen.shape(*shape)
        return pen.done()

    def captions(self, index: int) -> list[str]:
        """The right caption."""
        return [self._scenes[index][0]]

    def distractors(self, index: int) -> list[str]:
        """The wrong captions."""
        return self._distractors[index]

    def tags(self, caption: str) -> list[Tag]:
        """The words of one of its captions with their tags."""
        return tags(caption)
