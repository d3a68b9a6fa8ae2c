"""What stages are made of: features of the training set, their clusters, and the encoders of all stages as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from repr.fit import Run
from repr.procedures.features import FeatureTable
from repr.training.trainer import make_trainer


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


def progress(cfg: DictConfig) -> list[pl.Callback]:
    """The progress bar of a config, if it has one."""
    node = cfg.callbacks.get("progress")
    return [instantiate(node)] if node else []
