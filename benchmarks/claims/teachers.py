"""Do methods without negatives learn something on the embedded emoji, and does what keeps them from collapse do that?

The same backbone, pictures, optimizer and number of steps; only the objective changes, and for LeJEPA the views. Each
method has a control without what keeps its features apart: the predictor of BYOL, the center of DINO (and the low
temperature of its teacher), the Gaussian of LeJEPA.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Iterator

from benchmarks.claims.runs import Values, compared, evaluated, table, trained
from benchmarks.claims.swav import CHANCE, numbers

TITLE = "Teachers, and LeJEPA, on the embedded emoji"
LIBRARIES = ("torch", "timm")
SEEDS, LENGTH = (3, 1), (6, 1)
RANDOM = "random encoder"
METHODS = {
    RANDOM: [
        "experiment=simclr_emoji",
        "optim.lr=0",
        "optim.warmup_steps=0",
        "trainer.limit_train_batches=1",
    ],
    "SimCLR": ["experiment=simclr_emoji"],
    "MoCo v3": ["experiment=mocov3_emoji"],
    "BYOL": ["experiment=byol_emoji"],
    "BYOL, no predictor": ["experiment=byol_emoji", "objective.predictor_layers=0"],
    "DINO": ["experiment=dino_emoji"],
    "DINO, no center": ["experiment=dino_emoji", "objective.center_momentum=1"],
    "DINO, teacher at temperature 1": [
        "experiment=dino_emoji",
        "objective.teacher_temperature=1",
        "objective.first_teacher_temperature=1",
    ],
    "LeJEPA": ["experiment=lejepa_emoji"],
    "LeJEPA, no Gaussian": ["experiment=lejepa_emoji", "objective.weights.sigreg=0"],
}
WARNED = "warned of collapse"
# An epoch has 87 steps; for one DINO's prototypes stay as they are, and for another its features recover.
LOOKS = ["callbacks.collapse.every=10", "callbacks.collapse.start=260"]


def train(method: str, seed: int, epochs: int) -> Values:
    """One run; the metrics of its evaluation, and whether the run has warned of collapse."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        results = evaluated([*METHODS[method], *LOOKS], seed, epochs)
    return numbers(results) | {WARNED: float(any("looks like collapse" in str(warning.message) for warning in told))}


def settings(options: Namespace) -> str:
    return (
        f"Mean and deviation over {options.seeds} seed(s), {options.length} epoch(s) of 87 steps with 64 pictures, "
        "timm's `test_resnet` at 32 pixels, AdamW, `conf/experiment/*_emoji.yaml`. kNN and ridge probe on the trunk. "
        "`test_style`: concepts of the training set, drawn by a vendor never trained on; `val`: concepts never trained "
        "on. The last column is the share of seeds whose run has warned of collapse, from step 260 of 522 on."
    )


def report(options: Namespace) -> Iterator[list[str]]:
    runs = trained(list(METHODS), options)
    names = [name for name in runs["SimCLR"][0] if name != WARNED]
    chance = {name: CHANCE[f"{name.split('/')[0]}/{name.split()[-1]}"] for name in names}
    yield table(runs, [*names, WARNED], chance=chance)
    pairs = [(method, RANDOM) for method in METHODS if method != RANDOM]
    pairs += [(method, method.split(",")[0]) for method in METHODS if "," in method]
    lines = []
    for ours, theirs in pairs:
        result = compared(runs[ours], runs[theirs], names)
        lines.append(f"- {ours}: {result.word} {theirs}; the six numbers differ by {result.told} on average.")
    yield lines
