"""Watch for collapse during training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from repr.batch import StepOutput
from repr.distributed import gather, world_size
from repr.metrics.collapse import assignment_entropy, feature_std, prototype_entropy
from repr.metrics.geometry import effective_rank


class Collapse(pl.Callback):
    """Log signs of collapse in the last step's features, and warn once when they say collapse.

    The embeddings of a :class:`repr.batch.StepOutput` give ``train/std_<name>`` (0 = all the same, 1 = spread over the
    sphere) and ``train/rank_<name>``, the effective rank; its scores and assignments ``train/prototype_entropy`` and
    ``train/assignment_entropy``, in nats, whose level at chance is that of the loss, ln K.

    Features that have less than half of the spread that they had when a run began are a sign, too: those of BYOL
    without its predictor come to rest at a third. As they should be, methods spread them out after a dip that may last
    as long as the warm-up (``benchmarks/results/teachers.md``).

    Args:
        every: steps between two looks, besides one at the first step.
        start: step from which a warning may be given; an encoder with random weights looks collapsed.
        max_rows: rows that are looked at, of all ranks together.
    """

    def __init__(self, *, every: int, start: int, max_rows: int = 1024) -> None:
        for name, value in {"every": every, "max_rows": max_rows}.items():
            if value < 1:
                raise ValueError(f"callbacks.collapse.{name}={value}; set it to 1 or more")
        self.every, self.start, self.max_rows = every, start, max_rows
        self._warned: set[str] = set()
        self._first: dict[str, float] = {}  # values at the first look at each
        self._step = -1
        self.meanings: dict[str, str] = {}

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on compares with."""
        return {"first": self._first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._first = dict(state_dict["first"])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at what the step has left."""
        step = trainer.global_step
        if step == self._step or (self._first and step % self.every):
            return
        self._step = step
        values, signs = collapse_signs(getattr(pl_module, "output", StepOutput({})), self.max_rows, self._first)
        if not all(map(math.isfinite, values.values())):
            return  # the guard has the say
        self._first = values | self._first
        self.meanings = {f"train/{name}": _meaning(name) for name in values}
        pl_module.log_dict({f"train/{name}": value for name, value in values.items()})
        for name, sign in signs.items():
            if step >= self.start and name not in self._warned:
                self._warned.add(name)
                rank_zero_warn(f"step {step}: {sign}: this looks like collapse")


def _meaning(name: str) -> str:
    kind, _, features = name.partition("_")
    return {
        "std": f"Spread of the features '{features}' of a batch; 0 is collapse, 1 is all over the sphere.",
        "rank": f"Effective rank of the features '{features}' of a batch; 1 is collapse, higher is better.",
        "prototype": "Entropy of which prototype is nearest, in nats; 0 is collapse, higher is better.",
        "assignment": "Entropy of a sample's assignment, in nats; that of chance is collapse, lower is better.",
    }[kind]


def collapse_signs(
    output: StepOutput, max_rows: int, first: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, str]]:
    """Values to log of a step, and a sentence for each part of it that has collapsed; all ranks must call it.

    ``first`` has the values at the first look.
    """

    def some(x: Tensor) -> Tensor:
        return gather(x[: -(-max_rows // world_size())]).float()

    values: dict[str, float] = {}
    signs: dict[str, str] = {}
    for name, embedding in output.embeddings.items():
        rows = some(embedding)  # (N, D)
        if not rows.isfinite().all():
            continue
        spread, rank = feature_std(rows), effective_rank(rows)
        values |= {f"std_{name}": spread, f"rank_{name}": rank}
        if spread < 0.05:
            signs[name] = f"the features '{name}' are nearly the same for all samples (deviation {spread:.4f})"
        elif spread < (at_first := first.get(f"std_{name}", 0)) / 2:
            signs[name] = f"the features '{name}' draw together (deviation {spread:.3f}, {at_first:.3f} at first)"
        elif rank < 1.5:
            signs[name] = f"the features '{name}' lie on a line (effective rank {rank:.2f})"
    if output.scores is not None:
        rows = some(output.scores)  # (N, K)
        value = values["prototype_entropy"] = prototype_entropy(rows)
        if value < 0.1 * math.log(min(rows.shape)):
            signs["scores"] = f"nearly all samples have the same nearest prototype (entropy {value:.3f} nats)"
    if output.assignments is not None:
        rows = some(output.assignments)
        value = values["assignment_entropy"] = assignment_entropy(rows)
        if value > 0.99 * math.log(rows.shape[1]):
            signs["assignments"] = f"the assignments' entropy of {value:.3f} is that of chance, ln {rows.shape[1]}"
    return values, signs
