"""Do SimCLR and SwAV learn something, does multi-crop help, and is our SwAV level with lightly's?

The same backbone, pictures, augmentations, optimizer and number of steps; only the objective changes. lightly's SwAV is
its projection head, prototypes (which have a bias) and loss, put together as in its documentation: one pass of the
backbone and of the head for every view, prototypes normalised before every step. Neither has a queue here.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Iterator

from benchmarks.claims.peers import become_peer
from benchmarks.claims.runs import Values, compared, composed, table, trained
from repr.fit import fit
from repr.runs.folder import Results

TITLE = "SimCLR and SwAV on the embedded emoji"
LIBRARIES = ("torch", "timm", "lightly")
SEEDS, LENGTH = (3, 1), (6, 1)
LIGHTLYS = "lightly's SwAV, multi-crop"
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
    LIGHTLYS: ["experiment=swav_emoji", "objective.queue_length=0"],
}
METRICS = {
    "kNN category": "knn_category",
    "probe category": "ridge_category",
    "kNN concept": "knn_concept",
    "probe concept": "ridge_concept",
}
SETS = {"test_style": list(METRICS), "val": ["kNN category", "probe category"]}
CHANCE = {"test_style/category": 0.222, "val/category": 0.189, "test_style/concept": 0.0007}


def train(method: str, seed: int, epochs: int) -> Values:
    """One run; the metrics of its evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = composed(METHODS[method], seed, epochs, folder)
        if method == LIGHTLYS:
            become_peer(cfg, "SwAV", "lightly")
        return numbers(fit(cfg))


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
        ("SwAV, multi-crop", LIGHTLYS),
    ):
        result = compared(runs[ours], runs[theirs], names)
        lines.append(f"- {ours}: {result.word} {theirs}; the six numbers differ by {result.told} on average.")
    yield lines
