"""What stages are made of: features of the training set, their clusters, and the encoders of all stages as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from repr.batch import Batch
from repr.callbacks.features import FeatureTable
from repr.export.trained import Trained
from repr.fit import Run, make_trainer
from repr.models.concat import Concat, Encoder, Norm, join
from repr.stage_record import RECORD


def extract(run: Run, cfg: DictConfig, names: Sequence[str]) -> FeatureTable:
    """Features of the whole training set with the evaluation transform; every rank must call it.

    Args:
        run: a finished run.
        cfg: its config.
        names: outputs of the objective's ``predict_step``.

    Returns:
        The table, filled on the first process.
    """
    table = FeatureTable(names, len(run.datamodule.train))
    make_trainer(cfg, [table, *progress(cfg)], []).predict(run.objective, run.datamodule, return_predictions=False)
    run.datamodule.gather_bad()
    return table


def cluster(
    features: Mapping[str, Tensor], read: np.ndarray, clustering: Mapping[str, Any], seed: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Cluster one table of features, or several into the product of their clusters.

    Args:
        features: name -> (N, D) float32.
        read: (N,) bool, the rows that count.
        clustering: config of an estimator with ``fit_predict``.
        seed: its ``random_state``, if it has one.

    Returns:
        (N,) int64, the cluster of each row, -1 where it does not count; ``c_1 + K_1 c_2 + ...`` of several tables. And
        the centroids (K, D) by name.

    Raises:
        ValueError: fewer rows than clusters, or features that are not finite.
    """
    ids, factor, centroids = np.full(len(read), -1, dtype=np.int64), 1, {}
    ids[read] = 0
    for name, table in features.items():
        rows = table.numpy() if read.all() else table.numpy()[read]
        estimator = instantiate(clustering)
        num_clusters = getattr(estimator, "n_clusters", 1)
        if len(rows) < num_clusters:
            raise ValueError(
                f"{len(rows)} samples cannot make {num_clusters} clusters; lower procedure.clustering.n_clusters"
            )
        if not np.isfinite(rows).all():
            raise ValueError(f"features '{name}' of data.train are not finite: lower optim.lr, and start a new run")
        if "random_state" in estimator.get_params():
            estimator.set_params(random_state=seed)
        labels = estimator.fit_predict(rows)
        if (centers := getattr(estimator, "cluster_centers_", None)) is None:
            centers = np.stack([rows[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
        ids[read] += factor * labels
        factor, centroids[name] = factor * len(centers), np.asarray(centers, dtype=np.float32)
    return ids, centroids


class Joined(pl.LightningModule):
    """The stages side by side, to be evaluated like any objective; it is not trained.

    Args:
        stages: objectives.
        norm: see :func:`repr.models.concat.join`.

    Attributes:
        image: encoder (B, 3, H, W) -> (B, sum of D) of unit length, called like a backbone.
        text: likewise of token ids (B, L); None without text towers.
    """

    def __init__(self, stages: Sequence[Any], *, norm: Norm = "joined") -> None:
        super().__init__()
        self.norm = norm
        texts = [getattr(stage, "text", None) for stage in stages]
        has_text = all(text is not None for text in texts)
        widths = [
            stage.backbone.num_features if text is None else text.output_dim
            for stage, text in zip(stages, texts, strict=True)
        ]
        pairs = list(zip(stages, widths, strict=True))
        self.image = Concat([Encoder(stage, "encode_image", width) for stage, width in pairs], norm=norm)
        self.text = Concat([Encoder(stage, "encode_text", w) for stage, w in pairs], norm=norm) if has_text else None

    def configure_model(self) -> None:
        """Every process holds all of it, under FSDP2 too, which asks for this hook: nothing is trained."""

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        """What the stages give for an evaluation batch, joined name by name."""
        parts = [cast(Any, encoder).module.embed(batch) for encoder in self.image.encoders]
        return {name: join([part[name] for part in parts], self.norm) for name in parts[0]}

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, sum of D)."""
        return self.image(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, sum of D).

        Raises:
            ValueError: the stages have no text towers.
        """
        if self.text is None:
            raise ValueError("these stages encode images only")
        return self.text(tokens)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Embed an evaluation batch."""
        return self.embed(batch)


def load_joined(run_folder: str | Path, *, num_stages: int | None = None, norm: Norm = "joined") -> Joined:
    """The joined encoder of a multistage run, in evaluation mode, on the CPU.

    Args:
        run_folder: of the whole run.
        num_stages: how many stages, from the first; None: all that are finished.
        norm: see :func:`repr.models.concat.join`.

    Raises:
        ValueError: there is no such stage.
    """
    num_stages = len(list(Path(run_folder).glob(f"stage-*/{RECORD}"))) if num_stages is None else num_stages
    if not num_stages:
        raise ValueError(f"{run_folder} has no finished stage: give the folder of a multistage run")
    return Joined([load_objective(Path(run_folder, f"stage-{s}")) for s in range(num_stages)], norm=norm).eval()


def load_objective(folder: str | Path) -> Any:
    """The objective of a run with the weights of its last whole checkpoint, in evaluation mode, on the CPU."""
    return Trained.read(folder).objective


def progress(cfg: DictConfig) -> list[pl.Callback]:
    """The progress bar of a config, if it has one."""
    node = cfg.callbacks.get("progress")
    return [instantiate(node)] if node else []
