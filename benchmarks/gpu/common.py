"""What the parts share: runs of our Trainer on a batch that lies on the device, and the memory of the device."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from benchmarks.step_time import FAILURES, wait
from repr.batch import Batch
from repr.config import compose
from repr.config_check import check
from repr.training.throughput import PEAKS, Throughput
from repr.training.trainer import make_trainer, prepare

TINY = [
    "image_size=32", "small_size=32", "embed_dim=32", "text.layers=1", "text.width=64", "text.context_length=16",
    "optim.warmup_steps=0",
]  # fmt: skip
TINY_VIT = [
    "backbone.name=vit_tiny_patch16_224",
    "+backbone.depth=2",
    "+backbone.embed_dim=64",
    "+backbone.num_heads=2",
]


def config(options: Any, overrides: Sequence[str], tiny: Sequence[str] = TINY) -> DictConfig:
    """A checked config of ``trainer=gpu``; with ``--quick`` a tiny one, and on the CPU in float32."""
    cfg = compose([
        "trainer=gpu", "image_size=224", "small_size=96", "embed_dim=512", "+trainer.enable_progress_bar=false",
        *overrides, *(tiny if options.quick else ()),
        *(("trainer.accelerator=cpu", "trainer.precision=32-true") if options.device == "cpu" else ()),
    ])  # fmt: skip
    check(cfg)
    return cfg


def peak() -> float | None:
    """Operations a second of this card at its best, where that is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((value for card, value in PEAKS.items() if card in name), None)


class Speed(NamedTuple):
    """What was measured of some steps.

    Attributes:
        seconds: of a step.
        memory: bytes that the allocator had handed out at most; 0 on the CPU.
        throughput: of the run, if it was one of our Trainer.
    """

    seconds: float
    memory: float
    throughput: Throughput | None = None


class Clock(pl.Callback):
    """Times the steps after the first ``warm`` ones until ``seconds`` are over, and three at least."""

    def __init__(self, warm: int, seconds: float, device: torch.device) -> None:
        self.limit, self.device = seconds, device
        self.num, self.start, self.seconds = -warm, 0.0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        if self.num == 0:
            wait(self.device)
            forget_peak(self.device)
            self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.num += 1
        if self.num >= 3 and time.perf_counter() - self.start > self.limit:
            wait(self.device)
            self.seconds = (time.perf_counter() - self.start) / self.num
            trainer.should_stop = True


class Same:
    """A loader that gives one batch again and again."""

    def __init__(self, batch: Batch, num: int = 10**6) -> None:
        self.batch, self.num = batch, num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Batch:
        return self.batch


def train(
    cfg: DictConfig,
    batch: Batch | None,
    seconds: float,
    *,
    warm: int = 5,
    callbacks: Sequence[pl.Callback] = (),
    data: Any = None,
) -> Speed:
    """Steps of ``repr.fit``'s own Trainer, with what it does in each: the guard, and the measure of speed.

    Args:
        cfg: as :func:`config` gives it.
        batch: on the device, the same one in every step; None: those of ``data``.
        seconds: to measure for, after ``warm`` steps.
        warm: steps that do not count.
        callbacks: besides.
        data: a data module.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        cfg.run_folder = folder
        cfg.trainer.update({"max_epochs": -1, "max_steps": 10**6, "limit_val_batches": 0})
        objective = instantiate(cfg.objective)
        device = torch.device("cpu" if cfg.trainer.accelerator == "cpu" else "cuda", 0)
        clock = Clock(warm, seconds, device)
        own = [instantiate(cfg.callbacks[name]) for name in ("throughput", "guard")]
        trainer = make_trainer(cfg, [*own, *callbacks, clock], [])
        prepare(objective, cfg, 1)
        loader = data if batch is None else DataLoader(Same(batch), batch_size=None)  # type: ignore[arg-type]
        trainer.fit(objective, loader)
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return Speed(clock.seconds, float(memory), own[0])


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def clean() -> Any:
    """Memory and compiled code of what runs inside are gone afterwards."""
    try:
        yield
    finally:
        torch.compiler.reset()  # what is compiled holds models
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def attempt(name: str, measure: Callable[[], Any]) -> Any:
    """What ``measure`` gives; where it fails a sentence that says so, and why."""
    with clean():
        try:
            return measure()
        except FAILURES as error:
            reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{error}".partition("\n")[0]
            return f"{name} is left out: {reason or type(error).__name__}"


def median(function: Callable[[], Any], device: torch.device, seconds: float, at_least: int = 5) -> float:
    """The median time of a call in seconds, after two that do not count."""
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < at_least + 2 or time.monotonic() < end:
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[len(times[2:]) // 2]
