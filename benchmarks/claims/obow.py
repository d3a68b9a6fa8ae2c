"""Does predicting a bag of words teach anything on drawn scenes, and is it the picture's own bag that does?

The control predicts the bag of another picture of the batch, which no view of a picture tells anything about; another
has a teacher that stays as it was initialised. SwAV and PixPro were level with random weights after as few steps, so
what is asked is whether OBoW is above its own control.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from torch import Tensor

from benchmarks.claims.runs import Values, against, evaluated, table, trained
from repr.objectives.bow import OBoW

TITLE = "Bags of words on drawn scenes"
LIBRARIES = ("torch", "timm")
SEEDS, LENGTH = (3, 1), (3, 1)
RANDOM, OURS, MATES = "random encoder", "OBoW", "OBoW, bags of other pictures"
METHODS = {
    RANDOM: ["experiment=obow_scenes", "optim.lr=0", "optim.warmup_steps=0", "trainer.limit_train_batches=1"],
    OURS: ["experiment=obow_scenes"],
    MATES: ["experiment=obow_scenes", "objective._target_=benchmarks.claims.obow.OfOtherPictures"],
    "OBoW, teacher as initialised": ["experiment=obow_scenes", "objective.momentum=1"],
    "SimCLR": ["experiment=simclr_scenes"],
}
COLUMNS = {
    "val/ridge_shape": "probe of shapes",
    "val/knn_shape": "kNN of shapes",
    "val/linear_miou_figure": "mIoU of figures",
    "val/linear_miou_shape": "mIoU of shapes",
}


class OfOtherPictures(OBoW):
    """Every picture predicts the bag of the one before it in the batch."""

    def _loss(self, rows: Tensor, words: list[Tensor], bags: list[Tensor], num_views: int) -> Tensor:
        return super()._loss(rows, words, [bag.roll(1, 0) for bag in bags], num_views)


def train(method: str, seed: int, epochs: int) -> Values:
    """One run; the metrics of its evaluation."""
    results = evaluated(METHODS[method], seed, epochs)
    return {title: results[name][0] for name, title in COLUMNS.items()}


def settings(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s), {options.length} epoch(s) of `conf/experiment/"
        "obow_scenes.yaml`. Dense numbers by a linear probe on the last map, the others of the trunk."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    runs = trained(list(METHODS), options)
    columns = list(COLUMNS.values())
    yield table(runs, columns)
    kinds = {"of the picture": columns[:2], "dense": columns[2:]}
    yield against(runs, [OURS, *list(METHODS)[3:]], (RANDOM, MATES), kinds)
