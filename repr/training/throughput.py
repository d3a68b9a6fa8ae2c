"""Speed of training: samples a second, the share of a card's peak, and where the time of a step goes."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from repr.batch import num_rows
from repr.config import num_cores
from repr.distributed import world_size

# Operations a second in bfloat16, dense, as the makers tell them; the first name inside that of the card counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


class Operations(TorchDispatchMode):
    """Counts multiplications and sums of products and convolutions, by torch's own formulas.

    Unlike torch's ``FlopCounterMode`` it leaves compiled code in place and counts what that calls, so that a batch
    which fits because its layers are compiled still does.

    Attributes:
        total: of what has run so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether compiled code stays."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **kwargs, out_val=result)
        return result


class Phases(Profiler):
    """Seconds of the phases of a training step, from the sections that Lightning tells a profiler.

    Args:
        device: that the phases end on; a GPU is waited for at the ends of those that are measured.

    Attributes:
        seconds: by phase, of the step that is being measured; None: none is.
    """

    _SECTIONS: ClassVar = {
        "train_dataloader_next": "load",
        "transfer_batch_to_device": "transfer",
        "on_after_batch_transfer": "colour",
        "training_step": "forward",
        "backward": "backward",
        "optimizer_step": "optimizer",
    }
    NAMES = tuple(_SECTIONS.values())

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.seconds: dict[str, float] | None = None

    def now(self) -> float:
        """The time at which everything that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self, action_name: str) -> None:
        """Begin a section."""
        self._add(action_name, -1)

    def stop(self, action_name: str) -> None:
        """End a section."""
        self._add(action_name, 1)

    def _add(self, action_name: str, sign: int) -> None:
        section = action_name.rpartition(".")[2]
        if self.seconds is None or section not in self._SECTIONS:
            return
        seconds = sign * self.now()
        self.seconds[self._SECTIONS[section]] += seconds
        if section in ("training_step", "backward"):  # which the optimizer's section holds
            self.seconds["optimizer"] -= seconds


class Throughput(pl.Callback):
    """Log the speed of training, and where its time goes.

    ``train/samples_per_s`` is that of all ranks together, ``train/data_wait`` a share of the time, 0 to 1: what lies
    between the end of a batch and the start of the next, that is the loader, the transfer to the device and the device
    half of the views. Evaluation and checkpoints do not count. On a card whose peak is known, ``train/mfu`` is the
    share of it that the step's products and convolutions take; they are counted once, on the second batch, with what
    slices or checkpoints compute again. On CUDA ``train/memory_gb`` is the most that the allocator has handed out so
    far. Of every ``phases``-th batch ``train/time_<phase>`` is a phase's share of its time; a profiler of the Trainer's
    own takes their place.

    Args:
        every: batches over which a logged value is averaged.
        settle: batches at the start of a run, in which workers start, that count for neither hint nor summary.
        enough: batches after which a hint says what to set, if more than a third of their time was waiting.
        phases: batches between two whose phases are measured, for which a GPU is waited for.
        peak: operations a second of a card at its best; None: from :data:`PEAKS`, and no ``train/mfu`` on others.

    Attributes:
        waited: seconds spent waiting for data, by the batches that count; printed at the end.
        busy: seconds spent on those batches.
        operations: of a batch on this process; None before they are counted, or where the peak is not known.

    Raises:
        ValueError: a number of batches, or a peak, that is not above 0.
    """

    meanings: ClassVar = {
        "train/samples_per_s": "Samples trained on in a second, by all processes; higher is faster.",
        "train/data_wait": "Share of the time spent waiting for data; lower is better.",
        "train/mfu": "Share of the card's peak in bfloat16 that the products of a step take; higher is better.",
        "train/memory_gb": "Memory of the GPU that was taken at most so far, in GB.",
        "train/time_load": "Share of a step's time in which the loader is waited for; lower is better.",
        "train/time_transfer": "Share of a step's time in which the batch goes to the device.",
        "train/time_colour": "Share of a step's time in which views are coloured and normalised.",
        "train/time_forward": "Share of a step's time that encoders and losses take.",
        "train/time_backward": "Share of a step's time that the gradient takes.",
        "train/time_optimizer": "Share of a step's time that the optimizer takes, with checks and clipping.",
    }

    def __init__(
        self, every: int = 10, settle: int = 10, enough: int = 50, phases: int = 100, peak: float | None = None
    ) -> None:
        for name, value in {"every": every, "phases": phases, "peak": peak}.items():
            if value is not None and value <= 0:
                raise ValueError(f"callbacks.throughput.{name}={value}; set it above 0")
        self.every, self.settle, self.enough, self.phases, self.peak = every, settle, enough, phases, peak
        self.waited = self.busy = 0.0
        self.operations: float | None = None
        self._num_samples = self._num_batches = 0
        self._hinted = False
        self._window: list[tuple[float, float, int]] = []  # (waited, busy, samples) of each batch since the last value
        self._last: float | None = None  # when the last batch ended; None where something else has run since
        self._wait: float | None = None  # of the batch at work
        self._counting = ExitStack()
        self._begun = False  # whether a batch has passed, which is when compilation is over
        self._profiler: Phases | None = None
        self._left = phases  # batches until one's phases are measured
        self._start = 0.0  # of the batch whose phases are measured

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Learn the card's peak, and listen to the sections of a step."""
        device = trainer.strategy.root_device
        if device.type == "cuda" and self.peak is None:
            name = torch.cuda.get_device_name(device)
            self.peak = next((peak for card, peak in PEAKS.items() if card in name), None)
        owner: Any = trainer
        if isinstance(owner.profiler, PassThroughProfiler):
            owner.profiler = self._profiler = Phases(device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the evaluation out."""
        self._last = time.perf_counter()
        self._forget_phases()

    def on_save_checkpoint(self, *args: Any) -> None:
        """Leave the checkpoint out, and with it the batch that follows."""
        self._last = None
        self._forget_phases()

    def on_train_batch_start(self, *args: Any) -> None:
        """Count the time since the last batch as waiting, and on the second batch its operations."""
        if self.peak is not None and self.operations is None and self._begun:
            counter = self._counting.enter_context(Operations())
            self._counting.callback(lambda: setattr(self, "operations", float(counter.total)))
        now = time.perf_counter()
        self._wait = None if self._last is None else now - self._last
        self._last = now

    def on_exception(self, *args: Any) -> None:
        """Stop counting."""
        self._counting.close()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch, log when enough have passed, and give the hint when it is due."""
        self._counting.close()
        self._begun = True
        self._log_phases(pl_module)
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
            pl_module.log_dict(self._of_card(trainer, (waits + busies) / self.every))
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
            told = f"training: {speed:.0f} samples/s, {share:.0%} of the time spent waiting for data"
            card = self._of_card(trainer, total / self._num_batches)
            told += f", {card['train/mfu']:.0%} of the card's peak" if "train/mfu" in card else ""
            told += f", at most {card['train/memory_gb']:.1f} GB of the GPU" if "train/memory_gb" in card else ""
            trainer.print(told)

    def _of_card(self, trainer: pl.Trainer, seconds: float) -> dict[str, float]:
        """What can be said of the card, given the seconds of a batch."""
        told, device = {}, trainer.strategy.root_device
        if self.peak is not None and self.operations is not None:
            told["train/mfu"] = self.operations / seconds / self.peak
        if device.type == "cuda":
            told["train/memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        return told

    def _log_phases(self, module: Any) -> None:
        """Log the shares of a batch that was measured from the end of the one before, and begin the next such."""
        if (phases := self._profiler) is None:
            return
        if phases.seconds is not None:
            total = phases.now() - self._start
            module.log_dict({f"train/time_{name}": seconds / total for name, seconds in phases.seconds.items()})
        self._left -= 1
        self._forget_phases()
        if self._left <= 0:
            self._left = self.phases
            self._start, phases.seconds = phases.now(), dict.fromkeys(Phases.NAMES, 0.0)

    def _forget_phases(self) -> None:
        if self._profiler is not None:
            self._profiler.seconds = None


def hint(share: float, trainer: Any) -> str:
    """What to set, given the share of time that goes to waiting for data."""
    num_workers = getattr(trainer.datamodule, "num_workers", 0)
    cores = num_cores()
    smaller = "store smaller pictures (tools/make_shards.py)"
    if num_workers * trainer.num_devices < cores:
        most = cores // trainer.num_devices
        advice = f"raise data.num_workers from {num_workers} towards {most} ({cores} cores), or {smaller}"
    else:
        advice = f"{smaller}; data.num_workers={num_workers} already takes the {cores} cores"
    return f"hint: {share:.0%} of the time goes to waiting for data: {advice}"
