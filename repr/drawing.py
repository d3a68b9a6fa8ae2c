"""Pictures for people, as uint8 tensors: what a flow draws, and how a grid of pictures is laid out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Show = Callable[[Tensor], Tensor]  # normalised pictures (B, 3, H, W) -> (B, 3, H, W) uint8

SIDE, GAP, PAPER = 160, 4, 240  # pixels: about the side of an enlarged picture, between pictures; gray of the paper


def shown(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo a normalisation: (B, 3, H, W) float -> (B, 3, H, W) uint8 on the CPU; what lies outside is clipped."""
    shift, scale = torch.tensor([[*mean], [*std]])[..., None, None]  # (3, 1, 1) each
    return ((images.detach().float().cpu() * scale + shift) * 255).round().clamp(0, 255).byte()


def enlarge(picture: Tensor, side: int = SIDE) -> Tensor:
    """Repeat pixels so often that the longer side comes nearest to ``side``; larger pictures are made smaller."""
    longer = max(picture.shape[1:])
    if longer <= side:
        factor = max(1, round(side / longer))
        return picture.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    size = [max(1, round(length * side / longer)) for length in picture.shape[1:]]
    resized = interpolate(picture[None].float(), size=size, mode="bilinear", antialias=True, align_corners=False)
    return resized[0].round().clamp(0, 255).byte()


def grid(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Lay pictures (3, H, W) uint8 of any sizes out in rows, each in the upper left of its cell, on light gray."""
    num_columns = max(len(row) for row in rows)
    heights = [max(picture.shape[1] for picture in row) for row in rows]
    widths = [max(row[c].shape[2] for row in rows if c < len(row)) for c in range(num_columns)]
    sheet = torch.full((3, sum(heights) + GAP * (len(rows) + 1), sum(widths) + GAP * (num_columns + 1)), PAPER)
    y = GAP
    for row, height in zip(rows, heights, strict=True):
        x = GAP
        for picture, width in zip(row, widths, strict=False):
            sheet[:, y : y + picture.shape[1], x : x + picture.shape[2]] = picture
            x += width + GAP
        y += height + GAP
    return sheet.byte()
