"""Fine-tuning as an evaluation: a copy of the encoder with a linear classifier learns labels of the training set."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from hydra.utils import instantiate
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from repr.batch import Batch, Embeddings
from repr.distributed import rank
from repr.evaluate.protocol import Parts, Protocol, Values
from repr.evaluate.stored_tables import StoredTables
from repr.evaluate.tables import Tables
from repr.metrics.features import labelled
from repr.metrics.scores import MAJORITY, accuracy
from repr.models.backbone import width_of
from repr.objectives.base import share_of_step
from repr.optim import Optim
from repr.training.trainer import make_trainer


class Classifier(pl.LightningModule):
    """A backbone of timm's, trained in place, and a linear layer over all labels of an attribute.

    The labels of the attribute are ``column`` of a batch's ``label``.
    """

    def __init__(self, backbone: Any, num_classes: int, column: int, optim: Optim) -> None:
        super().__init__()
        self.backbone, self.head = backbone.requires_grad_(), nn.Linear(width_of(backbone), num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.column, self.optim = column, optim

    def embed(self, batch: Batch) -> Embeddings:
        """Give the scores (B, C) of an evaluation batch in the place of embeddings."""
        scores = self.head(self.backbone(batch["image"]))
        return Embeddings(image=scores, trunk=scores)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the cross-entropy of the labelled rows."""
        scores, label = self.head(self.backbone(batch["views"][0])).float(), batch["label"][:, self.column]
        loss = F.cross_entropy(scores, label, ignore_index=-1, reduction="sum") / max(int((label >= 0).sum()), 1)
        return loss * share_of_step(self.trainer, batch_idx)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and its schedule, which goes on with each optimizer step."""
        optimizer, schedule = self.optim.build(self, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass
class Finetune(Protocol):
    """All weights of a copy of the encoder and a linear classifier learn the labels of the training set by AdamW."""

    attributes: Sequence[str] | None  # one after the other; None: all that a set shares with the training set
    epochs: int
    batch_size: int  # of all processes together
    lr: float  # of the last layer, at its peak
    weight_decay: float
    layer_decay: float  # by which the learning rate falls from each layer to the one below it
    warmup_epochs: float
    said: ClassVar = {
        "optimizer": "AdamW",
        "schedule": "cosine",
        "trained": "all weights and a linear classifier",
        "chance": MAJORITY,
    }
    meanings: ClassVar = {r"finetune_(.+)": r"Share of samples whose \1 the fine-tuned copy names; higher is better."}
    silent = ("attributes",)
    positive = ("epochs", "batch_size", "lr", "layer_decay")

    def __post_init__(self) -> None:
        self._sets: dict[str, list[str]] = defaultdict(list)  # attribute -> sets that are asked for it
        self._values: dict[str, Values] = defaultdict(dict)

    def fault(self, tables: Tables) -> str | None:
        """Refuse training runs, and towers whose layers are not known."""
        if tables.cfg is None:
            return "trains a copy of the encoder: leave it to python -m repr.evaluate"
        if not hasattr(getattr(tables.encoder.module, "backbone", None), "group_matcher"):
            return "needs the layers of the image tower, which is not one of timm's"
        return None

    def want(self, tables: Tables, name: str) -> str | None:
        """Note the set for each attribute; pictures are embedded later, by the copy."""
        if why := tables.want("labels", name):
            return why
        shared = [a for a in tables.shared_attributes(name) if self.attributes is None or a in self.attributes]
        for attribute in shared:
            self._sets[attribute].append(name)
        if not shared:
            return f"{name} has no labels of {', '.join(self.attributes or ())} that the training set has"
        return None

    def prepare(self, tables: Tables) -> None:
        """Train a copy for each attribute, and classify the sets with it."""
        for attribute, sets in self._sets.items():
            model = self._trained(tables, attribute)
            with tempfile.TemporaryDirectory() as folder:
                encoder, cfg = replace(tables.encoder, module=model.eval()), tables.cfg.copy()
                cfg.features = "float32"
                scores = StoredTables(encoder, tables.data, cfg, Path(folder))
                for name in sets:
                    scores.want_pictures(name)
                scores.extract()
                for name in sets if not rank() else ():
                    table = scores.pictures(name)
                    rows, labels = labelled(table, attribute)
                    self._values[name] |= accuracy(f"finetune_{attribute}", table.image[rows].argmax(1), labels)

    def compute(self, tables: Tables, name: str) -> Parts:
        """Give the accuracies of the copies."""
        views = OmegaConf.to_container(tables.cfg.views, resolve=True)
        yield self._values[name], {"seed": tables.seed, "views": views}

    def _trained(self, tables: Tables, attribute: str) -> Classifier:
        """Train a classifier on all rows of the training set, with views as ``cfg.views`` says."""
        cfg, data = tables.cfg.copy(), tables.data
        train = instantiate(cfg.data, batch_size=self.batch_size)
        warmup_steps = int(self.warmup_epochs * (len(train.order) // self.batch_size))
        optim = Optim(
            lr=self.lr, weight_decay=self.weight_decay, layer_decay=self.layer_decay, warmup_steps=warmup_steps
        )
        pl.seed_everything(tables.seed, verbose=False)
        classes, column = data.attributes[attribute], list(data.attributes).index(attribute)
        model = Classifier(deepcopy(tables.encoder.module.backbone), len(classes), column, optim)
        cfg.trainer.update({"max_epochs": self.epochs, "max_steps": -1, "limit_val_batches": 0})
        make_trainer(cfg, [instantiate(node) for node in cfg.callbacks.values() if node], []).fit(model, train)
        return model
