"""Modules and losses of other libraries as objectives, so that all but these is ours: views, optimizer, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from torch import nn

from benchmarks import teacher_step_time
from benchmarks.step_time import HEADS, Candidate, lightly, lightly_mae, stable_pretraining
from benchmarks.teacher_step_time import METHODS, stable_ijepa
from repr.batch import Batch, StepOutput
from repr.models.teacher import Teacher
from repr.objectives.base import Objective

Make = Callable[..., Candidate]
MASKED = 0.75  # share of the patches that MAE removes
MAKES: dict[tuple[str, str], Make] = {
    ("lightly", "SimCLR"): partial(lightly, "SimCLR"),
    ("lightly", "SwAV"): partial(lightly, "SwAV"),
    ("stable-pretraining", "SimCLR"): partial(stable_pretraining, "SimCLR"),
    ("stable-pretraining", "SwAV, all views assigned"): partial(stable_pretraining, "SwAV"),
    ("lightly", "MAE"): lambda model, large, small, heads: lightly_mae(model, large[0], MASKED, heads),
}
MAKES |= {
    (library, method): make
    for method, libraries in METHODS.items()
    for library, make in libraries.items()
    if library != "ours"
}
MAKES["stable-pretraining", "I-JEPA"] = stable_ijepa  # with blocks of its own


class Peer(Objective):
    """A method as another library has it.

    A teacher's momentum rises to 1 by a cosine, as ours does, and the last layer of a head rests for the first epoch
    where the library has that.

    Args:
        backbone: image encoder.
        library: ``lightly`` or ``stable-pretraining``.
        method: as a page of step times calls it.
        heads: fields of :class:`benchmarks.step_time.Heads` other than that page's; ``momentum`` is the first one.
        views: number and pixels of the large views, and of the small ones.
        batch_size: pictures of a step.
        base: options of every flow.
    """

    TERMS = ("peer",)

    def __init__(
        self,
        backbone: nn.Module,
        *,
        library: str,
        method: str,
        heads: Mapping[str, Any],
        views: tuple[tuple[int, int], tuple[int, int]],
        batch_size: int,
        **base: Any,
    ) -> None:
        super().__init__(backbone, **base)
        self.make = MAKES[library, method]
        self.schedule = Teacher(momentum=heads.get("momentum", 0.996), final_momentum=1)  # of no modules
        default = teacher_step_time.HEADS if method in METHODS else HEADS
        self.heads = default._replace(**{**heads, "momentum": self.momentum})
        self.shapes = [(count, batch_size, 3, size, size) for count, size in views]
        self.peer: nn.Module | None = None

    def momentum(self) -> float:
        """Of the teacher, at this step."""
        return self.schedule.momentum_at(self.step_number, self.total_steps)

    def configure_model(self) -> None:
        """Build the library's modules; not earlier, since some of them need numbers, which the check has none of."""
        if self.peer is None:
            self.large, self.small = ([*torch.zeros(shape)] for shape in self.shapes)
            self.peer, self.run, *self.after = self.make(self.backbone, self.large, self.small, self.heads)
            self.peer.train()

    def step(self, batch: Batch) -> StepOutput:
        """The library's loss of the views, which its modules find where they were when they were built."""
        for place, view in zip([*self.large, *self.small], batch["views"], strict=True):
            place.copy_(view)
        return StepOutput({"peer": self.run().squeeze()})

    def on_after_backward(self) -> None:
        """Let the last layers rest."""
        for module in self.modules():
            if hasattr(module, "cancel_last_layer_gradients"):
                module.cancel_last_layer_gradients(self.current_epoch)

    def update_targets(self) -> None:
        """Let the teachers follow."""
        for work in self.after:
            work()


def become_peer(cfg: DictConfig, method: str, library: str) -> None:
    """Put the objective of another library, with the widths of ours, in the place of ours."""
    options, views = cfg.objective, list(cfg.views.values())
    contrast = (options.get("losses") or {}).get("contrast", {})
    heads = {
        "hidden": options.get("hidden_dim"),
        "dim": options.get("dim"),
        "prototypes": options.get("num_prototypes"),
        "momentum": options.get("momentum"),
        "temperature": options.get("temperature", contrast.get("temperature")),
        "decoder": [options.decoder.dim, options.decoder.depth] if "decoder" in options else None,
    }
    counts = [
        [sum(view.get("count", 1) for view in views if (view.size == cfg.image_size) is large), size]
        for large, size in ((True, cfg.image_size), (False, cfg.get("small_size", 0)))
    ]
    objective = {
        "_target_": "benchmarks.claims.peers.Peer",
        "backbone": "${backbone}",
        "optim": "${optim}",
        "library": library,
        "method": method,
        "heads": {name: value for name, value in heads.items() if value is not None},
        "views": counts,
        "batch_size": "${data.batch_size}",
    }
    with open_dict(cfg):
        cfg.objective = objective
