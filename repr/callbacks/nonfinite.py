"""Stop at the first loss that is not finite, and say which term and which samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from repr.batch import Batch
from repr.distributed import rank


class NonFiniteLossError(ValueError):
    """A loss became NaN or infinite."""


class NonFiniteGuard(pl.Callback):
    """Stop the run before a loss that is not finite reaches the weights.

    The step, the terms and the data-set indices of the batch are written to
    ``<folder>/non_finite_rank<r>.json`` first.

    Args:
        folder: where to write.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._index: list[int] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Agree on the first process's folder."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Remember which samples are in the batch."""
        self._index = batch["index"].tolist() if "index" in batch else []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        """Check the loss.

        Raises:
            NonFiniteLossError: it is NaN or infinite.
        """
        if torch.isfinite(loss):
            return
        terms = {name: float(term) for name, term in pl_module.terms.items()}
        bad = [name for name, value in terms.items() if not torch.isfinite(torch.tensor(value))] or ["the weighted sum"]
        path = self.folder / f"non_finite_rank{rank()}.json"
        record = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "bad_terms": bad,
            "terms": {name: str(value) for name, value in terms.items()},
            "index": self._index,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1))
        raise NonFiniteLossError(
            f"{', '.join(bad)} is not finite at step {trainer.global_step}; the batch's indices are in {path}. "
            "Lower optim.lr, lengthen optim.warmup_steps, or set trainer.gradient_clip_val or trainer.precision=32-true"
        )
