"""Two views, and a slow copy of the encoder that says what to predict: BYOL, SimSiam, MoCo v2, MoCo v3, DenseCL."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from repr.batch import Batch, StepOutput
from repr.losses.exchange import exchange_of
from repr.losses.momentum import dense_keys, key_contrast, regression
from repr.losses.precision import precision_of
from repr.models.backbone import pooled_and_map, width_of
from repr.models.batchnorm import synchronise
from repr.models.embedding_queue import Queue, length_fault
from repr.models.hallucinator import Hallucinator
from repr.models.heads import Norm, mlp, plain_mlp, project
from repr.models.teacher import Teacher
from repr.objectives.base import Objective
from repr.objectives.hallucination import COSINES, hallucinate
from repr.objectives.loss_choice import Losses, chosen
from repr.objectives.views import map_faults, view_sizes
from repr.optim import Optim


class Momentum(Objective):
    """What the student makes of one view predicts what its teacher makes of the other.

    Methods: BYOL (Grill et al., 2020, arXiv 2006.07733), SimSiam (Chen and He, 2020, arXiv 2011.10566), MoCo v2 (Chen
    et al., 2020, arXiv 2003.04297), MoCo v3 (Chen et al., 2021, arXiv 2104.02057), DenseCL (Wang et al., 2021, arXiv
    2011.09157), which differ in ``weights``, heads, queue and momentum alone.

    Flow: each view -> backbone -> projector -> predictor: queries; each view -> teacher's backbone and projector: keys.
    The terms compare the queries of a view with the keys of the other, in both directions, added, unless ``one_way``.
    With ``dense`` the backbone's last map goes through a projector of cells besides, with a queue of its own that keeps
    the mean of each picture's projected cells. BatchNorm sees one view at a time, of all ranks; the teacher has
    statistics of its own. What a queue keeps is gathered; the contrast without a queue exchanges rows.

    Terms: ``regression``, the squared distance of directions; ``contrast``, finding the key among those of the batch,
    times 2 x ``temperature`` as in MoCo v3's code, or with a queue among those of earlier batches; ``dense``, finding
    for each cell the key of the cell of the other view whose features are nearest, among the means in the queue;
    ``hallucination``, our form of what Wu et al. propose (2023, arXiv 2307.12168): the loss of the contrast, or else of
    the regression, of what a hallucinator makes of a query and its key.

    Args:
        num_layers: linear layers of the projector.
        last_norm: BatchNorm at the end of the projector: ``affine``, ``plain`` or None.
        last_bias: whether the last layers of the heads have a bias where no norm follows.
        head_norm: whether BatchNorm stands between the layers of the heads; MoCo v2 has none.
        predictor_layers: linear layers of the predictor; 0: there is none.
        predictor_last_norm: as ``last_norm``, of the predictor.
        predictor_dim: width of the predictor's hidden layers; None: ``hidden_dim``.
        temperature: of the contrast.
        queue_length: keys of earlier batches that the contrast compares with, of all ranks together; a multiple of the
            global batch, 0: none. Places that nothing has filled count as keys of cosine 0.
        one_way: only the first view predicts, and only the second is seen by the teacher.
        momentum: of the teacher at the start; None: the student is its own teacher, without gradient (SimSiam).
        final_momentum: at the end of the run, reached along half a cosine.
        before_step: whose momentum it is, see :class:`repr.models.teacher.Teacher`; MoCo's True, BYOL's False.
        freeze_patches: whether the patch embedding of a ViT stays as it was initialised (MoCo v3).
        extrapolation: how far at most the hallucination goes beyond a query, in distances of query and key.
        losses: function of each term where it is not the default; called with queries and keys (N, D), ``contrast``
            and ``dense``, whose rows are cells, with ``temperature`` and ``queue`` besides.
    """

    TERMS = ("regression", "contrast", "dense", "hallucination")
    PAIRWISE = ("contrast", "dense")
    MEANINGS: ClassVar[dict[str, str]] = (
        Objective.MEANINGS
        | COSINES
        | {
            "regression": "Squared distance from what the teacher makes of the other view; lower is better.",
            "contrast": "Cross-entropy of finding what the teacher makes of the other view; lower is better.",
            "dense": "Cross-entropy of finding the key of the nearest cell of the other view; lower is better.",
            "hallucination": "Loss of what is hallucinated beyond a query, instead of the query; lower is better.",
        }
    )

    def __init__(
        self,
        backbone: nn.Module,
        *,
        hidden_dim: int = 4096,
        dim: int = 256,
        num_layers: int = 2,
        last_norm: Norm | None = None,
        last_bias: bool = False,
        head_norm: bool = True,
        predictor_layers: int = 2,
        predictor_last_norm: Norm | None = None,
        predictor_dim: int | None = None,
        temperature: float = 0.2,
        queue_length: int = 0,
        one_way: bool = False,
        momentum: float | None = 0.99,
        final_momentum: float = 1.0,
        before_step: bool = False,
        freeze_patches: bool = False,
        extrapolation: float = 1.0,
        chunk_size: int | None = None,
        exchange: str = "gather",
        loss_precision: str = "float32",
        weights: Mapping[str, float] | None = None,
        losses: Losses | None = None,
        optim: Optim | None = None,
    ) -> None:
        width = width_of(backbone)
        super().__init__(synchronise(backbone), weights=weights, optim=optim)
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}; set it above 0")
        passing = exchange_of(exchange, self.weights.keys() & set(self.PAIRWISE))
        how: dict[str, Any] = {"chunk_size": chunk_size, "exchange": passing, "precision": precision_of(loss_precision)}
        defaults: Losses = {"regression": regression, "contrast": key_contrast, "dense": key_contrast}
        self.losses = chosen(defaults, losses, pairwise=self.PAIRWISE, **how)
        self.own_losses = frozenset(losses or ())
        if freeze_patches:
            if not hasattr(backbone, "patch_embed"):
                raise ValueError(
                    f"freeze_patches=true: {type(backbone).__name__} has no patch embedding; set it to false"
                )
            backbone.patch_embed.requires_grad_(False)
        self.temperature, self.one_way, self.queue_length = temperature, one_way, queue_length
        self.projector = _head([width, *[hidden_dim] * (num_layers - 1), dim], head_norm, last_norm, last_bias)
        self.predictor: nn.Module = nn.Identity()
        if predictor_layers:
            widths = [dim, *[predictor_dim or hidden_dim] * (predictor_layers - 1), dim]
            self.predictor = _head(widths, head_norm, predictor_last_norm, last_bias)
        self.queue = Queue(1, queue_length, dim) if queue_length else None
        if "hallucination" in self.weights:
            self.hallucinator = Hallucinator(dim, extrapolation)
        followed: dict[str, nn.Module] = {"backbone": self.backbone, "projector": self.projector}
        if "dense" in self.weights:
            self._check_dense()
            self.dense_projector = _head([width, hidden_dim, dim], head_norm, last_norm, last_bias)
            self.dense_queue = Queue(1, queue_length, dim)
            followed["dense_projector"] = self.dense_projector
        if momentum is not None:
            self.teacher = Teacher(
                momentum=momentum,
                final_momentum=final_momentum,
                schedule="cosine",
                before_step=before_step,
                **followed,
            )
        elif one_way or "dense" in self.weights or not predictor_layers:
            raise ValueError("momentum=null needs a predictor and both views, and goes without weights.dense")

    def _check_dense(self) -> None:
        if not self.queue_length:
            raise ValueError("weights.dense compares cells with a queue: set queue_length, such as 65536")
        if "contrast" not in self.weights:
            raise ValueError("weights.dense alone leaves the other projector without a loss: give contrast a weight")

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Another number of views than two, a queue that batches do not fill or nothing uses, and maps of one cell."""
        sizes = view_sizes(cfg)
        if len(sizes) != 2:
            yield f"{type(self).__name__} compares two views of a sample, and views has {len(sizes)}: set views=byol"
        if self.queue_length % cfg.data.batch_size:
            yield f"objective.{length_fault(self.queue_length, cfg.data.batch_size)}"
        if self.queue_length and "contrast" not in self.weights:
            yield "objective.queue_length has nothing to serve: contrast has no weight; set it to 0"
        yield from super().config_faults(cfg)
        if "dense" in self.weights:
            yield from map_faults(self.backbone, cfg, type(self).__name__)

    def negatives_fault(self) -> str | None:
        """Without a queue the contrast has negatives of the batch."""
        if self.queue_length and "contrast" in self.weights:
            return f"its queue keeps {self.queue_length} rows of earlier batches, hence of other clusters"
        return super().negatives_fault()

    def step(self, batch: Batch) -> StepOutput:
        """Terms of the global batch."""
        views = batch["views"][:2]
        if len(views) < 2:
            raise ValueError(f"{type(self).__name__} compares two views of a sample, and the batch has one")
        asking, answering = (views[:1], views[1:]) if self.one_way else (views, views)
        asked = [self._encode(self.backbone, view) for view in asking]
        projected = [self.projector(pooled) for pooled, _ in asked]
        queries = [self.predictor(rows).float() for rows in projected]  # (B, D) each
        if self.teacher is None:
            keys = [rows.detach().float() for rows in projected][::-1]
        else:
            with torch.no_grad():
                answered = [self._encode(self.teacher.backbone, view) for view in answering]
                keys = [self.teacher.projector(pooled).float() for pooled, _ in answered][::-1]
        embeddings = {"query": queries[0]}
        logs: dict[str, Tensor | float] = {}
        terms: dict[str, Tensor] = {}
        for name in self.weights:
            if name == "dense":
                cells, nearest, centres = self._cells(asked, answered)
                terms[name] = self._term(name, cells, nearest, self.dense_queue)
                embeddings["cells"] = cells[0]
            elif name == "hallucination":
                pairs = list(zip(queries, keys, strict=True))
                beyond = hallucinate(self.hallucinator, pairs, batch["seed"], logs)
                terms[name] = self._term(self._hallucinated, beyond, keys, self.queue)
                embeddings["hallucinated"] = beyond[0]
            else:
                terms[name] = self._term(name, queries, keys, self.queue)
        if self.queue is not None and self.training:
            self.queue.push(F.normalize(keys[0], dim=1).unsqueeze(1))
            if "dense" in self.weights:
                self.dense_queue.push(F.normalize(centres, dim=1).unsqueeze(1))
        return StepOutput(terms, embeddings, logs=logs)

    def _encode(self, backbone: nn.Module, view: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a backbone pools of a view (B, C), and its map where cells are compared."""
        return pooled_and_map(backbone, view) if "dense" in self.weights else (backbone(view), None)

    def _cells(self, asked: list[Any], answered: list[Any]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Projected cells (B * S, D) of the queries, the keys of the cells nearest to them, and a mean key (B, D)."""
        teacher = cast(Teacher, self.teacher)
        queries, keys, centres = [], [], []
        for (_, ours), (_, theirs) in zip(asked, answered[::-1], strict=True):
            queries.append(project(self.dense_projector, ours).float().mT.flatten(0, 1))
            with torch.no_grad():
                projected = project(teacher.dense_projector, theirs).float()  # (B, D, T)
                nearest = dense_keys(ours.flatten(2), theirs.flatten(2), projected)  # (B, D, S)
            keys.append(nearest.mT.flatten(0, 1))
            centres.append(projected.mean(2))
        return queries, keys, centres[0]

    def _term(self, name: str, queries: list[Tensor], keys: list[Tensor], queue: Queue | None) -> Tensor:
        loss, pairs = self.losses[name], list(zip(queries, keys, strict=True))
        if name == "regression":
            return torch.stack([loss(query, key) for query, key in pairs]).sum()
        rows = None if queue is None else queue.rows[0]
        if rows is not None and name in self.own_losses:  # which may keep it until backward, after `push`
            rows = rows.clone()
        value = torch.stack([loss(q, k, temperature=self.temperature, queue=rows) for q, k in pairs]).sum()
        return value * self._factor

    @property
    def _factor(self) -> float:
        return 1.0 if self.queue_length else 2 * self.temperature

    @property
    def _hallucinated(self) -> str:
        """The term whose loss is that of the hallucination too."""
        return "contrast" if "contrast" in self.weights else "regression"

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """Of both directions together."""
        ways, among = 2 - self.one_way, self.queue_length + 1 if self.queue_length else num_rows
        contrast = ways * self._factor * math.log(among)
        levels = {"regression": 2.0 * ways, "contrast": contrast, "dense": contrast}
        return {**levels, "hallucination": levels[self._hallucinated]}


def _head(widths: list[int], norm: bool, last_norm: Norm | None, last_bias: bool) -> nn.Module:
    return mlp(widths, last_norm=last_norm, last_bias=last_bias) if norm else plain_mlp(widths)
