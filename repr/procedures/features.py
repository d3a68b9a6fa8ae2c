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

from repr.batch import Batch, Embeddings
from repr.distributed import gather, rank
from repr.fit import Run
from repr.training.trainer import make_trainer, progress

NAMES = ("image", "text", "trunk", "projection")  # of the embeddings, those that samples may be clustered by


class FeatureTable(pl.Callback):
    """Collect what ``predict_step`` gives for every sample, on the first process.

    Each process embeds its share of every batch; rows are gathered and put to their places by index, so that those
    which only fill up the last batch change nothing.

    Args:
        names: which of ``NAMES``.
        num_rows: N, samples of the data set.

    Attributes:
        features: name -> (N, D) float32 on the CPU, of unit length, zero where the sample was not read; empty on the
            other processes.
        read: (N,) bool, the samples that were read; likewise.
    """

    def __init__(self, names: Sequence[str], num_rows: int) -> None:
        self.names, self.num_rows = names, num_rows
        self.features: dict[str, Tensor] = {}
        self.read = torch.zeros(num_rows, dtype=torch.bool)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Embeddings,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the embeddings of a batch.

        Raises:
            ValueError: the flow gives no such output.
        """
        given = {name: values for name in NAMES if (values := getattr(outputs, name)) is not None}
        if missing := [name for name in self.names if name not in given]:
            raise ValueError(
                f"{type(pl_module).__name__} gives no '{missing[0]}' for the samples of data.train; it gives "
                f"{', '.join(given)}: set procedure.cluster_by to one of them (text needs captions)"
            )
        index = gather(batch["index"])
        kept = {name: gather(F.normalize(given[name].float(), dim=1)) for name in self.names}
        if rank():
            return
        good = index >= 0  # negative: could not be read
        rows = index[good].cpu()
        self.read[rows] = True
        for name, values in kept.items():
            table = self.features.setdefault(name, torch.zeros(self.num_rows, values.shape[1]))
            table[rows] = values[good].cpu()


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
    run.datamodule.bad.gather()
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
