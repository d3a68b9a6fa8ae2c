"""A drawn set in the form of MMVP-VLM: pairs of scenes that differ in one of the nine patterns.

It needs no files. The patterns are those of Tong et al., 2024 (arXiv 2401.06209, section 3); scenes and statements are
our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageFont

from repr.data.drawn import composition
from repr.data.drawn.composition import PAPER, Pick
from repr.data.drawn.pictures import DrawnPictures
from repr.data.drawn.trifeature import COLOURS, SHAPES
from repr.data.questions.mmvp import PREFIX
from repr.data.sources.columns import Labels
from repr.seeds import sample_seed, uniform

Points = Sequence[tuple[float, float]] | np.ndarray  # (N, 2)
Paint = str | tuple[int, int, int]  # a name of trifeature's colours, or RGB

INK = (40, 40, 40)
_OBJECTS = ("circle", "square", "triangle", "star", "heart", "cross")
_NUMBERS = ("one", "two", "three", "four", "five", "six")
_WORDS = ("YES", "NO", "STOP", "GO", "OPEN", "SHUT", "IN", "OUT", "HOT", "COLD")
_TURNS = {"up": 0.0, "right": 0.25, "down": 0.5, "left": 0.75}
_NUM_DRAWS = 12  # numbers that a scene may draw


class Pen(composition.Pen):
    """Paints lines, discs, boxes and words, too."""

    def polygon(self, points: Points, colour: Paint) -> None:
        """Fill a polygon."""
        super().polygon(np.asarray(points), _rgb(colour))

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

    def text(self, word: str, colour: Paint) -> None:
        """Write a word across the middle."""
        font = ImageFont.load_default(round(0.62 * self.unit))
        self.draw.text((self.unit, self.unit), word, fill=_rgb(colour), font=font, anchor="mm")


def darker(colour: str) -> tuple[int, int, int]:
    """A shade of one of trifeature's colours."""
    red, green, blue = COLOURS[colour]
    return 3 * red // 5, 3 * green // 5, 3 * blue // 5


def _rgb(colour: Paint) -> tuple[int, int, int]:
    return COLOURS[colour] if isinstance(colour, str) else colour


Scene = tuple[str, Callable[[Pen], None]]  # a statement, and what paints the picture of which it is true
Pair = tuple[Scene, Scene]


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _orientation(pick: Pick) -> Pair:
    colour, shape = pick.one(list(COLOURS)), pick.one(("arrow", "triangle"))

    def scene(direction: str) -> Scene:
        statement = f"{_a(colour)} {shape} pointing {direction}"
        return statement, lambda pen: pen.shape(shape, 0, 0, 0.7, colour, _TURNS[direction])

    first, second = pick.two(list(_TURNS))
    return scene(first), scene(second)


def _cup(pen: Pen, colour: str, *, handle: bool = True) -> None:
    if handle:
        pen.disc(0.42, 0.05, 0.32, colour)
        pen.disc(0.42, 0.05, 0.17, PAPER)
    pen.polygon([(-0.5, -0.45), (0.42, -0.45), (0.32, 0.6), (-0.4, 0.6)], colour)


def _presence(pick: Pick) -> Pair:
    colour, thing = pick.one(list(COLOURS)), pick.one(("chimney", "handle", "leaf"))

    def paint(pen: Pen, present: bool) -> None:
        if thing == "chimney":
            if present:
                pen.box(0.22, -0.75, 0.42, 0, INK)
            pen.box(-0.5, -0.05, 0.5, 0.7, colour)
            pen.polygon([(-0.65, -0.05), (0, -0.65), (0.65, -0.05)], INK)
            pen.box(-0.12, 0.25, 0.12, 0.7, PAPER)
        elif thing == "handle":
            _cup(pen, colour, handle=present)
        else:
            pen.line([(0, 0.8), (0, -0.2)], INK)
            for angle in np.linspace(0, 2 * math.pi, 6, endpoint=False):
                pen.disc(0.24 * math.cos(angle), -0.35 + 0.24 * math.sin(angle), 0.17, colour)
            pen.disc(0, -0.35, 0.13, PAPER)
            if present:
                pen.polygon([(0, 0.5), (0.2, 0.1), (0.55, 0.05), (0.4, 0.4)], "green")

    def scene(word: str) -> Scene:
        owner = {"chimney": "house", "handle": "cup", "leaf": "flower"}[thing]
        return f"{_a(colour)} {owner} {word} a {thing}", lambda pen: paint(pen, word == "with")

    first, second = pick.two(("with", "without"))
    return scene(first), scene(second)


def _state(pick: Pick) -> Pair:
    colour, thing = pick.one(list(COLOURS)), pick.one(("candle", "face", "glass"))

    def paint(pen: Pen, state: str) -> None:
        if thing == "candle":
            pen.box(-0.22, -0.15, 0.22, 0.8, colour)
            pen.line([(0, -0.15), (0, -0.32)], INK)
            if state == "a burning":
                pen.polygon([(0, -0.85), (0.17, -0.42), (0, -0.28), (-0.17, -0.42)], "orange")
        elif thing == "face":
            pen.disc(0, 0, 0.75, colour)
            for x in (-0.28, 0.28):
                pen.disc(x, -0.2, 0.1, PAPER)
            across, sign = np.linspace(-0.4, 0.4, 17), 1 if state == "a smiling" else -1
            pen.line(np.stack([across, 0.36 + sign * (0.16 - 1.6 * across**2)], axis=1), PAPER, 0.1)
        else:
            if state == "a full":
                pen.polygon([(-0.42, -0.5), (0.42, -0.5), (0.32, 0.75), (-0.32, 0.75)], colour)
            pen.line([(-0.45, -0.75), (-0.33, 0.77), (0.33, 0.77), (0.45, -0.75)], colour, 0.07)

    def scene(state: str) -> Scene:
        return f"{state} {colour} {thing}", lambda pen: paint(pen, state)

    states = {"candle": ("a burning", "an unlit"), "face": ("a smiling", "a frowning"), "glass": ("a full", "an empty")}
    first, second = pick.two(states[thing])
    return scene(first), scene(second)


def _quantity(pick: Pick) -> Pair:
    colour, shape = pick.one(list(COLOURS)), pick.one(_OBJECTS)
    cells = [(x, y) for y in (-0.5, 0.5) for x in (-0.62, 0.0, 0.62)]
    start = pick.one(range(6))

    def scene(count: int) -> Scene:
        def paint(pen: Pen) -> None:
            for number in range(count):
                pen.shape(shape, *cells[(start + 5 * number) % 6], 0.27, colour)

        plural = "" if count == 1 else "es" if shape == "cross" else "s"
        return f"{_NUMBERS[count - 1]} {colour} {shape}{plural}", paint

    first, second = pick.two(range(1, 7))
    return scene(first), scene(second)


def _position(pick: Pick) -> Pair:
    (shape, other), (colour, second) = pick.two(_OBJECTS), pick.two(list(COLOURS))
    relations = pick.one((("above", "below"), ("left of", "right of")))

    def scene(relation: str) -> Scene:
        x, y = {"above": (0, -0.45), "below": (0, 0.45), "left of": (-0.45, 0), "right of": (0.45, 0)}[relation]

        def paint(pen: Pen) -> None:
            pen.shape(shape, x, y, 0.36, colour)
            pen.shape(other, -x, -y, 0.36, second)

        return f"{_a(colour)} {shape} {relation} {_a(second)} {other}", paint

    first, last = pick.two(relations)
    return scene(first), scene(last)


def _colour(pick: Pick) -> Pair:
    shape, (first, second) = pick.one(_OBJECTS), pick.two(list(COLOURS))

    def scene(colour: str) -> Scene:
        return f"{_a(colour)} {shape}", lambda pen: pen.shape(shape, 0, 0, 0.65, colour)

    return scene(first), scene(second)


def _structure(pick: Pick) -> Pair:
    shape, colour = pick.one(_OBJECTS), pick.one(list(COLOURS))

    def scene(style: str) -> Scene:
        def paint(pen: Pen) -> None:
            corners = 0.72 * SHAPES[shape]
            if style == "filled with":
                pen.polygon(corners, colour)
            elif style == "outlined in":
                pen.line(np.concatenate([corners, corners[:2]]), colour, 0.12)
            else:
                for x, y in _along(corners, 16):
                    pen.disc(x, y, 0.09, colour)

        return f"a {shape} {style} {colour}", paint

    first, second = pick.two(("filled with", "outlined in", "made of dots in"))
    return scene(first), scene(second)


def _along(corners: np.ndarray, num: int) -> np.ndarray:
    """Points (num, 2) at equal distances along a closed line."""
    closed = np.concatenate([corners, corners[:1]])
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(closed, axis=0), axis=1))])
    at = np.arange(num) * length[-1] / num
    return np.stack([np.interp(at, length, closed[:, axis]) for axis in (0, 1)], axis=1)


def _text(pick: Pick) -> Pair:
    colour = pick.one(list(COLOURS))

    def scene(word: str) -> Scene:
        return f"the word {word} in {colour}", lambda pen: pen.text(word, colour)

    first, second = pick.two(_WORDS)
    return scene(first), scene(second)


def _viewpoint(pick: Pick) -> Pair:
    colour, thing = pick.one(list(COLOURS)), pick.one(("cube", "cup"))

    def paint(pen: Pen, view: str) -> None:
        if thing == "cube":  # its front, and above or below that the face that one sees besides
            down = -1 if view == "above" else 1
            pen.box(-0.5, -0.5 - 0.15 * down, 0.5, 0.5 - 0.15 * down, colour)
            pen.polygon(
                [(x, down * y) for x, y in ((-0.5, 0.35), (0.5, 0.35), (0.3, 0.7), (-0.3, 0.7))], darker(colour)
            )
        elif view == "above":
            pen.box(0.3, -0.12, 0.85, 0.12, colour)
            pen.disc(0, 0, 0.6, colour)
            pen.disc(0, 0, 0.45, darker(colour))
        else:
            _cup(pen, colour)

    def scene(view: str) -> Scene:
        return f"{_a(colour)} {thing} seen from {view}", lambda pen: paint(pen, view)

    first, second = pick.two(("above", "below") if thing == "cube" else ("above", "the side"))
    return scene(first), scene(second)


SCENES: dict[str, Callable[[Pick], Pair]] = {
    "orientation": _orientation,
    "presence": _presence,
    "state": _state,
    "quantity": _quantity,
    "position": _position,
    "colour": _colour,
    "structure": _structure,
    "text": _text,
    "viewpoint": _viewpoint,
}


class DrawnPairs(DrawnPictures):
    """Drawn scenes of the nine patterns in the form of MMVP-VLM: rows 2i and 2i + 1 differ in the pattern alone.

    A pair is a function of (``seed``, pattern, its number). Attribute: ``pattern``.

    Args:
        size: side in pixels.
        pairs: of each pattern; the benchmark has 15.
        seed: of the scenes.
        prefix: what is put before each statement.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(self, *, size: int = 64, pairs: int = 15, seed: int = 0, prefix: str = PREFIX) -> None:
        if size < 32 or pairs < 1:
            raise ValueError(f"DrawnPairs: size={size}, pairs={pairs}; set size to 32 or more and pairs to 1 or more")
        super().__init__()
        pattern, number = torch.arange(len(SCENES)).repeat_interleave(pairs), torch.arange(pairs).repeat(len(SCENES))
        draws = uniform(sample_seed(seed, pattern, number), _NUM_DRAWS).tolist()
        patterns = [name for name in SCENES for _ in range(pairs)]
        scenes = (SCENES[name](Pick(numbers)) for name, numbers in zip(patterns, draws, strict=True))
        self._scenes = [scene for pair in scenes for scene in pair]
        self.attributes = {"pattern": Labels.of(name for name in patterns for _ in range(2))}
        self.items, self.split = np.arange(len(self._scenes)).reshape(-1, 2), "pattern"
        self.size, self.prefix, self.pairs = size, prefix, pairs

    def __len__(self) -> int:
        return len(self._scenes)

    def key(self, index: int) -> str:
        """The pattern, the number of the pair and which half of it."""
        return f"{self.attributes['pattern'][index]}/{index // 2 % self.pairs}{'ab'[index % 2]}"

    def draw(self, index: int) -> Image.Image:
        """Draw the scene of a row."""
        pen = Pen(self.size)
        self._scenes[index][1](pen)
        return pen.done()

    def captions(self, index: int) -> list[str]:
        """The statement, with the prefix."""
        return [self.prefix + self._scenes[index][0]]

    def distractors(self, index: int) -> list[str]:
        """None: a statement is asked for its picture, not a picture for its statement."""
        return []
