"""Pictures and captions that predict each other without negatives: SimSiam and BYOL between two towers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from repr.batch import Batch, StepOutput
from repr.losses.exchange import GATHER
from repr.losses.momentum import regression
from repr.models.backbone import width_of
from repr.models.batchnorm import synchronise
from repr.models.heads import Norm, mlp
from repr.models.teacher import Teacher
from repr.objectives.base import Objective
from repr.objectives.loss_choice import Losses, chosen
from repr.objectives.towers import captions, further_captions, further_faults, pooled_text, text_faults
from repr.optim import Optim


class CrossModal(Objective):
    """What the student makes of a picture predicts what its teacher makes of the caption, and the reverse.

    Methods: SiamLIP and BYOLIP (Fini et al., 2023, arXiv 2305.08675), beside a contrast as a part of a hybrid; nothing
    here keeps pictures apart from each other but predictor and teacher.

    Flow: ``views[0] -> backbone`` and ``text -> text tower``, each -> projector -> predictor of its modality: queries;
    the same towers and projectors of the teacher: keys. With ``every_pair`` each of the views and each of ``texts``
    takes the place of the view and of ``text``, by itself. BatchNorm sees one view at a time, of all ranks; the teacher
    has statistics of its own.

    Terms: ``regression``, the squared distance of directions of a query and the key of the other modality, a mean over
    pairs and both ways.

    Args:
        text: text encoder with ``output_dim``, (B, L) -> (B, output_dim).
        num_layers: linear layers of the projectors.
        last_norm: BatchNorm at their end: ``affine``, ``plain`` or None.
        momentum: of the teacher, throughout; None: the student is its own teacher, without gradient.
        every_pair: whether every view is compared with every further caption, ``texts``, of which
            ``distorted_captions=shuffled`` makes some; else the first view with ``text``.
        losses: function of the term where it is not the default; called with queries and keys (N, D).
    """

    TERMS = ("regression",)
    ENCODERS = ("backbone", "text")
    MEANINGS: ClassVar[dict[str, str]] = Objective.MEANINGS | {
        "regression": "Squared distance from what the teacher makes of the other modality; lower is better."
    }

    def __init__(
        self,
        backbone: nn.Module,
        text: nn.Module,
        *,
        hidden_dim: int = 2048,
        dim: int = 128,
        num_layers: int = 2,
        last_norm: Norm | None = "plain",
        momentum: float | None = 0.99,
        every_pair: bool = False,
        weights: Mapping[str, float] | None = None,
        losses: Losses | None = None,
        optim: Optim | None = None,
    ) -> None:
        width = width_of(backbone)
        super().__init__(synchronise(backbone), weights=weights, optim=optim)
        self.losses = chosen({"regression": regression}, losses, exchange=GATHER)
        self.every_pair = self.takes_texts = every_pair
        self.text = text
        hidden = [hidden_dim] * (num_layers - 1)
        self.image_projector = mlp([width, *hidden, dim], last_norm=last_norm)
        self.text_projector = mlp([width_of(text, "output_dim"), *hidden, dim], last_norm=last_norm)
        self.image_predictor, self.text_predictor = mlp([dim, hidden_dim, dim]), mlp([dim, hidden_dim, dim])
        if momentum is not None:
            self.teacher = Teacher(
                momentum=momentum,
                backbone=self.backbone,
                text=text,
                image_projector=self.image_projector,
                text_projector=self.text_projector,
            )

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Missing captions, and a tower that does not read what the tokenizer gives."""
        yield from text_faults(type(self).__name__, self.text, cfg)
        if self.every_pair:
            yield from further_faults(cfg)
        yield from super().config_faults(cfg)

    def step(self, batch: Batch) -> StepOutput:
        """The term of the global batch."""
        views = batch["views"] if self.every_pair else batch["views"][:1]
        texts = further_captions(batch) if self.every_pair else [captions(batch)]
        images, words = self._project(self, views, texts)  # (B, D) each
        queries = [self.image_predictor(x).float() for x in images], [self.text_predictor(x).float() for x in words]
        if self.teacher is None:
            keys = images, words
        else:
            with torch.no_grad():
                keys = self._project(self.teacher, views, texts)
        loss, terms = self.losses["regression"], []
        for asked, answered in ((queries[0], keys[1]), (queries[1], keys[0])):
            terms += [loss(query, key.detach().float()) for query, key in product(asked, answered)]
        embeddings = {"image": queries[0][0], "text": queries[1][0]}
        return StepOutput({"regression": torch.stack(terms).mean()}, embeddings)

    @staticmethod
    def _project(towers: Any, views: Sequence[Tensor], texts: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Projections of pictures and of captions, (B, D) each."""
        images = [towers.image_projector(towers.backbone(view)) for view in views]
        return images, [towers.text_projector(pooled_text(towers.text, tokens)) for tokens in texts]

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """Of directions without relation."""
        return {"regression": 2.0}
