"""Do SimCLR and SwAV learn something, does multi-crop help, and is our SwAV level with lightly's?

The same backbone, pictures, augmentations, optimizer and number of steps; only the objective changes. lightly's SwAV is
its projection head, prototypes (which have a bias) and loss, put together as in its documentation: one pass of the
backbone and of the head for every view, prototypes normalised before every step. Neither has a queue here.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.claims.runs import Values, compared, evaluated, table, trained
from repr.batch import Batch, StepOutput
from repr.objectives.base import Objective
from repr.runs.folder import Results

TITLE = "SimCLR and SwAV on the embedded emoji"
LIBRARIES = ("torch", "timm", "lightly")
SEEDS, LENGTH = (3, 1), (6, 1)
METHODS = {
    "random encoder": [
        "experiment=simclr_emoji",
        "optim.lr=0",
        "optim.warmup_steps=0",
        "trainer.limit_train_batches=1",
    ],
    "SimCLR": ["experiment=simclr_emoji"],
    "SwAV, two views": ["experiment=swav_emoji", "objective.queue_length=0", "~views.small"],
    "SwAV, multi-crop": ["experiment=swav_emoji", "objective.queue_length=0"],
    "lightly's SwAV, multi-crop": [
        "experiment=swav_emoji",
        "objective._target_=benchmarks.claims.swav.LightlySwaV",
        *(f"~objective.{key}" for key in ("queue_length", "queue_start_step", "epsilon", "num_iters", "temperature")),
    ],
}
METRICS = {
    "kNN category": "knn_category",
    "probe category": "ridge_category",
    "kNN concept": "knn_concept",
    "probe concept": "ridge_concept",
}
SETS = {"test_style": list(METRICS), "val": ["kNN category", "probe category"]}
CHANCE = {"test_style/category": 0.222, "val/category": 0.189, "test_style/concept": 0.0007}


class LightlySwaV(Objective):
    """lightly's modules and loss in our loop; temperature, epsilon and rounds are its defaults, those of the paper."""

    TERMS = ("swapped_prediction",)

    def __init__(
        self,
        backbone: nn.Module,
        *,
        hidden_dim: int,
        dim: int,
        num_prototypes: int,
        freeze_steps: int,
        assign_views: Sequence[int],
        **base: Any,
    ) -> None:
        from lightly.loss import SwaVLoss
        from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

        super().__init__(backbone, **base)
        self.head = SwaVProjectionHead(int(backbone.num_features), hidden_dim, dim)
        self.prototypes = SwaVPrototypes(dim, num_prototypes, n_steps_frozen_prototypes=freeze_steps)
        self.loss, self.num_large = SwaVLoss(), len(assign_views)

    def step(self, batch: Batch) -> StepOutput:
        """Every view by itself, as in lightly's example."""
        self.prototypes.normalize()
        scores = [self._scores(view) for view in batch["views"]]
        loss = self.loss(scores[: self.num_large], scores[self.num_large :])
        return StepOutput({"swapped_prediction": loss.squeeze()})

    def _scores(self, view: Tensor) -> Tensor:
        embedding = F.normalize(self.head(self.backbone(view).flatten(start_dim=1)), dim=1, p=2)
        return self.prototypes(embedding, step=self.step_number)


def train(method: str, seed: int, epochs: int) -> Values:
    """One run; the metrics of its evaluation."""
    return numbers(evaluated(METHODS[method], seed, epochs))


def numbers(results: Results) -> Values:
    """Results of kNN and probes on each set, by the titles of the columns."""
    return {f"{data}/{name}": results[f"{data}/{METRICS[name]}"][0] for data, names in SETS.items() for name in names}


def settings(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s), {options.length} epoch(s) of 87 steps with 64 pictures, "
        "timm's `test_resnet` at 32 pixels, AdamW; augmentations and learning rate of "
        "`conf/experiment/swav_emoji.yaml`. The multi-crop has two views of 32 pixels and four of 16. kNN and ridge "
        "probe on the trunk. `test_style`: concepts of the training set, drawn by a vendor never trained on; `val`: "
        "concepts never trained on."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    runs = trained(list(METHODS), options)
    names = list(runs["SimCLR"][0])
    chance = {name: CHANCE[f"{name.split('/')[0]}/{name.split()[-1]}"] for name in names}
    lines = [*table(runs, names, chance=chance), ""]
    for ours, theirs in (
        ("SimCLR", "random encoder"),
        ("SwAV, two views", "random encoder"),
        ("SwAV, multi-crop", "random encoder"),
        ("SwAV, multi-crop", "SwAV, two views"),
        ("SwAV, multi-crop", "lightly's SwAV, multi-crop"),
    ):
        result = compared(runs[ours], runs[theirs], names)
        lines.append(f"- {ours}: {result.word} {theirs}; the six numbers differ by {result.told} on average.")
    yield lines
