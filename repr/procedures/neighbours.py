"""A run whose batches hold rows that are alike, by the features that the run starts with."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.utils import instantiate
from omegaconf import DictConfig

from repr.cli import is_first
from repr.data.neighbours import nearest, save_neighbours
from repr.distributed import gather_objects, on_first
from repr.fit import single
from repr.procedures.features import extract
from repr.procedures.multistage import SINGLE
from repr.runs.folder import NEIGHBOURS
from repr.runs.initial_weights import load_weights
from repr.runs.inputs import data_module


@dataclass
class BesideNeighbours:
    """The procedure: find the rows most similar to each, then train with each row beside one of them.

    The features are those of the weights that the run starts with, which ``init_from`` should name. The neighbours are
    kept in the run folder, and what is trained is an ordinary run with ``data.neighbours``, so that ``resume=`` goes on
    with it. All processes must see the run folder.

    Source: the hard pictures of NegCLIP (Yuksekgonul et al., 2023, arXiv 2210.01936), three by the features of CLIP.

    Attributes:
        num: neighbours of a row, of which one is drawn each time.
        by: features that the objective's ``predict_step`` gives: ``image``, ``text``, ...
    """

    num: int = 3
    by: str = "image"

    def config_faults(self, cfg: Any, objective: Any) -> Iterator[str]:
        """Options that do not fit."""
        known = getattr(objective, "EMBEDDINGS", (self.by,))
        if self.by not in known:
            yield f"procedure.by={self.by}; {type(objective).__name__} gives {', '.join(known)}"
        if self.num < 1:
            yield f"procedure.num={self.num}; set it to 1 or more"
        for key in ("neighbours", "clusters", "lanes"):
            if cfg.data.get(key):
                yield f"procedure=neighbours puts batches together, and data.{key} does too: set it to null"

    def __call__(self, cfg: DictConfig) -> None:
        """Find neighbours, and train a checked config as an ordinary run.

        Raises:
            ValueError: rows have the same key, or the objective gives no such features.
        """
        if is_first():
            print(f"looking for the {self.num} nearest rows of each, by '{self.by}'", flush=True)
        pl.seed_everything(cfg.seed, verbose=False)  # as the run itself will begin
        datamodule, objective = data_module(cfg), instantiate(cfg.objective)
        if cfg.init_from:
            load_weights(objective, cfg.init_from)
        features, read = extract(objective, datamodule, cfg, [self.by])
        # Processes that Lightning has started choose a folder of their own; from here on they know each other.
        cfg.run_folder = gather_objects(str(cfg.run_folder))[0]
        path = Path(cfg.run_folder, NEIGHBOURS)

        def save() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_neighbours(path, nearest(features[self.by], read, self.num), datamodule.train)

        on_first(save)
        cfg = deepcopy(cfg)
        cfg.procedure, cfg.data.neighbours = SINGLE, str(path)
        single(cfg)
