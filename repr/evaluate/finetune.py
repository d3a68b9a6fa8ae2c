"""Fine-tuning as an evaluation: a copy of the encoder with a linear classifier learns labels of the training set."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from repr.batch import Batch
from repr.data.datamodule import DataModule
from repr.distributed import rank
from repr.evaluate.feature_tables import FeatureTables
from repr.evaluate.foreign import Encoder
from repr.metrics.tables import accuracy, labelled
from repr.objectives.base import share_of_step
from repr.optim import Optim
from repr.training.trainer import make_trainer


class Classifier(pl.LightningModule):
    """A backbone and a linear layer over all labels of an attribute.

    Args:
        backbone: a timm model, trained in place.
        num_classes: C.
        column: of the attribute in ``label``.
        optim: optimizer and schedule.
    """

    def __init__(self, backbone: Any, num_classes: int, column: int, optim: Optim) -> None:
        super().__init__()
        self.backbone, self.head = backbone.requires_grad_(), nn.Linear(backbone.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.column, self.optim = column, optim

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        """Scores (B, C) of an evaluation batch, under the names that tables have."""
        scores = self.head(self.backbone(batch["image"]))
        return {"image": scores, "trunk": scores}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of the labelled rows."""
        scores, label = self.head(self.backbone(batch["views"][0])).float(), batch["label"][:, self.column]
        loss = F.cross_entropy(scores, label, ignore_index=-1, reduction="sum") / max(int((label >= 0).sum()), 1)
        return loss * share_of_step(self.trainer, batch_idx)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer and its schedule, stepped once per optimizer step."""
        optimizer, schedule = self.optim.build(self, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fault(encoder: Encoder) -> str | None:
    """Why an encoder cannot be fine-tuned layer by layer, or None."""
    if hasattr(getattr(encoder.module, "backbone", None), "group_matcher"):
        return None
    return "the image tower is not one of timm's, which tell their layers"


def finetune(
    cfg: DictConfig, encoder: Encoder, data: DataModule, attribute: str, sets: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Train on all rows of the training set, with views as ``cfg.views`` says, and classify sets; every rank calls it.

    Args:
        cfg: a whole config of ``repr.evaluate``, with ``eval.finetune``.
        encoder: stays as it is.
        data: the sets.
        attribute: what is learned.
        sets: what is classified.

    Returns:
        Set -> ``finetune_<attribute>`` with the share of the largest class as its chance; empty on other ranks.
    """
    from hydra.utils import instantiate

    options, column = cfg.eval.finetune, list(data.attributes).index(attribute)
    train = instantiate(cfg.data, batch_size=options.batch_size, mean=list(encoder.mean), std=list(encoder.std))
    steps = len(train.order) // options.batch_size
    optim = Optim(
        lr=options.lr,
        weight_decay=options.weight_decay,
        layer_decay=options.layer_decay,
        warmup_steps=int(options.warmup_epochs * steps),
    )
    pl.seed_everything(cfg.seed, verbose=False)
    backbone = deepcopy(encoder.module.backbone)
    model = Classifier(backbone, len(data.attributes[attribute]), column, optim)
    told = cfg.copy()
    told.trainer.update({"max_epochs": options.epochs, "max_steps": -1, "limit_val_batches": 0})
    progress = [instantiate(node) for node in cfg.callbacks.values() if node]
    make_trainer(told, progress, []).fit(model, train)
    values: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trained = replace(encoder, module=model.eval())
        tables = FeatureTables(trained, data, cfg, Path(folder), "float32")
        for name in sets:
            tables.want_pictures(name)
        tables.extract()
        for name in sets if not rank() else ():
            table = tables.pictures(name)
            rows, labels = labelled(table, attribute)
            values[name] = accuracy(f"finetune_{attribute}", table.image[rows].argmax(1), labels)
    return values
