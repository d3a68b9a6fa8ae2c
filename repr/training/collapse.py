"""Watch for collapse during training."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from repr.metrics.collapse import assignment_entropy, feature_std, prototype_entropy
from repr.metrics.geometry import effective_rank


class Collapse(pl.Callback):
    """Log signs of collapse in the last step's features, and warn once when they say collapse.

    Of every table of features (N, D) of a step, of this process's rows: ``train/std_<name>`` (0 = all the same,
    1 = spread over the sphere) and ``train/rank_<name>``, the effective rank. Of ``scores`` and ``assignments`` (N, K):
    ``train/prototype_entropy`` and ``train/assignment_entropy``, in nats; their chance line is that of the loss, ln K.

    Args:
        every: steps between two looks.
        start: step from which a warning may be given; an encoder with random weights looks collapsed.
        max_rows: rows of a table that are looked at.
    """

    def __init__(self, *, every: int, start: int, max_rows: int = 1024) -> None:
        self.every, self.start, self.max_rows = every, start, max_rows
        self._warned: set[str] = set()
        self._step = -1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at what the step has left."""
        step = trainer.global_step
        if step == self._step or step % self.every:
            return
        self._step = step
        tables = {name: table[: self.max_rows].float() for name, table in getattr(pl_module, "features", {}).items()}
        values, signs = collapse_signs(tables)
        if not all(map(math.isfinite, values.values())):
            return  # the guard has the say
        pl_module.log_dict({f"train/{name}": value for name, value in values.items()})
        for name, sign in signs.items():
            if step >= self.start and name not in self._warned:
                self._warned.add(name)
                rank_zero_warn(f"step {step}: {sign}: this looks like collapse")


def collapse_signs(tables: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, str]]:
    """Values to log, and for those that say collapse a sentence.

    Args:
        tables: features (N, D) by name; ``scores`` and ``assignments`` (N, K) are read as such.
    """
    values: dict[str, float] = {}
    signs: dict[str, str] = {}
    for name, table in tables.items():
        num, num_columns = table.shape
        if name == "assignments":
            value = values["assignment_entropy"] = assignment_entropy(table)
            if value > 0.99 * math.log(num_columns):
                signs[name] = f"the assignments' entropy of {value:.3f} is that of chance, ln {num_columns}"
        elif name == "scores":
            value = values["prototype_entropy"] = prototype_entropy(table)
            if value < 0.1 * math.log(min(num, num_columns)):
                signs[name] = f"nearly all samples have the same nearest prototype (entropy {value:.3f} nats)"
        elif table.isfinite().all():
            spread, rank = feature_std(table), effective_rank(table)
            values |= {f"std_{name}": spread, f"rank_{name}": rank}
            if spread < 0.05:
                signs[name] = f"the features '{name}' are nearly the same for all samples (deviation {spread:.4f})"
            elif rank < 1.5:
                signs[name] = f"the features '{name}' lie on a line (effective rank {rank:.2f})"
    return values, signs
