"""A student that tells which visual words a picture has: OBoW."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from repr.batch import Batch, StepOutput
from repr.distributed import mean, means
from repr.losses.bow import Pool, bag_loss, distances
from repr.losses.features import normalise
from repr.losses.precision import full_precision
from repr.models.backbone import feature_maps, map_channels, map_shape, width_of
from repr.models.batchnorm import SyncBatchNorm, synchronise
from repr.models.embedding_queue import length_fault
from repr.models.teacher import Teacher
from repr.models.vocabulary import Vocabulary
from repr.objectives.base import Objective
from repr.objectives.views import view_sizes
from repr.optim import Optim
from repr.seeds import uniform

FEWEST_CELLS = 5  # of a side of a map: without the outermost there are 3, of which one mean is taken


class OBoW(Objective):
    """The student predicts from distorted crops which visual words its teacher finds in the whole picture.

    Method: OBoW (Gidaris et al., 2021, arXiv 2012.11552).

    Flow: first view -> teacher's backbone: maps of the last stages, without their outermost cells -> nearest words of a
    vocabulary of each stage -> bags. The other views -> backbone, one pass for each size -> their product with vectors
    that a small network generates from the words. A word of each picture then enters each vocabulary. BatchNorm sees
    the views of one size together, over all ranks; that of the generators the words. Gathered: the words that enter.
    Reduced: mean distances, and the loss.

    Terms: ``bow``: the mean over levels and views of one size, summed over sizes. Logs: ``bow.chance``, which depends
    on the bags; ``words_image`` and ``words_batch``, exp of the entropy of a picture's bag and of the batch's;
    ``mean_distance``; of the last level.

    Args:
        backbone: a timm model with feature maps.
        num_levels: so many of its last stages (blocks of a ViT) have a vocabulary.
        num_words: K, of each; a multiple of the global batch.
        inverse_delta: sharpness of the assignment; None: each cell has the nearest word alone.
        pool: how cells make a bag, ``max`` or ``mean``.
        scale: by which the student's products with unit vectors are multiplied (the paper's kappa).
        momentum: of the teacher at the start; it rises to 1 over the run along half a cosine.
        chunk_size: pictures whose distances to all words exist at a time; None: all.
    """

    TERMS = ("bow",)
    MEANINGS: ClassVar[dict[str, str]] = Objective.MEANINGS | {
        "bow": "Divergence of the predicted bag of words from the teacher's; lower is better.",
        "words_image": "Words in the bag of a picture; 1, or as many as words_batch, is collapse.",
        "words_batch": "Words in all bags of a batch together; higher is better.",
        "mean_distance": "Squared distance of a cell from its nearest word, a moving mean.",
    }
    teacher: Teacher

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_levels: int = 2,
        num_words: int = 8192,
        inverse_delta: float | None = 15.0,
        pool: Pool = "max",
        scale: float = 8.0,
        momentum: float = 0.99,
        chunk_size: int | None = None,
        weights: Mapping[str, float] | None = None,
        optim: Optim | None = None,
    ) -> None:
        width = width_of(backbone)
        super().__init__(synchronise(backbone), weights=weights, optim=optim)
        if num_words < 1:
            raise ValueError(f"num_words={num_words}; set it to a multiple of the global batch, such as 8192")
        if pool not in ("max", "mean"):
            raise ValueError(f"pool={pool}; set it to max or mean")
        self.num_levels, self.num_codes, self.scale = num_levels, num_words, scale
        channels = map_channels(backbone, num_levels)
        options: Any = {"inverse_delta": inverse_delta, "pool": pool, "chunk_size": chunk_size}
        self.vocabularies: Any = nn.ModuleList(Vocabulary(num_words, dim, **options) for dim in channels)
        self.generators = nn.ModuleList(_generator(dim, width) for dim in channels)
        self.teacher = Teacher(momentum=momentum, final_momentum=1, before_step=True, backbone=self.backbone)

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Too few views, a vocabulary that batches do not fill, and maps of too few cells."""
        flow, sizes = type(self).__name__, view_sizes(cfg)
        if len(sizes) < 2:
            yield f"{flow} needs a view for its teacher and others, and views has {len(sizes)}: set views=obow"
        if self.num_codes % cfg.data.batch_size:
            yield f"objective.{length_fault(self.num_codes, cfg.data.batch_size, 'num_words')}"
        yield from (faults := list(super().config_faults(cfg)))
        if sizes and not faults and not cfg.smoke:
            try:
                least = min(map_shape(self.backbone, sizes[0])[1:])
            except ValueError as error:
                yield f"backbone.name={cfg.backbone.get('name')}: {error}"
                return
            if least < FEWEST_CELLS:
                yield (
                    f"backbone.name={cfg.backbone.get('name')} makes a map of {least} x {least} cells of the teacher's "
                    f"view of {sizes[0]} x {sizes[0]} pixels, and {flow} needs {FEWEST_CELLS} x {FEWEST_CELLS}: raise "
                    "image_size, or set +backbone.output_stride=8"
                )

    def step(self, batch: Batch) -> StepOutput:
        """The loss of the global batch; its gradient is that of this rank's rows, which DDP averages."""
        views = batch["views"]
        if len(views) < 2 or "seed" not in batch:
            raise ValueError(f"{type(self).__name__} needs two views or more of a sample, and the seeds of the samples")
        words = [self._generated(level) for level in range(self.num_levels)]  # (K, D) each
        with torch.no_grad():
            maps = [_inner(features) for features in feature_maps(self.teacher.backbone, views[0], self.num_levels)]
            bags, draws = [], uniform(batch["seed"], self.num_levels)
            for vocabulary, features, drawn in zip(self.vocabularies, maps, draws.T, strict=True):
                bags.append(vocabulary.bags(features).float())  # (B, K)
                if self.training:
                    vocabulary.learn(features, drawn)
        sizes = [list(run) for _, run in groupby(views[1:], key=lambda view: view.shape[2:])]
        encoded = [self.backbone(torch.cat(run)).float() for run in sizes]  # (V * B, D) each
        losses = [self._loss(rows, words, bags, len(run)) for rows, run in zip(encoded, sizes, strict=True)]
        told = means({"bow": torch.stack(losses).sum(), **self._told(bags, len(sizes))})
        logs: dict[str, Tensor | float] = {name: value.detach() for name, value in told.items() if name != "bow"}
        logs["words_batch"] = _perplexity(mean(bags[-1].mean(0, keepdim=True)))
        logs["mean_distance"] = self.vocabularies[-1].mean_distance.clone()
        return StepOutput(
            {"bow": told["bow"]}, {"embedding": encoded[0].detach()[: len(views[1])]}, assignments=bags[-1], logs=logs
        )

    def codes(self, maps: Tensor) -> Tensor:
        """The nearest word of the last level to each cell of the backbone's maps: (B, C, h, w) -> (B, h, w) int64."""
        return distances(maps, self.vocabularies[-1].words).argmin(1)

    def _generated(self, level: int) -> Tensor:
        words = self.vocabularies[level].words
        return normalise(self.generators[level](F.normalize(words, dim=1)).float())

    def _loss(self, rows: Tensor, words: list[Tensor], bags: list[Tensor], num_views: int) -> Tensor:
        """Of the views of one size, the mean over levels."""
        with full_precision(rows):
            products = [self.scale * rows @ vectors.T for vectors in words]  # (V * B, K) each
        losses = [bag_loss(x, target.repeat(num_views, 1)) for x, target in zip(products, bags, strict=True)]
        return torch.stack(losses).mean()

    def _told(self, bags: list[Tensor], num_sizes: int) -> dict[str, Tensor]:
        chance = [math.log(x.shape[1]) - torch.special.entr(x).sum(1).mean() for x in bags]
        return {"bow.chance": num_sizes * torch.stack(chance).mean(), "words_image": _perplexity(bags[-1])}


def _generator(dim: int, width: int) -> nn.Module:
    """Words (K, dim) -> (K, width); BatchNorm has no use for statistics of earlier words."""
    norm = SyncBatchNorm(2 * width, track_running_stats=False)
    return nn.Sequential(
        nn.Linear(dim, 2 * width, bias=False), norm, nn.ReLU(inplace=True), nn.Linear(2 * width, width)
    )


def _inner(features: Tensor) -> Tensor:
    """A map without its outermost cells, which see the border; a smaller one than of three cells is left as it is."""
    return features[..., 1:-1, 1:-1] if min(features.shape[2:]) > 2 else features


def _perplexity(bags: Tensor) -> Tensor:
    """Mean over rows of (B, K) of the number of words, e to the entropy."""
    return torch.special.entr(bags).sum(1).exp().mean()
