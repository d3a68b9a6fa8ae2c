"""The progress bar of a run."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

_SHOWN = {"loss": ("train/loss", ".3f"), "img/s": ("train/samples_per_s", ".0f"), "wait": ("train/data_wait", ".0%")}
_PER_SECOND = 10  # more cannot be read, and to collect numbers and draw takes milliseconds of a fast step


class Progress(RichProgressBar):
    """Lightning's rich progress bar with loss, samples a second and the share of time spent waiting for data."""

    def __init__(self) -> None:
        super().__init__()
        self._refresh_rate = min(self._refresh_rate, _PER_SECOND)  # before Lightning 2.6 it is 1, and counts batches
        self._shown: dict[str, Any] = {}
        self._until = 0.0

    def configure_columns(self, trainer: pl.Trainer) -> list:
        """Lightning's columns, made to fit 80 characters: a short bar, and no batches a second."""
        columns = super().configure_columns(trainer)[:-1]
        columns[1].bar_width = 10
        return columns

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What stands to the right of the bar; it is collected anew a few times a second, and for the last batch."""
        if time.monotonic() < self._until and not trainer.is_last_batch:
            return self._shown
        metrics = super().get_metrics(trainer, pl_module)
        self._shown = {name: format(metrics[key], form) for name, (key, form) in _SHOWN.items() if key in metrics}
        self._until = time.monotonic() + 1 / _PER_SECOND
        return self._shown
