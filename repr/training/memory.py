"""Whether the training step of a config fits into the memory that is free, asked before a run begins."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig

from repr.config import ConfigError
from repr.objectives.views import view_sizes
from repr.optim import REFUSALS
from repr.training.forecast import HALF, WHOLE, Forecast, Planner

# Bytes of activations for one of a picture, and bytes for a pair of samples, that hardly a network or a loss exceeds.
_FOR_PICTURES, _FOR_PAIRS = 1000, 16
_SURE = 0.1  # share by which a forecast may be wrong


def check_memory(cfg: DictConfig, objective: pl.LightningModule, trainer: pl.Trainer, root: str = "/") -> None:
    """Compare the forecast of a step with the memory that is free, where a step may be too large.

    A run that is small beside the memory costs nothing here; of another one a step is traced without data, which takes
    some seconds. What evaluation and the workers of loaders take is not counted.

    Args:
        cfg: a config that was checked; with ``forecast=false`` nothing is done.
        objective: as it was made of it.
        trainer: likewise.
        root: see :func:`free_memory`.

    Raises:
        ConfigError: it will not fit; the message names options to set. Where it is doubtful, that is a warning.
    """
    device = trainer.strategy.root_device
    free = free_memory(device, root)
    if free is None or not cfg.get("forecast", True):
        return
    rows, sharing = cfg.data.batch_size // trainer.world_size, _sharing(trainer)
    weights = 16 * sum(parameter.numel() for parameter in objective.parameters())  # with gradients, and Adam's moments
    pixels = 12 * rows * sum(size**2 for size in view_sizes(cfg))
    if sharing * (weights + _FOR_PICTURES * pixels + _FOR_PAIRS * rows * cfg.data.batch_size) < free:
        return
    forecast = _forecast(cfg, trainer)
    if forecast is None or (needed := sharing * forecast.total) < (1 - _SURE) * free:
        return
    message = f"{_told(forecast, trainer, free)}: {_advice(cfg, trainer)}"
    if needed > (1 + _SURE) * free:
        raise ConfigError([f"{message}. forecast=false starts it all the same"])
    warnings.warn(f"{message}, if it is ended for it", stacklevel=2)


def told_memory(cfg: DictConfig, trainer: pl.Trainer) -> str:
    """How much memory a step takes by the forecast, and how much is free, in words; arguments are as above."""
    if (forecast := _forecast(cfg, trainer)) is None:
        return "how much memory a step takes cannot be told: it cannot be traced without data"
    return _told(forecast, trainer, free_memory(trainer.strategy.root_device))


def _told(forecast: Forecast, trainer: pl.Trainer, free: float | None) -> str:
    device, sharing = trainer.strategy.root_device, _sharing(trainer)
    told = f"a step of this run takes about {_gb(sharing * forecast.total)} on {device.type}, "
    return told + _largest(forecast, sharing) + ("" if free is None else f", and {_gb(free)} are free")


def _forecast(cfg: DictConfig, trainer: pl.Trainer) -> Forecast | None:
    """The forecast of a step with the strategy of a trainer; None where it cannot be traced."""
    if str(cfg.trainer.precision) not in {**HALF, **WHOLE}:
        return None
    cfg, strategy = cfg.copy(), trainer.strategy
    cfg.compile, cfg.scorer = False, None
    try:
        with torch.random.fork_rng(devices=[]):
            planner = Planner(cfg, gpus=trainer.world_size, foreach=strategy.root_device.type != "cpu")
            forecasts = planner.at(cfg.data.batch_size // trainer.world_size)
    except REFUSALS:  # a module of a user's own need not be traceable
        return None
    is_sharded = getattr(strategy, "device_mesh", None) is not None or "FSDP" in type(strategy).__name__
    return forecasts["" if "" in forecasts else "fsdp2" if is_sharded else "ddp"]


def _sharing(trainer: pl.Trainer) -> int:
    """How many processes share the memory that is looked at."""
    return trainer.num_devices if trainer.strategy.root_device.type == "cpu" else 1


def free_memory(device: torch.device, root: str = "/") -> float | None:
    """Bytes that are free on a device; of a CPU what machine and control group leave; None where it is not known.

    Args:
        device: CPU or CUDA.
        root: where ``proc`` and ``sys`` lie.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path(root, "proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    free = 1024.0 * _numbers(meminfo)["MemAvailable:"]
    group = Path(root, "proc/self/cgroup").read_text().rpartition("0::/")[2].strip()  # of version 2
    for folder in {Path(root, "sys/fs/cgroup", group), Path(root, "sys/fs/cgroup")}:  # inside a container the latter
        limit = folder / "memory.max"
        if limit.is_file() and (most := limit.read_text().strip()) != "max":
            used = int((folder / "memory.current").read_text()) - _numbers(folder / "memory.stat")["inactive_file"]
            free = min(free, float(int(most) - used))
    return free


def _numbers(path: Path) -> dict[str, int]:
    """The first two words of each line."""
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if len(words := line.split()) > 1}


def _largest(forecast: Forecast, sharing: int) -> str:
    kinds: Mapping[str, float] = forecast.memory
    named = sorted(kinds, key=lambda kind: -kinds[kind])[:2]
    return "of these " + " and ".join(f"{_gb(sharing * kinds[kind])} {kind}" for kind in named if kinds[kind] > 0)


def _advice(cfg: Any, trainer: pl.Trainer) -> str:
    """Options that make a step smaller, those that leave the gradient as it is first."""
    options = [] if cfg.get("micro_batch") else ["micro_batch=64"]
    if cfg.objective.get("chunk_size", 0) is None:
        options.append("chunk_size=1024")
    options += [] if cfg.get("grad_checkpointing") else ["grad_checkpointing=true"]
    options.append(f"a smaller data.batch_size (it is {cfg.data.batch_size})")
    more = "a smaller backbone" if trainer.world_size == 1 else "trainer=fsdp"
    return f"set {', '.join(options)}, or {more}"


def _gb(num: float) -> str:
    return f"{num / 1e9:.1f} GB"
