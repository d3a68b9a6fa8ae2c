"""A student that predicts how its teacher sorts other views, and patches that it does not see: DINO, iBOT, DINOv2."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from repr.batch import Batch, StepOutput
from repr.distributed import all_reduce, mean, means
from repr.losses.clustering import sinkhorn, swapped_prediction
from repr.losses.distillation import centred, masked_prediction, moved_center
from repr.losses.exchange import GATHER
from repr.losses.hypersphere import koleo
from repr.models.backbone import encode_views, width_of
from repr.models.batchnorm import synchronise
from repr.models.heads import PrototypeHead
from repr.models.masking import TokenMasking, encode_hidden, vit_fault
from repr.models.teacher import Teacher
from repr.objectives.base import Objective
from repr.objectives.views import view_sizes
from repr.optim import Optim

TOKEN_MASKING = TokenMasking()


class SelfDistillation(Objective):
    """The student predicts from every view the distribution over prototypes that the teacher gives of the large ones.

    Methods: DINO (Caron et al., 2021, arXiv 2104.14294); iBOT (Zhou et al., 2022, arXiv 2111.07832), with a weight of
    ``patches``; DINOv2 (Oquab et al., 2023, arXiv 2304.07193), with one of ``koleo`` and Sinkhorn besides.

    Flow: views -> backbone, one pass for each resolution -> head: scores of prototypes; large views -> teacher's
    backbone and head. The teacher's scores are made distributions, so that no prototype takes all: centred by a moving
    mean over all its rows and sharpened by a low temperature, or spread evenly over the prototypes by Sinkhorn. With
    ``patches``, the student sees a mask token in the place of some patches of the large views, of which the teacher
    sees all, and predicts of each hidden patch what the teacher makes of it. Reduced: the mean of the teacher's scores,
    or the mass of each prototype and the mean of the student's scores, and the losses. Gathered: features of the large
    views for ``koleo``.

    Terms: ``views``; ``patches``; ``koleo``, added over the large views. Logs: ``teacher_entropy``, in nats, of a row
    of the teacher; ``teacher_temperature``.

    Args:
        backbone: with ``patches`` a timm ``VisionTransformer``.
        hidden_dim: width of the two hidden layers of the head.
        dim: width of the space of the prototypes.
        num_prototypes: K.
        learn_length: whether the prototypes have a length of their own.
        share_head: whether the head of the views is that of the patches, too; else these have one of the same size.
        num_large: so many first views are the teacher's.
        masking: which patches the student does not see.
        predict_seen: whether the patches that the student sees are predicted too, as TIPSv2 does it (arXiv 2604.12012).
        centering: ``mean`` or ``sinkhorn``.
        num_iters: rounds of Sinkhorn.
        temperature: of the student.
        teacher_temperature: after its warm-up.
        first_teacher_temperature: at the start, from where it rises linearly.
        temperature_steps: optimizer steps of that rise.
        center_momentum: share of itself that the center keeps at a step.
        center_seen: whether the center of the patches follows all of them, as iBOT's does; else those alone that are
            predicted, as in DINOv2's code, which spares the teacher's head the others.
        freeze_steps: optimizer steps at the start in which the prototypes get no gradient.
        momentum: of the teacher at the start; it rises to 1 over the run along half a cosine.
    """

    TERMS = ("views", "patches", "koleo")
    STATISTICS = ("koleo",)
    MEANINGS: ClassVar[dict[str, str]] = Objective.MEANINGS | {
        "views": "Cross-entropy of predicting the teacher's distribution from another view; lower is better.",
        "patches": "Cross-entropy of predicting the teacher's distributions of hidden patches; lower is better.",
        "koleo": "Minus the logarithm of the distance of nearest neighbours, over large views; lower is spread out.",
        "teacher_entropy": "Of a row of the teacher, in nats; 0 or the logarithm of the prototypes is collapse.",
        "teacher_temperature": "By which the teacher's scores are divided.",
    }
    teacher: Teacher
    center: Tensor
    patch_center: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        hidden_dim: int = 2048,
        dim: int = 256,
        num_prototypes: int = 65536,
        learn_length: bool = False,
        share_head: bool = True,
        num_large: int = 2,
        masking: TokenMasking = TOKEN_MASKING,
        predict_seen: bool = False,
        centering: Literal["mean", "sinkhorn"] = "mean",
        num_iters: int = 3,
        temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        first_teacher_temperature: float = 0.04,
        temperature_steps: int = 0,
        center_momentum: float = 0.9,
        center_seen: bool = True,
        freeze_steps: int = 0,
        momentum: float = 0.996,
        weights: Mapping[str, float] | None = None,
        optim: Optim | None = None,
    ) -> None:
        width = width_of(backbone)
        super().__init__(synchronise(backbone), weights=weights, optim=optim)
        for name, value in (
            ("temperature", temperature),
            ("teacher_temperature", teacher_temperature),
            ("first_teacher_temperature", first_teacher_temperature),
        ):
            if value <= 0:
                raise ValueError(f"{name}={value}; set it above 0")
        if not 0 <= center_momentum <= 1:
            raise ValueError(f"center_momentum={center_momentum}; set it from 0 to 1")
        for name, number, least in (("num_prototypes", num_prototypes, 2), ("num_iters", num_iters, 1)):
            if number < least:
                raise ValueError(f"{name}={number}; set it to {least} or more")
        if centering not in ("mean", "sinkhorn"):
            raise ValueError(f"centering is '{centering}'; set it to mean or sinkhorn")
        if "views" not in self.weights:
            raise ValueError("weights.views=0, and the other terms come on top of it: set it above 0")
        self.has_patches = "patches" in self.weights
        if self.has_patches:
            if fault := vit_fault(backbone):
                raise ValueError(fault)
            self.mask_token = nn.Parameter(torch.zeros(width))
        head = partial(PrototypeHead, [width, hidden_dim, hidden_dim, dim], num_prototypes, learn_length=learn_length)
        self.head, self.patch_head = head(), None if share_head or not self.has_patches else head()
        if centering == "mean":
            self.register_buffer("center", torch.zeros(num_prototypes))
            if self.has_patches:
                self.register_buffer("patch_center", torch.zeros(num_prototypes))
        self.num_large, self.masking, self.num_prototypes = num_large, masking, num_prototypes
        self.predict_seen = predict_seen
        self.centering, self.num_iters = centering, num_iters
        self.center_momentum, self.center_seen = center_momentum, center_seen
        self.temperature, self.freeze_steps = temperature, freeze_steps
        self.temperatures, self.temperature_steps = (first_teacher_temperature, teacher_temperature), temperature_steps
        students: dict[str, nn.Module] = {"backbone": self.backbone, "head": self.head}
        students |= {} if self.patch_head is None else {"patch_head": self.patch_head}
        self.teacher = Teacher(momentum=momentum, final_momentum=1, schedule="cosine", before_step=False, **students)

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Too few views, large ones that are smaller than others, and masks that hide nothing."""
        sizes = view_sizes(cfg)
        if len(sizes) < max(2, self.num_large) or self.num_large < 1:
            yield f"objective.num_large={self.num_large} of {len(sizes)} views: set views=dino, or another number"
        elif max(sizes) > min(sizes[: self.num_large]):
            yield f"the first {self.num_large} views are the teacher's, and others are larger: {sizes}; order them"
        elif self.has_patches and (num := self._side(sizes[0]) ** 2) * self.masking.ratio[1] < 1:
            yield (
                f"objective.masking.ratio={list(self.masking.ratio)} of the {num} patch(es) of a view hides none: "
                "raise it or image_size, or set a smaller backbone.patch_size"
            )
        yield from super().config_faults(cfg)

    def step(self, batch: Batch) -> StepOutput:
        """The terms of the global batch; their gradients are those of this rank's rows, which DDP averages."""
        views, vit = batch["views"], cast(Any, self.backbone)
        if len(views) < max(2, self.num_large):
            raise ValueError(f"{type(self).__name__} takes {max(2, self.num_large)} views or more; got {len(views)}")
        large, small = views[: self.num_large], views[self.num_large :]
        temperature = self.teacher_temperature_at(self.step_number)
        terms: dict[str, Tensor] = {}
        if self.has_patches:
            hidden = self._hidden(batch)
            predicted = torch.ones_like(hidden) if self.predict_seen else hidden
            rows = predicted.flatten().nonzero()[:, 0]  # (M,) of all cells: a head costs as much as a small backbone
            targets, cell_targets = self._teach_cells(torch.cat(large), rows, temperature)
            tokens = encode_hidden(vit, torch.cat(large), hidden, self.mask_token)
            features = torch.cat([vit.forward_head(tokens), *([encode_views(vit, small)] if small else [])])
            scores = (self.patch_head or self.head)(_cells(vit, tokens)[rows])
            terms["patches"] = masked_prediction(scores, cell_targets, predicted, temperature=self.temperature)
        else:
            with torch.no_grad():
                scores = self.teacher.head(encode_views(self.teacher.backbone, large))
            targets = self._targets(scores, "center", scores, temperature)
            features = encode_views(vit, views)
        student = self.head(features).chunk(len(views))  # V x (B, K)
        terms["views"] = swapped_prediction(
            student, targets.chunk(len(large)), assign_views=range(len(large)), temperature=self.temperature
        )
        assigned = targets.chunk(len(large))[0]
        entropy = torch.special.entr(assigned).sum(1).mean()
        terms = means({**terms, "teacher_entropy": entropy})
        logs: dict[str, Tensor | float] = {"teacher_temperature": temperature}
        logs["teacher_entropy"] = terms.pop("teacher_entropy").detach()
        if "koleo" in self.weights:
            near = [koleo(view.float(), exchange=GATHER) for view in features.chunk(len(views))[: len(large)]]
            terms["koleo"] = torch.stack(near).sum()
        own = student[0].detach()
        # What all scores have in common is no sign of collapse: the teacher's distributions are without it.
        own = own - (self.center if self.centering == "mean" else mean(own.mean(0)))
        return StepOutput(terms, {"scores": own}, scores=assigned, assignments=assigned, logs=logs)

    def _side(self, size: int) -> int:
        """Patches along a view of ``size`` pixels."""
        return size // cast(Any, self.backbone).patch_embed.patch_size[0]

    def _hidden(self, batch: Batch) -> Tensor:
        """Which patches of the large views the student does not see: (G * B, L) bool."""
        large = batch["views"][: self.num_large]
        if "seed" not in batch:
            raise ValueError('masks are drawn from batch["seed"]: give (B,) int64, other numbers in every epoch')
        if len({view.shape for view in large}) > 1:
            raise ValueError(f"large views have one shape, where patches are hidden; got {[v.shape for v in large]}")
        rows, columns = (self._side(size) for size in large[0].shape[2:])
        return self.masking.draw(batch["seed"], (rows, columns), num_views=len(large))

    @torch.no_grad()
    def _teach_cells(self, images: Tensor, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The teacher's distributions of large views (G * B, K), and of those of their cells that ``rows`` names."""
        vit = self.teacher.backbone
        tokens = vit.forward_features(images)
        scores, cells = self.teacher.head(vit.forward_head(tokens)), _cells(vit, tokens)
        head = self.teacher.head if self.patch_head is None else self.teacher.patch_head
        views = self._targets(scores, "center", scores, temperature)
        if self.centering == "mean" and self.center_seen:
            cell_scores, mean_scores = head.forward_some(cells, rows)
            return views, self._targets(cell_scores, "patch_center", mean_scores.unsqueeze(0), temperature)
        cell_scores = head(cells[rows])
        return views, self._targets(cell_scores, "patch_center", cell_scores, temperature)

    @torch.no_grad()
    def _targets(self, scores: Tensor, center: str, seen: Tensor, temperature: float) -> Tensor:
        """The teacher's distributions; in training the center then follows the scores of all that it has ``seen``."""
        if self.centering == "sinkhorn":
            return sinkhorn(scores, epsilon=temperature, num_iters=self.num_iters, all_reduce=all_reduce)
        old: Tensor = getattr(self, center)
        targets = centred(scores, old, temperature)
        if self.training:
            old.copy_(moved_center(old, seen, momentum=self.center_momentum, all_reduce=all_reduce))
        return targets

    def teacher_temperature_at(self, step: int) -> float:
        """The teacher's temperature at an optimizer step."""
        first, last = self.temperatures
        return last if step >= self.temperature_steps else first + (last - first) * step / self.temperature_steps

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """The logarithm of the number of prototypes; of patches, times the share of pictures that are masked."""
        level = math.log(self.num_prototypes)
        return {"views": level, "patches": level * (1 if self.predict_seen else self.masking.share)}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave frozen prototypes out of the step: no gradient, hence no momentum and no decay either."""
        if self.step_number < self.freeze_steps:
            for head in (self.head, self.patch_head):
                if head is not None:
                    head.prototypes.weight.grad = head.length.grad = None


def _cells(vit: Any, tokens: Tensor) -> Tensor:
    """The patches of all pictures, in the order of these: (B, P + L, D) -> (B * L, D)."""
    return tokens[:, vit.num_prefix_tokens :].flatten(0, 1)
