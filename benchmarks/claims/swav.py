"""Do SimCLR and SwAV learn something, does multi-crop help, and is our SwAV level with lightly's?

The same backbone, pictures, augmentations, optimizer and number of steps; only the objective changes. Run from the root
of the repository::

    python -m benchmarks.claims.swav            # three seeds, at most half an hour on two cores
    python -m benchmarks.claims.swav --quick    # one seed and few steps, at most three minutes
    python -m benchmarks.claims.swav --write    # also writes benchmarks/results/swav.md

Both cores work on one run each (``--jobs``); accuracy does not depend on it. lightly's SwAV is its projection head,
prototypes (which have a bias) and loss, put together as in its documentation: one pass of the backbone and of the head
for every view, prototypes normalised before every step. Neither has a queue here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.claims.seeds import ROOT, compared, evaluated, in_process
from benchmarks.report import hardware, publish
from repr.batch import Batch, StepOutput
from repr.objectives.base import Objective

RESULTS = ROOT / "benchmarks/results/swav.md"
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
Values = dict[str, float]


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
    results = evaluated(METHODS[method], seed, epochs)
    return {f"{data}/{name}": results[f"{data}/{METRICS[name]}"][0] for data, names in SETS.items() for name in names}


def run(method: str, seed: int, epochs: int) -> Values:
    """The same in a process with one thread."""
    return in_process("benchmarks.claims.swav", method, seed, epochs)


def table(runs: dict[str, list[Values]]) -> str:
    names = list(next(iter(runs.values()))[0])
    lines = [f"| method | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for method, values in runs.items():
        columns = [[value[name] for value in values] for name in names]
        cells = [
            f"{statistics.mean(column):.3f}" + (f" ± {statistics.stdev(column):.3f}" if len(column) > 1 else "")
            for column in columns
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    chance = [CHANCE[f"{name.split('/')[0]}/{name.split()[-1]}"] for name in names]
    return "\n".join([*lines, f"| chance | {' | '.join(str(value) for value in chance)} |"])


def verdict(runs: dict[str, list[Values]]) -> list[str]:
    """In words that follow from the numbers; a difference counts if a paired t-test over seeds finds it (5 %)."""

    def compare(ours: str, theirs: str) -> str:
        names = list(runs[ours][0])
        pairs = [
            statistics.mean(a[name] - b[name] for name in names) for a, b in zip(runs[ours], runs[theirs], strict=True)
        ]
        word, mean, error = compared(pairs)
        spread = "" if error is None else f" ± {error:.3f}"
        return f"- {ours}: {word} {theirs}; the six numbers differ by {mean:+.3f}{spread} on average."

    return [
        compare("SimCLR", "random encoder"),
        compare("SwAV, two views", "random encoder"),
        compare("SwAV, multi-crop", "random encoder"),
        compare("SwAV, multi-crop", "SwAV, two views"),
        compare("SwAV, multi-crop", "lightly's SwAV, multi-crop"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--seeds", type=int, help="runs of each method; default 3, quick 1")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    args = parser.parse_args()
    epochs, seeds = (1, args.seeds or 1) if args.quick else (6, args.seeds or 3)
    start = time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        found = {(method, seed): pool.submit(run, method, seed, epochs) for seed in range(seeds) for method in METHODS}
        for (method, seed), future in found.items():
            if (error := future.exception()) is not None:
                pool.shutdown(cancel_futures=True)
                raise error
            numbers = {name: round(value, 3) for name, value in future.result().items()}
            print(f"{time.monotonic() - start:.0f} s: {method}, seed {seed}: {numbers}", file=sys.stderr, flush=True)
    runs = {method: [found[method, seed].result() for seed in range(seeds)] for method in METHODS}
    lines = [
        "# SimCLR and SwAV on the embedded emoji",
        "",
        f"Mean and deviation over {seeds} seed(s), {epochs} epoch(s) of 87 steps with 64 pictures, timm's "
        "`test_resnet` at 32 pixels, AdamW; augmentations and learning rate of `conf/experiment/swav_emoji.yaml`. The "
        "multi-crop has two views of 32 pixels and four of 16. kNN and ridge probe on the trunk. `test_style`: "
        "concepts of the training set, drawn by a vendor never trained on; `val`: concepts never trained on.",
        "",
        f"`{' '.join(['python -m benchmarks.claims.swav', *sys.argv[1:]])}`, {time.monotonic() - start:.0f} s.",
        "",
        hardware("torch", "timm", "lightly"),
        "",
        table(runs),
        "",
        *verdict(runs),
    ]
    publish(lines, RESULTS if args.write else None)


if __name__ == "__main__":
    main()
