"""Image-text contrast: CLIP, SigLIP, and CLIP with alignment and uniformity terms (CUA, CUAXU)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from repr.batch import Batch, Embeddings, StepOutput
from repr.losses import clustering, contrastive, decorrelation, hypersphere
from repr.losses.chance import at_chance
from repr.losses.exchange import exchange_of
from repr.losses.precision import precision_of
from repr.models.backbone import width_of
from repr.models.heads import Norm, mlp
from repr.objectives.loss_choice import Losses, chosen
from repr.objectives.negatives import compared_keys, told_keys
from repr.objectives.towers import TwoTowers, further_captions, further_faults, takes_extra, text_faults
from repr.objectives.views import view_sizes
from repr.optim import Optim

LOSSES: Losses = {
    "contrast": contrastive.clip,
    "alignment": hypersphere.alignment,
    "uniformity": hypersphere.uniformity,
    "cross_uniformity": hypersphere.cross_uniformity,
    "pairs": contrastive.pairs,
    "correlation": decorrelation.cross_correlation,
    "swapped_pairs": clustering.swapped_pairs,
}


class ImageText(TwoTowers):
    """Two towers on one sphere.

    Methods: CLIP (Radford et al., 2021, arXiv 2103.00020), SigLIP (Zhai et al., 2023, arXiv 2303.15343), CUA and
    CUAXU (Fahim et al., 2024, arXiv 2405.18570), which differ in ``losses`` and ``weights`` alone; NegCLIP
    (Yuksekgonul et al., 2023, arXiv 2210.01936), whose batches have wrong captions besides. With ``every_pair`` it is
    the contrast of distorted views and texts of Fini et al. (2023, arXiv 2305.08675), there beside that of plain ones;
    ``correlation`` and ``swapped_pairs`` are what they call BarLIP and SwALIP.

    Flow: ``views[0] -> backbone -> image_projection``; ``text -> text tower``; then the terms of the global batch in
    float32, for which the losses exchange rows. One view, so BatchNorm sees one batch of it. ``hard_text``, where a
    batch has it, passes the text tower with ``text``, and the contrast compares every image with it, too. With
    ``every_pair`` each of the views and each of ``texts`` takes the place of the view and of ``text``, by itself; a
    term is the mean over all pairs of a view and a text.

    Terms: ``contrast``, ``alignment``, ``uniformity`` (mean of the two modalities), ``cross_uniformity``, ``pairs``
    (which text is whose within rows 2k and 2k + 1 of a process, where the batch says that they are ``mated``),
    ``correlation`` of the features of both, ``swapped_pairs`` (of two views and two ``texts``, with ``every_pair``).

    Args:
        text: text encoder with ``output_dim``, (B, L) -> (B, output_dim), such as
            ``open_clip.transformer.TextTransformer``.
        losses: function of each term where it is not the default. ``contrast`` is called with ``logit_scale`` (and
            ``logit_bias`` if there is one), ``pairs`` with ``logit_scale`` and ``mated``, ``swapped_pairs`` with lists
            of features and ``logit_scale``, the others with features alone.
        temperature: initial temperature; the logits are cosines divided by it.
        learn_temperature: whether it is a parameter.
        temperature_range: bounds to which it is clamped after every step.
        logit_bias: initial bias of the logits (SigLIP); None: none.
        image_token: the token before the patches that is projected, such as 1, a register behind the class token; None:
            what the backbone pools. It needs a timm ViT.
        every_pair: whether every view is compared with every further caption, ``texts``, of which
            ``distorted_captions=shuffled`` makes some; else the first view with ``text``.
        hidden_dim: width of the hidden layers of MLPs with BatchNorm on both towers' features, in place of the linear
            projection; None: that. open_clip knows none of them.
        num_layers: linear layers of such an MLP.
        last_norm: BatchNorm at its end: ``affine``, ``plain`` or None.
        dim: width of its output.
    """

    TERMS = tuple(LOSSES)
    PAIRWISE = ("contrast", "uniformity", "cross_uniformity")
    STATISTICS = ("correlation",)
    EMBEDDINGS = ("image", "trunk", "text")

    def __init__(
        self,
        backbone: nn.Module,
        text: nn.Module,
        *,
        weights: Mapping[str, float] | None = None,
        losses: Losses | None = None,
        temperature: float = 0.07,
        learn_temperature: bool = True,
        temperature_range: tuple[float, float] = (0.01, 1.0),
        logit_bias: float | None = None,
        image_token: int | None = None,
        every_pair: bool = False,
        hidden_dim: int | None = None,
        num_layers: int = 3,
        last_norm: Norm | None = None,
        dim: int = 256,
        chunk_size: int | None = None,
        exchange: str = "gather",
        loss_precision: str = "float32",
        false_negatives: str = "keep",
        optim: Optim | None = None,
    ) -> None:
        super().__init__(backbone, weights=weights, optim=optim)
        passing = exchange_of(exchange, self.weights.keys() & set(self.PAIRWISE))
        self.losses = chosen(
            LOSSES,
            losses,
            pairwise=self.PAIRWISE,
            chunk_size=chunk_size,
            exchange=passing,
            precision=precision_of(loss_precision),
        )
        self.compared = compared_keys(false_negatives, self.losses, self.weights)
        self.every_pair = self.takes_texts = every_pair
        extra = "contrast" in self.weights and takes_extra(self.losses["contrast"])
        self.takes_hard_captions = extra and not every_pair
        self.scaled = bool(self.weights.keys() & {"contrast", "pairs", "swapped_pairs"})  # has a temperature
        self.add_text_tower(text, temperature, temperature_range, learned=self.scaled and learn_temperature)
        self.text_head: nn.Module = nn.Identity()
        self.dim = width_of(text, "output_dim")
        if hidden_dim is not None:
            hidden = [hidden_dim] * (num_layers - 1)
            self.image_projection = mlp([width_of(backbone), *hidden, dim], last_norm=last_norm)
            self.text_head, self.dim = mlp([self.dim, *hidden, dim], last_norm=last_norm), dim
        prefix = getattr(backbone, "num_prefix_tokens", 0)
        if image_token is not None and not 0 <= image_token < prefix:
            raise ValueError(
                f"image_token={image_token}, and the backbone has {prefix} tokens before its patches: set it below "
                "that, or +backbone.reg_tokens=1 of a timm ViT"
            )
        self.image_token = image_token
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(float(logit_bias)), self.scaled)

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Missing captions, and a tower that does not read what the tokenizer gives."""
        yield from text_faults(type(self).__name__, self.text, cfg)
        if self.every_pair:
            yield from further_faults(cfg)
        if "swapped_pairs" in self.weights and not (self.every_pair and len(view_sizes(cfg)) == 2):
            yield "weights.swapped_pairs takes two views and two further captions: set every_pair=true and two views"
        yield from super().config_faults(cfg)

    def setup(self, stage: str) -> None:
        """Refuse to compare pairs where batches from a DataModule of ours have none.

        Raises:
            ValueError: they have none.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and "pairs" in self.weights and getattr(data, "neighbours", self) is None:
            raise ValueError(
                "weights.pairs compares rows with their neighbours, and batches have none: set data.neighbours=items, "
                "procedure=neighbours, or objective.weights.pairs=0"
            )

    def embed(self, batch: Batch) -> Embeddings:
        """Embeddings of an evaluation batch: ``trunk`` (B, T), ``image`` and, with captions, ``text`` (B, D)."""
        trunk, image = self._encode(batch["image"])
        text = self.encode_text(batch["text"]) if "text" in batch else None
        return Embeddings(image=image, trunk=trunk, text=text)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), not normalised."""
        return self._encode(images)[1]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D), not normalised."""
        return self.text_head(super().encode_text(tokens))

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the backbone pools of pictures (B, T), and their embeddings (B, D)."""
        vit: Any = self.backbone
        if self.image_token is None:
            trunk = vit(images)
            return trunk, self.image_projection(trunk)
        tokens = vit.forward_features(images)
        return vit.forward_head(tokens), self.image_projection(tokens[:, self.image_token])

    def step(self, batch: Batch) -> StepOutput:
        """Terms of the global batch."""
        scale = self.logit_scale.exp()
        logs: dict[str, Tensor | float] = {"temperature": 1 / scale.detach()} if self.scaled else {}
        views = batch["views"] if self.every_pair else batch["views"][:1]
        images = [self.encode_image(view).float() for view in views]  # (B, D) each
        texts, hard = self._captions(batch, logs)  # (B, D) each
        keys = told_keys(batch, self.compared, logs, hard_captions=bool(hard))
        options = {"contrast": hard | keys, "pairs": {"mated": batch.get("mated")}}
        terms = {}
        for name in self.weights:
            if name == "swapped_pairs":
                terms[name] = self.losses[name](images, texts, logit_scale=scale)
                continue
            pairs = [self._term(name, *pair, scale, options.get(name, {})) for pair in product(images, texts)]
            terms[name] = torch.stack(pairs).mean()
        return StepOutput(terms, {"image": images[0], "text": texts[0]}, logs=logs)

    def _captions(self, batch: Batch, logs: dict[str, Tensor | float]) -> tuple[list[Tensor], dict[str, Any]]:
        """Of all captions that are compared (B, D), and the arguments of the contrast that are wrong ones."""
        if not self.every_pair:
            text, hard = self.encode_captions(batch, logs)
            return [text], hard
        return [self.encode_text(tokens).float() for tokens in further_captions(batch)], {}

    def _term(self, name: str, image: Tensor, text: Tensor, scale: Tensor, options: dict[str, Any]) -> Tensor:
        loss = self.losses[name]
        if name in ("contrast", "pairs"):
            bias = {} if self.logit_bias is None or name == "pairs" else {"logit_bias": self.logit_bias}
            return loss(image, text, logit_scale=scale, **bias, **options)
        if name == "uniformity":
            return 0.5 * (loss(image) + loss(text))
        return loss(image, text)

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """Of every loss that :mod:`repr.losses` knows a level of; that of SigLIP moves with the learned bias."""
        options: Any = {"dim": self.dim, "num_extra": self.num_extra(num_rows)}
        if self.logit_bias is not None:
            options["logit_bias"] = self.logit_bias
        return {name: at_chance(loss, num_rows=num_rows, **options) for name, loss in self.losses.items()}
