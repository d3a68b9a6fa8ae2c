"""Masked autoencoding with contrast: MAE, MAE with image-text contrast and text-guided masking, contrastive MAE."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from repr.batch import Batch, StepOutput
from repr.distributed import all_reduce, gather, world_size
from repr.drawing import Show
from repr.losses.chance import at_chance
from repr.losses.contrastive import clip, nt_xent
from repr.losses.reconstruction import masked_mse, normalize_patches, patchify
from repr.models.backbone import feature_map, width_of
from repr.models.decoder import Decoder, fix_positions
from repr.models.heads import mlp
from repr.models.masking import (
    Mask,
    block_scores,
    encode_kept,
    mask_from_scores,
    masking_fault,
    num_kept,
    patch_similarity,
    random_scores,
    ratio_fault,
    take,
    text_scores,
    vit_fault,
)
from repr.models.slicing import in_slices
from repr.objectives.base import Objective
from repr.objectives.masked_pictures import draw
from repr.objectives.views import view_sizes
from repr.optim import Optim

Masking = Literal["random", "block", "text"]
Scorer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # pictures and tokens -> features of patches and of captions


class MaskedContrast(Objective):
    """A ViT sees some patches of a picture; the others are rebuilt, and what it saw is compared with others.

    Methods: MAE (He et al., 2021, arXiv 2111.06377); MAE with image-text contrast, with random or with text-guided
    masking (after the video method of arXiv 2408.00759); contrastive MAE, two masked views of a picture (as in CAN,
    Mishra et al., 2022, arXiv 2210.16870, without its noise).

    Flow: view(s) -> patches -> mask -> backbone on the kept patches alone, one pass for all views -> decoder -> pixels
    of the removed ones; and ``backbone.forward_head`` of the kept ones -> ``image_projection`` against the text tower,
    or -> head, one view against the other. With ``text`` the first view counts, without it and with a weight on
    ``contrast`` the first two. Text-guided masking removes the patches most similar to the caption, by a frozen
    ``scorer``, or else by the flow's own towers, whose image projection is linear, so that it fits patches too.

    BatchNorm is in the head of two views alone and sees all views and ranks. Gathered: what is contrasted. Reduced: the
    reconstruction loss, whose gradient comes from a rank's own rows. Masks are a function of ``batch["seed"]``.

    Terms: ``reconstruction``, ``contrast`` (CLIP's loss with ``text``, else NT-Xent).

    Args:
        backbone: a timm ``VisionTransformer`` without classifier. What it pools (``global_pool``) is what is contrasted
            and evaluated; for the mean of patches with the last norm before it set ``fc_norm=false`` too.
        text: text encoder with ``output_dim``, (B, L) -> (B, output_dim); None: no image-text contrast.
        masking: ``random``, ``block`` or ``text``.
        mask_ratio: share of removed patches; :func:`repr.models.masking.num_kept` says how many are kept.
        scorer: for ``masking=text``, frozen, ``(images (B, 3, S, S), tokens (B, L)) -> (B, D, h, w), (B, D)``, such as
            :class:`repr.runs.scorer.PatchScorer`; None: the flow's own towers.
        normalize_target: whether each patch is brought to mean 0 and variance 1 before it is compared.
        positions: ``sincos`` replaces the backbone's positions by MAE's fixed ones; ``learned`` leaves them.
        decoder_dim: width of the decoder.
        decoder_depth: its blocks.
        decoder_heads: heads of each.
        hidden_dim: hidden width of the head for two views, three layers.
        dim: width of its embedding.
        temperature: initial temperature; the logits are cosines divided by it.
        learn_temperature: whether it is a parameter.
        temperature_range: bounds to which it is clamped after every step.
        chunk_size: rows of the matrix of pairs that exist at a time; None: all.
        weights: weight of each term; the default is plain MAE.
        optim: optimizer and schedule.

    Raises:
        ValueError: a backbone that cannot be masked, or options that do not go together.
    """

    TERMS = ("reconstruction", "contrast")
    PAIRWISE = ("contrast",)
    ENCODERS = ("backbone", "text", "decoder")

    def __init__(
        self,
        backbone: nn.Module,
        *,
        text: nn.Module | None = None,
        masking: Masking = "random",
        mask_ratio: float = 0.75,
        scorer: Scorer | None = None,
        normalize_target: bool = True,
        positions: Literal["sincos", "learned"] = "sincos",
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        hidden_dim: int = 2048,
        dim: int = 128,
        temperature: float = 0.07,
        learn_temperature: bool = True,
        temperature_range: tuple[float, float] = (0.01, 1.0),
        chunk_size: int | None = None,
        weights: Mapping[str, float] | None = None,
        optim: Optim | None = None,
    ) -> None:
        super().__init__(backbone, weights={"reconstruction": 1.0} if weights is None else weights, optim=optim)
        low, high = temperature_range
        if not 0 < low <= temperature <= high:
            raise ValueError(f"objective.temperature={temperature} lies outside temperature_range=({low}, {high})")
        if positions not in ("sincos", "learned"):
            raise ValueError(f"objective.positions is '{positions}'; set it to sincos or learned")
        contrast, reconstruct = "contrast" in self.weights, "reconstruction" in self.weights
        if fault := vit_fault(backbone) or masking_fault(
            masking, scorer is not None, text=contrast and text is not None
        ):
            raise ValueError(fault)
        vit: Any = backbone
        self.grid: tuple[int, int] = vit.patch_embed.grid_size
        num_patches = self.grid[0] * self.grid[1]
        if fault := ratio_fault(num_patches, mask_ratio, reconstruct=reconstruct):
            raise ValueError(f"objective.{fault}")
        self.masking, self.num_keep, self.chunk_size = masking, num_kept(num_patches, mask_ratio), chunk_size
        self.patch_size, self.normalize_target = int(vit.patch_embed.patch_size[0]), normalize_target
        if positions == "sincos":
            fix_positions(vit)
        width = width_of(vit)
        self.decoder = None
        if reconstruct:
            sizes: Any = {"dim": decoder_dim, "depth": decoder_depth, "num_heads": decoder_heads}
            sizes["num_prefix_tokens"] = vit.num_prefix_tokens
            self.decoder = Decoder(width, self.grid, 3 * self.patch_size**2, **sizes)
        self.text = text if contrast else None
        self.image_projection = self.head = None
        if self.text is not None:
            self.image_projection = nn.Linear(width, width_of(self.text, "output_dim"), bias=False)
            nn.init.normal_(self.image_projection.weight, std=width**-0.5)  # as in CLIP
        elif contrast:
            self.head = mlp([width, hidden_dim, hidden_dim, dim])
        if contrast:
            self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)), learn_temperature)
        self.log_scale_range = (-math.log(high), -math.log(low))
        self.num_views = 2 if self.head is not None else 1
        self.scorer = scorer

    @classmethod
    def config_faults(cls, cfg: Any) -> Iterator[str]:
        """A backbone, ratio, scorer or views that do not fit, and captions that are missing."""
        options, sizes = cfg.objective, view_sizes(cfg)
        weights = options.get("weights") or {"reconstruction": 1.0}
        contrast, has_text = bool(weights.get("contrast")), options.get("text") is not None
        masking, scorer = options.get("masking", "random"), (options.get("scorer") or {}).get("source")
        if contrast and not has_text and (len(sizes) < 2 or sizes[0] != sizes[1]):
            yield f"without text, contrast is between two views of one size, and views has {sizes}: set views=simclr"
        if fault := masking_fault(masking, bool(scorer), text=contrast and has_text):
            yield fault
        needs_captions = masking == "text" or (contrast and has_text)
        if needs_captions and cfg.data.get("tokenizer") is None:
            yield f"{cls.__name__} reads captions here, and tokenizer is null: set it, or objective=mae"
        if (cfg.get("eval") or {}).get("zero_shot") and not (contrast and has_text):
            yield "eval.zero_shot needs text, and this objective encodes images only: set eval=images tokenizer=null"
        if cfg.backbone["_target_"] != "repr.models.backbone.backbone":
            return  # the flow itself looks at it
        if cfg.backbone.get("pretrained") and options.get("positions", "sincos") == "sincos":
            yield "objective.positions=sincos would replace those of backbone.pretrained=true: set it to learned"
        with torch.device("meta"):
            vit: Any = instantiate(cfg.backbone, pretrained=False)
        if fault := vit_fault(vit, sizes[0]):
            yield f"backbone.name={cfg.backbone.name}: {fault}"
            return
        reconstruct, ratio = bool(weights.get("reconstruction")), options.get("mask_ratio", 0.75)
        if fault := ratio_fault(vit.patch_embed.num_patches, ratio, reconstruct=reconstruct):
            yield f"objective.{fault}"

    def encode_image(self, images: Tensor) -> Tensor:
        """All patches, nothing masked: (B, 3, H, W) -> (B, D), not normalised."""
        return self.embed(Batch(image=images))["image"]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D), not normalised.

        Raises:
            ValueError: the flow has no text tower.
        """
        if self.text is None:
            raise ValueError("this objective encodes images only: set objective=mae_clip, or eval=images")
        return self.text(tokens)

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        """Embeddings of unmasked pictures.

        ``trunk`` (B, T) is what the backbone pools, and of class token and mean of patches the other one is
        ``trunk.class_token`` or ``trunk.mean_pool``; ``image`` (B, D) and, with captions, ``text`` (B, D).
        """
        vit: Any = self.backbone
        tokens = vit.forward_features(batch["image"])
        trunk = vit.forward_head(tokens)
        embeddings = {"trunk": trunk, "image": trunk}
        if vit.global_pool != "avg":
            embeddings["trunk.mean_pool"] = vit.fc_norm(tokens[:, vit.num_prefix_tokens :].mean(dim=1))
        elif vit.cls_token is not None:
            embeddings["trunk.class_token"] = tokens[:, 0]
        if self.image_projection is not None:
            embeddings["image"] = self.image_projection(trunk)
            if "text" in batch:
                embeddings["text"] = self.encode_text(batch["text"])
        return embeddings

    def step(self, batch: Batch) -> StepOutput:
        """The terms; the gradient of ``reconstruction`` is that of this rank's rows, which DDP averages."""
        images = self._images(batch)  # (V * B, 3, H, W)
        text = None if self.text is None else self.encode_text(_captions(batch)).float()
        mask = self._mask(images, batch, text)[0]
        tokens = encode_kept(self.backbone, images, mask.ids_keep)  # (V * B, P + K, D)
        output = StepOutput({})
        if self.decoder is not None:
            pred = self.decoder(tokens, mask.ids_restore, mask.ids_remove)  # (V * B, L - K, p * p * 3)
            target = take(patchify(images.float(), patch_size=self.patch_size), mask.ids_remove)
            target = normalize_patches(target) if self.normalize_target else target
            loss = masked_mse(pred, target, torch.ones_like(pred[..., 0]))
            output.terms["reconstruction"] = all_reduce(loss) / world_size()
        if "contrast" in self.weights:
            output.terms["contrast"], features = self._contrast(cast(Any, self.backbone).forward_head(tokens), text)
            output.embeddings.update(features)
            output.logs["temperature"] = (-self.logit_scale.detach()).exp()
        return output

    def _contrast(self, pooled: Tensor, text: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Of pooled kept patches (V * B, D) and texts, gathered: the loss and the features that it compared."""
        scale = self.logit_scale.exp()
        if self.image_projection is not None and text is not None:
            image, text = gather(self.image_projection(pooled).float()), gather(text)  # (N, D)
            return clip(image, text, logit_scale=scale, chunk_size=self.chunk_size), {"image": image, "text": text}
        assert self.head is not None
        a, b = (gather(view) for view in self.head(pooled).float().chunk(2))  # (N, D)
        return nt_xent(a, b, temperature=1 / scale, chunk_size=self.chunk_size), {"embedding": a}

    def _images(self, batch: Batch) -> Tensor:
        """The views that are masked, one below the other: (V * B, 3, H, W)."""
        if "seed" not in batch:
            raise ValueError('masks are drawn from batch["seed"]: give (B,) int64, other numbers in every epoch')
        views = batch["views"][: self.num_views]
        size = cast(Any, self.backbone).patch_embed.img_size
        if len(views) < self.num_views or any(view.shape[2:] != size for view in views):
            shapes = [tuple(view.shape[2:]) for view in views]
            raise ValueError(f"{self.num_views} view(s) of {size} pixels are masked, and the batch has {shapes}")
        return torch.cat(views)

    def _mask(self, images: Tensor, batch: Batch, text: Tensor | None) -> tuple[Mask, Tensor | None]:
        """A mask a row of ``images``, and for text-guided masking the similarities (V * B, L) it comes from."""
        seed, views = batch["seed"], range(self.num_views)
        similarity = None
        if self.masking == "random":
            scores = [random_scores(seed, self.grid[0] * self.grid[1], view=view) for view in views]
        elif self.masking == "block":
            scores = [block_scores(seed, self.grid, view=view) for view in views]
        else:
            similarity = self._similarity(images, _captions(batch).repeat(self.num_views, 1), text)
            parts = similarity.chunk(self.num_views)
            scores = [text_scores(part, seed, view=view) for view, part in zip(views, parts, strict=True)]
        return mask_from_scores(torch.cat(scores), self.num_keep), similarity

    @torch.no_grad()
    def _similarity(self, images: Tensor, tokens: Tensor, text: Tensor | None) -> Tensor:
        """Cosine of every patch with the caption, (V * B, L)."""
        if self.scorer is not None:
            patches, captions = in_slices(self.backbone, self.scorer, images, tokens)
            return patch_similarity(patches, captions, self.grid)
        assert self.image_projection is not None and text is not None  # noqa: PT018
        features = self.image_projection(feature_map(self.backbone, images).movedim(1, -1)).movedim(-1, 1)
        return patch_similarity(features, text, self.grid)

    def pictures(self, batch: Batch, show: Show) -> dict[str, Tensor]:
        """``masking``: the pictures, what is visible of them, and what is made of it.

        For text-guided masking the similarity to the caption and the caption too. Of two views the first is drawn.
        """
        images, num = self._images(batch), len(batch["seed"])
        text = None if self.text is None else self.encode_text(_captions(batch)).float()
        mask, similarity = self._mask(images, batch, text)
        pred = None
        if self.decoder is not None:
            pred = self.decoder(encode_kept(self.backbone, images, mask.ids_keep), mask.ids_restore).float()
            if self.normalize_target:  # back to the patch's own brightness, which is not predicted
                patches = patchify(images.float(), patch_size=self.patch_size)
                variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
                pred = pred * (variance + 1e-6).sqrt() + mean
        picture = draw(
            images[:num].float(),
            mask.removed[:num],
            show,
            patch_size=self.patch_size,
            pred=None if pred is None else pred[:num],
            similarity=None if similarity is None else similarity[:num],
            tokens=batch["text"] if self.masking == "text" else None,
        )
        return {"masking": picture}

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """Of the reconstruction only where patches are normalised."""
        loss = nt_xent if self.text is None else clip
        levels = {"contrast": at_chance(loss, num_rows=num_rows, dim=0)}
        if self.normalize_target:
            levels["reconstruction"] = at_chance(masked_mse, num_rows=num_rows, dim=3 * self.patch_size**2)
        return levels

    def update_targets(self) -> None:
        """Clamp the temperature."""
        if "contrast" in self.weights:
            with torch.no_grad():
                self.logit_scale.clamp_(*self.log_scale_range)


def _captions(batch: Batch) -> Tensor:
    if "text" not in batch:
        raise ValueError("MaskedContrast needs captions here: set data.tokenizer and a source that has them")
    return batch["text"]
