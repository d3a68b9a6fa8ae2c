"""Losses that rebuild removed patches: their pixels, or what an encoder makes of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from repr.losses.features import widened
from repr.losses.precision import full_precision


def patchify(images: Tensor, *, patch_size: int) -> Tensor:
    """Cut images into square patches of side p: (B, C, H, W) -> (B, L, p * p * C) with L = (H / p)(W / p).

    The order is that of He et al., 2021, arXiv 2111.06377: patches row by row from the top left, within a patch its
    pixels row by row, of each pixel the channels.

    Raises:
        ValueError: the patches do not fill the images.
    """
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"patches of {patch_size} pixels do not fill an image of {height} x {width}")
    rows, columns = height // patch_size, width // patch_size
    cells = images.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size))  # (B, C, h, p, w, p)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, *, patch_size: int) -> Tensor:
    """Put the patches of square images together again: the inverse of :func:`patchify`.

    Raises:
        ValueError: L is no square, or the patches have another size.
    """
    side = round(tokens.shape[1] ** 0.5)
    if side * side != tokens.shape[1] or tokens.shape[2] % patch_size**2:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} are no patches of {patch_size} pixels of a square")
    cells = tokens.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (side, side))  # (B, h, w, p, p, C)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def normalize_patches(tokens: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Bring every patch to mean 0 and variance 1, over all its pixels and channels together: (B, L, D), D > 1.

    ``(t - mean(t)) / sqrt(var(t) + eps)`` with the unbiased variance (He et al., 2021, arXiv 2111.06377, section 4.2,
    and the authors' code). A flat patch becomes zero.
    """
    (tokens,) = widened(tokens)  # in half precision eps would vanish, and a flat patch be divided by zero
    variance, mean = torch.var_mean(tokens, dim=-1, keepdim=True)
    return (tokens - mean) * (variance + eps).rsqrt()


def masked_mse(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the removed patches.

    With D values a patch and ``m_nl`` 1 where patch l of image n was removed::

        loss = sum_nl m_nl (1/D) |pred_nl - target_nl|^2 / sum_nl m_nl

    Shapes: ``pred`` and ``target`` (B, L, D), ``mask`` (B, L), of zeros and ones. Nothing is normalised inside.

    Range: [0, inf), in squared units of the target. At chance, a prediction of 0 for patches of variance 1
    (:func:`normalize_patches`): 1, less 1/D since that variance is the unbiased one.

    Source: He et al., 2021, arXiv:2111.06377, section 3; the mean is over the removed patches of the whole batch, as in
    the authors' code, not over those of each image. It is undefined (NaN) where nothing is removed.

    Several processes: the same number of patches must be removed on each.
    """
    with full_precision(pred):
        pred, target = widened(pred, target)
        error = (pred - target).square().mean(dim=-1)  # (B, L)
        mask = mask.to(error.dtype)
        return (error * mask).sum() / mask.sum()


def feature_prediction(pred: Tensor, target: Tensor) -> Tensor:
    """Distance of predicted features of patches from true ones, which are normalised patch by patch.

    With ``t = (target - mean(target)) / sqrt(var(target) + 1e-5)`` over the D features of a patch, and the biased
    variance::

        loss = mean over patches and features of h(pred - t);  h(e) = e^2 / 2 where |e| < 1, else |e| - 1/2

    Shapes: ``pred`` and ``target`` (..., D), without gradient for the target.

    Range: [0, inf), without unit; about 0.42 for a prediction of 0 and Gaussian features. There is no level at chance.

    Source: Assran et al., 2023 (I-JEPA), arXiv:2301.08243, section 3; the paper writes the squared distance, the
    authors' code and this function take the smooth one.

    Several processes: the mean of what each computes on as many patches is that of all.
    """
    with full_precision(pred):
        pred, target = widened(pred, target.detach())
        return F.smooth_l1_loss(pred, F.layer_norm(target, target.shape[-1:]))
