"""The progress bar of a run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """Lightning's rich progress bar with loss, samples a second and the share of time spent waiting for data."""

    def configure_columns(self, trainer: pl.Trainer) -> list:
        """Lightning's columns, made to fit 80 characters: a short bar, and no batches a second."""
        columns = super().configure_columns(trainer)[:-1]
        columns[1].bar_width = 10
        return columns

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What stands to the right of the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        shown = {"loss": "{train/loss:.3f}", "img/s": "{train/samples_per_s:.0f}", "wait": "{train/data_wait:.0%}"}
        return {name: form.format(**metrics) for name, form in shown.items() if form[1:].split(":")[0] in metrics}
