"""SwAV: views of a sample predict each other's assignment to prototypes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from repr.batch import Batch, StepOutput
from repr.distributed import all_reduce, mean
from repr.losses.chance import at_chance
from repr.losses.clustering import check_views, sinkhorn, swapped_prediction
from repr.losses.precision import full_precision
from repr.models.backbone import encode_views, width_of
from repr.models.batchnorm import synchronise
from repr.models.embedding_queue import Queue, length_fault
from repr.models.heads import mlp, project
from repr.objectives.base import Objective
from repr.objectives.views import view_sizes
from repr.optim import Optim


class SwAV(Objective):
    """Swapped prediction of cluster assignments, with multi-crop.

    Method: SwAV (Caron et al., 2020, arXiv 2006.09882).

    Flow: views -> backbone, one pass for each resolution -> head, all views together -> unit length -> cosines with
    the prototypes, which are brought to unit length before every forward. The assignments of ``assign_views`` come
    from Sinkhorn over the batch of all ranks and, once it is full, the queue; every other view predicts them.
    BatchNorm of the backbone sees the views of one resolution together, that of the head all views, both over all
    ranks. Gathered: what goes into the queue. Reduced: the mass of each prototype, and the loss.

    Terms: ``swapped_prediction``.

    Args:
        num_prototypes: K.
        assign_views: positions of the views whose assignments are predicted.
        temperature: of the predictions.
        epsilon: of the assignments; smaller is sharper.
        num_iters: rounds of Sinkhorn.
        freeze_steps: optimizer steps at the start in which the prototypes get no gradient.
        queue_length: embeddings of earlier batches that help to assign, for each assign view, of all ranks together;
            a multiple of the global batch, 0: none.
        queue_start_step: optimizer step from which the queue is filled.
    """

    TERMS = ("swapped_prediction",)
    MEANINGS: ClassVar[dict[str, str]] = Objective.MEANINGS | {
        "swapped_prediction": "Cross-entropy of predicting the prototypes of a view from other views; lower is better."
    }

    def __init__(
        self,
        backbone: nn.Module,
        *,
        hidden_dim: int = 2048,
        dim: int = 128,
        num_prototypes: int = 3000,
        assign_views: Sequence[int] = (0, 1),
        temperature: float = 0.1,
        epsilon: float = 0.05,
        num_iters: int = 3,
        freeze_steps: int = 0,
        queue_length: int = 0,
        queue_start_step: int = 0,
        weights: Mapping[str, float] | None = None,
        optim: Optim | None = None,
    ) -> None:
        width = width_of(backbone)
        super().__init__(synchronise(backbone), weights=weights, optim=optim)
        self.head = mlp([width, hidden_dim, dim])
        self.prototypes = nn.Linear(dim, num_prototypes, bias=False)
        self.assign_views, self.temperature = tuple(assign_views), temperature
        self.epsilon, self.num_iters = epsilon, num_iters
        self.freeze_steps, self.queue_start_step = freeze_steps, queue_start_step
        self.queue_length = queue_length
        self.queue = Queue(len(self.assign_views), queue_length, dim) if queue_length else None

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Views that do not fit, and a queue that does not; warns of prototypes that nothing can fill."""
        batch_size, length = cfg.data.batch_size, self.queue_length
        try:
            check_views(len(view_sizes(cfg)), self.assign_views)
        except ValueError as fault:
            yield f"objective: {fault} (views=multicrop has two large and six small ones)"
        if length % batch_size:
            yield f"objective.{length_fault(length, batch_size)}"
        if self.prototypes.out_features > length + batch_size and not cfg.smoke:
            warnings.warn(
                f"objective.num_prototypes={self.prototypes.out_features} are more than the {length + batch_size} "
                "samples of queue and batch can fill: lower it, or raise objective.queue_length or data.batch_size",
                stacklevel=2,
            )
        yield from super().config_faults(cfg)

    def negatives_fault(self) -> str | None:
        """SwAV has no negatives, and a queue keeps rows of other clusters besides."""
        length = self.queue_length
        queue = f", and its queue keeps {length} rows of earlier batches, hence of other clusters" if length else ""
        return f"{super().negatives_fault()}{queue}"

    def step(self, batch: Batch) -> StepOutput:
        """The loss of the global batch; its gradient is that of this rank's rows, which DDP averages."""
        views = batch["views"]
        check_views(len(views), self.assign_views)
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        embedding = F.normalize(self.head(encode_views(self.backbone, views)).float(), dim=1)  # (V * B, D)
        scores = list(self._scores(embedding).chunk(len(views)))  # V x (B, K)
        assigned = torch.stack([embedding.detach().chunk(len(views))[a] for a in self.assign_views], dim=1)  # (B, A, D)
        assignments = self._assign(scores)
        if self.queue is not None and self.training and self.step_number >= self.queue_start_step:
            self.queue.push(assigned)
        loss = swapped_prediction(scores, assignments, assign_views=self.assign_views, temperature=self.temperature)
        return StepOutput(
            {"swapped_prediction": mean(loss)},
            {"embedding": assigned[:, 0]},
            scores=scores[self.assign_views[0]],
            assignments=assignments[0],
        )

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """The logarithm of the number of prototypes."""
        dim = self.prototypes.out_features
        return {"swapped_prediction": at_chance(swapped_prediction, num_rows=num_rows, dim=dim)}

    @property
    def num_codes(self) -> int:
        """K."""
        return self.prototypes.out_features

    def codes(self, maps: Tensor) -> Tensor:
        """The nearest prototype of each cell of the backbone's maps: (B, C, h, w) -> (B, h, w) int64."""
        cells = project(self.head, maps).float().mT.flatten(0, 1)
        return self._scores(F.normalize(cells, dim=1)).argmax(1).view(len(maps), *maps.shape[2:])

    def _scores(self, embedding: Tensor) -> Tensor:
        """Cosines with the prototypes: (N, D) -> (N, K) float32."""
        with full_precision(embedding):
            return self.prototypes(embedding.to(self.prototypes.weight.dtype)).float()

    @torch.no_grad()
    def _assign(self, scores: list[Tensor]) -> list[Tensor]:
        """Assignments (B, K) of each assign view."""
        kept = self.queue.mine().float() if self.queue is not None and self.queue.is_full else None
        assignments = []
        for slot, view in enumerate(self.assign_views):
            rows = scores[view] if kept is None else torch.cat([self._scores(kept[slot]), scores[view]])
            q = sinkhorn(rows, epsilon=self.epsilon, num_iters=self.num_iters, all_reduce=all_reduce)
            assignments.append(q[-len(scores[view]) :])
        return assignments

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave frozen prototypes out of the step: no gradient, hence no momentum and no decay either."""
        if self.step_number < self.freeze_steps:
            self.prototypes.weight.grad = None
