"""Which patches of a picture are removed, and a timm ViT on those that are kept.

A mask comes from scores, one a patch: those with the smallest scores are kept. Noise gives random masking, distance
from a point a block, similarity to the caption text-guided masking. Noise comes from the batch's ``seed`` alone, so a
mask depends neither on ranks nor on what was run before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from repr.losses.precision import full_precision
from repr.models.slicing import in_slices
from repr.seeds import uniform

MASK_STREAM = 16  # of the batch's seed; view v draws from stream 16 + v
AMOUNT_STREAM = 32  # likewise, of how many patches a mask token stands for
Scorer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # pictures and tokens -> features of patches and of captions


class Mask(NamedTuple):
    """Which of L patches are kept, for each of B pictures."""

    ids_keep: Tensor  # (B, K) int64, positions of the kept patches, that of the smallest score first
    ids_remove: Tensor  # (B, L - K) int64, positions of the others, likewise
    ids_restore: Tensor  # (B, L) int64: token l of the picture is entry ids_restore[l] of [kept, removed]
    removed: Tensor  # (B, L) float32, 1 = removed, 0 = kept


def num_kept(num_patches: int, ratio: float) -> int:
    """How many patches are kept: ``num_patches * (1 - ratio)``, cut to a whole number, at least 1.

    MAE's code has the same rule, but may keep none. The product is a binary one: 0.9 of 100 patches keeps 9.
    """
    return max(1, int(num_patches * (1 - ratio)))


@dataclass(frozen=True)
class Masking:
    """How many patches of a picture are removed, and which.

    Args:
        kind: ``random``; ``block``, those around a random point; ``text``, those most similar to the caption.
        ratio: share of removed patches; :func:`num_kept` says how many are kept.
        scorer: what knows captions for ``kind=text``, frozen, ``(images (B, 3, S, S), tokens (B, L)) -> (B, D, h, w),
            (B, D)``, such as :class:`repr.runs.scorer.PatchScorer`; None: the towers of the flow itself.

    Raises:
        ValueError: there is no such kind, the ratio is no share below 1, or nothing asks the scorer.
    """

    kind: Literal["random", "block", "text"] = "random"
    ratio: float = 0.75
    scorer: Scorer | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("random", "block", "text"):
            raise ValueError(f"kind is '{self.kind}'; set it to random, block or text")
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} would keep nothing: set it from 0 to below 1")
        if self.kind != "text" and self.scorer is not None:
            raise ValueError(f"scorer is for kind=text, and it is {self.kind}: set one of the two")

    def draw(
        self, seed: Tensor, grid: tuple[int, int], *, num_views: int = 1, similarity: Tensor | None = None
    ) -> Mask:
        """Draw V * B masks, those of the first view first, for B seeds and a ``grid`` of (rows, columns) of patches.

        ``kind=text`` draws them from ``similarity`` (V * B, L), the cosines of :func:`patch_similarity`.
        """
        num_patches, views = grid[0] * grid[1], range(num_views)
        if self.kind == "random":
            scores = [random_scores(seed, num_patches, view=view) for view in views]
        elif self.kind == "block":
            scores = [block_scores(seed, grid, view=view) for view in views]
        else:
            assert similarity is not None
            parts = similarity.chunk(num_views)
            scores = [text_scores(part, seed, view=view) for view, part in zip(views, parts, strict=True)]
        return mask_from_scores(torch.cat(scores), num_kept(num_patches, self.ratio))


@dataclass(frozen=True)
class TokenMasking:
    """Which patches a mask token stands for, and in which pictures: iBOT's masks.

    Args:
        kind: ``block``, those around a random point, or ``random``.
        ratio: least and largest share of a picture's patches; that of each picture is drawn between them.
        share: of the pictures, drawn one by one, that are masked at all.

    Raises:
        ValueError: there is no such kind, or shares are none.
    """

    kind: Literal["block", "random"] = "block"
    ratio: Sequence[float] = (0.1, 0.5)
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in ("block", "random"):
            raise ValueError(f"kind is '{self.kind}'; set it to block or random")
        if not is_range(self.ratio, 1) or self.ratio[1] == 1:
            raise ValueError(f"ratio={self.ratio}; set two numbers between 0 and 1, the smaller first")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} of the pictures; set it above 0, up to 1")

    def draw(self, seed: Tensor, grid: tuple[int, int], *, num_views: int = 1) -> Tensor:
        """V * B masks, those of the first view first, for B seeds: (V * B, L) bool, true for hidden patches.

        A masked picture hides ``ratio * L`` patches, cut to a whole number, at least one.
        """
        num, (least, most) = grid[0] * grid[1], self.ratio
        views = []
        for view in range(num_views):
            draws = uniform(seed, 2, stream=AMOUNT_STREAM + view)
            hidden = ((least + draws[:, 0] * (most - least)) * num).long().clamp(min=1) * (draws[:, 1] < self.share)
            shape = block_scores(seed, grid, view=view) if self.kind == "block" else random_scores(seed, num, view=view)
            rank = shape.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # the nearest first
            views.append(rank < hidden.unsqueeze(1))
        return torch.cat(views)


def is_range(value: Any, most: float) -> bool:
    """Whether this is two numbers above 0, up to ``most``, the smaller first."""
    numbers = isinstance(value, Sequence) and len(value) == 2 and all(isinstance(x, int | float) for x in value)
    return numbers and 0 < value[0] <= value[1] <= most


def mask_from_scores(scores: Tensor, num_keep: int) -> Mask:
    """Keep the K patches with the smallest of the scores (B, L); of equal scores the first."""
    order = scores.argsort(dim=1, stable=True)
    ids_restore = order.argsort(dim=1)
    return Mask(order[:, :num_keep], order[:, num_keep:], ids_restore, (ids_restore >= num_keep).float())


def random_scores(seed: Tensor, num_patches: int, *, view: int = 0) -> Tensor:
    """Noise: (B,) int64 -> (B, L) in [0, 1)."""
    return uniform(seed, num_patches, stream=MASK_STREAM + view)


def block_scores(seed: Tensor, grid: tuple[int, int], *, view: int = 0) -> Tensor:
    """Nearness to a random point, so that the removed patches are a block round it: (B,) int64 -> (B, L).

    The block is a rectangle as far as the picture's edge does not cut it; its height by width is drawn
    log-uniformly from [0.3, 1 / 0.3], the range of BEiT's blocks (Bao et al., 2021, arXiv 2106.08254).
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
    """Cosines with the caption (B, L), without gradient, so that the patches most like it are removed.

    Noise of 1e-6, from the seed (B,), decides among patches that are equally similar.
    """
    return similarity.detach().float() + 1e-6 * random_scores(seed, similarity.shape[1], view=view)


def patch_similarity(features: Tensor, text: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosines (B, L), row-major, of patches (B, D, h, w) with the text (B, D) of their picture.

    Where the map has not the wanted ``grid`` of (rows, columns), the cosines are interpolated bilinearly.
    """
    with full_precision(features):
        cosine = torch.einsum("bdhw,bd->bhw", F.normalize(features.float(), dim=1), F.normalize(text.float(), dim=1))
    if cosine.shape[1:] != grid:
        cosine = F.interpolate(cosine[:, None], grid, mode="bilinear", align_corners=False)[:, 0]
    return cosine.flatten(1)


def project_map(projection: nn.Module, features: Tensor) -> Tensor:
    """Apply a projection of pooled features to each patch: (B, C, h, w) -> (B, D, h, w)."""
    return projection(features.movedim(1, -1)).movedim(-1, 1)


def encode_kept(vit: nn.Module, images: Tensor, ids_keep: Tensor) -> Tensor:
    """Run a timm ViT on some of its patches: the others are dropped after their positions were added.

    timm's own place for that, ``patch_drop``, does it, so the model stays as it is, with its names and options.

    Args:
        vit: a timm ``VisionTransformer``; its ``forward_head`` pools what this gives.
        images: (B, 3, H, W).
        ids_keep: (B, K) int64, positions of the kept patches, row-major.

    Returns:
        (B, P + K, D), after the last norm: class token and registers, then the patches in the order of ``ids_keep``.
    """
    model: Any = vit

    def encode(images: Tensor, ids_keep: Tensor) -> Tensor:
        def drop(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
            return take(tokens, ids_keep, num_prefix_tokens=model.num_prefix_tokens)

        return _hooked(model.patch_drop, drop, model.forward_features, images)

    return in_slices(vit, encode, images, ids_keep)  # of pictures and of their masks alike


def encode_conditioned(
    vit: nn.Module, views: Tensor, ids_keep: Tensor, words: Tensor, seen: Tensor, roles: Tensor
) -> Tensor:
    """Run a timm ViT on some patches of views and on words, all of which see each other.

    Args:
        vit: a timm ``VisionTransformer``.
        views: (B, V, 3, H, W), of each sample.
        ids_keep: (B, K) int64, positions of the patches that are kept of each view.
        words: (B, N, D), which take no positions.
        seen: (B, N) bool, words that are no padding.
        roles: (V, 1, D), added to the tokens of each view.

    Returns:
        (B, V, P + K, D), after the last norm, as of :func:`encode_kept`; the words are left out.
    """
    model: Any = vit

    def encode(views: Tensor, ids_keep: Tensor, words: Tensor, seen: Tensor) -> Tensor:
        num = views.shape[1]

        def join(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
            kept = take(tokens, ids_keep.repeat_interleave(num, 0), num_prefix_tokens=model.num_prefix_tokens)
            return torch.cat([(kept.unflatten(0, (-1, num)) + roles.to(kept.dtype)).flatten(1, 2), words], 1)

        patches = seen.new_ones(len(seen), num * (model.num_prefix_tokens + ids_keep.shape[1]))
        mask = torch.cat([patches, seen], 1)[:, None, None]  # (B, 1, 1, all)
        run = partial(model.forward_features, attn_mask=mask)
        return _hooked(model.patch_drop, join, run, views.flatten(0, 1))[:, : patches.shape[1]].unflatten(1, (num, -1))

    return in_slices(vit, encode, views, ids_keep, words, seen, num_views=views.shape[1])


def encode_hidden(vit: nn.Module, images: Tensor, hidden: Tensor, token: Tensor) -> Tensor:
    """Run a timm ViT that sees a token in the place of some patches, before positions are added.

    Args:
        vit: a timm ``VisionTransformer``; its ``forward_head`` pools what this gives.
        images: (B, 3, H, W).
        hidden: (B, L) bool, row-major.
        token: (D,), learned.

    Returns:
        (B, P + L, D), after the last norm.
    """
    model: Any = vit

    def encode(images: Tensor, hidden: Tensor) -> Tensor:
        def hide(module: nn.Module, inputs: Any, patches: Tensor) -> Tensor:  # (B, L, D), or (B, h, w, D)
            return torch.where(hidden.view(*patches.shape[:-1], 1), token.to(patches.dtype), patches)

        return _hooked(model.patch_embed, hide, model.forward_features, images)

    return in_slices(vit, encode, images, hidden)


def _hooked(module: nn.Module, hook: Callable[..., Tensor], function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """What a function gives while a hook changes the output of a module."""
    handle = module.register_forward_hook(hook)
    try:
        return function(*inputs)
    finally:
        handle.remove()


def take(tokens: Tensor, ids: Tensor, *, num_prefix_tokens: int = 0) -> Tensor:
    """Keep the P prefix tokens and the patches ``ids`` (B, K), counted from 0: (B, P + L, D) -> (B, P + K, D)."""
    prefix = torch.arange(num_prefix_tokens, device=ids.device).expand(len(ids), -1)
    places = torch.cat([prefix, ids + num_prefix_tokens], dim=1)
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))


def vit_fault(vit: nn.Module) -> str | None:
    """What keeps a backbone from being masked, or None."""
    model: Any = vit
    needed = ("patch_embed", "patch_drop", "pos_embed", "num_prefix_tokens", "forward_features", "norm")
    if any(getattr(model, name, None) is None for name in needed):
        return f"{type(vit).__name__} has no patch tokens to mask: set backbone to a timm ViT"
    if isinstance(model.norm, nn.Identity):
        return f"{type(vit).__name__} normalises after pooling, so its patches stay as they are: set fc_norm=false"
    if not isinstance(model.patch_drop, nn.Identity):
        return f"{type(vit).__name__} drops patches of its own: leave patch_drop_rate out"
    (patch, width), sides = model.patch_embed.patch_size, model.patch_embed.img_size
    if patch != width or sides[0] != sides[1]:
        return f"{type(vit).__name__} cuts {sides} pixels into {patch} x {width}: set backbone to a ViT of square ones"
    cut: Any = getattr(model.patch_embed, "proj", None)
    if not isinstance(cut, nn.Conv2d) or (cut.in_channels, cut.stride) != (3, cut.kernel_size):
        return (
            f"{type(vit).__name__} has convolutions before its patches, which would see what is removed: set "
            "backbone.name to a ViT that is none of timm's hybrids, such as vit_small_patch16_224"
        )
    if sides[0] % patch:
        return f"patches of {patch} pixels do not fill an image of {sides[0]}: set image_size to a multiple of {patch}"
    return None
