"""Pictures of what a run does: the views it trains on, and what its flow draws."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils._pytree import tree_map
from torchvision.io import encode_png

from repr.batch import Batch
from repr.drawing import enlarge, grid, shown
from repr.files import replacing
from repr.runs.folder import PICTURES


class Pictures(pl.Callback):
    """Draw the same few training samples after each evaluation: ``<folder>/pictures/<name>.png``, and TensorBoard.

    ``views`` has a column a sample and a row a view; the others are those of the flow's ``pictures``.

    Args:
        folder: of the run.
        num_samples: how many samples are drawn, the first of the first batch.
    """

    def __init__(self, folder: str | Path, num_samples: int = 8) -> None:
        self.folder, self.num_samples = Path(folder), num_samples
        self._batch: Batch = {}
        self._step = -1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Keep a copy of the samples."""
        if not self._batch:
            self._batch = tree_map(lambda rows: rows[: self.num_samples].clone(), batch)

    @torch.no_grad()
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draw, once a step."""
        if not self._batch or trainer.sanity_checking or self._step == trainer.global_step:
            return
        self._step = trainer.global_step
        data = getattr(trainer, "datamodule", None)
        show = partial(shown, mean=getattr(data, "mean", (0, 0, 0)), std=getattr(data, "std", (1, 1, 1)))
        training = pl_module.training
        pl_module.eval()
        # Every process takes part, since a sharded module needs them all; the first one writes.
        pictures = pl_module.pictures(self._batch, show)
        if "views" in self._batch:
            pictures["views"] = grid([[enlarge(picture) for picture in show(view)] for view in self._batch["views"]])
        pl_module.train(training)
        if trainer.is_global_zero:
            for name, picture in pictures.items():
                with replacing(self.folder / PICTURES / f"{name}.png") as file:
                    file.write(bytes(encode_png(picture).tolist()))
                for logger in trainer.loggers:
                    if isinstance(logger, TensorBoardLogger):
                        logger.experiment.add_image(name, picture, self._step)

    on_train_end = on_validation_end  # the last step may have no evaluation
