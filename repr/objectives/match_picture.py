"""A drawing of two crops and of which of their cells match."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from repr.drawing import GAP, PAPER, grid

SIDE = 192  # of a crop, in pixels
NUM_LINES = 16  # about as many in each pair of crops
RIGHT, WRONG = (46, 204, 64), (255, 65, 54)
Mark = tuple[Sequence[Tensor], Sequence[int]]  # one place or two, (x, y) in pixels each, and a colour


def draw_matches(
    views: tuple[Tensor, Tensor], mask: Tensor, nearest: Tensor, *, grids: tuple[Sequence[int], Sequence[int]]
) -> Tensor:
    """Draw for each image a row of two pairs of crops: on the left the cells that match, on the right the nearest ones.

    On the left, cells of the two crops that match have the same colour, that of their place in the first. On the right,
    lines lead from some of the cells of the first crop that have a match to the nearest in the second, green where the
    two match, red where not.

    Args:
        views: (N, 3, H, W) uint8 each.
        mask: (N, HWq, HWk) bool, which cells match.
        nearest: (N, HWq) int64, for each cell of the first crop one of the second.
        grids: height and width of the two maps in cells.

    Returns:
        (3, H, W) uint8.
    """
    crops = zip(*(interpolate(view.float().cpu(), size=(SIDE, SIDE)).byte() for view in views), strict=True)
    centres, others = (_centres(*shape) for shape in grids)
    colours = torch.cat(
        [255 * centres, torch.full((len(centres), 1), 160)], dim=1
    ).long()  # red to the right, green down
    centres, others = SIDE * centres, SIDE * others + torch.tensor([SIDE + GAP, 0])
    rows = []
    for pair, matches, cells in zip(crops, mask.cpu(), nearest.cpu(), strict=True):
        in_first = matches.any(1).nonzero().flatten().tolist()
        in_second = matches.any(0).nonzero().flatten().tolist()
        truth: list[Mark] = [([centres[q]], colours[q].tolist()) for q in in_first]
        truth += [([others[k]], (colours[matches[:, k]].sum(0) // matches[:, k].sum()).tolist()) for k in in_second]
        some = in_first[:: len(in_first) // NUM_LINES | 1]  # odd, so that not all are of one column
        lines = [([centres[q], others[cells[q]]], RIGHT if matches[q, cells[q]] else WRONG) for q in some]
        rows.append([_draw(pair, truth), _draw(pair, lines)])
    return grid(rows)


def _centres(height: int, width: int) -> Tensor:
    """The centres (x, y) of the cells of a map, in [0, 1]: (H * W, 2)."""
    y, x = ((torch.arange(num, dtype=torch.float64) + 0.5) / num for num in (height, width))
    return torch.cartesian_prod(y, x).flip(1)


def _draw(crops: tuple[Tensor, Tensor], marks: Iterable[Mark]) -> Tensor:
    """Two crops side by side, a little paler, so that the dots and lines on them stand out."""
    pixels = torch.cat([crops[0], torch.full((3, SIDE, GAP), PAPER), crops[1]], dim=2)
    paler = pixels.float().mul(0.6).add(102).clamp(max=255).byte()
    image = Image.fromarray(paler.permute(1, 2, 0).contiguous().numpy())
    canvas = ImageDraw.Draw(image)
    for places, colour in marks:
        points = [(x, y) for x, y in (place.tolist() for place in places)]
        if len(points) == 2:
            canvas.line(points, fill=tuple(colour), width=2)
        for x, y in points:
            canvas.ellipse((x - 5, y - 5, x + 5, y + 5), fill=tuple(colour), outline="white")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
