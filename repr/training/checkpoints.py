"""Checkpoints: written whole or not at all, read without running code, saved when a run is told to stop."""

from __future__ import annotations

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
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from repr.distributed import gather, rank
from repr.files import PART, remove, replacing
from repr.output import STOPS
from repr.runs.checkpoint_files import read_checkpoint
from repr.runs.checkpoints import checkpoint_path, checkpoints
from repr.training.loop_state import loop_state


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, flush it to the disk, then rename it: no half-written file is ever seen."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save ``checkpoint`` to ``path``; whatever stood there stays until the new one is complete."""
        if Path(path).is_dir():  # of shards, written by another strategy and found to be damaged
            remove(Path(path))
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load tensors and plain values, of a file or of shards; a file that holds anything else is refused."""
        return read_checkpoint(Path(path), mmap=False)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file or a folder of shards."""
        remove(Path(path))


class Stopped(SystemExit):
    """The run was told to stop and has saved a checkpoint."""


class Checkpoints(Checkpoint):
    """Keep the latest checkpoint of a run, and save one when Ctrl-C, SIGTERM or SIGHUP asks the run to stop.

    A checkpoint is that of an optimizer step that is over, so that there is one way to resume: at the end of each
    epoch, every ``every_n_steps``, at the last step, and when the run is told to stop, by ``trainer.max_time``, another
    callback or a signal. A signal takes effect after the current optimizer step, on all ranks at the same step; a
    second Ctrl-C stops at once, without saving.

    An evaluation that was due right after the step is run when the run is resumed, whether or not it had ended.

    Args:
        folder: of the run.
        every_n_steps: optimizer steps between two checkpoints; None: only at the end of each epoch.
        keep: how many stay once a new one is complete; with 2 a run whose last one is damaged goes on from the other.

    Raises:
        ValueError: ``keep`` is less than 1.
    """

    def __init__(self, folder: str | Path, *, every_n_steps: int | None = None, keep: int = 1) -> None:
        if keep < 1:
            raise ValueError(f"callbacks.checkpoints.keep={keep}; set it to 1 or more")
        self.folder = Path(folder)
        self.every_n_steps, self.keep = every_n_steps, keep
        self._saved: Path | None = None
        self._step = 0
        self._ended = False  # whether the checkpoint is that of the last step of all
        self._evaluate: int | None = None  # the epoch, if an evaluation is due after the step of the checkpoint
        self._row: dict[str, float] | None = None  # of metrics.csv, which Lightning logs only after the checkpoint
        self._drawn: dict[str, Tensor] = {}  # states of this rank's generators after the step
        self._generators: dict[str, Tensor] = {}  # those of all ranks
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Agree on the first process's folder."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals, clear away what a kill has left, and make up for an evaluation."""
        self._step = trainer.global_step
        path = checkpoint_path(self.folder, self._step)
        self._saved = path if trainer.strategy.broadcast(path.exists()) else None  # others may not see the disk
        if trainer.is_global_zero:
            for partial in path.parent.glob(f"*{PART}"):
                remove(partial)
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)
            if trainer.received_sigterm:  # while Lightning was starting; it would leave in the middle of a step
                self._signal, trainer._signal_connector.received_sigterm = signal.SIGTERM, False
        self._restore_generators(trainer.strategy.root_device)
        if self._evaluate is not None:
            self._run_evaluation(trainer, self._evaluate)

    @staticmethod
    def _run_evaluation(trainer: pl.Trainer, epoch: int) -> None:
        """Evaluate as Lightning does after a step; when it resumes, it goes on with the next step instead."""
        loop, progress = trainer.fit_loop.epoch_loop.val_loop, trainer.fit_loop.epoch_progress.current
        now, progress.completed = progress.completed, epoch  # after the last step of an epoch the next one is current
        loop.restarting = False
        loop.batch_progress.reset()
        trainer.validating = True
        loop.run()
        trainer.training = True
        progress.completed = now

    def _restore_generators(self, device: torch.device) -> None:
        """Let this rank draw on from where it was; a rank that was not there keeps its seed."""
        for name, states in self._generators.items():
            if rank() < len(states):
                state = states[rank()].clone()  # torch crashes on a view into a larger tensor
                if name == "cpu":
                    torch.set_rng_state(state)
                elif device.type == "cuda":
                    torch.cuda.set_rng_state(state, device)

    def state_dict(self) -> dict[str, Any]:
        """The generators, the row that the step logs, and what comes after it: the epoch of an evaluation, the end."""
        return {"evaluate": self._evaluate, "row": self._row, "generators": self._generators, "ended": self._ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what the run goes on with."""
        self._evaluate, self._generators = state_dict["evaluate"], state_dict["generators"]

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Let Lightning's loops go on from the optimizer's steps, not from what they have counted themselves."""
        step = checkpoint["global_step"]
        if trainer.state.fn != TrainerFn.FITTING or not step:
            return
        trainer.fit_loop.setup_data()  # else the number of batches is not known yet; Lightning does it only once
        num_batches = trainer.num_training_batches
        if isinstance(num_batches, int):  # infinite for a data set without length
            due = checkpoint["callbacks"].get(self.state_key, {}).get("evaluate") is not None
            ended = step == trainer.max_steps and not due  # then the loops do not start
            state = loop_state(step, num_batches, trainer.accumulate_grad_batches, ended=ended)
            loops = checkpoint["loops"]
            loops["fit_loop"] = {"state_dict": loops["fit_loop"]["state_dict"], **state}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save when due, or when told to stop."""
        step = trainer.global_step
        if step == self._step:
            return  # gradients are being accumulated
        self._step, self._drawn = step, _generator_states(trainer.strategy.root_device)
        last = batch_idx + 1 >= trainer.num_training_batches
        self._ended = step == trainer.max_steps or (last and trainer.current_epoch + 1 == trainer.max_epochs)
        last = last or self._ended or (trainer.should_stop and trainer.fit_loop._can_stop_early)
        if self._told_to_stop(trainer) or last or (self.every_n_steps and step % self.every_n_steps == 0):
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Save the last step if the run was stopped after it, as by EarlyStopping in the middle of an epoch."""
        if trainer.global_step and self._saved != checkpoint_path(self.folder, trainer.global_step):
            self._evaluate = self._row = None  # both are done
            self._write(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Leave if told to and nothing is lost by it; only here, since Lightning logs after ``on_train_batch_end``."""
        if self._saved == checkpoint_path(self.folder, trainer.global_step) and self._told_to_stop(trainer):
            # Lightning kills the first process as soon as another ends with an error, perhaps before it has cleaned up.
            raise Stopped(128 + (self._signal or signal.SIGTERM) if trainer.is_global_zero else 0)

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Leave in the middle of an evaluation too."""
        self.on_train_batch_start(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the checkpoints that a kill right after the last one has left, and give the signals back."""
        if stage == TrainerFn.FITTING and (path := checkpoint_path(self.folder, trainer.global_step)).exists():
            self._remove_others(trainer, path)
        for number, handler in self._previous.items():
            # Lightning may have put back what was there before the run; what we found is its own, which holds the run.
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler)
        self._previous = {}

    def _save(self, trainer: pl.Trainer) -> None:
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        self._evaluate = trainer.current_epoch if due else None
        self._row = _row(trainer)
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        device = trainer.strategy.root_device
        self._generators = {name: gather(state[None].to(device)).cpu() for name, state in self._drawn.items()}
        path = checkpoint_path(self.folder, trainer.global_step)
        trainer.save_checkpoint(path)
        self._saved = path
        self._remove_others(trainer, path)

    def _remove_others(self, trainer: pl.Trainer, path: Path) -> None:
        """Keep a checkpoint and those just before it; remove the others, damaged ones of higher steps among them."""
        present = checkpoints(self.folder)  # none on a rank that does not see the disk
        place = present.index(path) if path in present else 0
        for other in present:
            if other not in present[place : place + self.keep]:
                trainer.strategy.remove_checkpoint(other)

    def _told_to_stop(self, trainer: pl.Trainer) -> bool:
        told = self._signal is not None
        return trainer.strategy.reduce_boolean_decision(told, all=False) if trainer.world_size > 1 else told


def _generator_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that dropout and drop-path draw from."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def _row(trainer: pl.Trainer) -> dict[str, float] | None:
    """What Lightning is about to log of this step, or None if it will not."""
    connector = trainer._logger_connector
    if not connector.should_update_logs:
        return None
    values = {name: float(value) for name, value in connector.metrics["log"].items()}
    return {**values, "epoch": trainer.current_epoch}
