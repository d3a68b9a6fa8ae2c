"""A teacher: modules that follow those of a student slowly."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from repr.distributed import local


class Teacher(nn.Module):
    """A copy of some modules whose parameters are a moving average of the originals'.

    Only parameters follow. Buffers are the copy's own: in training mode its BatchNorm normalises by the batch and keeps
    running statistics of what it has seen itself. No parameter has a gradient, so optimizers and DDP pass them over.
    A flow calls the copies by the names they were given, as in ``self.teacher.backbone``, under ``torch.no_grad``.

    Nothing is counted here. A flow says when to :meth:`update` and with which momentum; as a function of the optimizer
    step (:func:`cosine_momentum`) it goes on after a resume where it was. Updating in ``update_targets`` (once an
    optimizer step that was made, whatever the accumulation; not after one that the guard has skipped) and updating at
    the next step before the teacher's forward give the same targets.

    The copies are made of plain modules, before anything is sharded, so that they can be sharded as the originals are;
    the update then works on local shards.

    Args:
        students: what is copied, under the names that the modules have in their owner.
    """

    def __init__(self, **students: nn.Module) -> None:
        super().__init__()
        for name, student in students.items():
            self.add_module(name, copy.deepcopy(student).requires_grad_(False))

    @torch.no_grad()
    def update(self, owner: nn.Module, momentum: float) -> None:
        """Set each parameter to ``momentum * itself + (1 - momentum) * the original``.

        Args:
            owner: what holds the originals, under the names of the copies.
            momentum: 1 keeps the teacher as it is.
        """
        own, students = ([local(p.detach()) for p in m.parameters()] for m in (self, self._students(owner)))
        torch._foreach_lerp_(own, students, 1 - momentum)

    @torch.no_grad()
    def restart(self, owner: nn.Module) -> None:
        """Become a copy of the originals again, buffers and all."""
        students = self._students(owner)
        for own, other in (*zip(self.parameters(), students.parameters(), strict=True),
                           *zip(self.buffers(), students.buffers(), strict=True)):  # fmt: skip
            local(own).copy_(local(other))

    def _students(self, owner: nn.Module) -> nn.ModuleList:
        return nn.ModuleList(owner.get_submodule(name) for name, _ in self.named_children())


def cosine_momentum(step: int, *, start: float, total: int | None) -> float:
    """Momentum of the update before the forward of a step: from ``start`` to 1 along half a cosine.

    ``1 - (1 - start) * (cos(pi * step / total) + 1) / 2``, as in BYOL (Grill et al., 2020, arXiv:2006.07733).

    Args:
        step: optimizer steps made before.
        start: momentum at step 0.
        total: optimizer steps of the whole run; None: ``start`` throughout.
    """
    return start if total is None else 1 - (1 - start) * (math.cos(math.pi * min(step / total, 1)) + 1) / 2
