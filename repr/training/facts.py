"""What a run tells of itself beside its config and numbers."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from repr.runs.folder import load_facts, save_facts

PACKAGES = {"repr": "repr-pretrain"} | {name: name for name in ("torch", "lightning", "timm", "open_clip_torch")}


class Facts(pl.Callback):
    """Write ``<folder>/facts.json`` with each checkpoint, so that the time before a stop counts, and at the end.

    It holds ``seconds`` (spent in training and its evaluations, over all resumptions), ``device``, ``processes``,
    ``precision``, ``versions`` (by package), ``meanings``: a sentence for each number, from the ``meanings`` of
    what names them (the objective, the data and the callbacks), and ``protocols``: the key of the protocol of each
    number of the evaluation.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._start = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, where the run was stopped."""
        self._start = time.monotonic() - load_facts(self.folder).get("seconds", 0.0)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write, on the first process."""
        if trainer.is_global_zero:
            self._write(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write, on the first process."""
        self.on_save_checkpoint(trainer, pl_module, {})

    def _write(self, trainer: Any, pl_module: Any) -> None:
        device = trainer.strategy.root_device
        is_cuda = device.type == "cuda"
        facts = {
            "seconds": time.monotonic() - self._start,
            "device": torch.cuda.get_device_name(device)
            if is_cuda
            else f"{device.type.upper()}, {os.cpu_count()} cores",
            "processes": trainer.world_size,
            "precision": str(trainer.precision),
            "versions": {"python": platform.python_version()} | {name: version(of) for name, of in PACKAGES.items()},
            "meanings": _told("meanings", pl_module, trainer.datamodule, *trainer.callbacks),
            "protocols": _told("protocol_of", *trainer.callbacks),
        }
        save_facts(facts, self.folder)


def _told(name: str, *parts: Any) -> dict[str, str]:
    """What the parts that have such an attribute say, by number."""
    return {number: told for part in parts for number, told in getattr(part, name, {}).items()}
