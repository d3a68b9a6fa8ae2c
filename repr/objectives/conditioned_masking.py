"""Masked autoencoders whose encoder reads the caption: Voltron's V-Cond and V-Dual."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from repr.batch import Batch, Embeddings, StepOutput
from repr.distributed import mean
from repr.losses.reconstruction import masked_mse, patchify
from repr.models.backbone import every_token, width_of
from repr.models.decoder import Decoder
from repr.models.fusion import TextReader
from repr.models.masking import Masking, encode_conditioned, take
from repr.models.unreached import freeze_unreached
from repr.objectives.base import Objective
from repr.objectives.masked import (
    RANDOM,
    MakeDecoder,
    Positions,
    embed_unmasked,
    make_decoder,
    masking_faults,
    reconstruction_at_chance,
)
from repr.objectives.towers import captions, text_faults
from repr.objectives.views import view_sizes
from repr.optim import Optim


class ConditionedMasking(Objective):
    """A ViT sees some patches of a picture, and its caption, and a decoder rebuilds the other patches.

    Methods (Karamcheti et al., 2023, arXiv 2302.12766): V-Cond, of one view; V-Dual, of two, which are two frames of a
    film there and two views of a picture here.

    Flow: the first V views -> patches -> one mask for all of them; captions -> text tower -> a linear layer; the kept
    patches of all views and the words, each kind with a learned role -> backbone -> patches alone -> decoder -> pixels
    of the removed ones (:func:`repr.losses.reconstruction.masked_mse`). Padding is not seen. There is no BatchNorm, and
    nothing is gathered. What is evaluated sees whole pictures, and no words.

    The authors' language model is a frozen DistilBERT; ours learns with the rest, or is frozen (``freeze.text=0``).
    Their blocks have RMSNorm, SwiGLU and a scale for each layer; ours are those of the ViT.

    Term: ``reconstruction``.

    Args:
        backbone: as for :class:`repr.objectives.masked_autoencoders.MaskedViews`, like ``decoder`` and ``positions``.
        text: such as :class:`repr.models.fusion.TextReader`.
        num_views: V.
        masking: which patches are removed; not by their likeness to the caption.
    """

    TERMS = ("reconstruction",)
    ENCODERS = ("backbone", "text", "decoder")
    MEANINGS: ClassVar[dict[str, str]] = Objective.MEANINGS | {
        "reconstruction": "Mean squared error over the removed patches; lower is better."
    }

    def __init__(
        self,
        backbone: nn.Module,
        text: TextReader,
        *,
        num_views: int = 1,
        masking: Masking = RANDOM,
        decoder: MakeDecoder = Decoder,
        positions: Positions = "sincos",
        weights: Mapping[str, float] | None = None,
        optim: Optim | None = None,
    ) -> None:
        super().__init__(backbone, weights=weights, optim=optim)
        if num_views < 1:
            raise ValueError(f"num_views={num_views}; set it to 1 or more")
        if not isinstance(text, TextReader):
            raise ValueError(
                f"{type(self).__name__} needs the tokens of captions: set text=reader_small or reader_base"
            )
        if masking.kind == "text":
            raise ValueError("masking.kind=text would hide what the caption tells: set it to random or block")
        make = partial(decoder, num_views=num_views)
        self.decoder = make_decoder(backbone, masking, positions, make)
        freeze_unreached(backbone, type(self).__name__, every_token)
        text.text_projection.requires_grad_(False)  # of what is pooled
        width = width_of(backbone)
        self.masking, self.positions, self.num_views, self.text = masking, positions, num_views, text
        self.words = nn.Linear(text.width, width)
        self.roles = nn.Parameter(0.02 * torch.randn(num_views, 1, width))
        self.word_role = nn.Parameter(0.02 * torch.randn(width))

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Missing captions and views, and what every masked flow finds."""
        sizes = view_sizes(cfg)
        yield from text_faults(type(self).__name__, self.text, cfg)
        if len(sizes) < self.num_views or len(set(sizes[: self.num_views])) > 1:
            yield f"num_views={self.num_views} takes so many of one size, and views has {sizes}: set views=pair"
        if cfg.micro_batch is not None and cfg.micro_batch < self.num_views:
            yield f"micro_batch={cfg.micro_batch} has no place for the {self.num_views} views of a sample: raise it"
        yield from masking_faults(self, cfg)
        yield from super().config_faults(cfg)

    def embed(self, batch: Batch) -> Embeddings:
        """Embeddings of whole pictures, see :func:`repr.objectives.masked.embed_unmasked`."""
        return embed_unmasked(self.backbone, batch["image"])

    def step(self, batch: Batch) -> StepOutput:
        """The error of the rebuilt patches over all ranks."""
        vit: Any = self.backbone
        ids, size = captions(batch), vit.patch_embed.img_size
        if "seed" not in batch:
            raise ValueError('masks are drawn from batch["seed"]: give (B,) int64, other numbers in every epoch')
        views = batch["views"][: self.num_views]
        if len(views) < self.num_views or any(view.shape[2:] != size for view in views):
            shapes = [tuple(view.shape[2:]) for view in views]
            raise ValueError(f"{self.num_views} view(s) of {size} pixels are masked, and the batch has {shapes}")
        mask = self.masking.draw(batch["seed"], vit.patch_embed.grid_size)
        words = self.words(self.text(ids)[1]) + self.word_role
        both = torch.stack(views, 1)  # (B, V, 3, S, S)
        tokens = encode_conditioned(vit, both, mask.ids_keep, words, ids != self.text.pad_id, self.roles)
        assert self.decoder is not None
        pred = self.decoder.forward_views(tokens, mask.ids_restore, mask.ids_remove)
        pred = pred.flatten(0, 1)  # (B * V, L - K, p * p * 3)
        patches = patchify(both.flatten(0, 1).float(), patch_size=vit.patch_embed.patch_size[0])
        target = self.decoder.target(take(patches, mask.ids_remove.repeat_interleave(self.num_views, 0)))
        return StepOutput({"reconstruction": mean(masked_mse(pred, target, torch.ones_like(pred[..., 0])))})

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """Only where patches are normalised."""
        return reconstruction_at_chance(self.decoder)
