"""A student that predicts how its teacher sorts other views: DINO."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from repr.batch import Batch, StepOutput
from repr.distributed import all_reduce, means
from repr.losses.distillation import moved_center, self_distillation
from repr.models.backbone import encode_views, width_of
from repr.models.batchnorm import synchronise
from repr.models.heads import PrototypeHead
from repr.models.teacher import Teacher
from repr.objectives.base import Objective
from repr.objectives.views import view_sizes
from repr.optim import Optim


class SelfDistillation(Objective):
    """The student predicts from every view the distribution over prototypes that the teacher gives of the large ones.

    Method: DINO (Caron et al., 2021, arXiv 2104.14294).

    Flow: views -> backbone, one pass for each resolution -> head: scores of prototypes; large views -> teacher's
    backbone and head. The teacher's scores are centred by a moving mean over all its rows, so that no prototype takes
    all, and sharpened by a low temperature. Reduced: the mean of the teacher's scores, and the loss.

    Terms: ``views``. Logs: ``teacher_entropy``, in nats, of a row of the teacher; ``teacher_temperature``.

    Args:
        hidden_dim: width of the two hidden layers of the head.
        dim: width of the space of the prototypes.
        num_prototypes: K.
        learn_length: whether the prototypes have a length of their own.
        num_large: so many first views are the teacher's.
        temperature: of the student.
        teacher_temperature: after its warm-up.
        first_teacher_temperature: at the start, from where it rises linearly.
        temperature_steps: optimizer steps of that rise.
        center_momentum: share of itself that the center keeps at a step.
        freeze_steps: optimizer steps at the start in which the prototypes get no gradient.
        momentum: of the teacher at the start; it rises to 1 over the run along half a cosine.
    """

    TERMS = ("views",)
    MEANINGS: ClassVar[dict[str, str]] = Objective.MEANINGS | {
        "views": "Cross-entropy of predicting the teacher's distribution from another view; lower is better.",
        "teacher_entropy": "Of a row of the teacher, in nats; 0 or the logarithm of the prototypes is collapse.",
        "teacher_temperature": "By which the teacher's scores are divided.",
    }
    teacher: Teacher
    center: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        hidden_dim: int = 2048,
        dim: int = 256,
        num_prototypes: int = 65536,
        learn_length: bool = False,
        num_large: int = 2,
        temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        first_teacher_temperature: float = 0.04,
        temperature_steps: int = 0,
        center_momentum: float = 0.9,
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
        self.head = PrototypeHead([width, hidden_dim, hidden_dim, dim], num_prototypes, learn_length=learn_length)
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.num_large, self.temperature, self.center_momentum = num_large, temperature, center_momentum
        self.temperatures, self.temperature_steps = (first_teacher_temperature, teacher_temperature), temperature_steps
        self.freeze_steps = freeze_steps
        self.teacher = Teacher(momentum=momentum, final_momentum=1, backbone=self.backbone, head=self.head)

    def config_faults(self, cfg: Any) -> Iterator[str]:
        """Too few views, and large ones that are smaller than others."""
        sizes = view_sizes(cfg)
        if len(sizes) < max(2, self.num_large) or self.num_large < 1:
            yield f"objective.num_large={self.num_large} of {len(sizes)} views: set views=dino, or another number"
        elif max(sizes) > min(sizes[: self.num_large]):
            yield f"the first {self.num_large} views are the teacher's, and others are larger: {sizes}; order them"
        yield from super().config_faults(cfg)

    def step(self, batch: Batch) -> StepOutput:
        """The loss of the global batch; its gradient is that of this rank's rows, which DDP averages."""
        views = batch["views"]
        if len(views) < max(2, self.num_large):
            raise ValueError(f"{type(self).__name__} takes {max(2, self.num_large)} views or more; got {len(views)}")
        student = self.head(encode_views(self.backbone, views)).chunk(len(views))  # V x (B, K)
        with torch.no_grad():
            features = encode_views(self.teacher.backbone, views[: self.num_large])
            teacher = self.teacher.head(features).chunk(self.num_large)
        temperature = self.teacher_temperature_at(self.step_number)
        loss = self_distillation(
            student,
            teacher,
            center=self.center.clone(),
            student_temperature=self.temperature,
            teacher_temperature=temperature,
        )
        sharp = ((teacher[0] - self.center) / temperature).log_softmax(1)
        told = means({"views": loss, "teacher_entropy": -(sharp.exp() * sharp).sum(1).mean()})
        if self.training:
            rows = torch.stack(list(teacher))
            self.center.copy_(moved_center(self.center, rows, momentum=self.center_momentum, all_reduce=all_reduce))
        logs: dict[str, Tensor | float] = {
            "teacher_entropy": told["teacher_entropy"].detach(),
            "teacher_temperature": temperature,
        }
        return StepOutput({"views": told["views"]}, {"scores": student[0].detach()}, logs=logs)

    def teacher_temperature_at(self, step: int) -> float:
        """The teacher's temperature at an optimizer step."""
        first, last = self.temperatures
        return last if step >= self.temperature_steps else first + (last - first) * step / self.temperature_steps

    def chance(self, num_rows: int) -> dict[str, float | Tensor | None]:
        """The logarithm of the number of prototypes."""
        return {"views": math.log(self.head.prototypes.out_features)}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave frozen prototypes out of the step: no gradient, hence no momentum and no decay either."""
        if self.step_number < self.freeze_steps:
            self.head.prototypes.weight.grad = self.head.length.grad = None
