"""Agreement of two crops of an image, cell by cell of their feature maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from repr.losses.features import normalise, widened, with_gradient
from repr.losses.precision import full_precision

_NUM_SLICES = 8  # of a batch; what is built for the pairs of cells of one is gone before the next
_HEADROOM = 60.0  # nats above 1 for the largest exponential of a row, so that one 147 nats below is still a number


@torch.no_grad()
def positive_mask(
    boxes_q: Tensor, boxes_k: Tensor, *, grid_q: Sequence[int], grid_k: Sequence[int], threshold: float
) -> Tensor:
    """Which cells of two feature maps look at the same place of the image.

    With ``c`` the centre of a cell in the image and ``d`` the diagonal of a cell of either map::

        mask_nij = |c_ni - c_nj| / max(d_nq, d_nk) < threshold

    Shapes: ``boxes_q`` and ``boxes_k`` (N, 4), ``x0, y0, x1, y1`` in [0, 1] of the image, where ``x1 < x0`` says that
    the crop is mirrored (``boxes`` of the batch, a view each). ``grid_q`` and ``grid_k`` are height and width of the
    maps in cells. The result is (N, HWq, HWk) bool, cells in row-major order, without gradient.

    At a threshold of 0.7 the cells of two equal square crops match only themselves, as neighbours lie 1 / sqrt(2) of a
    diagonal apart. Crops that do not overlap have no positive.

    Source: Xie et al., 2021 (PixPro), arXiv:2011.10043, equation 1, where the threshold is 0.7.

    Departures: the paper has "<=", the authors' code and this function "<". The two axes are scaled by width and
    height of the image each, as in the code, so distances in an image that is not square are not those of its pixels.

    Memory: one float tensor (N, HWq, HWk) inside; the result takes a quarter of it.

    Raises:
        ValueError: boxes in half precision, or boxes, grids or threshold that do not fit.
    """
    for boxes in (boxes_q, boxes_k):
        if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.shape != boxes_q.shape:
            raise ValueError(f"boxes must be (N, 4) each; got {tuple(boxes_q.shape)} and {tuple(boxes_k.shape)}")
        if boxes.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"boxes are {str(boxes.dtype).removeprefix('torch.')}, which moves crops by whole cells: keep them "
                "float32, with trainer.precision=bf16-mixed or 32-true"
            )
    for grid in (grid_q, grid_k):
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"a grid is the height and width of a map in cells, both at least 1; got {tuple(grid)}")
    if not threshold > 0:
        raise ValueError(f"threshold={threshold}: set it above 0, in diagonals of a cell")
    (x_q, y_q, diagonal_q), (x_k, y_k, diagonal_k) = _centres(boxes_q, grid_q), _centres(boxes_k, grid_k)
    dx = (x_q[:, :, None] - x_k[:, None, :]).square_()  # (N, Wq, Wk)
    dy = (y_q[:, :, None] - y_k[:, None, :]).square_()  # (N, Hq, Hk)
    distance = dx[:, None, :, None, :] + dy[:, :, None, :, None]  # (N, Hq, Wq, Hk, Wk)
    distance = distance.flatten(3).flatten(1, 2).sqrt_()  # (N, HWq, HWk)
    return distance.div_(torch.maximum(diagonal_q, diagonal_k)[:, None, None]) < threshold


def _centres(boxes: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Centres of the columns (N, W) and of the rows (N, H) of cells, and the diagonal of a cell (N,)."""
    x0, y0, x1, y1 = boxes.unsqueeze(2).unbind(1)  # (N, 1) each
    height, width = grid
    step_x, step_y = (x1 - x0) / width, (y1 - y0) / height  # negative where mirrored
    columns, rows = (torch.arange(num, dtype=boxes.dtype, device=boxes.device) + 0.5 for num in (width, height))
    return columns * step_x + x0, rows * step_y + y0, (step_x.square() + step_y.square()).sqrt().squeeze(1)


def pixel_consistency(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Minus twice the cosine of the cells that match, averaged over the pairs of an image, then over the images.

    With ``x`` and ``y`` the normalised cells of ``q`` and ``k``::

        loss = -2/N sum_n [ sum_ij mask_nij <x_ni, y_nj> / (sum_ij mask_nij + 1e-6) ]

    Shapes: ``q`` (N, C, HWq) and ``k`` (N, C, HWk); ``mask`` (N, HWq, HWk) bool, as from :func:`positive_mask`.

    Range: [-2, 2]. At chance (directions without relation): 0. An image without a pair counts as 0 in the mean.

    Source: Xie et al., 2021 (PixPro), arXiv:2011.10043, equation 5, one direction of it; the authors' code.

    Departures: the paper has no factor 2, the code does.

    Memory: one float tensor (N, HWq, HWk), for backward only if ``k`` needs a gradient; cosines are never held.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """
    with full_precision(q):
        q, k = _unit_cells(q, k, mask)
        pairs = mask.to(q.dtype)
        matched = torch.bmm(pairs, k.mT)  # (N, HWq, C): the sum of all cells that match
        cosines = torch.bmm(q.mT.flatten(1)[:, None], matched.flatten(1)[:, :, None]).flatten()  # (N,), their sum
        return -2 * (cosines / (pairs.sum((1, 2)) + 1e-6)).mean()


def pixel_contrast(q: Tensor, k: Tensor, mask: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of finding the cells that match among all cells of the other view.

    With ``x`` and ``y`` the normalised cells of ``q`` and ``k``, P(i) the positives of cell i by ``mask``, and A the
    cells of the image that have any::

        loss = -1/N sum_n 1/|A_n| sum_{i in A_n} log( sum_{j in P(i)} e^{<x_ni, y_nj> / temperature}
                                                     / sum_j e^{<x_ni, y_nj> / temperature} )

    Shapes: as of :func:`pixel_consistency`.

    Range: [0, 2 / temperature + ln HWk], in nats. At chance (all cosines equal): the mean of ``ln(HWk / |P(i)|)``. An
    image without a pair counts as 0 in the mean.

    Source: Xie et al., 2021 (PixContrast), arXiv:2011.10043, equation 2, one direction of it, temperature 0.3. The
    authors have published no code of it.

    Departures: the paper does not say what becomes of images whose crops do not overlap; here they count as in
    :func:`pixel_consistency`. A positive that lies more than 147 nats below the best cell, which takes a temperature
    under 0.014, counts as if it lay there and gets no gradient.

    Memory: two float tensors (N, HWq, HWk) for an eighth of the images at a time; backward needs none, since forward
    has computed the gradients.

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool, or a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: set it above 0")
    with full_precision(q):
        x, y = (cells.mT for cells in _unit_cells(q, k, mask))  # (N, HW, C)
        losses, grads_x, grads_y = [], [], []
        with torch.no_grad():
            for cells_x, cells_y, pairs in zip(*(part.chunk(_NUM_SLICES) for part in (x, y, mask)), strict=True):
                loss, weight = _contrast(torch.bmm(cells_x, cells_y.mT).div_(temperature), pairs)
                losses.append(loss)
                weight.div_(temperature * len(q))  # d(loss) / d(cosine)
                if x.requires_grad:
                    grads_x.append(torch.bmm(weight, cells_y))
                if y.requires_grad:
                    grads_y.append(torch.bmm(weight.mT, cells_x))
        grads = [torch.cat(parts) if parts else None for parts in (grads_x, grads_y)]
        return with_gradient(torch.stack(losses).sum() / len(q), (x, y), grads)


@torch.no_grad()
def contrast_at_chance(mask: Tensor) -> Tensor:
    """Value of :func:`pixel_contrast`, in nats, where all cosines are equal; ``mask`` is (N, HWq, HWk) bool."""
    positives = mask.sum(2).float()  # (N, HWq)
    has_positive = positives > 0
    nats = torch.where(has_positive, math.log(mask.shape[2]) - positives.clamp(min=1).log(), 0.0)
    return (nats.sum(1) / has_positive.sum(1).clamp(min=1)).mean()


def _contrast(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the images' losses, and its gradient in the place of the logits (n, HWq, HWk)."""
    powers = logits.sub_(logits.amax(2, keepdim=True) - _HEADROOM).exp_()
    right = powers * mask
    every, positive = powers.sum(2, keepdim=True), right.sum(2, keepdim=True)
    positive = positive.clamp_min(torch.finfo(positive.dtype).tiny)
    has_positive = mask.any(2, keepdim=True)  # (n, HWq, 1)
    share = has_positive / has_positive.sum(1, keepdim=True).clamp_min(1)  # of a cell in its image
    loss = (share * (every.log() - positive.log())).sum()
    return loss, powers.mul_(share / every).addcmul_(right, share / positive, value=-1)


def _unit_cells(q: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Check the arguments of both losses, and scale the cells to length 1."""
    if q.ndim != 3 or k.ndim != 3 or q.shape[:2] != k.shape[:2]:
        raise ValueError(f"maps must be (N, C, HW), of equal N and C; got {tuple(q.shape)} and {tuple(k.shape)}")
    if mask.dtype != torch.bool or mask.shape != (len(q), q.shape[2], k.shape[2]):
        raise ValueError(
            f"the mask of maps with {q.shape[2]} and {k.shape[2]} cells must be ({len(q)}, {q.shape[2]}, {k.shape[2]}) "
            f"bool; got {tuple(mask.shape)} {str(mask.dtype).removeprefix('torch.')}"
        )
    q, k = widened(q, k)
    return normalise(q), normalise(k)
