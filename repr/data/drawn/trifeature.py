"""Trifeature: drawn objects with three independent attributes, to see which of them a representation has learned.

After Hermann & Lampinen, 2020 (arXiv 2006.12433): ten colours, shapes and textures, an object at a random place and
rotation on a grey canvas, its texture rotated independently. Shapes, textures and colours are our own drawings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from repr.data.drawn.pictures import DrawnPictures
from repr.data.sources.columns import Labels
from repr.seeds import sample_seed, uniform

COLOURS = {
    "red": (214, 39, 40), "orange": (245, 130, 32), "yellow": (226, 200, 0), "green": (34, 139, 60),
    "cyan": (0, 178, 190), "blue": (30, 80, 220), "purple": (130, 50, 170), "pink": (245, 105, 175),
    "brown": (115, 70, 30), "black": (20, 20, 20),
}  # fmt: skip
GREY, SATURATION = 150, 50  # of the canvas, of 255: its mean, and how far channels part where it has a hue
RADIUS = 0.34  # of the circle around the object, in canvas sides
NUM_TRAIN, NUM_HELD_OUT = 800, 200  # combinations
TEMPLATES = {
    "a {texture} {colour} {shape}": 2.0,
    "{colour} {shape}, {texture}": 1.0,
    "a picture of a {texture} {colour} {shape}": 1.0,
}
_PERIOD = 0.56  # of a texture, in radii
_NUM_DRAWS = 7  # left, top, rotation, rotation of the texture, its two shifts, hue of the canvas


def _regular(num: int, start: float = 0.0, radii: Sequence[float] = (1.0,)) -> np.ndarray:
    """Corners (num, 2) on circles of these radii in turn, the first at the top."""
    angle = start + 2 * math.pi * np.arange(num) / num
    return np.resize(radii, num)[:, None] * np.stack([np.sin(angle), -np.cos(angle)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], axis=1) / 17.0


def _crescent() -> np.ndarray:
    outer, inner = np.linspace(0.75, 5.53, 48), np.linspace(5.15, 1.13, 48)  # angles from the right, in radians
    rims = [np.stack([np.cos(outer), np.sin(outer)], 1), 0.75 * np.stack([np.cos(inner), np.sin(inner)], 1) + [0.42, 0]]
    return np.concatenate(rims)


# Corners in the unit circle, x to the right and y down. No two are turned into each other by 45 degrees or less.
SHAPES: dict[str, np.ndarray] = {
    "triangle": _regular(3),
    "square": _regular(4, math.pi / 4),
    "circle": 0.92 * _regular(64),
    "star": _regular(10, radii=(1.0, 0.42)),
    "heart": _heart(),
    "cross": np.array(
        [[-0.36, -0.36], [-0.36, -0.93], [0.36, -0.93], [0.36, -0.36], [0.93, -0.36], [0.93, 0.36],
         [0.36, 0.36], [0.36, 0.93], [-0.36, 0.93], [-0.36, 0.36], [-0.93, 0.36], [-0.93, -0.36]]
    ),
    "crescent": _crescent(),
    "arrow": np.array(
        [[0, -1], [0.85, -0.05], [0.32, -0.05], [0.32, 0.93], [-0.32, 0.93], [-0.32, -0.05], [-0.85, -0.05]]
    ),
    "semicircle": np.concatenate([_regular(64)[48:], _regular(64)[:17]]) * [1, 1.1] + [0, 0.5],
    "hourglass": np.array([[-0.7, -0.71], [0.7, -0.71], [0.12, 0], [0.7, 0.71], [-0.7, 0.71], [-0.12, 0]]),
}  # fmt: skip


def turned(points: np.ndarray, angle: float) -> np.ndarray:
    """Points (N, 2) turned clockwise about the centre by an angle in radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def _phase(x: np.ndarray) -> np.ndarray:
    return x - np.floor(x)


def _dots(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    rows = v / (0.87 * _PERIOD)
    shifted = u / _PERIOD + 0.5 * (np.floor(rows) % 2)
    return (_phase(shifted) - 0.5) ** 2 + (0.87 * (_phase(rows) - 0.5)) ** 2 < 0.33**2


def _speckles(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Cells that are on or off by a hash of where they lie."""
    x, y = (np.floor(axis / 0.2).astype(np.int64).astype(np.uint32) for axis in (u, v))
    mixed = (x * np.uint32(0x9E3779B1)) ^ (y * np.uint32(0x85EBCA77))
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    return ((mixed ^ (mixed >> np.uint32(13))) & np.uint32(15)) < 8


# (u, v) in radii, turned and shifted by random amounts -> share of the colour; the rest is white.
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "solid": lambda u, v: np.ones_like(u),
    "striped": lambda u, v: _phase(u / _PERIOD) < 0.5,
    "checkered": lambda u, v: (np.floor(u / 0.42) + np.floor(v / 0.42)) % 2 < 1,
    "dotted": _dots,
    "gridded": lambda u, v: (_phase(u / _PERIOD) < 0.3) | (_phase(v / _PERIOD) < 0.3),
    "zigzag": lambda u, v: _phase(v / _PERIOD + np.abs(2 * _phase(u / 0.9) - 1)) < 0.5,
    "speckled": _speckles,
    "ringed": lambda u, v: _phase(np.hypot(u, v) / 0.44 + 0.2) < 0.55,
    "rayed": lambda u, v: _phase(np.arctan2(v, u) * 4 / math.pi) < 0.5,
    "shaded": lambda u, v: np.clip(0.5 + 0.6 * u, 0.05, 1.0),
}
_CENTRED = ("ringed", "rayed", "shaded")  # not shifted: they begin in the centre of the object
ATTRIBUTES: dict[str, list[str]] = {"colour": list(COLOURS), "shape": list(SHAPES), "texture": list(TEXTURES)}


def draw_object(
    colour: str, shape: str, texture: str, *, draws: Sequence[float], size: int, hues: int = 0
) -> Image.Image:
    """Draw one picture, anti-aliased: RGB, size x size. The object never leaves the canvas.

    Args:
        colour: a key of ``COLOURS``.
        shape: a key of ``SHAPES``.
        texture: a key of ``TEXTURES``.
        draws: seven numbers in [0, 1): place (two), rotation of the object (by at most 45 degrees either way), rotation
            of its texture, shifts of the texture (two), hue of the canvas.
        size: side in pixels.
        hues: different hues that the canvas may have; 0: it is grey.
    """
    left, top, rotation, turn, shift_u, shift_v, hue = draws
    fine = max(2, -(-160 // size))  # drawn so many times as large, for smooth edges
    side = round(2 * RADIUS * size * fine)
    axis = (np.arange(side, dtype=np.float32) + 0.5) * (2 / side) - 1  # in radii
    sin, cos = math.sin(2 * math.pi * turn), math.cos(2 * math.pi * turn)
    u, v = cos * axis[None, :] + sin * axis[:, None], cos * axis[:, None] - sin * axis[None, :]  # (side, side)
    if texture not in _CENTRED:
        u, v = u + 8 * shift_u, v + 8 * shift_v
    share = TEXTURES[texture](u, v).astype(np.float32)[..., None]
    paint = (255 - share * (255 - np.array(COLOURS[colour], np.float32))).astype(np.uint8)
    mask = Image.new("L", (side, side))
    outline = turned(SHAPES[shape], math.pi / 2 * (rotation - 0.5))
    ImageDraw.Draw(mask).polygon(((outline + 1) * side / 2).ravel().tolist(), fill=255)
    angles = [2 * math.pi * (int(hue * hues) / max(hues, 1) - channel / 3) for channel in range(3)]
    ground = tuple(round(GREY + (SATURATION * math.cos(angle) if hues else 0)) for angle in angles)
    canvas = Image.new("RGB", (size * fine, size * fine), ground)
    room = size * fine - side
    canvas.paste(Image.fromarray(paint), (round(left * room), round(top * room)), mask)
    return canvas.reduce(fine)


class Trifeature(DrawnPictures):
    """Drawn objects: each of 1,000 combinations of colour, shape and texture, several times.

    A picture is a function of (``seed``, combination, number of the render). Which combinations are held out follows
    from the seed alone. The renders of a combination follow each other; combinations come in random order.

    Args:
        split: ``train`` (800 combinations) or ``held_out`` (the other 200).
        size: side in pixels, 32 to 224.
        renders: pictures of each combination.
        seed: decides the split and the pictures.
        templates: sentence -> weight with which training draws it; ``{colour}``, ``{shape}`` and ``{texture}`` stand
            for the names, and text does not teach what a sentence leaves out. The first is the main caption. None:
            ``TEMPLATES``, which name all three.
        hues: the canvas has one of so many hues (attribute ``canvas``); 0: it is grey. All views of a picture share
            it, so it is an easy feature that suppresses the others, the more hues the more.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        split: str,
        *,
        size: int = 64,
        renders: int = 3,
        seed: int = 0,
        templates: Mapping[str, float] | None = None,
        hues: int = 0,
    ) -> None:
        if split not in ("train", "held_out"):
            raise ValueError(f"Trifeature: no split {split!r}; set split to 'train' or 'held_out'")
        if not 32 <= size <= 224 or renders < 1 or hues < 0:
            raise ValueError(
                f"Trifeature: size={size}, renders={renders}, hues={hues}; set size from 32 to 224, renders to 1 or "
                "more, and hues to 0 or more"
            )
        super().__init__()
        self.templates = dict(TEMPLATES if templates is None else templates)
        _check_templates(self.templates)
        order = uniform(sample_seed(seed, 0, torch.arange(NUM_TRAIN + NUM_HELD_OUT)), 1)[:, 0].argsort(stable=True)
        chosen = order[:NUM_TRAIN] if split == "train" else order[NUM_TRAIN:]
        combination, render = chosen.repeat_interleave(renders), torch.arange(renders).repeat(len(chosen))  # (N,)
        self._draws = uniform(sample_seed(seed, 1 + render, combination), _NUM_DRAWS).numpy()  # (N, 7)
        codes = np.unravel_index(combination.numpy(), [len(names) for names in ATTRIBUTES.values()])
        self.attributes = {
            name: Labels(code.astype(np.int32), names)
            for (name, names), code in zip(ATTRIBUTES.items(), codes, strict=True)
        }
        if hues:
            self.attributes["canvas"] = Labels.of(f"hue {int(hue * hues)}" for hue in self._draws[:, -1].tolist())
        self.size, self.renders, self.hues = size, renders, hues

    def __len__(self) -> int:
        return len(self._draws)

    def _names(self, index: int) -> dict[str, str]:
        return {attribute: self.attributes[attribute][index] for attribute in ATTRIBUTES}

    def key(self, index: int) -> str:
        """Colour, shape, texture and the number of the render."""
        return f"{'-'.join(self._names(index).values())}/{index % self.renders}"

    def draw(self, index: int) -> Image.Image:
        """Draw the object of a row."""
        return draw_object(**self._names(index), draws=self._draws[index].tolist(), size=self.size, hues=self.hues)

    def captions(self, index: int) -> list[str]:
        """The filled templates."""
        return [template.format(**self._names(index)) for template in self.templates]

    def caption_weights(self, index: int) -> list[float]:
        """The weights of the templates."""
        return list(map(float, self.templates.values()))


def _check_templates(templates: Mapping[str, float]) -> None:
    if not templates:
        raise ValueError("Trifeature: templates is empty; set at least one sentence, or null for the usual ones")
    for template, weight in templates.items():
        try:
            template.format(**dict.fromkeys(ATTRIBUTES, ""))
            sound = 0 < weight < math.inf
        except (KeyError, IndexError, ValueError):
            sound = False
        if not sound:
            raise ValueError(
                f"Trifeature: templates has {template!r}: {weight}; set sentences with {{colour}}, {{shape}} and "
                "{texture}, each with a positive weight"
            )
