"""Masked autoencoders: of one view or two, with and without contrast, and with captions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from repr.batch import Batch, Embeddings, StepOutput
from repr.drawing import Show
from repr.losses.chance import at_chance
from repr.losses.contrastive import clip, nt_xent
from repr.losses.exchange import exchange_of
from repr.losses.precision import precision_of
from repr.models.backbone import every_token, feature_map, width_of
from repr.models.decoder import Decoder
from repr.models.heads import mlp
from repr.models.masking import Masking, project_map
from repr.models.unreached import freeze_unreached
from repr.objectives.base import Objective
from repr.objectives.masked import (
    RANDOM,
    MakeDecoder,
    Masked,
    Positions,
    embed_unmasked,
    encode_visible,
    make_decoder,
    masking_faults,
    reconstruction,
    reconstruction_at_chance,
)
from repr.objectives.masked_pictures import draw
from repr.objectives.negatives import compared_keys, told_keys
from repr.objectives.towers import TwoTowers, captions, text_faults
from repr.objectives.views import view_sizes
from repr.optim import Optim

RECONSTRUCTION = "Mean squared error over the removed patches; lower is better."


class MaskedViews(Objective):
    """A ViT sees some patches of a picture, and a decoder rebuilds the others; two views of a picture may be compared.

    MAE (He et al., 2021, arXiv 2111.06377) has the weight of ``reconstruction`` alone and takes the first view: patches
    -> mask -> backbone on the kept patches alone -> decoder -> pixels of the removed ones
    (:func:`repr.losses.reconstruction.masked_mse`). It has no BatchNorm and gathers nothing.

    Contrastive MAE has a weight of ``contrast`` too and takes the first two views, as CAN does (Mishra et al., 2022,
    arXiv 2210.16870, section 3, here without its noise): both are masked, encoded in one pass and rebuilt, and what the
    backbone pools of the visible patches goes through a head to NT-Xent (:func:`repr.losses.contrastive.nt_xent`).
    BatchNorm is in the head alone and sees both views of all ranks; the loss is that of the global batch.

    Terms: ``reconstruction``, ``contrast``.

    Args:
        backbone: a timm ``VisionTransformer`` without classifier. What it pools (``global_pool``) is what is contrasted
            and evaluated; for the mean of patches with the last norm before it set ``fc_norm=false`` too.
        masking: which patches are removed; text-guided masking needs a scorer.
        decoder: called as :class:`repr.models.decoder.Decoder`, such as a ``functools.partial`` of it.
        positions: ``sincos`` replaces the backbone's positions by MAE's fixed ones; ``learned`` leaves them.
        hidden_dim: hidden width of the head, which has three layers.
        temperature: the cosines are divided by it.
    """

    TERMS = ("reconstruction", "contrast")
    PAIRWISE = ("contrast",)
    ENCODERS = ("backbone", "decoder")
    MEANINGS: ClassVar[dict[str, str]] = Objective.MEANINGS | {
        "reconstruction": RECONSTRUCTION,
        "contrast": "Cross-entropy of finding the other view of a picture among all views; lower is better.",
        "temperature": "By which the cosines of the contrast are divided.",
    }

    def __init__(
        self,
        backbone: nn.Module,
        *,
        masking: Masking = RANDOM,
        decoder: MakeDecoder = Decoder,
        positions: Positions = "sincos",
        hidden_dim: int = 2048,
        dim: int = 128,
        temperature: float = 0.1,
        chunk_size: int | None = None,
        exchange: str = "gather",
        loss_precision: str = "float32",
        false_negatives: str = "keep",
        weights: Mapping[str, float] | None = None,
        optim: Optim | None = None,
    ) -> None:
        super().__init__(backbone, weights=weights, optim=optim)
        self.masking, self.positions = masking, positions
        passing = exchange_of(exchange, self.weights.keys() & set(self.PAIRWISE))
        self.contrast = partial(
            nt_xent, chunk_size=chunk_size, exchange=passing, precision=precision_of(loss_precision)
        )
        self.compared = compared_keys(false_negatives, {"contrast": self.contrast}, self.weights)
        self.decoder = make_decoder(backbone, masking, positions, decoder if "reconstruction" in self.weights else None)
        self.num_views, self.head = 1, None
        if "contrast" not in self.weights:  # nothing is pooled
            freeze_unreached(backbone, type(self).__name__, every_token)
        else:
            if temperature <= 0:
                raise ValueError(f"temperature={temperature}; set it above 0")
            self.num_views, self.head = 2, mlp([width_of(backbone), hidden_dim, hidden_dim, dim])
            self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=False)

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Views that cannot be compared, missing captions, and what every masked flow finds."""
        sizes = view_sizes(cfg)
        if self.head is not None and (len(sizes) < 2 or sizes[0] != sizes[1]):
            yield f"contrast is between two views of one size, and views has {sizes}: set views=simclr"
        if self.masking.kind == "text" and cfg.data.get("tokenizer") is None:
            yield f"{type(self).__name__} reads captions here, and tokenizer is null: set it, or another masking.kind"
        yield from masking_faults(self, cfg)
        yield from super().config_faults(cfg)

    def embed(self, batch: Batch) -> Embeddings:
        """Embeddings of unmasked pictures, see :func:`repr.objectives.masked.embed_unmasked`."""
        return embed_unmasked(self.backbone, batch["image"])

    def step(self, batch: Batch) -> StepOutput:
        """The terms of the global batch."""
        masked = encode_visible(self.backbone, self.masking, batch, num_views=self.num_views)
        output = StepOutput(reconstruction(self.decoder, masked))
        if self.head is not None:
            vit: Any = self.backbone
            a, b = self.head(vit.forward_head(masked.tokens)).float().chunk(2)  # (B, dim)
            keys = told_keys(batch, self.compared, output.logs)
            output.terms["contrast"] = self.contrast(a, b, temperature=1 / self.logit_scale.exp(), **keys)
            output.embeddings["embedding"], output.logs["temperature"] = a, (-self.logit_scale).exp()
        return output

    def pictures(self, batch: Batch, show: Show) -> dict[str, Tensor]:
        """``masking``: the first views, what is visible of them, and what is made of it."""
        masked = encode_visible(self.backbone, self.masking, batch)
        return {"masking": draw(masked, self.decoder, batch.get("text"), show)}

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """Of the reconstruction only where patches are normalised."""
        return {"contrast": at_chance(nt_xent, num_rows=num_rows), **reconstruction_at_chance(self.decoder)}


class MaskedImageText(TwoTowers):
    """A ViT sees some patches of a picture; the others are rebuilt, and what it saw is compared with the caption.

    MAE with CLIP's contrast (after the video method of arXiv 2408.00759, equations 1 to 3): the first view is masked,
    encoded and rebuilt as by :class:`MaskedViews`; what the backbone pools of the visible patches ->
    ``image_projection``, against the text tower, with CLIP's loss (:func:`repr.losses.contrastive.clip`). There is no
    BatchNorm. The loss is that of the global batch. Without a weight of ``reconstruction`` it is CLIP on masked
    pictures, as FLIP (Li et al., 2022, arXiv 2212.00794).

    Text-guided masking (``masking.kind=text``, the same paper): the patches most similar to the caption are removed.
    The similarity is that of a frozen scorer, or else of the flow's own towers, whose image projection is linear, so
    that it fits patches too; they see the whole picture for that, without gradient.

    Terms: ``reconstruction``, ``contrast``.

    Args:
        backbone: as for :class:`MaskedViews`, like ``decoder`` and ``positions``.
        text: as for :class:`repr.objectives.image_text.ImageText`, like all that concerns the temperature.
        masking: which patches are removed; for text-guided masking the flow itself can be the scorer.
        weights: weight of each term; both 1 by default, as in the paper.
    """

    TERMS = ("reconstruction", "contrast")
    PAIRWISE = ("contrast",)
    ENCODERS = ("backbone", "text", "decoder")
    takes_hard_captions = True
    MEANINGS: ClassVar[dict[str, str]] = TwoTowers.MEANINGS | {
        "reconstruction": RECONSTRUCTION,
        "contrast": "Cross-entropy of finding the captions of pictures and the pictures of captions; lower is better.",
    }

    def __init__(
        self,
        backbone: nn.Module,
        text: nn.Module,
        *,
        masking: Masking = RANDOM,
        decoder: MakeDecoder = Decoder,
        positions: Positions = "sincos",
        temperature: float = 0.07,
        learn_temperature: bool = True,
        temperature_range: tuple[float, float] = (0.01, 1.0),
        chunk_size: int | None = None,
        exchange: str = "gather",
        loss_precision: str = "float32",
        false_negatives: str = "keep",
        weights: Mapping[str, float] | None = None,
        optim: Optim | None = None,
    ) -> None:
        super().__init__(backbone, weights=dict.fromkeys(self.TERMS, 1.0) if weights is None else weights, optim=optim)
        if "contrast" not in self.weights:
            raise ValueError("weights.contrast=0 has nothing that knows captions: take MaskedViews (objective=mae)")
        self.masking, self.positions = masking, positions
        passing = exchange_of(exchange, self.PAIRWISE)
        self.contrast = partial(clip, chunk_size=chunk_size, exchange=passing, precision=precision_of(loss_precision))
        self.compared = compared_keys(false_negatives, {"contrast": self.contrast}, self.weights)
        make = decoder if "reconstruction" in self.weights else None
        self.decoder = make_decoder(backbone, masking, positions, make, knows_captions=True)
        self.add_text_tower(text, temperature, temperature_range, learned=learn_temperature)

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Missing captions, and what every masked flow finds."""
        yield from text_faults(type(self).__name__, self.text, cfg)
        yield from masking_faults(self, cfg)
        yield from super().config_faults(cfg)

    def embed(self, batch: Batch) -> Embeddings:
        """As :func:`repr.objectives.masked.embed_unmasked`, but ``image``, and ``text`` of captions, are projected."""
        embeddings = embed_unmasked(self.backbone, batch["image"])
        embeddings.image = self.image_projection(embeddings.trunk)
        embeddings.text = self.encode_text(batch["text"]) if "text" in batch else None
        return embeddings

    def step(self, batch: Batch) -> StepOutput:
        """The terms of the global batch."""
        logs: dict[str, Tensor | float] = {"temperature": (-self.logit_scale.detach()).exp()}
        text, hard = self.encode_captions(batch, logs)
        masked = self._encode_visible(batch, text)
        terms = reconstruction(self.decoder, masked)
        vit: Any = self.backbone
        image = self.image_projection(vit.forward_head(masked.tokens)).float()  # (B, D), like text
        keys = told_keys(batch, self.compared, logs, hard_captions=bool(hard))
        terms["contrast"] = self.contrast(image, text, logit_scale=self.logit_scale.exp(), **hard, **keys)
        return StepOutput(terms, {"image": image, "text": text}, logs=logs)

    def _encode_visible(self, batch: Batch, text: Tensor) -> Masked:
        def score(images: Tensor) -> tuple[Tensor, Tensor]:
            return project_map(self.image_projection, feature_map(self.backbone, images)), text

        return encode_visible(self.backbone, self.masking, batch, scorer=score)

    def pictures(self, batch: Batch, show: Show) -> dict[str, Tensor]:
        """``masking``: the pictures, what is visible of them, and what is made of it.

        For text-guided masking the similarity to the caption and the caption too.
        """
        masked = self._encode_visible(batch, self.encode_text(captions(batch)).float())
        return {"masking": draw(masked, self.decoder, batch["text"], show)}

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """Of the reconstruction only where patches are normalised."""
        contrast = at_chance(clip, num_rows=num_rows, num_extra=self.num_extra(num_rows))
        return {"contrast": contrast, **reconstruction_at_chance(self.decoder)}
