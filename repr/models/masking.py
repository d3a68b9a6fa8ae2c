"""Which patches of a picture are removed, and a timm ViT on those that are kept.

A mask comes from scores, one a patch: those with the smallest scores are kept. Noise gives random masking, distance
from a point a block, similarity to the caption text-guided masking. Noise comes from the batch's ``seed`` alone, so a
mask depends neither on ranks nor on what was run before.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from repr.losses.blockwise import full_precision
from repr.models.slicing import in_slices
from repr.seeds import uniform

MASK_STREAM = 16  # of the batch's seed; view v draws from stream 16 + v


class Mask(NamedTuple):
    """Which of L patches are kept, for each of B pictures."""

    ids_keep: Tensor  # (B, K) int64, positions of the kept patches, that of the smallest score first
    ids_remove: Tensor  # (B, L - K) int64, positions of the others, likewise
    ids_restore: Tensor  # (B, L) int64: token l of the picture is entry ids_restore[l] of [kept, removed]
    removed: Tensor  # (B, L) float32, 1 = removed, 0 = kept


def num_kept(num_patches: int, ratio: float) -> int:
    """How many of ``num_patches`` patches are kept: ``num_patches * (1 - ratio)``, cut to a whole number, at least 1.

    That is the rule of MAE's code, where ratio 0.9 of 10 patches keeps none; here it keeps one. As there, the product
    is a binary one, so 0.9 of 100 patches keeps 9.
    """
    return max(1, int(num_patches * (1 - ratio)))


def ratio_fault(num_patches: int, ratio: float, *, reconstruct: bool) -> str | None:
    """What is wrong with a share of removed patches, or None.

    Args:
        num_patches: L.
        ratio: the share.
        reconstruct: whether a loss needs removed patches.
    """
    if not 0 <= ratio < 1:
        return f"mask_ratio={ratio} would keep nothing or is no share: set it from 0 to below 1"
    if reconstruct and num_kept(num_patches, ratio) == num_patches:
        return (
            f"mask_ratio={ratio} keeps all {num_patches} patches, so nothing is left to reconstruct: raise it, or set "
            "objective.weights.reconstruction=0"
        )
    return None


def mask_from_scores(scores: Tensor, num_keep: int) -> Mask:
    """Keep the patches with the smallest scores; of equal scores the first.

    Args:
        scores: (B, L).
        num_keep: K, the same for every picture.
    """
    order = scores.argsort(dim=1, stable=True)
    ids_restore = order.argsort(dim=1)
    return Mask(order[:, :num_keep], order[:, num_keep:], ids_restore, (ids_restore >= num_keep).float())


def random_scores(seed: Tensor, num_patches: int, *, view: int = 0) -> Tensor:
    """Noise: (B,) int64 -> (B, L) in [0, 1)."""
    return uniform(seed, num_patches, stream=MASK_STREAM + view)


def block_scores(seed: Tensor, grid: tuple[int, int], *, view: int = 0) -> Tensor:
    """Nearness to a random point, so that the removed patches are a block round it.

    The block is a rectangle as far as the picture's edge does not cut it; its height by width is drawn
    log-uniformly from [0.3, 1 / 0.3], the range of BEiT's blocks (Bao et al., 2021, arXiv 2106.08254).

    Args:
        seed: (B,) int64.
        grid: rows and columns of patches.
        view: which view's mask it is.

    Returns:
        (B, L), highest at the point.
    """
    rows, columns = grid
    draws = uniform(seed, 3 + rows * columns, stream=MASK_STREAM + view)
    ratio = torch.exp((2 * draws[:, 2] - 1) * math.log(1 / 0.3)).sqrt()[:, None]
    y, x = torch.arange(rows, device=seed.device), torch.arange(columns, device=seed.device)
    down = (y - draws[:, :1] * rows + 0.5).abs() / ratio  # (B, h)
    across = (x - draws[:, 1:2] * columns + 0.5).abs() * ratio  # (B, w)
    distance = torch.maximum(down[:, :, None], across[:, None, :]).flatten(1)
    return -distance - 1e-4 * draws[:, 3:]  # noise decides among the equally far


def text_scores(similarity: Tensor, seed: Tensor, *, view: int = 0) -> Tensor:
    """Similarity to the caption, so that the patches most like it are removed.

    Args:
        similarity: (B, L) cosines; without gradient here.
        seed: (B,) int64; noise of 1e-6 decides among patches that are equally similar.
        view: which view's mask it is.

    Returns:
        (B, L).
    """
    return similarity.detach().float() + 1e-6 * random_scores(seed, similarity.shape[1], view=view)


def patch_similarity(features: Tensor, text: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosine of every patch with the picture's text.

    Args:
        features: (B, D, h, w) of patches in the space shared with texts.
        text: (B, D).
        grid: rows and columns wanted; the map of cosines is interpolated to them (bilinearly) where it has others.

    Returns:
        (B, L), row-major.
    """
    with full_precision(features):
        cosine = torch.einsum("bdhw,bd->bhw", F.normalize(features.float(), dim=1), F.normalize(text.float(), dim=1))
    if cosine.shape[1:] != grid:
        cosine = F.interpolate(cosine[:, None], grid, mode="bilinear", align_corners=False)[:, 0]
    return cosine.flatten(1)


def encode_kept(vit: nn.Module, images: Tensor, ids_keep: Tensor) -> Tensor:
    """Run a timm ViT on some of its patches: the others are dropped after their positions were added.

    timm's own place for that, ``patch_drop``, does it, so the model stays as it is, with its names and options.

    Args:
        vit: a timm ``VisionTransformer``.
        images: (B, 3, H, W).
        ids_keep: (B, K) int64, positions of the kept patches, row-major.

    Returns:
        (B, P + K, D): class token and registers, then the kept patches in the order of ``ids_keep``, after the last
        norm. ``vit.forward_head`` pools them.
    """
    model: Any = vit

    def encode(images: Tensor, ids_keep: Tensor) -> Tensor:
        def drop(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
            return take(tokens, ids_keep, num_prefix_tokens=model.num_prefix_tokens)

        hook = model.patch_drop.register_forward_hook(drop)
        try:
            return model.forward_features(images)
        finally:
            hook.remove()

    return in_slices(vit, encode, images, ids_keep)  # of pictures and of their masks alike


def take(tokens: Tensor, ids: Tensor, *, num_prefix_tokens: int = 0) -> Tensor:
    """Pick patches by position, after those tokens that come before them.

    Args:
        tokens: (B, P + L, D).
        ids: (B, K) int64, of patches, from 0.
        num_prefix_tokens: P, of class token and registers.

    Returns:
        (B, P + K, D).
    """
    prefix = torch.arange(num_prefix_tokens, device=ids.device).expand(len(ids), -1)
    places = torch.cat([prefix, ids + num_prefix_tokens], dim=1)
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))


def vit_fault(vit: nn.Module, image_size: int | None = None) -> str | None:
    """What keeps a backbone from being masked, or None.

    Args:
        vit: the backbone.
        image_size: side of the views in pixels; None: what the backbone was made for.
    """
    model: Any = vit
    needed = ("patch_embed", "patch_drop", "pos_embed", "num_prefix_tokens", "forward_features", "norm")
    if any(getattr(model, name, None) is None for name in needed):
        return f"{type(vit).__name__} has no patch tokens to mask: set backbone to a timm ViT"
    if isinstance(model.norm, nn.Identity):
        return f"{type(vit).__name__} normalises after pooling, so its patches stay as they are: set fc_norm=false"
    if not isinstance(model.patch_drop, nn.Identity):
        return f"{type(vit).__name__} drops patches of its own: leave patch_drop_rate out"
    sides = model.patch_embed.img_size if image_size is None else (image_size, image_size)
    (patch, width), side = model.patch_embed.patch_size, model.patch_embed.img_size[0]
    if patch != width:
        return f"{type(vit).__name__} has patches of {patch} x {width} pixels: set backbone to a ViT with square ones"
    for given in sides:
        if given % patch:
            return f"patches of {patch} pixels do not fill an image of {given}: set image_size to a multiple of {patch}"
        if given != side:
            return f"the views have {given} pixels and the backbone was made for {side}: set both to image_size"
    return None


def masking_fault(masking: str, scorer: bool, *, text: bool) -> str | None:
    """What is wrong with the way in which patches are chosen, or None.

    Args:
        masking: ``random``, ``block`` or ``text``.
        scorer: whether there is a frozen scorer.
        text: whether the flow contrasts with a text tower, which then can score.
    """
    if masking not in ("random", "block", "text"):
        return f"objective.masking is '{masking}'; set it to random, block or text"
    if masking == "text" and not scorer and not text:
        return (
            "objective.masking=text has nothing that knows captions: set scorer to open_clip:NAME/TAG or a run folder, "
            "or give objective.text and a weight of contrast"
        )
    if masking != "text" and scorer:
        return f"objective.scorer is for objective.masking=text, and masking is {masking}: set one of the two"
    return None
