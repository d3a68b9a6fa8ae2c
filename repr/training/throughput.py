"""Speed of training: samples a second, and the share of time spent waiting for data."""

from __future__ import annotations

import os
import time
from typing import Any, ClassVar

import lightning.pytorch as pl

from repr.batch import num_rows
from repr.distributed import world_size


class Throughput(pl.Callback):
    """Log ``train/samples_per_s`` (all ranks together) and ``train/data_wait`` (a share of the time, 0 to 1).

    Waiting is what lies between the end of a batch and the start of the next: the loader, the transfer to the device
    and the device half of the views. Evaluation and checkpoints do not count.

    Args:
        every: batches over which a logged value is averaged.
        settle: batches at the start of a run, in which workers start, that count for neither hint nor summary.
        enough: batches after which a hint says what to set, if more than a third of their time was waiting.

    Attributes:
        waited: seconds spent waiting for data, by the batches that count; printed at the end.
        busy: seconds spent on those batches.
    """

    meanings: ClassVar = {
        "train/samples_per_s": "Samples trained on in a second, by all processes; higher is faster.",
        "train/data_wait": "Share of the time spent waiting for data; lower is better.",
    }

    def __init__(self, every: int = 10, settle: int = 10, enough: int = 50) -> None:
        self.every, self.settle, self.enough = every, settle, enough
        self.waited = self.busy = 0.0
        self._num_samples = self._num_batches = 0
        self._hinted = False
        self._window: list[tuple[float, float, int]] = []  # (waited, busy, samples) of each batch since the last value
        self._last: float | None = None  # when the last batch ended; None where something else has run since
        self._wait: float | None = None  # of the batch at work

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    on_validation_end = on_train_epoch_start  # leaves the evaluation out

    def on_save_checkpoint(self, *args: Any) -> None:
        """Leave the checkpoint out, and with it the batch that follows."""
        self._last = None

    def on_train_batch_start(self, *args: Any) -> None:
        """Count the time since the last batch as waiting."""
        now = time.perf_counter()
        self._wait = None if self._last is None else now - self._last
        self._last = now

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch, log when enough have passed, and give the hint when it is due."""
        wait, start, self._last = self._wait, self._last, time.perf_counter()
        if wait is None or start is None:
            return
        busy = self._last - start
        num_samples = num_rows(batch) * world_size()
        self._window.append((wait, busy, num_samples))
        if len(self._window) == self.every:
            waits, busies, samples = (sum(column) for column in zip(*self._window, strict=True))
            values = {"train/samples_per_s": samples / (waits + busies), "train/data_wait": waits / (waits + busies)}
            pl_module.log_dict(values, prog_bar=True)
            self._window = []
        if self.settle > 0:
            self.settle -= 1
            return
        self.waited += wait
        self.busy += busy
        self._num_samples += num_samples
        self._num_batches += 1
        share = self.waited / (self.waited + self.busy)
        if not self._hinted and self._num_batches >= self.enough and share > 1 / 3:
            self._hinted = True
            trainer.print(hint(share, trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum up."""
        if total := self.waited + self.busy:
            speed, share = self._num_samples / total, self.waited / total
            trainer.print(f"training: {speed:.0f} samples/s, {share:.0%} of the time spent waiting for data")


def hint(share: float, trainer: Any) -> str:
    """What to set, given the share of time that goes to waiting for data."""
    num_workers = getattr(trainer.datamodule, "num_workers", 0)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    smaller = "store smaller pictures (tools/make_shards.py)"
    if num_workers * trainer.num_devices < num_cores:
        most = num_cores // trainer.num_devices
        advice = f"raise data.num_workers from {num_workers} towards {most} ({num_cores} cores), or {smaller}"
    else:
        advice = f"{smaller}; data.num_workers={num_workers} already takes the {num_cores} cores"
    return f"hint: {share:.0%} of the time goes to waiting for data: {advice}"
