"""What TensorBoard shows beside curves and pictures: the config, its values as hyperparameters, and histograms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import indent
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from repr.batch import evenly_spread

NOT_OF_A_RECIPE = ("callbacks", "logger", "eval", "procedure", "run_folder", "resume", "trust")  # sections of a config
SAMPLE = 1000  # rows of which a histogram is drawn
BINS = 64


def writers(trainer: pl.Trainer) -> list[Any]:
    """The SummaryWriters of a Trainer's TensorBoard loggers; call it on the first process."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def add_config(trainer: pl.Trainer, cfg: DictConfig) -> None:
    """Write the config as text, and its plain values as hyperparameters beside the loss and the headline numbers.

    The values of these numbers are those that are logged, so that a run that was stopped has them too.
    """
    from torch.utils.tensorboard.summary import hparams

    numbers: Sequence[str] = OmegaConf.select(cfg, "callbacks.evaluation.headline") or ()
    experiment, start, _ = hparams(plain_values(cfg), dict.fromkeys(("train/loss", *numbers), 0.0))
    for writer in writers(trainer):
        writer.add_text("config", indent(OmegaConf.to_yaml(cfg), "    "))  # Markdown's code
        for summary in (experiment, start):
            writer.file_writer.add_summary(summary)


def plain_values(cfg: DictConfig) -> dict[str, bool | float | str]:
    """The plain values of a recipe by their dotted names, as hyperparameters of a logger."""
    recipe: Any = OmegaConf.to_container(cfg)
    return dict(_plain({key: value for key, value in recipe.items() if key not in NOT_OF_A_RECIPE}))


def _plain(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | float | str]]:
    """Dotted names and values of what is neither a list, nor null, nor a reference to another option."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _plain(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float) or (isinstance(value, str) and "${" not in value):
            yield f"{prefix}{key}", value


def add_histograms(trainer: pl.Trainer, name: str, tables: Mapping[str, Tensor | None]) -> None:
    """Write histograms of the coordinates of features (N, D) at unit length, of rows that are evenly spread over N.

    Args:
        trainer: on the first process.
        name: of the evaluation set.
        tables: name -> features; None, tables without rows and what is not finite are left out.
    """
    for writer in writers(trainer):
        for kind, table in tables.items():
            if table is not None and len(table) and table.isfinite().all():
                rows = table[evenly_spread(len(table), SAMPLE, table.device)]
                values = F.normalize(rows.float(), dim=1).flatten().cpu()
                writer.add_histogram(f"embeddings/{name}/{kind}", values, trainer.global_step, bins=BINS)
