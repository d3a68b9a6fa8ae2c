"""Pictures of what a run does: the views it trains on, and what its flow draws."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.io import encode_png

from repr.batch import Batch
from repr.drawing import Show, enlarge, grid, shown
from repr.files import replacing
from repr.runs.folder import PICTURES


class Pictures(pl.Callback):
    """Draw the same few training samples after each evaluation: ``<folder>/pictures/<name>.png``, and TensorBoard.

    ``views`` has a column a sample and a row a view; the others are those of the flow's ``pictures``.

    Args:
        folder: of the run; each file is replaced by the next of its name.
        num_samples: how many samples are drawn, the first of the first batch.
    """

    def __init__(self, folder: str | Path, num_samples: int = 8) -> None:
        self.folder, self.num_samples = Path(folder), num_samples
        self._batch: Batch = {}
        self._step = -1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Keep the samples."""
        if not self._batch:
            self._batch = first_rows(batch, self.num_samples)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draw."""
        self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draw, unless an evaluation has just done so."""
        self._draw(trainer, pl_module)

    @torch.no_grad()
    def _draw(self, trainer: pl.Trainer, module: Any) -> None:
        if not self._batch or trainer.sanity_checking or self._step == trainer.global_step:
            return
        self._step = trainer.global_step
        data = getattr(trainer, "datamodule", None)
        show = partial(shown, mean=getattr(data, "mean", (0, 0, 0)), std=getattr(data, "std", (1, 1, 1)))
        training = module.training
        module.eval()
        # Every process takes part, since a sharded module needs them all; the first one writes.
        pictures = {"views": draw_views(self._batch, show)} if "views" in self._batch else {}
        pictures |= module.pictures(self._batch, show)
        module.train(training)
        if trainer.is_global_zero:
            for name, picture in pictures.items():
                with replacing(self.folder / PICTURES / f"{name}.png") as file:
                    file.write(bytes(encode_png(picture).tolist()))
                for logger in trainer.loggers:
                    if isinstance(logger, TensorBoardLogger):
                        logger.experiment.add_image(name, picture, self._step)


def first_rows(batch: Batch, num: int) -> Batch:
    """A copy of the first samples of a batch."""
    rows = {
        name: [view[:num].clone() for view in value] if isinstance(value, list) else value[:num].clone()
        for name, value in cast(dict[str, Tensor | list[Tensor]], batch).items()
    }
    return cast(Batch, rows)


def draw_views(batch: Batch, show: Show) -> Tensor:
    """A column a sample, a row a view: (3, H, W) uint8."""
    return grid([[enlarge(picture) for picture in show(view)] for view in batch["views"]])
