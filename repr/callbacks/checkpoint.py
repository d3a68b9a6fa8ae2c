"""Checkpoints: written whole or not at all, read without running code, saved when a run is told to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from repr.models.pretrained import last_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, flush it to the disk, then rename it: no half-written file is ever seen."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save ``checkpoint`` to ``path``; whatever stood there stays until the new one is complete."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load tensors and plain values; a file that holds anything else is refused."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


class Stopped(SystemExit):
    """The run was told to stop and has saved a checkpoint."""


class Checkpoints(Checkpoint):
    """Keep the latest checkpoint of a run, and save one when Ctrl-C or SIGTERM asks the run to stop.

    Checkpoints are taken at one place only, right after an optimizer step, so that there is one way to resume:
    at the end of each epoch, every ``every_n_steps``, at the last step, and when the run is told to stop. The one
    before is removed once the new one is complete. A signal takes effect after the current optimizer step, on all
    ranks at the same step; a second Ctrl-C stops at once, without saving.

    Args:
        folder: where ``step=<n>.ckpt`` is written.
        every_n_steps: optimizer steps between two checkpoints; None: only at the end of each epoch.
    """

    def __init__(self, folder: str | Path, *, every_n_steps: int | None = None) -> None:
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self._saved: Path | None = None
        self._step = 0
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Agree on the first process's folder."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the two signals."""
        self._step = trainer.global_step
        self._saved = trainer.strategy.broadcast(last_checkpoint(self.folder))  # others may not see the disk
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when due, or when told to stop."""
        step = trainer.global_step
        if step == self._step:
            return  # gradients are being accumulated
        self._step = step
        last = batch_idx + 1 >= trainer.num_training_batches or step == trainer.max_steps
        if self._told_to_stop(trainer) or last or (self.every_n_steps and step % self.every_n_steps == 0):
            self._save(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Leave if told to; only here, since Lightning logs a step after its ``on_train_batch_end``."""
        self._leave_if_saved(trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Leave in the middle of an evaluation if nothing is lost by it."""
        self._leave_if_saved(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _path(self, step: int) -> Path:
        return self.folder / f"step={step}.ckpt"

    def _save(self, trainer: pl.Trainer) -> None:
        path, previous = self._path(trainer.global_step), self._saved
        trainer.save_checkpoint(path)
        self._saved = path
        if previous is not None and previous != path:
            trainer.strategy.remove_checkpoint(previous)

    def _told_to_stop(self, trainer: pl.Trainer) -> bool:
        told = self._signal is not None
        return trainer.strategy.reduce_boolean_decision(told, all=False) if trainer.world_size > 1 else told

    def _leave_if_saved(self, trainer: pl.Trainer) -> None:
        if self._saved == self._path(trainer.global_step) and self._told_to_stop(trainer):
            # Lightning kills the first process as soon as another ends with an error, perhaps before it has cleaned up.
            raise Stopped(128 + (self._signal or signal.SIGTERM) if trainer.is_global_zero else 0)
