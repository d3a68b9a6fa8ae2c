"""Features of a whole data set, collected while Lightning predicts."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from repr.batch import Batch, Embeddings
from repr.distributed import gather, rank

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
