"""Agreement of two crops cell by cell: PixPro and PixContrast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from repr.batch import Batch, StepOutput
from repr.distributed import means
from repr.drawing import Show
from repr.losses.chance import at_chance
from repr.losses.pixel import contrast_at_chance, pixel_consistency, pixel_contrast, positive_mask
from repr.models.backbone import feature_map, width_of
from repr.models.batchnorm import synchronise
from repr.models.heads import mlp, project
from repr.models.propagation import Propagation
from repr.models.teacher import Teacher
from repr.models.unreached import freeze_unreached
from repr.objectives.base import Objective
from repr.objectives.loss_choice import Losses, chosen
from repr.objectives.match_picture import draw_matches
from repr.objectives.views import map_faults, view_sizes, warn_of_class_token
from repr.optim import Optim

NUM_SHOWN = 3  # images in a picture


class PixPro(Objective):
    """Two crops of an image agree where they overlap.

    Methods: PixPro and PixContrast (Xie et al., 2021, arXiv 2011.10043), which differ in ``losses`` and in whether
    there is a propagation module.

    Flow: each view -> backbone's last map -> projector -> propagation: queries; each view -> teacher's backbone and
    projector: keys. Cells of the queries of one view and the keys of the other match where their places in the image
    do, by the crop boxes; the loss on them in both directions, added. Instance branch, if it has a weight: map ->
    ``instance_projector`` -> ``instance_predictor`` -> mean over cells, against the teacher's ``instance_projector`` ->
    mean over cells. BatchNorm sees one view at a time, of all ranks; the teacher has statistics of its own. Nothing
    is gathered; terms and logs are means over ranks.

    Terms: ``pixel``, ``instance``. Logs: ``no_overlap``, the share of pairs of crops without matching cells, which
    count as zero; ``matches``, matching pairs of cells an image.

    Evaluated and exported is what the backbone makes of an image. A ViT's class token is not trained here: let it pool
    its patches, with ``global_pool=avg fc_norm=false``; the check of the config warns.

    Args:
        backbone: a timm model with a feature map of ``num_features`` channels.
        threshold: distance, in diagonals of the larger cell, below which two cells match.
        gamma: sharpness of the propagation; None: no propagation module, as in PixContrast.
        num_layers: linear layers of its transform.
        momentum: of the teacher at the start; it rises to 1 over the run along half a cosine.
        losses: function of each term where it is not the default; called with queries and keys (N, C, HW) and the mask
            (N, HWq, HWk), ``instance`` with maps of one cell.
    """

    TERMS = ("pixel", "instance")
    MEANINGS: ClassVar[dict[str, str]] = Objective.MEANINGS | {
        "no_overlap": "Share of pictures whose two crops have no cell in common, and teach nothing; lower is better.",
        "matches": "Pairs of cells of a picture's two crops that show the same place.",
    }
    teacher: Teacher

    def __init__(
        self,
        backbone: nn.Module,
        *,
        hidden_dim: int = 4096,
        dim: int = 256,
        threshold: float = 0.7,
        gamma: float | None = 2.0,
        num_layers: int = 1,
        momentum: float = 0.99,
        weights: Mapping[str, float] | None = None,
        losses: Losses | None = None,
        optim: Optim | None = None,
    ) -> None:
        widths = [width_of(backbone), hidden_dim, dim]
        super().__init__(synchronise(backbone), weights=weights, optim=optim)
        self.losses = chosen(dict.fromkeys(self.TERMS, pixel_consistency), losses)
        self.threshold = threshold
        freeze_unreached(self.backbone, type(self).__name__, feature_map)
        if "pixel" in self.weights:
            self.projector = mlp(widths)
            self.propagation = nn.Identity() if gamma is None else Propagation(dim, gamma=gamma, num_layers=num_layers)
        if "instance" in self.weights:
            self.instance_projector = mlp(widths)
            self.instance_predictor = mlp([dim, hidden_dim, dim])
        heads = {name: head for name, head in self.named_children() if name.endswith("projector")}
        students = {"backbone": self.backbone, **heads}
        self.teacher = Teacher(momentum=momentum, final_momentum=1, schedule="cosine", before_step=True, **students)

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Another number of views than two, and backbones without a map of several cells; warns of class tokens."""
        sizes, flow = view_sizes(cfg), type(self).__name__
        yield from super().config_faults(cfg)
        if len(sizes) != 2:
            yield f"{flow} compares two views of a sample, and views has {len(sizes)}: set views=byol"
        yield from map_faults(self.backbone, cfg, flow)
        warn_of_class_token(self, cfg)

    def step(self, batch: Batch) -> StepOutput:
        """Terms and logs of this rank's images, averaged over ranks."""
        views = self._views(batch)
        maps = [self._map(self.backbone, view) for view in views]
        with torch.no_grad():
            targets = [self._map(self.teacher.backbone, view) for view in views]
        mask = self._mask(batch, maps)
        matches = mask.sum((1, 2), dtype=torch.float32)  # (N,); as integers they would take twice the memory
        logs = {"no_overlap": (matches == 0).float().mean(), "matches": matches.mean()}
        terms, embeddings = {}, {}
        if "pixel" in self.weights:
            cells = [project(self.projector, features) for features in maps]  # (N, C, HW) each, like queries and keys
            with torch.no_grad():
                keys = [project(self.teacher.projector, features) for features in targets]
            terms["pixel"] = self._both_ways("pixel", [self.propagation(x) for x in cells], keys, mask)
            if getattr(self.losses["pixel"], "func", self.losses["pixel"]) is pixel_contrast:
                logs["pixel.chance"] = contrast_at_chance(mask) + contrast_at_chance(mask.mT)
            embeddings["cells"] = cells[0].mT.flatten(0, 1)  # (N * HW, C)
        if "instance" in self.weights:
            predict = nn.Sequential(self.instance_projector, self.instance_predictor)
            queries = [project(predict, features).float().mean(2, keepdim=True) for features in maps]  # (N, C, 1) each
            with torch.no_grad():
                keys = [project(self.teacher.instance_projector, features) for features in targets]
                keys = [key.float().mean(2, keepdim=True) for key in keys]
            terms["instance"] = self._both_ways("instance", queries, keys, mask.new_ones(len(mask), 1, 1))
            embeddings["instance"] = queries[0].squeeze(2)
        both = means(terms | logs)
        logged: dict[str, Tensor | float] = {name: both[name].detach() for name in logs}
        return StepOutput({name: both[name] for name in terms}, embeddings, logs=logged)

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """0 of PixPro's terms; what PixContrast has depends on the overlap of the crops, and :meth:`step` logs it."""
        return {name: at_chance(loss, num_rows=num_rows) for name, loss in self.losses.items()}

    def pictures(self, batch: Batch, show: Show) -> dict[str, Tensor]:
        """``matches``: two crops of a few images, the cells that match, and those whose features are nearest."""
        maps = [self._map(self.backbone, view) for view in self._views(batch)]
        mask = self._mask(batch, maps)
        shown = mask.sum((1, 2)).argsort(descending=True, stable=True)[:NUM_SHOWN]  # those that overlap most
        q, k = (F.normalize(features[shown].flatten(2).float(), dim=1) for features in maps)  # (n, C, HW)
        nearest = torch.bmm(q.mT, k).argmax(2)
        views = show(batch["views"][0][shown]), show(batch["views"][1][shown])
        grids = maps[0].shape[2:], maps[1].shape[2:]
        return {"matches": draw_matches(views, mask[shown], nearest, grids=grids)}

    def _views(self, batch: Batch) -> list[Tensor]:
        views = batch["views"][:2]
        if len(views) < 2:
            raise ValueError(f"{type(self).__name__} compares two views of a sample, and the batch has one")
        if "boxes" not in batch:
            raise ValueError(
                f"{type(self).__name__} needs the crop box of every view, and the batch has no boxes: take repr's "
                "DataModule, or give `boxes` (N, V, 4) as repr.data.views.boxes makes them"
            )
        num, boxes = len(views[0]), batch["boxes"]
        if len(views[1]) != num or len(boxes) != num or boxes.ndim != 3 or boxes.shape[1] < 2:
            raise ValueError(
                f"two views of {num} and {len(views[1])} samples do not fit boxes of shape {tuple(boxes.shape)}: every "
                "sample needs a box for each view, (N, V, 4)"
            )
        return views

    def _map(self, backbone: nn.Module, view: Tensor) -> Tensor:
        features = feature_map(backbone, view)
        if features.shape[1] != backbone.num_features:
            raise ValueError(
                f"the backbone's map has {features.shape[1]} channels and its num_features says "
                f"{backbone.num_features}: set backbone.name to a timm ResNet or ViT"
            )
        return features

    def _mask(self, batch: Batch, maps: list[Tensor]) -> Tensor:
        boxes, (grid_q, grid_k) = batch["boxes"], (features.shape[2:] for features in maps)
        return positive_mask(boxes[:, 0], boxes[:, 1], grid_q=grid_q, grid_k=grid_k, threshold=self.threshold)

    def _both_ways(self, name: str, queries: list[Tensor], keys: list[Tensor], mask: Tensor) -> Tensor:
        loss = self.losses[name]
        return loss(queries[0], keys[1], mask) + loss(queries[1], keys[0], mask.mT)
