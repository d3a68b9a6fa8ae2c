"""Pictures of what a run does: the views it trains on, and what its flow draws."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torchvision.io import encode_png

from repr.batch import Batch
from repr.drawing import Show, enlarge, grid, shown
from repr.files import replacing
from repr.runs.folder import PICTURES
from repr.training.loggers import add_picture


class Pictures(pl.Callback):
    """Draw the same few training samples after each evaluation: ``<folder>/pictures/<name>.png``, and loggers.

    ``views`` has a column a sample and a row a view, and is drawn at the first step, too; the others are those of the
    flow's ``pictures``.

    Args:
        folder: of the run.
        num_samples: how many samples are drawn, the first of the first batch.
    """

    def __init__(self, folder: str | Path, num_samples: int = 8) -> None:
        if num_samples < 1:
            raise ValueError(f"callbacks.pictures.num_samples={num_samples}; set it to 1 or more")
        self.folder, self.num_samples = Path(folder), num_samples
        self._batch: Batch = {}
        self._step = -1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Keep a copy of the samples, and draw the views of a run that has none yet."""
        if not self._batch:
            self._batch = tree_map(lambda rows: rows[: self.num_samples].clone(), batch)
            if trainer.is_global_zero and not Path(self.folder, PICTURES).exists():
                self._write(trainer, self._views(trainer))

    @torch.no_grad()
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draw, once a step."""
        if not self._batch or trainer.sanity_checking or self._step == trainer.global_step:
            return
        self._step = trainer.global_step
        training = pl_module.training
        pl_module.eval()
        # Every process takes part, since a sharded module needs them all; the first one writes.
        pictures = pl_module.pictures(self._batch, _show(trainer))
        pl_module.train(training)
        if trainer.is_global_zero:
            self._write(trainer, self._views(trainer) | pictures)

    on_train_end = on_validation_end  # the last step may have no evaluation

    def _views(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        views, show = self._batch.get("views", []), _show(trainer)
        return {"views": grid([[enlarge(picture) for picture in show(view)] for view in views])} if views else {}

    def _write(self, trainer: pl.Trainer, pictures: Mapping[str, Tensor]) -> None:
        for name, picture in pictures.items():
            with replacing(self.folder / PICTURES / f"{name}.png") as file:
                file.write(bytes(encode_png(picture).tolist()))
            add_picture(trainer, name, picture)


def _show(trainer: pl.Trainer) -> Show:
    """The reverse of the normalisation of the data, if they have one."""
    data = getattr(trainer, "datamodule", None)
    return partial(shown, mean=getattr(data, "mean", (0, 0, 0)), std=getattr(data, "std", (1, 1, 1)))
