"""Rectangles of patches that are to be predicted, and the patches from which they are: I-JEPA's masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repr.models.masking import MASK_STREAM, is_range, mask_from_scores
from repr.seeds import sample_seed, uniform

Grid = tuple[int, int]  # rows and columns of patches


@dataclass(frozen=True)
class TargetBlocks:
    """How many blocks of a picture are predicted, and how large they are.

    All pictures of a step have blocks of one size, drawn by the step, at places of their own, which may overlap. The
    context is drawn from the patches that no block covers, at first from those inside of one large square. It has as
    many patches as are left where blocks do not overlap: so all pictures have as many, and no block is seen.

    Source: Assran et al., 2023 (I-JEPA), arXiv:2301.08243, section 3. There a context has as many patches as that of
    the picture of a GPU's batch that has the fewest, the first ones.

    Args:
        num: blocks of a picture.
        scale: least and largest share of the picture that a block covers.
        aspect: least and largest height over width of a block.
        context: least and largest share of the picture that the large square covers.

    Raises:
        ValueError: shares are none, or the blocks may cover the picture.
    """

    num: int = 4
    scale: Sequence[float] = (0.15, 0.2)
    aspect: Sequence[float] = (0.75, 1.5)
    context: Sequence[float] = (0.85, 1.0)

    def __post_init__(self) -> None:
        for name, most in (("scale", 1.0), ("aspect", math.inf), ("context", 1.0)):
            if not is_range(value := getattr(self, name), most):
                raise ValueError(f"{name}={value}; set two numbers above 0, up to {most:g}, the smaller first")
        if self.num < 1 or self.num * self.scale[1] >= 1:
            raise ValueError(
                f"num={self.num} blocks of up to {self.scale[1]} of a picture leave nothing to predict them from: set "
                "num to 1 or more, and num times scale below 1"
            )

    def sizes(self, grid: Grid, step: int) -> tuple[Grid, Grid]:
        """Rows and columns of the blocks and of the large square at a step."""
        draws = uniform(sample_seed(0, step, torch.zeros(1, dtype=torch.int64)), 3)[0].tolist()
        scale, aspect, context = (
            low + (high - low) * draw
            for draw, (low, high) in zip(draws, (self.scale, self.aspect, self.context), strict=True)
        )
        rows, columns = _rectangle(grid, scale, aspect)
        while self.num * rows * columns >= math.prod(grid) and rows * columns > 1:  # few patches, rounded up
            rows, columns = (rows - 1, columns) if rows >= columns else (rows, columns - 1)
        return (rows, columns), _rectangle(grid, context, 1.0)

    def draw(self, seed: Tensor, grid: Grid, *, step: int) -> tuple[Tensor, Tensor]:
        """Draw positions of patches, row-major, for B seeds.

        Returns:
            The context (B, K), and M blocks of T patches (B, M, T); K is ``L - M * T``, of L patches of the picture.

        Raises:
            ValueError: the picture has too few patches.
        """
        (rows, columns), square = self.sizes(grid, step)
        if (num_kept := math.prod(grid) - self.num * rows * columns) < 1:
            raise ValueError(too_few(self.num, grid))
        draws = uniform(seed, 2 * self.num + 2 + math.prod(grid), stream=MASK_STREAM)
        corners, corner, noise = draws.split([2 * self.num, 2, math.prod(grid)], dim=1)
        top, left = _places(corners.unflatten(1, (self.num, 2)), grid, (rows, columns))  # (B, M) each
        y, x = (torch.arange(side, device=seed.device) for side in (rows, columns))
        offsets = (y[:, None] * grid[1] + x).flatten()
        blocks = (top * grid[1] + left)[:, :, None] + offsets  # (B, M, T)
        covered = torch.zeros_like(noise).scatter_(1, blocks.flatten(1), 1.0)
        top, left = _places(corner, grid, square)  # (B,) each
        y, x = (torch.arange(side, device=seed.device) for side in grid)
        inside = [(here >= first[:, None]) & (here < first[:, None] + side)
                  for here, first, side in ((y, top, square[0]), (x, left, square[1]))]  # fmt: skip
        outside = ~(inside[0][:, :, None] & inside[1][:, None]).flatten(1)
        return mask_from_scores(2 * covered + outside + noise, num_kept).ids_keep, blocks


def too_few(num: int, grid: Grid) -> str:
    """What to say of a picture with no more patches than there are blocks."""
    return (
        f"{num} blocks of a picture of {math.prod(grid)} patch(es) leave nothing to predict them from: set a smaller "
        "backbone.patch_size, or a larger image_size"
    )


def _rectangle(grid: Grid, share: float, aspect: float) -> Grid:
    """Rows and columns of a rectangle that covers this share of a picture, at least one of each."""
    area = share * math.prod(grid)
    rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return min(max(rows, 1), grid[0]), min(max(columns, 1), grid[1])


def _places(draws: Tensor, grid: Grid, size: Grid) -> tuple[Tensor, Tensor]:
    """The top row and the left column of rectangles, from (..., 2) draws of [0, 1)."""
    top, left = ((draws[..., i] * (grid[i] - size[i] + 1)).long() for i in range(2))
    return top, left
