"""The dense part of an evaluation: one more pass over some pictures of every set, which keeps feature maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from repr.evaluate.during_training import Metric, joined
from repr.metrics.features import DenseFeatures
from repr.models.backbone import feature_map


@dataclass(frozen=True)
class Dense:
    """What dense evaluation looks at and computes; :class:`repr.evaluate.during_training.Evaluation` runs it.

    Args:
        metrics: functions ``(bank, query) -> dict`` of :class:`repr.metrics.features.DenseFeatures`, run once a set.
        views: how two crops of each picture are drawn, as the views of training.
        num_images: at most so many pictures of each set, evenly spread. The maps and masks of all are held at once:
            of 500 pictures of 224 pixels, 200 MB a set with the 7 x 7 x 2,048 maps of a ResNet-50 and as much for
            each crop.
    """

    metrics: Mapping[str, Metric]
    views: Mapping[str, Any]
    num_images: int

    def check(self, data: Any, module: Any) -> None:
        """Refuse what could not be evaluated, before anything is trained.

        Raises:
            ValueError: the module's backbone gives no maps, or ``views`` not two crops.
        """
        data.dense_dataloaders(self.num_images, self.views)
        backbone = getattr(module, "backbone", None)
        if not hasattr(backbone, "forward_intermediates"):
            raise ValueError(
                f"eval.dense needs feature maps, and {type(module).__name__} has none ({type(backbone).__name__} gives "
                "no map): set backbone.name to a timm ResNet, ConvNeXt or ViT, or choose an eval without dense"
            )

    @torch.no_grad()
    def tables(self, trainer: Any, module: Any) -> dict[str, DenseFeatures]:
        """The maps of every set by its name; every rank must call it."""
        data, tables = trainer.datamodule, {}
        loaders = data.dense_dataloaders(self.num_images, self.views)
        for number, (name, loader) in enumerate(zip(data.eval_names, loaders, strict=True)):
            rows = []
            for batch in islice(loader, trainer.num_val_batches[number]):
                batch = trainer.strategy.batch_to_device(batch, dataloader_idx=number)
                images = trainer.precision_plugin.convert_input([batch["image"], *batch["crops"]])
                with trainer.precision_plugin.val_step_context():
                    maps = [feature_map(module.backbone, image).float() for image in images]
                kept: dict[str, Tensor] = dict(zip(("maps", "first", "second"), maps, strict=True))
                kept |= {f"batch.{key}": batch[key] for key in ("index", "boxes", "mask") if key in batch}
                rows.append(kept)
            tables[name] = _table(joined(rows), list(data.mask_classes))
        return tables

    def compute(self, tables: Mapping[str, DenseFeatures]) -> dict[str, float]:
        """``<set>/<metric>`` of all sets."""
        values: dict[str, float] = {}
        for name, query in tables.items():
            for metric in self.metrics.values() if name != "bank" else ():
                values |= {f"{name}/{key}": value for key, value in metric(tables["bank"], query).items()}
        return values


def _table(columns: Mapping[str, Tensor], masks: list[str]) -> DenseFeatures:
    planes = columns.get("batch.mask")
    return DenseFeatures(
        index=columns["batch.index"],
        maps=columns["maps"],
        crops=(columns["first"], columns["second"]),
        boxes=columns["batch.boxes"],
        masks={} if planes is None else {name: planes[:, i] for i, name in enumerate(masks)},
    )
