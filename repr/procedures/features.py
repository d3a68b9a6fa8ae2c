"""What happens between two stages: features of the whole training set are collected, and clustered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from repr.batch import Embeddings
from repr.data.datamodule import DataModule
from repr.evaluate.stored_features import READ, TableWriter
from repr.training.trainer import make_trainer, progress

NAMES = ("image", "text", "trunk", "projection")  # the embeddings that samples may be clustered by


def extract(
    objective: pl.LightningModule, datamodule: DataModule, cfg: DictConfig, names: Sequence[str]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Embed the whole training set with the evaluation transform; every rank must call it.

    Args:
        objective: what embeds it.
        datamodule: of the training set.
        cfg: of the run whose they are.
        names: which of ``NAMES``.

    Returns:
        Name -> (N, D) float32 of unit length, zero where the sample could not be read, and which samples could,
        (N,) bool; both are filled on the first process alone.

    Raises:
        ValueError: the flow gives no such output.
    """

    def select(outputs: Embeddings) -> dict[str, Tensor]:
        given = {name: values for name in NAMES if (values := getattr(outputs, name)) is not None}
        if missing := [name for name in names if name not in given]:
            raise ValueError(
                f"{type(objective).__name__} gives no '{missing[0]}' for the samples of data.train; it gives "
                f"{', '.join(given)}: set procedure.cluster_by to one of them (text needs captions)"
            )
        return {name: F.normalize(given[name].float(), dim=1) for name in names}

    writer = TableWriter(torch.arange(len(datamodule.train)), select=select)
    make_trainer(cfg, [writer, *progress(cfg)], []).predict(objective, datamodule, return_predictions=False)
    datamodule.bad.gather()
    read = writer.columns.pop(READ, np.zeros(len(datamodule.train))).astype(bool)
    return writer.columns, read


def cluster(
    features: Mapping[str, np.ndarray], read: np.ndarray, clustering: Mapping[str, Any], seed: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Cluster one table of features, or several into the product of their clusters.

    Args:
        features: name -> (N, D) float32.
        read: (N,) bool, the rows that count.
        clustering: config of an estimator with ``fit_predict``.
        seed: ``random_state`` of the estimator, if it has one.

    Returns:
        The cluster of each row, (N,) int64, -1 where it does not count; ``c_1 + K_1 c_2 + ...`` of several tables. And
        the centroids (K, D) by name.

    Raises:
        ValueError: fewer rows than clusters, or features that are not finite.
    """
    ids, factor, centroids = np.full(len(read), -1, dtype=np.int64), 1, {}
    ids[read] = 0
    for name, table in features.items():
        rows = table if read.all() else table[read]
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
