"""A teacher: modules that follow those of a student slowly."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from timm.layers import DropPath
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from repr.shard import local


class Teacher(nn.Module):
    """A copy of some modules whose parameters are a moving average of the originals'.

    Only parameters follow. Buffers are the copy's own: in training mode its BatchNorm normalises by the batch and keeps
    running statistics of what it has seen itself. It drops nothing out. No parameter has a gradient, so optimizers and
    DDP pass them over.
    A flow assigns it to ``self.teacher`` in its constructor, and :class:`repr.objectives.base.Objective` does the rest.
    In its step the flow calls the copies by their names, as in ``self.teacher.backbone``, under ``torch.no_grad``.

    The momentum is a function of the optimizer step, so nothing is counted here. The copies are made before anything is
    sharded, so that they are sharded as the originals are, and the update works on local shards.

    Args:
        momentum: at the first step; 1 keeps the teacher as it is.
        final_momentum: at the end of the run; None: ``momentum`` throughout.
        schedule: how it gets there, along half a ``cosine`` or a straight line (``linear``).
        before_step: which momentum is whose. True: the teacher follows before the forward of step k with the momentum
            of step k, as in MoCo v3 and PixPro; False: after the optimizer has made step k, as in BYOL and DINO. An
            update that belongs before a step is made at the end of the one before it, which gives the same targets.
        students: what is copied, under the names that the modules have in their owner.

    Raises:
        ValueError: a momentum that is not between 0 and 1.
    """

    def __init__(
        self,
        *,
        momentum: float,
        final_momentum: float | None = None,
        schedule: Literal["cosine", "linear"] = "cosine",
        before_step: bool = False,
        **students: nn.Module,
    ) -> None:
        super().__init__()
        self.momentum, self.before_step, self.schedule = momentum, before_step, schedule
        self.final_momentum = momentum if final_momentum is None else final_momentum
        for name, value in (("momentum", self.momentum), ("final_momentum", self.final_momentum)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}; set it from 0 to 1")
        for name, student in students.items():
            self.add_module(name, copy.deepcopy(student).requires_grad_(False))
        for module in self.modules():
            if isinstance(module, _DropoutNd):
                module.p = 0.0
            elif isinstance(module, DropPath):
                module.drop_prob = 0.0

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def momentum_at(self, step: int, total: int | None) -> float:
        """The momentum of a step.

        ``final - (final - first) * (cos(pi * step / total) + 1) / 2``, as in BYOL (Grill et al., 2020,
        arXiv:2006.07733), or ``first + (final - first) * step / total``; the first one if ``total`` is None, unknown.
        """
        if total is None:
            return self.momentum
        rise, share = self.final_momentum - self.momentum, min(step / total, 1)
        left = (math.cos(math.pi * share) + 1) / 2 if self.schedule == "cosine" else 1 - share
        return self.final_momentum - rise * left

    def follow(self, owner: nn.Module, step: int, total: int | None) -> None:
        """Make the update that is due once the optimizer has made a step, before which it had made ``step`` others."""
        self.update(owner, self.momentum_at(step + self.before_step, total))

    @torch.no_grad()
    def update(self, owner: nn.Module, momentum: float) -> None:
        """Set each parameter to ``momentum * itself + (1 - momentum) * the original``.

        The originals are the modules of ``owner`` with the names of the copies.
        """
        own, students = ([local(p.detach()) for p in m.parameters()] for m in (self, self._students(owner)))
        torch._foreach_lerp_(own, students, 1 - momentum)

    @torch.no_grad()
    def restart(self, owner: nn.Module) -> None:
        """Become a copy of the originals again, buffers and all."""
        students = self._students(owner)
        own, originals = ([*module.parameters(), *module.buffers()] for module in (self, students))
        for copied, original in zip(own, originals, strict=True):
            local(copied).copy_(local(original))

    def _students(self, owner: nn.Module) -> nn.ModuleList:
        return nn.ModuleList(owner.get_submodule(name) for name, _ in self.named_children())
