"""Which settings suit the small recipes? The log of the search that chose them.

One setting is changed at a time from where a recipe stood at ten epochs, then some together. One seed: what was chosen
runs with three beside other libraries in the claim ``quality``.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Iterator

from benchmarks.claims.runs import Values, evaluated, table, trained
from benchmarks.claims.swav import CHANCE, numbers

TITLE = "Settings of the small recipes"
LIBRARIES = ("torch", "timm")
SEEDS, LENGTH = (1, 1), (10, 1)
AS_IT_WAS, LONGER, TIMES = "as it was", "three times as long", 3
CROPPED = "views.main.scale=[0.2,1]"
ASSIGNED = "objective.assign_views=[0,1,2,3,4,5] objective.freeze_steps=0"  # as stable-pretraining does it
SEARCHED = {
    "SimCLR": (
        "experiment=simclr_emoji",
        [AS_IT_WAS, "optim.lr=5e-3", "optim.lr=1e-2", LONGER],
    ),
    "SwAV": (
        "experiment=swav_emoji objective.queue_length=0 objective.assign_views=[0,1] objective.freeze_steps=87",
        [
            AS_IT_WAS,
            "optim.lr=5e-4",
            "optim.lr=1e-3",
            "optim.lr=5e-3",
            "objective.num_prototypes=300",
            "objective.epsilon=0.03",
            CROPPED,
            LONGER,
            f"{LONGER} objective.epsilon=0.03 objective.num_prototypes=300",
            ASSIGNED,
            f"{LONGER} {ASSIGNED}",
            f"{LONGER} {ASSIGNED} objective.epsilon=0.03",
        ],
    ),
    "BYOL": (
        "experiment=byol_emoji",
        [
            AS_IT_WAS,
            "optim.lr=5e-4",
            "optim.lr=1e-3",
            "objective.momentum=0.9",
            "objective.momentum=0.99",
            CROPPED,
            LONGER,
        ],
    ),
    "DINO": (
        "experiment=dino_emoji",
        [
            AS_IT_WAS,
            "optim.lr=5e-4",
            "optim.lr=1e-3",
            "objective.num_prototypes=256",
            "objective.momentum=0.99",
            "objective.centering=sinkhorn",
            CROPPED,
            LONGER,
            f"{LONGER} objective.momentum=0.99",
            f"{LONGER} objective.centering=sinkhorn",
        ],
    ),
}
METHODS = {
    f"{name} | {changed}": recipe.split() for name, (recipe, settings) in SEARCHED.items() for changed in settings
}
MEAN = "mean"


def train(method: str, seed: int, epochs: int) -> Values:
    """One run; the metrics of its evaluation."""
    changed = method.split(" | ")[1].removeprefix(AS_IT_WAS)
    longer, options = changed.startswith(LONGER), changed.removeprefix(LONGER).split()
    values = numbers(evaluated([*METHODS[method], *options], seed, epochs * (TIMES if longer else 1)))
    return values | {MEAN: statistics.mean(values.values())}


def settings(options: Namespace) -> str:
    return (
        f"{options.seeds} seed(s), {options.length} epoch(s) of 87 steps with 64 pictures of 32 pixels, AdamW, timm's "
        "`test_resnet`, `conf/experiment/*_emoji.yaml` with learning rate .002, 60 prototypes for SwAV and 1,024 for "
        "DINO, momentum .97. kNN and ridge probe on the trunk. `test_style`: concepts of the training set, drawn by a "
        "vendor never trained on; `val`: concepts never trained on. Random weights have a mean of .32, and seeds "
        "differ by some .01."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    runs = trained(list(METHODS), options)
    names = [name for name in next(iter(runs.values()))[0] if name != MEAN]
    chance = {name: CHANCE[f"{name.split('/')[0]}/{name.split()[-1]}"] for name in names}
    yield table(runs, [*names, MEAN], corner="method | changed", chance=chance)
