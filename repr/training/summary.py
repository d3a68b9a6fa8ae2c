"""What a run is about to do, told before its first step, and how long it will take, told after some steps."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl

from repr.models.slicing import is_compiled

_STEPS = 10  # after which the time is told
_LONG = 3600  # seconds of a run for which compilation is suggested


class Summary(pl.Callback):
    """Print device, data, parameters, steps, batch, evaluation and folder of a run, and after ten steps its time.

    A run shorter than twenty steps tells the time after half of them. One that takes long on a GPU is told to compile.
    Only the first process prints.

    Args:
        folder: the run folder; None: it is not named.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self._first: tuple[int, float] | None = None  # step after the first one made here, and when that was
        self._told_at = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table."""
        left = int(min(trainer.estimated_stepping_batches, 2**62)) - trainer.global_step
        self._first, self._told_at = None, trainer.global_step + min(_STEPS, left // 2)
        if trainer.is_global_zero:
            from rich.console import Console
            from rich.table import Table

            table = Table.grid(padding=(0, 2))
            table.add_column(style="bold")
            for title, words in facts(trainer, pl_module, self.folder).items():
                table.add_row(title, words)
            Console(highlight=False).print(table)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Tell the time when enough steps are made; the first, in which workers start, does not count."""
        step, now = trainer.global_step, time.perf_counter()
        if self._first is None:
            self._first = (step, now)
        elif self._first[0] < step == self._told_at:
            self._told_at = 0
            seconds = (now - self._first[1]) / (step - self._first[0])
            total = int(trainer.estimated_stepping_batches)
            trainer.print(
                f"the run takes about {duration(seconds * total)}, {duration(seconds * (total - step))} of it left: "
                f"{total:,} steps of {seconds:.2g} s, and the evaluation"
            )
            on_gpu = trainer.strategy.root_device.type == "cuda"
            if advice := compile_hint(seconds * (total - step), on_gpu, is_compiled(pl_module)):
                trainer.print(advice)


class DryRun(Summary):
    """As :class:`Summary`, and end the training once the time is told."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Tell the time when enough steps are made, and let these be the last."""
        super().on_train_batch_end(trainer, pl_module, *args)
        if not self._told_at:
            trainer.should_stop = True


def facts(trainer: pl.Trainer, module: pl.LightningModule, folder: str | None) -> dict[str, str]:
    """Title -> words, of a trainer that is about to train."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    num, many = trainer.world_size, trainer.accumulate_grad_batches
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    trained, frozen = (sum(size for size, grad in sizes if grad is wanted) for wanted in (True, False))
    total, per_epoch = trainer.estimated_stepping_batches, -(-int(trainer.num_training_batches) // many)
    told = {
        "device": f"{num} x {trainer.strategy.root_device.type}, {trainer.precision}",
        "trained": f"{type(module).__name__}, {_count(trained)} parameters"
        + f", {_count(frozen)} frozen" * (frozen > 0),
        "steps": f"{total:,} in all, {per_epoch:,} an epoch, {total / per_epoch:.3g} epochs"
        + f"; goes on after step {trainer.global_step:,}" * (trainer.global_step > 0),
    }
    if (size := getattr(data, "batch_size", None)) is not None:
        of = [f"{size // num:,} on each of {num} processes"] * (num > 1) + [f"{many} batches of {size:,}"] * (many > 1)
        told["batch"] = f"{size * many:,} samples a step" + f" ({', '.join(of)})" * bool(of)
    if sources := getattr(data, "sources", None):
        rows = [f"{name} {len(source):,} rows ({type(source).__name__})" for name, source in sources.items()]
        told["data"] = ", ".join(rows)
        told["evaluation"] = _evaluation(trainer, data)
    return told | ({"folder": folder} if folder else {})


def _evaluation(trainer: pl.Trainer, data: Any) -> str:
    """Which protocols on which sets, and when."""
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    protocols = [key for callback in callbacks for key in getattr(callback, "protocols", ())]
    if not data.eval_names or not protocols:
        return "none: data.eval names no set" if protocols else "none"
    epochs, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    when = f"every {epochs} epochs" if epochs and epochs > 1 else "every epoch"
    if isinstance(interval, int) or interval != 1.0:
        when = f"every {interval} batches" if isinstance(interval, int) else f"{1 / interval:.3g} times an epoch"
    return f"{', '.join(protocols)}; of {', '.join(data.eval)}; {when}, and after the last step"


def compile_hint(seconds: float, on_gpu: bool, compiled: bool) -> str | None:
    """What to set where a run on a GPU is long beside the minute or two that compilation takes, or None."""
    if seconds < _LONG or not on_gpu or compiled:
        return None
    return "hint: compile=true costs a minute or two at the start, and mostly makes the steps of a long run faster"


def duration(seconds: float) -> str:
    """A time as a person says it: ``45 s``, ``12 min``, ``3 h 20 min``, ``5 days 4 h``."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes < 48 * 60
        else f"{minutes // 1440} days {minutes // 60 % 24} h"
    )


def _count(num: int) -> str:
    """A number of parameters, such as ``149.6 M``."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if num >= unit:
            return f"{num / unit:.1f} {name}"
    return str(num)
