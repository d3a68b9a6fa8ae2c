"""What masked flows share: a ViT on the visible patches, the error of the rebuilt ones, embeddings, checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from repr.batch import Batch, Embeddings
from repr.distributed import mean
from repr.losses.chance import at_chance
from repr.losses.reconstruction import masked_mse, patchify
from repr.models.backbone import width_of
from repr.models.decoder import Decoder, fix_positions
from repr.models.masking import Mask, Masking, encode_kept, num_kept, patch_similarity, take, vit_fault
from repr.models.slicing import in_slices
from repr.objectives.towers import captions
from repr.objectives.views import view_sizes

Positions = Literal["sincos", "learned"]
MakeDecoder = Callable[..., Decoder]
RANDOM = Masking()


class Masked(NamedTuple):
    """Pictures of which a ViT has seen some patches; of V views of B samples, the first view's rows first."""

    images: Tensor  # (V * B, 3, S, S)
    mask: Mask
    tokens: Tensor  # (V * B, P + K, D), of class token, registers and visible patches
    similarity: Tensor | None  # (V * B, L), cosine of every patch with the caption, in text-guided masking
    patch_size: int  # side of a patch in pixels


def make_decoder(
    vit: Any, masking: Masking, positions: Positions, make: MakeDecoder | None, *, knows_captions: bool = False
) -> Decoder | None:
    """Check that a timm ViT can be masked so, fix its positions if asked to, and build the decoder that goes with it.

    Args:
        vit: a timm ``VisionTransformer``.
        masking: which patches are removed.
        positions: ``sincos`` replaces the ViT's positions by MAE's fixed ones; ``learned`` leaves them.
        make: called as :class:`repr.models.decoder.Decoder`; None: nothing is rebuilt.
        knows_captions: whether the flow itself can tell how similar a patch and a caption are.

    Raises:
        ValueError: the ViT cannot be masked, or the options do not go together.
    """
    prepare_vit(vit, positions)
    if masking.kind == "text" and masking.scorer is None and not knows_captions:
        raise ValueError(
            "masking.kind=text has nothing that knows captions: set scorer to open_clip:NAME/TAG or a run "
            "folder, or objective=mae_clip_tgm"
        )
    if make is not None and num_kept(vit.patch_embed.num_patches, masking.ratio) == vit.patch_embed.num_patches:
        raise ValueError(
            f"masking.ratio={masking.ratio} keeps all {vit.patch_embed.num_patches} patches, so nothing is "
            "left to reconstruct: raise it, or set weights.reconstruction=0"
        )
    if make is None:
        return None
    patch_dim = 3 * vit.patch_embed.patch_size[0] ** 2
    return make(width_of(vit), vit.patch_embed.grid_size, patch_dim, num_prefix_tokens=vit.num_prefix_tokens)


def prepare_vit(vit: Any, positions: Positions) -> None:
    """Check that a timm ViT can be masked, and fix its positions if asked to.

    Raises:
        ValueError: it cannot be masked, or there are no such positions.
    """
    if positions not in ("sincos", "learned"):
        raise ValueError(f"positions is '{positions}'; set it to sincos or learned")
    if fault := vit_fault(vit):
        raise ValueError(fault)
    if positions == "sincos":
        fix_positions(vit)


def encode_visible(
    vit: Any,
    masking: Masking,
    batch: Batch,
    *,
    num_views: int = 1,
    scorer: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Masked:
    """Mask the first V views of a batch by its ``seed``, and encode what is left of all in one pass.

    Text-guided masking reads ``text`` too; where it has no scorer, the flow gives its own, pictures -> features of
    patches and of their captions.

    Raises:
        ValueError: the batch lacks something.
    """
    if "seed" not in batch:
        raise ValueError('masks are drawn from batch["seed"]: give (B,) int64, other numbers in every epoch')
    views, grid, size = batch["views"][:num_views], vit.patch_embed.grid_size, vit.patch_embed.img_size
    if len(views) < num_views or any(view.shape[2:] != size for view in views):
        shapes = [tuple(view.shape[2:]) for view in views]
        raise ValueError(f"{num_views} view(s) of {size} pixels are masked, and the batch has {shapes}")
    images, similarity = torch.cat(views), None
    if masking.kind == "text":
        with torch.no_grad():
            if masking.scorer is not None:
                patches, texts = in_slices(vit, masking.scorer, images, captions(batch).repeat(num_views, 1))
            else:
                assert scorer is not None
                patches, texts = scorer(images)
            similarity = patch_similarity(patches, texts, grid)
    mask = masking.draw(batch["seed"], grid, num_views=num_views, similarity=similarity)
    return Masked(images, mask, encode_kept(vit, images, mask.ids_keep), similarity, vit.patch_embed.patch_size[0])


def reconstruction(decoder: Decoder | None, masked: Masked) -> dict[str, Tensor]:
    """The term ``reconstruction``, where there is a decoder: the error of the rebuilt patches over all ranks.

    Its gradient comes from a rank's own rows, and DDP averages.
    """
    if decoder is None:
        return {}
    mask = masked.mask
    pred = decoder(masked.tokens, mask.ids_restore, mask.ids_remove)  # (V * B, L - K, p * p * 3)
    patches = take(patchify(masked.images.float(), patch_size=masked.patch_size), mask.ids_remove)
    loss = masked_mse(pred, decoder.target(patches), torch.ones_like(pred[..., 0]))
    return {"reconstruction": mean(loss)}


def reconstruction_at_chance(decoder: Decoder | None) -> dict[str, float | Tensor | None]:
    """The level of ``reconstruction``, which there is where patches are normalised."""
    if decoder is None or not decoder.normalize_target:
        return {}
    return {"reconstruction": at_chance(masked_mse, dim=decoder.predict.out_features)}


def embed_unmasked(vit: Any, images: Tensor) -> Embeddings:
    """Embed whole pictures: ``trunk`` and ``image`` (B, D) are what the ViT pools of them.

    Of class token and mean of patches the other one is the pooling ``class_token`` or ``mean_pool``.
    """
    tokens = vit.forward_features(images)
    trunk = vit.forward_head(tokens)
    embeddings = Embeddings(image=trunk, trunk=trunk)
    if vit.global_pool != "avg":
        embeddings.poolings["mean_pool"] = vit.fc_norm(tokens[:, vit.num_prefix_tokens :].mean(dim=1))
    elif vit.cls_token is not None:
        embeddings.poolings["class_token"] = tokens[:, 0]
    return embeddings


def masking_faults(flow: Any, cfg: Any) -> Iterator[str]:
    """What a masked flow finds wrong in the views, the backbone and the scorer of a config."""
    if cfg.backbone.get("pretrained") and flow.positions == "sincos":
        yield "objective.positions=sincos would replace those of backbone.pretrained=true: set it to learned"
    side, sizes = flow.backbone.patch_embed.img_size[0], view_sizes(cfg)
    if not sizes:
        yield f"{type(flow).__name__} masks a view, and views is empty: set views=mae"
    elif side != sizes[0]:
        yield f"the views have {sizes[0]} pixels and the backbone was made for {side}: set both to image_size"
    if find := getattr(getattr(getattr(flow, "masking", None), "scorer", None), "config_faults", None):
        yield from find(cfg)
