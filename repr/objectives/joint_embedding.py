"""Joint embedding of views: SimCLR, VICReg, Barlow Twins, alignment and uniformity, LeJEPA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import combinations, permutations
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from repr.batch import Batch, Embeddings, StepOutput
from repr.losses import contrastive, decorrelation, hypersphere
from repr.losses.chance import at_chance
from repr.losses.exchange import exchange_of
from repr.losses.precision import precision_of
from repr.losses.sigreg import random_directions, sigreg
from repr.models.backbone import encode_views, width_of
from repr.models.batchnorm import synchronise
from repr.models.hallucinator import Hallucinator
from repr.models.heads import Norm, mlp
from repr.objectives.base import Objective
from repr.objectives.hallucination import COSINES, hallucinate
from repr.objectives.loss_choice import Losses, chosen
from repr.objectives.negatives import compared_keys, told_keys
from repr.objectives.views import view_sizes
from repr.optim import Optim

PAIRS: Losses = {  # of two views
    "contrast": contrastive.nt_xent,
    "alignment": hypersphere.alignment,
    "invariance": decorrelation.invariance,
    "correlation": decorrelation.cross_correlation,
}
SINGLES: Losses = {  # of one view
    "uniformity": hypersphere.uniformity,
    "variance": decorrelation.variance,
    "covariance": decorrelation.covariance,
    "sigreg": sigreg,
}
TOGETHER: Losses = {"centred_invariance": decorrelation.centred_invariance}  # of all views
BEYOND: Losses = {"hallucination": contrastive.cross_nt_xent}  # of what is hallucinated of a pair, and its other view


class JointEmbedding(Objective):
    """Two or more views, one encoder, one head.

    Methods: SimCLR (Chen et al., 2020, arXiv 2002.05709), VICReg (Bardes et al., 2021, arXiv 2105.04906), Barlow
    Twins (Zbontar et al., 2021, arXiv 2103.03230), alignment and uniformity (Wang and Isola, 2020, arXiv 2005.10242),
    LeJEPA (Balestriero and LeCun, 2025, arXiv 2511.08544), which differ in ``losses``, ``weights`` and the head's
    widths alone.

    Flow: views -> backbone, one pass for each resolution -> head, all views together -> terms of the global batch in
    float32; those of pairs exchange rows, the others sums over the batch, and ``covariance`` and ``correlation`` of few
    rows with many features rows, too. BatchNorm of the backbone sees the views of one resolution together, that of the
    head all views, both over all ranks. (The authors of VICReg and Barlow Twins pass one view after the other.)

    Terms: of two views, averaged over all pairs of views: ``contrast``, ``alignment``, ``invariance``,
    ``correlation``; of one view, averaged over the views: ``uniformity``, ``variance``, ``covariance``, ``sigreg``; of
    all views: ``centred_invariance``. ``hallucination`` is our form of what Wu et al. propose (2023, arXiv 2307.12168):
    what a hallucinator makes of a view and another is to find that other one among those of all samples, averaged over
    all pairs of views in both directions.

    Args:
        num_layers: linear layers of the head.
        last_norm: BatchNorm at the end of the head: ``affine``, ``plain`` or None.
        last_bias: whether the last layer has a bias where no norm follows.
        losses: function of each term where it is not the default; called with features alone, ``sigreg`` with
            ``directions`` besides.
        num_directions: along which ``sigreg`` compares, drawn anew at each step.
        seed: of these directions.
        extrapolation: how far at most the hallucination goes beyond a view, in distances of the two views.
    """

    TERMS = (*PAIRS, *SINGLES, *TOGETHER, *BEYOND)
    PAIRWISE = ("contrast", "uniformity", "hallucination")
    STATISTICS = ("correlation", "variance", "covariance", "sigreg")
    EMBEDDINGS = ("image", "trunk", "projection")
    MEANINGS: ClassVar[dict[str, str]] = Objective.MEANINGS | COSINES

    def __init__(
        self,
        backbone: nn.Module,
        *,
        hidden_dim: int = 2048,
        dim: int = 128,
        num_layers: int = 2,
        last_norm: Norm | None = None,
        last_bias: bool = True,
        chunk_size: int | None = None,
        exchange: str = "gather",
        loss_precision: str = "float32",
        false_negatives: str = "keep",
        num_directions: int = 1024,
        seed: int = 0,
        extrapolation: float = 1.0,
        weights: Mapping[str, float] | None = None,
        losses: Losses | None = None,
        optim: Optim | None = None,
    ) -> None:
        widths = [width_of(backbone), *[hidden_dim] * (num_layers - 1), dim]
        super().__init__(synchronise(backbone), weights=weights, optim=optim)
        passing = exchange_of(exchange, self.weights.keys() & set(self.PAIRWISE))
        self.losses = chosen(
            {**PAIRS, **SINGLES, **TOGETHER, **BEYOND},
            losses,
            pairwise=self.PAIRWISE,
            chunk_size=chunk_size,
            exchange=passing,
            precision=precision_of(loss_precision),
        )
        self.compared = compared_keys(false_negatives, self.losses, self.weights)
        if num_directions < 1:
            raise ValueError(f"num_directions={num_directions}; set it to 1 or more")
        self.dim, self.num_directions, self.seed = dim, num_directions, seed
        self.head = mlp(widths, last_norm=last_norm, last_bias=last_bias)
        if "hallucination" in self.weights:
            self.hallucinator = Hallucinator(dim, extrapolation)

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Too few views, and views that the backbone cannot take."""
        sizes = view_sizes(cfg)
        if len(sizes) < 2:
            yield f"{type(self).__name__} compares views of a sample, and views has {len(sizes)}: set views=simclr"
        yield from super().config_faults(cfg)

    def step(self, batch: Batch) -> StepOutput:
        """Terms of the global batch."""
        num_views = len(batch["views"])
        if num_views < 2:
            raise ValueError(f"{type(self).__name__} compares two views or more of a sample, and the batch has one")
        embedding = self.head(encode_views(self.backbone, batch["views"])).float()  # (V * B, D)
        views = list(embedding.chunk(num_views))  # V x (B, D)
        logs: dict[str, Tensor | float] = {}
        keys = told_keys(batch, self.compared, logs)
        embeddings = {"embedding": views[0]}
        terms: dict[str, Tensor] = {}
        for name in self.weights:
            if name == "hallucination":
                pairs = list(permutations(views, 2))
                beyond = hallucinate(self.hallucinator, pairs, batch["seed"], logs)
                values = [self.losses[name](h, other) for h, (_, other) in zip(beyond, pairs, strict=True)]
                terms[name] = torch.stack(values).mean()
                embeddings["hallucinated"] = beyond[0]
            else:
                terms[name] = self._term(name, views, keys)
        return StepOutput(terms, embeddings, logs=logs)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Embeddings:
        """Embeddings of an evaluation batch, and ``projection`` (B, dim), where the loss is taken."""
        embeddings = self.embed(batch)
        embeddings.projection = self.head(embeddings.trunk)
        return embeddings

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """Of every loss that :mod:`repr.losses` knows a level of."""
        return {name: at_chance(loss, num_rows=num_rows, dim=self.dim) for name, loss in self.losses.items()}

    def _term(self, name: str, views: list[Tensor], keys: dict[str, Tensor]) -> Tensor:
        loss = partial(self.losses[name], **keys) if name == "contrast" else self.losses[name]
        if name in TOGETHER:
            return loss(torch.stack(views))
        if name == "sigreg":
            where = random_directions(self.dim, self.num_directions, self.seed, self.step_number, views[0].device)
            loss = partial(loss, directions=where)
        values = [loss(a, b) for a, b in combinations(views, 2)] if name in PAIRS else [loss(x) for x in views]
        return torch.stack(values).mean()
