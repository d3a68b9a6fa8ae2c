"""A drawing of two crops and of which of their cells match."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from repr.drawing import GAP, PAPER, grid

SIDE = 192  # of a crop, in pixels
NUM_LINES = 16  # about as many in each pair of crops
RIGHT, WRONG = (46, 204, 64), (255, 65, 54)
Point = tuple[float, float]


def draw_matches(
    views: tuple[Tensor, Tensor], mask: Tensor, found: Tensor, *, grids: tuple[Sequence[int], Sequence[int]]
) -> Tensor:
    """For each image a row of two pairs of crops: on the left what matches, on the right what was found.

    On the left, cells of the two crops that match have the same colour, that of their place in the first. On the right,
    lines lead from some of the cells of the first crop that have a match to those found for them in the second, green
    where the two match, red where not.

    Args:
        views: (N, 3, H, W) uint8 each.
        mask: (N, HWq, HWk) bool, which cells match.
        found: (N, HWq) int64, a cell of the second crop for each of the first.
        grids: height and width of the two maps in cells.

    Returns:
        (3, H, W) uint8.
    """
    a, b = (interpolate(view.float().cpu(), size=(SIDE, SIDE)).byte() for view in views)
    rows = zip(a, b, mask.cpu(), found.cpu(), strict=True)
    return grid([[_truth(x, y, pairs, grids), _found(x, y, pairs, cells, grids)] for x, y, pairs, cells in rows])


def _pair(a: Tensor, b: Tensor) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Two crops side by side, a little paler, so that lines stand out."""
    gap = torch.full((3, SIDE, GAP), PAPER)
    pixels = torch.cat([a, gap, b], dim=2).float().mul(0.6).add(102).clamp(max=255).byte()
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    return image, ImageDraw.Draw(image)


def _centre(cell: int, shape: Sequence[int], *, left: int) -> Point:
    row, column = divmod(cell, shape[1])
    return left + (column + 0.5) * SIDE / shape[1], (row + 0.5) * SIDE / shape[0]


def _dot(draw: ImageDraw.ImageDraw, centre: Point, colour: tuple[int, ...]) -> None:
    x, y = centre
    draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour, outline=(255, 255, 255))


def _colour(cell: int, shape: Sequence[int]) -> tuple[int, int, int]:
    """Red grows to the right, green downwards."""
    row, column = divmod(cell, shape[1])
    return int(255 * (column + 0.5) / shape[1]), int(255 * (row + 0.5) / shape[0]), 160


def _truth(a: Tensor, b: Tensor, mask: Tensor, grids: tuple[Sequence[int], Sequence[int]]) -> Tensor:
    image, draw = _pair(a, b)
    for q in mask.any(1).nonzero().flatten().tolist():
        _dot(draw, _centre(q, grids[0], left=0), _colour(q, grids[0]))
    for k in mask.any(0).nonzero().flatten().tolist():
        places = [_colour(q, grids[0]) for q in mask[:, k].nonzero().flatten().tolist()]
        mean = tuple(sum(channel) // len(places) for channel in zip(*places, strict=True))
        _dot(draw, _centre(k, grids[1], left=SIDE + GAP), mean)
    return _tensor(image)


def _found(a: Tensor, b: Tensor, mask: Tensor, found: Tensor, grids: tuple[Sequence[int], Sequence[int]]) -> Tensor:
    image, draw = _pair(a, b)
    cells = mask.any(1).nonzero().flatten().tolist()
    for q in cells[:: len(cells) // NUM_LINES | 1]:  # odd, so that not all are of one column
        k = int(found[q])
        colour = RIGHT if mask[q, k] else WRONG
        ends = _centre(q, grids[0], left=0), _centre(k, grids[1], left=SIDE + GAP)
        draw.line((*ends[0], *ends[1]), fill=colour, width=2)
        for end in ends:
            _dot(draw, end, colour)
    return _tensor(image)


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
