"""Speed of training: samples a second, and the share of time spent waiting for data."""

from __future__ import annotations

import time

import lightning.pytorch as pl

from repr.batch import Batch
from repr.distributed import world_size


class Throughput(pl.Callback):
    """Log ``train/samples_per_s`` (all ranks together) and ``train/data_wait`` (a share of the time, 0 to 1).

    Evaluation does not count. Averages run over ``every`` batches.

    Args:
        every: batches between two values.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self._reset()

    def _reset(self) -> None:
        self._samples, self._batches = 0, 0
        self._busy = self._waited = 0.0
        self._last = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the evaluation out."""
        self._last = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """The batch is here: what has passed since the last one was waiting."""
        now = time.perf_counter()
        self._waited += now - self._last
        self._last = now

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Count the batch, and log when enough have passed."""
        now = time.perf_counter()
        self._busy += now - self._last
        self._last = now
        self._batches += 1
        self._samples += len(batch["views"][0]) * world_size()
        if self._batches >= self.every:
            total = self._busy + self._waited
            values = {"train/samples_per_s": self._samples / total, "train/data_wait": self._waited / total}
            pl_module.log_dict(values, prog_bar=True)
            self._reset()
